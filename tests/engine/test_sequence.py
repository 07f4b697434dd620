from __future__ import annotations

import itertools

import pytest

from oneplusn.server.engine.sequence import MOVES, Sequence, Status
from oneplusn.server.messages import Sampling


def make(prompt: list[int], output: list[int], **sampling: object) -> Sequence:
    return Sequence("r", prompt, Sampling(max_tokens=8, **sampling), output=output)


@pytest.mark.parametrize(("start", "stop"), list(itertools.combinations(range(6), 2)))
def test_token_ids_cuts_prompt_and_output_as_one_list(start, stop):
    seq = make([1, 2, 3], [4, 5])
    assert seq.token_ids(start, stop) == [1, 2, 3, 4, 5][start:stop]


def test_counts_follow_the_lists():
    seq = make([1, 2, 3], [])
    assert (seq.num_prompt, seq.num_tokens, seq.last_token) == (3, 3, 3)
    seq.output.append(9)
    seq.num_computed = 3
    assert (seq.num_tokens, seq.last_token, seq.num_pending, seq.is_decoding) == (4, 9, 1, True)


@pytest.mark.parametrize(("old", "new"), list(itertools.product(Status, Status)))
def test_only_the_drawn_moves_are_allowed(old, new):
    seq = make([1], [])
    seq.status = old
    if new in MOVES[old]:
        seq.move_to(new)
        assert seq.status is new
    else:
        with pytest.raises(AssertionError):
            seq.move_to(new)


def test_a_given_seed_is_kept_and_a_missing_one_is_drawn_apart():
    assert make([1], [], seed=5).seed == 5
    assert make([1], []).seed != make([1], []).seed
