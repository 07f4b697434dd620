"""Train one cluster on mixed-task batches; transformers' Trainer carries the loop."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader, Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import set_seed

from oneplusn.adapters.attach import find_sites
from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.methods.base import Method
from oneplusn.adapters.training.callbacks import EVAL_LOSS, EarlyEnd, ProgressBar, Watchdog
from oneplusn.adapters.training.checkpoints import best_checkpoint, whole_checkpoints
from oneplusn.adapters.training.config import TrainSettings
from oneplusn.adapters.training.data import Collate, Encoded
from oneplusn.adapters.training.launch import check_launch
from oneplusn.adapters.training.metrics import TaskLosses, ValidationMetrics, completion_losses
from oneplusn.adapters.training.model import ClusterModel
from oneplusn.adapters.training.packing import PackedDataset, PackedSampler
from oneplusn.adapters.training.sampling import TaskSampler

__all__ = ["ClusterTrainer", "Plan", "TrainSettings", "fit", "train_cluster"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is trained on, and where the checkpoints go.

    Attributes:
        train: encoded examples.
        collate: makes batches of them.
        validation: encoded examples to validate on, or None.
        folder: of the checkpoints; None keeps none.
    """

    train: Dataset[Encoded]
    collate: Collate
    validation: Dataset[Encoded] | None = None
    folder: Path | None = None


def make_sampler(dataset: Dataset[Encoded], settings: TrainSettings) -> TaskSampler | PackedSampler:
    """Return what draws the rows of an epoch."""
    rows: Any = dataset
    task_ids = [rows[index]["task_ids"] for index in range(len(rows))]
    draws = TaskSampler(task_ids, temperature=settings.temperature, seed=settings.seed)
    if settings.packing is None:
        return draws
    lengths = [len(rows[index]["input_ids"]) for index in range(len(rows))]
    return PackedSampler(draws, lengths, row_tokens=settings.packing, seed=settings.seed)


def count_steps(num_rows: int, settings: TrainSettings, processes: int = 1) -> int:
    """Return the optimiser steps of a training whose epochs have so many rows."""
    if settings.epochs is None:
        return settings.steps
    batches = math.ceil(num_rows / (settings.batch_size * processes))
    return math.ceil(settings.epochs * math.ceil(batches / settings.accumulate))


def make_arguments(
    settings: TrainSettings, steps: int, folder: Path, *, validates: bool, saves: bool
) -> TrainingArguments:
    """Say to the Trainer what the settings mean."""
    every = settings.checkpoint_every or math.ceil(steps / 10)
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup,
        max_grad_norm=settings.clip,
        bf16=settings.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=settings.seed,
        logging_steps=max(1, steps // 100),
        logging_nan_inf_filter=False,  # the watchdog ends a run in place of hiding it
        eval_strategy="steps" if validates else "no",
        eval_steps=every,
        save_strategy="steps" if saves else "no",
        save_steps=every,
        save_total_limit=settings.keep,
        load_best_model_at_end=validates and saves,
        metric_for_best_model=EVAL_LOSS if validates else None,
        greater_is_better=False if validates else None,
        label_names=["labels", "task_ids"],
        report_to=[],
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # every forward multiplies with all experts
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,  # its bar prints dictionaries; ProgressBar shows the loss
    )


