"""When requests end by the clock, and what is told of their wait."""

from __future__ import annotations

import pytest

from driven_engines import (
    LONG,
    A,
    B,
    Clock,
    ask,
    begin,
    driven,
)
from oneplusn.server.messages import TokenOutput

pytestmark = pytest.mark.usefixtures("small_pieces")


def test_a_deadline_ends_a_request_wherever_it_is() -> None:
    clock = Clock()
    run = driven(resident=[A], max_num_seqs=1, clock=clock)
    begin(run, B)
    ask(run, "running", A, timeout=2.0, max_tokens=50)
    ask(run, "waiting", timeout=1.0)
    ask(run, "late", A, B, timeout=1.5)
    ask(run, "patient", timeout=60.0)
    ask(run, "forever", max_tokens=2)
    ends = {}
    for _ in range(6):
        run.turn(write=False)
        for name, outputs in run.outputs.items():
            if outputs[-1].finish is not None:
                ends.setdefault(name, clock.now - 100)
        clock.now += 0.5
    assert ends == {"waiting": 1.0, "late": 1.5, "running": 2.0}
    assert {run.finish_of(name) for name in ends} == {"timeout"}
    assert len(run.tokens("running")) == 5
    run.finish()
    assert run.finish_of("patient") == run.finish_of("forever") == "length"
    stats = run.engine.stats
    assert stats.kv_blocks_free == stats.kv_blocks
    for bundle in (A, B):
        run.engine.unload(bundle.digest)
    assert run.engine.stats.resident == []


def test_a_deadline_passes_while_there_is_nothing_but_a_load() -> None:
    clock = Clock()
    run = driven(clock=clock)
    begin(run, LONG)
    ask(run, "x", LONG, timeout=1.0)
    run.turn()
    assert not run.engine.has_work
    clock.now += 1.0
    step = run.turn()
    assert step.outputs == [TokenOutput("x", finish="timeout")]


def test_a_deadline_that_is_met_leaves_no_trace() -> None:
    clock = Clock()
    run = driven(clock=clock)
    ask(run, "x", timeout=5.0, max_tokens=2)
    run.finish()
    clock.now += 10.0
    ask(run, "x", max_tokens=2)
    run.finish()
    assert [output.finish for output in run.outputs["x"]] == [None, "length"] * 2


def test_the_first_token_tells_how_long_its_request_waited() -> None:
    clock = Clock()
    run = driven(max_num_seqs=1, clock=clock)
    ask(run, "first", max_tokens=2)
    ask(run, "second", max_tokens=2)
    while run.engine.has_work:
        run.turn()
        clock.now += 0.25
    assert [output.queued_s for output in run.outputs["first"]] == [0.0, None]
    assert [output.queued_s for output in run.outputs["second"]] == [0.5, None]
