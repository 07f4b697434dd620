"""The real thing: `oneplusn serve` as a process, over HTTP, with a model that computes."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import httpx
import openai
import pytest

import oneplusn
from oneplusn import cli
from oneplusn.adapters.files import write_bundle
from oneplusn.demo.tokenizer import END_ID, build_tokenizer
from serving import wait_until
from tiny_engines import cluster
from tiny_models import tiny_model

pytestmark = pytest.mark.e2e

PROMPTS = ["one two", "three", "four five six", "seven"]
TASKS = ["up", None, "lone", {"up": 0.5, "lone": 0.5}]
LIMITS = ("--kv-memory", "4MiB", "--adapter-memory", "16MiB", "--threads", "1")


@dataclass
class Process:
    """A running server, what it has written so far, and where it keeps adapters."""

    popen: subprocess.Popen[str]
    http: httpx.Client
    data: Path


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A base and three adapters; `pair2` is another version of `pair`."""
    folder = tmp_path_factory.mktemp("e2e")
    model = tiny_model("llama", vocab_size=259, eos_token_id=END_ID)
    model.save_pretrained(folder / "base")
    build_tokenizer(folder / "base")
    made = {
        "pair": cluster(model, ["up", "down"], common=(2,), seed=1),
        "pair2": cluster(model, ["up", "down"], common=(2,), seed=5),
        "single": cluster(model, ["lone"], seed=2),
    }
    for name, bundle in made.items():
        write_bundle(bundle, folder / name)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def server(folders, tmp_path_factory) -> Iterator[Process]:
    data = tmp_path_factory.mktemp("data")
    adapters = [f"--adapter={name}={folders[name]}" for name in ("pair", "single")]
    command = [sys.executable, "-P", "-m", "oneplusn.cli", "serve", "--port", "0"]
    command += ["--model", str(folders["base"]), "--data", str(data), *adapters, *LIMITS]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as popen:
        assert popen.stderr is not None
        address = next(found for line in popen.stderr if (found := listening_on(line)))
        with httpx.Client(base_url=address, timeout=60) as http:
            # It answers while it loads, so the first answer says that it is not ready.
            wait_until(lambda: http.get("/health/ready").status_code == 200, seconds=60)
            yield Process(popen, http, data)
        popen.send_signal(signal.SIGTERM)
        rest = popen.stderr.read()
    assert popen.returncode == 0, rest
    assert "Traceback" not in rest


def listening_on(line: str) -> str | None:
    found = re.search(r"listening on (http://\S+);", line)
    return found[1] if found else None


@pytest.fixture(scope="module")
def expected(folders) -> list[str]:
    """What the Python interface answers, each prompt on its own."""
    adapters = {name: folders[name] for name in ("pair", "single")}
    engine = oneplusn.Engine(
        folders["base"], adapters=adapters, threads=1, kv_memory=1 << 22, adapter_memory=1 << 24
    )
    with engine:
        return [
            engine.generate(prompt, tasks=task, max_tokens=8)[0].text
            for prompt, task in zip(PROMPTS, TASKS, strict=True)
        ]


def body(prompts: list[str], tasks: list[object]) -> dict[str, object]:
    return {"task": tasks, "inputs": prompts, "parameters": {"max_new_tokens": 8}}


def test_a_mixed_batch_answers_as_each_alone(server, expected) -> None:
    answer = server.http.post("/generate", json=body(PROMPTS * 4, TASKS * 4))

    assert answer.status_code == 200
    assert [item["generated_text"] for item in answer.json()] == expected * 4
    adapters = [item["adapter"] for item in answer.json()[:4]]
    assert adapters == ["pair@1", None, "single@1", "pair@1,single@1"]
    scraped = server.http.get("/metrics").text
    assert 'oneplusn_batch_distinct_tasks_bucket{le="2.0"}' in scraped
    assert tasks_in_a_step(scraped) == 3


def tasks_in_a_step(scraped: str) -> float:
    buckets = re.findall(r'distinct_tasks_bucket\{le="([\d.]+)"\} ([\d.]+)', scraped)
    most = max(float(count) for _, count in buckets)
    return min(float(bound) for bound, count in buckets if float(count) == most)


def test_requests_from_many_clients_share_steps(server, expected) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(
            lambda pair: server.http.post("/generate", json=body([pair[0]], [pair[1]])).json(),
            zip(PROMPTS * 4, TASKS * 4, strict=True),
        )
        assert [item["generated_text"] for (item,) in answers] == expected * 4


def test_openais_client_streams_the_same(server, expected) -> None:
    with openai.OpenAI(base_url=str(server.http.base_url.join("/v1")), api_key="unused") as client:
        with client.completions.create(
            model="up", prompt=PROMPTS[0], temperature=0, max_tokens=8, stream=True
        ) as stream:
            text = "".join(chunk.choices[0].text for chunk in stream)
        sampled = [
            client.chat.completions.create(
                model="up",
                messages=[{"role": "user", "content": "x"}],
                max_tokens=6,
                n=3,
                seed=5,
                logprobs=True,
                top_logprobs=2,
            )
            for _ in range(2)
        ]
    assert text == expected[0]
    one, other = ([choice.message.content for choice in answer.choices] for answer in sampled)
    assert one == other
    first = sampled[0].choices[0].logprobs.content[0]
    assert first.logprob <= 0
    assert len(first.top_logprobs) == 2


