"""Examples tagged with a task, as padded batches of one mixed sequence list.

A batch holds sequences of any tasks; the task of each is one integer beside it. The loss is on the
completion only, the end token included.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from oneplusn.errors import InvalidRequest

IGNORED_LABEL = -100


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and the completion that the task should give."""

    task: str
    prompt: str
    completion: str


class Encoded(TypedDict):
    """One example as token ids; `labels` is IGNORED_LABEL over the prompt."""

    input_ids: list[int]
    labels: list[int]
    task_ids: int


def read_jsonl(path: Path) -> list[Example]:
    """Read examples, one JSON object a line: {"task", "prompt", "completion"}.

    Raises:
        InvalidRequest: a line that is not such an object, with its number.
    """
    examples = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
                example = Example(fields["task"], fields["prompt"], fields["completion"])
            except (ValueError, TypeError, KeyError) as error:
                message = (
                    f"{path.name}, line {number}: {error!r}; "
                    'each line is {"task": ..., "prompt": ..., "completion": ...}'
                )
                raise InvalidRequest(message) from error
            examples.append(example)
    return examples


class TaskDataset(Dataset[Encoded]):
    """Examples of several tasks, encoded once."""

    def __init__(
        self,
        examples: Sequence[Example],
        tasks: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int,
    ) -> None:
        """Encode the examples.

        Raises:
            InvalidRequest: an example of a task that is not in `tasks`, or longer than max_tokens.
        """
        task_ids = {task: index for index, task in enumerate(tasks)}
        end = tokenizer.eos_token_id
        self.rows: list[Encoded] = []
        for example in examples:
            if example.task not in task_ids:
                message = f"task {example.task!r} is not one of the cluster's: {', '.join(tasks)}"
                raise InvalidRequest(message)
            prompt = tokenizer(example.prompt)["input_ids"]
            completion = tokenizer(example.completion, add_special_tokens=False)["input_ids"]
            tokens = [*prompt, *completion, end]
            if len(tokens) > max_tokens:
                message = (
                    f"an example of task {example.task!r} has {len(tokens)} tokens, "
                    f"the limit is {max_tokens}: shorten it or raise the limit"
                )
                raise InvalidRequest(message)
            labels = [IGNORED_LABEL] * len(prompt) + tokens[len(prompt) :]
            self.rows.append(
                {"input_ids": tokens, "labels": labels, "task_ids": task_ids[example.task]}
            )

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Encoded:
        """Return one encoded example."""
        return self.rows[index]


@dataclass(frozen=True, slots=True)
class Collate:
    """Pad a list of encoded examples on the right."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """Return input_ids, attention_mask, labels [B, T] and task_ids [B], int64."""
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(values: list[int], filler: int) -> list[int]:
            return values + [filler] * (longest - len(values))

        return {
            "input_ids": torch.tensor(
                [padded(row["input_ids"], self.pad_token_id) for row in rows]
            ),
            "attention_mask": torch.tensor(
                [padded([1] * len(row["input_ids"]), 0) for row in rows]
            ),
            "labels": torch.tensor([padded(row["labels"], IGNORED_LABEL) for row in rows]),
            "task_ids": torch.tensor([row["task_ids"] for row in rows]),
        }
