"""E1, the conflict dial: what sharing gives where tasks agree, and costs where they do not.

    python -m experiments.e1 [--quick] [--jobs N] [--prefix 'nice -n 10']

Six ciphers of one arrangement agree on all letters but a fraction c. Every method has the same
number of parameters, and its learning rate is chosen on a validation split from the same three.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from experiments.bed import Pretraining, make_base
from experiments.grid import Grid, Plan, main
from experiments.report import (
    COMPARE_HEAD,
    bars,
    compare,
    group,
    save,
    seed_values,
    spread,
    surroundings,
    table,
)
from experiments.run import Outcome, Run

TUNED = 0.3
OTHERS = (1.0, 0.0)
RATES = (4e-3, 8e-3)
SEEDS = (0, 1, 2)
TASKS = 6

SHARED = "shared LoRA, r 12"
OWN = "LoRA per task, 6 x r 2"
POLY = "Poly, 6 x r 2"
MOE = "MOELoRA, 6 x r 2"
CGC = "CGC-LoRA, A 6, B 1, r 1"
CPOLY = "C-Poly, A 6, B 1, r 1"
GATED = (MOE, CGC, CPOLY)

# Twelve rank rows at every linear each. Gates are small beside them; their embedding is 8 wide.
METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    SHARED: ("shared-lora", {"rank": 12}),
    OWN: ("lora", {"rank": 2}),
    POLY: ("poly", {"num_skills": 6, "rank": 2}),
    MOE: (
        "moelora",
        {
            "num_experts": 6,
            "rank": 2,
            "gate_scope": "site",
            "embedding_dim": 8,
            "init_std": None,
        },
    ),
    CGC: ("cgc-lora", {"num_common": 6, "num_own": 1, "rank": 1, "embedding_dim": 8}),
    CPOLY: ("c-poly", {"num_common": 6, "num_own": 1, "rank": 1}),
}

TEXT = """
Six tasks take the same prompts: eight letters behind the tag of one arrangement (reverse). Each
task writes every letter as another one. All tasks share one substitution except a fraction **c** of
the letters, which each permutes anew. So at c = 0 all tasks are one; at c = 1 they share nothing
but the arrangement, and the same prompt has six right answers. Nothing in the prompt names the
task: only the adapter's task id does.

Every method has 12 rank rows at every linear. Where it has gates, those are at every site, made
from an embedding of width 8 in MOELoRA and CGC-LoRA; all factors A start alike. The learning rate
is the better of {rates} for the method, by validation accuracy at c = {tuned:g} in the mean over
the seeds, and the same at the other levels. Accuracy is the share of the answers' letters that are
right, teacher-forced, from factors rounded to bf16 as they are served; chance is 0.042. Figures are
means over the seeds with their range.
"""


SIMPLER = """
The same tasks over copy, beside a base that was trained on copying alone (220 steps): 12 examples a
task, 250 steps, every method at a rate of {rate:g}, not tuned. The test suite's small E1 is this,
at c = 0.3.
"""

HISTORY = """
What was changed on the way, and why: the number of examples (24) was set after trials with seed 0
at c = 0.3, where 32 were enough for one LoRA a task (0.94), and 16 too few for anything at c = 1.
The rates were first chosen by seed 0 alone among 0.004, 0.008 and 0.016; several methods took
0.016 and collapsed with the other seeds. So 0.016 was dropped for all methods, and the choice is
made over all seeds. Those runs are still in e1.jsonl, as is Poly (factor mix, 6 x r 2), which was
run with seed 0 only: 0.94 at c = 0.3.

