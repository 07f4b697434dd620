"""What every test relies on: one thread, no network, repeatable examples."""

from __future__ import annotations

import os

# Read by the libraries when they are imported, so it comes before everything else.
os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
)

import pytest
import torch
from hypothesis import settings

# Without a GPU the Triton kernels run in their interpreter; decided when triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# What imports clients of others runs where these are installed: `make acceptance`.
collect_ignore = ["acceptance"]

# A deadline per example measures the neighbours on a shared machine, not the code.
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run tests marked `anyio` on asyncio alone, the loop that serves."""
    return "asyncio"
