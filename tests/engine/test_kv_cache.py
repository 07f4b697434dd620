from __future__ import annotations

import pytest

from oneplusn.server.engine.kv_cache import BlockManager
from oneplusn.server.engine.sequence import Sequence
from oneplusn.server.messages import Sampling

BLOCK = 4


def sequence(name: str, prompt: list[int], **identity: str) -> Sequence:
    return Sequence(name, prompt, Sampling(max_tokens=100), **identity)


def compute(blocks: BlockManager, seq: Sequence) -> None:
    """Take blocks for a sequence and compute all its tokens."""
    assert blocks.allocate(seq)
    blocks.advance(seq, seq.num_pending)
    blocks.check_integrity()


def leave_behind(blocks: BlockManager, prompt: list[int], **identity: str) -> None:
    """Compute a prompt and finish, so that only its content stays."""
    seq = sequence("past", prompt, **identity)
    compute(blocks, seq)
    blocks.free(seq)
    blocks.check_integrity()


@pytest.mark.parametrize(("length", "num_blocks"), [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_a_sequence_gets_one_block_for_every_started_four_tokens(length, num_blocks):
    blocks = BlockManager(8, BLOCK)
    seq = sequence("r", list(range(length)))
    assert blocks.allocate(seq)
    assert len(set(seq.block_table)) == num_blocks
    assert blocks.num_free == 8 - num_blocks
    assert blocks.usage == num_blocks / 8


@pytest.mark.parametrize(
    ("prompt", "num_cached"),
    [
        pytest.param([1, 2, 3, 4, 5, 6, 7, 8, 9], 8, id="all but the last token"),
        pytest.param([1, 2, 3, 4, 5, 6, 7, 8], 4, id="never the whole prompt"),
        pytest.param([1, 2, 3, 4, 5, 6, 7], 4, id="full blocks only"),
        pytest.param([1, 2, 3, 4], 0, id="one full block is the whole prompt"),
        pytest.param([1, 2, 3, 4, 0, 6, 7, 8, 9], 4, id="up to the first difference"),
        pytest.param([0, 2, 3, 4, 5, 6, 7, 8, 9], 0, id="a block counts only behind its prefix"),
        pytest.param([5, 6, 7, 8, 9], 0, id="content in another place is other content"),
    ],
)
def test_what_a_new_prompt_finds_of_an_old_one(prompt, num_cached):
    blocks = BlockManager(8, BLOCK)
    leave_behind(blocks, [1, 2, 3, 4, 5, 6, 7, 8, 10])
    seq = sequence("new", prompt)
    assert blocks.allocate(seq)
    assert seq.num_computed == num_cached
    blocks.check_integrity()


@pytest.mark.parametrize(
    ("identity", "num_cached"),
    [
        ({"salt": "ann", "task_key": "sum"}, 4),
        ({"salt": "bob", "task_key": "sum"}, 0),
        ({"salt": "ann", "task_key": "sort"}, 0),
        ({"salt": "annsum", "task_key": ""}, 0),
        ({}, 0),
    ],
)
def test_prefixes_are_shared_within_one_tenant_and_task(identity, num_cached):
    blocks = BlockManager(8, BLOCK)
    leave_behind(blocks, [1, 2, 3, 4, 5], salt="ann", task_key="sum")
    seq = sequence("new", [1, 2, 3, 4, 6], **identity)
    assert blocks.allocate(seq)
    assert seq.num_computed == num_cached


def test_running_sequences_share_blocks_and_the_last_one_frees_them():
    blocks = BlockManager(8, BLOCK)
    first, second = sequence("first", [1, 2, 3, 4, 5]), sequence("second", [1, 2, 3, 4, 6])
    compute(blocks, first)
    compute(blocks, second)
    assert first.block_table[0] == second.block_table[0]
    assert first.block_table[1] != second.block_table[1]
    assert blocks.num_free == 5
    blocks.free(first)
    assert blocks.num_free == 6
    blocks.free(second)
    assert blocks.num_free == 8
    blocks.check_integrity()


def test_generated_tokens_become_reusable_as_well():
    blocks = BlockManager(8, BLOCK)
    seq = sequence("chat", [1, 2, 3])
    compute(blocks, seq)
    for token in (4, 5, 6, 7, 8):
        seq.output.append(token)
        assert blocks.extend(seq)
        blocks.advance(seq, 1)
    blocks.free(seq)
    follow_up = sequence("next turn", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    assert blocks.allocate(follow_up)
    assert follow_up.num_computed == 8


def test_only_computed_blocks_are_found():
    blocks = BlockManager(8, BLOCK)
    seq = sequence("half", [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert blocks.allocate(seq)
    blocks.advance(seq, 5)
    other = sequence("other", [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert blocks.allocate(other)
    assert other.num_computed == 4


def test_extend_takes_a_block_only_when_the_last_one_is_full():
    blocks = BlockManager(2, BLOCK)
    seq = sequence("r", [1, 2, 3])
    compute(blocks, seq)
    seq.output.append(4)
    assert blocks.extend(seq)
    assert len(seq.block_table) == 1
    seq.output.append(5)
    assert blocks.extend(seq)
    assert len(seq.block_table) == 2
    seq.output += [6, 7, 8, 9]
    assert not blocks.extend(seq)
    assert len(seq.block_table) == 2
    blocks.check_integrity()


@pytest.mark.parametrize(("spare", "fits"), [(0, True), (1, True), (2, False)])
def test_allocation_leaves_the_spare_blocks_free_or_changes_nothing(spare, fits):
    blocks = BlockManager(3, BLOCK)
    seq = sequence("r", [1, 2, 3, 4, 5])
    assert blocks.allocate(seq, spare=spare) is fits
    assert blocks.num_free == (1 if fits else 3)
    assert bool(seq.block_table) is fits
    blocks.check_integrity()


def test_idle_blocks_that_are_found_do_not_count_as_free():
    blocks = BlockManager(3, BLOCK)
    leave_behind(blocks, [1, 2, 3, 4, 5])
    assert blocks.num_free == 3
    assert not blocks.allocate(sequence("long", [1, 2, 3, 4, *range(9)]))
    seq = sequence("fits", [1, 2, 3, 4, *range(8)])
    assert blocks.allocate(seq)
    assert (seq.num_computed, blocks.num_free) == (4, 0)
    blocks.check_integrity()


def test_the_least_recently_used_content_goes_first_and_ends_before_beginnings():
    blocks = BlockManager(4, BLOCK)
    leave_behind(blocks, [1, 2, 3, 4, 5, 6, 7, 8])
    leave_behind(blocks, [11, 12, 13, 14])
    leave_behind(blocks, [1, 2, 3, 4, 9])  # uses the first block again
    intruder = sequence("intruder", list(range(90, 98)))
    assert blocks.allocate(intruder)
    blocks.free(intruder)
    found = {}
    for prompt in ([1, 2, 3, 4, 5, 6, 7, 8, 0], [11, 12, 13, 14, 0]):
        seq = sequence("probe", prompt)
        assert blocks.allocate(seq)
        found[prompt[0]] = seq.num_computed
        blocks.free(seq)
    assert found == {1: 4, 11: 4}
    blocks.check_integrity()


def test_of_two_equal_blocks_the_first_stays_published():
    blocks = BlockManager(8, BLOCK)
    first, second = sequence("first", [1, 2, 3, 4, 5]), sequence("second", [1, 2, 3, 4, 5])
    assert blocks.allocate(first)
    assert blocks.allocate(second)
    blocks.advance(first, 5)
    blocks.advance(second, 5)
    blocks.check_integrity()
    third = sequence("third", [1, 2, 3, 4, 5])
    assert blocks.allocate(third)
    assert third.block_table[0] == first.block_table[0] != second.block_table[0]


def test_check_integrity_notices_a_table_that_names_a_stranger():
    blocks = BlockManager(4, BLOCK)
    seq = sequence("r", [1, 2, 3])
    assert blocks.allocate(seq)
    seq.block_table[0] = 3 - seq.block_table[0]
    with pytest.raises(AssertionError):
        blocks.check_integrity()
