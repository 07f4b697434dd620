"""Answers to one prompt share its blocks, though they are asked for at the same time."""

from __future__ import annotations

import pytest

from oneplusn.adapters.refs import TaskRef
from oneplusn.server.engine.kv_cache import BlockManager
from oneplusn.server.engine.scheduler import Scheduler
from oneplusn.server.engine.sequence import Sequence, Status
from oneplusn.server.messages import Sampling

BLOCK = 4
SAME = list(range(100, 110))
Rows = list[tuple[str, int, int]]


def scheduler(
    *, num_blocks: int = 100, num_seqs: int = 8, budget: int = 32, max_adapters: int | None = None
) -> Scheduler:
    return Scheduler(
        BlockManager(num_blocks, BLOCK),
        max_num_seqs=num_seqs,
        token_budget=budget,
        max_model_len=1000,
        max_adapters=max_adapters,
    )


def add(sched: Scheduler, name: str, prompt: list[int] = SAME, **fields: object) -> Sequence:
    sampling = Sampling(max_tokens=fields.pop("max_tokens", 100))
    seq = Sequence(name, prompt, sampling, **fields)
    sched.add(seq)
    return seq


def own(name: str, length: int) -> list[int]:
    """A prompt that begins like no other."""
    return [ord(name) * 1000 + index for index in range(length)]


def step(sched: Scheduler) -> Rows:
    schedule = sched.schedule()
    assert schedule is not None
    sched.check_integrity()
    sched.commit(schedule, [7] * len(schedule.sampled))
    sched.check_integrity()
    return [(item.seq.id, item.start, item.count) for item in schedule.items]


def test_the_first_computes_the_prompt_and_the_others_start_on_its_blocks() -> None:
    sched = scheduler()
    seqs = [add(sched, name) for name in "abcd"]
    assert step(sched) == [("a", 0, 10)]
    assert step(sched) == [("a", 10, 1), ("b", 8, 2), ("c", 8, 2), ("d", 8, 2)]
    assert [seq.num_cached for seq in seqs] == [0, 8, 8, 8]
    assert len({tuple(seq.block_table[:2]) for seq in seqs}) == 1


def test_a_prompt_in_chunks_is_computed_once() -> None:
    sched = scheduler(budget=8)
    prompt = own("a", 21)
    add(sched, "a", prompt)
    add(sched, "b", [*prompt])
    assert step(sched) == [("a", 0, 8)]
    assert step(sched) == [("a", 8, 8)]
    assert step(sched) == [("a", 16, 5)]
    assert step(sched) == [("a", 21, 1), ("b", 20, 1)]


def test_it_is_held_only_while_that_saves_a_block() -> None:
    sched = scheduler(budget=12)
    long = own("a", 30)
    add(sched, "a", long)
    add(sched, "b", [*long[:9], *own("b", 2)])
    assert step(sched) == [("a", 0, 12)]
    assert step(sched) == [("a", 12, 12)]
    # b would have had no rows before: a comes first, and takes all there are.
    assert step(sched) == [("a", 24, 6), ("b", 8, 3)]


@pytest.mark.parametrize(
    ("other", "fields"),
    [
        pytest.param([1, *SAME], {}, id="another beginning"),
        pytest.param(SAME, {"salt": "x"}, id="another tenant"),
        pytest.param(SAME, {"task_key": "t", "slot": 1}, id="another task"),
        pytest.param(SAME[:3], {}, id="less than a block"),
        pytest.param(SAME[:4], {}, id="a block that is needed for the logits"),
    ],
)
def test_what_shares_no_block_is_not_held(other: list[int], fields: dict[str, object]) -> None:
    sched = scheduler()
    add(sched, "a")
    add(sched, "b", list(other), **fields)
    assert [name for name, *_ in step(sched)] == ["a", "b"]


def test_those_behind_pass_and_come_after_it_all_the_same() -> None:
    sched = scheduler(budget=16)
    for name in "ab":
        add(sched, name)
    add(sched, "c", own("c", 40))
    assert step(sched) == [("a", 0, 10), ("c", 0, 6)]
    assert step(sched) == [("a", 10, 1), ("b", 8, 2), ("c", 6, 13)]


def test_those_that_pass_leave_it_a_place() -> None:
    sched = scheduler(num_seqs=3)
    for name in "ab":
        add(sched, name)
    for name in "cd":
        add(sched, name, own(name, 5))
    assert [name for name, *_ in step(sched)] == ["a", "c"]
    assert [name for name, *_ in step(sched)] == ["a", "c", "b"]


def test_those_that_pass_leave_it_its_blocks() -> None:
    # 3 for a, 3 at most for b and a spare one for a: 3 are left, and c wants 4.
    sched = scheduler(num_blocks=10)
    for name in "ab":
        add(sched, name)
    add(sched, "c", own("c", 13))
    assert step(sched) == [("a", 0, 10)]
    assert step(sched) == [("a", 10, 1), ("b", 8, 2), ("c", 0, 13)]


@pytest.mark.parametrize("how", ["abort", "preempt"])
def test_when_the_first_is_gone_the_next_computes_the_prompt(how: str) -> None:
    sched = scheduler(budget=8)
    for name in "abc":
        add(sched, name)
    assert step(sched) == [("a", 0, 8)]
    if how == "abort":
        sched.abort("a")
        assert step(sched) == [("b", 8, 2), ("c", 8, 2)]
    else:
        sched._preempt_youngest()
        assert step(sched)[0] == ("a", 8, 2)


def test_an_abort_before_the_first_chunk_leaves_nobody_waiting() -> None:
    sched = scheduler()
    for name in "abc":
        add(sched, name)
    schedule = sched.schedule()
    sched.abort("a")
    sched.commit(schedule, [7])
    assert step(sched) == [("b", 0, 10)]
    assert step(sched) == [("b", 10, 1), ("c", 8, 2)]


def test_an_older_one_that_came_late_waits_for_a_younger_one_at_work() -> None:
    sched = scheduler(budget=8)
    young = own("y", 20)
    old = add(sched, "old", [*young], slot=None, status=Status.WAITING_ADAPTER)
    add(sched, "young", young)
    step(sched)
    old.slot = 0
    sched.adapter_ready(old)
    assert step(sched) == [("young", 8, 8)]
    assert step(sched) == [("old", 16, 4), ("young", 16, 4)]


def using(*digests: str) -> dict[str, object]:
    return {"slot": 1, "refs": tuple(TaskRef(digest, "t") for digest in digests)}


def test_a_step_has_no_more_adapters_than_it_may() -> None:
    sched = scheduler(max_adapters=2)
    for name, digests in (("a", "x"), ("b", "y"), ("c", "x"), ("d", "z"), ("e", "y"), ("f", "")):
        add(sched, name, own(name, 3), max_tokens=3 if name == "b" else 5, **using(*digests))
    assert [name for name, *_ in step(sched)] == ["a", "b", "c"]
    step(sched)
    assert [name for name, *_ in step(sched)] == ["a", "b", "c"]
    # y is gone with b, so z may come; e waits for its turn, and f behind it.
    assert [name for name, *_ in step(sched)] == ["a", "c", "d"]


def test_a_blend_of_more_adapters_than_a_step_may_have_runs_alone() -> None:
    sched = scheduler(max_adapters=1)
    add(sched, "a", own("a", 3), max_tokens=1, **using("x", "y"))
    add(sched, "b", own("b", 3), max_tokens=1, **using("x"))
    assert step(sched) == [("a", 0, 3)]
    assert step(sched) == [("b", 0, 3)]
