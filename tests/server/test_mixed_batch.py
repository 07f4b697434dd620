"""The demo's twelve tasks, three blends and the base in one batch: each answers as if alone.

So they do before and after the engine is killed. All is computed in fp32, greedily, and past every
end of an answer, so that all rows stay together in every step.
"""

from __future__ import annotations

import os
import random
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

import oneplusn
from oneplusn.adapters.files import read_adapter, write_bundle
from oneplusn.adapters.fingerprint import base_fingerprint
from oneplusn.adapters.refs import TaskRef
from oneplusn.demo.run import most_tasks_in_a_step
from oneplusn.demo.tasks import CLUSTERS, TASKS
from oneplusn.server.engine.model import demo_data
from oneplusn.server.messages import Sampling, Submit
from server_processes import KEYS, Process, Streams, error_of, running
from serving import wait_until
from tiny_engines import TIE, cluster, record_logits
from tolerances import assert_close

Weights = dict[str, float]

NUM_TOKENS = 24
ENDLESS = 400
# Of the 36 requests that meet the kill, twelve wait.
MAX_ROWS = 24
BASE = base_fingerprint(demo_data() / "base")
# Rows of a cluster have the same prompt. None of the short ones fills a block of the cache, so no
# request begins with what another has computed.
SHORT = {"text": "three mice", "numbers": "4 82 9 13", "records": "city=Oslo"}
LONG = {
    "text": "umpire saddle quiet walnut",
    "numbers": "57 0 99 57",
    "records": "born=28 December 1900; city=Fez; name=Leo Pike",
}


class Row(NamedTuple):
    """A prompt, and what serves it."""

    task: str | Weights | None
    prompt: str


def rows(prompts: Mapping[str, str]) -> list[Row]:
    """Sixteen rows in mixed order."""
    made = [
        *(Row(task.name, prompts[task.cluster]) for task in TASKS.values()),
        Row({"reverse_words": 0.6, "iso_date": 0.5}, prompts["records"]),  # over two clusters
        Row({"sort_numbers": 0.7, "largest": 0.3}, prompts["numbers"]),
        Row({"title_case": 1.0, "drop_vowels": -0.4}, prompts["text"]),
        Row(None, prompts["text"]),
    ]
    return random.Random(0).sample(made, len(made))


ROWS = rows(SHORT)
UPLOADED = [Row(task, SHORT["text"]) for task in ("up", "down")]


def agreed(alone: Sequence[int], gaps: Sequence[float], together: Sequence[int]) -> int:
    """Count the tokens before a near tie went the other way, the only reason to differ."""
    for index, (token, gap, other) in enumerate(zip(alone, gaps, together, strict=True)):
        if token != other:
            assert gap <= TIE, f"token {index} is {other}; alone it is {token} by {gap:.1e}"
            return index
    return len(alone)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Process]:
    command = ["oneplusn.cli", "serve", "--model", "demo", "--port", "0", "--dtype", "float32"]
    command += ["--threads", "1", "--kv-memory", "256MiB", "--max-num-seqs", str(MAX_ROWS)]
    with running(command, tmp_path_factory.mktemp("log") / "log") as process:
        yield process


def generate(server: Process, asked: Sequence[Row]) -> list[dict[str, Any]]:
    """Ask for all rows in one request."""
    body = {
        "task": [row.task for row in asked],
        "inputs": [row.prompt for row in asked],
        "parameters": {
            **{"max_new_tokens": NUM_TOKENS, "ignore_eos": True},
            **{"details": True, "top_n_tokens": 2},
        },
    }
    answer = server.http.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    assert {item["details"]["cached_tokens"] for item in answer.json()} == {0}
    return answer.json()


def assert_alike(alone: Sequence[dict[str, Any]], together: Sequence[dict[str, Any]]) -> None:
    equal = 0
    for one, other in zip(alone, together, strict=True):
        assert (one["task"], one["adapter"]) == (other["task"], other["adapter"])
        top = [[token["logprob"] for token in two] for two in one["details"]["top_tokens"]]
        tokens = [[token["id"] for token in item["details"]["tokens"]] for item in (one, other)]
        equal += agreed(tokens[0], [best - second for best, second in top], tokens[1])
    assert equal > 0.95 * len(alone) * NUM_TOKENS


@pytest.fixture(scope="module")
def alone(server) -> list[dict[str, Any]]:
    """The answers to sixteen requests of one row, one after the other."""
    answers = [item for row in ROWS for item in generate(server, [row])]
    assert most_tasks_in_a_step(server.http.get("/metrics").text) == 1
    return answers


@pytest.mark.e2e
def test_a_request_of_sixteen_rows_answers_as_sixteen_requests(server, alone) -> None:
    together = generate(server, ROWS)

    assert most_tasks_in_a_step(server.http.get("/metrics").text) == 15
    assert_alike(alone, together)
    assert len({item["generated_text"] for item in alone}) == len(ROWS)


