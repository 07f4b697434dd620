"""Tiny random models of many families, built from their configurations."""

from __future__ import annotations

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCAB = 96
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 1,
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": None,
    "eos_token_id": 1,
}
NO_INTERFACE = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB}
WINDOW = {"sliding_window": 20}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 128,
}

FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("LlamaConfig", COMMON),
    "qwen2": ("Qwen2Config", COMMON),
    "qwen3": ("Qwen3Config", COMMON | {"head_dim": 8}),
    "mistral": ("MistralConfig", COMMON | WINDOW),
    "gemma2": ("Gemma2Config", COMMON | WINDOW | {"head_dim": 8}),
    "gemma3": (
        "Gemma3TextConfig",
        COMMON | WINDOW | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": ("Phi3Config", COMMON | WINDOW),
    "mixtral": ("MixtralConfig", COMMON | EXPERTS),
    "gpt2": ("GPT2Config", GPT2),
    "gpt_oss": (
        "GptOssConfig",
        COMMON | WINDOW | EXPERTS | {"head_dim": 8, "rope_parameters": YARN},
    ),
    "bloom": ("BloomConfig", NO_INTERFACE | {"hidden_size": 32}),
    "falcon": ("FalconConfig", NO_INTERFACE | {"hidden_size": 32}),
}


def tiny_config(family: str, **changes: object) -> PreTrainedConfig:
    name, values = FAMILIES[family]
    config: PreTrainedConfig = getattr(transformers, name)(**(values | changes))
    return config


def tiny_model(family: str, *, seed: int = 0, **changes: object) -> PreTrainedModel:
    """Random weights large enough that attention and every layer matter to the logits."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.15)
    return model
