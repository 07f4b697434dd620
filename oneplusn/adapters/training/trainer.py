"""Train one cluster on mixed-task batches; transformers' Trainer carries the loop."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import AdamW
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments, get_scheduler
from transformers.trainer_utils import set_seed

from oneplusn.adapters.attach import find_sites
from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.methods.base import Method
from oneplusn.adapters.training.data import Collate, Encoded
from oneplusn.adapters.training.model import ClusterModel


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How long and how fast.

    Args:
        steps: optimiser steps.
        batch_size: sequences per step, of any tasks.
        learning_rate: peak rate of the experts.
        gate_learning_rate: peak rate of the gates; gates sum to about 1 and need a higher one.
        warmup: share of the steps.
        clip: largest norm of the gradient; without it single runs collapse.
        seed: of everything random.
        bf16: compute in bfloat16 under autocast, parameters in fp32.
        progress: show a bar with the loss.
    """

    steps: int = 500
    batch_size: int = 32
    learning_rate: float = 3e-3
    gate_learning_rate: float = 2e-2
    warmup: float = 0.06
    clip: float = 0.5
    seed: int = 0
    bf16: bool = True
    progress: bool = True


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
    optimizer = AdamW(
        [
            {"params": model.expert_parameters(), "lr": settings.learning_rate},
            {"params": model.gate_parameters(), "lr": settings.gate_learning_rate},
        ],
        weight_decay=0.0,
    )
    scheduler: Any = get_scheduler(
        "linear",
        optimizer,
        num_warmup_steps=round(settings.warmup * settings.steps),
        num_training_steps=settings.steps,
    )
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            max_grad_norm=settings.clip,
            bf16=settings.bf16,
            use_cpu=not torch.cuda.is_available(),
            seed=settings.seed,
            logging_steps=max(1, settings.steps // 20),
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            disable_tqdm=not settings.progress,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            data_collator=Collate(pad_token_id),
            optimizers=(optimizer, scheduler),
        )
        try:
            trainer.train()
        finally:
            model.detach()
    return model.bundle(base_fingerprint=base_fingerprint, dtype=torch.bfloat16)
