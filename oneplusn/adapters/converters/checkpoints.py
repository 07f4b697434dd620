"""Open the folder of a foreign adapter that somebody has on their disk.

More is opened here than from an upload: other names of files, links, and weights in torch's own
format. That one is a pickle in a zip. It is read by torch's unpickler for weights alone, which
makes tensors and nothing else, after the zip was found to be of the plain kind that torch writes:
nothing compressed, so it cannot be larger than it is.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oneplusn.adapters.checks import decode_json, shown
from oneplusn.adapters.converters.source import Source
from oneplusn.adapters.weights import MAX_TENSORS, read_tensors
from oneplusn.errors import AdapterInvalid, AdapterTooLarge

CONFIG_FILE = "adapter_config.json"
OWN_FILE = "bundle.json"
WEIGHTS_FILES = (
    "adapter_model.safetensors",  # PEFT
    "adapter.safetensors",  # AdapterHub
    "adapter_model.bin",  # PEFT before safetensors, MOELoRA-peft
    "pytorch_adapter.bin",  # AdapterHub
)
"""Names that libraries give the weights; the first that is there is read."""

PICKLES = (".bin", ".pt")
MAX_CONFIG_BYTES = 8 << 20
MAX_BIN_BYTES = 4 << 30


class Opened(NamedTuple):
    """A folder that was read.

    Attributes:
        source: what is in it.
        left: files of weights that were not opened, as a head for predictions.
    """

    source: Source
    left: tuple[str, ...]


def open_folder(folder: Path, *, name: str, assume_converted: bool = False) -> Opened:
    """Read the configuration and the weights in a folder.

    Raises:
        AdapterInvalid: a file is missing, unreadable or not what its name says.
        AdapterTooLarge: the weights are larger than any adapter.
    """
    config = read_config(folder)
    there = [file for file in WEIGHTS_FILES if (folder / file).is_file()]
    if not there:
        raise AdapterInvalid(
            f"{shown(str(folder))} has none of {', '.join(WEIGHTS_FILES)}; give the folder that"
            " holds the weights",
            code="file_missing",
        )
    path = folder / there[0]
    try:
        tensors = read_bin(path) if path.suffix in PICKLES else read_tensors(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    weights = (file.name for file in folder.iterdir() if file.suffix in (*PICKLES, ".safetensors"))
    left = tuple(sorted(file for file in weights if file != path.name))
    return Opened(Source(config, tensors, name=name, assume_converted=assume_converted), left)


def read_config(folder: Path) -> dict[str, Any]:
    """Read the configuration in a folder.

    Raises:
        AdapterInvalid: there is none, or it is no JSON object.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        hint = (
            f"it has a {OWN_FILE}, so it is an adapter of this project already: upload it, or take"
            " a task out with `oneplusn convert out`"
            if (folder / OWN_FILE).is_file()
            else "give the folder that a trainer saved"
        )
        raise AdapterInvalid(
            f"{shown(str(folder))} has no {CONFIG_FILE}; {hint}", code="file_missing"
        )
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise _unreadable(path, error) from None
    return decode_json(data, dict[str, Any], what=CONFIG_FILE, max_bytes=MAX_CONFIG_BYTES)


def read_bin(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file that `torch.save` wrote.

    Raises:
        AdapterInvalid: `bin_refused`; it is something else, or more than a table of tensors.
        AdapterTooLarge: it is larger than `MAX_BIN_BYTES`.
    """
    size = path.stat().st_size
    if size > MAX_BIN_BYTES:
        raise AdapterTooLarge(f"{path.name} has {size} bytes, and the limit is {MAX_BIN_BYTES}")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile:
        raise _refused(path, "it is no file of torch 1.6 or newer, or it is cut off") from None
    if any(m.compress_type != zipfile.ZIP_STORED or m.flag_bits & 1 for m in members):
        raise _refused(path, "it is compressed, and torch does not compress")
    if sum(member.file_size for member in members) > size:
        raise _refused(path, f"its parts are larger than its {size} bytes")
    try:
        table = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise _refused(path, f"it holds more than tensors, or is damaged ({reason})") from None
    return _checked(table, path, size)


def _checked(table: object, path: Path, size: int) -> dict[str, Tensor]:
    """Check that what was in a file is a table of plain tensors."""
    if not isinstance(table, Mapping) or not 1 <= len(table) <= MAX_TENSORS:
        raise _refused(path, f"it holds no table of 1 to {MAX_TENSORS} tensors")
    tensors: dict[str, Tensor] = {}
    for name, tensor in table.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise _refused(path, f"{shown(name)} is no tensor with a name")
        # A stride of 0 would make an enormous tensor of a few bytes.
        is_plain = tensor.layout == torch.strided and tensor.is_contiguous()
        if not is_plain or tensor.nbytes > size:
            raise _refused(path, f"{shown(name)} is no plain tensor")
        tensors[name] = tensor.detach()
    # A tensor may have a second name, as MOELoRA's do; more would be many tensors of few bytes.
    if sum(tensor.nbytes for tensor in tensors.values()) > 2 * size:
        raise _refused(path, f"its tensors take more than twice its {size} bytes")
    return tensors


def _refused(path: Path, reason: str) -> AdapterInvalid:
    return AdapterInvalid(
        f"{path.name}: {shown(reason)}; save the weights with safetensors.torch.save_file under"
        f" the name {WEIGHTS_FILES[0]}",
        code="bin_refused",
    )


def _unreadable(path: Path, error: OSError) -> AdapterInvalid:
    return AdapterInvalid(
        f"{shown(str(path))} cannot be read ({error.strerror}); check that you may read it",
        code="file_unreadable",
    )
