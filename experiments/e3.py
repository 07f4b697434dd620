"""E3, rank and number of clusters: quality, bytes against flattened LoRAs, and speed when served.

    python -m experiments.e3 [--quick] [--jobs N] [--prefix 'nice -n 10']

Four CGC-LoRA clusters of four tasks each, at ranks from 1 to 64, rates chosen at each rank.
Bytes and speed are what `python -m experiments.serving` has measured, before or after.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import pyplot as plt

from experiments.grid import Grid, Plan, Rates, main
from experiments.report import by_rates, group, mean, save, seed_values, spread, surroundings, table
from experiments.run import WARMUP, Outcome, Run
from experiments.serving import (
    BATCH,
    CLUSTERS,
    FILE,
    NEW_TOKENS,
    NUM_COMMON,
    PROMPT_TOKENS,
    RANKS,
    ROUNDS,
    TASKS_PER_CLUSTER,
    Served,
    read_served,
)

RATES = (4e-3, 1.6e-2)
GATE_RATE = 2e-2
TRAINED = 4
TUNED_ON = 2
CONFLICT = 0.3
MIB = 2**20

TEXT = """
N clusters of four tasks, each cluster a CGC-LoRA bundle of its own with A = {common} common experts
and B = 1 own expert a task, all of rank r: (A + 4) r rank rows a cluster at every linear.
Flattened, as a server without gates would load them, the same tasks are four LoRAs of rank
(A + 1) r. The clusters are ciphers whose tasks disagree on 30 % of the letters; the first adds an
offset of the task's own modulo 24. Clusters share nothing, so the quality of N clusters is the mean
over the first N; {trained} were trained, bytes and speed go up to eight. At each rank the rate of
the experts is the one of {rates} with the better validation accuracy in the mean over the
first {tuned} clusters; gates have {gate_rate:g}, and rates rise over the first {warmup:.0%} of the
steps. The seed is the cluster's number.
"""

FOUND = """
* **Rank buys little here.** A cluster of rank 1 (eight rank rows in training, five for a task)
  already ends at 0.94 to 1.00; one of rank 16 at 0.98 to 1.00, one of rank 64 at 0.88 to 0.99.
* **Rank 4 ends below rank 1 in two of four clusters**, at 0.89 and 0.87. That is the rate: the one
  of them that was run with 0.004 too had 0.97 there. Only two rates were tried, four times apart.
* **The rate has to fall as the rank grows.** 0.016 is the better one at ranks 1 and 4; at 16 and 64
  both clusters that were run with it collapsed, to 0.14 or less.
"""

SERVING = """
Random factors of the same layout beside the demo's base (6 layers, width 256, bf16), one thread.
{batch} requests at once, one task after the other, {prompt} prompt and {new} new tokens each;
generated tokens per second, prompts included, median of {rounds} rounds in which both forms and the
bare base answer in turn. Resident is what the engine's pool uses, whole pages and tables.

