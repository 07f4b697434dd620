"""Load a base model, refuse what would be served wrongly, and say what the engine must know."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

import oneplusn.demo
from oneplusn.adapters.attach import find_sites
from oneplusn.adapters.fingerprint import base_fingerprint
from oneplusn.errors import ConfigError, ModelRefused
from oneplusn.kernels import native, ops
from oneplusn.kernels.plan import SiteSpec
from oneplusn.server.engine.attention import LayerShape
from oneplusn.server.engine.families import accelerate, embed_by_head, has_tied_head
from oneplusn.server.engine.linear import (
    CompiledLinear,
    PackedLinear,
    pack_linears,
    rounded_linears,
)
from oneplusn.server.engine.memory import check_weights_fit
from oneplusn.server.engine.probe import ProbeReport, probe
from oneplusn.server.host import free_cores, give_memory_back

DEMO = "demo"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
QUANTIZE = {"none": None, "int8": torch.int8}


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A base model that passed its probe.

    Attributes:
        model: The Hugging Face model, in inference mode, its layers replaced by fast ones and its
            linears packed where that helps.
        folder: Where its tokenizer lies.
        dtype: Of the activations, and of all weights that are not in int8.
        eos_ids: Tokens that end a sequence.
        vocab_size: Number of logits V.
        max_model_len: Most tokens of a sequence that the model can tell apart.
        layers: Shape of every layer's keys and values.
        sites: Linears that adapters can reach.
        num_bytes: What the weights take.
        probe: How the model passed.
        fingerprint: Identity of the weights' files; empty for a model that came from none.
    """

    model: PreTrainedModel
    folder: Path
    dtype: torch.dtype
    eos_ids: frozenset[int]
    vocab_size: int
    max_model_len: int
    layers: tuple[LayerShape, ...]
    sites: tuple[SiteSpec, ...]
    num_bytes: int
    probe: ProbeReport
    fingerprint: str = ""


def load_model(
    path_or_id: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    quantize: str = "none",
) -> LoadedModel:
    """Load, probe and prepare a base model. Code that comes with a model is never run.

    Args:
        path_or_id: "demo", a folder, or the id of a model on the hub.
        revision: Branch, tag or commit, for a hub id.
        dtype: "auto", "float32", "bfloat16" or "float16". "auto" is bf16 where the model's file
            is and the processor multiplies it natively, else fp32.
        device: "auto" or "cpu".
        threads: Threads to compute with, in the whole process; None = those that
            `host.free_cores` finds.
        quantize: "none", or "int8" to keep the weights of linears in 8 bits, as `Int8Weight` does.

    Raises:
        ConfigError: There is no such model, device, dtype or way to quantize, or int8 does not go
            with them.
        ModelRefused: The model needs code of its own, its files and its class do not match, or it
            failed its probe.
        MemoryPlanRefused: Its weights do not fit in what is free.
    """
    if device not in ("auto", "cpu"):
        msg = f"device {device!r} is not supported; use 'cpu' or 'auto'"
        raise ConfigError(msg)
    native.use_threads(free_cores() if threads is None else threads)
    path = resolve_model(path_or_id)
    config = _load_config(path, revision)
    computed = resolve_dtype(config, dtype)
    stored = resolve_quantize(config, quantize, computed)
    check_weights_fit(Path(path), computed, stored=_stored_dtype(config) or computed)
    model = _load_weights(path, revision, config, computed)
    folder = _tokenizer_folder(path, revision)
    return prepare_model(model, folder, fingerprint=base_fingerprint(folder), stored=stored)


def prepare_model(
    model: PreTrainedModel,
    folder: Path,
    *,
    fingerprint: str = "",
    stored: torch.dtype | None = None,
) -> LoadedModel:
    """Probe a model and pack its linears.

    Args:
        model: With its weights, on the CPU.
        folder: Where its tokenizer lies.
        fingerprint: Identity of the files that it came from.
        stored: int8 to keep the weights of linears in it; None = as they are.

    Raises:
        ModelRefused: It failed its probe, or does not say how long its context is, or has no
            linear for int8.
    """
    model.eval().requires_grad_(requires_grad=False)
    sites, is_tied = tuple(find_sites(model)), has_tied_head(model)
    rounded = None if stored is None else partial(rounded_linears, stored=stored)
    report = probe(model, partial(_speed_up, stored=stored), rounded)
    max_model_len = _max_model_len(model.config, report.layers)
    _speed_up(model, stored)
    pack_linears(model, stored)
    if is_tied:
        embed_by_head(model)
    if stored is not None:
        _check_packed(model, stored)
    for weight in (*model.parameters(), *model.buffers()):
        weight.data = weight.data.clone()  # of a mapped file, the little that is still used
    give_memory_back()
    return LoadedModel(
        model=model,
        folder=folder,
        dtype=model.dtype,
        eos_ids=_eos_ids(model),
        vocab_size=model.config.get_text_config().vocab_size,
        max_model_len=max_model_len,
        layers=report.layers,
        sites=sites,
        num_bytes=_num_bytes(model),
        probe=report,
        fingerprint=fingerprint,
    )


