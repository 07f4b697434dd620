"""Read adapters from folders and uploads, and write them: the only reader of untrusted bytes.

What comes in is judged in this order, and nothing of it is kept when it is refused: names of files
(`uploads`), the header of the weights (`weights`), the JSON documents (`checks`), the rules of the
format read, and the rules of every bundle (`validation`). No path of an archive is ever used, no
pickle is ever opened, no text is ever rendered.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from torch import Tensor

from oneplusn.adapters import converters
from oneplusn.adapters.blobs import FULL, LIMITS, storage_full
from oneplusn.adapters.bundle import Bundle, Expert, ModuleDelta, Scalar
from oneplusn.adapters.checks import check_name, decode_json, shown
from oneplusn.adapters.converters.source import Source
from oneplusn.adapters.folders import new_folder
from oneplusn.adapters.uploads import WEIGHTS_FILE, Staged, list_folder, stage
from oneplusn.adapters.validation import MAX_EXPERTS, MAX_MODULES, MAX_TASKS
from oneplusn.adapters.weights import check_safetensors_header, read_tensors, write_tensors
from oneplusn.errors import AdapterInvalid, StorageFull

__all__ = [
    "check_safetensors_header",
    "read",
    "read_adapter",
    "read_upload",
    "write_bundle",
    "write_files",
]

SCHEMA_VERSION = 1
BUNDLE_FILE = "bundle.json"
PEFT_FILE = "adapter_config.json"

MAX_JSON_BYTES = 8 * 1024 * 1024
MAX_UPLOAD_BYTES = 4 * 1024**3

PARTS = ("A", "B", "gate", "scale")


class _ExpertEntry(msgspec.Struct, forbid_unknown_fields=True):
    """One expert in `bundle.json`."""

    name: str
    kind: Literal["common", "own"]
    owner: str | None
    rank: int


class _SiteEntry(msgspec.Struct, forbid_unknown_fields=True):
    """One module in `bundle.json`."""

    ranks: Annotated[list[int], msgspec.Meta(max_length=MAX_EXPERTS)]


class _BundleFile(msgspec.Struct, forbid_unknown_fields=True):
    """The whole of `bundle.json`."""

    schema_version: int
    method: str
    base: str | None
    tasks: Annotated[list[str], msgspec.Meta(max_length=MAX_TASKS)]
    experts: Annotated[list[_ExpertEntry], msgspec.Meta(max_length=MAX_EXPERTS)]
    sites: Annotated[dict[str, _SiteEntry], msgspec.Meta(max_length=MAX_MODULES)]
    defaults: dict[str, dict[str, Scalar]] = {}
    metadata: dict[str, str] = {}


class _Version(msgspec.Struct):
    """The one field that every version of `bundle.json` has."""

    schema_version: int


@dataclass(frozen=True, slots=True)
class Reading:
    """An adapter as it was read.

    Attributes:
        bundle: What it holds.
        leftovers: Files of its training that were not opened.
    """

    bundle: Bundle
    leftovers: tuple[str, ...]


def read_adapter(path: Path, *, name: str, assume_converted: bool = False) -> Bundle:
    """Read an adapter from a folder, or from one archive; see `read`."""
    return read(path, name=name, assume_converted=assume_converted).bundle


def read_upload(
    files: Mapping[str, bytes | Path],
    *,
    name: str,
    assume_converted: bool = False,
    max_bytes: int = MAX_UPLOAD_BYTES,
) -> Bundle:
    """Read an adapter from what a client sent; see `read`."""
    return read(files, name=name, assume_converted=assume_converted, max_bytes=max_bytes).bundle


def read(
    source: Path | Mapping[str, bytes | Path],
    *,
    name: str,
    assume_converted: bool = False,
    max_bytes: int = MAX_UPLOAD_BYTES,
    scratch: Path | None = None,
) -> Reading:
    """Read an adapter; leave nothing on disk.

    Args:
        source: a folder with `bundle.json`, or a foreign format's `adapter_config.json`, beside
            `adapter_model.safetensors`; a .tar, .tar.gz or .zip of those; or what a client sent:
            flat files or one archive, by the names that the client gave, where a path is where the
            server put the bytes.
        name: name of the adapter, and of the tasks of a foreign one: itself if it has one task,
            else with their numbers behind.
        assume_converted: take an adapter whose training changed the base's weights (PiSSA, OLoRA,
            CorDA, LoftQ) as converted to the unchanged base.
        max_bytes: most bytes of all files of an upload, an archive's counted as they expand.
        scratch: where an archive is expanded; the system's temporary folder otherwise.

    Raises:
        AdapterInvalid: with a code that says what is wrong.
        AdapterTooLarge: more than `max_bytes`.
        AdapterMediaType: the weights are a pickle.
        StorageFull: no room to expand an archive.
        OSError: this process may not have more memory.
    """
    check_name(name, "adapter name")
    if isinstance(source, Path) and source.is_file():
        source = {source.name: source}
    try:
        if isinstance(source, Path):
            if not source.is_dir():
                raise _missing_folder(source)
            return _read(list_folder(source), name=name, assume_converted=assume_converted)
        with tempfile.TemporaryDirectory(prefix="oneplusn-upload-", dir=scratch) as folder:
            staged = stage(source, Path(folder), max_bytes)
            return _read(staged, name=name, assume_converted=assume_converted)
    except OSError as error:
        if error.errno in LIMITS:
            raise
        raise _unreadable(error) from None


def write_bundle(bundle: Bundle, folder: Path) -> None:
    """Write a bundle as a new folder: all of it or nothing, and on the disk when this returns.

    Raises:
        AdapterExists: the folder exists and is not empty.
    """
    with new_folder(folder) as scratch:
        write_files(bundle, scratch)


def write_files(bundle: Bundle, folder: Path) -> None:
    """Write the files of a bundle into an existing folder, without waiting for the disk."""
    (folder / BUNDLE_FILE).write_bytes(_encode(bundle))
    write_tensors(_tensors(bundle), folder / WEIGHTS_FILE)


def _read(staged: Staged, *, name: str, assume_converted: bool) -> Reading:
    bundle = _to_bundle(staged.files, name=name, assume_converted=assume_converted)
    return Reading(bundle, tuple(staged.leftovers))


def _to_bundle(files: Mapping[str, Path], *, name: str, assume_converted: bool) -> Bundle:
    if WEIGHTS_FILE not in files:
        raise _missing(WEIGHTS_FILE, files)
    if (BUNDLE_FILE in files) == (PEFT_FILE in files):
        if BUNDLE_FILE not in files:
            raise _missing(f"{BUNDLE_FILE} or {PEFT_FILE}", files)
        raise AdapterInvalid(
            f"both {BUNDLE_FILE} and {PEFT_FILE}: they describe the same weights in two ways;"
            " leave one out",
            code="adapter_ambiguous",
        )
    if BUNDLE_FILE in files:
        description = _decode(_read_json(files[BUNDLE_FILE]))
        return _assemble(description, read_tensors(files[WEIGHTS_FILE]))
    config = decode_json(
        _read_json(files[PEFT_FILE]), dict[str, Any], what=PEFT_FILE, max_bytes=MAX_JSON_BYTES
    )
    tensors = read_tensors(files[WEIGHTS_FILE])
    source = Source(config, tensors, name=name, assume_converted=assume_converted)
    return converters.read(source)


def _read_json(path: Path) -> bytes:
    """Read a document, or as much of it as proves that it is too large."""
    with path.open("rb") as file:
        return file.read(MAX_JSON_BYTES + 1)


def _decode(data: bytes) -> _BundleFile:
    version = decode_json(data, _Version, what=BUNDLE_FILE, max_bytes=MAX_JSON_BYTES)
    if version.schema_version != SCHEMA_VERSION:
        raise AdapterInvalid(
            f"{BUNDLE_FILE}: schema_version {version.schema_version}, this server reads"
            f" {SCHEMA_VERSION}; write the adapter again, or use a server of that version",
            code="schema_version_unsupported",
        )
    return decode_json(data, _BundleFile, what=BUNDLE_FILE, max_bytes=MAX_JSON_BYTES)


def _assemble(description: _BundleFile, tensors: Mapping[str, Tensor]) -> Bundle:
    expected = {f"{path}.{part}" for path in description.sites for part in PARTS}
    missing, unexpected = expected - tensors.keys(), tensors.keys() - expected
    if missing or unexpected:
        fault = f"lacks {shown(min(missing))}" if missing else f"has {shown(min(unexpected))}"
        raise AdapterInvalid(
            f"{WEIGHTS_FILE} {fault}; it holds {', '.join(PARTS)} of exactly the"
            f" {len(description.sites)} modules under 'sites' in {BUNDLE_FILE}",
            code="tensor_missing" if missing else "tensor_unexpected",
        )
    return Bundle(
        method=description.method,
        tasks=tuple(description.tasks),
        experts=tuple(Expert(e.name, e.kind, e.owner, e.rank) for e in description.experts),
        modules={
            path: ModuleDelta(
                a=tensors[f"{path}.A"],
                b=tensors[f"{path}.B"],
                ranks=tuple(site.ranks),
                gate=tensors[f"{path}.gate"],
                scale=tensors[f"{path}.scale"],
            )
            for path, site in description.sites.items()
        },
        base=description.base,
        defaults=description.defaults,
        metadata=description.metadata,
    )


def _encode(bundle: Bundle) -> bytes:
    description = _BundleFile(
        schema_version=SCHEMA_VERSION,
        method=bundle.method,
        base=bundle.base,
        tasks=list(bundle.tasks),
        experts=[_ExpertEntry(e.name, e.kind, e.owner, e.rank) for e in bundle.experts],
        sites={path: _SiteEntry(list(delta.ranks)) for path, delta in bundle.modules.items()},
        defaults={task: dict(values) for task, values in bundle.defaults.items()},
        metadata=dict(bundle.metadata),
    )
    return msgspec.json.format(msgspec.json.encode(description), indent=1) + b"\n"


def _tensors(bundle: Bundle) -> dict[str, Tensor]:
    return {
        f"{path}.{part}": tensor
        for path, delta in bundle.modules.items()
        for part, tensor in zip(PARTS, (delta.a, delta.b, delta.gate, delta.scale), strict=True)
    }


def _missing(what: str, files: Mapping[str, Path]) -> AdapterInvalid:
    there = ", ".join(sorted(files)) or "none of the files that are read"
    return AdapterInvalid(f"{what} is missing; found {there}; add it", code="file_missing")


def _missing_folder(path: Path) -> AdapterInvalid:
    return AdapterInvalid(
        f"{shown(str(path))} is neither a folder nor an archive; give the folder that holds"
        f" {WEIGHTS_FILE}",
        code="file_missing",
    )


def _unreadable(error: OSError) -> AdapterInvalid | StorageFull:
    if error.errno in FULL:
        return storage_full(error)
    return AdapterInvalid(
        f"a file of the adapter cannot be read ({error.strerror}); check that it is there, that"
        " the server may read it, and that the disk is not full",
        code="file_unreadable",
    )
