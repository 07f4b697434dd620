"""The engine serves the same tokens whichever backend computes deltas and attention."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from oneplusn.kernels import ops, triton_backend
from tiny_engines import Answer, Job, clusters, run, tiny_engine
from tiny_models import tiny_model


@pytest.fixture(autouse=True)
def _forget_the_choice() -> Iterator[None]:
    ops.backend.cache_clear()
    yield
    ops.backend.cache_clear()


def serve(backend: str, monkeypatch: pytest.MonkeyPatch) -> list[Answer]:
    """Serve the base, tasks of two clusters, a plain LoRA and a blend over two, in one batch."""
    monkeypatch.setenv("ONEPLUSN_KERNELS", backend)
    ops.backend.cache_clear()
    first, second, lora = clusters(tiny_model("llama"))
    jobs = [
        Job((5, 3), (), max_tokens=2),
        Job((7, 2, 9), ((first, "a1"),), max_tokens=2),
        Job((7, 2, 9), ((first, "a2"),), max_tokens=2),
        Job((4, 4), ((second, "b1"),), max_tokens=2),
        Job((8,), ((lora, "c"),), max_tokens=1),
        Job((6, 1), ((first, "a3"), (second, "b2")), max_tokens=2),
    ]
    engine = tiny_engine("llama", (first, second, lora))
    assert engine.runner.hook.backend.name == backend
    return run(engine, jobs)[0]


def test_triton_gives_the_tokens_of_the_cpu_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = 0
    launch = triton_backend.launch

    def counting(*args: object, **options: object) -> None:
        nonlocal launches
        launches += 1
        launch(*args, **options)

    monkeypatch.setattr(triton_backend, "launch", counting)
    triton = serve("triton", monkeypatch)
    on_cpu = serve("cpu", monkeypatch)

    for mine, theirs in zip(triton, on_cpu, strict=True):
        assert len(theirs.decided) == len(theirs.tokens), "a tie: choose other prompts"
        assert mine.tokens == theirs.tokens
    assert launches == 2 * 2 * 4, "steps * layers * sites, all of them with Triton's backend"
