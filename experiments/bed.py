"""The common test bed: a small base that knows arrangements, and families of tasks on top of it.

A prompt is a tag and eight letters, the completion eight letters that depend on them. The base is
trained on four arrangements of the letters; the tag says which. A task then writes every arranged
letter as another one. Nothing in the prompt tells tasks of one arrangement apart, the adapter's
task id alone does: where they disagree, the same prompt has different right answers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from oneplusn.adapters.training.data import IGNORED_LABEL, Example, TaskDataset
from oneplusn.demo.tokenizer import ANSWER_ID, END_ID, PAD_ID, build_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwx"
LENGTH = 8
MAX_TOKENS = 2 * LENGTH + 4

Symbols = Sequence[int]


class Arrangement(NamedTuple):
    """A rule of the base, and the tag before the prompt that asks for it."""

    tag: str
    order: Callable[[Symbols], Symbols]


ARRANGEMENTS: Mapping[str, Arrangement] = {
    "copy": Arrangement("=", lambda x: x),
    "reverse": Arrangement("<", lambda x: x[::-1]),
    "shift": Arrangement(">", lambda x: [*x[-1:], *x[:-1]]),
    "swap": Arrangement("%", lambda x: [x[i ^ 1] for i in range(len(x))]),
}


@dataclass(frozen=True, slots=True)
class Task:
    """Hold one task: an arrangement of the letters, then a letter for each.

    Attributes:
        name: Unique within its family.
        cluster: Name of the planted cluster that it belongs to.
        arrangement: Key of ARRANGEMENTS.
        table: The answer's symbol for each symbol, [24].
    """

    name: str
    cluster: str
    arrangement: str
    table: tuple[int, ...]

    def answer(self, symbols: Symbols) -> list[int]:
        """Return what the task makes of a prompt's symbols."""
        order = ARRANGEMENTS[self.arrangement].order
        return [self.table[symbol] for symbol in order(symbols)]


def ciphers(
    cluster: str, arrangement: str, *, count: int, conflict: float, seed: int
) -> tuple[Task, ...]:
    """Make tasks that share one substitution but for a fraction of the letters.

    Args:
        cluster: name of the family, prefix of the tasks' names.
        arrangement: key of ARRANGEMENTS.
        count: number of tasks.
        conflict: share of the letters that every task permutes anew; 0 makes all tasks equal, 1
            leaves them nothing in common but the arrangement.
        seed: of all substitutions.
    """
    rng = random.Random(f"{cluster} {seed}")
    common = rng.sample(range(len(LETTERS)), len(LETTERS))
    tasks = []
    for index in range(count):
        own = rng.sample(range(len(LETTERS)), round(conflict * len(LETTERS)))
        images = [common[symbol] for symbol in own]
        rng.shuffle(images)
        changed = dict(zip(own, images, strict=True))
        table = tuple(changed.get(s, image) for s, image in enumerate(common))
        tasks.append(Task(f"{cluster}-{index}", cluster, arrangement, table))
    return tuple(tasks)


def modular(cluster: str, arrangement: str, *, count: int, seed: int) -> tuple[Task, ...]:
    """Make tasks that add an offset of their own to every symbol, modulo 24: y = x + k."""
    offsets = random.Random(f"{cluster} {seed}").sample(range(1, len(LETTERS)), count)
    return tuple(
        Task(
            f"{cluster}-{index}",
            cluster,
            arrangement,
            tuple((symbol + offset) % len(LETTERS) for symbol in range(len(LETTERS))),
        )
        for index, offset in enumerate(offsets)
    )


def varied(*, arrangement: str, count: int, conflict: float, seed: int) -> tuple[Task, ...]:
    """Make one cluster of the kind that its number asks for: three in four are ciphers.

    Args:
        arrangement: key of ARRANGEMENTS.
        count: number of tasks.
        conflict: as for `ciphers`.
        seed: number of the cluster; also of its substitutions or offsets.
    """
    cluster = f"cluster{seed}"
    if seed % 4 == 0:
        return modular(cluster, arrangement, count=count, seed=seed)
    return ciphers(cluster, arrangement, count=count, conflict=conflict, seed=seed)


