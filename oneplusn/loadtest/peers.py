"""Time transformers and PEFT on the same work, in a process of their own.

Both take a static batch: all prompts of equal length at once, greedy, to the last token. That is
their best case: no server, no HTTP, no scheduling in the way. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneplusn.loadtest.fixtures import BASE, MIXED, ONE_LORA

if TYPE_CHECKING:
    import torch

PEERS = ("peft", "transformers")


@dataclass(frozen=True, slots=True)
class Work:
    """What every case computes."""

    requests: int
    prompt: int
    output: int
    repeats: int


@dataclass(frozen=True, slots=True)
class PeerCase:
    """One run of one case: the start, and when each step's tokens were there, in seconds."""

    name: str
    rows: int
    start: float
    times: tuple[float, ...]

    @property
    def tokens_per_s(self) -> float:
        """Output tokens over the whole run, prompts included."""
        return self.rows * len(self.times) / (self.times[-1] - self.start)

    @property
    def decode_tokens_per_s(self) -> float:
        """Output tokens after the first of every row, over the time they took."""
        return self.rows * (len(self.times) - 1) / (self.times[-1] - self.times[0])

    @property
    def figures(self) -> dict[str, float | str]:
        """What the report shows; times in milliseconds."""
        return {
            "name": self.name,
            "tokens_per_s": self.tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "ttft_ms": (self.times[0] - self.start) * 1e3,
            "step_ms": self.rows / self.decode_tokens_per_s * 1e3,
        }


class Stamps:
    """A stopping criterion that never stops: it notes when each step's tokens are there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        """Note the time; let every sequence go on."""
        import torch

        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def median_run(runs: Sequence[PeerCase]) -> PeerCase:
    """Return the run of median throughput."""
    return sorted(runs, key=lambda run: run.tokens_per_s)[(len(runs) - 1) // 2]


def measure(name: str, model: Any, work: Work, **extra: object) -> PeerCase:  # noqa: ANN401 - transformers' own
    """Generate once to warm up and `repeats` times; return the run of median throughput."""
    import torch
    from transformers import StoppingCriteriaList

    generator = torch.Generator().manual_seed(0)
    runs = list[PeerCase]()
    for _ in range(1 + work.repeats):
        shape = (work.requests, work.prompt)
        prompts = torch.randint(3, model.config.vocab_size, shape, generator=generator)
        stamps = Stamps()
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                max_new_tokens=work.output,
                stopping_criteria=StoppingCriteriaList([stamps]),
                **extra,
            )
        assert len(stamps.times) == work.output
        runs.append(PeerCase(name, work.requests, start, tuple(stamps.times)))
    return median_run(runs[1:])


def load(folder: Path) -> Any:  # noqa: ANN401 - transformers' own
    """Load the base model in bf16, with an end of text that never comes."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 1
    return model.eval()


def run_transformers(base: Path, work: Work) -> list[PeerCase]:
    """Time the bare base."""
    return [measure(f"transformers, {BASE}", load(base), work)]


def run_peft(base: Path, loras: Mapping[str, Path], work: Work) -> list[PeerCase]:
    """Time a single active LoRA on PEFT's plain path, and one per row on its mixed path."""
    from peft import PeftModel

    (first, folder), *others = loras.items()
    model = PeftModel.from_pretrained(
        load(base), folder, adapter_name=first, autocast_adapter_dtype=False
    )
    for name, path in others:
        model.load_adapter(path, adapter_name=name, autocast_adapter_dtype=False)
    model.eval()
    single = measure(f"PEFT, {ONE_LORA}", model, work)
    names = list(loras)
    mixed = measure(f"PEFT, {MIXED.format(len(names))}", model, work, adapter_names=names)
    return [single, mixed]


def main() -> None:
    """Run one peer and print its cases."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--lora", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--requests", type=int, required=True)
    parser.add_argument("--prompt", type=int, required=True)
    parser.add_argument("--output", type=int, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    work = Work(args.requests, args.prompt, args.output, args.repeats)
    if args.peer == "transformers":
        cases = run_transformers(args.model, work)
    else:
        named = (item.partition("=") for item in args.lora)
        cases = run_peft(args.model, {name: Path(path) for name, _, path in named}, work)
    print(json.dumps([case.figures for case in cases]))


if __name__ == "__main__":
    main()
