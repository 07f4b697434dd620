"""Write what the growth benchmark serves: a random model with room for long prompts, equal LoRAs.

Run as a module, so that torch is loaded in a process of its own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from oneplusn.loadtest.fixtures import COMPLETE, SHAPES, Shape, lora_tensors, write_base, write_lora

RANK = 16
POSITIONS = 8192


def adapters(count: int) -> list[str]:
    """Name the LoRAs, which are the tasks too."""
    return [f"lora-{index:02}" for index in range(count)]


def build(folder: Path, shape: Shape, count: int) -> None:
    """Write the base model and the LoRAs, all of one rank, unless they are there already."""
    import torch

    torch.set_num_threads(1)
    marker = folder / COMPLETE
    if marker.exists():
        return
    write_base(folder / "base", shape)
    _make_room(folder / "base" / "config.json")
    seeds = torch.Generator().manual_seed(4)
    for name in adapters(count):
        write_lora(folder / name, shape, RANK, lora_tensors(shape, RANK, seeds))
    marker.touch()


def _make_room(config: Path) -> None:
    """Let the model take long prompts; rotary positions have no weights."""
    content = json.loads(config.read_text(encoding="utf-8"))
    content["max_position_embeddings"] = POSITIONS
    config.write_text(json.dumps(content, indent=1), encoding="utf-8")


def main() -> None:
    """Build what is named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=SHAPES, default="small")
    parser.add_argument("--adapters", type=int, default=64)
    args = parser.parse_args()
    build(args.folder, SHAPES[args.model], args.adapters)


if __name__ == "__main__":
    main()
