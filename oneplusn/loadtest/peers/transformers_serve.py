"""`transformers serve` with continuous batching, on the bare base: it has no adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from oneplusn.loadtest.bench_cases import BASE, ONE, Held, Work
from oneplusn.loadtest.dialects import Completions, Prompt
from oneplusn.loadtest.peers.system import Places, Served, package_version

BLOCK_TOKENS = 32
BATCH_TOKENS = 512


class Words(Completions):
    """Its completions route: prompts are texts, and fields that it does not know are refused."""

    def __init__(self, model: Path) -> None:
        self._model = str(model)

    def body(self, model: str, prompt: Prompt, output_tokens: int) -> dict[str, Any]:
        """Return a greedy request that streams."""
        return {
            "model": self._model,
            "prompt": " ".join(f"t{token}" for token in prompt),
            "max_tokens": output_tokens,
            "temperature": 0,
            "stream": True,
        }


def systems(work: Work, places: Places) -> list[Served]:
    """Return its server."""
    python = places.python("transformers")
    folder = places.scratch / "without-end"
    blocks = -(-work.cache_tokens // BLOCK_TOKENS)

    def command(port: int) -> list[str]:
        return [
            *(python, "-P", "-m", "transformers.cli.transformers", "serve", str(folder)),
            *("--host", "127.0.0.1", "--port", str(port), "--device", "cpu"),
            *("--dtype", "bfloat16", "--continuous-batching"),
            # By default its cache takes most of the machine's memory.
            *("--cb-block-size", str(BLOCK_TOKENS), "--cb-num-blocks", str(blocks)),
            *("--cb-max-batch-tokens", str(BATCH_TOKENS)),
        ]

    return [
        Served(
            name="transformers serve",
            cases=(ONE, BASE),
            work=work,
            route=Words(folder),
            command=command,
            version=package_version(python, "transformers"),
            held=Held.of(work),
            prepare=lambda: write_without_end(work.fixtures.base, folder),
        )
    ]


def write_without_end(base: Path, folder: Path) -> None:
    """Link a model whose end of text never comes, as no request can ask for that."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in base.iterdir():
        target = folder / file.name
        if file.name in ("config.json", "generation_config.json"):
            content = json.loads(file.read_text(encoding="utf-8"))
            target.write_text(json.dumps({**content, "eos_token_id": None}), encoding="utf-8")
        elif not target.exists():
            target.symlink_to(file.resolve())
