"""Read the YAML that people write: no key twice, and 3e-3 is a number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from oneplusn.adapters.checks import shown
from oneplusn.errors import InvalidRequest


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping.

        Raises:
            ConstructorError: a key twice.
        """
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"the key {shown(key_node.value)} is there twice",
                    key_node.start_mark,
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1, which the library reads, takes 3e-3 for text: its numbers have a dot.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a file that holds one mapping.

    Raises:
        InvalidRequest: it cannot be read, or holds something else.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise InvalidRequest(f"{path} holds {shown(content)}; expected keys and values")
    return content


def parse_value(text: str) -> object:
    """Read one value as the file would have it.

    Raises:
        InvalidRequest: it is no YAML.
    """
    try:
        value: object = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise InvalidRequest(f"{shown(text)} is no YAML value: {error}") from error
    return value
