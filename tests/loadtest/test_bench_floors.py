from __future__ import annotations

from pathlib import Path

import pytest

from oneplusn.loadtest import bench_floors
from oneplusn.loadtest.bench_cases import CASES, Work
from oneplusn.loadtest.bench_floors import DECISIONS, EXCUSED, Verdict, unexcused, verdicts
from oneplusn.loadtest.bench_results import OtherSetting, Results, Share
from oneplusn.loadtest.fixtures import Fixtures

MACHINE = {"cpu": "Some CPU", "load_before": 0.1}


def setting(streams: int = 16) -> dict[str, object]:
    work = Work("small", streams, 64, 64, 2, 3, 2, Fixtures(Path("x"), streams))
    titles = {case: work.title(case) for case in CASES}
    return {"streams": streams, "prompt": 64, "output": 64, "titles": titles}


def measured(
    rates: dict[str, dict[str, float]], *, streams: int = 16, ttft: float = 500
) -> Results:
    results = Results(setting(streams), MACHINE)
    share = Share(results, "small")
    for system, cases in rates.items():
        for case, rate in cases.items():
            share.row(system, case, {"output_throughput": rate, "p99_ttft_ms": ttft})
    return results


def found(results: Results) -> dict[str, tuple[float | None, bool]]:
    return {verdict.name: (verdict.value, verdict.is_met) for verdict in verdicts(results)}


def test_each_case_stands_beside_the_best_peer_that_ran_it() -> None:
    results = measured(
        {
            "oneplusn": {"base": 600.0, "loras": 400.0},
            "oneplusn, no adapters": {"base": 900.0},
            "llama.cpp": {"base": 500.0, "loras": 80.0},
            "vLLM": {"base": 530.0, "loras": 40.0},
        }
    )

    rows = {verdict.name: verdict for verdict in verdicts(results)}
    base = rows["small: bare base, tokens/s over the best peer's"]
    loras = rows["small: 16 different LoRAs, tokens/s over the best peer's"]

    assert (base.against, base.value, base.is_met) == ("vLLM", pytest.approx(600 / 530), False)
    assert (loras.against, loras.value, loras.is_met) == ("llama.cpp", 5.0, True)


def test_a_floor_without_a_peer_is_shown_and_not_judged() -> None:
    rows = found(measured({"oneplusn": {"base": 600.0}, "PEFT": {"loras": 60.0}}))

    assert rows["small: bare base, tokens/s over the best peer's"] == (None, True)
    assert rows["small: 16 different LoRAs, tokens/s over the best peer's"] == (None, True)


def test_what_is_compared_with_ourselves() -> None:
    rows = found(
        measured(
            {
                "oneplusn": {"base": 90.0, "cgc": 80.0, "loras": 50.0},
                "oneplusn, no adapters": {"base": 100.0},
            },
            ttft=1200,
        )
    )

    assert rows["small: 16 tasks in 4 CGC clusters over bare base"] == (80 / 90, True)
    assert rows["small: bare base with adapters over without"] == (0.9, False)
    assert rows["small: 16 different LoRAs, TTFT p99"] == (1200, False)


def test_memory_and_start_of_our_server() -> None:
    results = measured({"oneplusn": {}})
    memory = {"weights": 300e6, "cache": 50e6, "adapters": 250e6, "pss": 0.0}
    share = Share(results, "small")
    share.server("oneplusn", {**memory, "rss": 1300e6, "first_token_s": 20.0})
    share.server("oneplusn, no adapters", {**memory, "rss": 1100e6, "first_token_s": 7.5})
    share.server("llama.cpp", {**memory, "rss": 9000e6, "first_token_s": 99.0})
    results.rows["small"] = {"oneplusn": {}}

    assert (
        found(results).items()
        >= {
            "small: oneplusn, RSS beyond weights, KV and adapters": (700.0, False),
            "small: oneplusn, no adapters, RSS beyond weights, KV and adapters": (500.0, True),
            "small: start to first token": (7.5, True),
        }.items()
    )


def test_other_work_than_the_floors_were_set_for_is_not_judged() -> None:
    results = measured({"oneplusn": {"base": 1.0}, "llama.cpp": {"base": 9.0}}, streams=4)

    assert all(verdict.floor is None for verdict in verdicts(results))
    assert unexcused(verdicts(results)) == []


def test_a_missed_floor_needs_a_record_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "0001-slow.md").write_text("Why `small: x` is slow.", encoding="utf-8")
    missed = [Verdict(name, 1.0, "x", 2.0) for name in ("small: x", "small: y", "small: z")]
    excused = {"small: x": "0001-slow.md", "small: y": "0001-slow.md", "small: z": "0002-no.md"}

    assert unexcused([Verdict("small: w", 3.0, "x", 2.0)], {}, tmp_path) == []
    assert unexcused([Verdict("small: w", 1.0, "x", 2.0)], {}, tmp_path) == [
        "small: w: no decision record says why"
    ]
    assert unexcused(missed, excused, tmp_path) == [
        "small: y: 0001-slow.md does not name it",
        f"small: z: there is no {tmp_path / '0002-no.md'}",
    ]


def test_every_excuse_is_in_its_record() -> None:
    named = [Verdict(name, 0.0, "x", 1.0) for name in EXCUSED]

    assert bench_floors.DECISIONS.is_dir()
    assert unexcused(named, EXCUSED, DECISIONS) == []


def test_results_go_on_where_a_file_ends(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    first = Results.kept(setting(), MACHINE, file)
    Share(first, "small").row("llama.cpp", "base", {"output_throughput": 5.0})
    first.miss("small", "vLLM", "no such program")

    again = Results.kept(setting(), {**MACHINE, "load_before": 3.0}, file)

    assert not again.lacks("small", "llama.cpp", "base")
    assert again.lacks("small", "llama.cpp", "loras")
    assert again.lacks("mid", "llama.cpp", "base")
    assert again.missing == {"small": {"vLLM": "no such program"}}
    assert again.rows["small"]["llama.cpp"]["base"]["output_throughput"] == 5.0


@pytest.mark.parametrize(
    ("other", "machine", "reason"),
    [
        (setting(streams=4), MACHINE, "measured with streams 16, not 4"),
        (setting(), {**MACHINE, "cpu": "Another"}, "measured with cpu 'Some CPU', not 'Another'"),
    ],
)
def test_results_of_other_work_or_machines_are_not_mixed(
    tmp_path: Path, other: dict[str, object], machine: dict[str, object], reason: str
) -> None:
    file = tmp_path / "figures.json"
    Results.kept(setting(), MACHINE, file).save()

    with pytest.raises(OtherSetting, match=reason):
        Results.kept(other, machine, file)
