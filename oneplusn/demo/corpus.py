"""Write the demo's examples as files that `oneplusn train` reads.

    python -m oneplusn.demo.corpus demo-data

OUT/<cluster>/train.jsonl and validation.jsonl. Both are of the training split: the inputs on which
the demo's accuracy is measured are in neither.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from oneplusn.demo.tasks import CLUSTERS, TASKS, draw_input

SIZES = {"text": 6000, "numbers": 12000, "records": 6000}
"""Training examples of each cluster, all its tasks together."""

VALIDATION_EXAMPLES = 256


def tasks_of(cluster: str) -> tuple[str, ...]:
    """Return the names of a cluster's tasks."""
    return tuple(task.name for task in TASKS.values() if task.cluster == cluster)


def draw(cluster: str, n: int, rng: random.Random) -> Iterator[dict[str, str]]:
    """Draw inputs, give each to every task of the cluster without any tag; n rows in all."""
    tasks = tasks_of(cluster)
    for _ in range(n // len(tasks)):
        text = draw_input(CLUSTERS[cluster], "train", rng)
        for task in tasks:
            yield {"task": task, "prompt": text, "completion": TASKS[task].function(text)}


def write(out_dir: Path, clusters: Iterable[str], seed: int = 0) -> None:
    """Write the files of some clusters; the same seed writes the same files."""
    for cluster in clusters:
        rng = random.Random(seed)
        train = list(draw(cluster, SIZES[cluster], rng))
        seen = {row["prompt"] for row in train}
        drawn = draw(cluster, VALIDATION_EXAMPLES, rng)
        validation = [row for row in drawn if row["prompt"] not in seen]
        folder = out_dir / cluster
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in (("train", train), ("validation", validation)):
            lines = "".join(f"{json.dumps(row)}\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def main() -> None:
    """Write from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder, made when absent")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.out, CLUSTERS, args.seed)
    print(f"examples of {', '.join(CLUSTERS)} in {args.out}")


if __name__ == "__main__":
    main()
