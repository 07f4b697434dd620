from __future__ import annotations

import asyncio
import json
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest

from oneplusn.loadtest.dialects import DIALECTS
from oneplusn.loadtest.drive import Driver, Limits, Outcome, Record
from oneplusn.loadtest.stats import most_at_once, percentile
from oneplusn.loadtest.transport import reach
from oneplusn.loadtest.workload import Length, Planned, Popularity, Workload

ROUTE = DIALECTS["completions"]


def workload(rate: float | None = None) -> Workload:
    length = Length.parse("4")
    return Workload(("task",), Popularity.parse("identical"), length, length, rate, seed=0)


class Loaded:
    """A driver on a server; every request has its index as its prompt."""

    def __init__(self, address: str, **limits: object) -> None:
        self.limits = Limits(**{"duration": None, "requests": None, "timeout": 20.0, **limits})
        self.server = reach(address)
        self.driver = Driver(self.server, ROUTE, self.compose, self.limits, keep_text=True)

    def compose(self, planned: Planned) -> bytes:
        body = ROUTE.body(planned.task, str(planned.index), planned.output_tokens)
        return self.server.post(ROUTE.path, json.dumps(body).encode())

    def open(self, rate: float) -> Outcome:
        limits = self.limits
        schedule = workload(rate).schedule(
            duration=limits.duration, requests=limits.requests, warmup=limits.warmup
        )
        return asyncio.run(self.driver.run_open(schedule))

    def closed(self, concurrency: int) -> Outcome:
        requests: Iterator[Planned] = workload().requests()
        return asyncio.run(self.driver.run_closed(requests, concurrency))


def answers(outcome: Outcome):
    assert all(record.answer is not None for record in outcome.records)
    return [record.answer for record in outcome.records]


@pytest.mark.parametrize("loop", ["open", "closed"])
def test_every_token_is_timed_when_it_was_written(scripted, script, loop: str) -> None:
    first, gap, events = 0.03, 0.01, 12
    server = scripted(lambda request: script(first_s=first, gap_s=gap, events=events))
    loaded = Loaded(server.address, requests=24)

    outcome = loaded.open(rate=60.0) if loop == "open" else loaded.closed(concurrency=6)

    written = {request.json["prompt"]: request for request in server.streams}
    late, first_off, ours, theirs = list[float](), list[float](), list[float](), list[float]()
    for record, answer in zip(outcome.records, answers(outcome), strict=True):
        request = written[str(record.planned.index)]
        assert record.sent <= request.came
        assert len(answer.times) == len(request.written) == events
        late += [read - wrote for read, wrote in zip(answer.times, request.written, strict=True)]
        first_off.append(answer.first_token_s - (request.written[0] - request.came))
        ours += answer.gaps_s
        theirs += [after - before for before, after in pairwise(request.written)]
    off = [abs(mine - real) for mine, real in zip(ours, theirs, strict=True)]
    # On a machine that is free these are 0.2 to 0.5 ms.
    assert min(late) > 0
    assert statistics.median(late) < 0.004
    assert 0 < statistics.median(first_off) < 0.008
    assert statistics.median(off) < 0.002
    assert percentile(ours, 50) == pytest.approx(percentile(theirs, 50), abs=0.001)
    assert percentile(ours, 50) >= gap


def test_a_server_without_room_shows_in_the_first_token_and_not_between_tokens(
    scripted, script
) -> None:
    gap, events = 0.01, 8
    server = scripted(lambda request: script(gap_s=gap, events=events), one_at_a_time=True)

    outcome = Loaded(server.address, requests=16).open(rate=40.0)

    first = [answer.first_token_s for answer in answers(outcome)]
    gaps = [gap for answer in answers(outcome) for gap in answer.gaps_s]
    late = [record.sent - record.due for record in outcome.records]
    # One takes 70 ms, and 25 ms pass from one to the next: the last waits for half of them.
    assert max(first) > 8 * gap * (events - 1) > 8 * first[0]
    assert gap <= percentile(gaps, 50) < 2 * gap
    assert percentile(late, 90) < max(first) / 10


