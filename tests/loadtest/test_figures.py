from __future__ import annotations

from itertools import count, repeat

import pytest

from oneplusn.loadtest.caveats import caveats
from oneplusn.loadtest.churn import Churn, Swap
from oneplusn.loadtest.dialects import DIALECTS
from oneplusn.loadtest.drive import Outcome, Record
from oneplusn.loadtest.figures import by_task, errors, figures, split_gaps, swaps
from oneplusn.loadtest.slo import Slo
from oneplusn.loadtest.stream import Answer, LoadFailed
from oneplusn.loadtest.transport import Server
from oneplusn.loadtest.workload import Planned

INDEX = count()


def record(
    due: float, task: str = "a", *, late: float = 0.0, counts: bool = True, **more
) -> Record:
    planned = Planned(next(INDEX), due, task, input_tokens=10, output_tokens=4)
    return Record(planned, due, due + late, counts, **more)


def answer(sent: float, *times: float, ended: float, tokens: int, **more) -> Answer:
    return Answer(sent=sent, times=times, ended=ended, tokens=tokens, **more)


def outcome() -> Outcome:
    """Two answers, a refusal, a request without an end, and one of the warm-up."""
    warm = answer(-1.0, 0.25, 0.5, ended=0.5, tokens=2)
    first = answer(0.25, 1.25, 1.5, 2.0, ended=2.25, tokens=3, prompt_tokens=12, versions=("x@1",))
    second = answer(1.0, 1.5, 3.5, ended=4.25, tokens=4, cached_tokens=6, versions=("y@2",))
    full = LoadFailed("full", group="HTTP 429 (queue_full)")
    return Outcome(
        records=[
            record(-1.0, counts=False, answer=warm),
            record(0.0, late=0.25, connecting_s=0.125, answer=first),
            record(1.0, "b", answer=second),
            record(1.5, failure=full, retries=1),
            record(1.75, "b"),
        ],
        begin=0.0,
        end_of_sending=2.0,
        cpu_shares=(0.1, 0.05),
        interrupted=True,
    )


def test_the_figures_of_a_load() -> None:
    found = figures(outcome())

    assert {key: found[key] for key in list(found) if not key.endswith("_ms")} == {
        "duration": 4.0,  # 0.25 to 4.25
        "sending_seconds": 2.0,
        "completed": 2,
        "failed": 1,
        "aborted": 1,
        "rejected": 1,
        "retries": 1,
        "completed_without_text": 0,
        "warmup_requests": 1,
        "warmup_failed": 0,
        "total_input_tokens": 22,  # told, and where nothing is told what was asked for
        "total_output_tokens": 7,
        "cached_input_tokens": 6,
        "request_throughput": 0.5,
        "request_goodput": None,
        "output_throughput": 1.75,
        "total_token_throughput": 7.25,
        # In 2 s: both of the warm-up's, two of three, and one event of two tokens.
        "output_throughput_while_sending": 3.0,
        "max_output_tokens_per_s": 4.0,  # from 1.25 to 2.25
        "max_concurrent_requests": 2,
        "tokens_per_event": 1.4,
        "tokens_counted_by": "server",
        "percentile_rule": "nearest rank",
        "slo": None,
        "client_processes": 2,
        "client_cpu_share": 0.1,
        "client_cpu_shares": (0.1, 0.05),
        "interrupted": True,
    }
    expected = {
        "ttft": (750.0, 500.0, 1000.0),  # 1000 and 500
        "itl": (2750 / 3, 500.0, 2000.0),  # 250, 500 and 2000
        "tpot": ((500 + 2750 / 3) / 2, 500.0, 2750 / 3),  # 1000 ms for 2, 2750 ms for 3
        "e2el": (2625.0, 2000.0, 3250.0),
        "dispatch_delay": (62.5, 0.0, 250.0),
        "connect": (125.0, 125.0, 125.0),
    }
    for name, (mean, median, p99) in expected.items():
        keys = [f"{kind}_{name}_ms" for kind in ("mean", "median", "p99")]
        assert [found[key] for key in keys] == pytest.approx([mean, median, p99]), name


def test_tasks_have_their_own_figures_and_versions() -> None:
    found = by_task(outcome())

    assert list(found) == ["a", "b"]
    assert found["a"]["versions"] == {"x@1": 1}
    assert (found["a"]["completed"], found["a"]["failed"]) == (1, 1)
    assert (found["b"]["completed"], found["b"]["failed"]) == (1, 0)
    assert (found["a"]["p50_ttft_ms"], found["b"]["p50_ttft_ms"]) == (1000.0, 500.0)
    assert found["b"]["cached_input_tokens"] == 6


