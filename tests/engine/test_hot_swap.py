"""Adapters come while requests run: nobody waits for another's, nobody gets a mixture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from driven_engines import (
    LONG,
    MODEL,
    PROMPT,
    A,
    B,
    C,
    ask,
    begin,
    driven,
    image_of,
    lora,
    solo,
)
from oneplusn.errors import AdapterNotFound, InvalidRequest, PromptTooLong
from oneplusn.server.messages import Freed, Loaded
from tiny_engines import Job, alone, cluster, clusters, mixed_jobs, tiny_engine

LENGTH = 70


pytestmark = pytest.mark.usefixtures("small_pieces")


def test_a_swap_under_eight_sequences_changes_no_token_of_any() -> None:
    old, other, single = clusters(MODEL)
    new = cluster(MODEL, old.tasks, common=(3, 2), seed=9)
    jobs = [replace(job, max_tokens=LENGTH) for job in mixed_jobs([old, other, single])][:8]
    fresh = [Job(PROMPT, ((new, task),), LENGTH) for task in old.tasks]
    expected = [a.decided for a in alone(tiny_engine("llama", [old, other, single, new]), jobs)]
    expected += [a.decided for a in alone(tiny_engine("llama", [new]), fresh)]

    run = driven(40, [old, other, single])
    for index, job in enumerate(jobs):
        run.engine.submit(job.submit(f"{index}"))
    run.turns(4)
    begin(run, new)
    for index, job in enumerate(fresh, len(jobs)):
        run.engine.submit(job.submit(f"{index}"))
    writing = 0
    while run.engine.is_writing:
        step = run.turn()
        writing += 1
        assert step.stats.num_decode_rows == len(jobs), "those that wait hold back nobody"
    run.engine.unload(old.digest)
    run.finish()

    assert writing > 30
    for index, tokens in enumerate(expected):
        assert run.tokens(str(index))[: len(tokens)] == tokens
        assert len(run.tokens(str(index))) == LENGTH
    assert sum(map(len, expected)) > 0.7 * LENGTH * len(expected)
    assert run.tokens("1") != run.tokens(str(len(jobs)))
    size = image_of(old, run.engine).num_bytes
    assert run.events == [
        Loaded(new.digest, image_of(new, run.engine).num_bytes),
        Freed(old.digest, size),
    ]
    users = [f"{i} length" for i, job in enumerate(jobs) if job.parts and job.parts[0][0] is old]
    assert len(users) == 4
    assert run.order.index("Freed") > max(map(run.order.index, users))


def test_a_request_waits_for_its_adapter_and_overtakes_nobody_afterwards() -> None:
    run = driven(max_num_seqs=2)
    begin(run, A)
    ask(run, "late", A)
    ask(run, "base", max_tokens=40)
    ask(run, "next", max_tokens=2, tokens=[9, 8, 7])
    ask(run, "last", max_tokens=2, tokens=[9, 8, 6])
    run.turn()
    assert run.tokens("late") == []
    assert len(run.tokens("base")) == len(run.tokens("next")) == 1
    while run.engine.is_writing:
        run.engine.write_some(0.0)
    run.turns(2)
    assert len(run.tokens("late")) == 1, "it comes before those that arrived after it"
    assert run.tokens("last") == []
    run.finish()
    assert run.tokens("late") == solo(A)


def test_with_nothing_else_to_do_it_is_written_in_one_go() -> None:
    run = driven()
    begin(run, LONG)
    run.engine.write_some(60.0)
    assert not run.engine.is_writing
    assert run.engine.poll() == [Loaded(LONG.digest, image_of(LONG, run.engine).num_bytes)]


def test_loads_are_written_in_the_order_in_which_they_were_asked_for() -> None:
    run = driven()
    for bundle in (B, LONG, A):
        begin(run, bundle)
    begin(run, LONG)
    run.finish()
    assert [event.digest for event in run.events] == [B.digest, LONG.digest, A.digest]


def test_a_blend_waits_for_all_its_parts_and_keeps_those_that_are_here() -> None:
    expected = solo(A, B)
    run = driven(2, [A, C])
    begin(run, B)
    ask(run, "x", A, B)
    run.finish()
    assert run.tokens("x") == expected
    assert [type(event) for event in run.events] == [Freed, Loaded]
    assert run.events[0].digest == C.digest


def test_a_reloaded_version_answers_as_before() -> None:
    run = driven(resident=[A])
    ask(run, "before", A)
    run.finish()
    run.engine.unload(A.digest)
    begin(run, A)
    ask(run, "after", A)
    run.finish()
    assert run.tokens("after") == run.tokens("before") == solo(A)


def test_a_load_that_fails_fails_those_who_wait_and_no_others() -> None:
    run = driven(2, [A])
    ask(run, "here", A)
    begin(run, too_long := lora(5, pages=3))
    for name in ("one", "two"):
        ask(run, name, too_long)
    run.finish()
    assert run.finish_of("here") == "length"
    assert {name: refusal.kind for name, refusal in run.refused.items()} == dict.fromkeys(
        ("one", "two"), "PoolExhausted"
    )
    (event,) = run.events
    assert (event.digest, event.code) == (too_long.digest, "adapter_memory_exhausted")
    assert event.error == run.refused["one"].message
    assert event.error.endswith("start with room for more memory")
    assert run.engine.stats.resident == [A.digest]


def test_an_image_for_another_model_is_refused() -> None:
    run = driven()
    other = tiny_engine("llama", dtype=torch.bfloat16)
    run.engine.begin_load(image_of(A, other))
    ask(run, "x", A)
    run.finish()
    assert run.events[0].code == run.refused["x"].code == "adapter_incompatible"


@pytest.mark.parametrize("pieces", [0, 1, 5])
def test_a_request_that_waits_can_be_cancelled(pieces: int) -> None:
    run = driven(resident=[B])
    begin(run, A)
    ask(run, "x", A, B)
    run.turns(pieces)
    run.engine.cancel("x")
    assert not run.engine.has_work
    run.finish()
    assert run.outputs == run.refused == {}
    for bundle in (A, B):
        run.engine.unload(bundle.digest)
    assert run.engine.stats.resident == []


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        pytest.param({"task": "z"}, AdapterNotFound, "has no task 'z'; it has t", id="task"),
        pytest.param({"tokens": [5] * 256}, PromptTooLong, "256 tokens", id="length"),
        pytest.param({"tokens": []}, InvalidRequest, "no tokens", id="empty"),
    ],
)
def test_what_can_be_refused_at_once_does_not_wait(fields, error, words: str) -> None:
    run = driven(resident=[B])
    begin(run, A)
    for parts in ((A,), (A, B)):
        with pytest.raises(error, match=words):
            ask(run, "x", *parts, **fields)
    run.finish()
    run.engine.unload(B.digest)
    assert run.engine.stats.resident == [A.digest]


def test_a_version_that_is_neither_here_nor_coming_is_not_found() -> None:
    run = driven(resident=[A])
    for parts in ((B,), (A, B)):
        with pytest.raises(AdapterNotFound, match="is not resident") as refused:
            ask(run, "x", *parts)
        assert refused.value.code == "adapter_not_resident"
    assert not run.engine.has_work
