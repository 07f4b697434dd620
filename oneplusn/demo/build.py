"""Make the whole demo again from one seed: base, clusters, table.

    python -m oneplusn.demo.build --out FOLDER --threads 2

Pre-trains the base, trains one cluster per family of tasks on prompts that carry no tag, and
measures every task on held-out inputs through the engine: with its own experts, on the bare base,
and for the gated clusters with the common or the own experts gated to zero.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.files import read_adapter, write_bundle
from oneplusn.adapters.training.config import load_config
from oneplusn.adapters.training.run import run
from oneplusn.demo.corpus import write as write_corpus
from oneplusn.demo.pretrain import Settings, pretrain
from oneplusn.demo.tasks import CLUSTERS, TASKS, examples
from oneplusn.server.engine.llm import Engine

CONFIGS = Path(__file__).parent / "configs"
STAGES = ("base", "adapters", "table")
MAX_ANSWER_TOKENS = 48
CHUNK = 512
EVALUATION_SEED = 7


def train(
    base: Path, cluster: str, seed: int, overrides: Mapping[str, object] | None = None
) -> Bundle:
    """Train one cluster as its file in configs/ says.

    Args:
        base: folder of the base.
        cluster: one of `CLUSTERS`.
        seed: of the examples and of the training.
        overrides: further keys of the configuration, as {"training.steps": 10}.
    """
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        write_corpus(scratch, [cluster], seed)
        changes = {
            "base": str(base),
            "output": str(scratch / "runs"),
            "data.train": [{"path": str(scratch / cluster / "train.jsonl")}],
            "data.validation": [{"path": str(scratch / cluster / "validation.jsonl")}],
            "training.seed": seed,
        }
        config = load_config(CONFIGS / f"{cluster}.yaml", {**changes, **(overrides or {})})
        trained = run(config)[0]
        return read_adapter(trained.bundle, name=cluster)


def without(bundle: Bundle, kind: str) -> Bundle:
    """Return the bundle with the experts of one kind gated to zero in every task."""
    dropped = torch.tensor([expert.kind == kind for expert in bundle.experts])
    modules = {
        path: replace(module, gate=module.gate.masked_fill(dropped, 0.0))
        for path, module in bundle.modules.items()
    }
    return replace(bundle, modules=modules)


def accuracy(engine: Engine, tasks: Iterable[str], n: int, *, adapted: bool) -> dict[str, float]:
    """Measure the exact match of each task, all tasks mixed in one batch.

    Args:
        engine: with the clusters loaded.
        tasks: names of demo tasks.
        n: held-out inputs a task.
        adapted: False asks the bare base the same questions.
    """
    pairs = [
        (task, *pair) for task in tasks for pair in examples(task, "heldout", n, EVALUATION_SEED)
    ]
    random.Random(0).shuffle(pairs)
    right = dict.fromkeys((task for task, _, _ in pairs), 0)
    label = "adapted" if adapted else "bare base"
    with tqdm(total=len(pairs), desc=label, unit="input", dynamic_ncols=True) as bar:
        for start in range(0, len(pairs), CHUNK):
            chunk = pairs[start : start + CHUNK]
            completions = engine.generate(
                [text for _, text, _ in chunk],
                tasks=[task if adapted else None for task, _, _ in chunk],
                max_tokens=MAX_ANSWER_TOKENS,
            )
            for (task, _, expected), completion in zip(chunk, completions, strict=True):
                right[task] += completion.text == expected
            bar.update(len(chunk))
    return {task: count / n for task, count in right.items()}


@dataclass(frozen=True, slots=True)
class Measured:
    """Hold one row of the table; the last two are None where there is nothing to zero."""

    task: str
    cluster: str
    method: str
    accuracy: float
    base_accuracy: float
    without_common: float | None
    without_own: float | None


def evaluate(out_dir: Path, bundles: Mapping[str, Bundle], n: int) -> list[Measured]:
    """Measure every task through the engine; see `accuracy`."""
    folders = {name: out_dir / "adapters" / name for name in bundles}
    gated = {name: bundle for name, bundle in bundles.items() if bundle.method != "lora"}
    with Engine(out_dir / "base", adapters=folders) as engine:
        own = accuracy(engine, TASKS, n, adapted=True)
        bare = accuracy(engine, TASKS, n, adapted=False)
    zeroed: dict[str, dict[str, float]] = {}
    for kind in ("common", "own"):
        with tempfile.TemporaryDirectory() as scratch:
            parts = {name: Path(scratch) / name for name in gated}
            for name, folder in parts.items():
                write_bundle(without(gated[name], kind), folder)
            with Engine(out_dir / "base", adapters=parts) as engine:
                names = [task for name in gated for task in gated[name].tasks]
                zeroed[kind] = accuracy(engine, names, n, adapted=True)
    return [
        Measured(
            task=task.name,
            cluster=task.cluster,
            method=bundles[task.cluster].method,
            accuracy=own[task.name],
            base_accuracy=bare[task.name],
            without_common=zeroed["common"].get(task.name),
            without_own=zeroed["own"].get(task.name),
        )
        for task in TASKS.values()
    ]


def table(rows: Iterable[Measured], n: int) -> str:
    """Render the measurements as a Markdown table."""

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    lines = [
        f"Exact match on {n} held-out inputs a task, greedy, no task tag in the prompt.",
        "",
        "| task | cluster | method | own experts | bare base | common zeroed | own zeroed |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        figures = (row.accuracy, row.base_accuracy, row.without_common, row.without_own)
        cells = (row.task, row.cluster, row.method, *map(cell, figures))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def build(
    out_dir: Path, *, seed: int, n: int, stages: Iterable[str], clusters: Iterable[str]
) -> None:
    """Run the stages named, in order, into one folder."""
    started = time.perf_counter()
    if "base" in stages:
        pretrain(out_dir / "base", Settings(seed=seed))
    if "adapters" in stages:
        for cluster in tqdm(clusters, desc="clusters", unit="cluster"):
            bundle = train(out_dir / "base", cluster, seed)
            shutil.rmtree(out_dir / "adapters" / cluster, ignore_errors=True)
            write_bundle(bundle, out_dir / "adapters" / cluster)
    if "table" in stages:
        bundles = {name: read_adapter(out_dir / "adapters" / name, name=name) for name in CLUSTERS}
        rows = evaluate(out_dir, bundles, n)
        (out_dir / "accuracy.md").write_text(table(rows, n))
        measured = {
            "n": n,
            "adapters": {name: bundle.digest for name, bundle in bundles.items()},
            "tasks": [asdict(row) for row in rows],
        }
        (out_dir / "accuracy.json").write_text(json.dumps(measured, indent=1) + "\n")
        print(table(rows, n))
    print(f"{time.perf_counter() - started:.0f} s")


def main() -> None:
    """Build from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of the processor")
    parser.add_argument("--examples", type=int, default=512, help="held-out inputs a task")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=STAGES, help="what to make again"
    )
    parser.add_argument(
        "--clusters", nargs="+", choices=tuple(CLUSTERS), default=tuple(CLUSTERS), help="to train"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    build(args.out, seed=args.seed, n=args.examples, stages=args.stages, clusters=args.clusters)


if __name__ == "__main__":
    main()
