"""What attention over the paged KV cache should take, what it takes, and torch's beside it.

Timed like the other ways: a CUDA graph over several copies of the caches, more than the L2 holds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import ceil

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from oneplusn.kernels.smoke import roofline
from oneplusn.kernels.smoke.attention import (
    BLOCK,
    LLAMA,
    PAGED,
    Batch,
    Ground,
    Heads,
    Step,
    make_ground,
)
from oneplusn.kernels.smoke.attention import (
    SITE as SITE,
)
from oneplusn.kernels.smoke.outcome import Outcome, error_of
from oneplusn.kernels.smoke.timing import CACHE_FACTOR, MAX_COPIES, MIN_COPIES, Graph, replay_us
from oneplusn.kernels.triton_attention_backend import paged_attention

SDPA = "torch SDPA, gathered"
BOUND = "bytes or flops alone"
WAYS = (BOUND, PAGED, SDPA)
EFFICIENCY = {
    (PAGED, "decode"): 0.8,
    (PAGED, "prefill"): 0.35,
    (SDPA, "decode"): 0.5,
    (SDPA, "prefill"): 0.45,
}
"""Share of the memory's or the matrix units' rate that a way should reach; estimates."""
LAUNCHES = {(PAGED, "decode"): 2}
"""All others are one launch."""

TIMED = (
    Batch((2048,) * 32),
    Batch((8192,)),
    Batch((8192,) * 8),
    Batch((2048,) * 128),
    Batch((1024,) * 256),
    Batch(chunks=((2048, 2048),)),
    Batch(chunks=((512, 512),) * 4),
    Batch(chunks=((2048, 8192),)),
)
TINY_TIMED = (Batch((40,) * 2), Batch(chunks=((9, 9),)))


def predict(way: str, batch: Batch, heads: Heads = LLAMA) -> float:
    """Return the microseconds that a way should take for one layer."""
    rows = sum(rows for rows, _ in batch.sequences)
    tokens = sum(length for _, length in batch.sequences)
    pairs = sum(rows * length - rows * (rows - 1) // 2 for rows, length in batch.sequences)
    vectors = 2 * tokens * heads.kv_heads + 2 * rows * heads.heads
    num_bytes = roofline.ELEMENT * heads.dim * vectors
    flops = 4 * pairs * heads.heads * heads.dim
    bound = 1e6 * max(num_bytes / roofline.MEMORY_BANDWIDTH, flops / roofline.MATRIX_RATE)
    if way == BOUND:
        return bound
    launches = LAUNCHES.get((way, batch.phase), 1)
    started = launches * (roofline.LAUNCH_US + roofline.PATH_US)
    return started + bound / EFFICIENCY[way, batch.phase]


def time_way(way: str, heads: Heads, batch: Batch, device: torch.device) -> Outcome:
    """Check what a way computes in bf16, and time it on caches that the L2 does not hold."""
    ground = make_ground(heads, batch, torch.bfloat16, device)
    step = ground.step(range(len(ground.parts)))
    ground.write(step)
    if way == SDPA and any(rows not in {1, length} for rows, length in batch.sequences):
        return Outcome(left_out="its causal mask begins at the first token")
    run, caches = _SETUPS[way](ground, step)
    expected = ground.attend(step).double().flatten(1)
    if fault := error_of(run(*caches).flatten(1), expected, expected).fault(step.q.dtype, device):
        return Outcome(fault=f"against {PAGED}: {fault}")
    held = sum(cache.nbytes for cache in caches)
    wanted = ceil(CACHE_FACTOR * roofline.CACHE_BYTES / held) if device.type == "cuda" else 0
    number = min(max(wanted, MIN_COPIES), MAX_COPIES)
    copies = [tuple(cache.clone() for cache in caches) for _ in range(number - 1)]
    calls = [partial(run, *each) for each in (caches, *copies)]
    graph = Graph(calls, device)
    if device.type != "cuda":
        graph.replay()
        return Outcome(note="not timed")
    return Outcome(replay_us(graph, device) / len(calls))


Run = tuple[Callable[[Tensor, Tensor], Tensor], tuple[Tensor, Tensor]]


def _paged(ground: Ground, step: Step) -> Run:
    def run(k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return paged_attention(step.q, k_cache, v_cache, step.meta, **ground.options)

    return run, ground.caches


def _sdpa(ground: Ground, step: Step) -> Run:
    """Gather keys and values beforehand: sequences are of equal length, without windows."""
    rows, length = ground.batch.sequences[0]
    size, heads = len(ground.parts), ground.heads
    j = torch.arange(length, device=step.q.device)
    places = (step.meta.block_tables[:, j // BLOCK].long() * BLOCK + j % BLOCK).flatten()
    k, v = (cache[places].view(size, length, *cache.shape[1:]) for cache in ground.caches)
    q = step.q.view(size, rows, heads.heads, heads.dim).transpose(1, 2)

    def run(k: Tensor, v: Tensor) -> Tensor:
        out = scaled_dot_product_attention(
            q, k, v, is_causal=rows > 1, enable_gqa=True, scale=heads.dim**-0.5
        )
        return out.transpose(1, 2).reshape(-1, heads.heads, heads.dim)

    return run, (k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous())


_SETUPS: dict[str, Callable[[Ground, Step], Run]] = {PAGED: _paged, SDPA: _sdpa}
