"""Time a mixed batch through the engine: clusters as one pool, and every task flattened.

    python -m experiments.serving [--clusters N --rank R]

Measures one point and prints it as a JSON object; without arguments all that E3's page shows and
its file lacks, each in a process of its own. Wants a machine that does nothing else.

The base is the demo's; the experts are random, as speed does not depend on what they say. A
flattened task is one LoRA of rank (A + B) r, its gates folded in: what a server without gates would
load. Both forms answer the same batch in turn, so that they see the same machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from experiments.grid import DOCS
from oneplusn.adapters.attach import find_sites
from oneplusn.adapters.bundle import Bundle, Expert, ModuleDelta
from oneplusn.adapters.files import write_bundle
from oneplusn.kernels.plan import SiteSpec
from oneplusn.server.engine.llm import Engine
from oneplusn.server.engine.model import demo_data

FILE = DOCS / "e3_served.jsonl"
RANKS = (1, 4, 16, 64)
CLUSTERS = (1, 2, 4, 8)
NUM_COMMON = 4
TASKS_PER_CLUSTER = 4
BATCH = 32
PROMPT_TOKENS = 32
NEW_TOKENS = 32
ROUNDS = 5
MEMORY = 2 << 30


@dataclass(frozen=True, slots=True)
class Served:
    """Hold what one number of clusters at one rank takes, and how fast it is.

    Attributes:
        clusters: N, of four tasks each.
        rank: r of each expert; four common ones, one own a task.
        bytes: Of the factors in bf16, as clusters.
        flat_bytes: The same, flattened to one LoRA a task.
        resident: Bytes that the engine's pool uses for the clusters, tables included.
        flat_resident: The same, flattened.
        rate: Generated tokens per second of the mixed batch, median of the rounds.
        flat_rate: The same, flattened.
        bare_rate: The same without adapters.
        ratios: Clusters over flattened, by round.
    """

    clusters: int
    rank: int
    bytes: int
    flat_bytes: int
    resident: int
    flat_resident: int
    rate: float
    flat_rate: float
    bare_rate: float
    ratios: Sequence[float]


def random_cluster(name: str, sites: Sequence[SiteSpec], rank: int) -> Bundle:
    """Make a CGC-LoRA cluster of random factors; linears of a site share gates, as trained ones."""
    tasks = tuple(f"{name}-{index}" for index in range(TASKS_PER_CLUSTER))
    experts = [Expert(f"common-{i}", "common", None, rank) for i in range(NUM_COMMON)]
    experts += [Expert(f"{task}-0", "own", task, rank) for task in tasks]
    may = torch.tensor([[expert.owner in (None, task) for expert in experts] for task in tasks])
    rows = rank * len(experts)
    modules = {}
    for site in sites:
        gate = torch.rand(may.shape) * may
        for path, outputs in zip(site.modules, site.slices, strict=True):
            modules[path] = ModuleDelta(
                a=torch.randn(rows, site.in_features).div_(site.in_features**0.5).bfloat16(),
                b=torch.randn(outputs, rows).mul_(0.01).bfloat16(),
                ranks=(rank,) * len(experts),
                gate=gate,
                scale=torch.ones(len(experts)),
            )
    return Bundle(method="cgc-lora", tasks=tasks, experts=tuple(experts), modules=modules)


def flatten(bundle: Bundle, task: str) -> Bundle:
    """Write one task as one LoRA: its experts side by side, gate and scale folded into A."""
    row = bundle.row(task)
    modules = {}
    for path, delta in bundle.modules.items():
        factors = delta.weights[row].repeat_interleave(torch.tensor(delta.ranks))
        used = factors != 0
        modules[path] = ModuleDelta(
            a=(delta.a.float() * factors.unsqueeze(1))[used].to(delta.a.dtype),
            b=delta.b[:, used].contiguous(),
            ranks=(int(used.sum()),),
            gate=torch.ones(1, 1),
            scale=torch.ones(1),
        )
    rank = max(delta.ranks[0] for delta in modules.values())
    return Bundle("lora", (task,), (Expert(task, "own", task, rank),), modules)


def num_bytes(bundles: Sequence[Bundle]) -> int:
    """Count the bytes of all factors."""
    return sum(
        factor.nbytes
        for bundle in bundles
        for delta in bundle.modules.values()
        for factor in (delta.a, delta.b)
    )


def generate(engine: Engine, tasks: Sequence[str | None]) -> float:
    """Answer the batch once; return generated tokens per second."""
    prompts = [[(7 * row + place) % 96 for place in range(PROMPT_TOKENS)] for row in range(BATCH)]
    started = time.perf_counter()
    engine.generate(prompts, tasks=tasks, max_tokens=NEW_TOKENS, ignore_eos=True)
    return BATCH * NEW_TOKENS / (time.perf_counter() - started)


def serve(clusters: int, rank: int) -> Served:
    """Measure one point."""
    torch.manual_seed(0)
    base = demo_data() / "base"
    with (
        tempfile.TemporaryDirectory() as scratch,
        Engine(base, threads=1, adapter_memory=MEMORY) as pooled,
        Engine(base, threads=1, adapter_memory=MEMORY) as flat,
    ):
        sites = find_sites(AutoModelForCausalLM.from_pretrained(base))
        bundles = [random_cluster(f"cluster{i}", sites, rank) for i in range(clusters)]
        flattened = [flatten(bundle, task) for bundle in bundles for task in bundle.tasks]
        for engine, found in ((pooled, bundles), (flat, flattened)):
            for bundle in found:
                folder = Path(scratch) / f"{bundle.method}-{bundle.tasks[0]}"
                write_bundle(bundle, folder)
                engine.load_adapter(folder.name, folder)
        names = [task for bundle in bundles for task in bundle.tasks]
        mixed = [names[row % len(names)] for row in range(BATCH)]
        for engine in (pooled, flat):
            generate(engine, mixed)  # warms up
        rounds = [
            (generate(pooled, mixed), generate(flat, mixed), generate(pooled, [None] * BATCH))
            for _ in range(ROUNDS)
        ]
        rate, flat_rate, bare_rate = (
            round(statistics.median(r), 1) for r in zip(*rounds, strict=True)
        )
        return Served(
            clusters=clusters,
            rank=rank,
            bytes=num_bytes(bundles),
            flat_bytes=num_bytes(flattened),
            resident=pooled.core.pool.used_bytes,
            flat_resident=flat.core.pool.used_bytes,
            rate=rate,
            flat_rate=flat_rate,
            bare_rate=bare_rate,
            ratios=[round(one / other, 3) for one, other, _ in rounds],
        )


def read_served(path: Path) -> dict[tuple[int, int], Served]:
    """Read (clusters, rank) -> what was measured."""
    if not path.is_file():
        return {}
    found = [Served(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(each.clusters, each.rank): each for each in found}


def measure(path: Path) -> None:
    """Measure the points that a file lacks, and append them."""
    known = read_served(path)
    missing = [(n, rank) for rank in RANKS for n in CLUSTERS if (n, rank) not in known]
    for clusters, rank in tqdm(missing, desc="E3: serving", unit="point", dynamic_ncols=True):
        point = ["--clusters", str(clusters), "--rank", str(rank)]
        command = [sys.executable, "-m", "experiments.serving", *point]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own module
        with path.open("a", encoding="utf-8") as file:
            file.write(done.stdout)


def main() -> None:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clusters", type=int)
    parser.add_argument("--rank", type=int)
    args = parser.parse_args()
    if args.clusters is None or args.rank is None:
        measure(FILE)
        return
    print(json.dumps(asdict(serve(args.clusters, args.rank))), flush=True)


if __name__ == "__main__":
    main()
