"""Tasks: the sampling that they bring, and blends that are saved under a name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from bundles import small_bundle
from oneplusn import cli
from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.files import write_bundle
from oneplusn.errors import ConfigError
from oneplusn.server.settings import Settings
from serving import Live, serving

MODEL = "tiny-base"
DEFAULTS = {"terse": {"temperature": 0.25, "top_p": 0.5, "stop": ["."], "max_tokens": 3}}


def style(defaults: dict, *, name: str = "terse") -> Bundle:
    """An adapter of one task that brings sampling of its own."""
    return replace(small_bundle(tasks=(name,)), defaults={name: defaults})


@pytest.fixture(scope="module")
def own(adapter_folders, tmp_path_factory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("tasks")
    write_bundle(style(DEFAULTS["terse"]), folder / "style")
    settings = Settings(model=MODEL, adapter={**adapter_folders, "style": folder / "style"})
    with serving(settings, folder / "model") as running:
        yield running


@pytest.fixture
def http(own) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=own.url, timeout=10) as client:
        yield client
        for entry in client.get("/v1/tasks").json()["data"]:
            if entry["blend"]:
                client.delete(f"/v1/tasks/{entry['name']}")


def names(http: httpx.Client) -> list[str]:
    return [entry["name"] for entry in http.get("/v1/tasks").json()["data"]]


def error_of(answer: httpx.Response) -> dict[str, str | None]:
    return answer.json()["error"]


class TestDefaults:
    def test_they_fill_in_what_a_request_does_not_say(self, http, own) -> None:
        body = {"model": "terse", "prompt": "abcdef", "top_p": 0.75}
        answer = http.post("/v1/completions", json=body).json()

        sampling = own.core.submitted[-1].sampling
        assert (sampling.temperature, sampling.top_p) == (0.25, 0.75)
        assert sampling.max_tokens == 3
        assert answer["choices"][0]["text"] == "TER"

    def test_a_request_wins(self, http, own) -> None:
        said = {"temperature": 1, "stop": ["S"], "max_new_tokens": 50}
        answer = http.post("/generate", json={"task": "terse", "inputs": "a", "parameters": said})
        assert own.core.submitted[-1].sampling.temperature == 1
        assert answer.json()["generated_text"] == "TER"

    def test_a_prompt_that_leaves_less_than_they_allow(self, http) -> None:
        body = {"task": "terse", "inputs": "x" * 253}
        assert http.post("/generate", json=body).json()["details"]["generated_tokens"] == 2

    def test_they_are_shown(self, http) -> None:
        assert http.get("/v1/tasks/terse").json()["defaults"] == DEFAULTS["terse"]

    def test_a_blend_has_none(self, http, own) -> None:
        http.post("/generate", json={"task": {"terse": 1, "add": 1}, "inputs": "a"})
        assert own.core.submitted[-1].sampling.temperature == 0


def files_of(folder: Path) -> list[tuple[str, tuple[str, bytes]]]:
    return [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]


WRONG = [
    ({"temperature": 99.0}, "temperature", "is 99.0: Input should be less than or equal to 2"),
    ({"top_p": 0.0}, "top_p", "is 0.0: Input should be greater than 0"),
    ({"top_k": "5"}, "top_k", "is '5': Input should be a valid integer"),
    ({"max_tokens": 0}, "max_tokens", "is 0: Input should be greater than or equal to 1"),
    ({"stop": ["a"] * 5}, "stop", "at most 4 items"),
    ({"min_tokens": 9, "max_tokens": 3}, "min_tokens", "is 9"),
]


class TestWrongDefaults:
    """Sampling that no request could ask for is refused before anybody is served with it."""

    @pytest.mark.parametrize("dry_run", ["true", "false"])
    @pytest.mark.parametrize(("defaults", "field", "says"), WRONG)
    def test_they_are_refused(self, http, tmp_path, defaults, field, says, dry_run) -> None:
        write_bundle(style(defaults, name="odd"), tmp_path)
        form = {"name": "odd", "dry_run": dry_run}
        answer = http.post("/v1/adapters", data=form, files=files_of(tmp_path))

        error = error_of(answer)
        assert (answer.status_code, error["param"]) == (400, f"defaults.odd.{field}")
        assert error["message"].startswith(f"the defaults of task 'odd': {field} is ")
        assert says in error["message"]
        assert "correct it in bundle.json" in error["message"]
        assert http.get("/v1/adapters/odd").status_code == 404

    def test_the_command_line_says_so_without_a_server(self, tmp_path, capsys) -> None:
        write_bundle(style({"temperature": 99.0}), tmp_path / "a")
        assert cli.main(["adapters", "check", str(tmp_path / "a")]) == 2
        assert "the defaults of task 'terse': temperature is 99.0" in capsys.readouterr().err

    def test_a_server_that_is_given_them_does_not_start(self, tmp_path) -> None:
        write_bundle(style({"temperature": 99.0}), tmp_path / "a")
        settings = Settings(model=MODEL, adapter={"a": tmp_path / "a"})
        with (
            pytest.raises(ConfigError, match="'a' cannot be served: the defaults of task 'terse'"),
            serving(settings, tmp_path / "model"),
        ):
            pass

    def test_those_of_an_earlier_release_count_as_none(
        self, http, own, tmp_path, monkeypatch
    ) -> None:
        write_bundle(style({"temperature": 99.0}, name="odd"), tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr("oneplusn.server.swaps.check_defaults", lambda _: None)
            http.post("/v1/adapters", data={"name": "odd"}, files=files_of(tmp_path))

        assert http.post("/generate", json={"task": "odd", "inputs": "a"}).status_code == 200
        assert own.core.submitted[-1].sampling.temperature == 0
        assert http.get("/v1/tasks/odd").json()["defaults"] == {}
        assert http.delete("/v1/adapters/odd").status_code == 200


class TestSavedBlends:
    def test_one_is_asked_for_like_a_task(self, http) -> None:
        made = http.put("/v1/tasks/mix", json={"blend": {"add": 0.75, "upper": -1}})
        assert made.status_code == 200
        assert made.json() == {
            "name": "mix",
            "cluster": None,
            "adapter": None,
            "version": None,
            "method": None,
            "description": "",
            "defaults": {},
            "blend": {"add": 0.75, "upper": -1},
        }

        by_task = http.post("/generate", json={"task": "mix", "inputs": "a"})
        assert by_task.json()["generated_text"] == "ADD*0.75+UPPER*-1:a"
        assert by_task.json()["task"] == "mix"
        assert by_task.headers["x-oneplusn-adapter"] == "sums@1,letters@1"
        by_model = http.post("/v1/completions", json={"model": "mix", "prompt": "a"})
        assert by_model.json()["choices"][0]["text"] == "ADD*0.75+UPPER*-1:a"
        assert by_model.json()["oneplusn"] == {"task": "mix", "adapter": "sums@1,letters@1"}

    def test_it_is_listed(self, http) -> None:
        http.put("/v1/tasks/mix", json={"blend": {"add": 1, "upper": 1}})
        assert names(http)[-1] == "mix"
        entry = http.get("/v1/models/mix").json()
        assert (entry["root"], entry["parent"]) == ("mix", MODEL)
        assert http.get("/v1/tasks/mix").json()["blend"] == {"add": 1, "upper": 1}

    def test_it_may_be_part_of_a_blend(self, http) -> None:
        http.put("/v1/tasks/mix", json={"blend": {"add": 0.5, "upper": 2}})
        answer = http.post("/generate", json={"task": {"mix": 2, "terse": 1}, "inputs": "a"})
        assert answer.json()["generated_text"] == "ADD*1+UPPER*4+TERSE*1:a"

    def test_it_can_be_saved_anew(self, http) -> None:
        http.put("/v1/tasks/mix", json={"blend": {"add": 1, "upper": 1}})
        assert http.put("/v1/tasks/mix", json={"blend": {"add": 3}}).status_code == 200
        answer = http.post("/generate", json={"task": "mix", "inputs": "a"})
        assert answer.json()["generated_text"] == "ADD*3:a"

    def test_it_can_be_deleted(self, http) -> None:
        http.put("/v1/tasks/mix", json={"blend": {"add": 1, "upper": 1}})
        assert http.delete("/v1/tasks/mix").status_code == 204
        assert "mix" not in names(http)
        assert http.post("/generate", json={"task": "mix", "inputs": "a"}).status_code == 404
        assert http.delete("/v1/tasks/mix").status_code == 404

    @pytest.mark.parametrize(
        ("name", "body", "status", "code", "param"),
        [
            ("mix", {"blend": {"nope": 1}}, 404, "model_not_found", "blend"),
            ("mix", {"blend": {}}, 400, "invalid_value", "blend"),
            ("mix", {"blend": {"add": 0}}, 400, "invalid_value", "blend.add"),
            ("mix", {"blend": {MODEL: 1}}, 400, "invalid_value", "blend"),
            ("mix", {"blend": {f"t{i}": 1 for i in range(9)}}, 400, "invalid_value", "blend"),
            ("mix", {}, 400, "missing_field", "blend"),
            ("mix", [], 400, "invalid_value", None),
            ("add", {"blend": {"upper": 1}}, 409, "adapter_exists", "name"),
            (MODEL, {"blend": {"add": 1}}, 400, "name_reserved", "name"),
            ("Mix", {"blend": {"add": 1}}, 400, "invalid_value", "name"),
        ],
    )
    def test_refused(self, http, name, body, status, code, param) -> None:
        answer = http.put(f"/v1/tasks/{name}", json=body)
        assert answer.status_code == status
        assert (error_of(answer)["code"], error_of(answer)["param"]) == (code, param)
        assert "mix" not in names(http)

    def test_a_task_of_an_adapter_is_no_blend(self, http) -> None:
        answer = http.delete("/v1/tasks/add")
        assert answer.status_code in (404, 409)
        assert "add" in names(http)
