"""One key in front of everything but health, and no way around it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest
from fastapi.routing import APIRoute
from starlette.routing import Route

from oneplusn import cli
from oneplusn.errors import ConfigError
from oneplusn.server.app import ROUTERS, create_app
from oneplusn.server.auth import KEY_VARIABLE, OPEN_PATHS, read_key
from oneplusn.server.settings import Settings
from serving import Live, serving

MODEL = "tiny-base"
KEY = "k3y-of-the-tests"


@pytest.fixture(scope="module")
def locked(adapter_folders, tmp_path_factory) -> Iterator[Live]:
    """A server with a key."""
    folder = tmp_path_factory.mktemp("locked")
    (folder / "key").write_text(KEY + "\n")
    settings = Settings(model=MODEL, adapter=adapter_folders, api_key_file=folder / "key")
    with serving(settings, folder / "model") as running:
        yield running


@pytest.fixture(scope="module")
def client(locked) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=locked.url, timeout=10) as made:
        yield made


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def routes() -> list[tuple[str, str]]:
    """Every method and path that the application has, with something in the places of names."""
    app = create_app(Settings(model=MODEL), lambda _: pytest.fail("it was started"))
    routes = [*app.routes, *(route for router in ROUTERS for route in router.routes)]
    return [
        (method, route.path.replace("{", "").replace("}", "").replace(":path", ""))
        for route in routes
        if isinstance(route, Route | APIRoute)
        for method in sorted(route.methods or ())
    ]


def test_every_route_but_health_demands_the_key(client) -> None:
    every = routes()
    assert len(every) > 30
    answered = {
        (method, path) for method, path in every if client.request(method, path).status_code != 401
    }
    assert {path for _, path in answered} == OPEN_PATHS


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/nowhere",
        "/docs",
        "/redoc",
        "/openapi.json",
        "/metrics",
        "//health",
        "/health/",
        "/HEALTH",
        "/health/live/../../v1/models",
        "/health%2f..%2fv1%2fmodels",
        "/health;x",
        "/ping/x",
    ],
)
def test_what_looks_like_health_is_not(client, path) -> None:
    address = client.base_url.copy_with(raw_path=path.encode())
    assert client.get(address).status_code == 401


BAD_HEADERS = [
    pytest.param({}, id="none"),
    pytest.param(bearer("wrong"), id="wrong"),
    pytest.param(bearer(KEY + "x"), id="longer"),
    pytest.param(bearer(KEY[:-1]), id="shorter"),
    pytest.param({"authorization": "Bearer"}, id="empty"),
    pytest.param({"authorization": KEY}, id="no-scheme"),
    pytest.param({"authorization": f"Basic {KEY}"}, id="basic"),
    pytest.param({"x-api-key": KEY}, id="other-header"),
    pytest.param([*bearer(KEY).items(), *bearer("x").items()], id="two"),
]


@pytest.mark.parametrize("headers", BAD_HEADERS)
def test_every_other_way_to_say_it_gets_one_answer(client, headers) -> None:
    answer = client.get("/v1/models", headers=headers)

    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-request-id"]
    assert answer.json()["error"] == {
        "message": "the API key is missing or wrong; send it as `Authorization: Bearer <key>`",
        "type": "authentication_error",
        "param": None,
        "code": "invalid_api_key",
    }


def test_a_key_in_the_address_is_none(client) -> None:
    assert client.get(f"/v1/models?api_key={KEY}&key={KEY}").status_code == 401


def test_a_body_is_not_read_before_the_key(client, locked) -> None:
    before = len(locked.core.submitted)
    answer = client.post("/generate", content=b"x" * (9 << 20))
    assert answer.status_code == 401
    assert len(locked.core.submitted) == before


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_key_opens(client, scheme) -> None:
    headers = {"authorization": f"{scheme} {KEY}"}
    assert client.get("/v1/models", headers=headers).status_code == 200
    answer = client.post("/generate", json={"task": "add", "inputs": "x"}, headers=headers)
    assert answer.json()["generated_text"] == "ADD*1:x"


def test_openais_client_tells_a_wrong_key_from_a_right_one(locked) -> None:
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong") as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"
        assert client.with_options(api_key=KEY).models.list().data[0].id == MODEL


def test_with_a_key_the_host_does_not_matter(client) -> None:
    headers = {**bearer(KEY), "host": "models.example"}
    assert client.get("/v1/models", headers=headers).status_code == 200


def test_cached_prefixes_belong_to_a_tenant(client, locked) -> None:
    client.post("/generate", json={"task": None, "inputs": "x"}, headers=bearer(KEY))
    assert locked.core.submitted[-1].salt == "default"


def test_the_command_says_it_in_one_line(monkeypatch, capsys) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert cli.main(["serve", "--host", "0.0.0.0", "--port", "0"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("oneplusn: --host 0.0.0.0 is reachable from other machines")
    assert shown.count("\n") == 1


class TestReadKey:
    def test_from_a_file(self, tmp_path) -> None:
        (tmp_path / "key").write_text("abc\r\n")
        assert read_key(Settings(api_key_file=tmp_path / "key"), {}) == "abc"

    def test_from_the_environment(self) -> None:
        assert read_key(Settings(host="0.0.0.0"), {KEY_VARIABLE: "abc"}) == "abc"

    @pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
    def test_none_is_needed_on_loopback(self, host) -> None:
        assert read_key(Settings(host=host), {}) is None

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.com", ""])
    def test_one_is_needed_elsewhere(self, host) -> None:
        with pytest.raises(ConfigError, match="--api-key-file or ONEPLUSN_API_KEY"):
            read_key(Settings(host=host), {})

    @pytest.mark.parametrize("key", ["", "a b", "schlüssel", "a\nb", "a\x00"])
    def test_what_is_no_key(self, key) -> None:
        with pytest.raises(ConfigError, match="openssl rand"):
            read_key(Settings(), {KEY_VARIABLE: key})

    def test_a_file_that_is_not_there(self, tmp_path) -> None:
        with pytest.raises(ConfigError, match="cannot read the API key"):
            read_key(Settings(api_key_file=tmp_path / "none"), {})

    def test_two_sources_are_one_too_many(self, tmp_path) -> None:
        (tmp_path / "key").write_text("abc")
        with pytest.raises(ConfigError, match="keep one"):
            read_key(Settings(api_key_file=tmp_path / "key"), {KEY_VARIABLE: "abc"})
