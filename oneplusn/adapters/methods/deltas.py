"""The factors of all experts at one linear, and what they add: the torch form that is trained.

    output mix:  y = W x + sum over e of G[task, e] * s_e * B_e (A_e x)
    factor mix:  y = W x + s * (sum over e of w[task, e] B_e) (sum over e of w[task, e] A_e) x

The factor mix has cross terms w_i w_j B_i A_j, so no gate row over the same experts computes it.
What it is for one task is one LoRA of the experts' rank, and that is what is exported: exact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from oneplusn.adapters.bundle import Expert, ModuleDelta
from oneplusn.errors import InvalidRequest


class Delta(nn.Module, ABC):
    """The factors of all experts at one linear, and what they add under given gates."""

    @abstractmethod
    def prepare(self, gates: Tensor) -> Tensor:
        """Turn gates [..., E] ([..., q, E]) into the row [..., W] that `mix` multiplies with.

        It depends on the layout of the experts alone, which is the same at every linear of a
        model, so a caller does it once for all.
        """

    @abstractmethod
    def mix(self, x: Tensor, rows: Tensor) -> Tensor:
        """Return the delta [B, T, N] of x [B, T, K] under prepared rows [B, 1 or T, W]."""

    @abstractmethod
    def export(self, gates: Tensor, dtype: torch.dtype) -> ModuleDelta:
        """Return what the server loads under the gate rows of all tasks, factors in `dtype`."""

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """Return the delta [B, T, N] of x [B, T, K].

        Args:
            x: [B, T, K].
            gates: per sequence [B, E], or per token [B, T, E]; of a factor mix [B, q, E] or
                [B, T, q, E].
        """
        rows = self.prepare(gates)
        return self.mix(x, rows.unsqueeze(1) if rows.dim() == 2 else rows)


def start_factor(factor: Tensor, fan_in: int, std: float | None) -> None:
    """Fill A in place: normal with `std`, or as LoRA does, Kaiming-uniform with a = sqrt 5.

    With that a, the bound of the uniform is 1 / sqrt(fan_in).
    """
    if std is None:
        nn.init.uniform_(factor, -(fan_in**-0.5), fan_in**-0.5)
    else:
        nn.init.normal_(factor, std=std)


class ExpertDelta(Delta):
    """Output mix: the gated sum of what the experts put out.

    Semantics:
        delta[t] = sum over e of G[task(t), e] * s_e * B_e (A_e x[t])

    A is [R, K], the experts one below the other, and B [N, R], side by side, both fp32. B starts
    at zero, so an untrained cluster is the bare base.
    """

    a: nn.Parameter
    b: nn.Parameter
    rank_expert: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        experts: Sequence[Expert],
        scales: Tensor,
        *,
        init_std: float | None = None,
    ) -> None:
        """Create A and B for experts of the ranks given; `init_std` as in `start_factor`."""
        super().__init__()
        self.ranks = tuple(expert.rank for expert in experts)
        self.scales = scales
        self.a = nn.Parameter(torch.empty(sum(self.ranks), in_features))
        start_factor(self.a.data, in_features, init_std)
        self.b = nn.Parameter(torch.zeros(out_features, sum(self.ranks)))
        owner = [e for e, rank in enumerate(self.ranks) for _ in range(rank)]
        self.register_buffer("rank_expert", torch.tensor(owner), persistent=False)
        self.register_buffer("scale", scales[owner], persistent=False)

    def prepare(self, gates: Tensor) -> Tensor:
        """Return one factor per rank row [..., R], the expert's scale folded in."""
        return gates[..., self.rank_expert] * self.scale

    def mix(self, x: Tensor, rows: Tensor) -> Tensor:
        """Multiply with all experts, mask by the rows, multiply back.

        Every row of the batch may belong to another task: no loop over tasks, and no copy of A or
        B per row. Gates stay fp32 between the two products.
        """
        hidden = functional.linear(x, self.a.to(x.dtype)) * rows
        return functional.linear(hidden.to(x.dtype), self.b.to(x.dtype))

    def export(self, gates: Tensor, dtype: torch.dtype) -> ModuleDelta:
        """Return the factors as they are, beside the gate rows."""
        return ModuleDelta(
            a=self.a.detach().to("cpu", dtype, copy=True),
            b=self.b.detach().to("cpu", dtype, copy=True),
            ranks=self.ranks,
            gate=gates.detach().to("cpu", copy=True),
            scale=self.scales.clone(),
        )


