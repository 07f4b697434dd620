"""A fast path for decoder layers of Llama's shape: Llama, Qwen2, Qwen3 and Mistral.

The layers of a loaded model are replaced one by one; embedding, rotary table, last norm and head
stay what they are. A step then goes through all layers in one call of the compiled kernels. Whether
that computes what the originals did is for the probe to say, before anything is served.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from oneplusn.adapters.attach import AdaptedLinear, AdaptedSite
from oneplusn.kernels import cpu_linear
from oneplusn.kernels.cpu_layers import LayerParts, Layers
from oneplusn.server.engine import attention
from oneplusn.server.engine.attention import AttentionHook, KVCache, hook_of
from oneplusn.server.engine.linear import CompiledLinear, PanelEmbedding

MODELS = (
    llama.LlamaForCausalLM,
    qwen2.Qwen2ForCausalLM,
    qwen3.Qwen3ForCausalLM,
    mistral.MistralForCausalLM,
)
# A decoder layer, and what it has to be made of.
FAMILIES: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    llama.LlamaDecoderLayer: (llama.LlamaAttention, llama.LlamaMLP, llama.LlamaRMSNorm),
    qwen2.Qwen2DecoderLayer: (qwen2.Qwen2Attention, qwen2.Qwen2MLP, qwen2.Qwen2RMSNorm),
    qwen3.Qwen3DecoderLayer: (qwen3.Qwen3Attention, qwen3.Qwen3MLP, qwen3.Qwen3RMSNorm),
    mistral.MistralDecoderLayer: (
        mistral.MistralAttention,
        mistral.MistralMLP,
        mistral.MistralRMSNorm,
    ),
}
# Parent and leaves of a layer's linears, in the order of `cpu_layers.LINEARS`.
LINEARS = (
    ("self_attn", "q_proj+k_proj+v_proj"),
    ("self_attn", "o_proj"),
    ("mlp", "gate_proj+up_proj"),
    ("mlp", "down_proj"),
)
Place = tuple[dict[str, nn.Module | None], str, nn.Module]
"""Children of a module, the name of one, and that one."""


class FastLayer(nn.Module):
    """One decoder layer; takes over the weights of the one that it is made from.

    It holds what the stack computes with, and is not called itself. Linears have the names of the
    sites that adapters reach: `self_attn.q_proj+k_proj+v_proj`, `self_attn.o_proj`,
    `mlp.gate_proj+up_proj`, `mlp.down_proj`.
    """

    def __init__(self, layer: Any, linears: Sequence[CompiledLinear], stack: Stack) -> None:  # noqa: ANN401  (four classes with no base in common)
        """Take the norms of a layer over, and its linears, packed."""
        super().__init__()
        told = layer.self_attn.config if type(layer) is mistral.MistralDecoderLayer else None
        self.window: int | None = getattr(told or layer.self_attn, "sliding_window", None)
        self.input_layernorm = layer.input_layernorm
        self.post_attention_layernorm = layer.post_attention_layernorm
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for name in ("q_norm", "k_norm"):
            self.self_attn.add_module(name, getattr(layer.self_attn, name, None))
        for (parent, leaf), linear in zip(LINEARS, linears, strict=True):
            self.get_submodule(parent).add_module(leaf, linear)
        self.stack = stack

    @property
    def places(self) -> list[Place]:
        """Where the linears are, and which they are now."""
        owners = [(self.get_submodule(parent)._modules, leaf) for parent, leaf in LINEARS]
        return [(children, leaf, cast(nn.Module, children[leaf])) for children, leaf in owners]

    @property
    def linears(self) -> list[nn.Module]:
        """The linears as they are now, adapted or not."""
        return [linear for _, _, linear in self.places]

    @property
    def norms(self) -> list[Tensor | None]:
        """Weights of the norms in the order of `cpu_layers.NORMS`."""
        attention = self.self_attn._modules
        modules = (self.input_layernorm, self.post_attention_layernorm)
        named = (*modules, attention["q_norm"], attention["k_norm"])
        return [None if norm is None else cast(Tensor, norm.weight) for norm in named]


class Stack:
    """The fast layers of one model, and what they are bound to: a KV cache and adapters' sites.

    Attributes:
        layers: In their order.
        bound: How they are called now; None before the first step.
    """

    def __init__(self, attention: Any, norm: Any) -> None:  # noqa: ANN401  (as above)
        """Read what all layers have in common from the attention and a norm of one."""
        self.layers: list[FastLayer] = []
        self.bound: Layers | None = None
        self._config: Any = attention.config
        linears = attention.q_proj, attention.k_proj
        heads = [linear.out_features // attention.head_dim for linear in linears]
        self._heads = heads[0], heads[1]
        self._scale: float = attention.scaling
        self._eps: float = norm.variance_epsilon
        self._cache: KVCache | None = None
        self._places: list[Place] = []

    def run(self, h: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Take the rows of a step through all layers: h `[T, K]`, cos and sin `[T, D]`."""
        hook = hook_of(self._config)
        bound = self._bind(hook)
        plan, meta = hook.step()
        bound.run(h, cos, sin, meta, plan)
        hook.calls = [count + 1 for count in hook.calls]

    def _bind(self, hook: AttentionHook) -> Layers:
        """Look the addresses up, unless that was done for these modules and this cache."""
        if self.bound is None or hook.cache is not self._cache or self._has_changed():
            seconds = None if self.bound is None else self.bound.seconds
            linears = [layer.linears for layer in self.layers]
            parts = [
                LayerParts(
                    linears=[_base(linear).panels for linear in each],
                    sites=[_site(linear) for linear in each],
                    norms=layer.norms,
                    k_cache=k_cache,
                    v_cache=v_cache,
                    window=layer.window,
                )
                for layer, each, k_cache, v_cache in zip(
                    self.layers, linears, hook.cache.k, hook.cache.v, strict=True
                )
            ]
            self.bound = Layers(parts, self._heads, self._eps, self._scale)
            self.bound.seconds = seconds
            self._cache = hook.cache
            self._places = [place for layer in self.layers for place in layer.places]
        return self.bound

    def _has_changed(self) -> bool:
        """Tell whether a linear has been wrapped or unwrapped since it was looked up."""
        return any(children[leaf] is not linear for children, leaf, linear in self._places)


