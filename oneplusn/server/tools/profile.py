"""Say where a decode step spends its time.

    python -m oneplusn.server.tools.profile --model DIR --adapter a=DIR --adapter b=DIR --case a,b

Runs the engine core in this process, without HTTP, and times the calls of each part. The parts are
timed by wrapping them for as long as the profile runs; the engine itself knows nothing of it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch.nn import Linear

from oneplusn.adapters import attach
from oneplusn.adapters.files import read_adapter
from oneplusn.adapters.refs import TaskRef
from oneplusn.errors import ConfigError, OneplusnError
from oneplusn.kernels.cpu_layers import PARTS as LAYER_PARTS
from oneplusn.server.engine.attention import AttentionHook
from oneplusn.server.engine.engine import Engine, EngineConfig
from oneplusn.server.engine.families import stack_of
from oneplusn.server.engine.linear import CompiledLinear, PackedLinear
from oneplusn.server.engine.model import load_model
from oneplusn.server.engine.sampler import Sampler
from oneplusn.server.messages import Sampling, Submit

ATTENTION, GEMM, DELTA, SAMPLER, REST = "attention", "GEMM", "delta", "sampler", "rest"
NORMS = "norms, rotation"
PARTS: tuple[tuple[object, str, str], ...] = (
    (AttentionHook, "attend", ATTENTION),
    (CompiledLinear, "forward", GEMM),
    (PackedLinear, "forward", GEMM),
    (Linear, "forward", GEMM),
    (attach, "gated_delta", DELTA),
    (Sampler, "sample", SAMPLER),
)
WARM_UP_STEPS = 32
"""Steps that are not counted: caches fill, and weights that stay are put into another layout."""


@dataclass(slots=True)
class Stopwatch:
    """Seconds spent in each part, what a part called of another one not counted."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    _inner: list[float] = field(default_factory=lambda: [0.0])

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that its time is counted."""

        def measured(*args: object, **kwargs: object) -> object:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                whole = time.perf_counter() - start
                self.seconds[part] += whole - self._inner.pop()
                self._inner[-1] += whole

        return measured


@contextmanager
def timing(
    parts: Sequence[tuple[object, str, str]] = PARTS,
) -> Iterator[Stopwatch]:
    """Time the parts named as (owner, attribute, part) until the end of the block."""
    watch = Stopwatch()
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in parts]
    try:
        for owner, name, part in parts:
            setattr(owner, name, watch.timed(part, getattr(owner, name)))
        yield watch
    finally:
        for owner, name, call in originals:
            setattr(owner, name, call)


@dataclass(frozen=True, slots=True)
class Profile:
    """Means over the steps, in milliseconds; the parts sum to a whole step."""

    rows: int
    tasks: int
    steps: int
    ms_per_step: dict[str, float]

    @property
    def total_ms(self) -> float:
        """One step."""
        return sum(self.ms_per_step.values())


def profile(
    engine: Engine, refs: Sequence[TaskRef], *, rows: int, prompt: int, steps: int
) -> Profile:
    """Decode `rows` requests at once, spread over the tasks, and time `steps` steps.

    Args:
        engine: With every adapter of `refs` resident and nothing in flight.
        refs: The tasks; none = the bare base.
        rows: Requests in every step.
        prompt: Tokens of each prompt.
        steps: Steps that are timed.
    """
    fast = _time_layers(engine)
    with timing() as watch:
        _submit(engine, refs, rows=rows, prompt=prompt)
        while engine.step().stats.num_decode_rows < rows:
            pass
        for _ in range(WARM_UP_STEPS):
            engine.step()
        watch.seconds.clear()
        fast[:] = [0.0] * len(fast)
        start = time.perf_counter()
        for _ in range(steps):
            stats = engine.step().stats
            assert stats.num_decode_rows == stats.num_tokens == rows
        whole = time.perf_counter() - start
    for row in range(rows):
        engine.cancel(str(row))
    for part, seconds in zip((GEMM, DELTA, ATTENTION, NORMS), fast, strict=True):
        watch.seconds[part] += seconds
    spent = {part: watch.seconds[part] for part in (GEMM, ATTENTION, DELTA, NORMS, SAMPLER)}
    spent[REST] = whole - sum(spent.values())
    return Profile(rows, len(refs), steps, {k: v / steps * 1e3 for k, v in spent.items()})


def _time_layers(engine: Engine) -> ctypes.Array[ctypes.c_double]:
    """Let fast layers, if the model has some, add their time up; return it by `PARTS` of theirs."""
    seconds = (ctypes.c_double * len(LAYER_PARTS))()
    stack = stack_of(engine.model.model)
    if stack is not None and stack.bound is not None:
        stack.bound.seconds = seconds
    return seconds


def _submit(engine: Engine, refs: Sequence[TaskRef], *, rows: int, prompt: int) -> None:
    """Send requests that do not end before the profile does."""
    draw = random.Random(0)  # noqa: S311 - prompts, nothing secret
    words = range(engine.model.vocab_size)
    room = engine.scheduler.max_model_len - prompt
    sampling = Sampling(max_tokens=room, ignore_eos=True)
    for row in range(rows):
        task = (refs[row % len(refs)],) if refs else ()
        engine.submit(Submit(str(row), draw.choices(words, k=prompt), task, sampling))


def _load(engine: Engine, adapters: Sequence[str]) -> dict[str, list[TaskRef]]:
    """Make the adapters given as NAME=PATH resident; return their tasks."""
    tasks = dict[str, list[TaskRef]]()
    for name, _, path in (adapter.partition("=") for adapter in adapters):
        bundle = read_adapter(Path(path), name=name)
        engine.load(bundle)
        tasks[name] = [TaskRef(bundle.digest, task) for task in bundle.tasks]
    return tasks


def _run(args: argparse.Namespace) -> list[Profile]:
    """Profile every case on one engine.

    Raises:
        OneplusnError: The model or an adapter cannot be served.
        ConfigError: A case names an adapter that was not given.
    """
    config = EngineConfig(adapter_memory=args.adapter_memory)
    engine = Engine(load_model(args.model, threads=args.threads), config)
    tasks = _load(engine, args.adapter)
    found = list[Profile]()
    for case in args.case or [",".join(tasks)]:
        names = [name for name in case.split(",") if name]
        if unknown := set(names) - tasks.keys():
            msg = f"--case names {', '.join(sorted(unknown))}; give --adapter NAME=PATH for each"
            raise ConfigError(msg)
        refs = [ref for name in names for ref in tasks[name]]
        found.append(profile(engine, refs, rows=args.rows, prompt=args.prompt, steps=args.steps))
    return found


def render(found: Profile) -> str:
    """Return the profile for a terminal."""
    total = found.total_ms
    lines = [f"{found.rows} rows, {found.tasks} tasks, mean of {found.steps} decode steps"]
    lines += [f"{part:10}{ms:9.2f} ms{ms / total:8.1%}" for part, ms in found.ms_per_step.items()]
    return "\n".join([*lines, f"{'step':10}{total:9.2f} ms"])


def main() -> int:
    """Profile what the command line names; return the exit status."""
    parser = argparse.ArgumentParser(prog="profile", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument(
        "--case",
        action="append",
        metavar="NAME,NAME",
        help="adapters whose tasks share the batch, '' for the bare base; repeatable (all of them)",
    )
    parser.add_argument("--adapter-memory", type=int, help="bytes for resident adapters")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        profiles = _run(args)
    except OneplusnError as error:
        sys.stderr.write(f"profile: {error}\n")
        return 1
    figures = [asdict(found) for found in profiles]
    text = json.dumps(figures) if args.json else "\n\n".join(map(render, profiles))
    sys.stdout.write(f"{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
