"""The other ways to compute the delta: products by libraries, on experts merged per task.

They are given what helps them and is not counted: rows that are sorted by task, the experts of
every task side by side with what it shares, and gates that are multiplied into B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name

from oneplusn.kernels.plan import Segment
from oneplusn.kernels.smoke.cases import Bed

ALIGN = 8
"""Elements of 2 bytes: grouped products want strides of 16 bytes."""


@dataclass(frozen=True, slots=True, eq=False)
class Merged:
    """Experts per task of a batch, in the order in which its rows are sorted.

    Attributes:
        a: `[J, S * R, K]`, the slices one behind the other; R is the largest rank, rounded up.
        bs: Per slice `[J, R, N_s]`, with the gates multiplied in.
    """

    a: Tensor
    bs: tuple[Tensor, ...]

    @property
    def rank(self) -> int:
        """R."""
        return self.bs[0].shape[1]

    def copy(self) -> Merged:
        """Return the same at other addresses."""
        return Merged(self.a.clone(), tuple(b.clone() for b in self.bs))

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return sum(t.numel() * t.element_size() for t in (self.a, *self.bs))


@dataclass(frozen=True, slots=True, eq=False)
class Sorted:
    """Rows that are sorted by task.

    Attributes:
        x: `[T, K]`.
        spans: Per task its rows, as (start, stop).
        ends: int32 `[J]`, where the tasks' rows end.
        tasks: int64 `[T]`, which of the J tasks a row asks for.
    """

    x: Tensor
    spans: Sequence[tuple[int, int]]
    ends: Tensor
    tasks: Tensor

    @classmethod
    def of(cls, x: Tensor, segments: Sequence[Segment]) -> Sorted:
        """Take rows in the order of a plan, and the plan's segments."""
        spans = [(segment.start, segment.stop) for segment in segments]
        ends = torch.tensor([stop for _, stop in spans], dtype=torch.int32)
        counts = torch.tensor([stop - start for start, stop in spans])
        tasks = torch.arange(len(spans)).repeat_interleave(counts)
        return cls(x, spans, ends.to(x.device), tasks.to(x.device))


def merge(bed: Bed, segments: Sequence[Segment]) -> Merged:
    """Put together what each task of a batch uses; ranks are filled up with zeros."""
    spec, slots = bed.site.spec, [segment.slot for segment in segments]
    most = max(bed.layout.rank_rows(slot) for slot in slots)
    rank = -(-most // ALIGN) * ALIGN
    a = bed.a.new_zeros(len(slots), spec.num_slices, rank, spec.in_features)
    b = bed.b.new_zeros(len(slots), rank, spec.out_features)
    for task, slot in enumerate(slots):
        used = bed.rank_rows(slot)
        a[task, :, : len(used)] = bed.a[used].transpose(0, 1)
        b[task, : len(used)] = (bed.gates[slot][:, None] * bed.b[used]).to(b.dtype)
    bs = tuple(b[:, :, start:stop].contiguous() for start, stop in pairwise(spec.bounds))
    return Merged(a.flatten(1, 2), bs)


def loop(ys: Sequence[Tensor], batch: Sorted, experts: Merged) -> None:
    """Add the delta task by task: one product with A, then one with each slice of B."""
    rank = experts.rank
    for task, (start, stop) in enumerate(batch.spans):
        h = batch.x[start:stop] @ experts.a[task].T
        for s, (y, b) in enumerate(zip(ys, experts.bs, strict=True)):
            y[start:stop].addmm_(h[:, s * rank : (s + 1) * rank], b[task])


def gathered(ys: Sequence[Tensor], batch: Sorted, experts: Merged) -> None:
    """Add the delta row by row, with a copy of the experts for every row of the batch."""
    rank = experts.rank
    h = torch.bmm(experts.a[batch.tasks], batch.x[:, :, None])
    for s, (y, b) in enumerate(zip(ys, experts.bs, strict=True)):
        rows = h[:, s * rank : (s + 1) * rank].transpose(1, 2)
        y += torch.bmm(rows, b[batch.tasks])[:, 0]


def grouped(ys: Sequence[Tensor], batch: Sorted, experts: Merged) -> None:
    """Add the delta with one grouped product for all A, and one for each slice of B."""
    rank = experts.rank
    h = F.grouped_mm(batch.x, experts.a.transpose(1, 2), offs=batch.ends)
    for s, (y, b) in enumerate(zip(ys, experts.bs, strict=True)):
        y += F.grouped_mm(h[:, s * rank : (s + 1) * rank], b, offs=batch.ends)


def why_not_grouped(batch: Sorted, experts: Merged) -> str:
    """Return why this torch does not multiply in groups here; nothing = it does.

    Raises:
        AcceleratorError: It began to, and the device failed.
    """
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm"
    try:
        F.grouped_mm(batch.x, experts.a.transpose(1, 2), offs=batch.ends)
    except torch.AcceleratorError:
        raise
    except RuntimeError as error:
        return f"refused: {str(error).partition(chr(10))[0]}"
    return ""
