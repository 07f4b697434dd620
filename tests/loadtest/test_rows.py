from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oneplusn.loadtest import rows
from oneplusn.loadtest.drive import Outcome, Record
from oneplusn.loadtest.figures import by_task, errors, figures
from oneplusn.loadtest.mistake import Mistake
from oneplusn.loadtest.rows import Part, merge, to_part, to_record, to_row
from oneplusn.loadtest.slo import Slo
from oneplusn.loadtest.stream import Answer, LoadFailed
from oneplusn.loadtest.worker import Message
from oneplusn.loadtest.workload import Planned

SECONDS = st.floats(0.001, 3.0)


@st.composite
def records(draw) -> list[Record]:
    """Requests in the order sent: answered, failed, given up, of the warm-up or not."""
    made, sent = list[Record](), 100.0
    for index in range(draw(st.integers(0, 25))):
        sent += draw(SECONDS)
        planned = Planned(index, 0.0, draw(st.sampled_from("ab")), 7, 5)
        record = Record(planned, sent - draw(SECONDS), sent, draw(st.booleans()))
        fate = draw(st.sampled_from(["answer", "answer", "answer", "failure", "none"]))
        if fate == "failure":
            record.failure = LoadFailed("why", group=draw(st.sampled_from(["HTTP 429", "timeout"])))
        elif fate == "answer":
            gaps = draw(st.lists(SECONDS, max_size=6))
            times = tuple(sent + sum(gaps[: end + 1]) for end in range(len(gaps)))
            ended = (times[-1] if times else sent) + 0.5
            record.answer = Answer(
                sent, times, len(times) + draw(st.integers(0, 3)), draw(st.integers(0, 3)),
                ended, draw(st.sampled_from([None, 9])), versions=("a@1",),
            )  # fmt: skip
        made.append(record)
    return made


def outcome(of: list[Record], share: float = 0.25) -> Outcome:
    return Outcome(of, begin=101.0, end_of_sending=110.0, cpu_shares=(share,))


@given(records(), st.integers(1, 5), st.randoms(use_true_random=False))
def test_a_load_shared_among_processes_has_the_figures_of_one(made, processes, rng) -> None:
    whole = outcome(made)
    shares: list[list[Record]] = [[] for _ in range(processes)]
    for record in made:
        rng.choice(shares).append(record)
    slo = Slo.parse("ttft=1s,itl=2s")

    merged = merge([to_part(outcome(share)) for share in shares])

    assert merged.cpu_shares == (0.25,) * processes
    assert figures(replace(merged, cpu_shares=whole.cpu_shares), slo) == figures(whole, slo)
    assert by_task(merged, slo) == by_task(whole, slo)
    assert errors(r.failure for r in merged.records) == errors(r.failure for r in made)


@given(records())
def test_what_is_sent_between_processes_comes_back_as_it_was(made) -> None:
    import msgspec

    part = to_part(outcome(made))

    back = msgspec.json.decode(msgspec.json.encode(part), type=Message)

    assert isinstance(back, Part)
    assert back == part
    for row, record in zip(back.rows, made, strict=True):
        again = to_record(row)
        assert (again.planned, again.answer) == (record.planned, record.answer)
        assert str(again.failure) == str(record.failure)
        assert to_row(again) == row


def test_an_interruption_of_one_is_one_of_all() -> None:
    parts = [to_part(outcome([])), to_part(replace(outcome([]), interrupted=True))]
    parts[1] = replace_end(parts[1], 105.0)

    merged = merge(parts)

    assert merged.interrupted
    assert (merged.begin, merged.end_of_sending) == (101.0, 110.0)


def replace_end(part: Part, end: float) -> Part:
    return Part(part.rows, part.begin, end, part.cpu_shares, part.interrupted)


def test_a_file_of_requests_is_read_back_with_times_after_the_warm_up(tmp_path: Path) -> None:
    answer = Answer(102.0, (103.0, 103.5), 2, ended=104.0, prompt_tokens=7)
    made = [
        Record(Planned(3, 0.0, "a", 7, 2), 102.0, 102.0, True, answer=answer),
        Record(Planned(4, 0.0, "b", 7, 2), 102.5, 102.5, True, failure=LoadFailed("x", group="y")),
    ]
    file = tmp_path / "requests.jsonl"

    rows.write(file, made, begin=101.0)

    first, second = rows.read(file)
    assert first.answer == Answer(1.0, (2.0, 2.5), 2, ended=3.0, prompt_tokens=7)
    assert second.failure is not None
    assert (second.failure.group, str(second.failure)) == ("y", "x")
    assert b'"times":[2.0,2.5]' in file.read_bytes()


def test_a_line_that_is_no_request_is_named(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    rows.write(file, [Record(Planned(3, 0.0, "a", 7, 2), 0.0, 0.0, True)], begin=0.0)
    file.write_bytes(file.read_bytes() + b'{"index": "x"}\n')

    with pytest.raises(Mistake, match="line 2 is no request of a load"):
        rows.read(file)
    with pytest.raises(Mistake, match="cannot be read: No such file"):
        rows.read(tmp_path / "none")