def _speed_up(model: PreTrainedModel, stored: torch.dtype | None) -> None:
    """Give a model fast layers where that is possible, and other linears what int8 leaves them."""
    accelerate(model, stored)
    if stored is not None:
        pack_linears(model, stored)


def resolve_model(name: str) -> str:
    """Turn "demo" into the packaged folder; check a path; leave a hub id as it is.

    Raises:
        ConfigError: The folder is missing, or holds an adapter in place of a model.
    """
    folder = demo_data() / "base" if name == DEMO else Path(name)
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return str(folder)
        what = "an adapter" if (folder / "adapter_config.json").is_file() else "no config.json"
        msg = f"{folder} holds {what}; give the folder of a base model"
        raise ConfigError(msg)
    if name == DEMO:
        msg = f"the demo model is not at {folder}; make it with `python -m oneplusn.demo.build`"
        raise ConfigError(msg)
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        msg = f"there is no folder {name}; give an existing folder, a hub id or 'demo'"
        raise ConfigError(msg)
    return name


def demo_data() -> Path:
    """Return the packaged folder of the demo's model and adapters."""
    return Path(next(iter(oneplusn.demo.__path__))) / "data"


def resolve_dtype(config: PreTrainedConfig, name: str = "auto") -> torch.dtype:
    """Choose the dtype to compute in, as `load_model` describes.

    Raises:
        ConfigError: No such dtype.
    """
    if name != "auto":
        if name not in DTYPES:
            msg = f"dtype {name!r} is not supported; use one of auto, {', '.join(DTYPES)}"
            raise ConfigError(msg)
        return DTYPES[name]
    features = torch.cpu.get_capabilities()
    native = any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    keep = native and _stored_dtype(config) == torch.bfloat16
    return torch.bfloat16 if keep else torch.float32


def resolve_quantize(config: PreTrainedConfig, name: str, dtype: torch.dtype) -> torch.dtype | None:
    """Choose what the weights of linears are kept in; None = `dtype`.

    Raises:
        ConfigError: No such way to quantize, or it does not go with the model, the dtype or this
            machine.
    """
    if name not in QUANTIZE:
        msg = f"quantize {name!r} is not supported; use one of {', '.join(QUANTIZE)}"
        raise ConfigError(msg)
    stored = QUANTIZE[name]
    if stored is None:
        return None
    before = getattr(config, "quantization_config", None)
    if before is not None:
        msg = (
            f"quantize {name!r} is for weights as they were trained, and these are quantized "
            f"({before.get('quant_method')}); give the model that they were made from"
        )
        raise ConfigError(msg)
    if dtype not in (torch.bfloat16, torch.float32):
        msg = f"quantize {name!r} goes with dtype bfloat16 or float32, not {dtype}; give one"
        raise ConfigError(msg)
    if not ops.compiled():
        msg = (
            f"quantize {name!r} needs compiled kernels, and there are none; install g++ and leave "
            f"ONEPLUSN_KERNELS unset, or give quantize 'none'"
        )
        raise ConfigError(msg)
    return stored


def _check_packed(model: PreTrainedModel, stored: torch.dtype) -> None:
    """Insist that quantizing did something.

    Raises:
        ModelRefused: It did not.
    """
    linears = (module for module in model.modules() if isinstance(module, CompiledLinear))
    if not any(linear.panels.stored == stored for linear in linears):
        msg = (
            f"{type(model).__name__} has no linear whose weight can be kept in 8 bits: they are of "
            f"a kind of its own, or read an odd number of inputs; give quantize 'none'"
        )
        raise ModelRefused(msg)


