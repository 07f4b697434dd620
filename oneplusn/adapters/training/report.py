"""Write what a training did as a page: `report.md` with its plots beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml

from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.training.gate_figures import gates_by_layer, gates_per_task
from oneplusn.adapters.training.plots import (
    draw_curves,
    draw_heat_map,
    draw_heat_maps,
    draw_tasks,
)
from oneplusn.adapters.training.record import TrainingRecord

REPORT_FILE = "report.md"
LOSS, BASE = "loss", "base_"

METRICS = {"loss": "loss", "exact_match": "exact match"}
"""Metrics that have a column and a panel, in their order, with their titles."""


def write_report(folder: Path, record: TrainingRecord, bundle: Bundle) -> Path:
    """Write `report.md` and its PNG files; files of an earlier report are replaced.

    Args:
        folder: where; it is there already.
        record: what was trained, how, and what came out.
        bundle: what came out.

    Returns:
        The path of `report.md`.
    """
    sections = [
        _heading(record, bundle),
        _tasks(folder, record),
        _curves(folder, record),
        _gates(folder, record, bundle),
        _settings(record),
    ]
    path = folder / REPORT_FILE
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


def _heading(record: TrainingRecord, bundle: Bundle) -> str:
    parameters = record.parameters
    facts = {
        "tasks": f"{len(record.tasks)}: {', '.join(record.tasks)}",
        "parameters": (
            f"{parameters.total:,}: {parameters.experts:,} of experts,"
            f" {parameters.gates:,} of gates"
        ),
        "experts": f"{len(bundle.experts)} at {len(bundle.modules)} linears",
        "bundle": f"`{bundle.digest}`",
        "base": f"`{bundle.base}`" if bundle.base else "unknown",
        "seed": str(record.seed),
        "time": f"{record.seconds:,.0f} s",
        "hardware": record.hardware,
        "versions": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
    }
    return f"# Training report: {record.method}\n\n{_table(('', ''), facts.items())}"


def _tasks(folder: Path, record: TrainingRecord) -> str:
    title = "## Tasks"
    measured = [task for task in record.tasks if task in record.metrics]
    metrics = [name for name in METRICS if any(name in record.metrics[task] for task in measured)]
    if not metrics:
        return f"{title}\n\nNothing was measured: the run had no validation data."
    pairs = {
        METRICS[name]: {
            task: (record.metrics[task][BASE + name], record.metrics[task][name])
            for task in measured
            if {name, BASE + name} <= record.metrics[task].keys()
        }
        for name in metrics
    }
    draw_tasks(folder / "report-tasks.png", {name: pair for name, pair in pairs.items() if pair})
    header = ["task"]
    for name in metrics:
        header += [METRICS[name], f"{METRICS[name]}, bare base"]
    columns = [key for name in metrics for key in (name, BASE + name)]
    rows = [[task, *_cells(record.metrics[task], columns)] for task in measured]
    return "\n\n".join(
        [
            title,
            "On the validation data; loss in nats per completion token, the base without adapter"
            " beside it.",
            _table(header, [*rows, *_summary(record, measured, columns)]),
            "![metrics of every task](report-tasks.png)",
        ]
    )


def _cells(values: Mapping[str, float], columns: Iterable[str]) -> list[str]:
    return [f"{values[key]:.4f}" if key in values else "-" for key in columns]


def _summary(
    record: TrainingRecord, tasks: Sequence[str], columns: Sequence[str]
) -> list[list[str]]:
    """Return the rows of the mean and the worst task."""
    found: dict[str, list[float]] = {
        key: [record.metrics[task][key] for task in tasks if key in record.metrics[task]]
        for key in columns
    }
    means = {key: float(np.mean(values)) for key, values in found.items() if values}
    worst = {
        key: max(values) if key.endswith(LOSS) else min(values)
        for key, values in found.items()
        if values
    }
    return [
        ["**mean**", *_cells(means, columns)],
        ["**worst**", *_cells(worst, columns)],
    ]


def _curves(folder: Path, record: TrainingRecord) -> str:
    title = "## Curves"
    both = {"training": _series(record, "loss"), "validation": _series(record, "eval_loss")}
    validated = {task: _series(record, f"eval_{task}_loss") for task in record.tasks}
    trained = {task: _series(record, f"{task}_loss") for task in record.tasks}
    by_task = validated if any(steps for steps, _ in validated.values()) else trained
    kind = "validation" if by_task is validated else "training"
    panels = {"loss": both, f"{kind} loss by task": by_task}
    panels = {
        name: {curve: points for curve, points in curves.items() if points[0]}
        for name, curves in panels.items()
    }
    panels = {name: curves for name, curves in panels.items() if curves}
    if not panels:
        return f"{title}\n\nNothing was logged."
    draw_curves(folder / "report-curves.png", panels)
    return f"{title}\n\n![loss over the steps](report-curves.png)"


def _series(record: TrainingRecord, key: str) -> tuple[list[float], list[float]]:
    """Return steps and values of what was logged under a key; a log scale shows no 0."""
    rows = [row for row in record.history if key in row and "step" in row and row[key] > 0]
    return [row["step"] for row in rows], [row[key] for row in rows]


def _gates(folder: Path, record: TrainingRecord, bundle: Bundle) -> str:
    title = "## Gates"
    if not record.parameters.gates:
        return f"{title}\n\n{record.method} has no gates that learn."
    premixed = _premixed(bundle)
    if premixed:
        return (
            f"{title}\n\nThe factors were mixed at export into one LoRA for each task, so the"
            " bundle has no gates to show."
        )
    experts = [expert.name for expert in bundle.experts]
    layers = {name: rows.double().numpy() for name, rows in gates_by_layer(bundle).items()}
    mean = np.mean(list(layers.values()), axis=0)
    draw_heat_map(
        folder / "report-gates.png", mean, bundle.tasks, experts, "gates, mean over the layers"
    )
    parts = [
        title,
        "Weights of the experts (columns) in the tasks (rows), scales left out.",
        "![mean gates](report-gates.png)",
    ]
    if any(not np.array_equal(rows, mean) for rows in layers.values()):
        path = folder / "report-gates-layers.png"
        draw_heat_maps(path, {f"layer {n}": v for n, v in layers.items()}, bundle.tasks, experts)
        parts.append("![gates of every layer](report-gates-layers.png)")
        parts.append("Panels without names have the rows and columns of the mean.")
    else:
        parts.append("All layers have the same gates.")
    return "\n\n".join([*parts, _gate_table(bundle)])


def _premixed(bundle: Bundle) -> bool:
    """Say whether every task has one expert of its own and nothing else."""
    return all(
        expert.owner == task for expert, task in zip(bundle.experts, bundle.tasks, strict=False)
    ) and len(bundle.experts) == len(bundle.tasks)


def _gate_table(bundle: Bundle) -> str:
    figures = gates_per_task(bundle)
    header = ["task", "experts used", "entropy", "effective experts", "share of common experts"]
    rows = [
        [f.task, str(f.num_used), f"{f.entropy:.3f}", f"{f.effective:.2f}", f"{f.common:.1%}"]
        for f in figures
    ]
    text = (
        "Entropy of the weights' shares in nats, mean over all gates; effective experts is its"
        " exponential."
    )
    if bundle.method == "c-poly":
        header.append("off-diagonal mass of W_B")
        for row, figure in zip(rows, figures, strict=True):
            row.append(f"{figure.borrowed:.1%}")
        mean = np.mean([figure.borrowed for figure in figures])
        text += (
            " The off-diagonal mass is the weight of other tasks' own experts among all own"
            f" experts, {mean:.1%} in the mean; 0 unless the method lets tasks borrow."
        )
    return f"{text}\n\n{_table(header, rows)}"


def _settings(record: TrainingRecord) -> str:
    plain = json.loads(json.dumps(record.settings, default=str))
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    return f"## Settings\n\n```yaml\n{text}```"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
