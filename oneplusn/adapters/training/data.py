"""Examples tagged with a task, as padded batches of one mixed sequence list.

A batch holds sequences of any tasks; the task of each is one integer beside it. The loss is on the
completion only, the end token included.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, TypedDict

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from oneplusn.adapters.checks import shown
from oneplusn.errors import InvalidRequest

IGNORED_LABEL = -100

Message = Mapping[str, Any]
FORM = '{"task": ..., "prompt" or "messages": ..., "completion": ...}'


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and the completion that the task should give.

    Attributes:
        task: Name of the task.
        prompt: Text, or the messages of a conversation that the tokenizer's chat template renders.
        completion: What is to be learned.
        origin: Where it was read, as "train.jsonl, line 3"; for messages about it.
    """

    task: str
    prompt: str | Sequence[Message]
    completion: str
    origin: str = field(default="", compare=False)


class Encoded(TypedDict):
    """One example as token ids; `labels` is IGNORED_LABEL over the prompt."""

    input_ids: list[int]
    labels: list[int]
    task_ids: int


class PackedRow(TypedDict):
    """Several examples one after the other; all lists have one entry a token."""

    input_ids: list[int]
    labels: list[int]
    task_ids: list[int]
    position_ids: list[int]


def read_jsonl(path: Path) -> list[Example]:
    """Read examples, one JSON object a line: {"task", "prompt" or "messages", "completion"}.

    Raises:
        InvalidRequest: a line that is not such an object, with its number.
    """
    examples = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                origin = f"{path.name}, line {number}"
                try:
                    fields = json.loads(line)
                except ValueError as error:
                    message = f"{origin}: {error}; each line is {FORM}"
                    raise InvalidRequest(message) from error
                examples.append(make_example(fields, origin))
    return examples


def make_example(fields: object, origin: str) -> Example:
    """Make an example of one row of data.

    Raises:
        InvalidRequest: it lacks a field, has one of another type, or has a prompt and messages.
    """
    if not isinstance(fields, Mapping):
        raise InvalidRequest(f"{origin}: {shown(fields)} is no object; each line is {FORM}")
    names = ("task", "prompt", "messages", "completion")
    found: dict[str, Any] = {name: fields.get(name) for name in names}
    if (found["prompt"] is None) == (found["messages"] is None):
        message = f'{origin}: expected either "prompt" or "messages"; each line is {FORM}'
        raise InvalidRequest(message)
    for name in ("task", "completion"):
        if not isinstance(found[name], str):
            message = f"{origin}: {name} is {shown(found[name])}, not text; each line is {FORM}"
            raise InvalidRequest(message)
    prompt = found["prompt"] if found["messages"] is None else found["messages"]
    if not isinstance(prompt, str) and not _are_messages(prompt):
        message = (
            f'{origin}: the prompt is {shown(prompt)}; it is text, or under "messages" a list of'
            ' {"role": ..., "content": ...}'
        )
        raise InvalidRequest(message)
    return Example(found["task"], prompt, found["completion"], origin)


def _are_messages(value: object) -> bool:
    return (
        isinstance(value, Sequence)
        and bool(value)
        and all(isinstance(message, Mapping) and "role" in message for message in value)
    )


class TaskDataset(Dataset[Encoded]):
    """Examples of several tasks, encoded once.

    Attributes:
        tasks: Names; `task_ids` index them.
        task_ids: Task of each example.
    """

    def __init__(
        self,
        examples: Iterable[Example],
        tasks: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int,
    ) -> None:
        """Encode the examples.

        Raises:
            InvalidRequest: an example of a task that is not in `tasks`, longer than max_tokens, or
                without a token of prompt or completion.
        """
        self.tasks = tuple(tasks)
        self.task_ids: list[int] = []
        self._tokens = array("i")
        self._prompt_lengths: list[int] = []
        lengths: list[int] = []
        indices = {task: index for index, task in enumerate(tasks)}
        for example in examples:
            if example.task not in indices:
                known = ", ".join(tasks)
                message = f"task {shown(example.task)} is not one of the cluster's: {known}"
                raise InvalidRequest(_about(example, message))
            prompt, completion = encode(example, tokenizer)
            length = len(prompt) + len(completion)
            if length > max_tokens:
                message = (
                    f"an example of task {example.task!r} has {length} tokens, {len(prompt)} of"
                    f" them its prompt, the limit is {max_tokens}: shorten it or raise the limit"
                )
                raise InvalidRequest(_about(example, message))
            self._tokens.extend(prompt)
            self._tokens.extend(completion)
            self._prompt_lengths.append(len(prompt))
            self.task_ids.append(indices[example.task])
            lengths.append(length)
        self._bounds = list(accumulate(lengths, initial=0))

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.task_ids)

    def __getitem__(self, index: int) -> Encoded:
        """Return one encoded example."""
        tokens = self._tokens[self._bounds[index] : self._bounds[index + 1]].tolist()
        prompt = self._prompt_lengths[index]
        return {
            "input_ids": tokens,
            "labels": [IGNORED_LABEL] * prompt + tokens[prompt:],
            "task_ids": self.task_ids[index],
        }

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [stop - start for start, stop in zip(self._bounds, self._bounds[1:], strict=False)]

    @property
    def sizes(self) -> list[int]:
        """Examples of each task."""
        sizes = [0] * len(self.tasks)
        for task in self.task_ids:
            sizes[task] += 1
        return sizes

    @property
    def digest(self) -> str:
        """Identity of what is learned from, for a resumed run to check that it is the same."""
        state = hashlib.sha256(json.dumps(self.tasks).encode())
        for numbers in (self._tokens, self._prompt_lengths, self._bounds, self.task_ids):
            state.update(array("q", numbers).tobytes())
        return state.hexdigest()


