"""What is written for vLLM and SGLang: their routes, their names, their very bodies."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from bundles import write_adapter
from oneplusn.server.settings import Settings
from serving import Live, serving, wait_until

MODEL = "tiny-base"


@contextmanager
def with_two_versions(adapters: dict[str, Path], folder: Path) -> Iterator[Live]:
    """Serve `solo` in two versions, the second one active, besides the usual adapters."""
    first, second = (
        write_adapter(folder / f"v{seed}", tasks=("solo",), method="lora", seed=seed)
        for seed in (1, 2)
    )
    settings = Settings(model=MODEL, data=folder / "data", adapter={**adapters, "solo": first})
    with serving(settings, folder / "model"):
        pass
    newer = {**adapters, "solo": second}
    with serving(settings.model_copy(update={"adapter": newer}), folder / "model") as running:
        yield running


@pytest.fixture
def own(adapter_folders, tmp_path) -> Iterator[Live]:
    """A server whose adapters a test may change."""
    with with_two_versions(adapter_folders, tmp_path) as running:
        yield running


@pytest.fixture
def changing(own) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=own.url, timeout=10) as client:
        yield client


@pytest.fixture(scope="module")
def unchanged(adapter_folders, tmp_path_factory) -> Iterator[httpx.Client]:
    """A client of one whose adapters no test changes."""
    with with_two_versions(adapter_folders, tmp_path_factory.mktemp("unchanged")) as running:
        with httpx.Client(base_url=running.url, timeout=10) as client:
            yield client
        solo = running.server.registry.adapter("solo").active
        assert solo is not None
        assert solo.label == "solo@2"


def version_of(http: httpx.Client, model: str) -> str | None:
    answer = http.post("/v1/completions", json={"model": model, "prompt": "a"})
    return answer.json()["oneplusn"]["adapter"] if answer.is_success else None


def error_of(answer: httpx.Response) -> dict[str, str | None]:
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    return answer.json()["error"]


class TestVllm:
    def test_unload_and_load(self, changing) -> None:
        unload = {"lora_name": "solo"}
        answer = changing.post("/v1/unload_lora_adapter", json=unload)
        assert answer.text == "Success: LoRA adapter 'solo' removed successfully."
        assert version_of(changing, "solo") is None
        assert "solo" not in [m["id"] for m in changing.get("/v1/models").json()["data"]]
        assert changing.post("/v1/unload_lora_adapter", json=unload).status_code == 404

        load = {"lora_name": "solo", "lora_path": "solo"}
        answer = changing.post("/v1/load_lora_adapter", json=load)
        assert answer.status_code == 200
        assert answer.text == "Success: LoRA adapter 'solo' added successfully."
        assert version_of(changing, "solo") == "solo@2"

    def test_another_version_in_place(self, changing) -> None:
        load = {"lora_name": "solo", "lora_path": "solo@1"}
        answer = changing.post("/v1/load_lora_adapter", json=load)
        assert (answer.status_code, error_of(answer)["code"]) == (400, "adapter_exists")
        assert version_of(changing, "solo") == "solo@2"

        answer = changing.post("/v1/load_lora_adapter", json={**load, "load_inplace": True})
        assert answer.status_code == 200
        assert version_of(changing, "solo") == "solo@1"

    def test_by_digest(self, changing, own) -> None:
        digest = own.server.registry.version("solo", 1).digest
        body = {"lora_name": "solo", "lora_path": digest, "load_inplace": True}
        assert changing.post("/v1/load_lora_adapter", json=body).status_code == 200
        assert version_of(changing, "solo") == "solo@1"

    def test_what_is_active_is_loaded(self, unchanged) -> None:
        for name in ("upper", "solo"):
            body = {"lora_name": name, "lora_path": name}
            assert unchanged.post("/v1/load_lora_adapter", json=body).status_code == 200

    @pytest.mark.parametrize(
        ("change", "status", "code", "param"),
        [
            ({"lora_path": "/data/loras/solo"}, 400, "adapter_reference", "lora_path"),
            ({"lora_path": "../solo"}, 400, "adapter_reference", "lora_path"),
            ({"lora_path": "org/solo"}, 400, "adapter_reference", "lora_path"),
            ({"lora_path": "hf://org/solo"}, 400, "adapter_reference", "lora_path"),
            ({"lora_path": "http://169.254.169.254/"}, 400, "adapter_reference", "lora_path"),
            ({"lora_path": "s3://bucket/solo"}, 400, "adapter_reference", "lora_path"),
            ({"lora_path": "sha256:../.."}, 400, "adapter_reference", "lora_path"),
            ({"lora_path": "solo@0"}, 400, "adapter_reference", "lora_path"),
            ({"lora_path": "solo@-1"}, 400, "adapter_reference", "lora_path"),
            ({"lora_path": "solo@9"}, 404, "adapter_not_found", None),
            ({"lora_path": "nope"}, 404, "adapter_not_found", None),
            ({"lora_path": "sha256:" + "0" * 64}, 404, "adapter_not_found", "lora_path"),
            ({"lora_path": ""}, 400, "invalid_value", "lora_path"),
            ({"lora_path": None}, 400, "invalid_value", "lora_path"),
            ({"lora_name": ""}, 400, "invalid_value", "lora_name"),
            (
                {"lora_name": "letters", "lora_path": "letters"},
                400,
                "invalid_value",
                "lora_name",
            ),
            ({"lora_name": "add", "lora_path": "letters@1"}, 400, "invalid_value", "lora_name"),
        ],
    )
    def test_what_names_no_adapter(self, unchanged, change, status, code, param) -> None:
        body = {"lora_name": "solo", "lora_path": "solo", **change}
        answer = unchanged.post("/v1/load_lora_adapter", json=body)
        assert answer.status_code == status
        assert (error_of(answer)["code"], error_of(answer)["param"]) == (code, param)

    def test_tasks_of_one_adapter_stay_together(self, unchanged) -> None:
        answer = unchanged.post("/v1/unload_lora_adapter", json={"lora_name": "upper"})
        assert answer.status_code == 400
        assert version_of(unchanged, "upper") == "letters@1"

    def test_requests_are_aborted_by_their_ids(self, changing, own) -> None:
        own.core.paused = True
        body = {"model": "add", "prompt": "a"}
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(
                httpx.post,
                f"{own.url}/v1/completions",
                json=body,
                headers={"x-request-id": "mine"},
                timeout=10,
            )
            wait_until(lambda: bool(own.core.submitted))
            ended = changing.post("/abort_requests", json={"request_ids": ["mine", "other"]})
            assert ended.json() == {"aborted": ["mine"]}
            assert answer.result().status_code == 499
            assert error_of(answer.result())["code"] == "request_cancelled"
        wait_until(lambda: len(own.core.cancelled) == 1)
        again = changing.post("/abort_requests", json={"request_ids": ["mine"]})
        assert again.json() == {"aborted": []}


class TestSglang:
    def test_unload_and_load(self, changing) -> None:
        answer = changing.post("/unload_lora_adapter", json={"lora_name": "solo"})
        assert answer.json() == {
            "success": True,
            "error_message": "",
            "loaded_adapters": {"vowels": "letters@1", "upper": "letters@1", "add": "sums@1"},
        }
        body = {"lora_name": "solo", "lora_path": "solo@1", "pinned": True}
        answer = changing.post("/load_lora_adapter", json=body)
        assert answer.json()["loaded_adapters"]["solo"] == "solo@1"
        assert version_of(changing, "solo") == "solo@1"

    def test_a_loaded_name_is_not_loaded_over(self, unchanged) -> None:
        body = {"lora_name": "solo", "lora_path": "solo@1"}
        assert unchanged.post("/load_lora_adapter", json=body).status_code == 400
        assert version_of(unchanged, "solo") == "solo@2"

    def test_base_and_adapter_in_one_name(self, http) -> None:
        assert version_of(http, f"{MODEL}:upper") == "letters@1"
        assert version_of(http, f"{MODEL}:sums") == "sums@1"
        assert version_of(http, f"{MODEL}:") is None
        assert version_of(http, "other:upper") is None
        assert version_of(http, f"{MODEL}:{MODEL}") is None

    def test_all_requests_are_aborted(self, changing, own) -> None:
        own.core.paused = True
        lines: list[str] = []

        def read() -> None:
            body = {"inputs": "abc", "stream": True}
            with httpx.stream("POST", f"{own.url}/", json=body, timeout=10) as answer:
                lines.extend(answer.iter_lines())

        reader = threading.Thread(target=read)
        reader.start()
        wait_until(lambda: bool(own.core.submitted))
        changing.post("/abort_request", json={"rid": "", "abort_all": True})
        reader.join()
        assert "request_cancelled" in "".join(lines)


def test_an_adapter_of_one_task_can_be_the_model(http) -> None:
    assert version_of(http, "sums") == "sums@1"


def test_an_adapter_of_several_tasks_cannot(http) -> None:
    answer = http.post("/v1/completions", json={"model": "letters", "prompt": "a"})
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "model"
    assert "name one of them: vowels, upper" in error_of(answer)["message"]


# What vLLM's benchmark and its chat clients send beside OpenAI's fields.
def test_vllms_extra_fields(http, live) -> None:
    body = {
        "model": "add",
        "prompt": "hi",
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": 4,
        "logprobs": None,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "min_tokens": 4,
        "top_k": -1,
        "min_p": 0.0,
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "include_stop_str_in_output": False,
        "length_penalty": 1.0,
        "use_beam_search": False,
        "prompt_logprobs": None,
        "truncate_prompt_tokens": None,
        "priority": 0,
        "user": "me",
        "metadata": {},
        "service_tier": "auto",
        "store": False,
    }
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200
    last = json.loads(answer.text.splitlines()[-4].removeprefix("data: "))
    assert last["usage"]["completion_tokens"] == 4
    assert live.core.submitted[-1].sampling.ignore_eos is True


def test_its_benchmark_finds_a_model_and_its_root(http) -> None:
    first = http.get("/v1/models").json()["data"][0]
    assert (first["id"], first["root"]) == (MODEL, MODEL)
