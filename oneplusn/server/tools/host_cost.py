"""Say what the host does in every step beside the model: make the plan, pick the tokens.

    python -m oneplusn.server.tools.host_cost --threads 2

Both are timed alone, without a model: the plan over tasks that are resident by name only, the
sampler over random logits. Compiled and torch paths of the sampler take turns, so that both see the
same machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from oneplusn.kernels import draw_native, native
from oneplusn.kernels.plan import Plan, Planner, SlotInfo
from oneplusn.server.engine import sequence
from oneplusn.server.engine.sampler import Sampler
from oneplusn.server.messages import Sampling

RESIDENT = (64, 1024, 4096)
CLUSTER_TASKS = 16
LORAS, CLUSTERS = "a LoRA each", "clusters of 16"
WARM_UP = 3
LOGITS = 4
"""Logits that take turns, so that none is still in a cache when it is read."""
TEMPERATURE = 0.8
REQUESTS: dict[str, Mapping[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top-p 0.9": {"top_p": 0.9},
    "top-k 50": {"top_k": 50},
    "top-k 1000": {"top_k": 1000},
    "min-p 0.05": {"min_p": 0.05},
    "top-k, top-p, min-p": {"top_k": 50, "top_p": 0.9, "min_p": 0.02},
    "top-p, all penalties": {
        "top_p": 0.9,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.2,
    },
    "greedy, repetition penalty": {"temperature": 0.0, "repetition_penalty": 1.1},
    "top-p, 5 log-probabilities": {"top_p": 0.9, "logprobs": 5},
}
MIXED = "every second row greedy, else top-p 0.9"
SPREADS = {"flat": 1.0, "peaked": 4.0}
"""Standard deviation of random logits: a random model's, and one that prefers some tokens."""
COMPILED, TORCH = "compiled", "torch"


@dataclass(frozen=True, slots=True)
class Cost:
    """Milliseconds of one step.

    Attributes:
        what: Is timed.
        how: Which of several ways.
    """

    what: str
    how: str
    p50_ms: float
    p99_ms: float


def slots(form: str, count: int) -> dict[int, SlotInfo]:
    """Return what so many slots would stand for if their adapters were resident."""
    found = dict[int, SlotInfo]()
    for index in range(count):
        cluster, place = (index, 0) if form == LORAS else divmod(index, CLUSTER_TASKS)
        digest = "sha256:" + hashlib.sha256(f"{form} {cluster}".encode()).hexdigest()
        width = 1 if form == LORAS else 1 + CLUSTER_TASKS
        mine = (0,) if form == LORAS else (0, 1 + place)
        runs = tuple(cluster * width + run for run in mine)
        keys = tuple((digest, run) for run in mine)
        info = SlotInfo(f"{digest}/{place}", (digest,), runs, keys, (1,) * len(mine))
        found[1 + index] = info
    return found


def plan_costs(rows: int, repeats: int) -> Iterator[Cost]:
    """Time the plan of so many rows, each of a task of its own, over ever more resident tasks."""
    for form in (LORAS, CLUSTERS):
        for count in RESIDENT:
            if count < rows:
                continue
            known, draw = slots(form, count), random.Random(0)  # noqa: S311 - nothing secret
            batches = [draw.sample(list(known), rows) for _ in range(LOGITS + repeats)]
            planner, arguments = Planner(known), native.Arguments()

            def make(batch: list[int], planner: Planner = planner) -> Plan:
                return planner.plan(batch)

            def step(batch: list[int], arguments: native.Arguments = arguments) -> None:
                arguments.step(make(batch))

            what = f"{form}, {count} resident"
            yield _cost(what, "all rows changed", step, batches)
            yield _cost(what, "as the step before", step, [batches[0]] * len(batches))


def sampler_costs(rows: int, vocab: int, repeats: int) -> Iterator[Cost]:
    """Time the sampler over so many rows."""
    seeds = torch.Generator().manual_seed(0)
    for spread, deviation in SPREADS.items():
        logits = [
            (torch.randn(rows, vocab, generator=seeds) * deviation).bfloat16()
            for _ in range(LOGITS)
        ]
        for what in (*REQUESTS, MIXED):
            yield from _sampler_costs(f"{what}, {spread}", what, logits, repeats)