def _base(linear: nn.Module) -> CompiledLinear:
    base = linear.base if isinstance(linear, AdaptedLinear | AdaptedSite) else linear
    assert isinstance(base, CompiledLinear), type(base)
    return base


def _site(linear: nn.Module) -> Any:  # noqa: ANN401  (a Site, or None where no adapter reaches)
    return linear.site if isinstance(linear, AdaptedLinear | AdaptedSite) else None


def stack_of(model: nn.Module) -> Stack | None:
    """Return the fast layers of a model; None where it has others."""
    if type(model) not in MODELS:
        return None
    first = cast(Any, model).model.layers[0]
    return first.stack if isinstance(first, FastLayer) else None


def model_logits(
    model: PreTrainedModel, token_ids: Tensor, positions: Tensor, rows: Tensor
) -> Tensor:
    """Run a model on the flat rows of a step, by its fast layers if it has some.

    Semantics:
        token_ids int64 [T], positions int64 [T], rows int64 [M] -> logits [M, V] of those rows.
    """
    stack = stack_of(model)
    if stack is None:
        return attention.model_logits(model, token_ids, positions, rows)
    parts: Any = model
    h: Tensor = parts.model.embed_tokens(token_ids)
    cos, sin = parts.model.rotary_emb(h[None], positions[None])
    stack.run(h, cos[0], sin[0])
    logits: Tensor = parts.lm_head(parts.model.norm(h[rows]))
    return logits


def accelerate(model: PreTrainedModel, stored: torch.dtype | None = None) -> bool:
    """Replace the model's layers by fast ones where that is possible; tell whether they are fast.

    Sites have to be looked for before, as the linears of slices are gone afterwards.

    Args:
        model: On the CPU.
        stored: int8 to keep the weights of the layers' linears in it; None = as they are.
    """
    kept = stored or model.dtype
    if stack_of(model) is not None:
        return True
    layers = cast(Any, model).model.layers if type(model) in MODELS else nn.ModuleList()
    if not len(layers) or not all(_fits(layer, kept) for layer in layers):
        return False
    first: Any = layers[0]
    stack = Stack(first.self_attn, first.input_layernorm)
    elements = sum(cpu_linear.size_of(shape, kept) for layer in layers for shape in _shapes(layer))
    packed = cpu_linear.pack(_weights(layers), elements, kept)
    for index, layer in enumerate(layers):
        linears = [CompiledLinear(next(packed)) for _ in LINEARS]
        stack.layers.append(FastLayer(layer, linears, stack))
        layers[index] = stack.layers[index]
    return True


def has_tied_head(model: PreTrainedModel) -> bool:
    """Tell whether a model of a fast family has one weight for its embedding and its head."""
    if type(model) not in MODELS:
        return False
    parts: Any = model
    return parts.lm_head.weight is parts.model.embed_tokens.weight


def embed_by_head(model: PreTrainedModel) -> None:
    """Have the embedding of a fast model read the head's weight, to which it was tied.

    A head that was packed is a copy: 57 of 269 MB in a model of 134.5 million weights. Where it is
    kept in int8, the embedding stays what it was.
    """
    parts: Any = model
    head = parts.lm_head
    if stack_of(model) is None or not isinstance(head, CompiledLinear):
        return
    if head.panels.stored == head.panels.dtype:
        parts.model.embed_tokens = PanelEmbedding(head.panels)


def _fits(layer: Any, kept: torch.dtype) -> bool:  # noqa: ANN401  (any module that is a layer)
    """Tell whether a layer is one of those that a fast layer computes like, and no subclass."""
    kinds = FAMILIES.get(type(layer))
    if kinds is None or layer.self_attn.config.hidden_act != "silu":
        return False
    known = (*kinds, nn.Linear)
    own = [child for child in layer.modules() if child is not layer]
    linears = [child for child in own if isinstance(child, nn.Linear)]
    return all(type(child) in known or child is layer.mlp.act_fn for child in own) and all(
        cpu_linear.takes(linear.weight, kept) for linear in linears
    )


def _siblings(layer: nn.Module) -> Iterator[list[nn.Linear]]:
    """Yield the linears that become one, in the order of LINEARS."""
    for parent, leaf in LINEARS:
        owner = layer.get_submodule(parent)
        yield [cast(nn.Linear, owner.get_submodule(name)) for name in leaf.split("+")]


def _shapes(layer: nn.Module) -> Iterator[tuple[int, int]]:
    for parts in _siblings(layer):
        yield sum(part.out_features for part in parts), parts[0].in_features


def _weights(layers: nn.ModuleList) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield weight and bias of every linear of every layer, siblings side by side.

    Layers may be replaced meanwhile, each after its own.
    """
    for index in range(len(layers)):
        for parts in _siblings(layers[index]):
            weight = torch.cat([part.weight.detach() for part in parts])
            biases = [part.bias.detach() for part in parts if part.bias is not None]
            yield weight, torch.cat(biases) if biases else None
