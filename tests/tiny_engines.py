"""Engines over tiny random models with random adapters, and what came out of them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from oneplusn.adapters.attach import find_sites
from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.refs import TaskRef
from oneplusn.server.engine.engine import Engine, EngineConfig
from oneplusn.server.engine.model import prepare_model
from oneplusn.server.engine.scheduler import Schedule
from oneplusn.server.messages import Sampling, StepStats, Submit, TokenOutput
from random_bundles import delta_weight, make_bundle, shapes_of
from tiny_models import VOCAB, tiny_model

MIB = 2**20
# Where the two best logits are closer than this, rounding may pick either.
TIE = 1e-4


@dataclass(frozen=True)
class Job:
    """A prompt and the task that serves it."""

    prompt: tuple[int, ...]
    parts: tuple[tuple[Bundle, str], ...] = ()
    max_tokens: int = 8

    def submit(self, request_id: str, *, salt: str = "") -> Submit:
        refs = tuple(TaskRef(bundle.digest, task) for bundle, task in self.parts)
        sampling = Sampling(max_tokens=self.max_tokens, ignore_eos=True, logprobs=2)
        return Submit(request_id, list(self.prompt), refs, sampling, salt=salt)


@dataclass
class Answer:
    """What one request got."""

    outputs: list[TokenOutput] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [output.token for output in self.outputs if output.token is not None]

    @property
    def finish(self) -> str | None:
        return self.outputs[-1].finish

    @property
    def cached_tokens(self) -> int:
        return self.outputs[0].cached_tokens

    @property
    def decided(self) -> list[int]:
        """The tokens up to the first that another rounding could have changed."""
        sure = []
        for output in self.outputs:
            assert output.top is not None
            (_, best), (_, second) = output.top
            if best - second <= TIE:
                break
            sure.append(output.token)
        return sure


def tiny_engine(
    family: str = "llama",
    bundles: Sequence[Bundle] = (),
    *,
    dtype: torch.dtype = torch.float32,
    stored: torch.dtype | None = None,
    clock: Callable[[], float] = time.monotonic,
    **limits: int,
) -> Engine:
    limits = {"kv_memory": 4 * MIB, "adapter_memory": 16 * MIB} | limits
    loaded = prepare_model(tiny_model(family).to(dtype), Path(family), stored=stored)
    engine = Engine(loaded, EngineConfig(**limits), clock=clock)
    for bundle in bundles:
        engine.load(bundle)
    return engine


def cluster(
    model: nn.Module, tasks: Sequence[str], *, common: Sequence[int] = (), rank: int = 3, seed: int
) -> Bundle:
    """Experts at every linear that an adapter can reach."""
    shapes = shapes_of(find_sites(model))
    own = dict.fromkeys(tasks, rank)
    return make_bundle(shapes, seed=seed, tasks=tasks, common=common, own=own)


def clusters(model: nn.Module) -> tuple[Bundle, Bundle, Bundle]:
    """Two clusters of four and three tasks, and a plain LoRA."""
    return (
        cluster(model, ["a1", "a2", "a3", "a4"], common=(3, 2), seed=1),
        cluster(model, ["b1", "b2", "b3"], common=(5,), rank=5, seed=2),
        cluster(model, ["c"], rank=17, seed=3),
    )


def merged(model: PreTrainedModel, *parts: tuple[Bundle, str, float]) -> PreTrainedModel:
    """Copy a model with the deltas of weighted tasks added to its weights."""
    model = copy.deepcopy(model)
    for bundle, task, weight in parts:
        for path in bundle.modules:
            change = delta_weight(bundle, task, path)
            assert change is not None
            module = model.get_submodule(path)
            change = change.T if isinstance(module, Conv1D) else change
            with torch.no_grad():
                module.weight += weight * change.to(module.weight.dtype)
    return model


def mixed_jobs(bundles: Sequence[Bundle], *, seed: int = 0) -> list[Job]:
    """A job for the base and for every task, with prompts of 3 to 40 tokens."""
    draw = torch.Generator().manual_seed(seed)
    served = [(), *(((bundle, task),) for bundle in bundles for task in bundle.tasks)]
    return [
        Job(tuple(torch.randint(VOCAB, (3 + 37 * i // len(served),), generator=draw).tolist()), to)
        for i, to in enumerate(served)
    ]


def run(engine: Engine, jobs: Sequence[Job]) -> tuple[list[Answer], list[StepStats]]:
    """Submit all jobs at once and step until all have ended."""
    answers = [Answer() for _ in jobs]
    for index, job in enumerate(jobs):
        engine.submit(job.submit(str(index)))
    stats = []
    while engine.has_work:
        step = engine.step()
        stats.append(step.stats)
        for output in step.outputs:
            answers[int(output.id)].outputs.append(output)
    engine.scheduler.check_integrity()
    return answers, stats


def alone(engine: Engine, jobs: Sequence[Job]) -> list[Answer]:
    """Run every job by itself."""
    return [run(engine, [job])[0][0] for job in jobs]


def record_logits(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Tensor]]:
    """Return a table that steps will fill: by request, the logits of each token."""
    rows: dict[str, list[Tensor]] = {}
    forward = engine.runner.run

    def record(schedule: Schedule) -> Tensor:
        logits = forward(schedule)
        for seq, row in zip(schedule.sampled, logits, strict=True):
            rows.setdefault(seq.id, []).append(row.clone())
        return logits

    monkeypatch.setattr(engine.runner, "run", record)
    return rows
