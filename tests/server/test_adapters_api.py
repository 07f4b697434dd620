"""Upload over HTTP: what is activated, what is refused, and that a refusal leaves nothing."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from bundles import small_bundle, write_adapter
from oneplusn.errors import ConfigError, MemoryPlanRefused
from oneplusn.server.settings import Settings
from serving import Live, ScriptedCore, serving, wait_until

LIMIT = 1 << 16


@pytest.fixture
def data(tmp_path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def own(adapter_folders, data, tmp_path) -> Iterator[Live]:
    settings = Settings(
        model="tiny-base",
        data=data,
        max_upload=LIMIT,
        adapter={"sums": adapter_folders["sums"]},
    )
    with serving(settings, tmp_path / "model", ScriptedCore(capacity=3)) as running:
        yield running


@pytest.fixture
def http(own) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=own.url, timeout=10) as client:
        yield client


@pytest.fixture
def versions(tmp_path) -> list[Path]:
    return [
        write_adapter(tmp_path / f"v{seed}", tasks=("vowels", "upper"), seed=seed)
        for seed in (1, 2)
    ]


def upload(http: httpx.Client, folder: Path, name: str | None = "letters") -> httpx.Response:
    files = [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
    return http.post("/v1/adapters", data={} if name is None else {"name": name}, files=files)


def archive(folder: Path) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for path in folder.iterdir():
            tar.add(path, arcname=path.name)
    return packed.getvalue()


def files_in(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if "registry.db" not in p.name}


def ask(http: httpx.Client, task: str = "upper") -> httpx.Response:
    return http.post("/generate", json={"task": task, "inputs": "x"})


class TestUpload:
    def test_a_new_adapter_is_served_at_once(self, http, versions) -> None:
        assert ask(http).status_code == 404

        answer = upload(http, versions[0])

        assert answer.status_code == 201
        assert answer.headers["x-oneplusn-adapter"] == "letters@1"
        body = answer.json()
        report = body.pop("report")
        assert report["unmatched"] == []
        assert len(report["matched"]) == 1
        assert body.pop("created") > 0
        assert body.pop("bytes") > 0
        assert body == {
            "id": "letters@1",
            "object": "adapter",
            "name": "letters",
            "version": 1,
            "digest": small_bundle(tasks=("vowels", "upper"), seed=1).digest,
            "state": "active",
            "method": "cgc",
            "tasks": ["vowels", "upper"],
            "rank": 4,
            "base_model": None,
        }
        assert ask(http).json()["adapter"] == "letters@1"

    def test_an_archive_is_the_same_as_its_files(self, http, versions) -> None:
        packed = {"files": ("letters.tar.gz", archive(versions[0]))}
        first = http.post("/v1/adapters", data={"name": "letters"}, files=packed)

        second = upload(http, versions[0])

        assert (first.status_code, second.status_code) == (201, 200)
        assert first.json() == second.json()

    def test_the_name_may_come_after_the_files(self, http, versions) -> None:
        parts = [("files", (path.name, path.read_bytes())) for path in versions[0].iterdir()]
        parts.append(("name", (None, b"letters")))
        assert http.post("/v1/adapters", files=parts).status_code == 201

    def test_a_new_version_takes_over_and_the_old_one_leaves(self, http, own, versions) -> None:
        first = upload(http, versions[0]).json()
        second = upload(http, versions[1]).json()

        assert (first["version"], second["version"]) == (1, 2)
        assert ask(http).headers["x-oneplusn-adapter"] == "letters@2"
        assert first["digest"] not in own.core.resident
        shown = http.get("/v1/adapters/letters").json()
        assert [(v["id"], v["state"]) for v in shown["versions"]] == [
            ("letters@1", "inactive"),
            ("letters@2", "active"),
        ]

    def test_a_request_in_flight_keeps_its_version(self, http, own, versions) -> None:
        old = upload(http, versions[0]).json()["digest"]
        own.core.paused = True
        with ThreadPoolExecutor(1) as pool:
            asked_before = pool.submit(ask, http)
            wait_until(lambda: bool(own.core.submitted))

            upload(http, versions[1])

            assert old in own.core.resident
            own.core.paused = False
            assert ask(http).json()["adapter"] == "letters@2"
            assert asked_before.result().json()["adapter"] == "letters@1"
        upload(http, versions[1])
        assert old not in own.core.resident

    def test_the_first_version_can_come_back(self, http, versions) -> None:
        for folder in (versions[0], versions[1], versions[0]):
            answer = upload(http, folder)
        assert (answer.status_code, answer.json()["version"]) == (200, 1)
        assert ask(http).json()["adapter"] == "letters@1"

    def test_adapters_are_listed(self, http, versions) -> None:
        upload(http, versions[0])
        listed = http.get("/v1/adapters").json()["data"]
        assert [entry["id"] for entry in listed] == ["letters@1", "sums@1"]

    def test_an_unknown_one_is_404(self, http) -> None:
        answer = http.get("/v1/adapters/nope")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "adapter_not_found")

    def test_uploads_are_counted(self, http, own, versions) -> None:
        upload(http, versions[0])
        upload(http, versions[0], name="others")
        scraped = http.get("/metrics").text
        assert 'oneplusn_registry_uploads_total{result="kept",reason=""} 1.0' in scraped
        assert (
            'oneplusn_registry_uploads_total{result="refused",reason="adapter_exists"} 1.0'
            in scraped
        )
        assert "oneplusn_adapters_resident 2.0" in scraped


def form(*parts: tuple[str, str | None, bytes]) -> dict[str, object]:
    return {"files": [(name, (filename, content)) for name, filename, content in parts]}


NAME = ("name", None, b"letters")
REFUSED = [
    pytest.param(form(NAME), 400, "missing_field", id="no-file"),
    pytest.param(form(("files", "bundle.json", b"{}")), 400, "missing_field", id="no-name"),
    pytest.param(form(NAME, ("files", "bundle.json", b"{}")), 422, "file_missing", id="no-weights"),
    pytest.param(
        form(NAME, ("files", "adapter_model.bin", b"x")), 415, "pickle_rejected", id="pickle"
    ),
    pytest.param(form(NAME, ("files", "evil.sh", b"x")), 422, "file_not_allowed", id="other-file"),
    pytest.param(form(NAME, ("files", "a.zip", b"x" * 99)), 422, "archive_damaged", id="archive"),
    pytest.param(
        form(NAME, ("files", "bundle.json", b"x"), ("files", "bundle.json", b"x")),
        400,
        "invalid_value",
        id="twice",
    ),
    pytest.param(
        form(NAME, ("files", "bundle.json", b"x" * LIMIT)), 413, "payload_too_large", id="too-large"
    ),
    pytest.param(form(("name", None, b"x" * 5000)), 400, "invalid_value", id="long-field"),
    pytest.param(form(("name", None, b"\xff")), 400, "invalid_value", id="no-utf8"),
    pytest.param(
        form(NAME, *(("files", f"{i}", b"") for i in range(65))), 400, "invalid_value", id="files"
    ),
    pytest.param(
        {
            "content": b"--b\r\nContent-Dis",
            "headers": {"content-type": "multipart/form-data; boundary=b"},
        },
        400,
        "invalid_value",
        id="cut-off",
    ),
    pytest.param(
        {"content": b"nonsense", "headers": {"content-type": "multipart/form-data; boundary=b"}},
        400,
        "invalid_value",
        id="no-form",
    ),
    pytest.param({"json": {"name": "letters"}}, 415, "unsupported_media_type", id="json"),
]


@pytest.mark.parametrize(("body", "status", "code"), REFUSED)
def test_a_refused_upload_leaves_nothing(http, data, body, status, code) -> None:
    before = files_in(data)

    answer = http.post("/v1/adapters", **body)

    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert files_in(data) == before


class TestRefusedLate:
    """The files are sound, and the adapter is refused for what the server already has."""

    def test_a_task_of_another_adapter(self, http, data, versions) -> None:
        upload(http, versions[0])
        before = files_in(data)
        answer = upload(http, versions[1], name="others")
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (409, "adapter_exists")
        assert error["type"] == "conflict_error"
        assert answer.headers["x-should-retry"] == "false"
        assert files_in(data) == before

    def test_the_name_of_the_base(self, http, data, versions) -> None:
        before = files_in(data)
        answer = upload(http, versions[0], name="tiny-base")
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "name_reserved")
        assert files_in(data) == before

    def test_no_memory_for_it(self, http, own, data, versions, tmp_path) -> None:
        own.core.capacity = 1
        before = files_in(data)
        answer = upload(http, versions[0])
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "adapter_memory_exhausted"
        assert files_in(data) == before
        assert ask(http, "add").status_code == 200


def test_the_memory_of_an_adapter_has_a_limit(tmp_path, versions) -> None:
    """Without a worker's process: what the limit is passed to is the job."""
    settings = Settings(model="tiny-base", max_image=1000)
    with serving(settings, tmp_path / "small") as own, httpx.Client(base_url=own.url) as client:
        answer = upload(client, versions[0])
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (413, "adapter_too_large")
    assert "1000" in error["message"]


