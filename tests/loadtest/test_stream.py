from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oneplusn.loadtest.dialects import DIALECTS
from oneplusn.loadtest.stream import Answer, LoadFailed, Reader

HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
    b"transfer-encoding: chunked\r\nx-oneplusn-adapter: a@3\r\n\r\n"
)
END = b"0\r\n\r\n"


def read_answer(sent, arrivals, dialect) -> Answer:
    reader = Reader(dialect)
    for when, data in arrivals:
        reader.feed(when, data)
    return reader.finish(sent)


def event(content: object) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def text(piece: str) -> bytes:
    return event({"choices": [{"text": piece}]})


USAGE = event(
    {
        "choices": [],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 2,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    }
)
FINISH = event({"choices": [{"text": "", "finish_reason": "length"}]})
DONE = b"data: [DONE]\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


@pytest.mark.parametrize(
    ("arrivals", "times", "ended"),
    [
        pytest.param(
            [
                (1.0, HEAD),
                (2.0, chunk(text("a"))),
                (3.0, chunk(text("b"))),
                (4.0, chunk(USAGE) + chunk(DONE) + END),
            ],
            (2.0, 3.0),
            4.0,
            id="event-per-read",
        ),
        pytest.param(
            [(1.0, HEAD + b"".join(map(chunk, (text("a"), text("b"), USAGE, DONE))))],
            (1.0, 1.0),
            1.0,
            id="all-in-one-read",
        ),
        pytest.param(
            [
                (1.0, HEAD + chunk(text("a") + text("b")[:9])),
                (2.0, chunk(text("b")[9:-1])),
                (3.0, chunk(b"\n" + USAGE + DONE)),
                (4.0, END),
            ],
            (1.0, 3.0),
            3.0,
            id="event-over-three-reads",
        ),
        pytest.param(
            [
                (1.0, HEAD + chunk(b": ping\n\n" + text(""))),
                (2.0, chunk(text("a").replace(b"\n", b"\r\n"))),
                (3.0, chunk(b"event: message\n" + text("b").replace(b"data: ", b"data:"))),
                (4.0, chunk(USAGE + DONE)),
            ],
            (2.0, 3.0),
            4.0,
            id="comment-empty-text-crlf-no-space",
        ),
    ],
)
def test_a_token_is_timed_when_its_event_is_whole(arrivals, times, ended) -> None:
    assert read_answer(0.5, arrivals, DIALECTS["completions"]) == Answer(
        sent=0.5,
        times=times,
        tokens=2,
        cached_tokens=1,
        ended=ended,
        prompt_tokens=3,
        counted=True,
        versions=("a@3",),
    )


STREAM = HEAD + b"".join(map(chunk, (text("a"), text("b\r\n\r\n0\r\n"), FINISH, USAGE, DONE))) + END


@given(st.lists(st.integers(1, len(STREAM) - 1)))
def test_where_the_network_cuts_changes_nothing_but_times(cuts: list[int]) -> None:
    bounds = [0, *sorted(set(cuts)), len(STREAM)]
    pieces = [STREAM[start:end] for start, end in pairwise(bounds)]
    # Each text belongs to the read that brings the last byte of its event, without its chunk's end.
    whole = [STREAM.index(mark) + len(mark) for mark in (text("a"), text("b\r\n\r\n0\r\n"))]
    expected = tuple(float(sum(bound < end for bound in bounds[1:])) for end in whole)
    reader = Reader(DIALECTS["completions"], keep_text=True)

    for index, piece in enumerate(pieces):
        reader.feed(float(index), piece)

    answer = reader.finish(0.0)
    assert answer.text == "ab\r\n\r\n0\r\n"
    assert answer.times == expected
    assert (answer.tokens, answer.prompt_tokens, answer.cached_tokens) == (2, 3, 1)
    assert reader.whole
    assert reader.reusable


def finish(*events: dict[str, object], dialect: str) -> Answer:
    stream = HEAD + chunk(b"".join(map(event, events))) + END
    reader = Reader(DIALECTS[dialect], keep_text=True)
    reader.feed(1.0, stream)
    return reader.finish(0.0)


def delta(**content: object) -> dict[str, object]:
    return {"choices": [{"delta": content}]}


STOP = {"choices": [{"delta": {}, "finish_reason": "stop"}]}


