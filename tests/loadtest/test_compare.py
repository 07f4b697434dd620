from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import pytest

from oneplusn.loadtest import load, rows
from oneplusn.loadtest.drive import Outcome, Record
from oneplusn.loadtest.figures import by_task, figures
from oneplusn.loadtest.stream import Answer
from oneplusn.loadtest.workload import Planned

WORKLOAD = {"clients": 4, "rate": None, "tasks": ["a"]}


def write_run(
    folder: Path, *, slower: float = 1.0, noise: int = 0, count: int = 600, **changes: object
) -> Path:
    """A load of four clients, as `--out` writes it; the request makes its times, and `noise`."""
    ends, records = [0.0] * 4, list[Record]()
    for index in range(count):
        rng, other = random.Random(index), random.Random(f"{index} {noise}")
        sent = min(ends)
        pieces = [0.02 + 0.02 * rng.random() + 0.002 * other.random() for _ in range(6)]
        times = [sent + slower * sum(pieces[: end + 1]) for end in range(6)]
        answer = Answer(sent, tuple(times), 6, ended=times[-1])
        ends[ends.index(sent)] = answer.ended
        records.append(Record(Planned(index, 0.0, "a", 8, 6), sent, sent, True, answer=answer))
    outcome = Outcome(records, 0.0, records[-1].sent, (0.1,))
    report = {
        **figures(outcome), "num_prompts": count, "tasks": by_task(outcome), "seed": 0,
        "workload": WORKLOAD, "warnings": [], **changes,
    }  # fmt: skip
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    rows.write(folder / rows.FILE, records, 0.0)
    return folder


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    load.declare(parser)
    return load.run(parser.parse_args(["compare", *map(str, arguments)]))


def compared(*arguments: object, out: Path) -> list[dict]:
    assert run(*arguments, "--out", out) == 0
    return json.loads((out / "compare.json").read_text(encoding="utf-8"))["others"]


def verdicts(found: dict) -> dict[str, str]:
    return {figure["figure"]: figure["verdict"] for figure in found["figures"]}


def test_a_slower_server_is_worse_in_everything_and_by_how_much(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a")
    second = write_run(tmp_path / "b", slower=1.25, noise=1)

    (found,) = compared(first, second, out=tmp_path / "out")

    assert found["paired"] == 600
    assert len(found["figures"]) == 12
    assert set(verdicts(found).values()) == {"worse"}
    ratios = {figure["figure"]: figure for figure in found["figures"]}
    assert ratios["output tokens/s"]["ratio"] == pytest.approx(0.8, rel=0.02)
    for name, figure in ratios.items():
        expected = 0.8 if name == "output tokens/s" else 1.25
        assert figure["ratio"] == pytest.approx(expected, rel=0.04), name
        assert figure["low"] <= figure["ratio"] <= figure["high"]
        assert figure["second"] / figure["first"] == pytest.approx(figure["ratio"])
    (back,) = compared(second, first, out=tmp_path / "back")
    assert set(verdicts(back).values()) == {"better"}


def test_the_same_server_twice_is_no_difference(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", noise=1)

    (found,) = compared(first, second, out=tmp_path / "out")

    assert set(verdicts(found).values()) == {"no difference"}
    page = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3
    text = (tmp_path / "out" / "compare.md").read_text(encoding="utf-8")
    assert "Paired: 600 requests" in text
    assert "measure the first once more after the others" in text


@pytest.mark.parametrize("changes", [{"seed": 1}, {"count": 400}])
def test_other_requests_are_compared_without_pairs(tmp_path: Path, changes) -> None:
    runs = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", **changes),
        write_run(tmp_path / "c", slower=2.0, **changes),
    ]

    same, twice = compared(*runs, out=tmp_path / "out")

    assert (same["paired"], twice["paired"]) == (0, 0)
    told = {"no difference", "too few to tell"}
    assert set(verdicts(same).values()) <= told
    assert verdicts(twice)["inter-token p99, ms"] == "worse"


def test_a_few_requests_do_not_tell_the_tail(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, count=60) for name in "ab"]

    (found,) = compared(*runs, out=tmp_path / "out")

    assert verdicts(found)["TTFT p99, ms"] == "too few to tell"
    assert verdicts(found)["TTFT p50, ms"] == "no difference"


def test_different_loads_are_refused_unless_forced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_run(tmp_path / "a")
    second = write_run(tmp_path / "b", workload=WORKLOAD | {"clients": 8})

    assert run(first, second) == 2
    assert "of different loads: clients 4 and 8. --force" in capsys.readouterr().err
    assert run(first, second, "--force") == 0
    assert "**Different loads:** clients 4 and 8." in capsys.readouterr().out


@pytest.mark.parametrize("kept", ["none", "of another load"])
def test_without_its_requests_a_report_has_ratios_and_no_confidence(
    tmp_path: Path, kept: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", slower=2.0)
    if kept == "none":
        (second / rows.FILE).unlink()
    else:
        (second / "report.json").rename(tmp_path / "b.json")
        rows.write(tmp_path / rows.FILE, rows.read(first / rows.FILE)[:-1], 0.0)
        second = tmp_path / "b.json"

    (found,) = compared(first, second, out=tmp_path / "out")

    assert set(verdicts(found).values()) == {"too few to tell"}
    ratios = {figure["figure"]: figure["ratio"] for figure in found["figures"]}
    assert ratios["inter-token p99, ms"] == pytest.approx(2.0)
    assert "Without the requests.jsonl of both" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is no JSON"),
        ("[]", "is no report of a load; give what --out of a load wrote"),
        ('{"completed": 5}', "is no report of a load"),
    ],
)
def test_what_is_no_report_is_refused(
    tmp_path: Path, content: str | None, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first, other = write_run(tmp_path / "a", count=20), tmp_path / "b.json"
    if content is not None:
        other.write_text(content, encoding="utf-8")

    assert run(first, other) == 2
    assert reason in capsys.readouterr().err


def test_one_report_is_not_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(write_run(tmp_path / "a", count=20)) == 2
    assert "alone cannot be compared; give two reports or more" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "code"), [("2%", 0), ("0.5", 0), ("-1%", 2), ("x", 2)])
def test_the_least_difference_is_a_share(tmp_path: Path, text: str, code: int) -> None:
    runs = [write_run(tmp_path / name, count=20) for name in "ab"]
    try:
        found = run(*runs, f"--least={text}")
    except SystemExit as error:
        found = error.code

    assert found == code
