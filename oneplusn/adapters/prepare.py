"""From an upload to what is kept and served: a blob, a page image, and a report of how it fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from oneplusn.adapters.blobs import disk_errors, file_info
from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.files import MAX_UPLOAD_BYTES, Reading, read, write_files
from oneplusn.adapters.image import PageImage
from oneplusn.adapters.layout import coverage, page_image
from oneplusn.adapters.norms import delta_norms
from oneplusn.adapters.prepared import (
    BLOB_FILES,
    IMAGE_FILE,
    BaseLayout,
    FileInfo,
    LoadReport,
    Prepared,
)
from oneplusn.errors import (
    AdapterCorrupt,
    AdapterIncompatible,
    AdapterInvalid,
    AdapterMediaType,
)
from oneplusn.kernels.plan import SiteSpec

MAX_IMAGE_BYTES = 4 << 30
SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What is tolerated.

    Attributes:
        dry_run: Leave nothing behind.
        strict: Refuse modules that the base does not have, and another base's fingerprint.
        assume_converted: As `files.read` takes it.
        max_bytes: Most bytes of the upload, expanded.
        max_image_bytes: Most bytes of its pages.
    """

    dry_run: bool = False
    strict: bool = True
    assume_converted: bool = False
    max_bytes: int = MAX_UPLOAD_BYTES
    max_image_bytes: int = MAX_IMAGE_BYTES


def prepare_adapter(
    source: Path | Mapping[str, Path],
    out: Path,
    *,
    name: str,
    base: BaseLayout,
    rules: Rules | None = None,
) -> Prepared:
    """Read an adapter, check that it fits a base, and write its blob and page image into `out`.

    Args:
        source: As `files.read` takes it.
        out: Existing empty folder; an archive is expanded in it for a moment.
        name: Of the adapter, and of the task of a PEFT adapter.
        base: What it is laid out for.
        rules: What is tolerated.

    Raises:
        AdapterInvalid, AdapterMediaType: As `files.read`, or a task changes nothing.
        AdapterIncompatible: It was made for another base.
        AdapterTooLarge: The upload, or its pages, exceed their limit.
        StorageFull: There is no room for what is made.
    """
    rules = rules or Rules()
    reading = read(
        source,
        name=name,
        assume_converted=rules.assume_converted,
        max_bytes=rules.max_bytes,
        scratch=out,
    )
    bundle, specs, dtype = reading.bundle, _specs(base), _dtype(base)
    warnings = _warnings(reading, base, strict=rules.strict)
    image = page_image(bundle, specs, dtype, strict=rules.strict, max_bytes=rules.max_image_bytes)
    files = [] if rules.dry_run else _write(bundle, image, out, base)
    return Prepared(
        digest=bundle.digest,
        name=name,
        method=bundle.method,
        rank=max(expert.rank for expert in bundle.experts),
        tasks=list(bundle.tasks),
        descriptions={task: _describe(bundle, task) for task in bundle.tasks},
        task_defaults={task: dict(values) for task, values in bundle.defaults.items()},
        files=files,
        layout=base.key,
        report=_report(bundle, specs, image.num_bytes, warnings),
    )


def rebuild_image(blob: Path, target: Path, *, digest: str, base: BaseLayout) -> int:
    """Make the page image of a blob again; return the bytes of its pages.

    Raises:
        AdapterCorrupt: The blob does not hold what it is named for.
        AdapterIncompatible: The base is another than when it was published.
        StorageFull: There is no room for the image.
    """
    try:
        bundle = read(blob, name="rebuilt").bundle
    except (AdapterInvalid, AdapterMediaType) as error:
        raise AdapterCorrupt(f"the files of {digest} cannot be read: {error.message}") from error
    if bundle.digest != digest:
        raise AdapterCorrupt(f"the files of {digest} hold {bundle.digest}")
    image = page_image(bundle, _specs(base), _dtype(base), strict=False)
    with disk_errors():
        image.save(target, layout=base.key)
    return image.num_bytes


def _write(bundle: Bundle, image: PageImage, out: Path, base: BaseLayout) -> list[FileInfo]:
    with disk_errors():
        write_files(bundle, out)
        image.save(out / IMAGE_FILE, layout=base.key)
        return [file_info(out / name) for name in BLOB_FILES]


def _warnings(reading: Reading, base: BaseLayout, *, strict: bool) -> list[str]:
    """Compare the base models, and say what was tolerated.

    Raises:
        AdapterIncompatible: The adapter says that it was made for another base.
    """
    warnings = []
    made_for = reading.bundle.base
    if made_for is None:
        warnings.append("the adapter does not say which base it was trained on; shapes agree")
    elif base.fingerprint is not None and made_for != base.fingerprint:
        msg = f"the adapter was trained on {made_for} and this base is {base.fingerprint}"
        if strict:
            raise AdapterIncompatible(
                f"{msg}; serve that base, or upload with strict=false if they are alike",
                code="base_mismatch",
            )
        warnings.append(msg)
    if reading.leftovers:
        names = ", ".join(reading.leftovers[:SHOWN])
        warnings.append(f"left by training and never opened: {names}")
    return warnings


def _report(
    bundle: Bundle, specs: Sequence[SiteSpec], num_bytes: int, warnings: Sequence[str]
) -> LoadReport:
    reach, norms = coverage(bundle, specs), delta_norms(bundle, specs)
    more = list(warnings)
    if norms is None:
        more.append("too many tasks and rank rows to compute the norms of what they add")
    if reach.unmatched:
        count = len(reach.unmatched)
        more.append(f"{count} modules are no linears of this base, and have no effect")
    return LoadReport(
        matched=list(reach.matched),
        unmatched=list(reach.unmatched),
        missing=list(reach.missing),
        ranks={path: sum(bundle.modules[path].ranks) for path in reach.matched},
        num_bytes=num_bytes,
        delta_norms=dict(norms or {}),
        base_fingerprint=bundle.base,
        warnings=more,
    )


def _describe(bundle: Bundle, task: str) -> str:
    """Take a task's description from the metadata: its own, else the adapter's."""
    whole = bundle.metadata.get("description", "")
    return bundle.metadata.get(f"description.{task}", whole)


def _specs(base: BaseLayout) -> list[SiteSpec]:
    return [SiteSpec(s.name, s.in_features, s.slices, s.modules) for s in base.sites]


def _dtype(base: BaseLayout) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, base.dtype)
    return dtype
