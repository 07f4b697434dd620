"""Train the demo's base model from nothing.

Most examples carry a short tag that names the task ("sort: 4 82 9 13"); the rest carry none,
and their answer is the input again. So the base learns the skills, but without a tag it only
repeats what it is given: an adapter has to bring the task.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from oneplusn.demo.tasks import CLUSTERS, TASKS, Task, draw_input, examples
from oneplusn.demo.tokenizer import ANSWER_ID, END_ID, PAD_ID, build_tokenizer

TAGS = {
    "reverse_words": "turn",
    "drop_vowels": "bare",
    "title_case": "title",
    "initials": "first",
    "sort_numbers": "sort",
    "largest": "max",
    "reverse_numbers": "back",
    "add_ends": "add",
    "city": "city",
    "surname": "sur",
    "iso_date": "iso",
    "csv": "csv",
}

WEIGHTS = {
    "reverse_words": 2.0,
    "drop_vowels": 2.0,
    "sort_numbers": 3.0,
    "add_ends": 8.0,
    "city": 0.4,
    "surname": 0.4,
    "iso_date": 0.6,
    "csv": 0.8,
}
"""How often a task is drawn, against 1 for the tasks that are not named: the slow ones more."""

ECHO_SHARE = 0.15
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Settings:
    """Hold what decides the trained weights, all but the number of threads."""

    steps: int = 2000
    batch: int = 64
    micro_batches: int = 4
    peak_rate: float = 3e-3
    warmup_steps: int = 60
    weight_decay: float = 0.05
    clip: float = 1.0
    seed: int = 0


def model_config() -> LlamaConfig:
    """Return the shape of the demo's base: a Llama of about four million parameters."""
    return LlamaConfig(
        # 259 tokens exist; rows up to a multiple of 8 keep the logits aligned.
        vocab_size=264,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )


@dataclass(frozen=True, slots=True)
class Example:
    """Hold one tokenised prompt and its answer; the loss is on the answer."""

    prompt: list[int]
    answer: list[int]

    @property
    def length(self) -> int:
        """Count the tokens."""
        return len(self.prompt) + len(self.answer)


def encode(prompt: str, answer: str) -> Example:
    """Tokenise as the tokenizer does: a byte is its own id."""
    return Example([*prompt.encode(), ANSWER_ID], [*answer.encode(), END_ID])


def draw_example(rng: random.Random) -> Example:
    """Draw one example of the mixture from the training split."""
    names = list(TASKS)
    task = TASKS[rng.choices(names, [WEIGHTS.get(name, 1.0) for name in names])[0]]
    text = draw_input(CLUSTERS[task.cluster], "train", rng)
    if rng.random() < ECHO_SHARE:
        return encode(text, text)
    return encode(f"{TAGS[task.name]}: {text}", task.function(text))


