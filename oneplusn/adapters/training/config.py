"""Every setting of `oneplusn train`: what the YAML file may say, with the defaults.

What a key means is written once, beside its default: the checks, the commented example of
`--print-config` and the table in docs/training.md come from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from oneplusn.adapters.training.config_errors import explain
from oneplusn.adapters.training.config_file import read_yaml
from oneplusn.errors import InvalidRequest

STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)

HARMLESS = frozenset({"output", "tensorboard", "training.progress", "training.keep"})
"""Keys that may change between a run and its continuation; the rest decide the result."""


class Section(BaseModel):
    """A mapping of the file: no unknown keys, no conversions between types."""

    model_config = STRICT


Int = Annotated[int, Strict()]
Float = Annotated[float, Strict()]
Bool = Annotated[bool, Strict()]


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class TrainSettings:
    """How long, how fast, in what batches."""

    steps: Int = Field(default=500, gt=0, description="Optimiser steps.")
    epochs: Float | None = Field(
        default=None, gt=0, description="Passes over the data; when given, it replaces `steps`."
    )
    batch_size: Int = Field(
        default=32, gt=0, description="Rows of one forward pass on one device, of any tasks."
    )
    accumulate: Int = Field(default=1, gt=0, description="Forward passes of one optimiser step.")
    packing: Int | None = Field(
        default=None,
        gt=1,
        description=(
            "Tokens of a row into which several examples go; null is one example a row, padded."
        ),
    )
    temperature: Float = Field(
        default=1.0,
        ge=1,
        allow_inf_nan=True,
        description=(
            "How tasks of different sizes mix: 1 draws every example once an epoch, larger draws"
            " small tasks more often, .inf all tasks alike."
        ),
    )
    learning_rate: Float = Field(
        default=3e-3, gt=0, description="Peak rate of the experts A and B."
    )
    gate_learning_rate: Float = Field(
        default=2e-2,
        gt=0,
        description="Peak rate of the gates, which sum to about 1 and need a higher one.",
    )
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = Field(
        default="linear",
        description="How the rates fall from their peak: linear, cosine, or not at all.",
    )
    warmup: Float = Field(
        default=0.06,
        ge=0,
        lt=1,
        description="Share of the steps in which the rates rise; raise it when seeds collapse.",
    )
    weight_decay: Float = Field(
        default=0.0, ge=0, description="Weight decay of the experts; gates have none."
    )
    clip: Float = Field(
        default=0.5,
        gt=0,
        description="Largest norm of the gradient; without it single runs collapse.",
    )
    bf16: Bool = Field(
        default=True,
        description="Compute in bfloat16; what is trained stays in float32 either way.",
    )
    gradient_checkpointing: Bool = Field(
        default=False,
        description="Compute activations twice in place of keeping them: less memory.",
    )
    checkpoint_every: Int | None = Field(
        default=None,
        gt=0,
        description=(
            "Steps between two validations, each followed by a checkpoint; null is a tenth of all."
        ),
    )
    keep: Int = Field(
        default=2,
        ge=2,
        description="Checkpoints that are kept, the last and the best always among them.",
    )
    patience: Int | None = Field(
        default=None,
        gt=0,
        description="Stop after so many validations without a better one; null never does.",
    )
    seed: Int = Field(default=0, ge=0, description="Seed of everything random.")
    progress: Bool = Field(default=True, description="Show a bar with the loss.")


class Source(Section):
    """Where examples come from: a JSONL file, or a data set of Hugging Face."""

    path: Path | None = Field(
        default=None,
        strict=False,
        description=(
            'JSONL file, one {"task", "prompt" or "messages", "completion"} a line; relative to'
            " the working directory."
        ),
    )
    dataset: str | None = Field(
        default=None,
        description="In place of path: a name on the hub, or a folder, for `datasets`.",
    )
    config: str | None = Field(
        default=None, description="Configuration of the data set, if it has some."
    )
    split: str = Field(
        default="train", description="Split of the data set, `datasets`' slices included."
    )
    task: str | None = Field(
        default=None, description="Task of all rows, where they have no task column."
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="What its columns are called, as {prompt: question, completion: answer}.",
    )

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give either path or dataset")
        known = ("task", "prompt", "messages", "completion")
        unknown = [name for name in self.columns if name not in known]
        if unknown:
            raise ValueError(f"columns has {unknown[0]!r}; known: {', '.join(known)}")
        return self


class Data(Section):
    """What is learned from."""

    train: list[Source] = Field(
        min_length=1, description="Sources of examples.", examples=[[{"path": "train.jsonl"}]]
    )
    validation: list[Source] = Field(
        default_factory=list, description="Sources of examples that are never trained on."
    )
    validation_share: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of every task's training examples to validate on in place of sources.",
    )
    max_tokens: int | None = Field(
        default=None,
        gt=1,
        description="Longest example, prompt and completion; null is the context of the base.",
    )

    @model_validator(mode="after")
    def _one_validation(self) -> Data:
        if self.validation and self.validation_share:
            raise ValueError("give either validation or validation_share")
        return self


class MethodChoice(BaseModel):
    """The method by name; the other keys are its own settings, which it checks itself."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: str = Field(
        default="cgc-lora", description="Name of the method; its settings stand beside it."
    )

    @property
    def settings(self) -> dict[str, Any]:
        """The method's own settings."""
        return dict(self.model_extra or {})


