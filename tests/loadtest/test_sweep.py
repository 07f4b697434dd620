from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from oneplusn.loadtest import load

MODELS = [{"id": "base"}, *({"id": name, "parent": "base"} for name in "abc")]


def serve(script, **stream):
    """A server of three adapters; the more requests are under way, the slower."""

    def behave(request):
        if request.path == "/v1/models":
            return script(content=json.dumps({"data": MODELS}).encode())
        if not request.is_stream:
            return script(status=404)
        return script(**{"events": 3, "first_s": 0.01, "gap_s": 0.005, **stream})

    return behave


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    load.declare(parser)
    return load.run(parser.parse_args(["sweep", *arguments]))


def points(folder: Path) -> list[dict]:
    return json.loads((folder / "sweep.json").read_text(encoding="utf-8"))["points"]


@pytest.mark.parametrize(
    ("over", "more", "key", "expected"),
    [
        ("concurrency=1,3", [], "max_concurrent_requests", [1, 3]),
        ("rate=40,80", [], "request_rate", [40.0, 80.0]),
        ("tasks=1,3", ["--concurrency", "2"], "tasks", [["a"], ["a", "b", "c"]]),
        ("input-tokens=4,9", ["--concurrency", "2"], "total_input_tokens", [48, 108]),
        ("output-tokens=1,2", ["--concurrency", "2"], "asked", [1, 2]),
    ],
)
def test_one_thing_varies_and_the_rest_stays(
    scripted, script, tmp_path: Path, over, more, key, expected
) -> None:
    server = scripted(serve(script, usage=False))

    code = run(
        server.address, "--over", over, *more, "--num-requests", "12", "--out", str(tmp_path),
        "--popularity", "distinct",
    )  # fmt: skip

    assert code == 0
    found = points(tmp_path)
    asked = [{r.json["max_tokens"]} for r in (server.streams[0], server.streams[-1])]
    shown = asked if key == "asked" else [point[key] for point in found]
    wanted = [{value} for value in expected] if key == "asked" else expected
    assert [sorted(value) if key == "tasks" else value for value in shown] == wanted
    assert [point["completed"] for point in found] == [12, 12]
    assert [point["value"] for point in found] == [float(v) for v in over.split("=")[1].split(",")]


def test_a_sweep_is_a_table_a_page_and_a_picture(
    scripted, script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = scripted(serve(script))

    code = run(
        server.address, "--over", "concurrency=1,2,8", "--num-requests", "8",
        "--slo", "e2e=30s", "--min-goodput", "99%", "--out", str(tmp_path), "--processes", "2",
    )  # fmt: skip

    assert code == 0
    table = capsys.readouterr().out
    rows = [line for line in table.splitlines() if line.startswith(("| 1 |", "| 2 |", "| 8 |"))]
    assert len(rows) == 3
    assert all(row.endswith("| 100.0% |") for row in rows)
    page = (tmp_path / "sweep.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3
    assert imread(tmp_path / "sweep.png").shape[1] > 1000
    found = points(tmp_path)
    assert [point["client_processes"] for point in found] == [1, 2, 2]  # no more than clients
    assert len({point["seed"] for point in found}) == 3
    prompts = [request.json["prompt"] for request in server.streams]
    assert len(set(prompts)) == len(prompts) == 24


def test_the_worst_point_makes_the_exit_status(scripted, script) -> None:
    inner = serve(script)

    def behave(request):
        return script(status=500) if request.is_stream else inner(request)

    sweep = [scripted(behave).address, "--over", "rate=100,200", "--num-requests", "3"]

    assert run(*sweep) == 1
    assert run(*sweep, "--slo", "ttft=1s", "--min-goodput", "1%") == 3


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "required: --over"),
        (["--over", "clients=1,2"], "'clients=1,2' cannot be swept; give one of concurrency, rate"),
        (["--over", "rate"], "'rate' cannot be swept"),
        (["--over", "rate=1"], "1 are not two or more values that grow"),
        (["--over", "rate=2,1"], "2,1 are not two or more values that grow"),
        (["--over", "rate=1,0"], "0 is not above 0"),
        (["--over", "concurrency=1,2.5"], "2.5 is no whole number"),
        (["--over", "concurrency=1,2", "--concurrency", "3"], "--concurrency fixes; give one"),
        (["--over", "rate=1,2", "--concurrency", "3"], "--concurrency fixes; give one"),
        (["--over", "tasks=1,2"], "give one of --rate R and --concurrency N"),
        (
            ["--over", "tasks=1,4", "--concurrency", "1"],
            "--over tasks goes up to 4, and there are 3 tasks",
        ),
    ],
)
def test_sweeps_that_make_no_sense_are_refused(
    arguments, reason, scripted, script, capsys: pytest.CaptureFixture[str]
) -> None:
    address = scripted(serve(script)).address
    try:
        code = run(address, *arguments)
    except SystemExit as error:
        code = error.code

    assert code == 2
    assert reason in capsys.readouterr().err
