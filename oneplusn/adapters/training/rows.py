"""One gate row under training beside a frozen base: its deltas, and the loop that fits them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.optim import AdamW
from tqdm import tqdm
from transformers import PreTrainedModel, get_scheduler

from oneplusn.adapters.bundle import ModuleDelta
from oneplusn.adapters.training.data import IGNORED_LABEL, Collate, TaskDataset
from oneplusn.errors import InvalidRequest

WARMUP = 0.06
"""Share of the steps in which the rates rise to their peaks."""

Batch = Mapping[str, Tensor]
Loss = Callable[[Batch], Tensor]
Deltas = Mapping[str, nn.Module]
"""Module path -> what is added there, [..., N] for x [..., K]."""

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class FitSettings:
    """How long and how fast.

    Args:
        steps: optimiser steps.
        batch_size: examples per step; all of them where there are fewer.
        learning_rate: peak rate of A and B.
        gate_learning_rate: peak rate of gates.
        clip: largest norm of the gradient.
        seed: of the start of A and of the order of the examples.
        progress: show a bar with the loss.

    Raises:
        InvalidRequest: a number is not above 0.
    """

    steps: int = 200
    batch_size: int = 16
    learning_rate: float = 3e-3
    gate_learning_rate: float = 2e-2
    clip: float = 0.5
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "learning_rate", "gate_learning_rate", "clip"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise InvalidRequest(f"{name} {value}: give a number above 0", param=name)


class LowRankDelta(nn.Module):
    """One LoRA at one linear: B (A x)."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        """Copy A [r, K] and B [N, r] as fp32 parameters."""
        super().__init__()
        self.a = nn.Parameter(a.to(torch.float32, copy=True))
        self.b = nn.Parameter(b.to(torch.float32, copy=True))

    def forward(self, x: Tensor) -> Tensor:
        """Return the delta [..., N] of x [..., K]."""
        return linear(linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))


class RowDelta(nn.Module):
    """One gate row at one linear: frozen experts under gates that learn, and an own expert.

    Semantics:
        delta = sum over e of (start[e] + shift[e]) * scale[e] * B_e (A_e x) + own(x)

    The shift is a parameter that the linears of a site, or of the model, have in common: they
    learn one change, whatever gates each of them starts at.
    """

    a: Tensor
    b: Tensor
    rank_expert: Tensor
    start: Tensor
    scale: Tensor

    def __init__(
        self,
        delta: ModuleDelta,
        columns: Sequence[int],
        start: Tensor,
        shift: nn.Parameter,
        own: LowRankDelta | None,
    ) -> None:
        """Copy the experts of some columns of the gate; `start` is [E], `shift` [columns]."""
        super().__init__()
        ranks = torch.tensor(delta.ranks)
        chosen = torch.zeros(len(ranks), dtype=torch.bool)
        chosen[list(columns)] = True
        rows = chosen.repeat_interleave(ranks)
        self.columns = chosen.nonzero().flatten().tolist()
        self.register_buffer("a", delta.a[rows].float())
        self.register_buffer("b", delta.b[:, rows].float())
        self.register_buffer(
            "rank_expert", torch.arange(len(self.columns)).repeat_interleave(ranks[chosen])
        )
        self.register_buffer("scale", delta.scale[chosen])
        self.register_buffer("start", start[chosen])
        self.shift = shift
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        """Return the delta [..., N] of x [..., K]."""
        weights = ((self.start + self.shift) * self.scale)[self.rank_expert]
        hidden = linear(x, self.a.to(x.dtype)) * weights.to(x.dtype)
        added = linear(hidden, self.b.to(x.dtype))
        return added if self.own is None else added + self.own(x)

    def row(self, num_experts: int) -> Tensor:
        """Return the gates as a row over all experts, [E] fp32; zero for those not chosen."""
        row = torch.zeros(num_experts)
        row[self.columns] = (self.start + self.shift).detach().float().cpu()
        return row


@contextmanager
def added(base: nn.Module, deltas: Deltas) -> Iterator[None]:
    """Add deltas to the outputs of the base's linears for as long as this is open."""
    hooks = [
        base.get_submodule(path).register_forward_hook(_adder(delta))
        for path, delta in deltas.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _adder(delta: nn.Module) -> Hook:
    def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        change: Tensor = delta(inputs[0])
        return output + change.to(output.dtype)

    return add


class Fitting:
    """A frozen base and the examples that something beside it is fitted to."""

    def __init__(
        self, base: PreTrainedModel, dataset: TaskDataset, settings: FitSettings, pad_token_id: int
    ) -> None:
        """Freeze the base and put it in eval mode.

        Raises:
            InvalidRequest: there are no examples.
        """
        if not len(dataset):
            raise InvalidRequest("no examples to learn from; give at least one")
        self.base = base.eval().requires_grad_(requires_grad=False)
        self._dataset = dataset
        self._settings = settings
        self._collate = Collate(pad_token_id)

    def fit(self, loss: Loss, groups: list[dict[str, Any]]) -> None:
        """Take the steps of the settings.

        Args:
            loss: mean loss of a batch.
            groups: parameters, each group with its peak rate as `lr`.

        Raises:
            InvalidRequest: the loss is not finite.
        """
        optimizer = AdamW(groups, weight_decay=0.0)
        parameters = [parameter for group in groups for parameter in group["params"]]
        steps = self._settings.steps
        schedule: Any = get_scheduler("linear", optimizer, round(WARMUP * steps), steps)
        with tqdm(total=steps, unit="step", disable=not self._settings.progress) as bar:
            for step, batch in enumerate(self._shuffled(), start=1):
                value = loss(batch)
                _check_finite(value.item(), step)
                optimizer.zero_grad()
                value.backward()
                nn.utils.clip_grad_norm_(parameters, self._settings.clip)
                optimizer.step()
                schedule.step()
                bar.set_postfix(loss=f"{value.item():.4f}", refresh=False)
                bar.update()

    @torch.no_grad()
    def mean(self, loss: Loss) -> float:
        """Return the mean loss per completion token over all examples."""
        total, tokens = 0.0, 0
        size = self._settings.batch_size
        for first in range(0, len(self._dataset), size):
            indices = range(first, min(first + size, len(self._dataset)))
            batch = self._batch(indices)
            count = int(completion_mask(batch).sum())
            total += loss(batch).item() * count
            tokens += count
        return total / tokens

    def _shuffled(self) -> Iterator[Batch]:
        """Yield a batch a step; every example once before any comes again."""
        draw = torch.Generator().manual_seed(self._settings.seed)
        size = min(self._settings.batch_size, len(self._dataset))
        queue: list[int] = []
        for _ in range(self._settings.steps):
            if len(queue) < size:
                queue += torch.randperm(len(self._dataset), generator=draw).tolist()
            yield self._batch(queue[:size])
            del queue[:size]

    def _batch(self, indices: Sequence[int]) -> Batch:
        batch = self._collate([self._dataset[index] for index in indices])
        return {name: tensor.to(self.base.device) for name, tensor in batch.items()}


def completion_mask(batch: Batch) -> Tensor:
    """Say which positions predict a token of a completion, [B, T - 1] bool."""
    return batch["labels"][:, 1:] != IGNORED_LABEL


def _check_finite(value: float, step: int) -> None:
    if not math.isfinite(value):
        raise InvalidRequest(
            f"the loss is {value} at step {step}; lower the rates, or look for a damaged"
            " example or base"
        )
