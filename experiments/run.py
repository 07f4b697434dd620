"""Train and measure one setting; as a process, a list of them.

    echo '[{...}, ...]' | python -m experiments.run --base FOLDER

Reads a JSON list of runs, prints a JSON line for each as it is done.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedModel
from transformers.trainer_utils import set_seed
from transformers.utils.logging import disable_progress_bar

from experiments.bed import Task, ciphers, draw, encode, load_base, planted, varied
from experiments.score import accuracies, agreement, borrowed_mass, common_entropy
from oneplusn.adapters.attach import find_sites
from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.methods import make_method
from oneplusn.adapters.methods.budget import budget
from oneplusn.adapters.training.data import Collate, TaskDataset
from oneplusn.adapters.training.model import ClusterModel
from oneplusn.adapters.training.trainer import Plan, TrainSettings, fit

VALIDATION = 64
TEST = 128
WARMUP = 0.3
"""Share of the steps in which the rates rise; with the trainer's 0.06 single seeds collapse."""
UNGATED = ("lora", "shared-lora")

FAMILIES: Mapping[str, Callable[..., tuple[Task, ...]]] = {
    "ciphers": ciphers,
    "planted": planted,
    "varied": varied,
}


@dataclass(frozen=True, slots=True)
class Run:
    """Hold all that decides the outcome of one training.

    Attributes:
        label: What the tables call the method with its settings.
        method: Name in METHODS.
        settings: Fields of the method.
        family: Name of a function of FAMILIES.
        options: Its arguments, without the seed.
        examples: Training examples a task.
        steps: Optimiser steps.
        rate: Peak learning rate of the experts.
        gate_rate: Peak learning rate of the gates.
        warmup: Share of the steps in which the rates rise.
        seed: Of the tasks, the data and the training.
    """

    label: str
    method: str
    settings: Mapping[str, Any]
    family: str
    options: Mapping[str, Any]
    seed: int = 0
    rate: float = 0.0
    gate_rate: float = 0.0
    examples: int = 32
    steps: int = 500
    warmup: float = WARMUP

    @property
    def key(self) -> str:
        """What tells this run from every other."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def has_gates(self) -> bool:
        """Whether the rate of the gates makes a difference."""
        return self.method not in UNGATED

    def at(self, rate: float, gate_rate: float, seed: int) -> Run:
        """Return the same setting at other rates and another seed."""
        return replace(self, rate=rate, gate_rate=gate_rate, seed=seed)

    def family_tasks(self) -> tuple[Task, ...]:
        """Make the tasks."""
        return FAMILIES[self.family](**self.options, seed=self.seed)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Hold what one run gave.

    Attributes:
        run: What was run.
        parameters: Trained numbers, of experts and of gates.
        validation: Task -> token accuracy on the validation split, which chooses the rate.
        test: Task -> token accuracy on the test split.
        agreement: Adjusted Rand index of the gate rows' clusters against the planted ones; None
            where one cluster was planted or the gates have nothing to compare.
        entropy: Of the rows over the common experts, 1 where uniform.
        borrowed: Share of the weight on own experts that lies on other tasks' experts.
        seconds: Of processor time.
    """

    run: Run
    parameters: Sequence[int]
    validation: Mapping[str, float]
    test: Mapping[str, float]
    agreement: float | None
    entropy: float | None
    borrowed: float | None
    seconds: float

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Read a line that a process printed."""
        fields = json.loads(line)
        return cls(**fields | {"run": Run(**fields["run"])})

    @property
    def chosen_by(self) -> float:
        """Mean accuracy on the validation split."""
        return _mean(self.validation)

    @property
    def mean(self) -> float:
        """Mean accuracy on the test split."""
        return _mean(self.test)

    @property
    def worst(self) -> float:
        """Accuracy of the worst task on the test split."""
        return min(self.test.values())


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


def execute(run: Run, base: Path) -> tuple[Bundle, Outcome]:
    """Train one bundle as shipped, and measure it as served: from its bf16 factors."""
    started = time.process_time()
    tasks = run.family_tasks()
    model, tokenizer = load_base(base)
    pad = model.config.pad_token_id
    assert isinstance(pad, int)

    def split(name: str, count: int) -> TaskDataset:
        return encode(draw(tasks, count, split=name, seed=run.seed), tasks, tokenizer)

    cluster = train(run, model, split("train", run.examples), pad)
    bundle = cluster.bundle(base_fingerprint=None, dtype=torch.bfloat16)
    experts, rows = cluster.method.experts(), cluster.gate_rows()
    outcome = Outcome(
        run=run,
        parameters=budget(cluster.method, cluster.sites),
        validation=accuracies(model, bundle, split("validation", VALIDATION), pad_token_id=pad),
        test=accuracies(model, bundle, split("test", TEST), pad_token_id=pad),
        agreement=agreement(rows, [task.cluster for task in tasks]),
        entropy=common_entropy(experts, rows),
        borrowed=borrowed_mass(bundle.tasks, experts, rows),
        seconds=round(time.process_time() - started, 1),
    )
    return bundle, outcome


def train(run: Run, model: PreTrainedModel, data: TaskDataset, pad: int) -> ClusterModel:
    """Train the run's method beside the base; the base is left as it was."""
    set_seed(run.seed)
    method = make_method(run.method, [task.name for task in run.family_tasks()], run.settings)
    cluster = ClusterModel(model, method, find_sites(model))
    settings = TrainSettings(
        steps=run.steps,
        learning_rate=run.rate,
        gate_learning_rate=run.gate_rate,
        warmup=run.warmup,
        seed=run.seed,
        bf16=False,
        progress=False,
    )
    try:
        fit(cluster, Plan(data, Collate(pad)), settings)
    finally:
        cluster.detach()
    return cluster


def main() -> None:
    """Run what standard input lists."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    for fields in json.load(sys.stdin):
        with redirect_stdout(sys.stderr):  # transformers prints its logs
            _, outcome = execute(Run(**fields), args.base)
        print(json.dumps(asdict(outcome)), flush=True)


if __name__ == "__main__":
    main()
