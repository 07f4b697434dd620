"""Foreign formats: one module for each, one row for each in the tables here.

A format is told by its `adapter_config.json`. Whoever reads one gives a `Source` to `read`; the
server does so with uploads, the command line with folders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.checks import shown
from oneplusn.adapters.converters import cpoly_branch, moelora, mtl_lora, peft_lora, peft_poly
from oneplusn.adapters.converters.checkpoints import read_config
from oneplusn.adapters.converters.export import Export
from oneplusn.adapters.converters.refusals import TOKEN_GATE, TOKEN_GATED_TYPES, refused
from oneplusn.adapters.converters.source import Source
from oneplusn.errors import AdapterInvalid

Config = Mapping[str, Any]


class Reader(NamedTuple):
    """A format that is read.

    Attributes:
        summary: one line for the help.
        matches: says whether a configuration is of this format.
        read: converts what was read into a bundle.
    """

    summary: str
    matches: Callable[[Config], bool]
    read: Callable[[Source], Bundle]


class Writer(NamedTuple):
    """A format that one task is written in.

    Attributes:
        summary: one line for the help.
        write: writes it, and returns lines that say what was written.
    """

    summary: str
    write: Callable[[Export], list[str]]


def _peft_types(*names: str) -> Callable[[Config], bool]:
    return lambda config: config.get("peft_type") in names


def _is_cpoly(config: Config) -> bool:
    return config.get("peft_type") == "POLY" and config.get("poly_type") in cpoly_branch.POLY_TYPES


def _is_poly(config: Config) -> bool:
    return config.get("peft_type") == "POLY" and config.get("poly_type") in (None, "poly")


def _is_mtl_lora(config: Config) -> bool:
    options = config.get("config")
    return isinstance(options, dict) and options.get("architecture") == mtl_lora.ARCHITECTURE


def _write_merged(export: Export) -> list[str]:
    from oneplusn.adapters.training.merge import write  # needs transformers

    return write(export)


READERS: dict[str, Reader] = {
    "peft-lora": Reader("PEFT's LoRA and rsLoRA", _peft_types("LORA"), peft_lora.read),
    "peft-poly": Reader("PEFT's Poly, and MHR with n_splits > 1", _is_poly, peft_poly.read),
    "c-poly": Reader("the branch of PEFT by C-Poly's authors", _is_cpoly, cpoly_branch.read),
    "moelora": Reader(
        "MOELoRA-peft, with a gate per layer or one for the model",
        _peft_types(moelora.PER_LAYER, moelora.SHARED),
        moelora.read,
    ),
    "mtl-lora": Reader("MTL-LoRA of AdapterHub, a folder per task", _is_mtl_lora, mtl_lora.read),
}

WRITERS: dict[str, Writer] = {
    "peft": Writer("a plain LoRA that PEFT and other servers load", peft_lora.write),
    "base": Writer("the base model with the task added to its weights", _write_merged),
}


def read(source: Source) -> Bundle:
    """Convert a foreign adapter of any format in `READERS`.

    Raises:
        AdapterInvalid: with a code that names the reason.
    """
    return READERS[format_of(source.config)].read(source)


def detect(folder: Path) -> str:
    """Return the format of the adapter in a folder, a key of `READERS`.

    Raises:
        AdapterInvalid: it is of none of them.
    """
    return format_of(read_config(folder))


def format_of(config: Config) -> str:
    """Return the format that a configuration describes, a key of `READERS`.

    Raises:
        AdapterInvalid: `token_dependent_gate`, or `converter_missing` with the formats there are.
    """
    for name, reader in READERS.items():
        if reader.matches(config):
            return name
    peft_type = config.get("peft_type")
    if isinstance(peft_type, str) and peft_type.upper() in TOKEN_GATED_TYPES:
        raise refused("peft_type", peft_type, TOKEN_GATE)
    options = config.get("config")
    if isinstance(options, dict):
        told = f"config.architecture = {shown(options.get('architecture'))}"
    elif peft_type == "POLY":
        told = f"poly_type = {shown(config.get('poly_type'))}"
    else:
        told = f"peft_type = {shown(peft_type)}"
    known = "; ".join(f"{name} ({reader.summary})" for name, reader in READERS.items())
    raise AdapterInvalid(
        f"adapter_config.json: {told}, for which there is no converter; there are {known}. Flatten"
        " it to a plain LoRA per task with the library that trained it",
        code="converter_missing",
    )
