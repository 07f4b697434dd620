"""Time a training step of every method against plain LoRAs of the same parameters.

    python -m experiments.step [--bf16] [--short] [--only 'mhr|poly'] [--rounds N]

The demo's base with all its linears adapted, one batch of 16 tasks: forward, backward, clipping
and AdamW, one thread. The two plain LoRAs, of `peft` and of our own, know no tasks. Every method
is timed beside them in every round, and the ratios are medians over the rounds, of processor time.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaForCausalLM

from experiments.report import table
from oneplusn.adapters.attach import find_sites
from oneplusn.adapters.methods import make_method
from oneplusn.adapters.training.model import ClusterModel
from oneplusn.server.engine.model import demo_data

RANK = 80
TASKS = tuple(f"task-{index}" for index in range(16))
PEFT = f"PEFT's LoRA, rank {RANK}"
SHARED = f"shared-lora, rank {RANK}"
METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    SHARED: ("shared-lora", {"rank": RANK}),
    "lora, 16 of rank 5": ("lora", {"rank": 5}),
    "cgc-lora, A 4, B 1, rank 4": ("cgc-lora", {"num_common": 4, "num_own": 1, "rank": 4}),
    "c-poly, A 4, B 1, rank 4": ("c-poly", {"num_common": 4, "num_own": 1, "rank": 4}),
    "the same, noise, all may borrow": (
        "c-poly",
        {"num_common": 4, "num_own": 1, "rank": 4, "noise": True, "borrows": "all"},
    ),
    "moelora, 8 of rank 10": ("moelora", {"num_experts": 8, "rank": 10}),
    "poly, 4 of rank 20": ("poly", {"num_skills": 4, "rank": 20}),
    "c-poly, factor mix": ("c-poly", {"num_common": 4, "num_own": 1, "rank": 4, "mix": "factor"}),
    "mhr, 4 of rank 20, 4 blocks": ("mhr", {"num_skills": 4, "rank": 20, "num_splits": 4}),
}

Step = Callable[[], None]


def load() -> LlamaForCausalLM:
    """Read the demo's base in fp32, a new copy each time."""
    return LlamaForCausalLM.from_pretrained(demo_data() / "base", dtype=torch.float32)


def make_step(
    label: str, ids: Tensor, task_ids: Tensor, *, packed: bool, bf16: bool
) -> tuple[Step, int]:
    """Return what takes one optimiser step, and how many numbers it trains."""
    model: nn.Module
    given: dict[str, Tensor] = {"input_ids": ids, "labels": ids}
    if label == PEFT:
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
        model = get_peft_model(load(), config)
    else:
        name, fields = METHODS[label]
        base = load()
        model = ClusterModel(base, make_method(name, TASKS, fields), find_sites(base))
        given["task_ids"] = task_ids.unsqueeze(1).expand_as(ids) if packed else task_ids
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**given).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(p.numel() for p in trained)


def seconds(step: Step, count: int) -> float:
    """Return the processor time of one of `count` steps."""
    started = time.process_time()
    for _ in range(count):
        step()
    return (time.process_time() - started) / count


def measure(labels: Sequence[str], args: argparse.Namespace) -> str:
    """Time the methods named beside the two plain LoRAs; return a table."""
    torch.manual_seed(0)
    rows, tokens = (2, 16) if args.short else (32, 48)
    ids = torch.randint(0, 96, (rows, tokens))
    task_ids = torch.arange(rows) % len(TASKS)
    chosen = list(dict.fromkeys([PEFT, SHARED, *labels]))
    steps, sizes = {}, {}
    for label in chosen:
        steps[label], sizes[label] = make_step(
            label, ids, task_ids, packed=args.packed, bf16=args.bf16
        )
        steps[label]()  # warms up
    count = 20 if args.short else 1
    rounds = [
        {label: seconds(steps[label], count) for label in chosen}
        for _ in tqdm(range(args.rounds), unit="round", dynamic_ncols=True)
    ]

    def ratio(label: str, plain: str) -> str:
        found = [each[label] / each[plain] for each in rounds]
        return f"{statistics.median(found):.2f} [{min(found):.2f}, {max(found):.2f}]"

    return table(
        ("method", "parameters", "ms a step", "to PEFT's LoRA", "to shared-lora"),
        [
            (
                label,
                f"{sizes[label]:,}",
                f"{1000 * statistics.median(each[label] for each in rounds):.0f}",
                ratio(label, PEFT),
                ratio(label, SHARED),
            )
            for label in chosen
        ],
    )


def main() -> None:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.step", description=__doc__)
    parser.add_argument("--bf16", action="store_true", help="under autocast to bfloat16")
    parser.add_argument("--short", action="store_true", help="2 x 16 tokens in place of 32 x 48")
    parser.add_argument("--packed", action="store_true", help="a task for every token")
    parser.add_argument("--only", default="", help="pattern of the methods to time")
    parser.add_argument("--rounds", type=int, default=8, help="of all methods, one after the other")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(measure([label for label in METHODS if re.search(args.only, label)], args))


if __name__ == "__main__":
    main()
