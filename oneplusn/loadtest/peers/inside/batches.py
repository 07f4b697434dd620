"""Time transformers or PEFT on static batches; runs in an environment that has nothing of ours.

All prompts of a batch have equal length and begin at once, greedy, to the last token. That is the
best case of both: no server, no HTTP, no scheduling in the way. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

REPEAT_BUDGET_S = 30.0
"""Seconds of a case after which it is not repeated any more."""


class Stamps:
    """A stopping criterion that never stops: it notes when each step's tokens are there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        """Note the time; let every sequence go on."""
        import torch

        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def load(folder: Path) -> Any:  # noqa: ANN401 - transformers' own
    """Load the base model in bf16, with an end of text that never comes."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 1
    return model.eval()


def with_adapters(model: Any, loras: Mapping[str, Path]) -> Any:  # noqa: ANN401 - PEFT's own
    """Attach every LoRA in the type that it is stored in."""
    from peft import PeftModel

    (first, folder), *others = loras.items()
    wrapped = PeftModel.from_pretrained(
        model, folder, adapter_name=first, autocast_adapter_dtype=False
    )
    for name, path in others:
        wrapped.load_adapter(path, adapter_name=name, autocast_adapter_dtype=False)
    return wrapped.eval()


def run(model: Any, rows: int, work: argparse.Namespace, **extra: object) -> list[float]:  # noqa: ANN401
    """Generate once; return the start and when each step's tokens were there, in seconds."""
    import torch
    from transformers import StoppingCriteriaList

    prompts = torch.randint(3, model.config.vocab_size, (rows, work.prompt))
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
    return [start, *stamps.times]


def measure(model: Any, asked: list[str], work: argparse.Namespace) -> list[list[float]]:  # noqa: ANN401
    """Run one case, a warm-up first: the bare base, one adapter's plain path, or the mixed path."""
    extra = dict[str, object]()
    if len(set(asked)) > 1:
        extra["adapter_names"] = asked
    elif work.lora:
        model.set_adapter(asked[0])
    run(model, len(asked), work, **extra)
    runs, begin = list[list[float]](), time.perf_counter()
    while len(runs) < work.repeats and (not runs or time.perf_counter() - begin < REPEAT_BUDGET_S):
        runs.append(run(model, len(asked), work, **extra))
    return runs


def resident() -> dict[str, int]:
    """Return this process's memory in bytes."""
    text = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8")
    return {
        name.lower(): int(kib) * 1024
        for name, kib in re.findall(r"^(Rss|Pss): +(\d+) kB", text, re.MULTILINE)
    }


def main() -> None:
    """Run the cases named on the command line and print when their steps ended."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--lora", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--case", action="append", required=True, metavar="KEY=NAME,NAME")
    for name in ("threads", "prompt", "output", "repeats"):
        parser.add_argument(f"--{name}", type=int, required=True)
    work = parser.parse_args()
    torch.set_num_threads(work.threads)
    torch.manual_seed(0)
    model = load(work.model)
    if work.lora:
        named = (item.partition("=") for item in work.lora)
        model = with_adapters(model, {name: Path(path) for name, _, path in named})
    cases = {key: names.split(",") for key, _, names in (c.partition("=") for c in work.case)}
    runs = {key: measure(model, asked, work) for key, asked in cases.items()}
    print(json.dumps({"runs": runs, "memory": resident()}))


if __name__ == "__main__":
    main()
