"""What the benchmark asks of every system: the same cases, by the same closed loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from oneplusn.loadtest.fixtures import SHAPES, TASKS_PER_CLUSTER, Fixtures, Shape

BASE_NAME = "base"
ONE, BASE, LORA, LORAS, CGC = "one", "base", "lora", "loras", "cgc"
CASES = (ONE, BASE, LORA, LORAS, CGC)
ONE_STREAM_REQUESTS = 4
ROOM = 2
"""Tokens that a cache has room for, over what the streams need at once."""


@dataclass(frozen=True, slots=True)
class Work:
    """What is asked.

    Attributes:
        model: The shape of the base.
        streams: Clients of the closed loop, each with a LoRA and a task of its own.
        rounds: Requests of each client.
        repeats: Runs of a case after a warm-up of one round.
        threads: Of arithmetic.
        fixtures: Where the base and the adapters are.
    """

    model: str
    streams: int
    prompt: int
    output: int
    rounds: int
    repeats: int
    threads: int
    fixtures: Fixtures

    @property
    def shape(self) -> Shape:
        """Sizes of the base."""
        return SHAPES[self.model]

    @property
    def context(self) -> int:
        """Tokens that a sequence may have."""
        return ROOM * (self.prompt + self.output)

    @property
    def cache_tokens(self) -> int:
        """Tokens that every server's cache has room for."""
        return self.streams * self.context

    def title(self, case: str) -> str:
        """Return what tables call a case."""
        count = self.streams
        return {
            ONE: "one request, bare base",
            BASE: "bare base",
            LORA: "one LoRA",
            LORAS: f"{count} different LoRAs",
            CGC: f"{count} tasks in {-(-count // TASKS_PER_CLUSTER)} CGC clusters",
        }[case]

    def asked(self, case: str) -> list[str]:
        """Return whom each stream of a case asks; request i asks the i-th, in turn."""
        loras = list(self.fixtures.loras)
        return {
            ONE: [BASE_NAME],
            BASE: [BASE_NAME] * self.streams,
            LORA: loras[:1] * self.streams,
            LORAS: loras,
            CGC: self.fixtures.cluster_tasks[: self.streams],
        }[case]

    def requests(self, case: str) -> int:
        """Return how many requests one run of a case has."""
        return ONE_STREAM_REQUESTS if case == ONE else self.rounds * self.streams


@dataclass(frozen=True, slots=True)
class Held:
    """What a server is known to hold, in bytes; the rest of its memory is its own."""

    weights: int
    cache: int = 0
    adapters: int = 0

    @classmethod
    def of(cls, work: Work, folders: Sequence[Path] = (), *, cache: bool = True) -> Held:
        """Take weights and adapters as their files, and a cache of the benchmark's size."""
        return cls(
            file_bytes([work.fixtures.base]),
            work.cache_tokens * work.shape.cache_bytes if cache else 0,
            file_bytes(folders),
        )


def file_bytes(folders: Sequence[Path]) -> int:
    """Return what the tensors in folders weigh."""
    return sum(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors"))
