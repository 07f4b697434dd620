from __future__ import annotations

import pytest

from oneplusn.errors import ConfigError, PromptTooLong
from oneplusn.server.engine.kv_cache import BlockManager
from oneplusn.server.engine.scheduler import Schedule, Scheduler
from oneplusn.server.engine.sequence import Sequence, Status
from oneplusn.server.messages import Sampling

EOS = 2
BLOCK = 4


def scheduler(*, num_blocks: int = 100, num_seqs: int = 8, budget: int = 16, max_len: int = 1000):
    return Scheduler(
        BlockManager(num_blocks, BLOCK),
        max_num_seqs=num_seqs,
        token_budget=budget,
        max_model_len=max_len,
        eos_ids=(EOS, 3),
    )


def add(sched: Scheduler, name: str, length: int, **sampling: object) -> Sequence:
    sampling.setdefault("max_tokens", 100)
    # Prompts differ from the first token, so none begins with another's blocks.
    prompt = [ord(name[0]) * 1000 + index for index in range(length)]
    seq = Sequence(name, prompt, Sampling(**sampling))
    sched.add(seq)
    return seq


def rows(schedule: Schedule) -> list[tuple[str, int, int, bool]]:
    return [(item.seq.id, item.start, item.count, item.samples) for item in schedule.items]


def step(sched: Scheduler, token: int = 7) -> list[tuple[str, int, int, bool]]:
    """Run one step in which every sequence that samples gets `token`."""
    schedule = sched.schedule()
    assert schedule is not None
    sched.check_integrity()
    assert schedule.num_tokens == sum(item.count for item in schedule.items)
    sched.commit(schedule, [token] * len(schedule.sampled))
    sched.check_integrity()
    return rows(schedule)


def test_a_prompt_is_prefilled_then_decoded_token_by_token():
    sched = scheduler()
    add(sched, "a", 5, max_tokens=3)
    assert step(sched) == [("a", 0, 5, True)]
    assert step(sched) == [("a", 5, 1, True)]
    assert step(sched) == [("a", 6, 1, True)]
    assert sched.schedule() is None
    assert not sched.has_work
    assert sched.blocks.num_free == 100


def test_a_long_prompt_is_cut_into_chunks_of_the_budget():
    sched = scheduler(budget=16)
    add(sched, "a", 40)
    assert step(sched) == [("a", 0, 16, False)]
    assert step(sched) == [("a", 16, 16, False)]
    assert step(sched) == [("a", 32, 8, True)]
    assert step(sched) == [("a", 40, 1, True)]


def test_decode_rows_come_first_and_prompts_share_the_rest_of_the_budget_in_order():
    sched = scheduler(budget=16)
    for name, length in (("a", 3), ("b", 2), ("c", 20), ("d", 9)):
        add(sched, name, length)
    assert step(sched) == [("a", 0, 3, True), ("b", 0, 2, True), ("c", 0, 11, False)]
    assert step(sched) == [
        ("a", 3, 1, True),
        ("b", 2, 1, True),
        ("c", 11, 9, True),
        ("d", 0, 5, False),
    ]
    schedule = sched.schedule()
    assert rows(schedule) == [
        ("a", 4, 1, True),
        ("b", 3, 1, True),
        ("c", 20, 1, True),
        ("d", 5, 4, True),
    ]
    assert schedule.num_decodes == 3
    assert schedule.num_tokens == 7


def test_at_most_max_num_seqs_run_and_the_others_follow_by_arrival():
    sched = scheduler(num_seqs=2)
    for name in "abcd":
        add(sched, name, 2, max_tokens=2 if name == "b" else 4)
    assert [row[0] for row in step(sched)] == ["a", "b"]
    assert [row[0] for row in step(sched)] == ["a", "b"]
    assert step(sched) == [("a", 3, 1, True), ("c", 0, 2, True)]
    assert sched.num_waiting == 1


def test_a_prompt_that_does_not_fit_holds_back_those_behind_it():
    sched = scheduler(num_blocks=4)
    add(sched, "a", 8)
    add(sched, "b", 12)
    add(sched, "c", 1)
    assert step(sched) == [("a", 0, 8, True)]
    assert step(sched) == [("a", 8, 1, True)]
    assert [seq.id for seq in sched.waiting] == ["b", "c"]


