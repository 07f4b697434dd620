"""A request's logits are the same to the bit: alone, in any batch, cut anyhow, on any threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from oneplusn.adapters.bundle import Bundle
from oneplusn.kernels import native
from oneplusn.server.engine.engine import Engine, EngineConfig
from oneplusn.server.engine.families import stack_of
from oneplusn.server.engine.model import prepare_model
from tiny_engines import MIB, Job, clusters, mixed_jobs, record_logits, run
from tiny_models import tiny_model

# Wide enough for two threads to share the products, deltas and attention of a step.
WIDE = {"hidden_size": 192, "intermediate_size": 416, "num_attention_heads": 6}


@pytest.fixture(scope="module")
def bundles() -> tuple[Bundle, ...]:
    return clusters(tiny_model("llama", **WIDE))


@pytest.fixture(scope="module")
def jobs(bundles: Sequence[Bundle]) -> list[Job]:
    """The base, two clusters' tasks and a plain LoRA, with prompts of 3 to 40 tokens."""
    return [replace(job, max_tokens=4) for job in mixed_jobs(bundles)]


def logits_of(
    bundles: Sequence[Bundle], batches: Sequence[Sequence[Job]], **limits: int
) -> dict[Job, Tensor]:
    """Serve batch after batch; return every job's logits `[tokens, V]`."""
    limits = {"kv_memory": 4 * MIB, "adapter_memory": 16 * MIB} | limits
    model = prepare_model(tiny_model("llama", **WIDE).bfloat16(), Path("llama"))
    assert stack_of(model.model) is not None, "these are not the compiled layers"
    engine = Engine(model, EngineConfig(**limits))
    for bundle in bundles:
        engine.load(bundle)
    found: dict[Job, Tensor] = {}
    for batch in batches:
        with pytest.MonkeyPatch.context() as patch:
            rows = record_logits(engine, patch)
            run(engine, batch)
        found |= {job: torch.stack(rows[str(index)]) for index, job in enumerate(batch)}
    return found


@pytest.fixture(scope="module")
def alone(bundles: Sequence[Bundle], jobs: list[Job]) -> dict[Job, Tensor]:
    """What every job gets by itself, its prompt in one piece, on one thread."""
    return logits_of(bundles, [[job] for job in jobs])


@pytest.fixture
def threads() -> Iterator[None]:
    before = native.threads()
    yield
    native.use_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("count", "limits"),
    [
        pytest.param(2, {}, id="all at once on two threads"),
        pytest.param(1, {"token_budget": 9, "max_num_seqs": 9}, id="prompts in small pieces"),
        pytest.param(2, {"token_budget": 33, "max_num_seqs": 3}, id="three at a time on two"),
    ],
)
def test_company_pieces_and_threads_change_no_bit(
    count: int,
    limits: dict[str, int],
    bundles: Sequence[Bundle],
    jobs: list[Job],
    alone: dict[Job, Tensor],
) -> None:
    native.use_threads(count)
    together = logits_of(bundles, [jobs], **limits)
    assert [job for job in jobs if not torch.equal(together[job], alone[job])] == []


def test_neither_does_a_prompt_that_was_there_before(
    bundles: Sequence[Bundle], jobs: list[Job], alone: dict[Job, Tensor]
) -> None:
    again = logits_of(bundles, [jobs, jobs[::-1]])
    assert [job for job in jobs if not torch.equal(again[job], alone[job])] == []


def test_the_tasks_answer_differently(jobs: list[Job], alone: dict[Job, Tensor]) -> None:
    """So the other tests compare something: no two jobs have the same logits."""
    firsts = {tuple(alone[job][0].tolist()) for job in jobs}
    assert len(firsts) == len(jobs) == 9
