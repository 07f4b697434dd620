from __future__ import annotations

import json
from itertools import islice

import msgspec
import pytest

from oneplusn.loadtest.drive import Limits
from oneplusn.loadtest.job import Job, Sender
from oneplusn.loadtest.prompts import Line, Vocabulary
from oneplusn.loadtest.transport import Server
from oneplusn.loadtest.workload import Length, Popularity, Workload

LINES = (
    Line("text", task="z"),
    Line(({"role": "user", "content": [{"type": "text", "text": "x"}]},), output_tokens=3),
    Line(input_tokens=9),
)


def job(rate: float | None = 20.0, **changes: object) -> Job:
    workload = Workload(
        ("a", "b"),
        Popularity.parse("zipf:1.1"),
        Length.parse("lognormal:50,0.5,99"),
        Length.parse("normal:8,2,20"),
        rate,
        seed=3,
        **changes,
    )
    return Job(
        Server("host", "127.0.0.1", 80, "/p", tls=True, key="secret"),
        "chat",
        Vocabulary({"one": 1, "two": 2}, overhead=1),
        workload,
        Limits(2.0, 17, 0.5, 9.0, 1),
        None if rate else 5,
        {"top_p": 0.5},
    )


def sent(part: Job) -> list[bytes]:
    planned = (
        islice(part.workload.requests(), part.part, 30, part.parts)
        if part.workload.rate is None
        else Sender(part)._schedule
    )
    return [part.composer(request) for request in planned]


@pytest.mark.parametrize("rate", [None, 20.0])
@pytest.mark.parametrize("lines", [(), LINES])
def test_a_process_that_is_told_a_job_sends_the_same(rate: float | None, lines) -> None:
    told = msgspec.json.decode(msgspec.json.encode(job(rate, lines=lines)), type=Job)

    assert told == job(rate, lines=lines)
    assert sent(told) == sent(job(rate, lines=lines))
    assert len(sent(told)) >= 17


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("rate", [None, 20.0])
def test_parts_are_the_whole_and_nothing_twice(parts: int, rate: float | None) -> None:
    whole = job(rate)
    shares = whole.split(parts)

    assert sorted(b for part in shares for b in sent(part)) == sorted(sent(whole))
    for total in (0, 5, 17):
        counts = [part.share(total) for part in shares]
        assert sum(counts) == total
        assert max(counts) - min(counts) <= 1


def test_requests_carry_what_was_asked_for() -> None:
    first, *_ = sent(job())

    head, _, body = first.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /p/v1/chat/completions HTTP/1.1\r\nHost: host:80\r\n")
    assert b"Authorization: Bearer secret" in head
    content = json.loads(body)
    assert content["top_p"] == 0.5
    assert content["model"] in ("a", "b")
    assert {*content["messages"][0]["content"].split()} <= {"one", "two"}