def test_a_promise_is_judged_as_a_whole_and_by_task() -> None:
    slo = Slo.parse("ttft=600ms,itl=1s")

    whole, tasks = figures(outcome(), slo), by_task(outcome(), slo)

    # The first has 1000 ms to its first token, the second 2000 ms between two, the third nothing.
    assert whole["slo"] == {
        "limits_ms": {"ttft": 600.0, "itl": 1000.0},
        "met": 0,
        "share": 0.0,
        "requests_per_s": 0.0,
        "missed": {"ttft": 1, "itl": 1},
        "without_answer": 1,
    }
    assert whole["request_goodput"] == 0.0
    assert figures(outcome(), Slo.parse("ttft=600ms"))["request_goodput"] == 0.25  # in 4 s
    assert {name: task["slo_share"] for name, task in tasks.items()} == {"a": 0.0, "b": 0.0}


def test_a_load_without_an_answer_has_counts_and_no_times() -> None:
    found = figures(Outcome(records=[record(0.0, failure=LoadFailed("x", group="timeout"))]))

    assert (found["completed"], found["failed"], found["output_throughput"]) == (0, 1, 0.0)
    assert found["p99_itl_ms"] is None
    assert caveats(found) == []


def test_errors_are_grouped_with_a_few_different_examples() -> None:
    texts = ["one", "two", "one", "three", "four"]
    failures = [LoadFailed(text, group="timeout") for text in texts]

    assert errors([None, LoadFailed("full", group="HTTP 429"), *failures]) == [
        {"error": "timeout", "count": 5, "examples": ["one", "two", "three"]},
        {"error": "HTTP 429", "count": 1, "examples": ["full"]},
    ]


FINE = {
    "p99_dispatch_delay_ms": 1.0,
    "median_itl_ms": 10.0,
    "client_cpu_share": 0.1,
    "client_processes": 2,
    "tokens_per_event": 1.0,
    "tokens_counted_by": "server",
    "cached_input_tokens": 0,
    "total_input_tokens": 100,
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"p99_dispatch_delay_ms": 1.01}, "p99 of 1.01 ms is more than 10% of the median"),
        ({"client_cpu_share": 0.51}, "a client process took 0.51 of a core"),
        ({"client_cpu_share": 0.51}, "more than 2 with --processes"),
        ({"tokens_per_event": 2.5}, "sends 2.50 tokens an event"),
        ({"tokens_counted_by": "events"}, "tells no token counts"),
        ({"cached_input_tokens": 25}, "25.0% of the input tokens"),
    ],
)
def test_a_reader_is_warned_of_what_makes_figures_lie(change, reason) -> None:
    assert caveats(FINE) == []
    (line,) = caveats(FINE | change)
    assert reason in line


def test_gaps_belong_to_a_swap_that_they_overlap() -> None:
    one = answer(0.0, 1.0, 2.0, 4.0, 8.0, ended=8.0, tokens=4)

    assert split_gaps([one], [(2.0, 3.0)]) == ([2.0], [1.0, 4.0])
    assert split_gaps([one], [(3.5, 5.0), (6.0, 7.0)]) == ([2.0, 4.0], [1.0])
    assert split_gaps([one], []) == ([], [1.0, 2.0, 4.0])


def test_the_figures_of_swaps_leave_out_the_first_upload_and_the_swapped_adapter() -> None:
    churn = Churn(
        Server("h", "127.0.0.1", 1), DIALECTS["completions"], "x", repeat(None), 0.5, 1.0,
        tasks=("b",), num_bytes=16, swaps=[
            Swap("A", 0.0, 0.0, 0.0, "x@1", 0.0),
            Swap("B", 1.0, 1.0, 1.375, "x@2", 1.5),
            Swap("A", 3.0, 3.0, 3.25, "x@1", 3.25),
            Swap("B", 5.0, 5.0, failure=LoadFailed("no", group="upload 422")),
        ],
    )  # fmt: skip
    found = swaps(churn, outcome())

    assert (found["swaps"], found["completed"], found["failed"]) == (3, 2, 1)
    assert found["per_s"] == 0.5
    assert [found[f"{key}_upload_ms"] for key in ("mean", "p99")] == [312.5, 375.0]
    firsts = [found[f"{key}_upload_to_first_token_ms"] for key in ("p50", "p99")]
    assert firsts == [250.0, 500.0]
    assert found["mean_others_itl_ms"] == 375.0  # those of task a: 250 and 500
    assert found["p50_others_itl_during_uploads_ms"] == 250.0
    assert found["p50_others_itl_between_uploads_ms"] == 500.0
    assert found["errors"] == [{"error": "upload 422", "count": 1, "examples": ["no"]}]
