"""Checkpoints of a training: which of them are whole, and what they say.

A checkpoint is written file by file, its state last, so a run that is killed while it writes one
leaves a folder that must not be resumed from.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

STATE_FILE = "trainer_state.json"
WEIGHTS_FILE = "model.safetensors"
NEEDED = (WEIGHTS_FILE, "optimizer.pt", "scheduler.pt", "training_args.bin")

_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One whole checkpoint.

    Attributes:
        folder: where it is.
        state: what the Trainer wrote of itself.
    """

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimiser steps that were done."""
        return int(self.state["global_step"])

    @property
    def history(self) -> list[dict[str, float]]:
        """What was logged up to it."""
        history: list[dict[str, float]] = self.state["log_history"]
        return history

    def weights(self) -> dict[str, torch.Tensor]:
        """Read the trained parameters."""
        return load_file(self.folder / WEIGHTS_FILE)


def whole_checkpoints(folder: Path, *, processes: int = 1) -> list[Checkpoint]:
    """List the whole checkpoints of a run, oldest first.

    Args:
        folder: of the run's checkpoints; may be missing.
        processes: of the run, each of which saves the state of its random numbers.
    """
    found = []
    for path in folder.glob("checkpoint-*"):
        match = _NAME.fullmatch(path.name)
        if match and all((path / name).is_file() for name in NEEDED):
            state = _state(path / STATE_FILE)
            numbers = len(list(path.glob("rng_state*.pth")))
            if state.get("global_step") == int(match[1]) and numbers >= processes:
                found.append(Checkpoint(path, state))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def best_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the checkpoint of the best validation, the last one where nothing was validated."""
    found = whole_checkpoints(folder)
    if not found:
        return None
    best = found[-1].state.get("best_global_step")
    return next((each for each in found if each.step == best), found[-1])


def _state(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state