def _sampler_costs(
    what: str, request: str, logits: Sequence[Tensor], repeats: int
) -> Iterator[Cost]:
    rows = len(logits[0])
    samplers = {how: (Sampler(), _sequences(request, rows)) for how in (COMPILED, TORCH)}
    seconds = dict[str, list[float]]((how, []) for how in samplers)
    for turn in range(WARM_UP + repeats):
        for how, (sampler, seqs) in samplers.items():
            with _path(how):
                begin = time.perf_counter()
                sampler.sample(logits[turn % len(logits)], seqs)
                seconds[how].append(time.perf_counter() - begin)
    for how, each in seconds.items():
        yield _summary(what, how, each[WARM_UP:])


@contextmanager
def _path(how: str) -> Iterator[None]:
    """Let the sampler go one way or the other in the block."""
    takes = draw_native.takes
    if how == TORCH:
        draw_native.takes = _takes_nothing
    try:
        yield
    finally:
        draw_native.takes = takes


def _takes_nothing(logits: Tensor) -> bool:
    """Stand for a machine without a compiler."""
    del logits
    return False


def _sequences(request: str, rows: int) -> list[sequence.Sequence]:
    """Return requests that have got a prompt of 64 tokens and said 32."""
    seqs = list[sequence.Sequence]()
    for row in range(rows):
        is_greedy = request == MIXED and row % 2
        name = "greedy" if is_greedy else "top-p 0.9" if request == MIXED else request
        given = {"max_tokens": 64, "seed": row, "temperature": TEMPERATURE, **REQUESTS[name]}
        said = list(range(100, 132))
        seqs.append(sequence.Sequence(str(row), list(range(3, 67)), Sampling(**given), output=said))
    return seqs


def _cost(
    what: str, how: str, step: Callable[[list[int]], None], batches: Sequence[list[int]]
) -> Cost:
    seconds = list[float]()
    for batch in batches:
        begin = time.perf_counter()
        step(list(batch))
        seconds.append(time.perf_counter() - begin)
    return _summary(what, how, seconds[WARM_UP:])


def _summary(what: str, how: str, seconds: Sequence[float]) -> Cost:
    ordered = sorted(seconds)
    p50, p99 = (ordered[int(share * (len(ordered) - 1))] * 1e3 for share in (0.5, 0.99))
    return Cost(what, how, p50, p99)


def main() -> int:
    """Time both, and print what was found; return the exit status."""
    args = _options()
    native.use_threads(args.threads)
    with tqdm(disable=None, desc="timing", unit=" costs") as bar:
        found = dict[str, list[dict[str, Any]]]()
        parts = {
            "plan": plan_costs(args.rows, args.repeats),
            "sampler": sampler_costs(args.sampled, args.vocab, args.repeats // 4),
        }
        for part, costs in parts.items():
            found[part] = []
            for cost in costs:
                found[part].append(asdict(cost))
                bar.update()
    setting = {name: getattr(args, name) for name in ("rows", "sampled", "vocab", "threads")}
    text = json.dumps({**setting, **found}) if args.json else render(found)
    sys.stdout.write(f"{text}\n")
    return 0


def render(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the costs for a terminal."""
    lines = list[str]()
    for part, costs in found.items():
        lines += ["", f"{part:44}{'':22}{'p50 ms':>9}{'p99 ms':>9}"]
        lines += [
            f"{cost['what']:44}{cost['how']:22}{cost['p50_ms']:9.3f}{cost['p99_ms']:9.3f}"
            for cost in costs
        ]
    return "\n".join(lines[1:])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="host_cost", description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2, help="of the compiled kernels (2)")
    parser.add_argument("--rows", type=int, default=64, help="of the plan, a task each (64)")
    parser.add_argument("--sampled", type=int, default=16, help="rows that are sampled (16)")
    parser.add_argument("--vocab", type=int, default=128_256, help="tokens (128256)")
    parser.add_argument("--repeats", type=int, default=200, help="of a plan; 4 a sampler's (200)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    args = parser.parse_args()
    if min(args.threads, args.rows, args.sampled, args.vocab) < 1 or args.repeats < 8:
        parser.error("--repeats is 8 or more, and every other number 1 or more")
    return args


if __name__ == "__main__":
    sys.exit(main())
