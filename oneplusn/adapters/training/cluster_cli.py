"""`oneplusn cluster`: find out from the data which tasks belong into one cluster.

Exit codes: 0 done, 2 refused. What `declare` needs loads neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from oneplusn.adapters.checks import shown
from oneplusn.errors import ConfigError, InvalidRequest

if TYPE_CHECKING:
    from oneplusn.adapters.training.affinity import Affinity, AffinitySettings
    from oneplusn.adapters.training.clusters import Clustering
    from oneplusn.adapters.training.config import TrainConfig
    from oneplusn.adapters.training.data import Example

CLUSTERS_FILE, AFFINITY_FILE, PLOT_FILE = "clusters.yaml", "affinity.json", "affinity.png"
LIBRARIES = ("scipy", "sklearn", "matplotlib")
FILE_SUFFIXES = (".json", ".jsonl")

EPILOG = """\
what it does:
  trains one LoRA on all tasks for a few steps, compares the gradients that each task gives it, and
  joins the tasks whose gradients use the same directions; leaves in OUT: clusters.yaml for
  `oneplusn train --clusters`, affinity.png, affinity.json

examples:
  oneplusn cluster data.jsonl --base ./llama --out clusters
      as many clusters as the tasks fall into
  oneplusn cluster news.jsonl legal.jsonl --base ./llama --n 3 --out clusters
      three clusters of all tasks in two files
  oneplusn cluster data.jsonl --tasks qa nli summary --base demo --batches 8 --out clusters
      three of the tasks, with less noise for more time
"""

SETTINGS: Mapping[str, str] = {
    "rank": "Of the shared LoRA.",
    "steps": "Of its run.",
    "points": "Of the run at which gradients are compared.",
    "batches": "Of each task at each point; more of them, less noise.",
    "batch_size": "Rows of such a batch.",
    "learning_rate": "Of the run.",
    "seed": "Of everything random.",
}


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `oneplusn cluster`."""
    parser.epilog = EPILOG
    parser.add_argument(
        "data", nargs="+", metavar="DATA", help="JSONL files, or data sets of Hugging Face."
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="Default: all in the data.")
    parser.add_argument(
        "--n", type=_count, default="auto", metavar="auto|K", help="Clusters. Default: auto."
    )
    parser.add_argument("--base", required=True, help="`demo`, a folder, or a hub id.")
    parser.add_argument("--revision", help="Of the hub id.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for the results.")
    parser.add_argument("--split", default="train", help="Of data sets. Default: train.")
    parser.add_argument(
        "--examples", type=int, default=256, help="Of each task that are used. Default: 256."
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="Of the base's weights. Default: float32.",
    )
    parser.add_argument(
        "--targets",
        nargs="+",
        default=["all"],
        help="Linears that the LoRA is at, by the ends of their names. Default: all.",
    )
    for name, text in SETTINGS.items():
        kind = float if name == "learning_rate" else int
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=text)
    parser.add_argument("--quiet", action="store_true", help="No progress bar.")


