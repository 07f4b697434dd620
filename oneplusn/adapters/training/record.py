"""What one training did: for the report, and for whoever wants to do it again."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from oneplusn.adapters.methods.budget import Budget

LIBRARIES = ("oneplusn", "torch", "transformers", "accelerate")


@dataclass(frozen=True)
class TrainingRecord:
    """One training.

    Attributes:
        method: name of the method.
        tasks: in the order of the gate rows.
        parameters: what was trained.
        settings: the whole configuration, the method's settings as they were after matching.
        history: what the Trainer logged: step, loss, eval_loss, eval_<task>_loss and so on.
        metrics: task -> loss, base_loss, exact_match, base_exact_match on the validation data;
            empty without any.
        hardware: what it ran on.
        versions: library -> version.
        seconds: wall-clock time of this process; of the last part of a resumed run.
        seed: of everything random.
    """

    method: str
    tasks: tuple[str, ...]
    parameters: Budget
    settings: Mapping[str, object]
    history: list[dict[str, float]]
    metrics: Mapping[str, Mapping[str, float]]
    hardware: str
    versions: Mapping[str, str]
    seconds: float
    seed: int

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        content = {**asdict(self), "parameters": self.parameters._asdict()}
        path.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> TrainingRecord:
        """Read what `save` wrote."""
        content = json.loads(path.read_text(encoding="utf-8"))
        parameters = Budget(**content["parameters"])
        fields = {**content, "parameters": parameters, "tasks": tuple(content["tasks"])}
        return cls(**fields)


def hardware() -> str:
    """Say what computes: the GPUs of this machine, or its processor and the threads used."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{_processor()}, threads: {torch.get_num_threads()}"


def _processor() -> str:
    """Return the processor's own name where Linux tells it, else that of its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def versions() -> dict[str, str]:
    """Return library -> version."""
    return {name: version(name) for name in LIBRARIES}
