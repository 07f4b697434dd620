"""Versions over HTTP: keep, activate, roll back, pin, download, unload, delete."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from bundles import small_bundle, write_adapter
from oneplusn.server.settings import Settings
from serving import Live, ScriptedCore, serving, wait_until

TASKS = ("vowels", "upper")
DIGESTS = [small_bundle(tasks=TASKS, seed=seed).digest for seed in (1, 2)]


@pytest.fixture(scope="module")
def versions(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("versions")
    return [write_adapter(folder / f"v{seed}", tasks=TASKS, seed=seed) for seed in (1, 2)]


@pytest.fixture
def own(tmp_path) -> Iterator[Live]:
    settings = Settings(model="tiny-base", data=tmp_path / "data")
    with serving(settings, tmp_path / "model", ScriptedCore()) as running:
        yield running


@pytest.fixture
def http(own) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=own.url, timeout=10) as client:
        yield client


@pytest.fixture
def two(http, versions) -> httpx.Client:
    """A server with two versions of `letters`, the second active."""
    assert [upload(http, folder).status_code for folder in versions] == [201, 201]
    return http


def upload(
    http: httpx.Client, folder: Path, *, headers: dict[str, str] | None = None, **fields: str
) -> httpx.Response:
    files = [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
    form = {"name": "letters"} | fields
    return http.post("/v1/adapters", data=form, files=files, headers=headers)


def shown(http: httpx.Client) -> dict[str, object]:
    return http.get("/v1/adapters/letters").json()


def answers(http: httpx.Client) -> str | None:
    """The version that a request is answered by."""
    answer = http.post("/generate", json={"task": "upper", "inputs": "x"})
    return answer.headers.get("x-oneplusn-adapter")


class TestUpload:
    def test_a_dry_run_reports_and_keeps_nothing(self, http, versions) -> None:
        answer = upload(http, versions[0], dry_run="true")

        assert answer.status_code == 200
        body = answer.json()
        assert (body["object"], body["digest"]) == ("adapter.report", DIGESTS[0])
        assert body["report"]["delta_norms"]
        assert http.get("/v1/adapters").json()["data"] == []

    def test_what_is_not_activated_is_kept_and_not_served(self, http, own, versions) -> None:
        answer = upload(http, versions[0], activate="false")

        assert (answer.status_code, answer.json()["state"]) == (201, "inactive")
        assert answers(http) is None
        assert DIGESTS[0] not in own.core.resident
        assert http.put("/v1/adapters/letters", json={"version": 1}).json()["state"] == "active"
        assert answers(http) == "letters@1"

    @pytest.mark.parametrize(
        ("field", "value", "words"),
        [
            ("strict", "maybe", "strict is 'maybe'; it must be true or false"),
            ("activated", "true", "there is no field 'activated'"),
        ],
    )
    def test_a_wrong_switch_is_refused(self, http, versions, field, value, words) -> None:
        answer = upload(http, versions[0], **{field: value})

        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]
        assert http.get("/v1/adapters").json()["data"] == []


class TestActivation:
    def test_an_older_version_can_be_activated_and_rolled_back(self, two) -> None:
        assert answers(two) == "letters@2"
        assert two.put("/v1/adapters/letters", json={"version": 1}).status_code == 200
        assert answers(two) == "letters@1"
        assert two.post("/v1/adapters/letters:rollback").json()["version"] == 2
        assert answers(two) == "letters@2"

    def test_a_stale_generation_is_refused(self, two) -> None:
        etag = two.get("/v1/adapters/letters").headers["etag"]
        change = {"json": {"version": 1}, "headers": {"if-match": etag}}

        assert two.put("/v1/adapters/letters", **change).status_code == 200
        again = two.put("/v1/adapters/letters", **change)

        assert (again.status_code, again.json()["error"]["code"]) == (412, "generation_mismatch")
        assert answers(two) == "letters@1"

    def test_an_upload_may_name_the_generation_that_it_replaces(self, http, versions) -> None:
        assert upload(http, versions[0]).status_code == 201
        etag = http.get("/v1/adapters/letters").headers["etag"]
        assert upload(http, versions[1], headers={"if-match": etag}).status_code == 201
        stale = upload(http, versions[0], headers={"if-match": etag})
        assert stale.status_code == 412
        assert answers(http) == "letters@2"

    @pytest.mark.parametrize(
        ("body", "status"), [({"version": 7}, 404), ({"version": 0}, 400), ({}, 400)]
    )
    def test_a_version_that_is_not_there_is_refused(self, two, body, status) -> None:
        assert two.put("/v1/adapters/letters", json=body).status_code == status

    def test_a_deactivated_adapter_is_not_found_until_it_is_active_again(self, two) -> None:
        assert two.post("/v1/adapters/letters:deactivate").json()["state"] == "inactive"
        assert answers(two) is None
        two.put("/v1/adapters/letters", json={"version": 2})
        assert answers(two) == "letters@2"


class TestResidency:
    def test_what_was_unloaded_comes_back_when_it_is_asked_for(self, own, two) -> None:
        freed = two.post("/v1/adapters/letters:unload").json()

        assert freed["bytes_freed"] > 0
        assert not freed["resident"]
        assert DIGESTS[1] not in own.core.resident
        assert answers(two) == "letters@2"
        assert shown(two)["resident"]

    def test_it_can_be_loaded_ahead(self, two) -> None:
        two.post("/v1/adapters/letters:unload")
        assert two.post("/v1/adapters/letters:load").json()["bytes_resident"] > 0
        assert shown(two)["resident"]

    def test_unloading_waits_for_requests_and_says_when_it_cannot(self, own, two) -> None:
        body = {"task": "upper", "inputs": "endless", "parameters": {"max_new_tokens": 200}}
        own.core.step_seconds = 0.02
        with two.stream("POST", "/generate_stream", json=body) as stream:
            wait_until(lambda: own.core.requests)
            later = two.post("/v1/adapters/letters:unload", params={"timeout": 0.05})
            assert (later.status_code, later.headers["location"]) == (202, "/v1/adapters/letters")
            stream.close()
        wait_until(lambda: DIGESTS[1] not in own.core.resident)

    def test_a_pinned_adapter_is_neither_unloaded_nor_deleted(self, two) -> None:
        assert two.post("/v1/adapters/letters:pin").json()["pinned"]
        for answer in (
            two.post("/v1/adapters/letters:unload"),
            two.delete("/v1/adapters/letters"),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "adapter_pinned")
        two.post("/v1/adapters/letters:pin", params={"pinned": False})
        assert two.delete("/v1/adapters/letters").status_code == 200


class TestDownload:
    def test_what_was_downloaded_can_be_uploaded_again(self, two, versions) -> None:
        answer = two.get("/v1/adapters/letters/download", params={"version": 1})

        assert answer.headers["x-oneplusn-adapter"] == "letters@1"
        assert int(answer.headers["content-length"]) == len(answer.content)
        packed = {"files": ("letters.tar", answer.content)}
        again = two.post("/v1/adapters", data={"name": "letters"}, files=packed)
        assert (again.status_code, again.json()["version"]) == (200, 1)

    def test_a_version_that_is_not_there_is_not_found(self, two) -> None:
        answer = two.get("/v1/adapters/letters/download", params={"version": 9})
        assert answer.status_code == 404
        assert "no version 9" in answer.json()["error"]["message"]


class TestDelete:
    def test_an_old_version_and_then_the_adapter(self, two) -> None:
        assert two.delete("/v1/adapters/letters", params={"version": 1}).json()["deleted"] == [
            "letters@1"
        ]
        active = two.delete("/v1/adapters/letters", params={"version": 2})
        assert active.status_code == 409
        assert two.delete("/v1/adapters/letters").json()["deleted"] == ["letters@2"]
        assert two.get("/v1/adapters/letters").status_code == 404

    @pytest.mark.parametrize(
        "ask",
        [
            ("GET", "/v1/adapters/nobody"),
            ("GET", "/v1/adapters/nobody/versions"),
            ("DELETE", "/v1/adapters/nobody"),
            ("POST", "/v1/adapters/nobody:load"),
            ("POST", "/v1/adapters/nobody:unload"),
            ("POST", "/v1/adapters/nobody:pin"),
            ("POST", "/v1/adapters/nobody:rollback"),
            ("POST", "/v1/adapters/nobody:deactivate"),
        ],
    )
    def test_an_adapter_that_is_not_there(self, http, ask) -> None:
        answer = http.request(*ask)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "adapter_not_found")


def test_the_list_comes_in_pages(http, versions) -> None:
    for name in ("a", "b", "c"):
        upload(http, versions[0], name=name, activate="false")
    first = http.get("/v1/adapters", params={"limit": 2}).json()
    rest = http.get("/v1/adapters", params={"limit": 2, "after": "b"}).json()
    assert [entry["name"] for entry in first["data"]] == ["a", "b"]
    assert [entry["name"] for entry in rest["data"]] == ["c"]
    assert (first["has_more"], rest["has_more"]) == (True, False)