def test_an_open_loop_sends_when_it_is_due_however_many_are_unanswered(scripted, script) -> None:
    server = scripted(lambda request: script(first_s=0.5, events=1))

    outcome = Loaded(server.address, requests=20).open(rate=100.0)

    spans = [(answer.sent, answer.ended) for answer in answers(outcome)]
    assert most_at_once(spans) == 20
    planned = workload(100.0).schedule(duration=None, requests=20)
    start = outcome.begin
    assert [r.due - start for r in outcome.records] == pytest.approx([p.at for p in planned])
    assert all(record.sent >= record.due for record in outcome.records)


def test_a_closed_loop_has_that_many_requests_in_flight_and_no_more(scripted, script) -> None:
    server = scripted(lambda request: script(first_s=0.01, events=2))

    outcome = Loaded(server.address, requests=23).closed(concurrency=4)

    assert len(outcome.records) == 23
    assert most_at_once((answer.sent, answer.ended) for answer in answers(outcome)) == 4
    connecting = [record for record in outcome.records if record.connecting_s is not None]
    assert len(connecting) == 4  # each client keeps its connection


def test_the_load_ends_with_its_time_and_waits_for_what_is_in_flight(scripted, script) -> None:
    server = scripted(lambda request: script(first_s=0.05, events=2))

    outcome = Loaded(server.address, duration=0.3).closed(concurrency=2)

    assert outcome.end_of_sending == pytest.approx(outcome.begin + 0.3)
    assert max(record.due for record in outcome.records) < outcome.end_of_sending
    assert max(answer.ended for answer in answers(outcome)) > outcome.end_of_sending


def test_a_warm_up_is_the_same_load_and_counts_for_nothing(scripted, script) -> None:
    server = scripted(lambda request: script(first_s=0.02, events=1))

    outcome = Loaded(server.address, requests=6, warmup=0.2).closed(concurrency=2)

    assert len(outcome.counted) == 6
    warm = [record for record in outcome.records if not record.counts]
    assert len(warm) > 6
    assert max(record.due for record in warm) < outcome.begin


def test_a_connection_that_the_server_closed_between_requests_is_no_failure(
    scripted, script
) -> None:
    server = scripted(lambda request: script(events=1, hangs_up=True))

    outcome = Loaded(server.address, requests=6).closed(concurrency=1)

    assert len(answers(outcome)) == 6
    assert len(server.streams) == 6


def failures(records: list[Record]) -> dict[str, int]:
    groups = [record.failure.group for record in records if record.failure]
    return {group: groups.count(group) for group in groups}


def test_a_server_that_dies_fails_what_is_in_flight_and_what_comes_after(scripted, script) -> None:
    server = scripted(lambda request: script(gap_s=0.01, events=9, dies_after=3))

    outcome = Loaded(server.address, requests=3).open(rate=100.0)

    assert failures(outcome.records) == {"cut short": 3}
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        loaded = Loaded(server.address, requests=3)
        object.__setattr__(loaded.server, "port", nobody.getsockname()[1])
        assert failures(loaded.open(rate=100.0).records) == {"no connection (ECONNREFUSED)": 3}


def refuse_twice(script):
    seen = dict[str, int]()

    def behave(request):
        prompt = request.json["prompt"]
        seen[prompt] = seen.get(prompt, 0) + 1
        if seen[prompt] <= 2:
            return script(
                status=429,
                headers=("retry-after: 0.05",),
                content=b'{"error": {"code": "queue_full"}}',
            )
        return script(events=2)

    return behave


def test_a_refusal_is_counted_and_not_sent_again(scripted, script) -> None:
    server = scripted(refuse_twice(script))

    outcome = Loaded(server.address, requests=4).open(rate=200.0)

    assert failures(outcome.records) == {"HTTP 429 (queue_full)": 4}
    assert len(server.requests) == 4
    assert {record.failure.retry_after for record in outcome.records} == {0.05}


def test_a_refusal_is_sent_again_if_that_was_asked_for_and_its_time_goes_on(
    scripted, script
) -> None:
    server = scripted(refuse_twice(script))

    outcome = Loaded(server.address, requests=4, retries=2).open(rate=200.0)

    assert [record.retries for record in outcome.records] == [2] * 4
    assert min(answer.first_token_s for answer in answers(outcome)) > 0.1


