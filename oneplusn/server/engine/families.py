"""A fast path for decoder layers of Llama's shape: Llama, Qwen2, Qwen3 and Mistral.

The layers of a loaded model are replaced one by one; embedding, rotary table, last norm and head
stay what they are, and so does everything that calls the model. A fast layer multiplies with one
linear per site in place of one per slice, and does what lies between by compiled kernels. Whether
it computes what its original did is for the probe to say, before anything is served.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from oneplusn.kernels import attention_native
from oneplusn.kernels.cpu_layer import rms_norm, rotate, silu_mul

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
QKV = "q_proj+k_proj+v_proj"
GATE_UP = "gate_proj+up_proj"


class FastLayer(nn.Module):
    """One decoder layer; takes over the weights of the one that it is made from.

    Modules have the names of the sites that adapters reach: `self_attn.q_proj+k_proj+v_proj`,
    `self_attn.o_proj`, `mlp.gate_proj+up_proj`, `mlp.down_proj`.
    """

    def __init__(self, layer: Any) -> None:  # noqa: ANN401  (four classes with no base in common)
        """Put the weights of siblings into one linear each."""
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self._config: Any = attention.config
        self._head_dim: int = attention.head_dim
        self._scaling: float = attention.scaling
        told = attention.config if type(layer) is mistral.MistralDecoderLayer else attention
        self._window: int | None = getattr(told, "sliding_window", None)
        self._heads = tuple(
            linear.out_features // self._head_dim for linear in (attention.q_proj, attention.k_proj)
        )
        self._eps: float = layer.input_layernorm.variance_epsilon
        self.input_layernorm = layer.input_layernorm
        self.post_attention_layernorm = layer.post_attention_layernorm
        self.head_norms = nn.ModuleList(
            getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)
        )
        self.self_attn = nn.Module()
        self.self_attn.layer_idx = attention.layer_idx
        self.self_attn.add_module(QKV, _side_by_side(attention, QKV))
        self.self_attn.add_module("o_proj", attention.o_proj)
        self.mlp = nn.Module()
        self.mlp.add_module(GATE_UP, _side_by_side(mlp, GATE_UP))
        self.mlp.add_module("down_proj", mlp.down_proj)

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: object
    ) -> Tensor:
        """Compute the layer in place: hidden_states `[1, T, K]`, cos and sin `[1, T, D]`."""
        h = hidden_states[0]
        x = rms_norm(h, self.input_layernorm.weight, self._eps)
        attended = self._attend(x, *position_embeddings)
        x = rms_norm(h, self.post_attention_layernorm.weight, self._eps, added=attended)
        gate_up, down = self.mlp.children()
        h += down(silu_mul(gate_up(x)))
        return hidden_states

    def _attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qkv_proj, o_proj = self.self_attn.children()
        qkv: Tensor = qkv_proj(x)
        rotate(qkv, cos[0], sin[0], heads=self._heads, norms=self._norms(), eps=self._eps)
        heads = qkv.view(len(x), -1, self._head_dim).transpose(0, 1)[None]
        num_q, num_k = self._heads
        interface = ALL_ATTENTION_FUNCTIONS[self._config._attn_implementation]
        attended, _ = interface(
            self.self_attn,
            heads[:, :num_q],
            heads[:, num_q : num_q + num_k],
            heads[:, num_q + num_k :],
            None,
            scaling=self._scaling,
            sliding_window=self._window,
        )
        out: Tensor = o_proj(attended.view(len(x), -1))
        return out

    def _norms(self) -> tuple[Tensor, Tensor] | None:
        """Return the weights of the norms of queries and keys, where the family has some."""
        weights = tuple(self.head_norms.parameters())
        return (weights[0], weights[1]) if weights else None


def accelerate(model: PreTrainedModel) -> bool:
    """Replace the model's layers by fast ones where that is possible; tell whether they are fast.

    Sites have to be looked for before, as the linears of slices are gone afterwards.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not attention_native.takes(model.dtype):
        return False
    if all(isinstance(layer, FastLayer) for layer in layers):
        return True
    if model.device.type != "cpu" or not all(_fits(layer) for layer in layers):
        return False
    for index, layer in enumerate(layers):
        layers[index] = FastLayer(layer)
    return True


def _fits(layer: Any) -> bool:  # noqa: ANN401  (any module that is a layer)
    """Tell whether a layer is one of those that a fast layer computes like, and no subclass."""
    kinds = FAMILIES.get(type(layer))
    if kinds is None or layer.self_attn.config.hidden_act != "silu":
        return False
    known = (*kinds, nn.Linear)
    own = (child for child in layer.modules() if child is not layer)
    return all(type(child) in known or child is layer.mlp.act_fn for child in own)


def _side_by_side(parent: Any, names: str) -> nn.Linear:  # noqa: ANN401  (its linears' owner)
    """Make one linear of siblings, their outputs one after another."""
    parts = [getattr(parent, name) for name in names.split("+")]
    weight = torch.cat([part.weight.detach() for part in parts])
    with torch.device("meta"):
        fused = nn.Linear(weight.shape[1], weight.shape[0], bias=parts[0].bias is not None)
    fused.weight = nn.Parameter(weight, requires_grad=False)
    if parts[0].bias is not None:
        bias = torch.cat([part.bias.detach() for part in parts])
        fused.bias = nn.Parameter(bias, requires_grad=False)
    return fused
