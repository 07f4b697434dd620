"""Adapters leave and make room: never under a request, never before they must."""

from __future__ import annotations

import pytest

from driven_engines import (
    LONG,
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
from oneplusn.errors import AdapterNotFound
from oneplusn.server.messages import Freed, Loaded

pytestmark = pytest.mark.usefixtures("small_pieces")


def test_a_version_leaves_with_the_last_request_that_refers_to_it() -> None:
    run = driven(resident=[A, B])
    used = run.engine.stats.pool_used_bytes
    ask(run, "short", A, max_tokens=2)
    ask(run, "long", A, B, max_tokens=4)
    run.turn()
    run.engine.unload(A.digest)
    with pytest.raises(AdapterNotFound, match="is being unloaded") as refused:
        ask(run, "late", A)
    assert refused.value.code == "adapter_not_resident"
    run.turns(2)
    assert run.finish_of("short") == "length"
    assert run.events == []
    run.finish()
    assert run.finish_of("long") == "length"
    assert run.events == [Freed(A.digest, used // 2)]
    assert run.engine.stats.resident == [B.digest]


def test_a_version_that_nobody_uses_leaves_at_once_pinned_or_not() -> None:
    run = driven()
    run.engine.load(A, pin=True)
    run.engine.load(B)
    for bundle in (A, B):
        run.engine.unload(bundle.digest)
    run.engine.unload("sha256:gone")
    sizes = [event.num_bytes for event in run.engine.poll()]
    assert sizes == [image_of(A, run.engine).num_bytes] * 2 + [0]
    assert run.engine.stats.pool_used_bytes == 0


def test_force_ends_the_requests_of_a_version_wherever_they_are() -> None:
    run = driven(resident=[A, B], max_num_seqs=2)
    ask(run, "running", A, max_tokens=50)
    ask(run, "base", max_tokens=4)
    ask(run, "waiting", B, A)
    run.turn()
    begin(run, C)
    ask(run, "late", C, A)
    run.engine.unload(A.digest, force=True)
    (freed,) = run.engine.poll()
    assert freed == Freed(A.digest, image_of(A, run.engine).num_bytes)
    run.finish()
    for name in ("running", "waiting", "late"):
        assert run.finish_of(name) == "abort"
        assert run.outputs[name][-1].error == "its adapter was unloaded by force"
        assert run.outputs[name][-1].token is None
    assert run.finish_of("base") == "length"
    assert set(run.engine.stats.resident) == {B.digest, C.digest}


def test_unloading_what_is_on_its_way_stops_it() -> None:
    run = driven(resident=[B])
    begin(run, A, pin=True)
    begin(run, C)
    run.turns(3)
    for bundle in (A, C):
        run.engine.unload(bundle.digest)
    assert not run.engine.is_writing
    events = run.engine.poll()
    assert [(type(event), event.digest) for event in events] == [
        (Loaded, A.digest),
        (Freed, A.digest),
        (Loaded, C.digest),
        (Freed, C.digest),
    ]
    assert {event.code for event in events[::2]} == {"adapter_unloaded"}
    assert run.engine.stats.resident == [B.digest]
    assert run.engine.stats.pool_used_bytes == image_of(B, run.engine).num_bytes
    run.engine.residency.check_integrity()


def test_what_is_on_its_way_comes_for_those_who_wait_and_leaves_with_them() -> None:
    run = driven()
    begin(run, A)
    ask(run, "x", A)
    run.engine.unload(A.digest)
    with pytest.raises(AdapterNotFound, match="is being unloaded"):
        ask(run, "y", A)
    run.finish()
    assert run.tokens("x") == solo(A)
    assert [type(event) for event in run.events] == [Loaded, Freed]

    begin(run, B)
    ask(run, "gives up", B)
    run.engine.unload(B.digest)
    run.engine.cancel("gives up")
    assert not run.engine.is_writing
    assert run.engine.stats.resident == []


def test_a_load_takes_an_unload_back() -> None:
    run = driven(resident=[A])
    ask(run, "x", A)
    run.turn()
    run.engine.unload(A.digest)
    assert run.engine.keep(A.digest, pin=True)
    ask(run, "y", A)
    run.finish()
    assert run.events == [
        Freed(A.digest, 0),
        Loaded(A.digest, image_of(A, run.engine).num_bytes),
    ]
    assert run.tokens("x") == run.tokens("y")


def test_the_least_recently_used_makes_room_and_is_told() -> None:
    run = driven(2, [A, B])
    ask(run, "x", A)
    run.finish()
    begin(run, C)
    run.finish()
    size = image_of(A, run.engine).num_bytes
    assert run.events == [Freed(B.digest, size), Loaded(C.digest, size)]
    with pytest.raises(AdapterNotFound, match="is not resident"):
        ask(run, "y", B)


def test_a_load_of_what_is_here_counts_as_a_use_and_says_whether_it_is_pinned() -> None:
    run = driven(2, [A, B])
    assert not run.engine.keep(C.digest)
    assert run.engine.keep(A.digest)
    begin(run, C)
    run.finish()
    assert set(run.engine.stats.resident) == {A.digest, C.digest}

    assert run.engine.keep(A.digest, pin=True)
    assert run.engine.keep(A.digest)
    ask(run, "x", C)
    run.finish()
    begin(run, B)
    run.finish()
    assert set(run.engine.stats.resident) == {A.digest, B.digest}

    assert run.engine.keep(A.digest, pin=False)
    begin(run, LONG)
    run.finish()
    assert run.engine.stats.resident == [LONG.digest]


def test_a_version_that_came_with_a_pin_stays() -> None:
    run = driven(2)
    begin(run, A, pin=True)
    for bundle in (B, C, LONG, B):
        begin(run, bundle)
        run.finish()
    assert set(run.engine.stats.resident) == {A.digest, B.digest}
    failed = [event for event in run.events if isinstance(event, Loaded) and event.error]
    assert [(event.digest, event.code) for event in failed] == [
        (LONG.digest, "adapter_memory_exhausted")
    ]


def test_a_load_that_finds_no_room_and_is_given_up_holds_back_no_other() -> None:
    run = driven(3, [A, B])
    for name, bundle in (("a", A), ("b", B)):
        ask(run, name, bundle, max_tokens=50)
    begin(run, LONG)
    begin(run, C)
    run.turns(2)
    assert not run.engine.is_writing
    run.engine.unload(LONG.digest)
    assert run.engine.is_writing
    while run.engine.is_writing:
        run.turn()
    assert set(run.engine.stats.resident) == {A.digest, B.digest, C.digest}


@pytest.mark.parametrize("how", ["unpin", "unload"])
def test_a_load_that_waits_for_room_takes_what_is_let_go(how: str) -> None:
    run = driven(2, [B])
    run.engine.load(A, pin=True)
    ask(run, "b", B, max_tokens=50)
    begin(run, C)
    run.turns(2)
    assert not run.engine.is_writing
    if how == "unpin":
        run.engine.keep(A.digest, pin=False)
    else:
        run.engine.unload(A.digest)
    while run.engine.is_writing:
        run.turn()
    assert set(run.engine.stats.resident) == {B.digest, C.digest}


def test_nothing_makes_room_before_it_must() -> None:
    run = driven(2, [A, B])
    begin(run, C)
    begin(run, LONG)
    ask(run, "x", A)
    assert set(run.engine.stats.resident) == {A.digest, B.digest}
    while C.digest not in run.engine.stats.resident:
        run.turn()
    assert set(run.engine.stats.resident) == {A.digest, C.digest}
    run.finish()
    assert run.tokens("x") == solo(A)
    assert run.engine.stats.resident == [LONG.digest]


def test_a_load_waits_for_the_requests_that_hold_what_it_needs() -> None:
    run = driven(2, [A, B])
    ask(run, "a", A, max_tokens=30)
    ask(run, "b", B, max_tokens=3)
    begin(run, C)
    ask(run, "c", C)
    run.turn()
    assert not run.engine.is_writing, "there is nothing to do until one has ended"
    run.finish()
    assert [run.finish_of(name) for name in "abc"] == ["length"] * 3
    assert run.tokens("c") == solo(C)
    assert run.order.index("b length") < run.order.index("Freed") < run.order.index("a length")


def test_a_load_that_pins_keep_out_fails_at_once() -> None:
    run = driven(2)
    run.engine.load(A, pin=True)
    run.engine.load(B, pin=True)
    ask(run, "a", A, max_tokens=50)
    begin(run, C)
    ask(run, "c", C)
    run.turns(2)
    assert run.refused["c"].code == "adapter_memory_exhausted"
    assert run.events[0].code == "adapter_memory_exhausted"


def test_two_blends_that_do_not_fit_together_do_not_wait_for_each_other() -> None:
    d = lora(6)
    run = driven(2, [A, C])
    begin(run, B)
    ask(run, "ab", A, B)
    begin(run, d)
    ask(run, "cd", C, d)
    run.finish()
    assert run.refused["ab"].code == "adapter_memory_exhausted"
    assert run.tokens("cd") == solo(C, d)


def test_scattered_room_is_joined_while_others_run() -> None:
    d = lora(6)
    run = driven(4, [A, B, C, d])
    for name, bundle in (("b", B), ("d", d)):
        ask(run, name, bundle, max_tokens=30)
    run.turn()
    begin(run, LONG)
    ask(run, "long", LONG)
    run.finish()
    assert [run.tokens(name) for name in ("b", "d")] == [
        solo(B, max_tokens=30),
        solo(d, max_tokens=30),
    ]
    assert run.tokens("long") == solo(LONG)
    freed = [event.digest for event in run.events if isinstance(event, Freed)]
    assert freed == [A.digest, C.digest]