@pytest.mark.parametrize(
    ("dialect", "events", "expected"),
    [
        pytest.param(
            "chat",
            [delta(role="assistant", content=""), delta(content="x"), delta(content="y"), STOP],
            ("xy", 2),
            id="a role is no token",
        ),
        pytest.param(
            "chat",
            [delta(reasoning_content="hm"), delta(content="x"), STOP],
            ("hmx", 2),
            id="reasoning",
        ),
        pytest.param(
            "chat",
            [delta(tool_calls=[{"function": {"name": "f", "arguments": "{}"}}]), STOP],
            ("f{}", 1),
            id="a call of a tool",
        ),
        pytest.param(
            "completions",
            [
                {"choices": [{"text": "x y z"}]},
                {"choices": [{"text": "", "finish_reason": "stop"}]},
            ],
            ("x y z", 1),
            id="several tokens in one event",
        ),
        pytest.param(
            "generate",
            [
                {"token": {"text": "x"}, "generated_text": None, "details": None},
                {"token": {"text": ""}, "generated_text": "x", "details": {"generated_tokens": 2}},
            ],
            ("x", 1),
            id="generate",
        ),
    ],
)
def test_events_with_text_are_what_is_timed(dialect, events, expected) -> None:
    answer = finish(*events, dialect=dialect)

    assert (answer.text, len(answer.times)) == expected


def test_the_servers_count_of_tokens_wins_over_events() -> None:
    joined = {"choices": [{"text": "x y"}]}
    counted = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}
    last = {"choices": [{"text": "", "finish_reason": "stop"}]}

    assert finish(joined, last, counted, dialect="completions").tokens == 2
    uncounted = finish(joined, last, dialect="completions")
    assert (uncounted.tokens, uncounted.counted) == (1, False)


def test_every_version_that_an_answer_names_is_kept() -> None:
    def named(label: str, piece: str) -> dict[str, object]:
        return {"choices": [{"text": piece}], "oneplusn": {"adapter": label}}

    last = {"choices": [{"text": "", "finish_reason": "stop"}]}

    assert finish(named("a@3", "x"), last, dialect="completions").versions == ("a@3",)
    torn = finish(named("a@3", "x"), named("a@4", "y"), last, dialect="completions")
    assert torn.versions == ("a@3", "a@4")


REFUSED = (
    b"HTTP/1.1 429 Too Many\r\nretry-after: 3\r\ncontent-length: 33\r\n\r\n"
    b'{"error": {"code": "queue_full"}}'
)


@pytest.mark.parametrize(
    ("data", "group", "reason", "retry_after"),
    [
        (
            b"HTTP/1.1 404 Not Found\r\ncontent-length: 7\r\n\r\nno task",
            "HTTP 404",
            "answered 404: no task",
            None,
        ),
        (REFUSED, "HTTP 429 (queue_full)", "answered 429", 3.0),
        (
            REFUSED.replace(b": 3\r", b": Wed, 21 Oct 2026 07:28:00 GMT\r"),
            "HTTP 429 (queue_full)",
            "answered 429",
            None,
        ),
        (HEAD + chunk(text("a")), "cut short", "before the end of the stream", None),
        (HEAD + chunk(text("a") + FINISH), "cut short", "before the end of the stream", None),
        (HEAD, "cut short", "before the end of the stream", None),
        (b"", "cut short", "before the end of the stream", None),
        (
            HEAD + chunk(event({"error": {"code": "engine_stopped", "message": "it died"}})),
            "error in the stream (engine_stopped)",
            "it died",
            None,
        ),
        (HEAD + chunk(event({"error": "text"})), "error in the stream", "text", None),
        (HEAD + chunk(b"data: {nothing\n\n"), "no JSON", "no JSON: {nothing", None),
        (HEAD + chunk(b"data: 5\n\n"), "no JSON", "no object: 5", None),
        (b"SSH-2.0-x\r\n\r\n", "no HTTP", "no HTTP response", None),
    ],
)
def test_an_answer_that_is_none_is_refused(data, group, reason, retry_after) -> None:
    with pytest.raises(LoadFailed, match=reason) as caught:
        read_answer(0.0, [(1.0, data)] if data else [], DIALECTS["completions"])

    assert caught.value.group == group
    assert caught.value.retry_after == retry_after


def test_a_stream_that_ends_as_http_does_is_whole_without_its_last_mark() -> None:
    answer = read_answer(
        0.0, [(1.0, HEAD + chunk(text("a") + FINISH) + END)], DIALECTS["completions"]
    )

    assert answer.times == (1.0,)
    assert answer.ended == 1.0
