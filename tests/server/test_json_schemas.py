from __future__ import annotations

import pytest

from oneplusn.errors import InvalidRequest
from oneplusn.server.json_schemas import (
    MAX_DEPTH,
    MAX_ENUM_VALUES,
    MAX_LENGTH,
    MAX_SCHEMA_BYTES,
    Place,
    check_schema,
    element,
    length_limits,
    member,
    without_lengths,
)


def nested(depth: int) -> dict:
    schema: dict = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


REFUSED = [
    ([], "is list", "invalid_value"),
    ({"$ref": "http://127.0.0.1/x"}, "nothing is fetched", "invalid_value"),
    ({"$ref": "other.json#/x"}, "nothing is fetched", "invalid_value"),
    ({"$ref": 5}, "nothing is fetched", "invalid_value"),
    ({"properties": {"a": {"$ref": "//x"}}}, "nothing is fetched", "invalid_value"),
    ({"items": {"$dynamicRef": "#a"}}, "dynamic reference", "invalid_value"),
    ({"allOf": [{}, {}]}, "merge them", "invalid_value"),
    ({"minLength": -1}, "minLength", "invalid_value"),
    ({"maxLength": "5"}, "maxLength", "invalid_value"),
    ({"anyOf": [{"maxLength": 2**40}]}, "maxLength", "invalid_value"),
    (nested(MAX_DEPTH), "nested deeper", "grammar_too_complex"),
    (nested(1000), "nested deeper", "grammar_too_complex"),
    ({"enum": [0] * (MAX_ENUM_VALUES + 1)}, "lists 1001 values", "grammar_too_complex"),
    (
        {"properties": {str(i): {"enum": list(range(100))} for i in range(11)}},
        "lists 1100 values",
        "grammar_too_complex",
    ),
    ({"description": "x" * MAX_SCHEMA_BYTES}, "bytes; at most", "grammar_too_complex"),
]


@pytest.mark.parametrize(("schema", "message", "code"), REFUSED)
def test_a_schema_is_refused(schema, message, code) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        check_schema(schema, strict=False, param="here")
    assert (caught.value.code, caught.value.param) == (code, "here")


TAKEN = [
    {},
    {"$ref": "#"},
    {"$defs": {"n": {"properties": {"kids": {"items": {"$ref": "#/$defs/n"}}}}}},
    {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {}}},
    nested(MAX_DEPTH - 1),
    {"enum": [0] * MAX_ENUM_VALUES},
    # Names of properties and values are not keywords.
    {"properties": {"$ref": {"type": "string"}, "minLength": {}}, "default": {"$ref": "http://x"}},
    {"const": {"maxLength": -1}},
    {"type": "integer", "multipleOf": 7},
    {"$ref": "#/$defs/a", "description": "an a", "maxLength": 3, "$defs": {"a": {}}},
]


@pytest.mark.parametrize("schema", TAKEN)
def test_a_schema_is_taken_as_it_is(schema) -> None:
    assert check_schema(schema, strict=True, param="here") is schema


NOT_HELD = [
    *((keyword, {}) for keyword in ("not", "if", "uniqueItems", "dependentRequired", "contains")),
    ("multipleOf", {"type": "number"}),
    ("minimum", {"$ref": "#/$defs/x"}),
    ("properties", {"type": "object", "anyOf": [{}]}),
    ("oneOf", {"anyOf": [{}]}),
]


@pytest.mark.parametrize(("keyword", "beside"), NOT_HELD)
def test_only_a_strict_schema_must_be_held_whole(keyword, beside) -> None:
    schema = {"properties": {"a": {**beside, keyword: {}}}}
    assert check_schema(schema, strict=False, param="here") is schema
    with pytest.raises(InvalidRequest, match=f"'{keyword}', which cannot be held"):
        check_schema(schema, strict=True, param="here")


BARE = [
    ({"type": "string"}, {"type": "string"}, False),
    ({"type": "string", "maxLength": 3}, {"type": "string"}, True),
    (
        {"properties": {"maxLength": {"minLength": 1}}, "const": {"maxLength": 1}},
        {"properties": {"maxLength": {}}, "const": {"maxLength": 1}},
        True,
    ),
    (
        {"anyOf": [{"maxLength": 1}, {"$ref": "#/$defs/a"}], "$defs": {"a": {"minLength": 1}}},
        {"anyOf": [{}, {"$ref": "#/$defs/a"}], "$defs": {"a": {}}},
        True,
    ),
    # Below patternProperties no path is followed, so the lengths stay.
    (
        {"patternProperties": {"a": {"maxLength": 1}}},
        {"patternProperties": {"a": {"maxLength": 1}}},
        False,
    ),
    ({"type": "object"}, {"type": "object", "additionalProperties": True}, False),
    ({"type": ["array", "null"]}, {"type": ["array", "null"], "items": {}}, False),
    ({"type": "object", "properties": {}}, {"type": "object", "properties": {}}, False),
    (
        {"type": "object", "additionalProperties": {"type": "object"}},
        {
            "type": "object",
            "additionalProperties": {"type": "object", "additionalProperties": True},
        },
        False,
    ),
]


@pytest.mark.parametrize(("schema", "bare", "has_lengths"), BARE)
def test_a_grammar_has_no_lengths_and_what_is_open_is_free(schema, bare, has_lengths) -> None:
    before = repr(schema)
    assert without_lengths(schema) == (bare, has_lengths)
    assert repr(schema) == before


ROOT = {
    "properties": {
        "a": {"maxLength": 5},
        "list": {"items": {"$ref": "#/$defs/tag"}},
        "either": {"anyOf": [{"maxLength": 9, "minLength": 2}, {"maxLength": 4}, {"type": "null"}]},
        "conflict": {"anyOf": [{"maxLength": 1}, {"minLength": 2}]},
        "self": {"$ref": "#"},
        "any": True,
    },
    "$defs": {"tag": {"allOf": [{"maxLength": 7}]}, "loop": {"$ref": "#/$defs/loop"}},
    "additionalProperties": {"maxLength": 3},
}

PATHS = [
    (["a"], (0, 5)),
    (["list", None], (0, 7)),
    (["either"], (2, 4)),
    (["conflict"], (0, MAX_LENGTH)),
    (["self", "self", "a"], (0, 5)),
    (["any"], (0, MAX_LENGTH)),
    (["unheard of"], (0, 3)),
    (["a", "b"], (0, MAX_LENGTH)),
]


@pytest.mark.parametrize(("path", "limits"), PATHS)
def test_lengths_are_found_along_the_path(path, limits) -> None:
    places = [Place(ROOT, ROOT)]
    for key in path:
        places = element(places) if key is None else member(places, key)
    assert length_limits(places) == limits


def test_a_loop_of_references_ends() -> None:
    loop = ROOT["$defs"]["loop"]
    assert length_limits([Place(ROOT, loop)]) == (0, MAX_LENGTH)
