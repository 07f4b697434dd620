from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from oneplusn.loadtest import growth, options
from oneplusn.loadtest.checks import check
from oneplusn.loadtest.fixtures import SHAPES
from oneplusn.loadtest.growth import ADAPTERS, KEPT, plans, quick
from oneplusn.loadtest.growth_model import POSITIONS, RANK, adapters, build
from oneplusn.loadtest.mistake import Mistake

GROWTH = [sys.executable, "-P", "-m", "oneplusn.loadtest.growth"]
PLANS = plans(adapters(ADAPTERS))


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("shortened", [False, True])
def test_every_curve_is_a_sweep_that_the_model_has_room_for(name: str, shortened: bool) -> None:
    parser = argparse.ArgumentParser()
    options.declare(parser)
    plan = quick(PLANS[name]) if shortened else PLANS[name]

    for more in plan.loads.values():
        args = parser.parse_args(["sweep", "http://h", "--over", plan.over, *plan.same, *more])
        check(args)
        kind, values = args.over
        longest = values[-1] if kind == "input-tokens" else args.input_tokens.high
        assert longest + args.output_tokens.high <= POSITIONS
        if kind == "tasks":
            assert values[-1] <= len(args.tasks) == ADAPTERS
        if kind == "concurrency":
            assert values[-1] <= ADAPTERS


def test_the_model_takes_long_prompts_and_its_loras_are_of_one_rank(tmp_path: Path) -> None:
    build(tmp_path, SHAPES["tiny"], 3)

    config = json.loads((tmp_path / "base" / "config.json").read_text(encoding="utf-8"))
    assert config["max_position_embeddings"] == POSITIONS
    assert adapters(3) == ["lora-00", "lora-01", "lora-02"]
    ranks = [
        json.loads((tmp_path / name / "adapter_config.json").read_text(encoding="utf-8"))["r"]
        for name in adapters(3)
    ]
    assert ranks == [RANK] * 3


def curve(rate: float) -> dict:
    points = [
        {**dict.fromkeys(KEPT, 1.0), "value": value, "slo": None, "warnings": [],
         "output_throughput_while_sending": rate * value}
        for value in (1, 8)
    ]  # fmt: skip
    return {
        "title": f"At {rate:g}",
        "over": "concurrency",
        "date": "2026-01-01",
        "setting": "here",
        "lines": {"bare base": points, "a LoRA per client": points},
    }


def test_a_curve_that_is_measured_anew_replaces_its_own_and_no_other(tmp_path: Path) -> None:
    for name, rate in (("context", 5.0), ("concurrency", 7.0), ("context", 9.0)):
        growth._keep(tmp_path, name, curve(rate))

    known = json.loads((tmp_path / "growth.json").read_text(encoding="utf-8"))
    assert list(known) == ["concurrency", "context"]
    assert [found["title"] for found in known.values()] == ["At 7", "At 9"]
    page = (tmp_path / "growth.md").read_text(encoding="utf-8")
    assert page.index("## At 7") < page.index("## At 9")
    assert "| 8 | 72.00 |" in page
    assert "| 8 | 40.00 |" not in page
    height, width, _ = imread(tmp_path / "growth.png").shape
    assert width > height > 500


POINT = {"value": 4.0, "interrupted": False, "errors": [], "failed": 0, "completed": 9}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"interrupted": True}, "a curve was interrupted"),
        ({"completed": 0}, "no request was answered in time at 4"),
        (
            {"failed": 2, "errors": [{"examples": ["the server answered 500"]}]},
            "2 requests failed at 4, nothing is kept of the curve: the server answered 500",
        ),
    ],
)
def test_a_curve_with_a_fault_is_not_kept(fault: dict, reason: str) -> None:
    growth._refuse_faults([POINT])
    with pytest.raises(Mistake, match=reason):
        growth._refuse_faults([POINT, POINT | fault])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "required: --out"),
        (["--out", "x", "--curves", "context,speed"], "no curve speed; there are concurrency"),
        (["--out", "x", "--threads", "0"], "--threads 0 is below 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments: list[str], reason: str) -> None:
    done = subprocess.run([*GROWTH, *arguments], capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert reason in done.stderr


@pytest.mark.e2e
@pytest.mark.slow
def test_a_quick_run_measures_every_curve(tmp_path: Path) -> None:
    done = subprocess.run(
        [*GROWTH, "--quick", "--threads", "1", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    known = json.loads((tmp_path / "growth.json").read_text(encoding="utf-8"))
    assert list(known) == list(PLANS)
    for found in known.values():
        for points in found["lines"].values():
            assert [point["failed"] for point in points] == [0, 0]
            assert min(point["completed"] for point in points) > 0
    assert (tmp_path / "growth.png").stat().st_size > 10_000