Single trials on the bad case (seed 1, c = 0.3, MOELoRA, rate 0.004, 0.20 in the table): gates at
0.002 in place of 0.02 give 0.44, at a training loss of 0.02; 1,500 steps give 0.65, at a loss below
0.01 after 600 of them; copy in place of reverse gives 0.88. So what is learnt is learnt by heart,
and a tuned rate of the gates might change the order of the methods.
"""

SHORTER = """
Copy in place of reverse, 16 examples a task and 300 steps, c = 0.3: how far the figures above hang
on the amount of data and training.
"""

Levels = Mapping[float, Mapping[str, Sequence[Outcome]]]
"""Conflict -> method -> outcomes by seed."""


@dataclass(frozen=True, slots=True)
class Setup:
    """Hold what all methods have in common: arrangement, examples a task, and steps."""

    arrangement: str
    examples: int
    steps: int


MAIN = Setup("reverse", 24, 500)
SHORT = Setup("copy", 16, 300)
SIMPLE = Setup("copy", 12, 250)
SIMPLE_BASE = Pretraining(arrangements=("copy",), steps=220)
SIMPLE_RATE = 1e-2


def settings(conflicts: Sequence[float], setup: Setup = MAIN) -> list[Run]:
    """List level by level, method by method."""
    return [
        Run(
            label=label,
            method=method,
            settings=fields,
            family="ciphers",
            options={
                "cluster": "cipher",
                "arrangement": setup.arrangement,
                "count": TASKS,
                "conflict": conflict,
            },
            examples=setup.examples,
            steps=setup.steps,
        )
        for conflict in conflicts
        for label, (method, fields) in METHODS.items()
    ]


def at_level(outcomes: Sequence[Outcome], conflict: float) -> dict[str, list[Outcome]]:
    """Return the outcomes of one level by method."""
    return group(o for o in outcomes if o.run.options["conflict"] == conflict)


def report(
    outcomes: Sequence[Outcome],
    tried: Sequence[Outcome],
    short: Sequence[Outcome],
    simple: Sequence[Outcome],
    folder: Path,
) -> None:
    """Write e1.md and e1.png."""
    levels = sorted({outcome.run.options["conflict"] for outcome in outcomes})
    rates = " and ".join(f"{rate:g}" for rate in RATES)
    by_level = {level: at_level(outcomes, level) for level in levels}
    parts = ["# E1: the conflict dial", TEXT.format(rates=rates, tuned=TUNED)]
    parts += [surroundings(tried), "![accuracy by conflict](e1.png)"]
    for title, value in (("Mean over the tasks", "mean"), ("Worst task", "worst")):
        parts += [f"## {title}", _accuracies(by_level, value)]
    parts += [
        "## Seed by seed",
        _pairs(by_level),
        "## Learning rates",
        _rates_table(tried),
    ]
    parts += ["## Each seed at c = 0.3", _by_seed(at_level(outcomes, TUNED))]
    if short:
        parts += ["## Less data, fewer steps, a simpler arrangement", SHORTER]
        parts.append(_by_seed(group(short)))
    if simple:
        known = sorted({outcome.run.options["conflict"] for outcome in simple})
        copied = {level: at_level(simple, level) for level in known}
        copied = {level: each for level, each in copied.items() if len(each) == len(copied[TUNED])}
        parts += ["## A base that can only copy", SIMPLER.format(rate=SIMPLE_RATE)]
        parts += [_accuracies(copied, "mean"), "Worst task:", _accuracies(copied, "worst")]
        parts.append(_pairs(copied))
    parts += ["## How the setting was found", HISTORY]
    parts.append("`python -m experiments.e1` makes this page from [e1.jsonl](e1.jsonl).")
    (folder / "e1.md").write_text("\n\n".join(part.strip() for part in parts) + "\n")
    _, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for side, value in zip(axes, ("mean", "worst"), strict=True):
        bars(
            side,
            {
                f"c = {level:g}": {
                    label: seed_values(found[label], value) for label in _labels(by_level)
                }
                for level, found in by_level.items()
            },
        )
        side.set_title({"mean": "mean over tasks", "worst": "worst task"}[value])
    axes[0].set_ylabel("token accuracy")
    axes[1].legend(fontsize=8)
    save(folder / "e1.png")


def at_the_rates_of(tuned: Sequence[Outcome]) -> list[Plan]:
    """Plan the other levels, each method at the rate that it was given."""
    rates = {outcome.run.label: outcome.run.rate for outcome in tuned}
    return [
        Plan(f"E1, c = {run.options['conflict']:g}", [run], [rates[run.label]], SEEDS)
        for run in settings(OTHERS)
        if run.label in rates
    ]


def _labels(by_level: Levels) -> list[str]:
    """List the methods that were run at every level."""
    return [label for label in METHODS if all(label in found for found in by_level.values())]


def _accuracies(by_level: Levels, value: str) -> str:
    first = next(iter(by_level.values()))
    head = ["method", "parameters: experts + gates", *(f"c = {level:g}" for level in by_level)]
    rows = []
    for label in _labels(by_level):
        experts, gates = first[label][0].parameters
        cells = [spread(seed_values(found[label], value)) for found in by_level.values()]
        rows.append([label, f"{experts:,} + {gates:,}", *cells])
    return table(head, rows)


def _pairs(by_level: Levels) -> str:
    pairs = [(gated, plain) for gated in GATED for plain in (SHARED, OWN)]
    pairs += [(CGC, MOE), (CPOLY, MOE), (CPOLY, CGC), (POLY, MOE)]
    known = set(_labels(by_level))
    pairs = [pair for pair in pairs if set(pair) <= known]
    rows = [
        [f"{level:g}", *row] for level, found in by_level.items() for row in compare(found, pairs)
    ]
    return table(["c", *COMPARE_HEAD], rows)


def _rates_table(tried: Sequence[Outcome]) -> str:
    found = at_level(tried, TUNED)
    rows = [
        [label, *(_validated(found[label], rate) for rate in RATES)]
        for label in METHODS
        if label in found
    ]
    head = (f"validation accuracy at c = {TUNED:g}", *(f"rate {rate:g}" for rate in RATES))
    return table(head, rows)


def _validated(outcomes: Sequence[Outcome], rate: float) -> str:
    values = [outcome.chosen_by for outcome in outcomes if outcome.run.rate == rate]
    return spread(values) if values else "-"


def _by_seed(found: Mapping[str, Sequence[Outcome]]) -> str:
    seeds = [outcome.run.seed for outcome in next(iter(found.values()))]
    head = ["method", "rate", *(f"seed {seed}: mean / worst" for seed in seeds)]
    rows = [
        [
            label,
            f"{found[label][0].run.rate:g}",
            *(f"{outcome.mean:.3f} / {outcome.worst:.2f}" for outcome in found[label]),
        ]
        for label in METHODS
        if label in found
    ]
    return table(head, rows)


def run_simple(grid: Grid, only: str) -> list[Outcome]:
    """Run the grid beside a base that can only copy; its results have a file of their own."""
    base = make_base(grid.base.with_name("base-copy"), SIMPLE_BASE)
    results = grid.results.with_stem(f"{grid.results.stem}_copy")
    other = Grid(results, base, jobs=grid.jobs, chunk=grid.chunk, prefix=shlex.join(grid.prefix))
    plan = Plan("E1, copy", settings([TUNED, *OTHERS], SIMPLE), [SIMPLE_RATE], SEEDS)
    plan.execute(other, only)
    return plan.finished(other)[0]


def run(grid: Grid, args: argparse.Namespace) -> None:
    """Train what is missing, then write tables and plots."""
    if args.quick:
        plan = Plan("E1", settings([TUNED]), RATES[1:], SEEDS[:1])
        plan.execute(grid, args.only)
        report(*plan.finished(grid), [], [], grid.results.parent)
        return
    tuned = Plan("E1", settings([TUNED]), RATES, SEEDS)
    short = Plan("E1, short", settings([TUNED], SHORT), RATES, SEEDS)
    tuned.execute(grid, args.only)
    outcomes, tried = tuned.finished(grid)
    for other in at_the_rates_of(outcomes):
        other.execute(grid, args.only)
        found, _ = other.finished(grid)
        outcomes, tried = outcomes + found, tried + found
    short.execute(grid, args.only)
    simple = run_simple(grid, args.only)
    report(outcomes, tried, short.finished(grid)[0], simple, grid.results.parent)


if __name__ == "__main__":
    main("e1", run, __doc__)