def encode(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the tokens of prompt and completion, each at least one; the completion ends.

    Raises:
        InvalidRequest: either has no token, or the chat template rejects the messages.
    """
    if isinstance(example.prompt, str):
        prompt: list[int] = tokenizer(example.prompt)["input_ids"]
        completion, ends = example.completion, {tokenizer.eos_token_id}
    else:
        opening, completion = _render(example, example.prompt, tokenizer)
        prompt = tokenizer(opening, add_special_tokens=False)["input_ids"]
        ends = set(tokenizer.all_special_ids)
    answer: list[int] = tokenizer(completion, add_special_tokens=False)["input_ids"]
    for name, tokens in (("prompt", prompt), ("completion", answer)):
        if not tokens:
            message = f"the {name} of an example of task {example.task!r} has no token; remove it"
            raise InvalidRequest(_about(example, message))
    return prompt, answer if answer[-1] in ends else [*answer, _end(tokenizer)]


def _render(
    example: Example, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str]:
    """Render a conversation; return what the server would send, and the answer as text.

    The answer is what the template makes of it, so that it ends as the model's own answers do;
    where the template writes the conversation differently once it is answered, the bare text.
    """
    if tokenizer.chat_template is None:
        message = 'the base\'s tokenizer has no chat template; give "prompt" in place of messages'
        raise InvalidRequest(_about(example, message))
    asked = [dict(message) for message in messages]
    answered = [*asked, {"role": "assistant", "content": example.completion}]
    try:
        opening = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(answered, tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        message = f"the chat template rejects the messages: {error}"
        raise InvalidRequest(_about(example, message)) from error
    assert isinstance(opening, str)
    assert isinstance(whole, str)
    if not example.completion or not whole.startswith(opening):
        return opening, example.completion
    return opening, whole[len(opening) :].rstrip("\n")


def _end(tokenizer: PreTrainedTokenizerBase) -> int:
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        message = "the base's tokenizer has no end token; set eos_token in tokenizer_config.json"
        raise InvalidRequest(message)
    return end


def _about(example: Example, message: str) -> str:
    return f"{example.origin}: {message}" if example.origin else message


@dataclass(frozen=True, slots=True)
class Collate:
    """Pad a list of rows, examples or packed ones, on the right."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Encoded] | Sequence[PackedRow]) -> dict[str, Tensor]:
        """Return a batch, all int64.

        input_ids and labels [B, T] always; examples have attention_mask [B, T] and task_ids [B];
        packed rows have task_ids and position_ids [B, T], in which padding is one more sequence,
        and no attention_mask: a base finds the bounds of sequences in position_ids only without.
        """
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, filler: int) -> Tensor:
            # The name is one of both dictionaries' keys, which a type cannot say of a variable.
            lists: list[list[int]] = [row[name] for row in rows]  # type: ignore[literal-required]
            return torch.tensor([found + [filler] * (longest - len(found)) for found in lists])

        batch = {
            "input_ids": padded("input_ids", self.pad_token_id),
            "labels": padded("labels", IGNORED_LABEL),
        }
        lengths = torch.tensor([len(row["input_ids"]) for row in rows]).unsqueeze(1)
        places = torch.arange(longest).expand(len(rows), longest)
        if "position_ids" in rows[0]:
            positions = torch.where(places < lengths, padded("position_ids", 0), places - lengths)
            return batch | {"task_ids": padded("task_ids", 0), "position_ids": positions}
        task_ids = torch.tensor([row["task_ids"] for row in rows])
        return batch | {"attention_mask": (places < lengths).long(), "task_ids": task_ids}