class FactorDelta(Delta):
    """Factor mix: the product of mixed factors, in q blocks of the inputs and of the outputs.

    Semantics:
        A_t = [sum over e of w[t, i, e] A[i, e]] over blocks i, side by side     [r, K]
        B_t = [sum over e of w[t, i, e] B[i, e]] over blocks i, one below another [N, r]
        delta[t] = s * B_t (A_t x[t])

    A is [q, E, r, K / q] and B is [q, E, r, N / q], fp32. B starts at zero.
    """

    a: nn.Parameter
    b: nn.Parameter

    def __init__(
        self,
        features: tuple[int, int],
        num_experts: int,
        rank: int,
        *,
        num_splits: int,
        scale: float,
        init_std: float | None = None,
    ) -> None:
        """Create A and B.

        Args:
            features: K and N.
            num_experts: E.
            rank: r of every expert.
            num_splits: q.
            scale: s.
            init_std: as in `start_factor`; the inputs of a block are the fan-in.

        Raises:
            InvalidRequest: q does not divide K and N.
        """
        super().__init__()
        for width in features:
            if width % num_splits:
                raise InvalidRequest(
                    f"num_splits is {num_splits}, and a linear of {features[0]} inputs and"
                    f" {features[1]} outputs cannot be cut into so many equal blocks; choose a"
                    " divisor of both, or leave that linear out",
                    param="num_splits",
                )
        inputs, outputs = (width // num_splits for width in features)
        self.scale = scale
        self.a = nn.Parameter(torch.empty(num_splits, num_experts, rank, inputs))
        start_factor(self.a.data, inputs, init_std)
        self.b = nn.Parameter(torch.zeros(num_splits, num_experts, rank, outputs))

    def prepare(self, gates: Tensor) -> Tensor:
        """Return the weight of every rank row of every block: [..., q * E * r]."""
        return gates.repeat_interleave(self.a.shape[2], dim=-1).flatten(-2)

    def mix(self, x: Tensor, rows: Tensor) -> Tensor:
        """Shrink with all experts and sum under the weights; spread, expand with all experts.

        The mixed factors of a row are never formed: r numbers per row stand between the two
        products, as w enters linearly on either side.
        """
        num_splits, num_experts, _, _ = self.a.shape
        weights = rows.unflatten(-1, (num_splits, -1)).movedim(2, 0)  # [q, B, 1 or T, E * r]
        blocks = x.unflatten(-1, (num_splits, -1)).flatten(0, 1).transpose(0, 1)
        shrunk = torch.bmm(blocks, self.a.to(x.dtype).flatten(1, 2).mT)
        shrunk = shrunk.unflatten(1, x.shape[:2])  # [q, B, T, E * r]
        # torch has no types for apply.
        spread: Tensor = _Respread.apply(  # type: ignore[no-untyped-call]
            shrunk, weights, num_experts, self.scale
        )
        expanded = torch.bmm(spread.flatten(1, 2), self.b.to(x.dtype).flatten(1, 2))
        output: Tensor = expanded.transpose(0, 1).flatten(1).unflatten(0, x.shape[:2])
        return output

    def export(self, gates: Tensor, dtype: torch.dtype) -> ModuleDelta:
        """Mix the factors of every task in fp32: one LoRA of rank r each, gated one to one."""
        num_tasks, rank = len(gates), self.a.shape[2]
        a = torch.einsum("jqe,qerk->jrqk", gates, self.a).reshape(num_tasks * rank, -1)
        b = torch.einsum("jqe,qern->qnjr", gates, self.b).reshape(-1, num_tasks * rank)
        return ModuleDelta(
            a=a.detach().to("cpu", dtype),
            b=b.detach().to("cpu", dtype),
            ranks=(rank,) * num_tasks,
            gate=torch.eye(num_tasks),
            scale=torch.full((num_tasks,), self.scale),
        )


class _Respread(torch.autograd.Function):
    """Sum the outputs of A under weights, and spread the sum for B under the same weights.

    Semantics:
        u[r] = s * sum over blocks i and experts e of w[i, e] * shrunk[i, e, r]
        spread[i, e, r] = w[i, e] * u[r]

    for shrunk and spread [q, B, T, E * r] in any dtype, w [q, B, 1 or T, E * r] in fp32. What is
    this wide, four times the hidden rows of an output mix at four blocks, is computed in place as
    far as it can be: its allocations and casts are what autograd's own derivative spends time on.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch has no type for it
        shrunk: Tensor,
        weights: Tensor,
        num_experts: int,
        scale: float,
    ) -> Tensor:
        """Return what B reads, in the dtype of what A put out."""
        wide = torch.empty_like(shrunk, dtype=weights.dtype).copy_(shrunk).mul_(weights)
        mixed = _summed(wide, num_experts).mul_(scale)
        ctx.save_for_backward(shrunk, weights, mixed)
        ctx.num_experts, ctx.scale = num_experts, scale
        return torch.mul(mixed, weights, out=wide).to(shrunk.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # noqa: ANN401
        """The same sum and spread of the gradient; weights get one from either side."""
        shrunk, weights, mixed = ctx.saved_tensors
        grad_wide = grad.to(weights.dtype)
        wide = grad_wide * weights
        back = _summed(wide, ctx.num_experts).mul_(ctx.scale)
        wide.copy_(shrunk).mul_(back).addcmul_(grad_wide, mixed)
        of_weights = wide.sum_to_size(weights.shape)
        room = wide if of_weights.shape != wide.shape else None
        return torch.mul(back, weights, out=room).to(grad.dtype), of_weights, None, None


def _summed(wide: Tensor, num_experts: int) -> Tensor:
    """Sum [q, B, T, E * r] over blocks and experts; repeat the sum for every expert."""
    of_blocks: Tensor = wide.sum(0).unflatten(-1, (num_experts, -1))
    return of_blocks.sum(-2).repeat(1, 1, num_experts)
