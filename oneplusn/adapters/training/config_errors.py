"""Say what is wrong with a configuration: the key, the value, and what would be right."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from oneplusn.adapters.checks import shown

UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
FREE_TEXT = ("value_error", "missing")


def explain(error: ValidationError, model: type[BaseModel], origin: str) -> str:
    """Return one line for each fault, after the name of the file."""
    faults = [_explain_one(fault, model) for fault in error.errors(include_url=False)]
    return f"{origin}: {'; '.join(faults)}"


def known_keys(section: type[Any]) -> dict[str, Any]:
    """Return key -> annotation of a section, which is a model or a dataclass."""
    if issubclass(section, BaseModel):
        return {name: field.annotation for name, field in section.model_fields.items()}
    annotations: dict[str, Any] = {
        name: field.annotation for name, field in section.__pydantic_fields__.items()
    }
    return annotations


def section_of(annotation: object) -> type[Any] | None:
    """Return the section that a key holds, in a list or alone, or None if it holds a value."""
    if isinstance(annotation, type) and (
        issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)
    ):
        return annotation
    return next((found for part in get_args(annotation) if (found := section_of(part))), None)


def _explain_one(fault: Any, model: type[BaseModel]) -> str:  # noqa: ANN401 - pydantic's own dict
    parts = [str(part) for part in fault["loc"]]
    key = ".".join(parts)
    if fault["type"] in UNKNOWN:
        known = list(known_keys(_section_at(parts[:-1], model)))
        close = difflib.get_close_matches(parts[-1], known, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        return f"unknown key {key!r}{hint}, known: {', '.join(known)}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] in FREE_TEXT:
        return f"{key}: {message}" if key else message
    return f"{key} is {shown(fault['input'])}: {message}"


def _section_at(parts: list[str], model: type[BaseModel]) -> type[Any]:
    section: type[Any] = model
    for part in parts:
        annotation = known_keys(section).get(part)
        section = section_of(annotation) or section
    return section
