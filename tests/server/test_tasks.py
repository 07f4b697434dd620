"""Tasks: the sampling that they bring, and blends that are saved under a name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest

from bundles import small_bundle
from oneplusn.adapters.files import write_bundle
from oneplusn.server.settings import Settings
from serving import Live, serving

MODEL = "tiny-base"
DEFAULTS = {
    "terse": {"temperature": 0.25, "top_p": 0.5, "stop": ["."], "max_tokens": 3},
    "odd": {"temperature": 99.0},
}


@pytest.fixture(scope="module")
def own(adapter_folders, tmp_path_factory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("tasks")
    bundle = replace(small_bundle(tasks=("terse", "odd")), defaults=DEFAULTS)
    write_bundle(bundle, folder / "style")
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

    def test_those_out_of_range_are_none(self, http, own) -> None:
        assert http.post("/generate", json={"task": "odd", "inputs": "a"}).status_code == 200
        assert own.core.submitted[-1].sampling.temperature == 0
        assert http.get("/v1/tasks/odd").json()["defaults"] == {}

    def test_they_are_shown(self, http) -> None:
        assert http.get("/v1/tasks/terse").json()["defaults"] == DEFAULTS["terse"]

    def test_a_blend_has_none(self, http, own) -> None:
        http.post("/generate", json={"task": {"terse": 1, "add": 1}, "inputs": "a"})
        assert own.core.submitted[-1].sampling.temperature == 0


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
