from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from loads import KEY, report, run, serve
from oneplusn.loadtest import load

# What `vllm bench serve` writes for a generation benchmark, its long lists aside.
FIELDS = """date endpoint_type backend label model_id tokenizer_id num_prompts request_rate
    burstiness max_concurrency duration completed failed total_input_tokens total_output_tokens
    request_throughput request_goodput output_throughput total_token_throughput
    max_output_tokens_per_s max_concurrent_requests""".split()  # noqa: SIM905
TIMES = [
    f"{kind}_{name}_ms"
    for name in ("ttft", "tpot", "itl", "e2el")
    for kind in ("mean", "median", "std", "p50", "p90", "p95", "p99")
]


def test_a_report_has_the_fields_that_others_read_and_ours(
    scripted, script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = scripted(serve(script))

    code = run(
        server.address, "--rate", "50", "--num-requests", "20", "--input-tokens", "40",
        "--output-tokens", "3", "--popularity", "zipf:1", "--seed", "5", "--api-key", KEY,
        "--out", str(tmp_path),
    )  # fmt: skip

    assert code == 0
    found = report(tmp_path)
    assert set(FIELDS) <= set(found)
    assert all(isinstance(found[name], float) for name in TIMES)
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (20, 0, 60)
    assert (found["request_rate"], found["max_concurrency"], found["seed"]) == (50.0, None, 5)
    assert (found["burstiness"], found["request_goodput"]) == (1.0, None)
    assert set(found["tasks"]) == {"a", "b"}  # and not the base
    assert sum(task["requests"] for task in found["tasks"].values()) == 20
    assert found["environment"]["server"] == {"version": "9"}
    assert found["environment"]["cores"] >= 1
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() == page.strip()
    assert "| time to first token |" in page
    everything = page + json.dumps(found) + (tmp_path / "requests.jsonl").read_text("utf-8")
    assert KEY not in everything
    assert all(r.headers["authorization"] == f"bearer {KEY}" for r in server.requests)


def test_every_request_has_a_line_and_the_length_that_was_asked_for(
    scripted, script, tmp_path: Path
) -> None:
    server = scripted(serve(script))

    run(
        server.address, "--concurrency", "3", "--num-requests", "9", "--input-tokens", "40",
        "--output-tokens", "uniform:5-9", "--out", str(tmp_path), "--tasks", "b",
    )  # fmt: skip

    lines = (tmp_path / "requests.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    asked = {request.json["prompt"]: request.json for request in server.streams}
    assert [row["index"] for row in rows] == list(range(9))
    assert len(asked) == 9
    assert {len(prompt.split()) for prompt in asked} == {40}
    assert {body["model"] for body in asked.values()} == {"b"}
    assert sorted(row["asked_output_tokens"] for row in rows) == sorted(
        body["max_tokens"] for body in asked.values()
    )
    assert all(5 <= row["asked_output_tokens"] <= 9 for row in rows)
    assert all(len(row["times"]) == 3 for row in rows)
    assert all(row["times"][0] - row["sent"] > 0.01 for row in rows)


@pytest.mark.parametrize(
    ("endpoint", "path", "expected"),
    [
        ("completions", "/v1/completions", {"model": "a", "max_tokens": 4, "top_p": 0.5}),
        ("chat", "/v1/chat/completions", {"model": "a", "max_tokens": 4, "top_p": 0.5}),
    ],
)
def test_endpoints_and_extra_fields(scripted, script, endpoint, path, expected) -> None:
    server = scripted(serve(script))
    more = ["--endpoint", endpoint, "--extra-body", '{"top_p": 0.5}', "--output-tokens", "4"]

    address = f"{server.address}/v1/"  # as OpenAI's clients are told it
    code = run(address, "--concurrency", "1", "--num-requests", "1", "--tasks", "a", *more)

    assert code == 0
    (request,) = server.streams
    assert request.path == path
    assert expected.items() <= request.json.items()
    assert request.json["ignore_eos"] is True


def test_prompts_of_a_file_are_sent_as_they_are(scripted, script, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n{"prompt": "two", "task": "b", "output_tokens": 2}')
    server = scripted(serve(script))

    run(
        server.address, "--concurrency", "1", "--num-requests", "4", "--tasks", "a",
        "--prompts", str(prompts), "--output-tokens", "7",
    )  # fmt: skip

    sent = [(r.json["prompt"], r.json["model"], r.json["max_tokens"]) for r in server.streams]
    assert sorted(sent) == [("one", "a", 7)] * 2 + [("two", "b", 2)] * 2


def test_failed_requests_make_the_exit_status_and_are_shown(
    scripted, script, tmp_path: Path
) -> None:
    content = b'{"error": {"code": "queue_full", "message": "too | many"}}'
    server = scripted(serve(script, status=429, headers=("retry-after: 0",), content=content))

    code = run(server.address, "--rate", "50", "--num-requests", "5", "--out", str(tmp_path))

    assert code == 1
    found = report(tmp_path)
    assert (found["completed"], found["failed"], found["rejected"]) == (0, 5, 5)
    (error,) = found["errors"]
    assert (error["error"], error["count"]) == ("HTTP 429 (queue_full)", 5)
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert r"| HTTP 429 (queue_full) | 5 | the server answered 429" in page
    assert r"too \| many" in page


def test_a_server_without_counts_is_measured_and_said_so(scripted, script, tmp_path: Path) -> None:
    server = scripted(serve(script, usage=False))

    run(
        server.address, "--concurrency", "1", "--num-requests", "2", "--out", str(tmp_path),
        "--input-tokens", "11",
    )  # fmt: skip

    found = report(tmp_path)
    assert (found["total_output_tokens"], found["total_input_tokens"]) == (6, 22)
    assert any("tells no token counts" in line for line in found["warnings"])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "give one of --rate R and --concurrency N"),
        (["--rate", "1", "--concurrency", "1"], "give one of --rate R and --concurrency N"),
        (["--rate", "0"], "0 is not above 0"),
        (["--rate", "x"], "'x' is no number"),
        (["--rate", "nan"], "nan is not above 0"),
        (["--concurrency", "1.5"], "1.5 is no whole number of 1 or more"),
        (["--rate", "1", "--retries", "-1"], "-1 is no whole number of 0 or more"),
        (["--concurrency", "2", "--processes", "3"], "--processes 3 is more than the clients"),
        (["--concurrency", "2", "--burstiness", "2"], "give --rate with them"),
        (["--rate", "1", "--ramp-to", "9", "--num-requests", "3"], "needs an end; give --duration"),
        (["--rate", "1", "--min-goodput", "9%"], "needs limits; give --slo ttft=500ms"),
        (["--rate", "1", "--slo", "p99=1s"], "'p99=1s' is no limit; give ttft, itl, tpot, e2e"),
        (["--rate", "1", "--popularity", "even"], "'even' is no popularity"),
        (["--rate", "1", "--input-tokens", "0"], "length of 1 or more"),
        (["--rate", "1", "--warmup", "-1"], "-1 is not above 0"),
        (["--rate", "1", "--extra-body", "5"], "5 is no JSON object"),
        (["--rate", "1", "--tasks", ","], "it names nothing"),
        (["--rate", "1", "--churn-adapter", "x=a"], "'x=a' is not NAME=DIR_A,DIR_B"),
        (["--rate", "1", "--churn-adapter", "x=/none,/none"], "/none is no folder"),
        (["--rate", "1", "--churn", "1"], "--churn and --churn-adapter need each other"),
        (["--rate", "1", "--prompts", "/none"], "/none cannot be read"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    arguments, reason, scripted, script, capsys: pytest.CaptureFixture[str]
) -> None:
    address = scripted(serve(script)).address
    try:
        code = run(address, *arguments)
    except SystemExit as error:
        code = error.code

    assert code == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--rate", "5", "http://127.0.0.1:1"], "'5' is neither an address nor one of load, sweep"),
        (["sweeep", "http://127.0.0.1:1"], "'sweeep' is neither an address nor one of"),
        ([], "the following arguments are required: URL | VERB"),
    ],
)
def test_what_begins_with_neither_an_address_nor_a_verb_is_refused(
    words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(*words)

    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "expected"),
    [
        ((), ["oneplusn loadtest sweep http", "compare"]),
        (("load",), ["--burstiness B", "exit status: 0;", "--min-goodput BOUND", "usage: x [-h]"]),
        (("sweep",), ["--over NAME=V1,V2,...", "concurrency, rate, tasks"]),
        (("compare",), ["--force", "--least SHARE"]),
    ],
)
def test_help_explains_with_examples(
    verb: tuple[str, ...], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser(prog="x")
    load.declare(parser)

    with pytest.raises(SystemExit, match="0"):
        parser.parse_args([*verb, "--help"])

    page = capsys.readouterr().out
    assert "examples:" in page
    assert [words for words in expected if words not in page] == []


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("127.0.0.1:8000", "is no address of a server"),
        ("ftp://127.0.0.1", "is no address of a server"),
        ("http://me:secret@127.0.0.1:1", "only --api-key is sent"),
        ("http://127.0.0.1:1", "cannot be reached"),
    ],
)
def test_a_server_that_is_not_there_is_said_so(
    url: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(url, "--rate", "1") == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("models", [[], None, [{"name": "x"}]])
def test_a_server_that_lists_nothing_needs_a_name(
    scripted, script, models, capsys: pytest.CaptureFixture[str]
) -> None:
    address = scripted(serve(script, models=models)).address

    assert run(address, "--rate", "50", "--num-requests", "1") == 2
    assert "lists no model; name one with --model" in capsys.readouterr().err
    assert run(address, "--rate", "50", "--num-requests", "1", "--model", "x") == 0


def test_adapters_change_meanwhile(scripted, script, tmp_path: Path) -> None:
    for version in ("one", "two"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "weights.bin").write_text(version)
    lists, state = serve(script), {"active": 0}

    def behave(request):
        if request.path == "/v1/adapters":
            state["active"] = 1 if b"one\r\n" in request.body else 2
            described = {"id": f"x@{state['active']}", "tasks": ["a"]}
            return script(content=json.dumps(described).encode(), status=200)
        if request.is_stream and request.json["model"] == "a":
            return script(events=1, adapter=f"x@{state['active']}")
        return lists(request)

    code = run(
        scripted(behave).address, "--concurrency", "2", "--duration", "1", "--churn", "10",
        "--churn-adapter", f"x={tmp_path / 'one'},{tmp_path / 'two'}", "--out", str(tmp_path),
    )  # fmt: skip

    assert code == 0
    found = report(tmp_path)
    assert found["churn"]["completed"] == found["churn"]["swaps"] >= 5
    assert found["churn"]["p50_upload_to_first_token_ms"] > found["churn"]["p50_upload_ms"]
    assert found["churn"]["p50_others_itl_ms"] == found["tasks"]["b"]["p50_itl_ms"]
    assert set(found["tasks"]["a"]["versions"]) == {"x@1", "x@2"}
    assert "## Swaps of x" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_too_little_goodput_is_an_exit_status_of_its_own(scripted, script, tmp_path: Path) -> None:
    inner = serve(script, first_s=0.02)

    def behave(request):
        refused = request.is_stream and len(server.requests) % 4 == 0
        return script(status=429) if refused else inner(request)

    server = scripted(behave)
    load_of = [server.address, "--rate", "100", "--num-requests", "16", "--out", str(tmp_path)]

    assert run(*load_of, "--slo", "e2e=30s", "--min-goodput", "70%") == 0  # though 4 were refused
    assert run(*load_of, "--slo", "e2e=30s", "--min-goodput", "80%") == 3
    assert run(*load_of, "--slo", "e2e=1ms") == 1
    found = report(tmp_path)
    assert (found["request_goodput"], found["slo"]["missed"]) == (0.0, {"e2e": found["completed"]})
    assert "## Goodput" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_the_page_needs_no_other_and_keeps_a_servers_text_as_text(
    scripted, script, tmp_path: Path
) -> None:
    inner = serve(script, [{"id": "<b>", "parent": "base"}], adapter="<script>x</script>@1")
    bad = script(status=500, content=b"<img src=x onerror=alert(1)>")

    def behave(request):
        return bad if request.is_stream and len(server.requests) % 5 == 0 else inner(request)

    server = scripted(behave)
    run(server.address, "--concurrency", "2", "--num-requests", "12", "--out", str(tmp_path))

    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|img|iframe|b>@)|@import|url\(", page)
    assert set(re.findall(r"https?://[^\s<\"]+", page)) == {server.address}
    assert page.count("<svg") == 7
    assert "&lt;script&gt;x&lt;/script&gt;@1" in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "prefers-color-scheme: dark" in page
    html5 = HTMLParser()
    html5.feed(page)
    html5.close()


def test_the_load_tester_needs_nothing_else_of_ours_and_no_torch() -> None:
    code = (
        "import sys, oneplusn.loadtest.load, oneplusn.loadtest.swap;"
        "print(sorted(m for m in sys.modules if m == 'torch' or m.startswith('oneplusn.')"
        " and not m.startswith('oneplusn.loadtest')))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "[]"
