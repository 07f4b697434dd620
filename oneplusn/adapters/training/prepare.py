"""From a configuration to trainings that are ready to start; what can be wrong is found here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from oneplusn.adapters.checks import check_name, shown
from oneplusn.adapters.methods import METHODS, Method, make_method
from oneplusn.adapters.methods.budget import Budget, budget, match
from oneplusn.adapters.training.base import (
    BaseFiles,
    check_packing,
    find_base,
    load_base,
    select_sites,
)
from oneplusn.adapters.training.config import TrainConfig, read_clusters
from oneplusn.adapters.training.data import Example, TaskDataset
from oneplusn.adapters.training.sources import read_sources
from oneplusn.errors import InvalidRequest
from oneplusn.kernels.plan import SiteSpec


@dataclass(frozen=True, slots=True)
class Job:
    """The training of one adapter.

    Attributes:
        name: of the adapter.
        folder: where it goes.
        method: after its ranks were matched.
        sites: that get experts.
        parameters: what is trained.
        train: encoded examples.
        validation: encoded examples, or None.
    """

    name: str
    folder: Path
    method: Method
    sites: tuple[SiteSpec, ...]
    parameters: Budget
    train: TaskDataset
    validation: TaskDataset | None


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything before the first step: the base in memory, and the trainings beside it."""

    files: BaseFiles
    base: PreTrainedModel
    jobs: tuple[Job, ...]


def prepare(config: TrainConfig, device: torch.device) -> Prepared:
    """Read, encode and check everything; the cheap checks come first.

    Args:
        config: what is trained.
        device: for the base.

    Raises:
        InvalidRequest: what is wrong.
        AdapterInvalid: a name that no adapter may have.
    """
    clusters = None if config.clusters is None else read_clusters(config.clusters)
    examples = read_sources(config.data.train)
    held_out = read_sources(config.data.validation)
    clusters = clusters or {config.name: config.tasks or _tasks_of(examples)}
    _check_tasks(clusters, examples, held_out, config)
    methods = {name: _make_method(config, tasks) for name, tasks in clusters.items()}
    files = find_base(config)
    data = {
        name: _encode(tasks, examples, held_out, files, config) for name, tasks in clusters.items()
    }
    base = load_base(files, config, device)
    if config.training.packing is not None:
        check_packing(base, config.training.batch_size)
    sites = tuple(select_sites(base, config.targets))
    jobs = []
    for name, method in methods.items():
        matched = _matched(method, sites, config.match_params)
        train, validation = data[name]
        jobs.append(
            Job(
                name=name,
                folder=config.output.resolve() / name,
                method=matched,
                sites=sites,
                parameters=budget(matched, sites),
                train=train,
                validation=validation,
            )
        )
    return Prepared(files, base, tuple(jobs))


def _tasks_of(examples: Sequence[Example]) -> list[str]:
    return list(dict.fromkeys(example.task for example in examples))


def _check_tasks(
    clusters: dict[str, list[str]],
    examples: Sequence[Example],
    held_out: Sequence[Example],
    config: TrainConfig,
) -> None:
    """Check that data and tasks fit each other both ways."""
    if not examples:
        raise InvalidRequest("data.train has no examples; give a file that has some")
    for name in clusters:
        check_name(name, "adapter")
    known = [task for tasks in clusters.values() for task in tasks]
    for example in (*examples, *held_out):
        if example.task not in known:
            message = f"task {shown(example.task)} is not one of the tasks {shown(known)}"
            raise InvalidRequest(f"{example.origin}: {message}; add it there, or leave it out here")
    missing = sorted(set(known) - {example.task for example in examples})
    if missing:
        files = ", ".join(str(source.path or source.dataset) for source in config.data.train)
        raise InvalidRequest(
            f"task {missing[0]!r} has no rows in {files}; add some, or remove it from"
            f" {'the clusters' if config.clusters else 'tasks'}"
        )


def _make_method(config: TrainConfig, tasks: Sequence[str]) -> Method:
    return make_method(config.method.name, tasks, config.method.settings)


def _matched(method: Method, sites: Sequence[SiteSpec], wanted: int | str | None) -> Method:
    """Change the ranks to a budget: a number, or that of another method at its defaults."""
    if wanted is None:
        return method
    if isinstance(wanted, int):
        return match(method, sites, wanted)
    if wanted not in METHODS:
        raise InvalidRequest(
            f"match_params is {shown(wanted)}; it is a number of parameters or one of"
            f" {', '.join(METHODS)}",
            param="match_params",
        )
    return match(method, sites, budget(make_method(wanted, method.tasks, {}), sites).total)


def _encode(
    tasks: Sequence[str],
    examples: Sequence[Example],
    held_out: Sequence[Example],
    files: BaseFiles,
    config: TrainConfig,
) -> tuple[TaskDataset, TaskDataset | None]:
    """Encode the examples of one cluster, training and validation."""
    limit = min(config.data.max_tokens or files.context, files.context)
    ours = [example for example in examples if example.task in tasks]
    theirs = [example for example in held_out if example.task in tasks]
    if config.data.validation_share:
        ours, theirs = _split(ours, config.data.validation_share, config.training.seed)

    def encoded(chosen: Sequence[Example], longest: int) -> TaskDataset:
        hide = not config.training.progress
        shown_late = tqdm(chosen, desc="encoding", delay=2, leave=False, disable=hide)
        return TaskDataset(shown_late, tasks, files.tokenizer, max_tokens=longest)

    longest_row = min(limit, config.training.packing or limit)
    return encoded(ours, longest_row), encoded(theirs, limit) if theirs else None


def _split(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Hold out a share of every task's examples, at least one where it has two or more."""
    held_out = set[int]()
    for number, task in enumerate(_tasks_of(examples)):
        members = [index for index, example in enumerate(examples) if example.task == task]
        count = min(max(1, round(share * len(members))), len(members) - 1)
        order = np.random.default_rng((seed, number, 3)).permutation(members)
        held_out |= set(order[:count].tolist())
    kept = [example for index, example in enumerate(examples) if index not in held_out]
    return kept, [examples[index] for index in sorted(held_out)]