def test_a_client_of_a_closed_loop_waits_after_a_refusal(scripted, script) -> None:
    refusal = script(status=429, headers=("retry-after: 0.2",))
    server = scripted(lambda request: refusal)

    outcome = Loaded(server.address, duration=0.5).closed(concurrency=1)

    sent = [record.sent for record in outcome.records]
    assert 2 <= len(sent) <= 3
    assert all(later - earlier >= 0.2 for earlier, later in pairwise(sent))


def test_an_answer_that_does_not_end_is_given_up(scripted, script) -> None:
    server = scripted(lambda request: script(first_s=30.0))

    outcome = Loaded(server.address, requests=2, timeout=0.2).closed(concurrency=2)

    assert failures(outcome.records) == {"timeout": 2}


@pytest.mark.parametrize("loop", ["open", "closed"])
def test_a_load_that_is_halted_keeps_what_was_answered(scripted, script, loop: str) -> None:
    asked = threading.Event()

    def behave(request):
        late = int(request.json["prompt"]) >= 4
        if late:
            asked.set()
        return script(first_s=30.0 if late else 0.0, events=1)

    loaded = Loaded(scripted(behave).address, requests=1000)

    async def run() -> Outcome:
        async def halt() -> None:
            await asyncio.to_thread(asked.wait)
            loaded.driver.halt()

        halting = asyncio.create_task(halt())
        if loop == "open":
            await loaded.driver.run_open(workload(50.0).schedule(duration=60.0, requests=None))
        else:
            await loaded.driver.run_closed(workload().requests(), 2)
        await halting
        return loaded.driver.outcome

    outcome = asyncio.run(run())

    assert outcome.interrupted
    assert outcome.records[-1].sent <= outcome.end_of_sending < outcome.begin + 20
    assert sum(record.answer is not None for record in outcome.records) >= 3
    assert outcome.records[-1].answer is None
    assert failures(outcome.records) == {}
    answered = sum(record.answer is not None for record in outcome.records)
    assert loaded.driver.counts.done == answered


def test_a_fault_of_the_driver_ends_the_load_and_is_raised(scripted, script) -> None:
    server = scripted(lambda request: script(first_s=30.0))
    loaded = Loaded(server.address, requests=5)

    def compose(planned: Planned) -> bytes:
        if planned.index == 2:
            raise ZeroDivisionError
        return loaded.compose(planned)

    driver = Driver(loaded.server, ROUTE, compose, loaded.limits)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(driver.run_closed(workload().requests(), 3))


@pytest.mark.parametrize("loop", ["open", "closed"])
def test_a_load_begins_when_it_is_told(scripted, script, loop: str) -> None:
    loaded = Loaded(scripted(lambda request: script(events=1)).address, requests=4, warmup=0.05)

    async def run() -> float:
        start = time.perf_counter() + 0.2
        if loop == "open":
            schedule = workload(100.0).schedule(duration=None, requests=4, warmup=0.05)
            await loaded.driver.run_open(schedule, start=start)
        else:
            await loaded.driver.run_closed(workload().requests(), 2, start=start)
        return start

    start = asyncio.run(run())

    outcome = loaded.driver.outcome
    assert outcome.begin == start + 0.05
    assert min(record.due for record in outcome.records) >= start
    assert min(record.sent for record in outcome.records) >= start
    (share,) = outcome.cpu_shares
    assert 0 < share < 1.5


def test_all_clients_of_a_closed_loop_have_their_first_request_ready(scripted, script) -> None:
    loaded = Loaded(scripted(lambda request: script(events=1)).address, requests=3)
    composed = list[int]()
    compose = loaded.compose

    def slowly(planned: Planned) -> bytes:
        composed.append(planned.index)
        time.sleep(0.02)
        return compose(planned)

    driver = Driver(loaded.server, ROUTE, slowly, loaded.limits)
    outcome = asyncio.run(driver.run_closed(workload().requests(), 3))

    assert composed[:3] == [0, 1, 2]
    assert max(record.sent - record.due for record in outcome.records) < 0.02
