"""Say what this machine can serve: versions, cores, memory, arithmetic, and one model's probe."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

from oneplusn import __version__
from oneplusn.server.host import available_memory, physical_cores
from oneplusn.server.settings import Settings

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "fastapi", "uvicorn")


def report(settings: Settings) -> Iterator[str]:
    """Yield one finding at a time; the last one loads the model.

    Raises:
        StartupError: The model is missing or refused.
    """
    yield f"oneplusn      {__version__}, Python {platform.python_version()}, {platform.machine()}"
    for library in LIBRARIES:
        yield f"{library:<13} {importlib.metadata.version(library)}"
    yield f"cores         {physical_cores()} physical, {settings.threads} threads to be used"
    yield f"memory        {available_memory() / 2**30:.1f} GiB free"
    # After the lines above, because importing torch takes a second.
    import torch

    from oneplusn.server.engine.model import load_model

    capabilities = torch.cpu.get_capabilities()
    found = [
        name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if capabilities.get(name)
    ]
    yield f"processor     {', '.join(found) or 'no vector extensions that matter'}"
    yield f"cuda          {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}"
    model = load_model(
        settings.model,
        revision=settings.revision,
        dtype=settings.dtype,
        quantize=settings.quantize,
        device=settings.device,
        threads=settings.threads,
    )
    yield f"model         {settings.model}: {model.num_bytes / 2**20:.1f} MiB in {model.dtype}"
    yield f"probe         passed: {model.probe}"
