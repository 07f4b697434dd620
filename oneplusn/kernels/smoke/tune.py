"""Look for better block shapes: one parameter after the other, from those that `tuning` has."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from math import inf

import torch
from triton.runtime.errors import OutOfResources

from oneplusn.kernels import tuning
from oneplusn.kernels.plan import SiteSpec
from oneplusn.kernels.smoke import roofline
from oneplusn.kernels.smoke.cases import Mix
from oneplusn.kernels.smoke.outcome import Outcome, error_of
from oneplusn.kernels.smoke.roofline import Case
from oneplusn.kernels.smoke.timing import Graph, Step, make_step, our_adds, replay_us
from oneplusn.kernels.tuning import Choice, Shape

CANDIDATES: dict[str, tuple[int | None, ...]] = {
    "split_k": (256, 512, 1024, 2048, 4096),
    "block_n": (64, 128, 256),
    "block_k": (64, 128, 256),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
    "max_registers": (None, 128, 168),
    "programs": (1, 2, 3),
}
ROUNDS = 2
CASES = (Case(32, Mix(16, 4)), Case(2048, Mix(16, 4)))
"""What shapes are chosen by: one step per size of tile."""


def fitted(spec: SiteSpec, goal: Shape) -> Shape:
    """Return a shape with K cut as `tuning` would cut it for that goal."""
    split_k = tuning.even_split(spec.in_features, goal.block_k, goal.split_k)
    return goal._replace(split_k=split_k)


def first_round(spec: SiteSpec, case: Case) -> Iterator[Shape]:
    """Yield the shapes that are other code than that of `tuning`, by one parameter."""
    goal = tuning.choice_of(spec, case.tile_rows, roofline.CAPABILITY).shape
    for name, values in CANDIDATES.items():
        if name != "programs":
            yield from (fitted(spec, _with(goal, name, value)) for value in values)


def tune(spec: SiteSpec, case: Case, device: torch.device, until: float) -> Outcome:
    """Find the best block shapes for one site and one size of tile.

    Semantics:
        Coordinate descent: per parameter all its values are timed, and the best one stays.

    Args:
        spec: The site.
        case: The step to time.
        device: A GPU.
        until: Seconds since the epoch at which nothing more is tried.
    """
    if device.type != "cuda":
        return Outcome(left_out="nothing to time without a GPU")
    step = make_step(spec, case, device)
    major, minor = torch.cuda.get_device_capability(device)
    goal = tuning.choice_of(spec, case.tile_rows, 10 * major + minor).shape
    times = {goal: _time(step, goal)}
    best = goal
    for _ in range(ROUNDS):
        started_at = best
        for name, values in CANDIDATES.items():
            for shape in [_with(best, name, value) for value in values]:
                if shape not in times and time.time() < until:
                    times[shape] = _time(step, shape)
            best = min(times, key=times.__getitem__)
        if best == started_at:
            break
    reason = (
        f"measured: {times[best]:.1f} us at {spec.name}, {case}; {times[goal]:.1f} us with the "
        f"shape before; {len(times)} tried"
    )
    choice = Choice(
        10 * major + minor, case.tile_rows, spec.out_features, spec.in_features, best, reason
    )
    return Outcome(times[best], note=repr(choice))


def _with(shape: Shape, name: str, value: int | None) -> Shape:
    return Shape(**(shape._asdict() | {name: value}))


def _time(step: Step, goal: Shape) -> float:
    """Return the microseconds that one launch takes with a shape; infinity if it cannot be.

    Raises:
        AssertionError: It computes something else.
    """
    adds = our_adds(step, roofline.ONE, fitted(step.spec, goal))
    whole = step.before.clone()
    try:
        adds[0](step.ys(whole))
    except OutOfResources:
        return inf
    error = error_of(whole, step.before.double() + step.delta, step.delta)
    fault = error.fault(step.x.dtype, step.device)
    assert not fault, f"{goal}: {fault}"
    calls = [partial(add, step.ys(whole)) for add in adds]
    return replay_us(Graph(calls, step.device), step.device) / len(calls)
