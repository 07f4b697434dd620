"""Prove, before anything is served, that a model computes the same through our attention hook.

A model that goes around the hook is not refused by transformers; it is wrong in silence.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oneplusn.errors import ModelRefused
from oneplusn.kernels.cpu_attention import AttentionMeta
from oneplusn.kernels.plan import StepContext, StepHandle, build_plan
from oneplusn.server.engine.attention import (
    AttentionHook,
    KVCache,
    LayerShape,
    ShapeRecorder,
)
from oneplusn.server.engine.families import model_logits

BLOCK_SIZE = 16
# Windows up to this long are crossed by the probe's longest sequence.
LONGEST_WINDOW = 64
# Models of up to so many weights are probed as an fp32 copy, where a small error shows.
FP32_WEIGHTS = 300_000_000
# Largest error of a logit, as a share of the logits' standard deviation, computed in fp32.
FP32_BOUND = 1e-4
# Root mean square of the errors, as such a share, in 16 bits: rounding alone makes some percent
# of 30 layers, and attention over wrong tokens half and more.
HALF_BOUND = 0.1


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """How a model passed.

    Attributes:
        layers: Shape of every layer's keys and values.
        dtype: What the probe computed in.
        error: Of the logits, as a share of their standard deviation; the largest in fp32, the
            root mean square in 16 bits.
        bound: What it had to stay under.
    """

    layers: tuple[LayerShape, ...]
    dtype: torch.dtype
    error: float
    bound: float


class _Span(NamedTuple):
    """Tokens `start` to `stop - 1` of sequence `seq`."""

    seq: int
    start: int
    stop: int


@torch.inference_mode()
def probe(
    model: PreTrainedModel,
    change: Callable[[PreTrainedModel], object] | None = None,
    rounded: Callable[[PreTrainedModel], AbstractContextManager[None]] | None = None,
) -> ProbeReport:
    """Compare ragged steps over a paged cache with the model's own attention.

    Three sequences, one longer than any window that is short enough: a prompt in two chunks, a
    whole prompt beside it, decode rows beside chunks, then decode rows alone. Leaves the model
    with its own plain attention.

    Args:
        model: In inference mode.
        change: Replaces parts of a model by faster ones, if it can; what it leaves is compared
            with the original's logits. The model is changed, or a copy of it.
        rounded: While open, gives a model's weights the values that `change` leaves of them; the
            original's logits are those with these.

    Raises:
        ModelRefused: With what was counted and measured.
    """
    layers = discover_layers(model)
    exact = model.dtype == torch.float32
    if not exact and sum(weight.numel() for weight in model.parameters()) <= FP32_WEIGHTS:
        model, exact = copy.deepcopy(model).float(), True
    sequences = _sequences(model, layers)
    with rounded(model) if rounded is not None else nullcontext():
        expected = [_own_logits(model, tokens) for tokens in sequences]
    if change is not None:
        change(model)
    return _verdict(model, layers, sequences, expected, exact=exact)


def _verdict(
    model: PreTrainedModel,
    layers: tuple[LayerShape, ...],
    sequences: list[Tensor],
    expected: list[Tensor],
    *,
    exact: bool,
) -> ProbeReport:
    """Compare a model's logits through the hook with those that are expected.

    Raises:
        ModelRefused: They are too far off.
    """
    actual = _paged_logits(model, layers, sequences)
    errors = torch.cat(actual).double() - torch.cat(expected).double()
    error = errors.abs().max() if exact else errors.square().mean().sqrt()
    share = (error / torch.cat(expected).double().std()).item()
    bound = FP32_BOUND if exact else HALF_BOUND
    # NaN must fail, so not `share > bound`.
    if not share <= bound:
        msg = (
            f"{_name(model)} is refused: its logits through the attention hook are off by "
            f"{share:.3g} of their standard deviation in {model.dtype}, the limit is {bound:g} "
            f"({len(layers)} of {len(layers)} layers called the hook); its attention does "
            f"something that the hook is not told of"
        )
        raise ModelRefused(msg)
    return ProbeReport(layers, model.dtype, share, bound)


@torch.inference_mode()
def discover_layers(model: PreTrainedModel) -> tuple[LayerShape, ...]:
    """Run the model once and note what every layer hands to the attention hook.

    Leaves the model with its own plain attention.

    Raises:
        ModelRefused: A layer does not call the hook exactly once.
    """
    recorder = ShapeRecorder()
    expected = model.config.get_text_config().num_hidden_layers
    if model._can_set_attn_implementation():
        model.set_attn_implementation(recorder.name)
        _own_logits(model, torch.arange(4))
        model.set_attn_implementation("eager")
    calls = Counter(layer for layer, _ in recorder.seen)
    if calls != dict.fromkeys(range(expected), 1):
        each = ", ".join(f"layer {layer}: {calls[layer]}" for layer in sorted(calls))
        msg = (
            f"{_name(model)} is refused: {len(recorder.seen)} calls of the attention hook by "
            f"{expected} layers, where each must make one ({each or 'none made any'}); only "
            f"models whose attention goes through transformers' attention interface can be served"
        )
        raise ModelRefused(msg)
    return tuple(shape for _, shape in sorted(recorder.seen, key=lambda call: call[0]))


def _sequences(model: PreTrainedModel, layers: Sequence[LayerShape]) -> list[Tensor]:
    """Draw three sequences of random tokens, the first longer than the windows up to the limit."""
    text = model.config.get_text_config()
    windows = [layer.window for layer in layers if layer.window is not None]
    testable = max((window for window in windows if window <= LONGEST_WINDOW), default=BLOCK_SIZE)
    longest = min(testable + 9, text.max_position_embeddings)
    draw = torch.Generator().manual_seed(0)
    return [
        torch.randint(text.vocab_size, (length,), generator=draw)
        for length in (longest, longest // 2 + 5, 6)
    ]


def _schedule(sequences: Sequence[Tensor]) -> list[list[_Span]]:
    """Cut three sequences into four steps, decode rows first in each."""
    long, middle, short = (len(tokens) for tokens in sequences)
    half = long // 2
    return [
        [_Span(0, 0, half), _Span(2, 0, short - 2)],
        [_Span(2, short - 2, short - 1), _Span(0, half, long - 2), _Span(1, 0, middle - 2)],
        [_Span(1, middle - 2, middle - 1), _Span(0, long - 2, long - 1)],
        [_Span(0, long - 1, long), _Span(2, short - 1, short), _Span(1, middle - 1, middle)],
    ]


def _paged_logits(
    model: PreTrainedModel, layers: Sequence[LayerShape], sequences: Sequence[Tensor]
) -> list[Tensor]:
    """Compute the logits of all tokens through the hook. Returns [length, V] per sequence.

    Raises:
        ModelRefused: The model does not pick the rows that it is asked for.
    """
    handle = StepHandle()
    per_seq = -(-max(map(len, sequences)) // BLOCK_SIZE)
    hook = AttentionHook(handle, KVCache(layers, per_seq * len(sequences), BLOCK_SIZE, model.dtype))
    model.set_attn_implementation(hook.name)
    found: list[list[Tensor]] = [[] for _ in sequences]
    for spans in _schedule(sequences):
        tokens = torch.cat([sequences[span.seq][span.start : span.stop] for span in spans])
        positions = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        handle.current = StepContext(build_plan([0] * len(tokens), {}), _meta(spans, per_seq))
        # Backwards, as a model that ignores the index would otherwise go unnoticed.
        backwards = torch.arange(len(tokens)).flip(0)
        try:
            logits = model_logits(model, tokens, positions, backwards)
        except AttributeError as error:
            msg = f"{_name(model)} is refused: it reads its linears' weights itself ({error})"
            raise ModelRefused(msg) from error
        if len(logits) != len(tokens):
            msg = f"{_name(model)} is refused: it does not know `logits_to_keep`"
            raise ModelRefused(msg)
        counts = [span.stop - span.start for span in spans]
        for span, rows in zip(spans, logits.flip(0).split(counts), strict=True):
            found[span.seq].append(rows)
    hook.close()
    model.set_attn_implementation("eager")
    return [torch.cat(rows) for rows in found]


def _meta(spans: Sequence[_Span], per_seq: int) -> AttentionMeta:
    """Lay a step out; sequence s has the blocks s, s + 3, s + 6 … from the end of the cache."""
    blocks = torch.arange(3 * per_seq).flip(0).view(per_seq, 3).t()
    positions = [torch.arange(span.start, span.stop) for span in spans]
    kv_pos = [
        blocks[span.seq, at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
        for span, at in zip(spans, positions, strict=True)
    ]
    counts = torch.tensor([0] + [span.stop - span.start for span in spans])
    return AttentionMeta(
        kv_pos=torch.cat(kv_pos),
        query_start=counts.cumsum(0).int(),
        context_lens=torch.tensor([span.stop for span in spans], dtype=torch.int32),
        block_tables=blocks[[span.seq for span in spans]].int(),
        block_size=BLOCK_SIZE,
        num_decodes=next((i for i, n in enumerate(counts[1:].tolist()) if n > 1), len(spans)),
    )


def _own_logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Run one sequence whole, as anyone would: [T] -> [T, V]."""
    logits: Tensor = model(input_ids=tokens[None], use_cache=False).logits
    return logits[0]


def _name(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} ({model.config.model_type})"
