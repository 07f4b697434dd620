"""A tiny engine in a loop, with adapters that come and go, and everything that it told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.image import PageImage
from oneplusn.adapters.layout import page_image
from oneplusn.adapters.refs import TaskRef
from oneplusn.server.engine.engine import Engine
from oneplusn.server.messages import (
    Freed,
    Loaded,
    Refusal,
    Sampling,
    StepOutputs,
    Submit,
    TokenOutput,
)
from pools import budget_of
from tiny_engines import cluster, tiny_engine
from tiny_models import tiny_model

PROMPT = tuple(range(5, 45))
MODEL = tiny_model("llama")


@dataclass
class Clock:
    """Time that passes when a test says so."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Driven:
    """An engine in a loop, and everything that came out of it."""

    engine: Engine
    outputs: dict[str, list[TokenOutput]] = field(default_factory=dict)
    refused: dict[str, Refusal] = field(default_factory=dict)
    events: list[Loaded | Freed] = field(default_factory=list)
    order: list[str] = field(default_factory=list)

    def turn(self, *, write: bool = True) -> StepOutputs | None:
        """Write a piece, step, and look at everything."""
        engine, step = self.engine, None
        if write and engine.is_writing:
            engine.write_some(0.0)
        self.events += (events := engine.poll())
        self.order += [type(event).__name__ for event in events]
        if engine.has_work:
            step = engine.step()
            for output in step.outputs:
                self.outputs.setdefault(output.id, []).append(output)
                if output.finish is not None:
                    self.order.append(f"{output.id} {output.finish}")
            self.refused.update((refusal.id, refusal) for refusal in step.refused)
        engine.scheduler.check_integrity()
        engine.residency.check_integrity()
        return step

    def turns(self, count: int) -> None:
        for _ in range(count):
            self.turn()

    def finish(self) -> None:
        while self.engine.has_work or self.engine.is_writing:
            self.turn()
        self.turn()

    def tokens(self, request_id: str) -> list[int]:
        return [output.token for output in self.outputs.get(request_id, ())]

    def finish_of(self, request_id: str) -> str | None:
        return self.outputs[request_id][-1].finish


def driven(pages: int = 20, resident: Iterable[Bundle] = (), **limits: object) -> Driven:
    """An engine whose pool has so many pages at each site."""
    specs = tiny_engine("llama", max_tasks=32).model.sites
    budget = budget_of(specs, pages, max_tasks=32)
    return Driven(tiny_engine("llama", resident, adapter_memory=budget, max_tasks=32, **limits))


def lora(seed: int, *, pages: int = 1, tasks: Sequence[str] = ("t",)) -> Bundle:
    """One run of this many pages at each site for each task."""
    return cluster(MODEL, tasks, rank=16 * pages, seed=seed)


def image_of(bundle: Bundle, engine: Engine) -> PageImage:
    return page_image(bundle, engine.model.sites, engine.model.dtype)


def begin(driven: Driven, bundle: Bundle, *, pin: bool = False) -> None:
    driven.engine.begin_load(image_of(bundle, driven.engine), pin=pin)


def ask(driven: Driven, name: str, *bundles: Bundle, task: str = "t", **fields: object) -> None:
    refs = tuple(TaskRef(bundle.digest, task) for bundle in bundles)
    fields = {"tokens": list(PROMPT), "max_tokens": 6} | fields
    sampling = Sampling(max_tokens=fields.pop("max_tokens"), ignore_eos=True)
    driven.engine.submit(Submit(name, refs=refs, sampling=sampling, **fields))


def solo(*bundles: Bundle, max_tokens: int = 6) -> list[int]:
    """What these together answer to the prompt when nothing else is there."""
    engine = driven(resident=bundles)
    ask(engine, "x", *bundles, max_tokens=max_tokens)
    engine.finish()
    return engine.tokens("x")


A, B, C, LONG = (lora(1), lora(2), lora(3), lora(4, pages=2))