def upload(server: Process, folder: Path, *, seed: int, base: str) -> httpx.Response:
    """Send an adapter that was made for a base, of two tasks."""
    model = AutoModelForCausalLM.from_pretrained(demo_data() / "base", dtype=torch.float32)
    write_bundle(replace(cluster(model, ["up", "down"], common=(2,), seed=seed), base=base), folder)
    files = [("files", (path.name, path.read_bytes())) for path in folder.iterdir()]
    return server.http.post("/v1/adapters", data={"name": "pair"}, files=files)


@pytest.mark.e2e
def test_an_adapter_of_another_base_is_refused_by_name(server, tmp_path) -> None:
    other = f"base:{'0' * 32}"
    answer = upload(server, tmp_path / "pair", seed=0, base=other)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "base_mismatch")
    assert f"trained on {other} and this base is {BASE}" in answer.json()["error"]["message"]


@pytest.mark.e2e
def test_a_kill_ends_every_request_and_changes_no_answer(server, alone, tmp_path) -> None:
    labels = [
        upload(server, tmp_path / name, seed=seed, base=BASE).json()["id"]
        for name, seed in (("a", 1), ("b", 2), ("c", 1))
    ]
    assert labels == ["pair@1", "pair@2", "pair@1"]
    before = alone + [item for row in UPLOADED for item in generate(server, [row])]
    parameters = {"max_new_tokens": ENDLESS, "ignore_eos": True}
    bodies = [
        {"task": row.task, "inputs": row.prompt, "parameters": parameters}
        for row in ROWS + UPLOADED
    ]
    engine = server.engine
    with ThreadPoolExecutor(2 * len(bodies)) as pool:
        streams = Streams(pool, server.url, bodies)
        unary = [pool.submit(server.http.post, "/generate", json=body) for body in bodies]
        wait_until(lambda: in_flight(server) == 2 * len(bodies), seconds=30)

        os.kill(engine, signal.SIGKILL)

        events, _ = streams.ends()
        answers = [future.result(timeout=30) for future in unary]
    assert [error_of(event) for event in events] == [("engine_dead", KEYS)] * len(bodies)
    ends = [(answer.status_code, error_of(answer.json())) for answer in answers]
    assert ends == [(503, ("engine_dead", KEYS))] * len(bodies)
    assert server.http.get("/health/live").status_code == 200

    server.wait_until_ready()

    assert server.engine != engine
    assert_alike(before, generate(server, ROWS + UPLOADED))
    assert in_flight(server) == 0


def in_flight(server: Process) -> float:
    scraped = server.http.get("/metrics").text
    gauges = re.findall(r"^oneplusn_num_requests_(?:running|waiting) (.*)$", scraped, re.MULTILINE)
    return sum(map(float, gauges))


def submits(engine: oneplusn.Engine, salt: str) -> list[Submit]:
    """Sixteen rows with long prompts, whose cache no other salt shares."""
    bundles = [read_adapter(demo_data() / "adapters" / name, name=name) for name in CLUSTERS]
    digests = {task: bundle.digest for bundle in bundles for task in bundle.tasks}
    sampling = Sampling(max_tokens=NUM_TOKENS, ignore_eos=True)
    made = []
    for index, (task, prompt) in enumerate(rows(LONG)):
        weights = {task: 1.0} if isinstance(task, str) else task or {}
        refs = tuple(TaskRef(digests[name], name, weight) for name, weight in weights.items())
        tokens = engine.tokenizer.encode(prompt)
        made.append(Submit(f"{salt}{index}", tokens, refs, sampling, salt=salt))
    return made


def test_so_do_the_engines_logits(monkeypatch) -> None:
    """Sixteen rows run alone, then in one batch."""
    with oneplusn.Engine("demo", dtype="float32", threads=1, token_budget=512) as engine:
        core, logits = engine.core, record_logits(engine.core, monkeypatch)
        for message in submits(engine, "alone"):
            core.submit(message)
            while core.has_work:
                core.step()
        together = submits(engine, "together")
        for message in together:
            core.submit(message)
        steps = []
        while core.has_work:
            steps.append(core.step().stats)

    assert steps[0].num_prefill_tokens == sum(len(message.tokens) for message in together)
    assert [step.distinct_tasks for step in steps] == [15] * NUM_TOKENS
    equal = 0
    for index in range(len(ROWS)):
        one, other = (torch.stack(logits[f"{salt}{index}"]) for salt in ("alone", "together"))
        best, second = one.topk(2).values.unbind(-1)
        tokens = [taken.argmax(-1).tolist() for taken in (one, other)]
        count = agreed(tokens[0], (best - second).tolist(), tokens[1])
        assert_close(other[:count], one[:count])
        equal += count
    assert equal > 0.95 * len(ROWS) * NUM_TOKENS
