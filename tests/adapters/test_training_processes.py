"""Training in processes of their own: several at once, and what the demo's files train to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from oneplusn.adapters.files import read_adapter
from oneplusn.adapters.training.record import TrainingRecord
from oneplusn.adapters.training.run import Options, run
from oneplusn.demo.build import CONFIGS, accuracy
from oneplusn.demo.corpus import tasks_of
from oneplusn.demo.tasks import CLUSTERS
from oneplusn.server.engine.llm import Engine
from oneplusn.server.engine.model import demo_data
from tolerances import assert_close
from training_cases import config, content, rows, save_base, write_rows

SCRIPT = Path(__file__).parents[1] / "training_process.py"


@pytest.fixture
def folder(tmp_path):
    save_base(tmp_path / "base")
    write_rows(tmp_path / "train.jsonl", rows())
    write_rows(tmp_path / "validation.jsonl", rows(["fc", "ga", "ed"]))
    return tmp_path


def distributed(folder, *flags, **changes):
    path = folder / "two.yaml"
    path.write_text(yaml.safe_dump(content(folder, name="two", **changes)))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.Popen(
        [sys.executable, *launch, str(SCRIPT), str(path), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        return *process.communicate(timeout=180), process.returncode
    except subprocess.TimeoutExpired:
        process.terminate()  # it takes its workers along
        process.wait()
        raise


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_two_processes_train_what_one_trains_with_twice_the_batch(folder):
    short = {"steps": 4, "checkpoint_every": 2}
    said, errors, code = distributed(folder, training={"batch_size": 2, **short})
    assert code == 0, errors
    assert said.count("two: bundle in") == 1
    one = run(config(folder, training={"batch_size": 4, **short}), Options(say=lambda _: None))
    two = folder / "runs" / "two"
    histories = [
        TrainingRecord.load(path / "record.json").history for path in (two, one[0].bundle.parent)
    ]
    figures = [
        torch.tensor([row[key] for row in history for key in sorted(row) if "loss" in key])
        for history in histories
    ]
    assert_close(*figures)
    # Resumed from its first checkpoint, it ends the same.
    digest = read_adapter(two / "bundle", name="two").digest
    for name in ("bundle", "checkpoints/checkpoint-4"):
        (two / name).rename(folder / Path(name).name)
    _, errors, code = distributed(folder, "--resume", training={"batch_size": 2, **short})
    assert code == 0, errors
    assert read_adapter(two / "bundle", name="two").digest == digest


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_the_demos_files_train_what_ships(cluster, tmp_path):
    """As docs/training.md says it, for some minutes a cluster; 512 inputs, of which ten may err."""
    for line in (
        ["oneplusn.demo.corpus", "demo-data"],
        ["oneplusn.cli", "train", str(CONFIGS / f"{cluster}.yaml")],
    ):
        subprocess.run([sys.executable, "-P", "-m", *line], cwd=tmp_path, check=True)
    shipped = json.loads((demo_data() / "accuracy.json").read_text())
    bundle = tmp_path / "demo-runs" / cluster / "bundle"
    with Engine(demo_data() / "base", adapters={cluster: bundle}, threads=1) as engine:
        again = accuracy(engine, tasks_of(cluster), shipped["n"], adapted=True)
    for row in shipped["tasks"]:
        if row["cluster"] == cluster:
            assert again[row["task"]] >= row["accuracy"] - 0.02
