"""One adapter version as pages and gates for one base model: what the pool copies in.

It is made by `layout.page_image`, or mapped from a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from oneplusn.adapters.image_file import (
    ArrayEntry,
    Header,
    Mapped,
    SiteEntry,
    map_image,
    place,
    write_image,
)
from oneplusn.kernels.plan import PAGE, SiteSpec, num_pages


@dataclass(frozen=True, slots=True, eq=False)
class SiteImage:
    """Pages and gates of one site.

    Attributes:
        a: `[n, S, 16, K]`, the pages of every run in turn; rows that a run lacks are zero.
        b: `[n, 16, N]`, N over all slices.
        run_rows: Rank rows of each local run.
        gates: Per task, fp32 gates `[rows]` of each of its runs, scale folded in.
    """

    a: Tensor
    b: Tensor
    run_rows: tuple[int, ...]
    gates: Mapping[str, tuple[Tensor, ...]]

    @property
    def run_pages(self) -> tuple[int, ...]:
        """Pages of each local run."""
        return tuple(num_pages(rows) for rows in self.run_rows)


@dataclass(frozen=True, slots=True, eq=False)
class PageImage:
    """One adapter version, laid out for the pool of one base model.

    Attributes:
        digest: Content identity of the bundle.
        tasks: Names, in the bundle's order.
        task_keys: Content identity of each task.
        task_runs: Local runs of each task: run 0 if it uses common experts, then its own.
        num_runs: Local runs; run 0 holds the common experts and may be empty.
        sites: Those that the bundle reaches, by name.
    """

    digest: str
    tasks: tuple[str, ...]
    task_keys: Mapping[str, str]
    task_runs: Mapping[str, tuple[int, ...]]
    num_runs: int
    sites: Mapping[str, SiteImage]

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages."""
        return sum(site.a.nbytes + site.b.nbytes for site in self.sites.values())

    def save(self, path: Path, *, layout: str = "") -> None:
        """Write the file of `image_file`, whole or not at all; `layout` is noted in it.

        Raises:
            OSError: The disk failed.
        """
        arrays = [
            array
            for site in self.sites.values()
            for array in (site.a, site.b, _all_gates(site, self.tasks))
        ]
        entries = iter(place((_dtype_name(t.dtype), t.shape, t.nbytes) for t in arrays))
        sites = tuple(
            SiteEntry(name, site.run_rows, next(entries), next(entries), next(entries))
            for name, site in self.sites.items()
        )
        header = Header(
            digest=self.digest,
            layout=layout,
            tasks=self.tasks,
            task_keys=dict(self.task_keys),
            task_runs=dict(self.task_runs),
            num_runs=self.num_runs,
            sites=sites,
        )
        write_image(path, header, [_bytes(array) for array in arrays])

    @classmethod
    def open(cls, path: Path) -> PageImage:
        """Map a file of `save` into memory; its pages are read when they are touched.

        Raises:
            AdapterCorrupt: It is missing, cut off or damaged, as far as its header tells.
        """
        arrays = _Arrays(map_image(path))
        header = arrays.header
        return cls(
            digest=header.digest,
            tasks=header.tasks,
            task_keys=header.task_keys,
            task_runs=header.task_runs,
            num_runs=header.num_runs,
            sites={
                site.name: SiteImage(
                    a=arrays.view(site.a),
                    b=arrays.view(site.b),
                    run_rows=site.run_rows,
                    gates=_split_gates(arrays.view(site.gates), header, site),
                )
                for site in header.sites
            },
        )


def page_bytes(spec: SiteSpec, dtype: torch.dtype) -> int:
    """Return the bytes of one page, A and B, at a site."""
    return PAGE * (spec.num_slices * spec.in_features + spec.out_features) * dtype.itemsize


def _all_gates(site: SiteImage, tasks: Sequence[str]) -> Tensor:
    """Return the gates of all tasks for all their runs in turn, fp32 `[rows]`."""
    return torch.cat([gates for task in tasks for gates in site.gates[task]])


def _split_gates(gates: Tensor, header: Header, site: SiteEntry) -> dict[str, tuple[Tensor, ...]]:
    """Undo `_all_gates`."""
    rows = [[site.run_rows[run] for run in header.task_runs[task]] for task in header.tasks]
    parts = iter(gates.split([count for of_task in rows for count in of_task]))
    return {
        task: tuple(next(parts) for _ in of_task)
        for task, of_task in zip(header.tasks, rows, strict=True)
    }


class _Arrays:
    """The arrays of a mapped file, as views of one tensor per dtype.

    The engine opens files between its steps, and making a tensor of bytes costs more than a view.
    """

    def __init__(self, mapped: Mapped) -> None:
        self.header = mapped.header
        self._memory, self._start = mapped.memory, mapped.start
        self._whole: dict[str, Tensor] = {}

    def view(self, array: ArrayEntry) -> Tensor:
        """Return an array where it lies in the file."""
        dtype: torch.dtype = getattr(torch, array.dtype)
        if not array.num_bytes:
            return torch.empty(array.shape, dtype=dtype)
        if array.dtype not in self._whole:
            self._whole[array.dtype] = torch.frombuffer(
                self._memory, dtype=dtype, offset=self._start
            )
        first, count = array.offset // dtype.itemsize, array.num_bytes // dtype.itemsize
        return self._whole[array.dtype][first : first + count].view(array.shape)


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.contiguous().flatten().view(torch.uint8)
    return flat.numpy().data


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
