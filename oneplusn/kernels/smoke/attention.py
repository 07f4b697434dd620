"""Attention over the paged KV cache, checked against fp64 and bit by bit.

Sequences lie in shuffled blocks of a cache that holds NaN wherever nobody's tokens are. A *batch*
says how many tokens they have; a *mix* takes some of them, in any order, as one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import ceil, nan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oneplusn.kernels import attention_reference
from oneplusn.kernels.cpu_attention import AttentionMeta, new_cache
from oneplusn.kernels.smoke.outcome import Outcome, error_of
from oneplusn.kernels.triton_attention_backend import paged_attention, write_kv

BLOCK = 16
SITE = "attention"
PAGED = "paged attention"
MIXES = "paged attention, any mix"


@dataclass(frozen=True, slots=True)
class Heads:
    """What a family asks of attention.

    Attributes:
        name: Of the family.
        heads: Query heads H.
        kv_heads: KV heads Hkv.
        dim: Size D of keys and values.
        window: Sliding window in tokens.
        softcap: Bound of the scores.
        sinks: Whether heads have sinks.
    """

    name: str
    heads: int
    kv_heads: int
    dim: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


LLAMA = Heads("Llama-3-8B", 32, 8, 128)
FAMILIES = (
    LLAMA,
    Heads("Gemma-2-9B", 16, 8, 256, 512, 50.0),
    Heads("gpt-oss", 64, 8, 64, 128, sinks=True),
    Heads("Phi-3-mini", 32, 32, 96, 2047),
    Heads("Qwen2-7B", 28, 4, 128),
)
TINY_FAMILIES = (Heads("tiny", 4, 2, 8), Heads("tiny, odd", 3, 1, 24, 20, 2.0, sinks=True))


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences of a step.

    Attributes:
        decodes: Contexts of those with one row.
        chunks: Rows and contexts of the others.
    """

    decodes: tuple[int, ...] = ()
    chunks: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        if self.chunks:
            rows, context = self.chunks[0]
            return f"prefill, {len(self.chunks)} x {rows:,} rows at {context:,} tokens"
        return f"decode, {len(self.decodes)} x {self.decodes[0]:,} tokens"

    @property
    def phase(self) -> str:
        """Which of the kernels it asks for, where it is timed."""
        return "prefill" if self.chunks else "decode"

    @property
    def sequences(self) -> tuple[tuple[int, int], ...]:
        """Rows and contexts of all."""
        return (*((1, length) for length in self.decodes), *self.chunks)


RAGGED = Batch(
    (1, 16, 17, 255, 256, 257, 1000, 4097, 9000),
    ((1, 33), (16, 16), (100, 700), (129, 129), (300, 1100)),
)
TINY_RAGGED = Batch((1, 33), ((5, 21), (9, 9)))


class Step(NamedTuple):
    """What is handed to a backend."""

    q: Tensor
    k: Tensor
    v: Tensor
    meta: AttentionMeta


