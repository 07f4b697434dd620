"""JSON schemas that requests bring: what is refused, and how long a string at a place may be.

Lengths of strings are taken out of a schema before it becomes a grammar. As a grammar they cost a
state for every character, seconds of compiling and milliseconds a token, and none of it holds
beside a `pattern`. The engine counts characters instead: it knows where in the document it is, and
looks the lengths up here. Knows neither torch nor pydantic.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from oneplusn.errors import InvalidRequest

MAX_SCHEMA_BYTES = 128 << 10
MAX_DEPTH = 64
MAX_ENUM_VALUES = 1000
MAX_LENGTH = (1 << 31) - 1

Schema = Mapping[str, Any]

_MAPS = ("properties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf")
_SINGLES = ("items", "additionalProperties")
_OTHER_MAPS = ("patternProperties", "dependentSchemas")
_OTHER_LISTS = ("prefixItems",)
_OTHER_SINGLES = (
    *("not", "if", "then", "else", "contains"),
    *("propertyNames", "unevaluatedItems", "unevaluatedProperties"),
)
# Below these the path to a string is not followed, so lengths stay in the grammar.
_UNTRACKED = frozenset((*_OTHER_MAPS, *_OTHER_LISTS, *_OTHER_SINGLES))
# What no grammar here holds: free to say in a schema, unless the schema is strict.
_NOT_HELD = frozenset(
    (
        *("not", "if", "then", "else", "dependentSchemas", "dependentRequired", "dependencies"),
        *("uniqueItems", "contains", "minContains", "maxContains"),
    )
)
_LENGTHS = ("minLength", "maxLength")
# Beside one of these nothing else is held but what says nothing, or what the engine counts.
_ALONE = frozenset(("$ref", "anyOf", "oneOf", "allOf"))
_BESIDE = frozenset(
    (
        *("title", "description", "default", "examples", "deprecated", "discriminator", "type"),
        *("readOnly", "writeOnly", "$comment", "$schema", "$id", "$defs", "definitions", *_LENGTHS),
    )
)


def check_schema(schema: object, *, strict: bool, param: str) -> Schema:
    """Refuse a schema that is too large, reaches outside, or asks for what cannot be held.

    Args:
        schema: As the request brings it.
        strict: Refuse keywords that the output may violate, too.
        param: Field of the request that holds it.

    Raises:
        InvalidRequest: It is refused; the code is `grammar_too_complex` where it is too large.
    """
    if not isinstance(schema, Mapping):
        msg = f"{param} is {type(schema).__name__}; a JSON schema is an object"
        raise InvalidRequest(msg, param=param)
    _check_size(schema, param)
    num_values = 0
    for node in _subschemas(schema):
        _check_node(node, strict=strict, param=param)
        values = node.get("enum", [])
        num_values += len(values) if isinstance(values, list) else 0
    if num_values > MAX_ENUM_VALUES:
        msg = f"{param} lists {num_values} values in enum; at most {MAX_ENUM_VALUES} are possible"
        raise InvalidRequest(msg, code="grammar_too_complex", param=param)
    return schema


def without_lengths(schema: Schema) -> tuple[Schema, bool]:
    """Prepare a checked schema for the grammar; say whether the engine has lengths to count.

    An object without properties and an array without items become explicitly free, as the grammar
    takes what a schema leaves open for forbidden.
    """
    has_lengths = any(key in node for node in _subschemas(schema) for key in _LENGTHS)
    is_tracked = not any(_UNTRACKED & node.keys() for node in _subschemas(schema))
    strip = has_lengths and is_tracked
    return _rewritten(schema, strip=strip), strip


@dataclass(frozen=True, slots=True)
class Place:
    """A schema that a value must match, and the document that its references point into."""

    root: Schema
    schema: Schema


def member(places: Sequence[Place], key: str) -> list[Place]:
    """Find what the value of `key` must match in an object that matches `places`."""
    found = []
    for place in _expanded(places):
        properties = place.schema.get("properties", {})
        value = properties.get(key, place.schema.get("additionalProperties"))
        if isinstance(value, Mapping):
            found.append(Place(place.root, value))
    return found


def element(places: Sequence[Place]) -> list[Place]:
    """Find what an element must match in an array that matches `places`."""
    items = ((place.root, place.schema.get("items")) for place in _expanded(places))
    return [Place(root, schema) for root, schema in items if isinstance(schema, Mapping)]


def length_limits(places: Sequence[Place]) -> tuple[int, int]:
    """Return how many characters a string must and may have that matches every place.

    Of alternatives the narrowest counts: what it allows, the others allow, too.
    """
    expanded = _expanded(places)
    least = max((_length(place.schema, "minLength", 0) for place in expanded), default=0)
    most = min((_length(place.schema, "maxLength", MAX_LENGTH) for place in expanded), default=0)
    return (least, most) if expanded and least <= most else (0, MAX_LENGTH)


def narrowest_lengths(schema: Schema) -> tuple[int, int]:
    """Return the largest minimum and the smallest maximum of a schema's strings."""
    nodes = list(_subschemas(schema))
    least = max((_length(node, "minLength", 0) for node in nodes), default=0)
    return least, min((_length(node, "maxLength", MAX_LENGTH) for node in nodes), default=0)


def _length(schema: Schema, key: str, default: int) -> int:
    value = schema.get(key, default)
    return value if isinstance(value, int) and 0 <= value <= MAX_LENGTH else default


