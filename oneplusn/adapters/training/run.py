"""`oneplusn train` without its command line: from a configuration to adapters on the disk."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import set_seed

from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.files import read_adapter, write_bundle
from oneplusn.adapters.training.base import fingerprint
from oneplusn.adapters.training.callbacks import is_over
from oneplusn.adapters.training.checkpoints import whole_checkpoints
from oneplusn.adapters.training.config import TrainConfig, changed
from oneplusn.adapters.training.data import Collate
from oneplusn.adapters.training.launch import check_launch
from oneplusn.adapters.training.metrics import Logits, measure
from oneplusn.adapters.training.model import ClusterModel
from oneplusn.adapters.training.prepare import Job, Prepared, prepare
from oneplusn.adapters.training.record import TrainingRecord, hardware, versions
from oneplusn.adapters.training.trainer import Plan, count_steps, fit, load_best, make_sampler
from oneplusn.errors import InvalidRequest

RUN_FILE = "run.json"
RECORD_FILE = "record.json"
BUNDLE_FOLDER = "bundle"
CHECKPOINTS_FOLDER = "checkpoints"
TENSORBOARD_FOLDER = "tensorboard"

Publish = Callable[[Path, str], str]
"""Sends the bundle in a folder to a server, under a name; returns what the server calls it."""


@dataclass(frozen=True, slots=True)
class Options:
    """What does not change the result.

    Attributes:
        resume: go on where an earlier run of the same configuration ended; begin if it never did.
        finish: make the adapter of the best checkpoint that is there, without more training.
        dry_run: stop before the first step.
        publish: see `Publish`; None publishes nothing.
        callbacks: of the caller, added to the Trainer's.
        say: shows one line to the user.
    """

    resume: bool = False
    finish: bool = False
    dry_run: bool = False
    publish: Publish | None = None
    callbacks: Sequence[TrainerCallback] = ()
    say: Callable[[str], None] = print


@dataclass(frozen=True, slots=True)
class Trained:
    """One adapter that is done.

    Attributes:
        name: of the adapter.
        bundle: folder of the bundle.
        digest: of the bundle.
        published: what a server calls it; None if it was sent to none.
    """

    name: str
    bundle: Path
    digest: str
    published: str | None = None


def run(config: TrainConfig, options: Options | None = None) -> list[Trained]:
    """Train every adapter of a configuration.

    Args:
        config: what is trained.
        options: see `Options`.

    Raises:
        InvalidRequest: bad input, processes that were started in a way that cannot train, or a
            training that diverged.
        AdapterInvalid: a name that no adapter may have.
    """
    options = options or Options()
    check_launch()
    processes = PartialState(cpu=not torch.cuda.is_available())
    say = options.say if processes.is_main_process else _silent
    prepared = prepare(config, processes.device)
    for job in prepared.jobs:
        _describe(job, prepared, config, say)
    if options.dry_run:
        return []
    for job in prepared.jobs:
        _check_folder(job, config, options)
    processes.wait_for_everyone()
    done = []
    for job in prepared.jobs:
        bundle = _finished(job)
        if bundle is None:
            bundle = _train(job, prepared, config, options, say)
        else:
            say(f"{job.name}: was finished before")
        processes.wait_for_everyone()
        if processes.is_main_process:
            done.append(_delivered(job, bundle, options, say))
    return done


def _silent(line: str) -> None:
    del line


def _describe(
    job: Job, prepared: Prepared, config: TrainConfig, say: Callable[[str], None]
) -> None:
    """Say what is about to be trained, parameters first."""
    experts, gates = job.parameters
    share = job.parameters.total / prepared.base.num_parameters()
    sizes = zip(job.method.tasks, job.train.sizes, strict=True)
    rows = len(make_sampler(job.train, config.training))
    steps = count_steps(rows, config.training, PartialState().num_processes)
    of = "rows" if config.training.packing is None else "packed rows"
    say(
        f"{job.name}: {job.parameters.total:,} parameters ({experts:,} of experts, {gates:,} of"
        f" gates), {share:.2%} of the base's; {job.method.name}, rank {job.method.rank},"
        f" {len(job.method.experts())} experts at {sum(s.num_slices for s in job.sites)} linears"
    )
    say(f"{job.name}: examples {', '.join(f'{task} {size:,}' for task, size in sizes)}")
    say(f"{job.name}: {steps:,} steps; {rows:,} {of} an epoch")


def _check_folder(job: Job, config: TrainConfig, options: Options) -> None:
    """Check that a folder is new, or that of the run that is to go on.

    Raises:
        InvalidRequest: it is neither.
    """
    file = job.folder / RUN_FILE
    goes_on = options.resume or options.finish
    if not file.is_file():
        if options.finish:
            raise InvalidRequest(f"{job.folder} has no run to finish; train first")
        if (job.folder / BUNDLE_FOLDER).exists():
            raise InvalidRequest(f"{job.folder} holds a bundle of something else; choose another")
        return
    if not goes_on:
        raise InvalidRequest(
            f"{job.folder} holds an earlier run; --resume goes on with it, another output or name"
            " begins a new one"
        )
    before = json.loads(file.read_text(encoding="utf-8"))
    now = _run_content(job, config)
    different = changed(before["config"], now["config"])
    if before["data"] != now["data"]:
        different.append("the examples")
    if different:
        raise InvalidRequest(
            f"{job.folder} was begun with other settings: {', '.join(different)}; set them as they"
            f" are in {file.name}, or begin a new run in another output"
        )


def _run_content(job: Job, config: TrainConfig) -> dict[str, Any]:
    digests = [job.train.digest, None if job.validation is None else job.validation.digest]
    # Through JSON and back, so that what is compared was written the same way.
    content: dict[str, Any] = json.loads(
        json.dumps({"config": config.model_dump(mode="json"), "data": digests})
    )
    return content


def _begin(job: Job, config: TrainConfig) -> None:
    """Write what `_check_folder` reads, whole or not at all."""
    job.folder.mkdir(parents=True, exist_ok=True)
    partial = job.folder / f".{RUN_FILE}.part"
    partial.write_text(json.dumps(_run_content(job, config), indent=1) + "\n", encoding="utf-8")
    partial.replace(job.folder / RUN_FILE)


def _finished(job: Job) -> Bundle | None:
    folder = job.folder / BUNDLE_FOLDER
    return read_adapter(folder, name=job.name) if folder.is_dir() else None


def _train(
    job: Job,
    prepared: Prepared,
    config: TrainConfig,
    options: Options,
    say: Callable[[str], None],
) -> Bundle:
    """Train one adapter and write everything about it, the bundle last."""
    started = time.perf_counter()
    main = PartialState().is_main_process
    if main:
        _begin(job, config)
    set_seed(config.training.seed)
    model = ClusterModel(prepared.base, job.method, job.sites)

    def made() -> Bundle:
        return model.bundle(
            base_fingerprint=fingerprint(prepared.files),
            dtype=getattr(torch, config.bundle_dtype),
            metadata=config.metadata,
        )

    try:
        made()  # what cannot become a bundle is refused now and not at the end
        collate = Collate(prepared.files.pad_token_id)
        history = _fitted(model, job, config, options, collate)
        bundle = made()
        metrics = _measured(model, job, config, collate) if main else {}
    finally:
        model.detach()
    record = TrainingRecord(
        method=job.method.name,
        tasks=job.method.tasks,
        parameters=job.parameters,
        settings={**config.model_dump(mode="json"), "method": _settings_of(job)},
        history=history,
        metrics=metrics,
        hardware=hardware(),
        versions=versions(),
        seconds=time.perf_counter() - started,
        seed=config.training.seed,
    )
    if main:
        record.save(job.folder / RECORD_FILE)
        _report(job, record, bundle, say)
        write_bundle(bundle, job.folder / BUNDLE_FOLDER)
    return bundle


def _settings_of(job: Job) -> dict[str, object]:
    return {"name": job.method.name, **asdict(job.method)}


def _fitted(
    model: ClusterModel, job: Job, config: TrainConfig, options: Options, collate: Collate
) -> list[dict[str, float]]:
    """Bring the model to the best weights of the run; return what was logged."""
    folder = job.folder / CHECKPOINTS_FOLDER
    before = whole_checkpoints(folder)
    over = bool(before) and is_over(before[-1].history, config.training.patience)
    if not (options.finish or over):
        callbacks = [*options.callbacks, *_tensorboard(job, config)]
        plan = Plan(job.train, collate, job.validation, folder)
        history = fit(model, plan, config.training, resume=options.resume, callbacks=callbacks)
        load_best(model, folder)
        return history
    found = load_best(model, folder)
    if found is None:
        raise InvalidRequest(f"{folder} has no whole checkpoint to finish with; --resume trains on")
    return found


def _tensorboard(job: Job, config: TrainConfig) -> list[TrainerCallback]:
    if not config.tensorboard or not PartialState().is_main_process:
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(str(job.folder / TENSORBOARD_FOLDER)))]


def _measured(
    model: ClusterModel, job: Job, config: TrainConfig, collate: Collate
) -> dict[str, dict[str, float]]:
    """Measure every task on the validation data, with the adapter and on the bare base."""
    if job.validation is None:
        return {}
    model.eval()
    base, device = model.base, model.base.device

    def logits(module: torch.nn.Module, leave_out: tuple[str, ...]) -> Logits:
        def compute(batch: Mapping[str, Tensor]) -> Tensor:
            inputs = {name: v.to(device) for name, v in batch.items() if name not in leave_out}
            with torch.autocast(device.type, torch.bfloat16, enabled=config.training.bf16):
                output: Tensor = module(**inputs).logits
            return output

        return compute

    results = [
        measure(
            logits(module, leave_out),
            job.validation,
            job.method.tasks,
            collate=collate,
            batch_size=config.training.batch_size,
            label=label if config.training.progress else None,
        )
        for module, leave_out, label in (
            (model, ("labels",), "adapted"),
            (base, ("labels", "task_ids"), "bare base"),
        )
    ]
    adapted, bare = results
    return {
        task: values | {f"base_{name}": value for name, value in bare[task].items()}
        for task, values in adapted.items()
    }


def _report(job: Job, record: TrainingRecord, bundle: Bundle, say: Callable[[str], None]) -> None:
    """Write the report; a training is not lost because its plots cannot be drawn."""
    try:
        from oneplusn.adapters.training.report import write_report
    except ImportError as error:
        say(f"{job.name}: no report, {error}; `pip install oneplusn[train]` brings what it needs")
        return
    say(f"{job.name}: report in {write_report(job.folder, record, bundle)}")


def _delivered(job: Job, bundle: Bundle, options: Options, say: Callable[[str], None]) -> Trained:
    """Say where the bundle is, and send it to a server where that is asked for."""
    folder = job.folder / BUNDLE_FOLDER
    say(f"{job.name}: bundle in {folder}, {bundle.digest}")
    published = None
    if options.publish is not None:
        published = options.publish(folder, job.name)
        say(f"{job.name}: published as {published}")
    return Trained(job.name, folder, bundle.digest, published)
