from __future__ import annotations

import pytest

from oneplusn.loadtest.drive import Record
from oneplusn.loadtest.slo import Bound, Slo, judge
from oneplusn.loadtest.stream import Answer, LoadFailed
from oneplusn.loadtest.workload import Planned

# Sent at 1 s; 500 ms to the first token, then 100 and 300 ms; 1.0 s in all.
ANSWER = Answer(sent=1.0, times=(1.5, 1.6, 1.9), tokens=3, ended=2.0)


def record(answer: Answer | None = None, failure: LoadFailed | None = None) -> Record:
    return Record(Planned(0, 0.0, "a", 1, 1), 0.0, 0.0, True, answer=answer, failure=failure)


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("ttft=500ms,itl=50ms,e2e=5s", {"ttft": 0.5, "itl": 0.05, "e2e": 5.0}),
        ("tpot=12.5ms", {"tpot": 0.0125}),
        ("e2e=2min, ttft=900us", {"e2e": 120.0, "ttft": 0.0009}),
    ],
)
def test_limits_are_read(text: str, limits: dict[str, float]) -> None:
    assert Slo.parse(text).limits == pytest.approx(limits)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "'' is no limit; give ttft, itl, tpot, e2e with a number in us, ms, s, min"),
        ("ttft", "'ttft' is no limit"),
        ("ttft=5", "'ttft=5' is no limit"),
        ("ttft=-5ms", "'ttft=-5ms' is no limit"),
        ("ttft=5h", "'ttft=5h' is no limit"),
        ("p99=5ms", "'p99=5ms' is no limit"),
        ("itl=5ms;e2e=1s", "is no limit"),
        ("itl=5ms,itl=6ms", "itl has two limits"),
    ],
)
def test_limits_that_are_none_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Slo.parse(text)


@pytest.mark.parametrize(
    ("text", "missed"),
    [
        ("ttft=500ms,itl=301ms,tpot=250ms,e2e=1s", []),
        ("ttft=499ms", ["ttft"]),
        ("itl=299ms", ["itl"]),  # the longest wait, though the mean is 200 ms
        ("tpot=249ms", ["tpot"]),
        ("ttft=1ms,e2e=999ms", ["ttft", "e2e"]),
    ],
)
def test_an_answer_misses_the_limits_that_it_exceeds(text: str, missed: list[str]) -> None:
    assert list(Slo.parse(text).missed(ANSWER)) == missed


def test_only_answers_within_every_limit_count_and_failures_are_misses() -> None:
    slow = Answer(sent=1.0, times=(2.0, 2.1), tokens=2, ended=2.1)
    refused = record(failure=LoadFailed("full", group="HTTP 429"))
    given_up = record()

    found = judge(
        Slo.parse("ttft=600ms"),
        [record(ANSWER), record(ANSWER), record(slow), refused, given_up],
        seconds=4.0,
    )

    assert found["met"] == 2
    assert found["share"] == 0.5  # of four; what was given up at the end counts for nothing
    assert found["requests_per_s"] == 0.5
    assert (found["missed"], found["without_answer"]) == ({"ttft": 1}, 1)
    assert judge(Slo.parse("ttft=1s"), [given_up], 1.0)["share"] is None


FOUND = {"share": 0.95, "requests_per_s": 4.0}


@pytest.mark.parametrize(
    ("text", "shown", "met"),
    [
        ("95%", "95%", True),
        ("95.1%", "95.1%", False),
        ("0.9", "90%", True),
        ("1", "100%", False),
        ("4/s", "4/s", True),
        ("4.1/s", "4.1/s", False),
    ],
)
def test_a_bound_is_a_share_or_a_rate(text: str, shown: str, met: bool) -> None:
    bound = Bound.parse(text)

    assert str(bound) == shown
    assert bound.is_met(FOUND) is met
    assert not bound.is_met({"share": None, "requests_per_s": 0.0})


@pytest.mark.parametrize("text", ["", "x", "101%", "1.5", "-1%", "5%/s", "/s", "nan"])
def test_a_bound_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no goodput; give a share as 95%"):
        Bound.parse(text)
