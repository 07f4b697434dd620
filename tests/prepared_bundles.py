"""Bundles as a worker would hand them to the registry, made in the test's own process."""

from __future__ import annotations

import tempfile
from pathlib import Path

from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.files import write_bundle
from oneplusn.adapters.prepare import Rules, prepare_adapter
from oneplusn.adapters.prepared import BaseLayout, Prepared, SiteInfo


def base_for(
    *bundles: Bundle, dtype: str = "float32", fingerprint: str | None = None
) -> BaseLayout:
    """The smallest base that has the modules of these bundles, each a site of its own."""
    modules = {path: delta for bundle in bundles for path, delta in bundle.modules.items()}
    sites = (
        SiteInfo(path, delta.a.shape[1], (delta.b.shape[0],), (path,))
        for path, delta in sorted(modules.items())
    )
    return BaseLayout(tuple(sites), dtype, fingerprint)


def prepared(
    bundle: Bundle, name: str, folder: Path, *, base: BaseLayout | None = None, strict: bool = True
) -> tuple[Prepared, Path]:
    """Write a bundle's blob and image into a new folder below `folder`."""
    work = Path(tempfile.mkdtemp(dir=folder))
    write_bundle(bundle, work / "source")
    out = work / "out"
    out.mkdir()
    made = prepare_adapter(
        work / "source", out, name=name, base=base or base_for(bundle), rules=Rules(strict=strict)
    )
    return made, out