class TestStart:
    """An adapter that was asked for and cannot be served ends the start, by name."""

    def start(self, tmp_path: Path, capacity: int = 9, **adapters: Path) -> None:
        settings = Settings(model="tiny-base", adapter=adapters)
        with serving(settings, tmp_path, ScriptedCore(capacity=capacity)):
            pytest.fail("it started")

    def test_no_memory_for_it(self, adapter_folders, tmp_path) -> None:
        with pytest.raises(MemoryPlanRefused, match=r"'sums' does not fit: .*--adapter-memory"):
            self.start(tmp_path, capacity=1, **adapter_folders)

    def test_no_such_folder(self, tmp_path) -> None:
        with pytest.raises(ConfigError, match=r"'news' cannot be served: .*neither a folder"):
            self.start(tmp_path, news=tmp_path / "none")

    def test_two_with_the_same_task(self, adapter_folders, tmp_path) -> None:
        folder = adapter_folders["sums"]
        with pytest.raises(ConfigError, match=r"'two' cannot be served: .*belongs to .*'one'"):
            self.start(tmp_path, one=folder, two=folder)


class TestRestart:
    def test_uploads_come_back(self, adapter_folders, data, tmp_path, versions) -> None:
        settings = Settings(model="tiny-base", data=data)
        with serving(settings, tmp_path / "model") as own, httpx.Client(base_url=own.url) as http:
            upload(http, versions[0])
            upload(http, versions[1])

        with serving(settings, tmp_path / "model") as own, httpx.Client(base_url=own.url) as http:
            assert ask(http).json()["adapter"] == "letters@2"
            assert len(own.core.resident) == 1

    def test_an_adapter_of_the_command_line_wins(self, data, tmp_path, versions) -> None:
        for folder in versions:
            settings = Settings(model="tiny-base", data=data, adapter={"letters": folder})
            with serving(settings, tmp_path / "model") as own:
                (version,) = own.server.registry.active()
        assert version.label == "letters@2"

    def test_a_half_received_upload_is_cleared(self, data, tmp_path) -> None:
        (data / "incoming" / "abandoned").mkdir(parents=True)
        with serving(Settings(model="tiny-base", data=data), tmp_path / "model"):
            assert list((data / "incoming").iterdir()) == []

    def test_without_a_data_folder_nothing_stays(self, tmp_path, versions) -> None:
        settings = Settings(model="tiny-base", adapter={"letters": versions[0]})
        with serving(settings, tmp_path / "model") as own:
            folder = own.server.data
            assert folder.is_dir()
        assert not folder.exists()
