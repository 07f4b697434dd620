from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, pairwise

import pytest

from oneplusn.loadtest.prompts import Line
from oneplusn.loadtest.workload import Length, Popularity, Workload

TASKS = ("a", "b", "c", "d")


def workload(**changes: object) -> Workload:
    made = Workload(
        tasks=TASKS,
        popularity=Popularity.parse("uniform"),
        input_tokens=Length.parse("uniform:10-20"),
        output_tokens=Length.parse("8"),
        rate=50.0,
        seed=1,
    )
    return replace(made, **changes)


def distance_from_exponential(gaps: Sequence[float], rate: float) -> float:
    """The statistic of Kolmogorov and Smirnov: the largest distance between the distributions."""
    ordered, count = sorted(gaps), len(gaps)
    expected = [1 - math.exp(-rate * gap) for gap in ordered]
    above = max((i + 1) / count - share for i, share in enumerate(expected))
    below = max(share - i / count for i, share in enumerate(expected))
    return max(above, below)


@pytest.mark.parametrize("seed", range(5))
def test_arrivals_are_a_poisson_process(seed: int) -> None:
    rate, seconds = 50.0, 80
    times = [p.at for p in workload(seed=seed).schedule(duration=seconds, requests=None)]
    gaps = [later - earlier for earlier, later in pairwise([0.0, *times])]
    critical = 1.63 / math.sqrt(len(gaps))  # 1 % of Poisson processes exceed it

    assert distance_from_exponential(gaps, rate) < critical
    assert distance_from_exponential([1 / rate] * len(gaps), rate) > critical
    counts = Counter(int(when) for when in times)
    mean = sum(counts.values()) / seconds
    variance = sum((counts[second] - mean) ** 2 for second in range(seconds)) / seconds
    assert mean == pytest.approx(rate, rel=3 / math.sqrt(rate * seconds))
    # As many as the variance: three standard deviations of the index of dispersion.
    assert variance / mean == pytest.approx(1.0, abs=3 * math.sqrt(2 / seconds))
    # No memory: a gap says nothing about the next.
    first, second = gaps[:-1], gaps[1:]
    product = sum((x - 1 / rate) * (y - 1 / rate) for x, y in zip(first, second, strict=True))
    assert abs(product / len(first) * rate**2) < 3 / math.sqrt(len(first))


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0, 400.0])
def test_burstiness_is_the_spread_of_gaps_and_leaves_the_rate(burstiness: float) -> None:
    made = workload(burstiness=burstiness)
    times = [p.at for p in made.schedule(duration=None, requests=8000)]
    gaps = [later - earlier for earlier, later in pairwise([0.0, *times])]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))

    assert mean == pytest.approx(1 / 50.0, rel=4 / math.sqrt(8000 * burstiness))
    assert deviation / mean == pytest.approx(burstiness**-0.5, rel=0.1)


@pytest.mark.parametrize(("rate", "ramp_to"), [(10.0, 110.0), (110.0, 10.0)])
def test_a_ramp_changes_the_rate_evenly_after_the_warm_up(rate: float, ramp_to: float) -> None:
    made = workload(rate=rate, ramp_to=ramp_to, burstiness=400.0)
    times = [p.at for p in made.schedule(duration=20.0, requests=None, warmup=5.0)]

    def count(start: float, end: float) -> int:
        return sum(start <= when < end for when in times)

    middle, slope = (rate + ramp_to) / 2, (ramp_to - rate) / 20.0
    assert count(0.0, 5.0) == pytest.approx(rate * 5, abs=3)
    assert count(5.0, 25.0) == pytest.approx(middle * 20, abs=5)
    assert count(9.0, 11.0) == pytest.approx(2 * (rate + slope * 5), abs=3)
    assert count(19.0, 21.0) == pytest.approx(2 * (rate + slope * 15), abs=3)


def test_a_ramp_that_falls_to_nothing_ends() -> None:
    made = workload(rate=10.0, ramp_to=1e-9)

    times = [p.at for p in made.schedule(duration=4.0, requests=None)]

    assert len(times) == pytest.approx(20, abs=14)
    assert max(times) < 4.0


def test_the_seed_fixes_the_schedule() -> None:
    schedule = workload().schedule(duration=2.0, requests=None)

    assert schedule == workload().schedule(duration=2.0, requests=None)
    assert schedule != workload(seed=2).schedule(duration=2.0, requests=None)
    assert all(earlier.at < later.at < 2.0 for earlier, later in pairwise(schedule))


def test_what_is_drawn_does_not_depend_on_other_choices() -> None:
    plain = workload().schedule(duration=1.0, requests=None)
    other = workload(
        popularity=Popularity.parse("identical"), output_tokens=Length.parse("uniform:1-99")
    ).schedule(duration=1.0, requests=None)

    assert [p.at for p in plain] == [p.at for p in other]
    assert {p.task for p in other} == {"a"}
    assert {p.task for p in plain} == set(TASKS)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"duration": None, "requests": 7}, 7),
        ({"duration": 1000.0, "requests": 7}, 7),
        ({"duration": 0.001, "requests": 7}, 0),
    ],
)
def test_a_schedule_ends_with_whichever_limit_comes_first(limits, expected) -> None:
    assert len(workload().schedule(**limits)) == expected