@dataclass(frozen=True, slots=True, eq=False)
class Ground:
    """The sequences of a batch in a cache; the keys and values of their last rows are still apart.

    Attributes:
        heads: Of the family.
        batch: The sequences.
        caches: Keys and values.
        tables: int32 `[B, max_blocks]`.
        parts: Per sequence the rows of q, k and v.
        sinks: `[H]`.
    """

    heads: Heads
    batch: Batch
    caches: tuple[Tensor, Tensor]
    tables: Tensor
    parts: Sequence[tuple[Tensor, Tensor, Tensor]]
    sinks: Tensor | None

    @property
    def options(self) -> dict[str, Any]:
        """What both backends are told besides the step."""
        heads = self.heads
        scores = {"window": heads.window, "softcap": heads.softcap, "sinks": self.sinks}
        return {"scale": heads.dim**-0.5, **scores}

    def step(self, chosen: Sequence[int]) -> Step:
        """Make a step of some sequences, those with decode rows first."""
        device, sizes = self.tables.device, [self.batch.sequences[i] for i in chosen]
        lengths = torch.tensor([length for _, length in sizes], dtype=torch.int32, device=device)
        rows = [0, *accumulate(rows for rows, _ in sizes)]
        tables = self.tables[list(chosen)]
        places = [
            tables[index, j // BLOCK].long() * BLOCK + j % BLOCK
            for index, (rows, length) in enumerate(sizes)
            for j in [torch.arange(length - rows, length, device=device)]
        ]
        meta = AttentionMeta(
            kv_pos=torch.cat(places),
            query_start=torch.tensor(rows, dtype=torch.int32, device=device),
            context_lens=lengths,
            block_tables=tables,
            block_size=BLOCK,
            num_decodes=sum(i < len(self.batch.decodes) for i in chosen),
        )
        q, k, v = (torch.cat(part) for part in zip(*(self.parts[i] for i in chosen), strict=True))
        return Step(q, k, v, meta)

    def write(self, step: Step) -> None:
        """Put the rows of a step into the cache."""
        write_kv(*self.caches, step.k, step.v, step.meta.kv_pos)

    def attend(self, step: Step) -> Tensor:
        """Attend by Triton."""
        return paged_attention(step.q, *self.caches, step.meta, **self.options)


@lru_cache(maxsize=1)
def make_ground(heads: Heads, batch: Batch, dtype: torch.dtype, device: torch.device) -> Ground:
    """Draw sequences and lay them out; the last ones are kept, since several checks want them."""
    generator = torch.Generator(device).manual_seed(0)
    counts = [ceil(length / BLOCK) for _, length in batch.sequences]
    order = torch.randperm(sum(counts) + 1, generator=torch.Generator().manual_seed(0))
    shape = (len(order) * BLOCK, heads.kv_heads, heads.dim)
    k_cache, v_cache = (new_cache(*shape, dtype, device).fill_(nan) for _ in range(2))
    # What a table has beyond its sequence is a block that is nobody's.
    tables = torch.full((len(counts), max(counts) + 1), int(order[-1]), dtype=torch.int32)

    def random(rows: int, number: int) -> Tensor:
        drawn = torch.randn(rows, number, heads.dim, generator=generator, device=device)
        return drawn.to(dtype)

    parts = []
    for index, blocks in enumerate(order[:-1].split(counts)):
        rows, length = batch.sequences[index]
        tables[index, : len(blocks)] = blocks
        j = torch.arange(length)
        places = (blocks[j // BLOCK] * BLOCK + j % BLOCK).to(device)
        q = random(rows, heads.heads)
        k, v = (random(length, heads.kv_heads) for _ in range(2))
        before = places[: length - rows]
        k_cache[before], v_cache[before] = k[: length - rows], v[: length - rows]
        parts.append((q, k[length - rows :], v[length - rows :]))
    sinks = torch.linspace(-1, 1, heads.heads, device=device).to(dtype) if heads.sinks else None
    return Ground(heads, batch, (k_cache, v_cache), tables.to(device), parts, sinks)


def compile_family(heads: Heads, dtype: torch.dtype, device: torch.device) -> Outcome:
    """Launch the kernels of a family on a few rows."""
    ground = make_ground(heads, TINY_RAGGED, dtype, device)
    step = ground.step(range(len(ground.parts)))
    ground.write(step)
    ground.attend(step).sum().item()
    return Outcome()


def check(heads: Heads, batch: Batch, dtype: torch.dtype, device: torch.device) -> Outcome:
    """Compare a step of all sequences with the reference."""
    ground = make_ground(heads, batch, dtype, device)
    step = ground.step(range(len(ground.parts)))
    ground.write(step)
    expected = attention_reference.paged_attention(
        step.q.double(), *ground.caches, step.meta, **ground.options
    ).flatten(1)
    error = error_of(ground.attend(step).flatten(1), expected, expected)
    return Outcome(error.whole, error.fault(dtype, device))


def check_mixes(
    heads: Heads, batch: Batch, dtype: torch.dtype, number: int, device: torch.device
) -> Outcome:
    """Compare the bits of every sequence alone with those that it has in random mixes."""
    ground = make_ground(heads, batch, dtype, device)
    everything = range(len(ground.parts))
    ground.write(ground.step(everything))
    alone = [ground.attend(ground.step([index])) for index in everything]
    generator = torch.Generator().manual_seed(1)
    differ = 0
    for _ in range(number):
        size = int(torch.randint(1, len(alone) + 1, (), generator=generator))
        chosen = torch.randperm(len(alone), generator=generator)[:size].tolist()
        chosen.sort(key=lambda index: index >= len(batch.decodes))
        expected = torch.cat([alone[index] for index in chosen])
        differ += not torch.equal(ground.attend(ground.step(chosen)), expected)
    fault = f"{differ} of {number} mixes have other bits" if differ else ""
    return Outcome(float(differ), fault)
