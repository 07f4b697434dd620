from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from oneplusn.loadtest.churn import Package, Swap
from oneplusn.loadtest.drive import Record
from oneplusn.loadtest.storm import Ledger, new_versions
from oneplusn.loadtest.stream import Answer, LoadFailed
from oneplusn.loadtest.swap_report import WHY_SLOWER, Findings, Pair
from oneplusn.loadtest.workload import Planned


@pytest.fixture
def ledger() -> Ledger:
    made = Ledger({"other-01": "t102", "other-02": "t103"})
    made.learn(
        [
            Swap("flip-a", 0.0, 0.0, 0.5, "flip@1"),
            Swap("flip-b", 1.0, 1.0, 1.5, "flip@2"),
            Swap("flip-a", 2.0, 2.0, failure=LoadFailed("x", group="timeout")),
        ],
        {"flip-a": "t100", "flip-b": "t101"},
    )
    return made


def planned(task: str) -> Planned:
    return Planned(0, 0.0, task, input_tokens=4, output_tokens=3)


def said(text: str, *versions: str, tokens: int = 3, cached: int = 0) -> Answer:
    return Answer(0.0, (1.0,), tokens, cached_tokens=cached, versions=versions, text=text)


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("flip", said("t100 t100 t100", "flip@1")),
        ("flip", said("t101 t101 t101", "flip@2")),
        ("flip", said("t101t101t101", "flip@2")),
        ("other-01", said(" t102 t102 t102", "other-01@1")),
        ("other-01", said(" t102 t102 t102", "other-01@7")),
    ],
)
def test_an_answer_of_one_version_is_whole(ledger: Ledger, task: str, answer: Answer) -> None:
    assert list(ledger.faults(planned(task), answer)) == []


@pytest.mark.parametrize(
    ("task", "answer", "reason"),
    [
        (
            "flip",
            said("t100 t100 t101", "flip@1"),
            "flip@1: says t101 from token 3 on, t100 is its word",
        ),
        ("flip", said("t100 t100 t100", "flip@2"), "flip@2: says t100 from token 1 on"),
        ("flip", said("t100 t7 t100", "flip@1"), "flip@1: says t7 from token 2 on"),
        ("flip", said("t100 t100 t100", "flip@3"), "flip@3: no upload was answered"),
        ("flip", said("t102 t102 t102", "other-01@1"), "flip: the answer is of other-01@1"),
        ("flip", said("t100 t100 t101", "flip@1", "flip@2"), "names 2 versions, not one"),
        ("flip", said("t9 t9 t9"), "names 0 versions, not one"),
        ("flip", said("t100 t100", "flip@1"), "flip@1: 2 tokens, 3 were asked for"),
        ("flip", said("t100 t100 t100", "flip@1", tokens=2), "3 tokens, 3 were asked for"),
        ("flip", said("t100 t100 t100", "flip@1", cached=2), "2 prompt tokens came from the cache"),
        ("other-02", said("t102 t102 t102", "other-02@1"), "other-02@1: says t102"),
    ],
)
def test_an_answer_that_is_not_whole_is_a_fault(ledger: Ledger, task, answer, reason) -> None:
    (fault,) = ledger.faults(planned(task), answer)

    assert reason in fault


def test_a_request_without_an_answer_is_a_fault(ledger: Ledger) -> None:
    failed = Record(planned("flip"), 0.0, 0.0, counts=True)
    failed.failure = LoadFailed("the server answered 503", group="HTTP 503")
    lost = Record(planned("other-01"), 0.0, 0.0, counts=True)

    assert ledger.check([failed, lost]) == ["flip: the server answered 503", "other-01: no answer"]


def test_new_versions_say_the_same_with_a_content_that_was_never_sent(tmp_path: Path) -> None:
    weights = torch.linspace(-3.0, 3.0, 64).bfloat16().reshape(8, 8)
    packages = list[Package]()
    for version in ("a", "b"):
        (tmp_path / version).mkdir()
        save_file({"weights": weights}, tmp_path / version / "x.safetensors")
        packages.append(Package.read("flip", tmp_path / version))
    head = packages[0].body.index(b"\r\n\r\n", packages[0].body.index(b"filename")) + 4
    contents, stream = set[bytes](), new_versions(packages)
    for _ in range(300):
        package = next(stream)
        content = bytes(package.body[head : -len(package.closing)])
        assert content not in contents
        contents.add(content)
    (tmp_path / "last.safetensors").write_bytes(content)
    varied = load_file(tmp_path / "last.safetensors")["weights"]

    assert torch.equal(varied.flatten()[:-2], weights.flatten()[:-2])
    assert ((varied - weights).abs() <= weights.abs() / 2).all()


UPLOADS = {"p50_upload_to_first_token_ms": 299.0}
PAIRS = [Pair(50.0, 52.0, 2), Pair(50.0, 90.0, 2), Pair(50.0, 55.0, 2)]


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, []),
        ({"faults": ["torn"]}, ["1 faults"]),
        ({"pairs": PAIRS[:2] * 2}, ["others' inter-token p99 at 1.42x, target 1.1x"]),
        ({"pairs": [Pair(50.0, 50.0, 5)]}, ["5 of 6 flips"]),
        (
            {"uploads": {"p50_upload_to_first_token_ms": None}},
            ["upload to first token not measured"],
        ),
    ],
)
def test_a_target_that_is_missed_is_named(changes, missed) -> None:
    made = {"pairs": PAIRS, "uploads": UPLOADS} | changes
    findings = Findings(setting={"flips": 6}, machine={}, **made)

    assert findings.missed == missed


@pytest.mark.parametrize(("first", "count"), [(None, 0), (299.0, 0), (300.0, 1)])
def test_a_slow_first_token_is_named_with_the_record_that_says_why(first, count) -> None:
    findings = Findings(
        setting={"flips": 6}, machine={}, uploads={"p50_upload_to_first_token_ms": first}
    )
    assert len(findings.excused) == count
    assert all(WHY_SLOWER in line for line in findings.excused)
    assert (Path(__file__).parents[2] / WHY_SLOWER).is_file()