def test_a_warm_up_comes_before_what_is_counted() -> None:
    schedule = workload().schedule(duration=None, requests=20, warmup=1.0)
    longer = workload().schedule(duration=2.0, requests=None, warmup=1.0)

    assert sum(planned.at >= 1.0 for planned in schedule) == 20
    assert sum(planned.at < 1.0 for planned in schedule) > 20
    assert max(planned.at for planned in longer) == pytest.approx(3.0, abs=0.2)


def shares(popularity: str, tasks: Sequence[str] = TASKS, count: int = 20_000) -> list[float]:
    draws = Popularity.parse(popularity).draws(tasks, random.Random(0))
    counts = Counter(islice(draws, count))
    return [counts[task] / count for task in tasks]


@pytest.mark.parametrize(
    ("popularity", "expected"),
    [
        ("identical", [1.0, 0.0, 0.0, 0.0]),
        ("distinct", [0.25, 0.25, 0.25, 0.25]),
        ("uniform", [0.25, 0.25, 0.25, 0.25]),
        ("zipf:0", [0.25, 0.25, 0.25, 0.25]),
        ("zipf:1", [12 / 25, 6 / 25, 4 / 25, 3 / 25]),
        ("zipf:2", [144 / 205, 36 / 205, 16 / 205, 9 / 205]),
    ],
)
def test_how_often_tasks_are_asked(popularity, expected) -> None:
    assert shares(popularity) == pytest.approx(expected, abs=0.011)  # three deviations of 20,000


def test_distinct_never_asks_a_task_again_before_all_others() -> None:
    draws = list(islice(Popularity.parse("distinct").draws(TASKS, random.Random(0)), 12))

    assert draws == [*TASKS] * 3


@pytest.mark.parametrize("text", ["zipf", "zipf:", "zipf:-1", "zipf:x", "even", "uniform:2", ""])
def test_a_popularity_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no popularity; give one of identical, uniform"):
        Popularity.parse(text)


@pytest.mark.parametrize(
    ("text", "low", "high", "median"),
    [
        ("64", 64, 64, 64),
        ("uniform:10-30", 10, 30, 20),
        ("normal:100,30,180", 1, 180, 100),
        ("lognormal:100,0.8,512", 1, 512, 100),
    ],
)
def test_lengths_are_drawn_within_their_bounds(text, low, high, median) -> None:
    length, rng = Length.parse(text), random.Random(0)
    drawn = sorted(length.draw(rng) for _ in range(4000))

    assert (drawn[0] >= low, drawn[-1] <= high) == (True, True)
    assert drawn[2000] == pytest.approx(median, rel=0.08)
    assert str(length) == text


def test_a_lognormal_has_the_spread_that_it_names() -> None:
    length, rng = Length.parse("lognormal:10000,0.5,10000000"), random.Random(0)
    logs = [math.log(length.draw(rng)) for _ in range(4000)]
    mean = sum(logs) / len(logs)

    deviation = math.sqrt(sum((value - mean) ** 2 for value in logs) / len(logs))
    assert deviation == pytest.approx(0.5, rel=0.05)


def test_a_normal_has_the_spread_that_it_names() -> None:
    length, rng = Length.parse("normal:1000,100,2000"), random.Random(0)
    drawn = [length.draw(rng) for _ in range(4000)]
    mean = sum(drawn) / len(drawn)

    deviation = math.sqrt(sum((value - mean) ** 2 for value in drawn) / len(drawn))
    assert mean == pytest.approx(1000, rel=0.01)
    assert deviation == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize(
    "text",
    ["", "0", "-3", "x", "uniform:5", "uniform:9-3", "lognormal:5,1", "normal:3", "1.5",
     "normal:9,1,3", "normal:9,nan,30", "lognormal:9,inf,30", "gamma:1,2,3"],
)  # fmt: skip
def test_a_length_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="length"):
        Length.parse(text)


def test_lines_of_a_file_bring_text_and_may_bring_more() -> None:
    lines = (Line("x"), Line("y", task="z", output_tokens=3))
    planned = list(islice(workload(lines=lines, rate=None).requests(), 4))

    assert {p.prompt for p in planned[:2]} == {"x", "y"}
    assert [p.prompt for p in planned[:2]] == [p.prompt for p in planned[2:]]
    assert {(p.task in TASKS, p.output_tokens) for p in planned if p.prompt == "x"} == {(True, 8)}
    assert {(p.task, p.output_tokens) for p in planned if p.prompt == "y"} == {("z", 3)}


def test_a_trace_brings_lengths_and_the_seed_their_order() -> None:
    trace = tuple(Line(input_tokens=size, output_tokens=2 * size) for size in range(1, 31))
    made = workload(lines=trace, rate=None)
    planned = list(islice(made.requests(), 60))

    assert {(p.input_tokens, p.output_tokens) for p in planned[:30]} == {
        (size, 2 * size) for size in range(1, 31)
    }
    assert [p.input_tokens for p in planned[:30]] == [p.input_tokens for p in planned[30:]]
    assert planned == list(islice(made.requests(), 60))
    other = list(islice(replace(made, seed=2).requests(), 30))
    assert [p.input_tokens for p in other] != [p.input_tokens for p in planned[:30]]
    assert {p.prompt for p in planned} == {None}
