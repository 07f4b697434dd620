"""The one place where a Hugging Face model meets our KV cache."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakMethod, WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from oneplusn.kernels.cpu_attention import AttentionMeta, new_cache
from oneplusn.kernels.plan import Plan, StepHandle
from oneplusn.server.engine.attention_backends import choose

_numbers = itertools.count()
_hooks: WeakValueDictionary[str, AttentionHook] = WeakValueDictionary()


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Shape of one layer's keys and values, as its attention hands them to the hook.

    Attributes:
        heads: KV heads Hkv.
        k_dim: Size D of a key.
        v_dim: Size Dv of a value.
        window: Sliding window in tokens, the row's own included; None = the whole context.
    """

    heads: int
    k_dim: int
    v_dim: int
    window: int | None = None

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that one token takes in this layer's cache."""
        return self.heads * (self.k_dim + self.v_dim) * dtype.itemsize


class KVCache:
    """Keys and values of all layers, in blocks.

    Attributes:
        k: Per layer, [num_blocks * block_size, Hkv, D].
        v: Per layer, [num_blocks * block_size, Hkv, Dv].
        num_blocks: Blocks of every layer.
        block_size: Tokens of a block.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        tokens = num_blocks * block_size
        self.k = [new_cache(tokens, each.heads, each.k_dim, dtype, device) for each in shapes]
        self.v = [new_cache(tokens, each.heads, each.v_dim, dtype, device) for each in shapes]
        self.num_blocks = num_blocks
        self.block_size = block_size


class AttentionHook:
    """Attention of one engine, called by the model's layers under `name`.

    A layer hands over its queries, keys and values with the rotation already applied; the hook
    stores keys and values where the step's `AttentionMeta` says, and attends over the cache.

    Attributes:
        name: What the model's `attn_implementation` must be set to.
        calls: How often each layer has called, by layer index.
        backend: Who computes it.
    """

    def __init__(self, handle: StepHandle, cache: KVCache) -> None:
        """Register under a name of its own.

        Args:
            handle: Where the runner puts the step's context.
            cache: This engine's keys and values.
        """
        self.calls = [0] * len(cache.k)
        self.backend = choose((*cache.k, *cache.v))
        self._attention = self.backend.load()
        self._handle = handle
        self._cache: KVCache | None = cache
        self.name = _register(self._attend)
        _hooks[self.name] = self

    def close(self) -> None:
        """Drop the cache."""
        self._cache = None

    @property
    def cache(self) -> KVCache:
        """The engine's keys and values."""
        assert self._cache is not None, "the engine is closed"
        return self._cache

    def step(self) -> tuple[Plan, AttentionMeta]:
        """Return what the runner says of the step under way."""
        step = self._handle.current
        assert step is not None, "the model ran outside of a step"
        assert step.attention is not None, "the step has no attention metadata"
        return step.plan, step.attention

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        """Attend over the cache.

        Semantics:
            query [1, H, T, D], key [1, Hkv, T, D], value [1, Hkv, T, Dv]
            -> ([1, T, H, Dv], None), as `AttentionInterface` defines it.
        """
        layer = module.layer_idx
        assert isinstance(layer, int)
        self.calls[layer] += 1
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
        return self.attend(layer, q, k, v, scale, kwargs)[None], None

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        options: dict[str, object],
    ) -> Tensor:
        """Store the rows of a step in a layer's cache, and attend from them.

        Semantics:
            q [T, H, D], k [T, Hkv, D], v [T, Hkv, Dv] -> [T, H, Dv].

        Args:
            layer: Its index.
            q: Queries.
            k: Keys.
            v: Values.
            scale: Of the scores.
            options: What else the layer passes.
        """
        _, meta = self.step()
        k_cache, v_cache = self.cache.k[layer], self.cache.v[layer]
        self._attention.write_kv(k_cache, v_cache, k, v, meta.kv_pos)
        window, softcap, sinks = _options(options)
        return self._attention.paged_attention(
            q, k_cache, v_cache, meta, scale=scale, window=window, softcap=softcap, sinks=sinks
        )


def hook_of(model_config: Any) -> AttentionHook:  # noqa: ANN401 - every family has its own class
    """Return the hook that a model's configuration names as its attention."""
    return _hooks[model_config._attn_implementation]


class ShapeRecorder:
    """Attention that computes nothing and notes who called it with what shapes.

    Attributes:
        name: What the model's `attn_implementation` must be set to.
        seen: Layer index and shapes of every call, in order.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[int, LayerShape]] = []
        self.name = _register(self._attend)

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        """Note the call and answer zeros, [1, T, H, Dv]."""
        window, _, _ = _options(kwargs)
        layer = module.layer_idx
        assert isinstance(layer, int)
        shape = LayerShape(key.shape[1], key.shape[3], value.shape[3], window)
        self.seen.append((layer, shape))
        _, heads, rows, _ = query.shape
        return query.new_zeros(1, rows, heads, value.shape[3]), None


def model_logits(
    model: PreTrainedModel, token_ids: Tensor, positions: Tensor, rows: Tensor
) -> Tensor:
    """Run a model on the flat rows of a step.

    Semantics:
        token_ids int64 [T], positions int64 [T], rows int64 [M] -> logits [M, V] of those rows.
    """
    output = model(
        input_ids=token_ids[None],
        position_ids=positions[None],
        use_cache=False,
        logits_to_keep=rows,
    )
    logits: Tensor = output.logits
    return logits[0]


def _register(method: Callable[..., tuple[Tensor, None]]) -> str:
    """Register a method under a name that nothing else in this process has.

    A registered name cannot be taken back, so it must not keep the method's owner alive.
    """
    name = f"oneplusn_{next(_numbers)}"
    weak = WeakMethod(method)

    def attend(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:  # noqa: ANN401 - the method's
        strong = weak()
        assert strong is not None, f"what was registered as {name} is gone"
        return strong(*args, **kwargs)

    AttentionInterface.register(name, attend)
    return name


def _options(kwargs: dict[str, object]) -> tuple[int | None, float | None, Tensor | None]:
    """Pick window, softcap and sinks out of what a family passes; the rest is not ours."""
    window = kwargs.get("sliding_window")
    softcap = kwargs.get("softcap")
    sinks = kwargs.get("s_aux")
    assert window is None or isinstance(window, int)
    assert softcap is None or isinstance(softcap, float | int)
    assert sinks is None or isinstance(sinks, Tensor)
    return window, softcap, sinks