def _check_size(schema: Schema, param: str) -> None:
    """Refuse a schema that is nested too deeply or too long.

    Raises:
        InvalidRequest: It is.
    """
    level: list[Any] = [schema]
    depth = 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            msg = f"{param} is nested deeper than {MAX_DEPTH} levels; flatten it"
            raise InvalidRequest(msg, code="grammar_too_complex", param=param)
        level = [item for value in level for item in _items(value)]
    size = len(json.dumps(schema))
    if size > MAX_SCHEMA_BYTES:
        msg = f"{param} has {size} bytes; at most {MAX_SCHEMA_BYTES} are possible"
        raise InvalidRequest(msg, code="grammar_too_complex", param=param)


def _items(value: object) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return value if isinstance(value, list) else []


def _check_node(node: Schema, *, strict: bool, param: str) -> None:
    """Refuse what one object of a schema says.

    Raises:
        InvalidRequest: It reaches outside, or cannot be held.
    """
    reference = node.get("$ref", "#")
    if not (isinstance(reference, str) and (reference == "#" or reference.startswith("#/"))):
        msg = (
            f"{param} refers to {str(reference)[:100]!r}; nothing is fetched: "
            f"put it under $defs and refer to #/$defs/…"
        )
        raise InvalidRequest(msg, param=param)
    if "$dynamicRef" in node or "$recursiveRef" in node:
        msg = f"{param} has a dynamic reference; use $ref"
        raise InvalidRequest(msg, param=param)
    if isinstance(node.get("allOf"), list) and len(node["allOf"]) > 1:
        msg = f"{param} joins schemas with allOf, which cannot be held; merge them into one"
        raise InvalidRequest(msg, param=param)
    for key in _LENGTHS:
        value = node.get(key, 0)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_LENGTH:
            msg = f"{param} has {key} {str(value)[:20]!r}; it must be between 0 and {MAX_LENGTH}"
            raise InvalidRequest(msg, param=param)
    not_held = _not_held(node) if strict else []
    if not_held:
        msg = f"{param} has {not_held[0]!r}, which cannot be held; leave it out, or strict: true"
        raise InvalidRequest(msg, param=param)


def _not_held(node: Schema) -> list[str]:
    """List the keywords of one object of a schema that an output may violate."""
    said = node.keys()
    not_held = _NOT_HELD & said
    if said & _ALONE:
        not_held |= said - _BESIDE - {min(said & _ALONE)}
    if node.get("type") != "integer":
        not_held |= said & {"multipleOf"}
    return sorted(not_held)


def _subschemas(schema: Schema) -> Iterator[Schema]:
    """Yield a schema and all schemas within it; values and names of properties are none."""
    pending = [schema]
    while pending:
        node = pending.pop()
        yield node
        pending += _children(node)


def _children(node: Schema) -> list[Schema]:
    children: list[Any] = [node.get(key) for key in (*_SINGLES, *_OTHER_SINGLES)]
    for key in (*_MAPS, *_OTHER_MAPS):
        value = node.get(key)
        children += value.values() if isinstance(value, Mapping) else ()
    for key in (*_LISTS, *_OTHER_LISTS):
        value = node.get(key)
        children += value if isinstance(value, list) else ()
    return [child for child in children if isinstance(child, Mapping)]


def _rewritten(schema: Any, *, strip: bool) -> Any:  # noqa: ANN401  (any JSON value)
    """Copy a schema, its free parts opened, and its lengths left out if asked for."""
    if not isinstance(schema, Mapping):
        return schema
    copy = {key: value for key, value in schema.items() if not (strip and key in _LENGTHS)}
    for key in (*_SINGLES, *_OTHER_SINGLES):
        if key in copy:
            copy[key] = _rewritten(copy[key], strip=strip)
    for key in (*_MAPS, *_OTHER_MAPS):
        if isinstance(copy.get(key), Mapping):
            copy[key] = {name: _rewritten(value, strip=strip) for name, value in copy[key].items()}
    for key in (*_LISTS, *_OTHER_LISTS):
        if isinstance(copy.get(key), list):
            copy[key] = [_rewritten(value, strip=strip) for value in copy[key]]
    _open_free_parts(copy)
    return copy


def _open_free_parts(schema: dict[str, Any]) -> None:
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    said = schema.keys()
    closing = {"properties", "patternProperties", "propertyNames", "unevaluatedProperties"}
    if "object" in kinds and not said & closing:
        schema.setdefault("additionalProperties", True)
    if "array" in kinds and not said & {"prefixItems", "unevaluatedItems"}:
        schema.setdefault("items", {})


def _expanded(places: Sequence[Place]) -> list[Place]:
    """Follow references and alternatives to the schemas that say something themselves."""
    found: list[Place] = []
    seen: set[int] = set()
    pending = list(places)
    while pending:
        place = pending.pop()
        if id(place.schema) in seen:
            continue
        seen.add(id(place.schema))
        found.append(place)
        target = _resolve(place.root, place.schema.get("$ref"))
        others = [target] if target is not None else []
        for key in _LISTS:
            value = place.schema.get(key)
            others += value if isinstance(value, list) else []
        pending += [Place(place.root, item) for item in others if isinstance(item, Mapping)]
    return found


def _resolve(root: Schema, reference: object) -> Schema | None:
    """Find what a reference within the document points to."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    target: Any = root
    for part in filter(None, reference[1:].split("/")):
        target = target.get(part) if isinstance(target, Mapping) else None
    return target if isinstance(target, Mapping) else None
