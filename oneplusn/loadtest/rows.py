"""Requests as lines of JSON: from client processes to the one that reports, to a file, and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import msgspec

from oneplusn.loadtest.drive import Outcome, Record
from oneplusn.loadtest.mistake import Mistake
from oneplusn.loadtest.stream import Answer, LoadFailed
from oneplusn.loadtest.workload import Planned

FILE = "requests.jsonl"


class Row(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request, and what became of it; times in seconds.

    Attributes:
        times: When each event with text arrived; None without an answer.
        counted: `output_tokens` is the server's count, and not that of the events.
        error: Kind of the failure; None if there was none.
    """

    index: int
    task: str
    counts: bool
    due: float
    sent: float
    asked_input_tokens: int
    asked_output_tokens: int
    connecting: float | None = None
    retries: int = 0
    ended: float | None = None
    times: tuple[float, ...] | None = None
    input_tokens: int | None = None
    output_tokens: int = 0
    cached_tokens: int = 0
    counted: bool = True
    versions: tuple[str, ...] = ()
    error: str | None = None
    message: str = ""


class Part(msgspec.Struct, frozen=True, tag=True):
    """What one process measured, on the clock that all processes of a machine share."""

    rows: tuple[Row, ...]
    begin: float
    end_of_sending: float
    cpu_shares: tuple[float, ...]
    interrupted: bool


def to_row(record: Record, begin: float = 0.0) -> Row:
    """Describe one request; times are from `begin` on."""
    planned, answer, failure = record.planned, record.answer, record.failure
    row = Row(
        index=planned.index,
        task=planned.task,
        counts=record.counts,
        due=record.due - begin,
        sent=record.sent - begin,
        asked_input_tokens=planned.input_tokens,
        asked_output_tokens=planned.output_tokens,
        connecting=record.connecting_s,
        retries=record.retries,
    )
    if failure is not None:
        return msgspec.structs.replace(row, error=failure.group, message=str(failure))
    if answer is None:
        return row
    return msgspec.structs.replace(
        row,
        ended=answer.ended - begin,
        times=tuple(when - begin for when in answer.times),
        input_tokens=answer.prompt_tokens,
        output_tokens=answer.tokens,
        cached_tokens=answer.cached_tokens,
        counted=answer.counted,
        versions=answer.versions,
    )


def to_record(row: Row) -> Record:
    """Return the request that a row describes, without its text."""
    planned = Planned(row.index, 0.0, row.task, row.asked_input_tokens, row.asked_output_tokens)
    answer = None
    if row.times is not None and row.ended is not None:
        answer = Answer(
            sent=row.sent,
            times=row.times,
            tokens=row.output_tokens,
            cached_tokens=row.cached_tokens,
            ended=row.ended,
            prompt_tokens=row.input_tokens,
            counted=row.counted,
            versions=row.versions,
        )
    failure = None if row.error is None else LoadFailed(row.message, group=row.error)
    return Record(
        planned, row.due, row.sent, row.counts, row.connecting, answer, failure, row.retries
    )


def to_part(outcome: Outcome) -> Part:
    """Describe everything that one process measured."""
    return Part(
        rows=tuple(to_row(record) for record in outcome.records),
        begin=outcome.begin,
        end_of_sending=outcome.end_of_sending,
        cpu_shares=outcome.cpu_shares,
        interrupted=outcome.interrupted,
    )


def merge(parts: Sequence[Part]) -> Outcome:
    """Return what processes that began together measured, as if one process had.

    Every request is kept with all its times, so figures are those of all requests and not made of
    the processes' figures.
    """
    rows = chain.from_iterable(part.rows for part in parts)
    ordered = sorted(rows, key=lambda row: (row.sent, row.index))
    return Outcome(
        records=[to_record(row) for row in ordered],
        begin=min(part.begin for part in parts),
        end_of_sending=max(part.end_of_sending for part in parts),
        cpu_shares=tuple(share for part in parts for share in part.cpu_shares),
        interrupted=any(part.interrupted for part in parts),
    )


def write(path: Path, records: Iterable[Record], begin: float) -> None:
    """Write a line per request; times are from `begin` on."""
    encoder = msgspec.json.Encoder()
    with path.open("wb") as file:
        file.writelines(encoder.encode(to_row(record, begin)) + b"\n" for record in records)


def read(path: Path) -> list[Record]:
    """Read what `write` wrote.

    Raises:
        Mistake: It cannot be read, or a line is no request; the message has its number.
    """
    try:
        content = path.read_bytes().splitlines()
    except OSError as error:
        raise Mistake(f"{path} cannot be read: {error.strerror}") from None
    decoder = msgspec.json.Decoder(Row)
    records = list[Record]()
    for number, line in enumerate(content, 1):
        try:
            records.append(to_record(decoder.decode(line)))
        except msgspec.DecodeError as error:
            raise Mistake(f"{path}, line {number} is no request of a load: {error}") from None
    return records