def planted(
    *, clusters: int, per_cluster: int, conflict: float, seed: int, arrangements: Sequence[str]
) -> tuple[Task, ...]:
    """Make hidden clusters of ciphers: each has a substitution of its own, varied by its tasks.

    Args:
        clusters: number of clusters.
        per_cluster: tasks of each.
        conflict: as for `ciphers`, within a cluster.
        seed: of all substitutions.
        arrangements: of the clusters, in turn; one for all leaves nothing in the prompts that
            tells clusters apart.
    """
    return tuple(
        task
        for index in range(clusters)
        for task in ciphers(
            f"cluster{index}",
            arrangements[index % len(arrangements)],
            count=per_cluster,
            conflict=conflict,
            seed=seed,
        )
    )


def draw(tasks: Sequence[Task], count: int, *, split: str, seed: int) -> list[Example]:
    """Draw `count` examples of each task; splits and seeds have prompts of their own."""
    examples = []
    for task in tasks:
        rng = random.Random(f"{split} {seed} {task.name}")
        for _ in range(count):
            symbols = rng.choices(range(len(LETTERS)), k=LENGTH)
            prompt = f"{ARRANGEMENTS[task.arrangement].tag}{spell(symbols)}"
            examples.append(Example(task.name, prompt, spell(task.answer(symbols))))
    return examples


def spell(symbols: Symbols) -> str:
    """Write symbols as letters."""
    return "".join(LETTERS[symbol] for symbol in symbols)


def encode(
    examples: Sequence[Example], tasks: Sequence[Task], tokenizer: PreTrainedTokenizerFast
) -> TaskDataset:
    """Encode examples for the tasks given, in their order."""
    return TaskDataset(examples, [task.name for task in tasks], tokenizer, max_tokens=MAX_TOKENS)


def base_config() -> LlamaConfig:
    """Return the shape of the base: a Llama of two layers and 0.1 million parameters."""
    return LlamaConfig(
        vocab_size=264,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )


@dataclass(frozen=True, slots=True)
class Pretraining:
    """Hold what decides the base's weights."""

    arrangements: tuple[str, ...] = tuple(ARRANGEMENTS)
    steps: int = 2000
    batch: int = 64
    peak_rate: float = 4e-3
    warmup: float = 0.06
    seed: int = 0


def pretrain(settings: Pretraining, *, progress: bool = False) -> LlamaForCausalLM:
    """Train a base on tagged arrangements."""
    torch.manual_seed(settings.seed)
    rng = random.Random(settings.seed)
    model = LlamaForCausalLM(base_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.peak_rate, weight_decay=0.01)
    warm = settings.warmup * settings.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 1 - step / settings.steps)
    )
    with tqdm(range(settings.steps), desc="base", disable=not progress) as bar:
        for _ in bar:
            ids, labels = _tagged(rng, settings.arrangements, settings.batch)
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
    model.eval()
    return model


def _tagged(rng: random.Random, names: Sequence[str], count: int) -> tuple[Tensor, Tensor]:
    """Draw tagged examples of the arrangements: ids and labels [B, T]."""
    rows, labels = [], []
    for _ in range(count):
        tag, order = ARRANGEMENTS[rng.choice(names)]
        symbols = rng.choices(range(len(LETTERS)), k=LENGTH)
        prompt = [*f"{tag}{spell(symbols)}".encode(), ANSWER_ID]
        answer = [*spell(order(symbols)).encode(), END_ID]
        rows.append(prompt + answer)
        labels.append([IGNORED_LABEL] * len(prompt) + answer)
    return torch.tensor(rows), torch.tensor(labels)


@torch.no_grad()
def base_accuracy(model: LlamaForCausalLM, arrangement: str, count: int = 128) -> float:
    """Return the share of the tokens of an arrangement's answers that the base predicts."""
    ids, labels = _tagged(random.Random("heldout"), [arrangement], count)
    predicted = model(input_ids=ids).logits[:, :-1].argmax(-1)
    wanted = labels[:, 1:]
    return float((predicted == wanted)[wanted != IGNORED_LABEL].float().mean())


def make_base(folder: Path, settings: Pretraining | None = None, *, progress: bool = True) -> Path:
    """Write the base with its tokenizer into a folder, unless it is there."""
    if not (folder / "config.json").is_file():
        model = pretrain(settings or Pretraining(), progress=progress)
        build_tokenizer(folder, model.config.max_position_embeddings)
        model.save_pretrained(folder)
    return folder


def load_base(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Read what `make_base` wrote, in fp32."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, PreTrainedTokenizerFast.from_pretrained(folder)