Factors take 2.5 times less as clusters at any rank. Resident that is so from rank 16, the height of
a page; at rank 1 the pages of eight experts are fuller in the flattened form, which takes a fifth
less. Speed gains with the rank: nothing that is sure at rank 1, 1.3 to 1.4 times flattened at rank
16, more at 64, as rows of one cluster read its common experts once.
"""


def settings(ranks: Sequence[int]) -> list[Run]:
    """List rank by rank; the seed picks the cluster."""
    return [
        Run(
            label=f"r {rank}",
            method="cgc-lora",
            settings={"num_common": NUM_COMMON, "num_own": 1, "rank": rank, "embedding_dim": 8},
            family="varied",
            options={
                "count": TASKS_PER_CLUSTER,
                "conflict": CONFLICT,
                "arrangement": "reverse",
            },
        )
        for rank in ranks
    ]


def report(
    outcomes: Sequence[Outcome],
    tried: Sequence[Outcome],
    served: Mapping[tuple[int, int], Served],
    folder: Path,
) -> None:
    """Write e3.md and e3.png."""
    by_rank = group(outcomes)
    quality = TEXT.format(
        common=NUM_COMMON,
        trained=TRAINED,
        rates=" and ".join(f"{rate:g}" for rate in RATES),
        tuned=TUNED_ON,
        gate_rate=GATE_RATE,
        warmup=WARMUP,
    )
    serving = SERVING.format(batch=BATCH, prompt=PROMPT_TOKENS, new=NEW_TOKENS, rounds=ROUNDS)
    parts = ["# E3: rank and number of clusters", quality, surroundings([*outcomes, *tried])]
    parts += ["![quality, bytes and speed](e3.png)", "## Quality", FOUND, _quality(by_rank)]
    parts += ["Validation accuracy, experts / gates:", by_rates(group(tried))]
    parts += ["## Bytes and speed", serving, _speed(served) if served else "Not measured yet."]
    parts.append(
        "`python -m experiments.e3` makes this page from [e3.jsonl](e3.jsonl) and"
        " [e3_served.jsonl](e3_served.jsonl), which is of `python -m experiments.serving`."
    )
    (folder / "e3.md").write_text("\n\n".join(part.strip() for part in parts) + "\n")
    _plot(by_rank, served)
    save(folder / "e3.png")


def _quality(by_rank: Mapping[str, Sequence[Outcome]]) -> str:
    known = len(next(iter(by_rank.values())))
    numbers = [number for number in CLUSTERS if number <= known]
    head = ["rank", "rate", "parameters a cluster", *(f"N = {number}" for number in numbers)]
    rows = []
    for label, outcomes in by_rank.items():
        cells = []
        for number in numbers:
            first = outcomes[:number]
            worst = min(seed_values(first, "worst"))
            cells.append(f"{spread(seed_values(first, 'mean'))} / {worst:.2f}")
        run = outcomes[0].run
        rows.append([label, f"{run.rate:g}", f"{sum(outcomes[0].parameters):,}", *cells])
    return (
        "Mean token accuracy of the clusters with their range / the worst task of all.\n\n"
        + table(head, rows)
    )


def _speed(served: Mapping[tuple[int, int], Served]) -> str:
    head = (
        *("rank", "N", "factors, MiB", "flattened", "ratio", "resident, MiB", "flattened"),
        *("tokens/s", "flattened", "bare base", "clusters / flattened [range]"),
    )
    rows = []
    for (number, rank), each in sorted(served.items(), key=lambda item: item[0][::-1]):
        rows.append(
            [
                *(
                    str(rank),
                    str(number),
                    f"{each.bytes / MIB:.1f}",
                    f"{each.flat_bytes / MIB:.1f}",
                ),
                f"{each.flat_bytes / each.bytes:.2f}x",
                *(f"{each.resident / MIB:.1f}", f"{each.flat_resident / MIB:.1f}"),
                *(f"{each.rate:.0f}", f"{each.flat_rate:.0f}", f"{each.bare_rate:.0f}"),
                spread(each.ratios),
            ]
        )
    return table(head, rows)


def _plot(
    by_rank: Mapping[str, Sequence[Outcome]], served: Mapping[tuple[int, int], Served]
) -> None:
    _, axes = plt.subplots(1, 3, figsize=(13, 4))
    ranks = [int(label.split()[1]) for label in by_rank]
    for place, outcomes in enumerate(zip(*by_rank.values(), strict=True)):
        axes[0].plot(ranks, [o.mean for o in outcomes], "C7-", linewidth=0.7, zorder=place)
    axes[0].plot(ranks, [mean(seed_values(o, "mean")) for o in by_rank.values()], "C0o-")
    axes[0].plot(ranks, [min(seed_values(o, "worst")) for o in by_rank.values()], "C3.--")
    axes[0].set_title("token accuracy: mean, clusters, worst task")
    axes[0].set_ylim(0, 1.02)
    for place, number in enumerate(sorted({key[0] for key in served})):
        found = sorted((rank, each) for (n, rank), each in served.items() if n == number)
        at = [rank for rank, _ in found]
        axes[1].plot(
            at, [each.bytes / MIB for _, each in found], f"C{place}o-", label=f"N = {number}"
        )
        axes[1].plot(at, [each.flat_bytes / MIB for _, each in found], f"C{place}.--")
        axes[2].plot(at, [each.rate for _, each in found], f"C{place}o-", label=f"N = {number}")
        axes[2].plot(at, [each.flat_rate for _, each in found], f"C{place}.--")
    axes[1].set_title("MiB of factors; dashed: flattened")
    axes[1].set_yscale("log")
    axes[2].set_title("tokens/s of a mixed batch; dashed: flattened")
    axes[2].set_ylim(bottom=0)
    for side in axes:
        side.set_xscale("log", base=2)
        side.set_xlabel("rank of an expert")
        side.grid(alpha=0.3)
    if served:
        axes[1].legend(fontsize=8)


def run(grid: Grid, args: argparse.Namespace) -> None:
    """Train what is missing, then write tables and plots."""
    rates = [Rates(rate, GATE_RATE) for rate in RATES]
    plan = Plan("E3", settings(RANKS), rates, range(TRAINED), TUNED_ON)
    if args.quick:
        plan = Plan("E3", settings(RANKS[:2]), rates[:1], range(2), 1)
    plan.execute(grid, args.only)
    outcomes, tried = plan.finished(grid)
    report(outcomes, tried, read_served(FILE), grid.results.parent)


if __name__ == "__main__":
    main("e3", run, __doc__)
