from __future__ import annotations

import json
from pathlib import Path

import pytest

from oneplusn.loadtest import bench_load
from oneplusn.loadtest.bench_cases import Work
from oneplusn.loadtest.bench_memory import family, resident
from oneplusn.loadtest.dialects import DIALECTS
from oneplusn.loadtest.fixtures import Fixtures
from oneplusn.loadtest.peers.static_batch import figures
from oneplusn.loadtest.stream import LoadFailed

ROUTE = DIALECTS["completions"]


def work(**changed: int) -> Work:
    sizes = {"streams": 3, "prompt": 5, "output": 4, "rounds": 2, "repeats": 2, "threads": 1}
    return Work("tiny", **{**sizes, **changed}, fixtures=Fixtures(Path("x"), 3))


def test_a_case_is_warmed_up_and_repeated_with_new_prompts(scripted, script) -> None:
    server = scripted(lambda _: script(events=4, gap_s=0.001))

    found = bench_load.measure(server.address, ROUTE, work(), "loras")

    asked = [request.json for request in server.requests]
    assert len(asked) == 3 + 2 * 6  # one round, then two runs of two rounds
    assert [body["model"] for body in asked[:3]] == ["lora-00", "lora-01", "lora-02"]
    assert sorted(body["model"] for body in asked[3:9]) == sorted(
        ["lora-00", "lora-01", "lora-02"] * 2
    )
    assert len({tuple(body["prompt"]) for body in asked}) == len(asked)
    assert {len(body["prompt"]) for body in asked} == {5}
    assert all(body["ignore_eos"] and body["max_tokens"] == 4 for body in asked)
    assert found["runs"] == 2
    assert found["output_throughput"] > 0


def test_no_more_requests_are_open_than_there_are_streams(scripted, script) -> None:
    server = scripted(lambda _: script(events=4, first_s=0.02))

    bench_load.send(server.address, ROUTE, work(), ["base"] * 2, 6)

    starts = sorted(request.came for request in server.requests)
    ends = sorted(request.written[-1] for request in server.requests)
    assert all(start > ends[index] for index, start in enumerate(starts[2:]))


def test_slow_cases_are_not_repeated(scripted, script, monkeypatch) -> None:
    monkeypatch.setattr(bench_load, "REPEAT_BUDGET_S", 0.0)
    server = scripted(lambda _: script(events=4))

    assert bench_load.measure(server.address, ROUTE, work(repeats=9), "base")["runs"] == 1


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"events": 3}, "6 requests of 4 tokens got 18"),
        ({"status": 422, "content": b'{"detail": "no"}'}, "422"),
        ({"events": 4, "dies_after": 1}, "closed before the end"),
    ],
)
def test_other_work_than_was_asked_for_is_no_figure(scripted, script, answer, reason) -> None:
    server = scripted(lambda _: script(**answer))
    outcome = bench_load.send(server.address, ROUTE, work(), ["base"] * 3, 6)

    with pytest.raises(LoadFailed, match=reason):
        bench_load.kept(outcome, work())


def test_first_token_is_on_the_clock_that_servers_are_started_by(scripted, script) -> None:
    server = scripted(lambda _: script(events=4))

    when = bench_load.first_token(server.address, ROUTE, work())

    (request,) = server.requests
    assert request.came < when
    assert request.json["model"] == "base"


@pytest.mark.parametrize(
    ("rates", "expected"), [([3.0], 3.0), ([3.0, 1.0], 1.0), ([3.0, 1.0, 2.0], 2.0)]
)
def test_the_median_run_is_kept_whole(rates: list[float], expected: float) -> None:
    runs = [{"output_throughput": rate, "other": -rate} for rate in rates]

    assert bench_load.median_run(runs) == {"output_throughput": expected, "other": -expected}


def test_a_static_batch_in_figures() -> None:
    found = figures([1.0, 3.0, 3.5, 4.0, 5.0], rows=4)

    assert found == {
        "output_throughput": 4.0,  # 16 tokens from 1.0 to 5.0
        "p50_ttft_ms": 2000.0,
        "p99_ttft_ms": 2000.0,
        "p50_itl_ms": 500.0,
        "p99_itl_ms": 1000.0,
    }


def test_memory_is_that_of_a_process_and_all_its_descendants(tmp_path: Path) -> None:
    parents = {10: 1, 11: 10, 12: 11, 13: 1}
    for pid, parent in parents.items():
        folder = tmp_path / str(pid)
        folder.mkdir()
        (folder / "stat").write_text(f"{pid} (a (b) c) S {parent} 1 1", encoding="utf-8")
        text = f"Rss:  {pid} kB\nPss:  2 kB\nPss_Anon: 7 kB\n"
        (folder / "smaps_rollup").write_text(text, encoding="utf-8")

    assert family(10, tmp_path) == [10, 11, 12]
    assert resident(10, tmp_path) == {"rss": 33 * 1024, "pss": 6 * 1024}


def test_compose_writes_what_the_route_asks_for() -> None:
    sent = list[tuple[str, bytes]]()
    draw = bench_load.random.Random(0)

    def post(path: str, body: bytes) -> bytes:
        sent.append((path, body))
        return b""

    compose = bench_load.composer(ROUTE, work(), draw, post)
    for request in bench_load.planned(work(), ["a", "b"], 3):
        compose(request)

    assert {path for path, _ in sent} == {"/v1/completions"}
    assert [json.loads(body)["model"] for _, body in sent] == ["a", "b", "a"]
