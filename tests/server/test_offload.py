"""Work beside the engine keeps to one thread, and leaves the engine's threads alone."""

from __future__ import annotations

import asyncio
import threading

import torch

from oneplusn.server.offload import offload


def test_offloaded_work_computes_on_its_own_thread_alone() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        seen = asyncio.run(offload(lambda: (torch.get_num_threads(), threading.get_ident())))
        assert seen[0] == 1
        assert seen[1] != threading.get_ident()
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
