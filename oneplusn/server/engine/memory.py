"""Divide the machine's memory between KV cache and adapters, or say why it cannot be done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from oneplusn.errors import MemoryPlanRefused
from oneplusn.server.host import available_memory

if TYPE_CHECKING:
    from oneplusn.server.engine.model import LoadedModel

GIB = 2**30
MIB = 2**20
# Where nothing is said: a KV cache for every sequence at a quarter of the context, and a pool of
# this size, neither above its share of what is free.
DEFAULT_ADAPTER_BYTES = GIB
KV_SHARE = 0.25
ADAPTER_SHARE = 0.15


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Who gets how much, in bytes.

    Attributes:
        weights: Of the base model; they are in memory already.
        kv: Of the KV cache.
        adapters: Of the pool of resident adapters.
        free: What was free for the last two.
        block_bytes: One KV block in all layers.
        num_blocks: Blocks of the KV cache.
    """

    weights: int
    kv: int
    adapters: int
    free: int
    block_bytes: int
    num_blocks: int

    def __str__(self) -> str:
        rows = [
            ("base weights (loaded)", self.weights, ""),
            ("KV cache", self.kv, f"{self.num_blocks} blocks of {self.block_bytes} bytes"),
            ("adapters", self.adapters, ""),
            ("free memory", self.free, ""),
        ]
        return "\n".join(
            f"{what:<22} {size / MIB:>10.1f} MiB  {note}".rstrip() for what, size, note in rows
        )


def plan_memory(
    loaded: LoadedModel,
    *,
    kv_memory: int | None,
    adapter_memory: int | None,
    block_size: int,
    wanted_tokens: int,
) -> MemoryPlan:
    """Decide how much the KV cache and the adapters get.

    Args:
        loaded: The base model, in memory.
        kv_memory: Bytes for the KV cache; None = enough for `wanted_tokens`, within its share.
        adapter_memory: Bytes for adapters; None = 1 GiB, within its share.
        block_size: Tokens of a KV block.
        wanted_tokens: Tokens that the cache should hold.

    Raises:
        MemoryPlanRefused: What was asked for is not free, or holds no block; with the plan.
    """
    free = available_memory()
    block_bytes = block_size * sum(layer.token_bytes(loaded.dtype) for layer in loaded.layers)
    if kv_memory is None:
        wanted = -(-wanted_tokens // block_size) * block_bytes
        kv_memory = min(wanted, int(free * KV_SHARE))
    if adapter_memory is None:
        adapter_memory = min(DEFAULT_ADAPTER_BYTES, int(free * ADAPTER_SHARE))
    num_blocks = kv_memory // block_bytes
    plan = MemoryPlan(
        loaded.num_bytes, num_blocks * block_bytes, adapter_memory, free, block_bytes, num_blocks
    )
    if num_blocks == 0:
        msg = (
            f"{kv_memory} bytes of KV memory hold no block of {block_bytes} bytes; give the KV "
            f"cache at least that\n{plan}"
        )
        raise MemoryPlanRefused(msg)
    if plan.kv + plan.adapters > free:
        msg = (
            f"KV cache and adapters take {plan.kv + plan.adapters} bytes together and {free} are "
            f"free; lower --kv-memory or --adapter-memory\n{plan}"
        )
        raise MemoryPlanRefused(msg)
    return plan


def check_weights_fit(folder: Path, dtype: torch.dtype, *, stored: torch.dtype) -> None:
    """Compare a model's files with the memory that is free, before they are read.

    Args:
        folder: With the safetensors; of a model on the hub nothing is known yet.
        dtype: What the weights are converted to.
        stored: What the files hold.

    Raises:
        MemoryPlanRefused: They do not fit.
    """
    files = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    weights = files * dtype.itemsize // stored.itemsize
    free = available_memory()
    if weights > free:
        msg = (
            f"the weights of {folder} take {weights / MIB:.0f} MiB in {dtype} and "
            f"{free / MIB:.0f} MiB are free; choose a smaller model or dtype"
        )
        raise MemoryPlanRefused(msg)
