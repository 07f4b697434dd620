"""What the three reports share: tables, comparisons seed by seed, and where they were made."""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from experiments.bed import base_config
from experiments.run import TEST, VALIDATION, Outcome

LIBRARIES = ("oneplusn", "torch", "transformers", "accelerate", "scipy", "scikit-learn")

NEGLIGIBLE = 0.01
"""Differences of mean accuracy below this in every seed are called none."""

Groups = Mapping[str, Sequence[Outcome]]
"""Setting -> one outcome per seed, in the order of the seeds."""


def surroundings(outcomes: Sequence[Outcome]) -> str:
    """Say in one paragraph what was run, on what, with which versions and seeds."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if "model name" in line), model)
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    seeds = sorted({outcome.run.seed for outcome in outcomes})
    different = {outcome.run.key: outcome for outcome in outcomes}.values()
    minutes = sum(outcome.seconds for outcome in different) / 60
    first = outcomes[0].run
    return (
        f"Hardware: {model}, one thread a run, no GPU. python {platform.python_version()},"
        f" {versions}. Base: {type(base_config()).__name__.removesuffix('Config')} of"
        f" {base_config().num_hidden_layers} layers, width {base_config().hidden_size}, frozen;"
        f" all its linears adapted. {first.examples} training examples a task, batch 32,"
        f" {first.steps} steps of AdamW, gradients clipped to a norm of 0.5."
        f" {VALIDATION} validation and {TEST} test examples a task. Seeds"
        f" {', '.join(map(str, seeds))}; each has its own tasks, data and initial weights."
        f" {len(different)} runs, {minutes:.0f} minutes of processor time."
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Render a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def mean(values: Iterable[float]) -> float:
    """Return the mean."""
    found = list(values)
    return sum(found) / len(found)


def spread(values: Sequence[float]) -> str:
    """Write mean and range: `0.95 [0.93, 0.97]`."""
    return f"{mean(values):.3f} [{min(values):.2f}, {max(values):.2f}]"


def group(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    """Gather outcomes by label, ordered by seed."""
    found = defaultdict(list)
    for outcome in sorted(outcomes, key=lambda outcome: outcome.run.seed):
        found[outcome.run.label].append(outcome)
    return found


def seed_values(outcomes: Iterable[Outcome], value: str) -> list[float]:
    """Return an attribute of every outcome that has it."""
    found = (getattr(outcome, value) for outcome in outcomes)
    return [each for each in found if each is not None]


def compare(groups: Groups, pairs: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Compare settings seed by seed: what, difference of means, of worst tasks, and a verdict."""
    rows = []
    for left, right in pairs:
        seeds = list(zip(groups[left], groups[right], strict=True))
        means = [x.mean - y.mean for x, y in seeds]
        worst = [x.worst - y.worst for x, y in seeds]
        rows.append([left, right, _signed(means), _signed(worst), verdict(means)])
    return rows


def by_rates(found: Groups) -> str:
    """Table the validation accuracy of every setting at every pair of rates, the best in bold."""
    pairs = sorted({_rates(outcome) for outcomes in found.values() for outcome in outcomes})
    rows = []
    for label, outcomes in found.items():
        scores = {
            pair: [outcome.chosen_by for outcome in outcomes if _rates(outcome) == pair]
            for pair in pairs
        }
        best = max(pairs, key=lambda pair: mean(scores[pair]) if scores[pair] else 0.0)
        cells = [spread(scores[pair]) if scores[pair] else "-" for pair in pairs]
        cells = [f"**{c}**" if p == best else c for p, c in zip(pairs, cells, strict=True)]
        rows.append([label, *cells])
    return table(["method", *(f"{rate:g} / {gates:g}" for rate, gates in pairs)], rows)


def _rates(outcome: Outcome) -> tuple[float, float]:
    return outcome.run.rate, outcome.run.gate_rate


def by_seed(found: Groups) -> str:
    """Table the mean over the tasks and the worst task of every setting and seed."""
    seeds = [outcome.run.seed for outcome in next(iter(found.values()))]
    rows = [
        [
            label,
            "{:g} / {:g}".format(*_rates(outcomes[0])),
            *(f"{outcome.mean:.3f} / {outcome.worst:.2f}" for outcome in outcomes),
        ]
        for label, outcomes in found.items()
    ]
    return table(["method", "rates", *(f"seed {seed}" for seed in seeds)], rows)


def _signed(values: Sequence[float]) -> str:
    return f"{mean(values):+.3f} [{min(values):+.2f}, {max(values):+.2f}]"


def verdict(differences: Sequence[float]) -> str:
    """Say whether a difference is there: of one sign in every seed, and not negligible in all."""
    if max(map(abs, differences)) < NEGLIGIBLE:
        return "no difference"
    if min(differences) > 0 or max(differences) < 0:
        word = "better" if differences[0] > 0 else "worse"
        return f"{word} in all {len(differences)} seeds"
    return "no difference: the sign depends on the seed"


COMPARE_HEAD = ("this", "against", "mean accuracy", "worst task", "verdict")


def bars(axes: Axes, groups: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Draw groups of bars, level -> label -> a value per seed; dots are the seeds."""
    levels = list(groups)
    labels = list(groups[levels[0]])
    width = 0.8 / len(labels)
    for place, label in enumerate(labels):
        at = [index - 0.4 + (place + 0.5) * width for index in range(len(levels))]
        values = [groups[level][label] for level in levels]
        axes.bar(at, [mean(v) for v in values], width * 0.92, label=label, color=f"C{place}")
        for x, seeds in zip(at, values, strict=True):
            axes.plot([x] * len(seeds), seeds, "k.", markersize=3)
    axes.set_xticks(range(len(levels)), levels)
    axes.set_ylim(0, 1.02)
    axes.grid(axis="y", alpha=0.3)


def save(path: Path) -> None:
    """Write the current figure as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.tight_layout()
    plt.savefig(path, dpi=110, metadata={"Software": None})
    plt.close()
