"""The Python interface: prompts and tasks in, answers out, without a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self, TypedDict, Unpack, cast

from oneplusn.adapters.files import read_adapter
from oneplusn.adapters.refs import TaskRef
from oneplusn.errors import (
    AdapterExists,
    AdapterIncompatible,
    InvalidRequest,
    ServingError,
    UnknownTask,
)
from oneplusn.server.engine.engine import Engine as Core
from oneplusn.server.engine.engine import EngineConfig
from oneplusn.server.engine.memory import MemoryPlan
from oneplusn.server.engine.model import DEMO, demo_data, load_model
from oneplusn.server.messages import FinishReason, Sampling, Submit, TokenOutput
from oneplusn.server.text import TextStream, Tokenizer

DEFAULT_MAX_TOKENS = 128

Prompt = str | Sequence[int]
Task = str | Mapping[str, float] | None


class Limits(TypedDict, total=False):
    """Fields of `EngineConfig`."""

    kv_memory: int | None
    adapter_memory: int | None
    max_model_len: int | None
    max_num_seqs: int
    token_budget: int | None
    block_size: int
    max_tasks: int
    max_adapters: int | None


class SamplingOptions(TypedDict, total=False):
    """Fields of `Sampling`."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    min_tokens: int
    logprobs: int | None
    logit_bias: dict[int, float]


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one prompt.

    Attributes:
        text: Decoded, without special tokens and stop strings.
        token_ids: All tokens generated, the one that ended the answer included.
        task: What was asked for: a task, a blend, or None for the bare base.
        adapter: Names of the adapters that served it, joined by commas; None for the base.
        finish_reason: "stop" or "length".
        logprobs: Log-probability of each token, if asked for.
        top_logprobs: Per token the likeliest tokens with theirs, if asked for.
        cached_tokens: Prompt tokens whose keys and values came from the prefix cache.
    """

    text: str
    token_ids: list[int]
    task: Task
    adapter: str | None
    finish_reason: FinishReason
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None
    cached_tokens: int = 0


@dataclass(slots=True)
class _Answer:
    """An answer while it is made."""

    task: Task
    stream: TextStream
    outputs: list[TokenOutput] = field(default_factory=list)
    finish: FinishReason | None = None


class Engine:
    """A base model with adapters, for use from Python; synchronous, and for one thread.

    Example:
        with oneplusn.Engine("demo") as engine:
            answers = engine.generate(["4 82 9 13", "4 82 9 13"], tasks=["sort_numbers", None])

    Attributes:
        core: The engine itself.
        tokenizer: The model's.
    """

    def __init__(
        self,
        model: str | Path = DEMO,
        *,
        adapters: Mapping[str, str | Path] | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        quantize: str = "none",
        device: str = "auto",
        threads: int | None = None,
        **limits: Unpack[Limits],
    ) -> None:
        """Load a base model, and adapters on top of it.

        Args:
            model: "demo", a folder, or the id of a model on the hub.
            adapters: Folders by the adapter's name; a plain LoRA is one task of that name. The
                demo brings its own.
            revision: Branch, tag or commit, for a hub id.
            dtype: As `load_model` takes it.
            quantize: As `load_model` takes it.
            device: As `load_model` takes it.
            threads: As `load_model` takes it.
            **limits: Fields of `EngineConfig`.

        Raises:
            StartupError: The model is missing or refused, or does not fit.
            AdapterError: An adapter cannot be served on this model.
        """
        name = str(model)
        config = EngineConfig(**limits)
        loaded = load_model(
            name,
            revision=revision,
            dtype=dtype,
            quantize=quantize,
            device=device,
            threads=threads,
        )
        self.tokenizer = Tokenizer(loaded.folder)
        self.core = Core(loaded, config)
        self._tasks: dict[str, tuple[TaskRef, str]] = {}
        packaged = _packaged_adapters() if name == DEMO else {}
        for adapter, folder in {**packaged, **(adapters or {})}.items():
            self.load_adapter(adapter, folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def tasks(self) -> Mapping[str, str]:
        """The name of the adapter of every task."""
        return {task: adapter for task, (_, adapter) in self._tasks.items()}

    @property
    def memory(self) -> MemoryPlan:
        """How memory is divided; prints as a table."""
        return self.core.memory

    def load_adapter(self, name: str, folder: str | Path) -> tuple[str, ...]:
        """Add an adapter; return its tasks.

        Raises:
            AdapterExists: One of its tasks belongs to another adapter already.
            AdapterError: It cannot be read, or not be served on this model.
        """
        bundle = read_adapter(Path(folder), name=name)
        taken = [task for task in bundle.tasks if task in self._tasks]
        if taken:
            msg = f"task {taken[0]!r} of {name!r} belongs to {self.tasks[taken[0]]!r} already"
            raise AdapterExists(msg)
        known = self.core.model.fingerprint
        if bundle.base is not None and known and bundle.base != known:
            msg = f"{name!r} was trained on {bundle.base} and this base is {known}; serve that base"
            raise AdapterIncompatible(msg, code="base_mismatch")
        # Pinned, as nothing here could bring it back when the pool makes room for another.
        self.core.load(bundle, pin=True)
        for task in bundle.tasks:
            self._tasks[task] = (TaskRef(bundle.digest, task), name)
        return bundle.tasks

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        tasks: Task | Sequence[Task] = None,
        *,
        stop: Sequence[str] = (),
        **sampling: Unpack[SamplingOptions],
    ) -> list[Completion]:
        """Answer all prompts together, in mixed batches.

        Args:
            prompts: One text or several; a list of token ids in place of a text is taken as it is.
            tasks: What serves each prompt, or all of them: a task's name, a blend as a mapping of
                tasks to weights, or None for the bare base.
            stop: Texts that end an answer.
            **sampling: Fields of `Sampling`; greedy and 128 tokens where nothing is said.

        Returns:
            The answers, in the order of the prompts.

        Raises:
            UnknownTask: No adapter has the task.
            InvalidRequest: A parameter is out of range, or the numbers of prompts and tasks differ.
            PromptTooLong: A prompt leaves no room for an answer; then none is answered.
            ServingError: The model failed.
        """
        options = Sampling(**({"max_tokens": DEFAULT_MAX_TOKENS} | sampling))
        answers: dict[str, _Answer] = {}
        try:
            for index, (prompt, task) in enumerate(_pairs(prompts, tasks)):
                tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
                refs = self._refs(task)
                answers[str(index)] = _Answer(task, TextStream(self.tokenizer, stop))
                self.core.submit(Submit(str(index), tokens, refs, options))
            while self.core.has_work:
                for output in self.core.step().outputs:
                    self._take(answers[output.id], output)
        finally:
            for request_id, answer in answers.items():
                if answer.finish is None:
                    self.core.cancel(request_id)
        return [self._completion(answer) for answer in answers.values()]

    def close(self) -> None:
        """Give the memory back; the engine cannot be used afterwards."""
        self.core.close()

    def _refs(self, task: Task) -> tuple[TaskRef, ...]:
        """Say which experts a task or a blend stands for.

        Raises:
            UnknownTask: No adapter has it.
        """
        weights = _weights(task)
        unknown = [name for name in weights if name not in self._tasks]
        if unknown:
            known = ", ".join(self._tasks) or "none"
            msg = f"no task {unknown[0]!r}; the tasks are: {known}"
            raise UnknownTask(msg, param="tasks")
        refs = {name: self._tasks[name][0] for name in weights}
        return tuple(
            TaskRef(refs[name].digest, refs[name].task, weight) for name, weight in weights.items()
        )

    def _take(self, answer: _Answer, output: TokenOutput) -> None:
        """Add a token to an answer, and end the request when a stop string is complete.

        Raises:
            ServingError: The model failed.
        """
        if output.finish == "error":
            raise ServingError(output.error or "the model failed")
        answer.outputs.append(output)
        answer.finish = output.finish
        assert output.token is not None
        if output.finish != "stop":
            answer.stream.push(output.token)
        if answer.finish is None and answer.stream.finished:
            self.core.cancel(output.id)
            answer.finish = "stop"

    def _completion(self, answer: _Answer) -> Completion:
        answer.stream.flush()
        assert answer.finish is not None
        outputs = answer.outputs
        names = dict.fromkeys(self._tasks[task][1] for task in _weights(answer.task))
        logprobs = [output.logprob for output in outputs if output.logprob is not None]
        top = [output.top for output in outputs if output.top is not None]
        return Completion(
            text=answer.stream.text,
            token_ids=[output.token for output in outputs if output.token is not None],
            task=answer.task,
            adapter=",".join(names) or None,
            finish_reason="stop" if answer.stream.finished else answer.finish,
            logprobs=logprobs or None,
            top_logprobs=top or None,
            cached_tokens=outputs[0].cached_tokens,
        )


def _weights(task: Task) -> Mapping[str, float]:
    """Write a task, a blend or the base as a blend."""
    if task is None:
        return {}
    return {task: 1.0} if isinstance(task, str) else task


def _pairs(
    prompts: Prompt | Sequence[Prompt], tasks: Task | Sequence[Task]
) -> list[tuple[Prompt, Task]]:
    """Match prompts with tasks.

    Raises:
        InvalidRequest: There are as many of neither.
    """
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        prompts = cast(Sequence[Prompt], [prompts])
    several = cast(Sequence[Prompt], prompts)
    if tasks is None or isinstance(tasks, str | Mapping):
        tasks = [tasks] * len(several)
    if len(tasks) != len(several):
        msg = (
            f"{len(several)} prompts and {len(tasks)} tasks; give one task for each, or one for all"
        )
        raise InvalidRequest(msg, param="tasks")
    return list(zip(several, tasks, strict=True))


def _packaged_adapters() -> dict[str, Path]:
    """List the demo's adapters by name."""
    folder = demo_data() / "adapters"
    return {path.name: path for path in sorted(folder.iterdir())} if folder.is_dir() else {}