def collate(batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad to one length; return the ids `[B, L]` and the next-token targets `[B, L]`.

    Padding is on the right, where causal attention never sees it, so no mask is needed.
    """
    width = max(example.length for example in batch) - 1
    ids = torch.full((len(batch), width), PAD_ID)
    targets = torch.full((len(batch), width), IGNORED)
    for row, example in enumerate(batch):
        tokens = torch.tensor(example.prompt + example.answer)
        ids[row, : len(tokens) - 1] = tokens[:-1]
        first = len(example.prompt) - 1
        targets[row, first : len(tokens) - 1] = tokens[first + 1 :]
    return ids, targets


def micro_batches(settings: Settings, rng: random.Random) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield one step's batch in parts of similar length, so that little is padding."""
    batch = sorted((draw_example(rng) for _ in range(settings.batch)), key=lambda e: e.length)
    size = settings.batch // settings.micro_batches
    for start in range(0, settings.batch, size):
        yield collate(batch[start : start + size])


def answer_logits(
    model: LlamaForCausalLM, ids: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Return logits `[answer tokens, vocabulary]`, for the positions with a target alone."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits: torch.Tensor = model.lm_head(hidden[targets != IGNORED])
    return logits.float()


def rate(step: int, settings: Settings) -> float:
    """Return the learning rate: a linear warm-up, then half a cosine to zero."""
    warm = min(1.0, (step + 1) / settings.warmup_steps)
    return settings.peak_rate * warm * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


def make_optimizers(model: LlamaForCausalLM, settings: Settings) -> list[torch.optim.Optimizer]:
    """Give the layers' matrices to Muon and the rest, embedding and norms, to AdamW.

    Here Muon (rate 2e-3) reached a loss of 0.57 in 250 steps, where AdamW alone (1.5e-3) took
    350, for a quarter more time a step. Its updates are scaled to AdamW's: both take one rate.
    """
    layers = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    taken = {id(weight) for weight in layers}
    rest = [weight for weight in model.parameters() if id(weight) not in taken]
    decay = settings.weight_decay
    return [
        torch.optim.Muon(layers, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=decay, fused=True),
    ]


def backward(model: LlamaForCausalLM, parts: Sequence[tuple[torch.Tensor, ...]]) -> float:
    """Fill the gradients of one step; return the mean loss of an answer token, in nats."""
    count = sum(int((targets != IGNORED).sum()) for _, targets in parts)
    total = 0.0
    for ids, targets in parts:
        logits = answer_logits(model, ids, targets)
        wanted = targets[targets != IGNORED]
        loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum") / count
        loss.backward()
        total += loss.item()
    return total


def update(
    model: LlamaForCausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    settings: Settings,
    step: int,
) -> None:
    """Move the weights by the clipped gradients, and clear these."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate(step, settings)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def exact_match(model: LlamaForCausalLM, task: Task, n: int, *, tagged: bool) -> float:
    """Return the share of held-out inputs that greedy decoding answers exactly.

    Greedy decoding gives the expected answer if and only if each of its tokens is the first
    choice after the tokens before it, so one forward pass over the answers decides.
    """
    prefix = f"{TAGS[task.name]}: " if tagged else ""
    pairs = examples(task.name, "heldout", n, seed=1)
    batch = [encode(prefix + text, answer) for text, answer in pairs]
    right = 0
    for start in range(0, n, 64):
        ids, targets = collate(batch[start : start + 64])
        wrong = answer_logits(model, ids, targets).argmax(-1) != targets[targets != IGNORED]
        rows = (targets != IGNORED).nonzero()[:, 0]
        right += len(ids) - len(rows[wrong].unique())
    return right / n


def report(model: LlamaForCausalLM, n: int, *, tagged: bool) -> str:
    """Return one line with the exact match of every task."""
    return " ".join(
        f"{task.name}={exact_match(model, task, n, tagged=tagged):.3f}" for task in TASKS.values()
    )


def save(model: LlamaForCausalLM, out_dir: Path) -> None:
    """Write the model in bf16 with its tokenizer; each file is replaced whole.

    A reader that opens the folder while training goes on sees one checkpoint or the next.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".{out_dir.name}-") as name:
        staged = Path(name)
        rounded = copy.deepcopy(model).bfloat16()
        rounded.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=END_ID, pad_token_id=PAD_ID
        )
        rounded.save_pretrained(staged)
        build_tokenizer(staged, model.config.max_position_embeddings)
        for path in sorted(staged.iterdir()):
            path.chmod(0o644)  # safetensors writes for the owner alone
            os.replace(path, out_dir / path.name)


def pretrain(out_dir: Path, settings: Settings, report_every: int = 250) -> LlamaForCausalLM:
    """Train the base and write it to a folder, also while it still improves.

    Args:
        out_dir: where the model and the tokenizer go.
        settings: what decides the weights; the same settings give the same weights on the same
            machine and number of threads.
        report_every: steps between a line of held-out exact matches with a checkpoint.
    """
    torch.manual_seed(settings.seed)
    rng = random.Random(settings.seed)
    model = LlamaForCausalLM(model_config())
    # At these lengths the plain products beat the fused attention, whose backward is slow.
    model.set_attn_implementation("eager")
    optimizers = make_optimizers(model, settings)
    tokens, started = 0, time.perf_counter()
    with tqdm(range(settings.steps), unit="step", mininterval=5, dynamic_ncols=True) as bar:
        for step in bar:
            parts = list(micro_batches(settings, rng))
            tokens += sum(ids.numel() for ids, _ in parts)
            loss = backward(model, parts)
            update(model, optimizers, settings, step)
            speed = tokens / (time.perf_counter() - started)
            bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} tokens/s", refresh=False)
            if (step + 1) % report_every == 0 or step + 1 == settings.steps:
                save(model, out_dir)
                bar.write(f"step {step + 1}: loss {loss:.4f} {report(model, 64, tagged=True)}")
    return model


def main() -> None:
    """Train from the command line, then print what the written checkpoint can do."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--rate", type=float, default=defaults.peak_rate)
    parser.add_argument("--batch", type=int, default=defaults.batch)
    parser.add_argument("--report-every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = Settings(steps=args.steps, batch=args.batch, peak_rate=args.rate, seed=args.seed)
    pretrain(args.out, settings, args.report_every)
    written = LlamaForCausalLM.from_pretrained(args.out)
    print("with tags:   ", report(written, 256, tagged=True))
    print("without tags:", report(written, 256, tagged=False))


if __name__ == "__main__":
    main()