def test_a_newcomer_leaves_each_running_sequence_a_block():
    sched = scheduler(num_blocks=4)
    add(sched, "a", 4)
    add(sched, "b", 4)
    add(sched, "c", 4)
    assert [row[0] for row in step(sched)] == ["a", "b"]
    assert step(sched) == [("a", 4, 1, True), ("b", 4, 1, True)]


def test_the_youngest_gives_its_blocks_back_and_comes_back_before_the_others():
    sched = scheduler(num_blocks=6)
    seqs = {name: add(sched, name, 4, max_tokens=9) for name in "abcd"}
    assert [row[0] for row in step(sched)] == ["a", "b", "c"]
    # d waits: three running sequences and its own block would need one more than there is.
    for _ in range(4):
        step(sched)
    schedule = sched.schedule()
    assert [seq.id for seq in schedule.preempted] == ["c"]
    assert rows(schedule) == [("a", 8, 1, True), ("b", 8, 1, True)]
    assert [seq.id for seq in sched.waiting] == ["c", "d"]
    assert seqs["c"].status is Status.WAITING
    assert (seqs["c"].num_computed, len(seqs["c"].block_table)) == (0, 0)
    assert len(seqs["c"].output) == 5
    sched.check_integrity()


def test_a_preempted_sequence_is_recomputed_less_what_the_cache_still_has():
    sched = scheduler(num_blocks=5)
    add(sched, "a", 4, max_tokens=6)
    b = add(sched, "b", 4, max_tokens=9)
    for _ in range(5):
        step(sched)
    assert step(sched) == [("a", 8, 1, True)]
    assert (b.status, b.num_preemptions, len(b.output)) == (Status.WAITING, 1, 5)
    assert step(sched) == [("b", 8, 1, True)]
    assert (b.num_cached, len(b.output)) == (0, 6)


def test_a_preempted_sequence_without_cached_blocks_is_recomputed_from_the_start():
    sched = scheduler(num_blocks=6)
    for name in "abc":
        add(sched, name, 4, max_tokens=6 if name == "a" else 9)
    for _ in range(5):
        step(sched)
    for position in range(8, 12):
        assert step(sched)[-1] == ("b", position, 1, True)
    assert step(sched) == [("c", 0, 9, True)]


def test_several_of_the_youngest_can_be_preempted_in_one_step():
    sched = scheduler(num_blocks=8, num_seqs=8)
    for name in "abcd":
        add(sched, name, 4, max_tokens=12)
    preempted = []
    for _ in range(9):
        schedule = sched.schedule()
        preempted += [seq.id for seq in schedule.preempted]
        sched.commit(schedule, [7] * len(schedule.sampled))
        sched.check_integrity()
    assert preempted == ["d", "c"]


def test_the_prefix_cache_serves_a_second_prompt_and_counts_its_tokens():
    sched = scheduler()
    for name in ("first", "second"):
        sched.add(Sequence(name, list(range(10)), Sampling(max_tokens=1)))
        schedule = sched.schedule()
        sched.commit(schedule, [7])
    assert rows(schedule) == [("second", 8, 2, True)]
    assert schedule.cached_tokens == 8
    assert schedule.items[0].seq.num_cached == 8


@pytest.mark.parametrize(
    ("sampling", "tokens", "reason"),
    [
        pytest.param({}, [7, EOS], "stop", id="eos"),
        pytest.param({}, [7, 3], "stop", id="another eos"),
        pytest.param({"max_tokens": 3}, [7, 7, 7], "length", id="max_tokens"),
        pytest.param({"max_tokens": 2}, [7, EOS], "stop", id="eos as the last token"),
        pytest.param({"stop_token_ids": (9,)}, [7, 9], "stop", id="stop token"),
        pytest.param({"ignore_eos": True, "max_tokens": 3}, [EOS, 3, 7], "length", id="ignored"),
        pytest.param(
            {"ignore_eos": True, "stop_token_ids": (EOS,)},
            [3, EOS],
            "stop",
            id="named all the same",
        ),
        pytest.param({"min_tokens": 2}, [EOS, EOS, EOS], "stop", id="eos before min_tokens"),
        pytest.param(
            {"min_tokens": 1, "stop_token_ids": (9,)}, [9, 9], "stop", id="stop before min_tokens"
        ),
        pytest.param({"max_tokens": 999}, [7] * 7, "length", id="max_model_len"),
    ],
)
def test_a_sequence_ends_with_the_right_token_and_reason(sampling, tokens, reason):
    sched = scheduler(max_len=12)
    seq = add(sched, "a", 5, **sampling)
    for index, token in enumerate(tokens):
        assert seq.finish is None, f"ended before token {index}"
        finished = sched.commit(sched.schedule(), [token])
    assert finished == [seq]
    assert (seq.finish, seq.output, seq.status) == (reason, tokens, Status.FINISHED)
    assert not sched.has_work
    assert sched.blocks.num_free == 100
    sched.check_integrity()


