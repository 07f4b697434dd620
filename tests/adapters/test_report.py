"""The report of a training: what it says, and plots for few tasks and for many."""

from __future__ import annotations

import math
import re
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from oneplusn.adapters.bundle import Bundle, Expert, ModuleDelta
from oneplusn.adapters.methods import make_method
from oneplusn.adapters.methods.budget import Budget
from oneplusn.adapters.training.gate_figures import gates_by_layer, gates_per_task
from oneplusn.adapters.training.plots import draw_affinity
from oneplusn.adapters.training.record import TrainingRecord
from oneplusn.adapters.training.report import write_report

MAX_PIXELS = 2600


def record(method, tasks, **changes):
    """A training of 20 steps in which every task gets better."""
    history = [{"step": step, "loss": 2 / step} for step in (5, 10, 15, 20)]
    history += [
        {"step": step, "eval_loss": 3 / step} | {f"eval_{task}_loss": 3 / step for task in tasks}
        for step in (10, 20)
    ]
    bare = {"base_loss": 4.0, "base_exact_match": 0.0}
    metrics = {
        task: {"loss": 0.1 * i, "exact_match": 1 - 0.1 * i, **bare}
        for i, task in enumerate(tasks, start=1)
    }
    made = TrainingRecord(
        method=method,
        tasks=tuple(tasks),
        parameters=Budget(1200, 34),
        settings={"base": "demo", "method": {"name": method, "rank": 2}, "tasks": tuple(tasks)},
        history=history,
        metrics=metrics,
        hardware="two cores",
        versions={"torch": "2.13.0"},
        seconds=61.4,
        seed=7,
    )
    return replace(made, **changes)


def trained(name, tasks, *, layers=3, **settings):
    """A bundle of a method with random parameters at one linear of every layer."""
    torch.manual_seed(0)
    method = make_method(name, tasks, settings)
    modules = {}
    with torch.no_grad():
        for layer in range(layers):
            gate = method.gate(method.shared()).eval()
            for parameter in gate.parameters():
                parameter += torch.randn_like(parameter)
            delta = method.delta(8, 8)
            rows = gate()
            modules[f"model.layers.{layer}.self_attn.o_proj"] = delta.export(rows, torch.float32)
    return Bundle(name, tuple(tasks), method.exported_experts(), modules)


def literal(gates, path="model.layers.0.up_proj", ranks=(1, 1, 1)):
    """Two tasks, one common expert and an own one of each; `gates` is [2, 3]."""
    return {path: ModuleDelta(
        a=torch.ones(sum(ranks), 4),
        b=torch.ones(4, sum(ranks)),
        ranks=ranks,
        gate=torch.tensor(gates),
        scale=torch.ones(3),
    )}  # fmt: skip


def bundle(*modules, method="c-poly"):
    experts = (
        Expert("common", "common", None, 1),
        Expert("a-0", "own", "a", 1),
        Expert("b-0", "own", "b", 1),
    )
    merged = {path: delta for each in modules for path, delta in each.items()}
    return Bundle(method, ("a", "b"), experts, merged)


