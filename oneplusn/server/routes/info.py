"""GET /info and /version: what this server is, and its limits."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from oneplusn import __version__
from oneplusn.server.routes.common import ServerDep, fails
from oneplusn.server.schemas import MAX_INPUTS, MAX_STOPS
from oneplusn.server.schemas_openai import MAX_CHOICES

router = APIRouter(tags=["info"])


@router.get("/info", responses=fails())
async def info(server: ServerDep) -> dict[str, Any]:
    """Tell the model and the limits; those that text-generation-inference has go by its names."""
    model = server.inference.model
    return {
        "router": "oneplusn",
        "version": __version__,
        "model_id": server.settings.base_name,
        "model_dtype": model.dtype,
        "base_fingerprint": model.base_fingerprint,
        "vocab_size": model.vocab_size,
        "max_model_len": model.max_model_len,
        "max_input_tokens": model.max_model_len - 1,
        "max_total_tokens": model.max_model_len,
        "max_concurrent_requests": server.settings.max_queue,
        "max_num_seqs": server.settings.max_num_seqs,
        "max_client_batch_size": MAX_INPUTS,
        "max_choices": MAX_CHOICES,
        "max_stop_sequences": MAX_STOPS,
        "max_body_bytes": server.settings.max_body,
        "max_upload_bytes": server.settings.max_upload,
        "memory_bytes": model.memory,
        "num_adapters": len(server.registry.active()),
        "num_adapters_resident": len(server.engine.resident),
        "num_tasks": len(server.registry.tasks()),
    }


@router.get("/version", responses=fails())
async def version() -> dict[str, str]:
    """Tell the release."""
    return {"version": __version__}