class ClusterTrainer(Trainer):
    """transformers' Trainer with task-mixed batches, two rates, and losses by task.

    All else (resuming, distribution, callbacks) is as its users know it.
    """

    def __init__(
        self,
        model: ClusterModel,
        plan: Plan,
        settings: TrainSettings,
        *,
        folder: Path,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        """Prepare a training.

        Args:
            model: what is trained.
            plan: on what.
            settings: how.
            folder: for the Trainer's own files; the plan's where that keeps checkpoints.
            callbacks: further ones of the caller.

        Raises:
            InvalidRequest: the processes were started in a way that cannot train a cluster.
        """
        check_launch()
        tasks = model.method.tasks
        self._cluster = model
        self._settings = settings
        self._sampler = make_sampler(plan.train, settings)
        self._logged = TaskLosses(len(tasks))
        self._stepped = TaskLosses(len(tasks))
        processes = int(os.environ.get("WORLD_SIZE", "1"))  # as launchers of distributed runs set
        metrics = ValidationMetrics(tasks)
        super().__init__(
            model=model,
            args=make_arguments(
                settings,
                count_steps(len(self._sampler), settings, processes),
                folder,
                validates=plan.validation is not None,
                saves=plan.folder is not None,
            ),
            data_collator=plan.collate,
            train_dataset=plan.train if settings.packing is None else PackedDataset(plan.train),
            eval_dataset=plan.validation,
            compute_metrics=metrics if plan.validation is not None else None,
            preprocess_logits_for_metrics=metrics.rows,
            callbacks=list(callbacks),
        )
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the tokens of a whole step
        self._sampler.epoch = lambda: int(self.state.epoch or 0)
        trained = [*model.expert_parameters(), *model.gate_parameters()]
        self.add_callback(Watchdog(self._stepped, tasks, trained, reduce=self._over_processes))
        self.remove_callback(PrinterCallback)
        if settings.progress:
            self.add_callback(ProgressBar(tasks))
        if settings.patience is not None:
            self.add_callback(EarlyEnd(settings.patience))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return batches of the rows that the sampler draws."""
        dataset: Any = self.train_dataset
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=self._train_batch_size,
            sampler=self._sampler,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Return AdamW with one rate for the experts and one for the gates."""
        del model
        if self.optimizer is None:
            settings = self._settings
            experts, gates = self._cluster.expert_parameters(), self._cluster.gate_parameters()
            groups = [
                {
                    "params": experts,
                    "lr": settings.learning_rate,
                    "weight_decay": settings.weight_decay,
                },
                {"params": gates, "lr": settings.gate_learning_rate},
            ]
            self.optimizer = AdamW([g for g in groups if g["params"]], weight_decay=0.0)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # noqa: ANN401 - as the Trainer declares it
        """Return the mean loss of the completion tokens of the whole step, and keep it by task."""
        labels = inputs["labels"]
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        losses, tasks = completion_losses(outputs.logits, labels, inputs["task_ids"])
        if model.training:
            self._logged.add(losses, tasks)
            self._stepped.add(losses, tasks)
        loss = losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over them
        return (loss, {"logits": outputs.logits}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and beside the loss that of every task since the last time."""
        if "loss" in logs:
            means = self._logged.means(self._over_processes)
            self._logged.clear()
            named = zip(self._cluster.method.tasks, means, strict=True)
            logs |= {f"{task}_loss": mean for task, mean in named if mean is not None}
        super().log(logs, start_time)

    def _over_processes(self, sums: Tensor) -> Tensor:
        summed: Tensor = self.accelerator.reduce(sums, "sum")
        return summed


def fit(
    model: ClusterModel,
    plan: Plan,
    settings: TrainSettings,
    *,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict[str, float]]:
    """Train a model in place; it ends with the best validated weights, or else the last.

    Args:
        model: the cluster beside its base.
        plan: what is trained on.
        settings: steps, rates, seed.
        resume: go on from the last whole checkpoint, if there is one.
        callbacks: further ones, called as the Trainer calls its own.

    Returns:
        What was logged, oldest first.
    """
    with tempfile.TemporaryDirectory() as scratch:
        trainer = ClusterTrainer(
            model, plan, settings, folder=plan.folder or Path(scratch), callbacks=callbacks
        )
        found = []
        if resume and plan.folder is not None:
            found = whole_checkpoints(plan.folder, processes=trainer.args.world_size)
        with ExitStack() as after:
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, ProgressBar):
                    after.callback(callback.close)
            if settings.gradient_checkpointing:
                model.activation_checkpointing_enable()
                after.callback(_keep_activations, model.base)
            trainer.train(resume_from_checkpoint=str(found[-1].folder) if found else None)
        return [dict(row) for row in trainer.state.log_history]


def load_best(model: ClusterModel, folder: Path) -> list[dict[str, float]] | None:
    """Load the best checkpoint of a run; return what was logged, None if there is none."""
    best = best_checkpoint(folder)
    if best is None:
        return None
    model.load_state_dict(best.weights(), strict=True)
    return whole_checkpoints(folder)[-1].history


def train_cluster(
    base: PreTrainedModel,
    method: Method,
    dataset: Dataset[Encoded],
    settings: TrainSettings,
    *,
    pad_token_id: int,
    base_fingerprint: str | None = None,
) -> Bundle:
    """Train the experts and gates of one cluster beside a frozen base.

    Args:
        base: the base in fp32; left as it was, but frozen.
        method: what the cluster's experts and gates are.
        dataset: encoded examples of the method's tasks.
        settings: steps, rates, seed.
        pad_token_id: fills up shorter sequences of a batch.
        base_fingerprint: written into the bundle.

    Returns:
        The bundle, factors in bf16.
    """
    set_seed(settings.seed)
    model = ClusterModel(base, method, find_sites(base))
    try:
        fit(model, Plan(dataset, Collate(pad_token_id)), settings)
    finally:
        model.detach()
    return model.bundle(base_fingerprint=base_fingerprint, dtype=torch.bfloat16)


def _keep_activations(base: PreTrainedModel) -> None:
    """Leave the base as it was; the name is another one in transformers before 5.20."""
    if hasattr(base, "activation_checkpointing_disable"):
        base.activation_checkpointing_disable()
    else:
        base.gradient_checkpointing_disable()