def size_of(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_figures_of_gates_are_those_of_the_rows():
    rows = [[0.5, 0.5, 0.0], [0.5, -0.125, 0.375]]
    first, second = gates_per_task(bundle(literal(rows)))
    assert (first.task, first.num_used, first.borrowed) == ("a", 2, 0.0)
    assert first.entropy == pytest.approx(math.log(2))
    assert first.effective == pytest.approx(2)
    assert first.common == pytest.approx(0.5)
    assert (second.task, second.num_used) == ("b", 3)
    assert second.borrowed == pytest.approx(0.25), "of 0.5 over own experts, 0.125 is another's"
    assert second.common == pytest.approx(0.5)
    shares = (0.5, 0.125, 0.375)
    assert second.entropy == pytest.approx(-sum(p * math.log(p) for p in shares))


def test_a_layers_gates_are_the_mean_of_its_sites_each_once():
    one, other = [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], [[0.0, 1.0, 0.0], [0.0, 0.0, 0.5]]
    found = gates_by_layer(
        bundle(
            literal(one, "model.layers.0.q_proj"),
            literal(one, "model.layers.0.k_proj"),
            literal(other, "model.layers.0.o_proj"),
            literal(other, "model.layers.1.o_proj", ranks=(1, 0, 1)),
        )
    )
    assert {name: rows.tolist() for name, rows in found.items()} == {
        "0": [[0.5, 0.5, 0.0], [0.0, 0.0, 0.75]],
        "1": [[0.0, 0.0, 0.0], [0.0, 0.0, 0.5]],
    }


def test_the_report_says_what_was_trained_and_what_came_out(tmp_path):
    made = bundle(literal([[0.5, 0.5, 0.0], [0.5, -0.125, 0.375]]))
    path = write_report(tmp_path, record("c-poly", ("a", "b")), made)
    text = path.read_text()
    assert path == tmp_path / "report.md"
    for line in (
        "# Training report: c-poly",
        "| parameters | 1,234: 1,200 of experts, 34 of gates |",
        f"| bundle | `{made.digest}` |",
        "| seed | 7 |",
        "| time | 61 s |",
        "| hardware | two cores |",
        "| versions | torch 2.13.0 |",
        "| a | 0.1000 | 4.0000 | 0.9000 | 0.0000 |",
        "| **mean** | 0.1500 | 4.0000 | 0.8500 | 0.0000 |",
        "| **worst** | 0.2000 | 4.0000 | 0.8000 | 0.0000 |",
        "| a | 2 | 0.693 | 2.00 | 50.0% | 0.0% |",
        "| b | 3 | 0.974 | 2.65 | 50.0% | 25.0% |",
        "  rank: 2",
    ):
        assert line in text.splitlines()
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert shown == ["report-tasks.png", "report-curves.png", "report-gates.png"]
    assert {file.name for file in tmp_path.iterdir()} == {*shown, "report.md"}
    assert "All layers have the same gates." in text
    for name in shown:
        assert size_of(tmp_path / name) < (MAX_PIXELS, MAX_PIXELS)
        assert np.all(imread(tmp_path / name)[0, 0] == 1), "the paper is white"


@pytest.mark.parametrize(
    ("name", "count", "settings", "layers"),
    [
        ("cgc-lora", 2, {"num_common": 2, "rank": 1}, 3),
        ("cgc-lora", 32, {"num_common": 4, "rank": 1}, 8),
        ("c-poly", 12, {"num_common": 2, "rank": 1, "borrows": "all"}, 2),
    ],
)  # fmt: skip
def test_gates_of_every_layer_are_drawn_at_a_size_that_can_be_read(
    tmp_path, name, count, settings, layers
):
    tasks = [f"task-with-a-name-that-is-long-{i}" for i in range(count)]
    made = trained(name, tasks, layers=layers, **settings)
    text = write_report(tmp_path, record(name, tasks), made).read_text()
    assert "![gates of every layer](report-gates-layers.png)" in text
    assert ("off-diagonal mass of W_B" in text) == (name == "c-poly")
    for picture in tmp_path.glob("*.png"):
        width, height = size_of(picture)
        assert 100 < width < MAX_PIXELS
        assert 100 < height < MAX_PIXELS


@pytest.mark.parametrize(
    ("name", "settings", "gates", "expected"),
    [
        ("lora", {}, 0, "lora has no gates that learn."),
        ("poly", {"rank": 2}, 10, "the bundle has no gates to show"),
        ("c-poly", {"rank": 2, "mix": "factor"}, 10, "the bundle has no gates to show"),
    ],
    ids=["no gates", "mixed factors", "mixed factors of c-poly"],
)
def test_what_has_no_gates_shows_none(tmp_path, name, settings, gates, expected):
    tasks = ("a", "b")
    empty = record(name, tasks, metrics={}, history=[], parameters=Budget(100, gates))
    text = write_report(tmp_path, empty, trained(name, tasks, **settings)).read_text()
    assert expected in text
    assert "Nothing was measured: the run had no validation data." in text
    assert "Nothing was logged." in text
    assert [file.name for file in tmp_path.iterdir()] == ["report.md"]


def test_what_was_not_measured_is_a_dash(tmp_path):
    partly = {"a": {"loss": 0.5, "base_loss": 1.0, "exact_match": 1.0}, "b": {"loss": 0.25}}
    made = record("lora", ("a", "b", "c"), metrics=partly, parameters=Budget(9, 0))
    text = write_report(tmp_path, made, trained("lora", ("a", "b", "c"))).read_text()
    assert "| a | 0.5000 | 1.0000 | 1.0000 | - |" in text
    assert "| b | 0.2500 | - | - | - |" in text
    assert "| c |" not in text
    assert "| **worst** | 0.5000 | 1.0000 | 1.0000 | - |" in text


def test_losses_of_training_stand_in_for_a_validation(tmp_path):
    history = [{"step": s, "loss": 1.0, "a_loss": 0.5, "b_loss": 0.0} for s in (1, 2)]
    made = record("lora", ("a", "b"), history=history, metrics={}, parameters=Budget(9, 0))
    write_report(tmp_path, made, trained("lora", ("a", "b")))
    assert size_of(tmp_path / "report-curves.png")[0] > 800, "two panels"


@pytest.mark.parametrize("count", [2, 12, 300])
def test_a_dendrogram_fits_its_matrices(tmp_path, count):
    path = tmp_path / "affinity.png"
    merges = np.array([[0, 1, 0.5, 2], *([count + i, i + 2, 0.6, i + 3] for i in range(count - 2))])
    maps = {"affinity": np.eye(count), "direction": -np.eye(count)}
    draw_affinity(path, maps, [f"task-{i}" for i in range(count)], (merges, 0.55), [0] * count)
    width, height = size_of(path)
    assert width < 2 * MAX_PIXELS
    assert height < MAX_PIXELS
