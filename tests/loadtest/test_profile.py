from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from oneplusn.adapters.files import read_adapter
from oneplusn.adapters.refs import TaskRef
from oneplusn.loadtest.fixtures import Fixtures
from oneplusn.server.engine.engine import Engine
from oneplusn.server.engine.model import load_model
from oneplusn.server.tools import profile as tool
from oneplusn.server.tools.profile import PARTS, Profile, Stopwatch, profile, render, timing


def test_a_call_within_a_call_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    #         outer begins, inner 1.0 to 3.0, outer ends
    clock = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(tool.time, "perf_counter", lambda: next(clock))
    watch = Stopwatch()
    inner = watch.timed("inner", lambda: "result")
    outer = watch.timed("outer", lambda: inner())

    assert outer() == "result"
    assert watch.seconds == {"inner": 2.0, "outer": 5.0}


def test_what_was_wrapped_is_put_back_after_an_error() -> None:
    def work() -> None:
        raise ValueError("x")

    owner = SimpleNamespace(work=work)

    def run() -> None:
        with timing([(owner, "work", "part")]):
            assert owner.work is not work
            owner.work()

    with pytest.raises(ValueError, match="x"):
        run()

    assert owner.work is work


@pytest.fixture
def engine(fixtures: Fixtures) -> Iterator[Engine]:
    engine = Engine(load_model(str(fixtures.base), threads=1))
    yield engine
    engine.close()


def load(engine: Engine, folder: Path) -> list[TaskRef]:
    bundle = read_adapter(folder, name=folder.name)
    engine.load(bundle)
    return [TaskRef(bundle.digest, task) for task in bundle.tasks]


def test_every_part_of_a_step_is_timed_and_nothing_stays_behind(
    engine: Engine, fixtures: Fixtures
) -> None:
    before = [getattr(owner, name) for owner, name, _ in PARTS]
    refs = load(engine, fixtures.clusters["cgc-0"])

    adapted = profile(engine, refs, rows=5, prompt=200, steps=2)
    bare = profile(engine, [], rows=5, prompt=200, steps=2)

    assert (adapted.rows, adapted.tasks, adapted.steps) == (5, 4, 2)
    assert list(adapted.ms_per_step) == [
        *("GEMM", "attention", "delta", "norms, rotation", "sampler", "rest")
    ]
    assert min(adapted.ms_per_step.values()) > 0
    assert bare.ms_per_step["delta"] == 0
    assert not engine.has_work
    assert [getattr(owner, name) for owner, name, _ in PARTS] == before


def test_shares_are_shown_of_the_whole_step() -> None:
    found = Profile(rows=16, tasks=4, steps=8, ms_per_step={"GEMM": 15.0, "rest": 5.0})

    assert render(found).splitlines() == [
        "16 rows, 4 tasks, mean of 8 decode steps",
        "GEMM          15.00 ms   75.0%",
        "rest           5.00 ms   25.0%",
        "step          20.00 ms",
    ]


def test_a_case_of_an_adapter_that_was_not_given_is_refused(
    fixtures: Fixtures, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["profile", "--model", str(fixtures.base), "--case", "lora-00"]
    monkeypatch.setattr(tool.sys, "argv", arguments)

    assert tool.main() == 1
    assert "--case names lora-00; give --adapter NAME=PATH" in capsys.readouterr().err
