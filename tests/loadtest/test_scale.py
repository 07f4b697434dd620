from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from oneplusn.loadtest import scale_parts, scale_report
from oneplusn.loadtest.fixtures import SHAPES
from oneplusn.loadtest.scale_model import (
    ADAPTED,
    CLUSTER,
    FORMS,
    LORA,
    narrow,
    packages,
    task_names,
    uploads,
    writer,
)
from oneplusn.loadtest.scale_parts import ALL, HOT, PARTS, Plan
from oneplusn.loadtest.scale_server import Data, grown, page_bytes, twin

SCALE = [sys.executable, "-P", "-m", "oneplusn.loadtest.scale"]


def plan(**given: object) -> Plan:
    whole = {
        "folder": Path("x"), "model": "tiny", "sizes": (4, 8, 64), "resident": 6, "streams": 4,
        "many": 8, "requests": 2, "prompt": 8, "output": 8, "threads": 1, "rounds": 1,
    }  # fmt: skip
    return Plan(**whole | given)


@pytest.mark.parametrize(
    ("form", "tasks", "expected"),
    [
        (LORA, 2, {"lora-00000": ["lora-00000"], "lora-00001": ["lora-00001"]}),
        (CLUSTER, 1, {"cluster-0000": ["cluster-0000-task-00"]}),
    ],
)
def test_uploads_come_to_the_number_of_tasks(form: str, tasks: int, expected: dict) -> None:
    assert uploads(form, tasks) == expected


@pytest.mark.parametrize(("form", "count"), [(LORA, 33), (CLUSTER, 3)])
def test_every_task_is_in_one_upload(form: str, count: int) -> None:
    assert len(uploads(form, 33)) == count
    names = task_names(form, 33)
    assert len(set(names)) == len(names) == 33


@pytest.mark.parametrize("form", FORMS)
def test_uploads_differ_and_are_the_same_when_made_again(form: str) -> None:
    shape, tasks = narrow("tiny"), uploads(form, 20)
    names = list(tasks)[:2]
    first, again = (list(packages(names, writer(form, shape, tasks))) for _ in range(2))

    def contents(package) -> bytes:
        return bytes(package.body).replace(package.boundary.encode(), b"")

    assert [*map(contents, first)] == [*map(contents, again)]
    if len(names) > 1:
        assert contents(first[0])[-5000:] != contents(first[1])[-5000:]
    assert all(name.encode() in contents(first[0]) for name in ("q_proj", "v_proj"))
    assert b"k_proj" not in contents(first[0])


def test_few_linears_are_adapted_and_the_base_stays() -> None:
    shape = narrow("small")
    assert tuple(shape.linears) == ADAPTED
    assert (shape.hidden, shape.layers) == (SHAPES["small"].hidden, SHAPES["small"].layers)
    # 16 rows of A and B at all sites, and 256 gates of 4 bytes each.
    tiny = 16 * 2 * ((192 + 128) + (64 + 64) + (128 + 256) + (128 + 64)) + 4 * 1024
    assert page_bytes(SHAPES["tiny"]) == 2 * tiny


def test_the_same_tasks_come_from_all_over_and_the_others_in_turn() -> None:
    (how, hot), (other, everything) = scale_parts._askings(plan(), 64, 1)

    assert (how, other) == (HOT, ALL)
    assert hot == ["lora-00000", "lora-00016", "lora-00032", "lora-00048"]
    assert sorted(everything) == task_names(LORA, 64)
    (_, _), (_, before) = scale_parts._askings(plan(), 64, 0)
    assert everything == [*before[8:], *before[:8]]
    assert [how for how, _ in scale_parts._askings(plan(), 4, 0)] == [HOT]


def test_popular_tasks_are_the_same_in_every_round() -> None:
    rounds = [[next(draws) for _ in range(400)]
              for draws in (scale_parts._popular(64, number) for number in range(2))]  # fmt: skip
    most = [max(set(asked), key=asked.count) for asked in rounds]

    assert rounds[0] != rounds[1]
    assert most[0] == most[1]


def test_a_twin_shares_contents_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for name in ("blobs/a", "images/b", "lock", "registry.db"):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)

    copy = twin(Data(folder, 5), "again")

    assert copy == Data(tmp_path / "again", 5)
    for name in ("blobs/a", "images/b", "lock", "registry.db"):
        is_shared = (copy.folder / name).samefile(folder / name)
        assert is_shared == (name[:5] in ("blobs", "image")), name
        assert (copy.folder / name).read_text() == name


def test_what_was_not_there_has_grown_from_zero() -> None:
    assert grown({}, {"loads": 3.0}, "loads") == 3
    assert grown({"loads": 1.0}, {"loads": 3.0}, "loads") == 2
    assert grown({}, {}, "loads") == 0


def run(server: str, rate: float, asked: str = HOT) -> dict:
    return {"server": server, "asked": asked, "output_throughput": rate}


ROUNDS = [
    *(run("4", 100.0), run("64", 90.0), run("64", 50.0, ALL)),
    *(run("64", 60.0), run("64", 30.0, ALL), run("4", 50.0)),
    *(run("4", 10.0), run("64", 9.7)),
]


def test_shares_are_of_the_first_servers_load_in_the_same_round() -> None:
    shares = scale_report._shares(ROUNDS)

    assert shares == {("4", HOT): 1.0, ("64", HOT): 0.97, ("64", ALL): 0.55}


@pytest.mark.parametrize(
    ("known", "missed"),
    [
        ({"registered": {"runs": ROUNDS}}, []),
        (
            {"registered": {"runs": [run("4", 100.0), run("64", 90.0)]}},
            ["throughput with the most tasks is 90.0% of that with the fewest"],
        ),
        (
            {"streams": {"runs": [{"api_cpu_share": 0.3}]}},
            ["the API's process takes 30% of a core"],
        ),
        (
            {"host": {"runs": [{"plan": [{"what": "p", "how": "h", "p50_ms": 0.3}], "sampler": [
                {"what": "s", "how": "compiled", "p50_ms": 2.0},
                {"what": "s", "how": "torch", "p50_ms": 9.0}]}]}},
            ["p, h: 0.300 ms, and 0.2 are allowed"],
        ),
    ],
)  # fmt: skip
def test_targets_that_are_missed_are_named(known: dict, missed: list[str]) -> None:
    assert scale_report.unreached(known) == missed


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "required: --out"),
        (["--out", "x", "--parts", "zipf,speed"], "no part speed; there are register"),
        (["--out", "x", "--rounds", "0"], "--threads, --rounds and --requests are 1 or more"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments: list[str], reason: str) -> None:
    done = subprocess.run([*SCALE, *arguments], capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert reason in done.stderr


@pytest.mark.e2e
@pytest.mark.slow
def test_a_quick_run_measures_every_part(tmp_path: Path) -> None:
    done = subprocess.run(
        [*SCALE, "--quick", "--threads", "1", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    known = json.loads((tmp_path / "scale.json").read_text(encoding="utf-8"))
    assert list(known) == list(PARTS)
    page = (tmp_path / "scale.md").read_text(encoding="utf-8")
    assert all(f"## {title}" in page for title, _ in scale_report.PAGES.values())