def _count(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number")


def run(args: argparse.Namespace) -> int:
    """Do what `declare` described; return the exit code.

    Raises:
        InvalidRequest: bad input.
        ConfigError: a library is missing.
    """
    if any(find_spec(library) is None for library in LIBRARIES):
        raise ConfigError("clustering needs `pip install oneplusn[train]`")
    if (args.out / CLUSTERS_FILE).exists():
        raise InvalidRequest(
            f"{args.out / CLUSTERS_FILE} exists and may have been edited; remove it, or choose"
            " another --out"
        )
    from oneplusn.adapters.training.affinity import AffinitySettings
    from oneplusn.adapters.training.clusters import cluster_tasks

    given = {name: getattr(args, name) for name in SETTINGS if name in args}
    settings = AffinitySettings(**given, progress=not args.quiet)
    started = time.perf_counter()
    affinity = _measure(args, settings)
    clustering = cluster_tasks(affinity, args.n)
    args.out.mkdir(parents=True, exist_ok=True)
    _write(args, affinity, clustering, settings, time.perf_counter() - started)
    for line in summary(affinity, clustering):
        _say(line)
    _say(f"written to {args.out}: {CLUSTERS_FILE}, {PLOT_FILE}, {AFFINITY_FILE}")
    _say(f"next: oneplusn train CONFIG.yaml --clusters {args.out / CLUSTERS_FILE}")
    return 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _measure(args: argparse.Namespace, settings: AffinitySettings) -> Affinity:
    """Read, check, load and measure; the cheap checks come first."""
    import torch

    from oneplusn.adapters.training.affinity import task_affinity
    from oneplusn.adapters.training.base import find_base, load_base, select_sites
    from oneplusn.adapters.training.data import TaskDataset
    from oneplusn.adapters.training.sources import read_sources

    config = _config(args)
    examples = read_sources(config.data.train)
    tasks = _tasks(args, examples)
    if args.n != "auto" and not 1 <= args.n <= len(tasks):
        raise InvalidRequest(
            f"--n {args.n}: there are {len(tasks)} tasks; give 1 to {len(tasks)}, or auto"
        )
    files = find_base(config)
    chosen = _sample(examples, tasks, args.examples, settings.seed)
    dataset = TaskDataset(chosen, tasks, files.tokenizer, max_tokens=files.context)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = load_base(files, config, device)
    sites = select_sites(base, config.targets)
    return task_affinity(base, dataset, settings, pad_token_id=files.pad_token_id, sites=sites)


def _config(args: argparse.Namespace) -> TrainConfig:
    """Say what the arguments mean as a training's configuration, whose readers are used."""
    from oneplusn.adapters.training.config import make_config

    sources: list[dict[str, str]] = []
    for name in args.data:
        is_file = Path(name).is_file() or Path(name).suffix in FILE_SUFFIXES
        sources.append({"path": name} if is_file else {"dataset": name, "split": args.split})
    return make_config(
        {
            "base": args.base,
            "revision": args.revision,
            "dtype": args.dtype,
            "targets": args.targets,
            "data": {"train": sources},
            "training": {"bf16": False},
        },
        "command line",
    )


def _tasks(args: argparse.Namespace, examples: Sequence[Example]) -> list[str]:
    """Return the tasks to cluster, each of which has rows."""
    found = list(dict.fromkeys(example.task for example in examples))
    where = ", ".join(args.data)
    if not found:
        raise InvalidRequest(f"{where} has no rows; give a file that has some")
    wanted = list(dict.fromkeys(args.tasks or found))
    for task in wanted:
        if task not in found:
            raise InvalidRequest(
                f"task {shown(task)} has no rows in {where}; it has {shown(', '.join(found))}",
                param="tasks",
            )
    if len(wanted) < 2:
        raise InvalidRequest(
            f"one task ({shown(wanted[0])}) has nothing to be compared with; give two or more",
            param="tasks",
        )
    return wanted


def _sample(
    examples: Sequence[Example], tasks: Sequence[str], most: int, seed: int
) -> list[Example]:
    """Draw at most so many examples of each task."""
    import numpy as np

    if most < 1:
        raise InvalidRequest(f"--examples {most}: give at least 1")
    chosen: list[Example] = []
    for number, task in enumerate(tasks):
        members = [example for example in examples if example.task == task]
        order = np.random.default_rng((seed, number)).permutation(len(members))[:most]
        chosen += [members[index] for index in order.tolist()]
    return chosen


def summary(affinity: Affinity, clustering: Clustering) -> list[str]:
    """Say which tasks are together, how alike they are, and why there are so many clusters."""
    index = {task: number for number, task in enumerate(affinity.tasks)}
    groups = {name: [index[t] for t in tasks] for name, tasks in clustering.clusters.items()}
    lines = []
    for name, members in groups.items():
        figures = []
        if len(members) > 1:
            pairs = affinity.matrix[members][:, members].sum() - len(members)
            figures.append(f"within {pairs.item() / (len(members) * (len(members) - 1)):.2f}")
        near = {
            other: affinity.matrix[members][:, rows].mean().item()
            for other, rows in groups.items()
            if other != name
        }
        if near:
            closest = max(near, key=lambda other: near[other])
            figures.append(f"to {closest} {near[closest]:.2f}")
        lines.append(f"{name}: {', '.join(clustering.clusters[name])}")
        if figures:
            lines.append(f"    affinity {', '.join(figures)}")
    lines.append(f"number of clusters {len(groups)}: {clustering.reason}")
    if clustering.silhouettes:
        tried = (f"{count}: {value:.2f}" for count, value in clustering.silhouettes.items())
        lines.append(f"silhouettes {', '.join(tried)}")
    reliability = ", ".join(f"{value:.2f}" for value in affinity.reliability)
    return [
        *lines,
        f"reliability of the gradients along the run {reliability}; their differences are"
        f" {affinity.significance:.1f} standard deviations of chance",
    ]


def _write(
    args: argparse.Namespace,
    affinity: Affinity,
    clustering: Clustering,
    settings: AffinitySettings,
    seconds: float,
) -> None:
    from dataclasses import asdict

    import yaml

    from oneplusn.adapters.training.plots import draw_affinity
    from oneplusn.adapters.training.record import hardware, versions

    draw_affinity(
        args.out / PLOT_FILE,
        {
            "affinity": affinity.matrix.numpy(),
            "direction (red: opposite)": affinity.direction.numpy(),
        },
        affinity.tasks,
        (clustering.linkage, clustering.cut),
        clustering.labels(affinity.tasks),
    )
    content: dict[str, Any] = {
        "tasks": affinity.tasks,
        "affinity": affinity.matrix.tolist(),
        "direction": affinity.direction.tolist(),
        "reliability": affinity.reliability,
        "significance": affinity.significance,
        "silhouettes": clustering.silhouettes,
        "clusters": clustering.clusters,
        "reason": clustering.reason,
        "base": args.base,
        "data": args.data,
        "settings": asdict(settings),
        "hardware": hardware(),
        "versions": versions(),
        "seconds": seconds,
    }
    text = json.dumps(content, indent=1) + "\n"
    (args.out / AFFINITY_FILE).write_text(text, encoding="utf-8")
    heading = (
        f"# {len(clustering.clusters)} clusters: {clustering.reason}. Rename and move freely.\n"
    )
    body = yaml.safe_dump({"clusters": dict(clustering.clusters)}, sort_keys=False)
    (args.out / CLUSTERS_FILE).write_text(heading + body, encoding="utf-8")