@pytest.mark.parametrize(
    ("num_blocks", "max_len", "length"), [(100, 12, 12), (100, 12, 40), (3, 1000, 12)]
)
def test_a_prompt_without_room_for_an_answer_is_refused(num_blocks, max_len, length):
    sched = scheduler(num_blocks=num_blocks, max_len=max_len)
    with pytest.raises(PromptTooLong, match=f"has {length} tokens .* holds 12 .* to 11"):
        add(sched, "a", length)
    assert not sched.has_work
    sched.check_integrity()


def test_a_sequence_alone_fills_the_cache_and_ends_there():
    sched = scheduler(num_blocks=3)
    seq = add(sched, "a", 5, max_tokens=999)
    while sched.has_work:
        step(sched)
    assert (seq.num_tokens, seq.finish, seq.num_preemptions) == (12, "length", 0)


def test_a_budget_below_one_row_a_sequence_is_refused():
    with pytest.raises(ConfigError, match="budget 4 is too small"):
        scheduler(num_seqs=8, budget=4)


def test_an_adapter_that_is_late_holds_back_nobody_and_costs_no_place():
    sched = scheduler(num_seqs=2)
    late = Sequence(
        "late", [1, 2, 3], Sampling(max_tokens=9), slot=None, status=Status.WAITING_ADAPTER
    )
    sched.add(late)
    assert not sched.has_work
    for name in "abc":
        add(sched, name, 2, max_tokens=1 if name == "a" else 9)
    assert [row[0] for row in step(sched)] == ["a", "b"]
    late.slot, late.task_key = 4, "k"
    sched.adapter_ready(late)
    assert late.status is Status.WAITING
    assert step(sched) == [("b", 2, 1, True), ("late", 0, 3, True)]
    assert [seq.id for seq in sched.running] == ["late", "b"]
    assert [seq.id for seq in sched.waiting] == ["c"]


def abort_waiting_adapter(sched: Scheduler) -> None:
    seq = Sequence("x", [1], Sampling(max_tokens=9), slot=None, status=Status.WAITING_ADAPTER)
    sched.add(seq)


def abort_waiting(sched: Scheduler) -> None:
    add(sched, "x", 5)


def abort_prefilling(sched: Scheduler) -> None:
    add(sched, "x", 40)
    step(sched)


def abort_decoding(sched: Scheduler) -> None:
    add(sched, "x", 5)
    step(sched)


def abort_preempted(sched: Scheduler) -> None:
    add(sched, "x", 5)
    step(sched)
    sched._preempt_youngest()


@pytest.mark.parametrize(
    "prepare",
    [abort_waiting_adapter, abort_waiting, abort_prefilling, abort_decoding, abort_preempted],
)
def test_abort_frees_everything_in_any_state(prepare):
    sched = scheduler()
    prepare(sched)
    seq = sched.abort("x")
    assert (seq.id, seq.finish, seq.status) == ("x", "abort", Status.FINISHED)
    assert sched.blocks.num_free == 100
    assert sched.num_waiting == 0
    assert sched.schedule() is None
    assert sched.abort("x") is None
    sched.check_integrity()


def test_an_abort_between_schedule_and_commit_drops_the_token():
    sched = scheduler()
    gone, stays = add(sched, "a", 5), add(sched, "b", 5)
    schedule = sched.schedule()
    sched.abort("a")
    assert sched.commit(schedule, [11, 12]) == []
    assert (gone.output, stays.output) == ([], [12])
    sched.check_integrity()


def test_commit_wants_one_token_for_each_that_samples():
    sched = scheduler()
    add(sched, "a", 5)
    with pytest.raises(AssertionError):
        sched.commit(sched.schedule(), [1, 2])
