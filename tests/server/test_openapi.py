"""The document of the interface: every route, every status, and a schema for every error."""

from __future__ import annotations

from typing import Any

import pytest

from oneplusn.server.app import create_app
from oneplusn.server.auth import OPEN_PATHS
from oneplusn.server.settings import Settings

ERROR = {"$ref": "#/components/schemas/Error"}
INFERENCE = ("/generate", "/generate_stream", "/", "/v1/chat/completions", "/v1/completions")


@pytest.fixture(scope="module")
def document(http) -> dict[str, Any]:
    return http.get("/openapi.json").json()


@pytest.fixture(scope="module")
def operations(document) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (method.upper(), path): operation
        for path, by_method in document["paths"].items()
        for method, operation in by_method.items()
    }


def test_every_error_has_the_one_schema(operations) -> None:
    for route, operation in operations.items():
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                content = response["content"]
                assert content.keys() == {"application/json"}, (route, status)
                assert content["application/json"]["schema"] == ERROR, (route, status)


def test_all_four_keys_are_required(document) -> None:
    schemas = document["components"]["schemas"]
    error = schemas["Error"]["properties"]["error"]
    assert sorted(error["required"]) == ["code", "message", "param", "type"]
    assert schemas["Error"]["required"] == ["error"]
    assert "HTTPValidationError" not in schemas


def test_every_route_says_what_may_go_wrong_anywhere(operations) -> None:
    for (method, path), operation in operations.items():
        statuses = operation["responses"].keys()
        assert {"431", "500", "503"} <= statuses, (method, path)
        assert ("421" in statuses) == (path not in OPEN_PATHS), (method, path)


def test_a_key_is_demanded_where_there_is_one(document, tmp_path) -> None:
    assert "securitySchemes" not in document["components"]
    (tmp_path / "key").write_text("abc")
    settings = Settings(api_key_file=tmp_path / "key")
    locked = create_app(settings, lambda _: pytest.fail("it was started")).openapi()

    assert locked["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for path, by_method in locked["paths"].items():
        for operation in by_method.values():
            assert ("401" in operation["responses"]) == (path not in OPEN_PATHS), path
            assert ("security" in operation) == (path not in OPEN_PATHS), path
            assert "421" not in operation["responses"], path


def test_what_is_read_may_be_refused(operations) -> None:
    for (method, path), operation in operations.items():
        if "application/json" in operation.get("requestBody", {}).get("content", {}):
            assert {"400", "408", "413", "415"} <= operation["responses"].keys(), (method, path)
            assert "422" not in operation["responses"], (method, path)


@pytest.mark.parametrize("path", INFERENCE)
def test_inference_says_how_it_may_end(operations, path) -> None:
    statuses = operations["POST", path]["responses"].keys()
    assert {"404", "429", "499", "504"} <= statuses


@pytest.mark.parametrize(
    ("path", "types"),
    [
        ("/generate", {"application/json"}),
        ("/generate_stream", {"text/event-stream"}),
        ("/", {"application/json", "text/event-stream"}),
        ("/v1/chat/completions", {"application/json", "text/event-stream"}),
        ("/v1/completions", {"application/json", "text/event-stream"}),
        ("/v1/load_lora_adapter", {"text/plain"}),
        ("/tokenize", {"application/json"}),
    ],
)
def test_answers_have_their_media_types(operations, path, types) -> None:
    assert operations["POST", path]["responses"]["200"]["content"].keys() == types


def test_a_method_that_is_refused_is_told_which_ones_the_path_has(http, document) -> None:
    for path, by_method in document["paths"].items():
        answer = http.options(path.replace("{name}", "letters").replace("{model}", "add"))
        allowed = answer.headers["allow"].split(", ")
        assert (answer.status_code, allowed) == (405, sorted(map(str.upper, by_method))), path


def test_limits_of_fields_are_written_down(document) -> None:
    schemas = document["components"]["schemas"]
    chat = schemas["ChatRequest"]["properties"]
    assert (chat["n"]["minimum"], chat["n"]["maximum"]) == (1, 8)
    assert chat["messages"]["maxItems"] == 1000
    assert schemas["ChatRequest"]["required"] == ["model", "messages"]


def test_it_tells_nothing_of_the_machine(http) -> None:
    assert "/tmp" not in http.get("/openapi.json").text
