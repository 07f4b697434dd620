"""What a worker makes of an upload: the words that worker, registry and API have in common.

An upload becomes a folder with the blob (`bundle.json`, `adapter_model.safetensors`), which is
kept for ever, and a page image, which is a cache: it can be made again from the blob for any base
with the same linears. Knows no torch.
"""

from __future__ import annotations

import hashlib

import msgspec

Scalar = bool | int | float | str | list[str]

BLOB_FILES = ("bundle.json", "adapter_model.safetensors")
IMAGE_FILE = "image.bin"


class SiteInfo(msgspec.Struct, frozen=True):
    """Name and shape of a site; `kernels.plan.SiteSpec` for those who know no torch.

    Attributes:
        name: As the engine calls it.
        in_features: Width K of x.
        slices: Widths of the outputs.
        modules: Module paths of the slices, in the same order.
    """

    name: str
    in_features: int
    slices: tuple[int, ...]
    modules: tuple[str, ...]


class BaseLayout(msgspec.Struct, frozen=True):
    """All that must be known of a base model to lay an adapter out for it.

    Attributes:
        sites: Linears that adapters can reach.
        dtype: Of the pool's pages, as `bfloat16`.
        fingerprint: Identity of the base's weights, if known.
    """

    sites: tuple[SiteInfo, ...]
    dtype: str
    fingerprint: str | None = None

    @property
    def key(self) -> str:
        """Hash of sites and dtype, 16 hex digits: images of equal keys are interchangeable."""
        spelling = msgspec.json.encode([self.dtype, self.sites])
        return hashlib.sha256(spelling).hexdigest()[:16]


class FileInfo(msgspec.Struct, frozen=True):
    """A file of a blob: its size in bytes and the sha256 of its content, 64 hex digits."""

    name: str
    size: int
    sha256: str


class LoadReport(msgspec.Struct, frozen=True, kw_only=True):
    """How an adapter fits a base.

    Attributes:
        matched: Modules of the adapter that are linears of the base.
        unmatched: Modules of the adapter that are not; they would have no effect.
        missing: Linears of the base that the adapter leaves as they are.
        ranks: Rank rows per matched module, over all experts.
        num_bytes: Bytes of the pages.
        delta_norms: Frobenius norm of what is added to the weights of a site, by the task for
            which it is largest; empty where that would take too long.
        base_fingerprint: The base that the adapter says it was trained on.
        warnings: What was tolerated, in full sentences.
    """

    matched: list[str]
    unmatched: list[str]
    missing: list[str]
    ranks: dict[str, int]
    num_bytes: int
    delta_norms: dict[str, float]
    base_fingerprint: str | None
    warnings: list[str]


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """A checked upload.

    Attributes:
        digest: Content identity, `sha256:<64 hex>`.
        name: Of the adapter.
        method: How it was trained.
        rank: Largest rank of an expert.
        tasks: Names, in the order of the upload.
        descriptions: Of each task; empty where the upload has none.
        task_defaults: Sampling parameters of the tasks that bring some.
        files: The blob's files; empty for a dry run.
        layout: `BaseLayout.key` of the page image.
        report: How it fits the base.
    """

    digest: str
    name: str
    method: str
    rank: int
    tasks: list[str]
    descriptions: dict[str, str]
    task_defaults: dict[str, dict[str, Scalar]]
    files: list[FileInfo]
    layout: str
    report: LoadReport

    @property
    def num_bytes(self) -> int:
        """Size of the blob."""
        return sum(file.size for file in self.files)