class TrainConfig(Section):
    """One training run: one adapter, or one for each cluster of a clusters file."""

    name: str = Field(
        default="adapter",
        description="Name of the adapter, by default that of the file; clusters bring their own.",
    )
    output: Path = Field(
        default=Path("runs"),
        strict=False,
        description="Folder in which each adapter gets one of its name, for all that it is.",
    )
    base: str = Field(description="Base model: `demo`, a folder, or a hub id.", examples=["demo"])
    revision: str | None = Field(default=None, description="Commit, tag or branch of the hub id.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Type of the base's weights in memory."
    )
    attention: str | None = Field(
        default=None,
        description="Attention, as sdpa or flash_attention_2; null is the choice of transformers.",
    )
    tasks: list[str] | None = Field(
        default=None,
        description="Tasks in the order of the gate rows; null is all that the data has.",
    )
    clusters: Path | None = Field(
        default=None,
        strict=False,
        description="File of `oneplusn cluster`, in place of tasks: one adapter per cluster.",
    )
    method: MethodChoice = Field(
        default_factory=MethodChoice,
        description="How experts and gates are laid out; see docs/methods.md.",
    )
    match_params: int | str | None = Field(
        default=None,
        description=(
            "Change the method's ranks until it has as many parameters as this method at its"
            " defaults, or as this number."
        ),
    )
    targets: list[str] = Field(
        default_factory=lambda: ["all"],
        description="Linears that get experts, by the ends of their names; `all` is every one.",
    )
    data: Data = Field(description="What is learned from.")
    training: TrainSettings = Field(
        default_factory=TrainSettings, description="How long, how fast."
    )
    bundle_dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="Type of the factors in the bundle."
    )
    metadata: dict[str, str] = Field(
        default_factory=dict, description="Free text about the adapter, kept in the bundle."
    )
    tensorboard: bool = Field(default=False, description="Write curves for TensorBoard.")

    @model_validator(mode="before")
    @classmethod
    def _short_method(cls, value: object) -> object:
        if isinstance(value, Mapping) and isinstance(value.get("method"), str):
            return {**value, "method": {"name": value["method"]}}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.tasks is not None and self.clusters is not None:
            raise ValueError("give either tasks or clusters")
        validates = self.data.validation or self.data.validation_share
        if self.training.patience is not None and not validates:
            raise ValueError(
                "training.patience needs data.validation or data.validation_share to look at"
            )
        return self


class ClustersFile(Section):
    """What `oneplusn cluster` writes."""

    clusters: dict[str, list[str]] = Field(min_length=1, description="Name -> tasks.")


def load_config(path: Path, overrides: Mapping[str, object] | None = None) -> TrainConfig:
    """Read a configuration file.

    Args:
        path: of the YAML file.
        overrides: dotted key -> value, which win over the file, as {"training.steps": 100}.

    Raises:
        InvalidRequest: not YAML, an unknown key, or a value that is not allowed.
    """
    content = {"name": path.stem.lower(), **read_yaml(path)}
    for key, value in (overrides or {}).items():
        _put(content, key.split("."), value)
    return make_config(content, str(path))


def make_config(content: Mapping[str, object], origin: str = "configuration") -> TrainConfig:
    """Check what a file says.

    Raises:
        InvalidRequest: an unknown key, or a value that is not allowed.
    """
    try:
        return TrainConfig.model_validate(content)
    except ValidationError as error:
        raise InvalidRequest(explain(error, TrainConfig, origin)) from None


def read_clusters(path: Path) -> dict[str, list[str]]:
    """Read a clusters file: name of the cluster -> its tasks.

    Raises:
        InvalidRequest: not such a file, or a task in two clusters.
    """
    try:
        clusters = ClustersFile.model_validate(read_yaml(path)).clusters
    except ValidationError as error:
        raise InvalidRequest(explain(error, ClustersFile, str(path))) from None
    seen: dict[str, str] = {}
    for name, tasks in clusters.items():
        if not tasks:
            raise InvalidRequest(f"{path}: cluster {name!r} has no task; remove it")
        for task in tasks:
            if task in seen:
                raise InvalidRequest(
                    f"{path}: task {task!r} is in {seen[task]!r} and in {name!r}; keep one"
                )
            seen[task] = name
    return clusters


def changed(before: Mapping[str, object], now: Mapping[str, object], prefix: str = "") -> list[str]:
    """Return the dotted keys in which two configurations differ, the harmless ones left out."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new, name = before.get(key), now.get(key), f"{prefix}{key}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += changed(old, new, f"{name}.")
        elif old != new and name not in HARMLESS:
            found.append(name)
    return found


def _put(content: dict[str, Any], path: list[str], value: object) -> None:
    """Set a nested key; a method given by its short form keeps its name."""
    for part in path[:-1]:
        inner = content.get(part)
        if isinstance(inner, str):
            inner = {"name": inner}
        content[part] = inner = dict(inner or {})
        content = inner
    content[path[-1]] = value