def test_a_repeated_prompt_is_partly_cached(server) -> None:
    long = {"task": "down", "inputs": "a long prompt " * 8, "parameters": {"max_new_tokens": 2}}
    first, second = (server.http.post("/generate", json=long).json() for _ in range(2))
    assert first["details"]["cached_tokens"] == 0
    assert second["details"]["cached_tokens"] >= 96
    assert first["generated_text"] == second["generated_text"]


@pytest.mark.parametrize(
    ("bad", "status", "code"),
    [
        ({"task": "nope", "inputs": "x"}, 404, "model_not_found"),
        ({"task": "up", "inputs": "x" * 10_000}, 400, "context_length_exceeded"),
        (
            {"task": "up", "inputs": "x", "parameters": {"logit_bias": {"9999": 1}}},
            400,
            "invalid_value",
        ),
    ],
    ids=["task", "context", "token"],
)
def test_bad_requests(server, bad, status, code) -> None:
    answer = server.http.post("/generate", json=bad)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_an_upload_for_another_base_leaves_nothing(server, tmp_path) -> None:
    from bundles import write_adapter

    before = sorted(path.name for path in (server.data / "blobs").iterdir())
    answer = upload(server, write_adapter(tmp_path / "other", tasks=("t",)), "other")
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "adapter_incompatible"
    assert sorted(path.name for path in (server.data / "blobs").iterdir()) == before


def test_a_new_version_answers_from_then_on(server, folders, expected) -> None:
    answer = upload(server, folders["pair2"], "pair")

    assert (answer.status_code, answer.json()["id"]) == (201, "pair@2")
    item = server.http.post("/generate", json=body(PROMPTS[:1], ["up"])).json()[0]
    assert item["adapter"] == "pair@2"
    assert item["generated_text"] != expected[0]
    assert upload(server, folders["pair"], "pair").json()["id"] == "pair@1"
    item = server.http.post("/generate", json=body(PROMPTS[:1], ["up"])).json()[0]
    assert item["generated_text"] == expected[0]


def upload(server: Process, folder: Path, name: str) -> httpx.Response:
    files = [("files", (path.name, path.read_bytes())) for path in folder.iterdir()]
    return server.http.post("/v1/adapters", data={"name": name}, files=files)


class TestGivingUp:
    """What ends early leaves nothing in the KV cache; to its end it would take 200 steps."""

    LONG: ClassVar = {"max_new_tokens": 200, "ignore_eos": True}

    @staticmethod
    def in_use(server: Process) -> list[float]:
        scraped = server.http.get("/metrics").text
        gauges = re.findall(
            r"^oneplusn_(?:num_requests_running|kv_cache_usage_ratio) (.*)$", scraped, re.MULTILINE
        )
        return [float(value) for value in gauges]

    @pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
    def test_a_client_that_leaves_frees_its_blocks(self, server, path) -> None:
        asked = {"task": "down", "inputs": "one two", "parameters": self.LONG}
        request = server.http.build_request("POST", path, json=asked)
        lines = [f"POST {path} HTTP/1.1", *(f"{k}: {v}" for k, v in request.headers.items())]
        host, port = server.http.base_url.host, server.http.base_url.port
        with socket.create_connection((host, port)) as client:
            client.sendall("\r\n".join([*lines, "", ""]).encode() + request.content)
            wait_until(lambda: self.in_use(server)[:1] == [1])
        wait_until(lambda: self.in_use(server) == [0, 0])

    def test_a_deadline_does_too(self, server) -> None:
        asked = {"model": "down", "prompt": "one two", "max_tokens": 200, "ignore_eos": True}
        answer = server.http.post("/v1/completions", json={**asked, "timeout": 0.02})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        wait_until(lambda: self.in_use(server) == [0, 0])


def test_the_command_line_answers_the_same(folders, expected, capsys) -> None:
    arguments = ["generate", "--model", str(folders["base"]), "--task", "up", "--max-tokens", "8"]
    assert cli.main([*arguments, "--adapter", f"pair={folders['pair']}", *LIMITS, PROMPTS[0]]) == 0
    assert capsys.readouterr().out == expected[0] + "\n"


def test_doctor_says_that_the_model_passed(folders, capsys) -> None:
    assert cli.main(["doctor", "--model", str(folders["base"]), "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^probe +passed: ", shown, re.MULTILINE)
    assert "torch" in shown


def test_a_model_that_cannot_be_served_ends_in_one_line(tmp_path) -> None:
    command = [sys.executable, "-P", "-m", "oneplusn.cli", "serve", "--port", "0"]
    command += ["--model", str(tmp_path / "none"), "--log-level", "warning"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("oneplusn: there is no folder")
    assert done.stderr.count("\n") == 1
