"""A tiny base with a byte tokenizer, two tasks on the same inputs, and configurations of both."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from oneplusn.adapters.training.config import TrainConfig, make_config
from oneplusn.demo.tokenizer import END_ID, PAD_ID, build_tokenizer
from tiny_models import tiny_model

TASKS = ("keep", "turn")
WORDS = ("ab", "cd", "ae", "fb", "gh", "bc", "de", "fa", "hb", "ca")
CONTEXT = 64


def save_base(folder: Path) -> Path:
    """Write the base and its tokenizer."""
    tiny_model(
        "llama",
        vocab_size=264,
        max_position_embeddings=CONTEXT,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    ).save_pretrained(folder)
    build_tokenizer(folder, CONTEXT)
    return folder


def row(task: str, word: str) -> dict[str, str]:
    return {"task": task, "prompt": word, "completion": word if task == "keep" else word[::-1]}


def rows(words: Iterable[str] = WORDS, tasks: Iterable[str] = TASKS) -> list[dict[str, str]]:
    return [row(task, word) for word in words for task in tasks]


def write_rows(path: Path, content: Iterable[Mapping[str, object]]) -> Path:
    path.write_text("".join(f"{json.dumps(each)}\n" for each in content))
    return path


def content(folder: Path, **changes: object) -> dict[str, object]:
    """What a configuration file says; `training` and `method` are changed key by key."""
    training = {
        "steps": 12,
        "batch_size": 4,
        "learning_rate": 2e-2,
        "checkpoint_every": 4,
        "bf16": False,
        "progress": False,
    }
    method = {"name": "cgc-lora", "num_common": 1, "num_own": 1, "rank": 2}
    return {
        "name": "tiny",
        "base": str(folder / "base"),
        "output": str(folder / "runs"),
        "data": {
            "train": [{"path": str(folder / "train.jsonl")}],
            "validation": [{"path": str(folder / "validation.jsonl")}],
        },
        "bundle_dtype": "float32",
        **changes,
        "method": changes.get("method", method),
        "training": training | dict(changes.get("training", {})),
    }


def config(folder: Path, **changes: object) -> TrainConfig:
    return make_config(content(folder, **changes))


def killed(work: Callable[[], object]) -> int:
    """Do something in a process of its own that is expected to be killed; return the signal."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])
