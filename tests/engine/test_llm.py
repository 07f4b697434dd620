"""The Python interface, on a model with the demo's tokenizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import oneplusn
from oneplusn.adapters.files import write_bundle
from oneplusn.demo.tokenizer import ANSWER_ID, END_ID, build_tokenizer
from oneplusn.errors import (
    AdapterExists,
    AdapterIncompatible,
    ConfigError,
    InvalidRequest,
    PromptTooLong,
    ServingError,
    UnknownTask,
)
from oneplusn.server.engine import llm
from tiny_engines import cluster
from tiny_models import tiny_model

MIB = 2**20
SMALL = {"kv_memory": 4 * MIB, "adapter_memory": 16 * MIB, "threads": 1}
PROMPTS = ["one two", "three", "four five six"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out as the demo's: a base, and two adapters with three tasks."""
    folder = tmp_path_factory.mktemp("data")
    model = tiny_model("llama", vocab_size=259, eos_token_id=END_ID)
    model.save_pretrained(folder / "base")
    build_tokenizer(folder / "base")
    pair = cluster(model, ["up", "down"], common=(2,), seed=1)
    write_bundle(pair, folder / "adapters" / "pair")
    write_bundle(cluster(model, ["lone"], seed=2), folder / "adapters" / "single")
    return folder


@pytest.fixture(scope="module")
def folders(data: Path) -> dict[str, Path]:
    return {name: data / "adapters" / name for name in ("pair", "single")}


@pytest.fixture(scope="module")
def engine(data: Path, folders: dict[str, Path]):
    with oneplusn.Engine(data / "base", adapters=folders, **SMALL) as engine:
        yield engine


def test_answers_come_in_the_order_of_the_prompts(engine) -> None:
    tasks = ["up", None, "lone"]
    together = engine.generate(PROMPTS, tasks=tasks, max_tokens=6)
    apart = [
        engine.generate(prompt, tasks=task, max_tokens=6)[0]
        for prompt, task in zip(PROMPTS, tasks, strict=True)
    ]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in apart]
    assert [answer.task for answer in together] == tasks
    assert [answer.adapter for answer in together] == ["pair", None, "single"]
    assert [answer.text for answer in together] == [answer.text for answer in apart]


def test_one_task_for_all_prompts_and_none_for_the_base(engine) -> None:
    up = engine.generate(PROMPTS, tasks="up", max_tokens=4)
    base = engine.generate(PROMPTS, max_tokens=4)
    assert {answer.task for answer in up} == {"up"}
    assert [answer.token_ids for answer in up] != [answer.token_ids for answer in base]


def test_blend_names_its_adapters(engine) -> None:
    (answer,) = engine.generate("one", tasks={"up": 0.5, "lone": 0.5}, max_tokens=2)
    assert answer.adapter == "pair,single"
    assert answer.task == {"up": 0.5, "lone": 0.5}


def test_token_ids_are_taken_as_a_prompt(engine) -> None:
    text, tokens = "one", [*b"one", ANSWER_ID]
    assert [answer.token_ids for answer in engine.generate(text, max_tokens=4)] == [
        answer.token_ids for answer in engine.generate(tokens, max_tokens=4)
    ]
    assert len(engine.generate([tokens, text], max_tokens=1)) == 2


def test_no_prompts_no_answers(engine) -> None:
    assert engine.generate([]) == []


def test_end_token_ends_the_answer_and_is_no_text(engine) -> None:
    (answer,) = engine.generate("one", logit_bias={END_ID: 100.0, 65: 50.0}, min_tokens=2)
    assert answer.token_ids == [65, 65, END_ID]
    assert answer.text == "AA"
    assert answer.finish_reason == "stop"


def test_stop_string_ends_the_answer_and_frees_its_blocks(engine) -> None:
    bias = {65: 100.0}
    (answer,) = engine.generate("one", stop=["AAA"], logit_bias=bias, max_tokens=50)
    assert answer.text == ""
    assert answer.token_ids == [65, 65, 65]
    assert answer.finish_reason == "stop"
    stats = engine.core.stats
    assert stats.kv_blocks_free == stats.kv_blocks


def test_length_ends_the_answer(engine) -> None:
    (answer,) = engine.generate("one", logit_bias={65: 100.0}, max_tokens=5)
    assert answer.text == "AAAAA"
    assert answer.finish_reason == "length"
    assert answer.logprobs is None


def test_logprobs_come_with_every_token(engine) -> None:
    (answer,) = engine.generate("one", max_tokens=3, logprobs=2, ignore_eos=True)
    assert answer.logprobs is not None
    assert answer.top_logprobs is not None
    assert answer.logprobs == [top[0][1] for top in answer.top_logprobs]
    assert [len(top) for top in answer.top_logprobs] == [2, 2, 2]


def test_tasks_lead_to_their_adapters(engine) -> None:
    assert engine.tasks == {"up": "pair", "down": "pair", "lone": "single"}


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ({"tasks": "sideways"}, UnknownTask, "no task 'sideways'; the tasks are: up, down, lone"),
        ({"tasks": {"up": 1.0, "x": 1.0}}, UnknownTask, "no task 'x'"),
        ({"tasks": ["up"]}, InvalidRequest, "3 prompts and 1 tasks"),
        ({"max_tokens": 0}, InvalidRequest, "max_tokens is 0"),
        ({"stop": [""]}, InvalidRequest, "empty string"),
    ],
)
def test_bad_call_is_refused_and_leaves_nothing(engine, call, error, words) -> None:
    with pytest.raises(error, match=words):
        engine.generate(PROMPTS, **call)
    assert not engine.core.has_work


def test_one_prompt_too_long_and_none_is_answered(engine) -> None:
    with pytest.raises(PromptTooLong, match="255"):
        engine.generate(["fine", "x" * 255], tasks="up")
    assert not engine.core.has_work


def test_fault_of_the_model_is_an_error_of_the_call(engine, monkeypatch) -> None:
    def broken(_schedule):
        raise RuntimeError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(engine.core.runner, "run", broken)
        with pytest.raises(ServingError, match="the model failed"):
            engine.generate(PROMPTS)
    assert not engine.core.has_work
    assert len(engine.generate(PROMPTS, max_tokens=1)) == 3


def test_task_belongs_to_one_adapter(engine, folders) -> None:
    with pytest.raises(AdapterExists, match="'up' of 'again' belongs to 'pair'"):
        engine.load_adapter("again", folders["pair"])


def test_demo_brings_its_adapters(data: Path, monkeypatch) -> None:
    monkeypatch.setattr(llm, "demo_data", lambda: data)
    monkeypatch.setattr("oneplusn.server.engine.model.demo_data", lambda: data)
    with oneplusn.Engine("demo", **SMALL) as engine:
        assert set(engine.tasks) == {"up", "down", "lone"}


def test_demo_without_its_files_says_how_to_make_them(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("oneplusn.server.engine.model.demo_data", lambda: tmp_path)
    with pytest.raises(ConfigError, match=r"python -m oneplusn\.demo\.build"):
        oneplusn.Engine("demo", **SMALL)


def test_an_adapter_of_another_base_is_refused_by_name(data: Path, tmp_path: Path) -> None:
    trained = cluster(tiny_model("llama", vocab_size=259), ["new"], seed=3)
    bundle = replace(trained, base="base:" + "0" * 32)
    write_bundle(bundle, tmp_path / "other")
    with (
        oneplusn.Engine(data / "base", **SMALL) as engine,
        pytest.raises(AdapterIncompatible, match="'other' was trained on base:0000"),
    ):
        engine.load_adapter("other", tmp_path / "other")
