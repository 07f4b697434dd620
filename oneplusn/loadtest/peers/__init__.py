"""Other servers and libraries on the benchmark's work, one file each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from oneplusn.loadtest.bench_cases import Work
from oneplusn.loadtest.peers import llama_cpp, static_batch, transformers_serve, vllm
from oneplusn.loadtest.peers.system import Places, System

PEERS: dict[str, Callable[[Work, Places], Sequence[System]]] = {
    "llama.cpp": llama_cpp.systems,
    "vllm": vllm.systems,
    "transformers-serve": transformers_serve.systems,
    "transformers": static_batch.transformers,
    "peft": static_batch.peft,
}
