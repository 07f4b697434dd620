"""The base of a training: found, loaded, and checked against what is asked of it."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import oneplusn
from oneplusn.adapters.attach import find_sites
from oneplusn.adapters.checks import shown
from oneplusn.adapters.fingerprint import base_fingerprint
from oneplusn.adapters.training.config import TrainConfig
from oneplusn.errors import InvalidRequest
from oneplusn.kernels.plan import SiteSpec

DEMO = "demo"
ALL_LINEARS = "all"
FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.txt"]
"""What is fetched of a model on the hub; never code, never a pickle."""

PROBE = (5, 3)
"""Tokens of the two sequences that are packed to see whether a base keeps them apart."""
EXACT, ROUNDED = 1e-3, 5e-2
"""How far their logits may be from those alone, as a share of the largest; the latter for bf16."""


@dataclass(frozen=True, slots=True)
class BaseFiles:
    """A base on the disk, before its weights are in memory.

    Attributes:
        folder: where it is.
        tokenizer: its tokenizer.
        context: tokens that it takes at most.
    """

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    context: int

    @property
    def pad_token_id(self) -> int:
        """Fills up the shorter rows of a batch."""
        pad = self.tokenizer.pad_token_id
        return pad if isinstance(pad, int) else 0


def find_base(config: TrainConfig) -> BaseFiles:
    """Find the base's files, fetched from the hub where the name is no folder.

    Raises:
        InvalidRequest: there are none, or they hold no decoder with a tokenizer.
    """
    folder = _folder(config)
    try:
        model_config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        message = f"base {shown(config.base)}: no model with a tokenizer in {folder}: {error}"
        raise InvalidRequest(message, param="base") from error
    text = model_config.get_text_config()
    context = getattr(text, "max_position_embeddings", None) or tokenizer.model_max_length
    return BaseFiles(folder, tokenizer, int(context))


def _folder(config: TrainConfig) -> Path:
    if config.base == DEMO:
        return Path(next(iter(oneplusn.__path__))) / "demo" / "data" / "base"
    folder = Path(config.base).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or config.base.startswith(".") or config.base.count("/") > 1:
        message = f"base {shown(config.base)}: no such folder; give a folder, a hub id or 'demo'"
        raise InvalidRequest(message, param="base")
    from huggingface_hub import snapshot_download

    try:
        fetched = snapshot_download(config.base, revision=config.revision, allow_patterns=FILES)
    except (OSError, ValueError) as error:
        message = (
            f"base {shown(config.base)}: not a folder, and not to be had from the hub: {error}"
        )
        raise InvalidRequest(message, param="base") from error
    return Path(fetched)


def load_base(files: BaseFiles, config: TrainConfig, device: torch.device) -> PreTrainedModel:
    """Load the weights to a device.

    Raises:
        InvalidRequest: no decoder of transformers, or this machine lacks what is asked for.
    """
    if config.training.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise InvalidRequest("training.bf16: this GPU has no bfloat16; set it to false")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            files.folder,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attention,
        )
    except (OSError, ValueError, ImportError) as error:
        message = f"base {shown(config.base)} cannot be loaded as a decoder: {error}"
        raise InvalidRequest(message, param="base") from error
    assert isinstance(model, PreTrainedModel)
    model.to(device)  # type: ignore[arg-type]  # the stubs of transformers narrow it
    return model


def fingerprint(files: BaseFiles) -> str:
    """Return the fingerprint that bundles carry."""
    return base_fingerprint(files.folder)


def select_sites(base: PreTrainedModel, targets: Sequence[str]) -> list[SiteSpec]:
    """Return the sites of the linears that are targeted.

    Args:
        base: the model.
        targets: names such as `q_proj`, ends of paths such as `mlp.up_proj`, patterns such as
            `*.layers.0.*`; `all` is every linear that can be adapted.

    Raises:
        InvalidRequest: a target that matches nothing.
    """
    sites = find_sites(base)
    paths = [path for site in sites for path in site.modules]
    wanted = set[str]()
    for target in targets:
        matched = {path for path in paths if _matches(path, target)}
        if not matched:
            leaves = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths))
            message = (
                f"target {shown(target)} matches no linear of {type(base).__name__};"
                f" it has {leaves or 'none that can be adapted'}"
            )
            raise InvalidRequest(message, param="targets")
        wanted |= matched
    return [kept for site in sites if (kept := _narrowed(site, wanted)) is not None]


def _matches(path: str, target: str) -> bool:
    if target == ALL_LINEARS:
        return True
    return fnmatch.fnmatchcase(path, target) or f".{path}".endswith(f".{target}")


def _narrowed(site: SiteSpec, wanted: set[str]) -> SiteSpec | None:
    """Keep the members of a site that are wanted; None if none is."""
    pairs = zip(site.modules, site.slices, strict=True)
    kept = [(path, width) for path, width in pairs if path in wanted]
    if not kept:
        return None
    parent = kept[0][0].rpartition(".")[0]
    leaves = "+".join(path.rpartition(".")[2] for path, _ in kept)
    return replace(
        site,
        name=f"{parent}.{leaves}",
        slices=tuple(width for _, width in kept),
        modules=tuple(path for path, _ in kept),
    )


@torch.no_grad()
def check_packing(base: PreTrainedModel, batch_size: int) -> None:
    """Check that packed sequences of this base do not see each other.

    A model whose attention does not look at positions to find the bounds of sequences would be
    trained on mixtures without a sign of it.

    Raises:
        InvalidRequest: they do.
    """
    flash = "flash" in str(base.config._attn_implementation)
    if flash and batch_size > 1:
        raise InvalidRequest(
            f"training.packing with flash attention takes one row a batch, and batch_size is"
            f" {batch_size}; set it to 1 and packing to as many tokens as fit"
        )
    ids = torch.arange(1, 1 + sum(PROBE), device=base.device)
    ids = ids % base.config.get_text_config().vocab_size
    positions = torch.cat([torch.arange(length, device=base.device) for length in PROBE])
    training = base.training
    base.eval()
    with torch.autocast(base.device.type, torch.bfloat16, enabled=flash):  # flash takes no fp32
        packed = _logits(base, ids, positions)
        parts = zip(ids.split(PROBE), positions.split(PROBE), strict=True)
        alone = torch.cat([_logits(base, part, places) for part, places in parts])
    base.train(training)
    error = (packed - alone).abs().max().item()
    limit = EXACT if base.dtype == torch.float32 and not flash else ROUNDED
    if not error <= limit * alone.abs().max().item():
        raise InvalidRequest(
            f"training.packing: {type(base).__name__} lets packed sequences see each other (their"
            f" logits differ by {error:.2g}); set packing to null"
        )


def _logits(base: PreTrainedModel, ids: Tensor, positions: Tensor) -> Tensor:
    output = base(input_ids=ids.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False)
    logits: Tensor = output.logits[0].float()
    return logits
