"""llama.cpp's server, with every LoRA loaded at the start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from oneplusn.loadtest.bench_cases import BASE, LORA, LORAS, ONE, Held, Work
from oneplusn.loadtest.dialects import Completions, Prompt
from oneplusn.loadtest.peers.system import INSIDE, Absent, Places, Served
from oneplusn.loadtest.processes import named, run_json

CONVERT_LIMIT_S = 300.0


class Scaled(Completions):
    """Its completions route, where a request names an adapter by its number and a scale."""

    def __init__(self, loras: Sequence[str]) -> None:
        self._numbers = {name: index for index, name in enumerate(loras)}

    def body(self, model: str, prompt: Prompt, output_tokens: int) -> dict[str, Any]:
        """Return a greedy request that streams and counts its tokens."""
        number = self._numbers.get(model)
        # Without the field every adapter is applied, so the base asks for one at scale 0.
        scale = {"id": number or 0, "scale": 0.0 if number is None else 1.0}
        own = {"lora": [scale], "cache_prompt": False}
        return {**super().body(model, prompt, output_tokens), **own}


def systems(work: Work, places: Places) -> list[Served]:
    """Return its server.

    Raises:
        Absent: It was neither named nor found, or what writes its files is not installed.
    """
    if places.llama_server is None:
        msg = "no llama-server on PATH; name one with --llama-server or LLAMA_SERVER"
        raise Absent(msg)
    program, loras = str(places.llama_server), work.fixtures.loras
    files = places.scratch / "gguf"
    convert = [places.python("gguf"), "-P", "-u", str(INSIDE / "gguf_files.py"), str(files)]
    convert += ["--model", str(work.fixtures.base), *named(loras, "--lora")]

    def command(port: int) -> list[str]:
        adapters = ",".join(str(files / f"{name}.gguf") for name in loras)
        threads = str(work.threads)
        return [
            *(program, "--host", "127.0.0.1", "--port", str(port), "--offline", "--no-webui"),
            *("--model", str(files / "base.gguf"), "--lora", adapters, "--lora-init-without-apply"),
            *("--parallel", str(work.streams), "--ctx-size", str(work.cache_tokens)),
            *("--threads", threads, "--threads-batch", threads),
        ]

    return [
        Served(
            name="llama.cpp",
            cases=(ONE, BASE, LORA, LORAS),
            work=work,
            route=Scaled(list(loras)),
            command=command,
            version=(program, "--version"),
            held=Held.of(work, list(loras.values())),
            prepare=lambda: run_json(convert, threads=work.threads, limit_s=CONVERT_LIMIT_S),
        )
    ]