def _stored_dtype(config: PreTrainedConfig) -> torch.dtype | None:
    """Read what dtype the weights have in their files, if the configuration says."""
    stored = config.dtype or config.get_text_config().dtype
    return stored if isinstance(stored, torch.dtype) else None


def _tokenizer_folder(path: str, revision: str | None) -> Path:
    """Find the tokenizer's files; of a model on the hub, bring them into the local cache.

    Raises:
        ConfigError: There is no fast tokenizer.
    """
    if Path(path).is_dir():
        return Path(path)
    try:
        found = cached_file(path, "tokenizer.json", revision=revision)
        for name in ("tokenizer_config.json", "chat_template.jinja"):
            cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        msg = f"{path!r} has no tokenizer.json; choose a model with a fast tokenizer: {error}"
        raise ConfigError(msg) from error
    return Path(str(found)).parent


def _load_config(path: str, revision: str | None) -> PreTrainedConfig:
    """Read a model's configuration.

    Raises:
        ConfigError: There is none.
        ModelRefused: It needs code of its own, or a class that transformers does not have.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            path, revision=revision or "main", trust_remote_code=False
        )
    except OSError as error:
        msg = f"cannot load the model {path!r}: {error}"
        raise ConfigError(msg) from error
    except ValueError as error:
        msg = f"{path!r} is no model that transformers knows; code from a model is never run"
        raise ModelRefused(msg) from error
    return config


def _load_weights(
    path: str, revision: str | None, config: PreTrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """Read a model's weights, from safetensors alone, and insist that all of them fit.

    Raises:
        ConfigError: There are no weights.
        ModelRefused: No causal language model has this configuration, or weights are missing,
            left over or of another shape.
    """
    if not sys.stderr.isatty():  # a log is no place for a bar
        transformers_logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision or "main",
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # so that the refusal can name them
            output_loading_info=True,
        )
    except OSError as error:
        msg = f"cannot load the weights of {path!r} (safetensors only): {error}"
        raise ConfigError(msg) from error
    except (ValueError, RuntimeError) as error:
        msg = f"{path!r} is refused: {error}"
        raise ModelRefused(msg) from error
    model: PreTrainedModel
    model, info = loaded
    _check_loading(path, info)
    return model


def _check_loading(path: str, info: dict[str, Any]) -> None:
    """Refuse a model of which transformers had to invent or ignore weights.

    Raises:
        ModelRefused: With the names.
    """
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        names = sorted(map(str, info.get(kind) or ()))
        if names:
            shown = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
            msg = f"{path!r} is refused: {len(names)} {kind.replace('_', ' ')}: {shown}"
            raise ModelRefused(msg)


def _eos_ids(model: PreTrainedModel) -> frozenset[int]:
    """Read the end tokens from the generation config, one or several."""
    generation = model.generation_config
    ids = None if generation is None else generation.eos_token_id
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


def _num_bytes(model: PreTrainedModel) -> int:
    """Count the bytes of all weights, those in a layout of their own included."""
    plain = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    own = (CompiledLinear, PackedLinear)
    packed = [module for module in model.modules() if isinstance(module, own)]
    return plain + sum(module.num_bytes for module in packed)


def _max_model_len(config: PreTrainedConfig, layers: tuple[LayerShape, ...]) -> int:
    """Find the longest sequence for which the probe's verdict holds.

    A window or an attention chunk that the layers do not tell the hook about lives in a mask that
    we never build; up to its length it makes no difference.

    Raises:
        ModelRefused: The configuration does not say.
    """
    text = config.get_text_config()
    length = getattr(text, "max_position_embeddings", None)
    if not isinstance(length, int):
        msg = f"{type(config).__name__} has no max_position_embeddings, so its context is unknown"
        raise ModelRefused(msg)
    told = {layer.window for layer in layers}
    window = getattr(text, "sliding_window", None)
    if isinstance(window, int) and window not in told and _uses_window(text):
        length = min(length, window)
    chunk = getattr(text, "attention_chunk_size", None)
    return min(length, chunk) if isinstance(chunk, int) else length


def _uses_window(text: PreTrainedConfig) -> bool:
    """Tell whether a configured window applies to any layer."""
    kinds = getattr(text, "layer_types", None)
    if kinds is not None:
        return "sliding_attention" in kinds
    return bool(getattr(text, "use_sliding_window", True))
