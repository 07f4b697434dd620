"""An example configuration with every key, what it means, and its default."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from oneplusn.adapters.methods import METHODS
from oneplusn.adapters.methods.settings import MEANING, RULE, Rule, declared
from oneplusn.adapters.training.config import MethodChoice, Source, TrainConfig
from oneplusn.adapters.training.config_errors import section_of

WIDTH = 96


def example_config() -> str:
    """Return a file that `oneplusn train` reads, with a comment above every key."""
    return "\n".join(_lines(TrainConfig, "")) + "\n"


def fields_of(section: type[Any]) -> dict[str, FieldInfo]:
    """Return the keys of a section, which is a model or a dataclass."""
    if issubclass(section, BaseModel):
        return dict(section.model_fields)
    fields: dict[str, FieldInfo] = dict(section.__pydantic_fields__)
    return fields


def shown_value(field: FieldInfo) -> object:
    """Return the default of a key, or an example where it has none."""
    default = field.get_default(call_default_factory=True, validated_data={})
    return field.examples[0] if default is PydanticUndefined and field.examples else default


def _lines(section: type[Any], indent: str) -> Iterator[str]:
    for name, field in fields_of(section).items():
        yield from _comment(str(field.description), indent)
        inner = section_of(field.annotation)
        if inner is MethodChoice:
            yield from _method_lines(indent)
        elif inner is Source or inner is None:
            yield from _value_lines(name, field, indent)
        else:
            yield f"{indent}{name}:"
            yield from _lines(inner, f"{indent}  ")


def _value_lines(name: str, field: FieldInfo, indent: str) -> Iterator[str]:
    value = shown_value(field)
    if section_of(field.annotation) is Source and value:
        for key, inner in fields_of(Source).items():
            yield from _comment(f"  {key}: {inner.description}", indent)
    yield f"{indent}{name}: {in_yaml(value)}"


def in_yaml(value: object) -> str:
    """Return a value as it stands in a file."""
    plain = isinstance(value, str | int | float | bool | list | dict | None)
    text: str = yaml.safe_dump(value if plain else str(value), default_flow_style=True)
    return text.removesuffix("...\n").strip()


def _method_lines(indent: str) -> Iterator[str]:
    chosen = MethodChoice().name
    for name, method in METHODS.items():
        yield from _comment(f"{name}: {method.summary}; has {', '.join(declared(method))}", indent)
    yield f"{indent}method:"
    yield f"{indent}  name: {chosen}"
    for key, entry in declared(METHODS[chosen]).items():
        rule: Rule | None = entry.metadata[RULE]
        expects = f": {rule.expects}" if rule is not None else ""
        yield from _comment(f"{entry.metadata[MEANING]}{expects}", f"{indent}  ")
        yield f"{indent}  {key}: {in_yaml(entry.default)}"


def _comment(text: str, indent: str) -> Iterator[str]:
    for line in textwrap.wrap(text, WIDTH - len(indent)):
        yield f"{indent}# {line}"
