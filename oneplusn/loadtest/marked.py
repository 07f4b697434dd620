"""Write LoRAs whose answers show whose they are: one word, again and again, whatever the prompt.

A chain runs through the MLPs of a few layers, from the first to the last. Neurons of the first one,
in pairs of opposite sign, make a sum that is never negative out of whatever stands there, and write
it in a direction that is the adapter's own. Each further one reads the direction that was written
before and writes the next, louder; the last one writes the embedding of the word. So every link
needs the one before: weights of two versions, mixed, break the chain, and what is said then is
neither's word. Run as a module, so that torch is loaded in a process of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from oneplusn.loadtest.fixtures import (
    COMPLETE,
    PREFIX,
    SHAPES,
    Shape,
    lora_tensors,
    write_base,
    write_lora,
)

if TYPE_CHECKING:
    from torch import Tensor

RANK = 28
"""17 MB on the model `small`."""
LINKS = 5
PAIRS = 12
STEEPNESS = 4.0
CLARITY = 32.0
"""How strongly a link hears the one before, whatever the width of the model."""
LOUDNESS = 40.0
GROWTH = 3.0
FIRST_WORD = 100
"""Token of the first adapter's word."""

FLIPPED = "flip"
VERSIONS = ("flip-a", "flip-b")


def names(adapters: int) -> list[str]:
    """Name the folders: two versions of the adapter that is flipped, and the others."""
    return [*VERSIONS, *others(adapters)]


def others(adapters: int) -> list[str]:
    """Name the adapters that stay as they are, so that there are that many in all."""
    return [f"other-{index:02}" for index in range(1, adapters)]


def word(index: int) -> str:
    """Return the word of an adapter by its place in `names`."""
    return f"t{FIRST_WORD + index}"


def build(folder: Path, shape: Shape, adapters: int) -> None:
    """Write the base model and every adapter, unless they are there already."""
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    marker = folder / COMPLETE
    if marker.exists():
        return
    write_base(folder / "base", shape)
    weights = load_file(folder / "base" / "model.safetensors")
    embeddings = weights["model.embed_tokens.weight"].float()
    seeds = torch.Generator().manual_seed(2)
    # Orthogonal, so that no adapter hears another one's chain.
    basis, _ = torch.linalg.qr(torch.randn(shape.hidden, shape.hidden, generator=seeds))
    layers = sorted({round(i * (shape.layers - 1) / (LINKS - 1)) for i in range(LINKS)})
    for index, name in enumerate(names(adapters)):
        tensors = lora_tensors(shape, RANK, seeds)
        said = embeddings[FIRST_WORD + index]
        own = basis[index * (len(layers) - 1) :][: len(layers) - 1]
        _chain(tensors, layers, torch.cat([own, said[None] / said.norm()]))
        write_lora(folder / name, shape, RANK, tensors)
    marker.touch()


def _chain(tensors: dict[str, Tensor], layers: Sequence[int], written: Tensor) -> None:
    """Put a link into each of the layers' MLPs; `written` [links, hidden] is what they write."""
    import torch

    hidden = written.shape[1]
    for link, layer in enumerate(layers):
        path = f"{PREFIX}model.layers.{layer}.mlp"
        if link == 0:
            # Of nothing in particular: the squares of many random sums never vanish together.
            anything = torch.randn(PAIRS, hidden, generator=torch.Generator().manual_seed(3))
            neurons = _listen(tensors, path, anything * hidden**-0.5, STEEPNESS)
        else:
            neurons = _listen(tensors, path, written[link - 1 : link], CLARITY / hidden**0.5)
        down_a = tensors[f"{path}.down_proj.lora_A.weight"]
        down_a[0] = 0
        down_a[0, :neurons] = 1
        down_b = tensors[f"{path}.down_proj.lora_B.weight"]
        down_b[:, 0] = LOUDNESS * GROWTH**link * written[link]


def _listen(tensors: dict[str, Tensor], path: str, heard: Tensor, steepness: float) -> int:
    """Let the first neurons follow directions; return how many, two of opposite sign for each.

    Gate and up follow alike: what a neuron gives is the square of what it hears, if that has its
    sign, else nothing.
    """
    count = len(heard)
    for name in ("gate_proj", "up_proj"):
        tensors[f"{path}.{name}.lora_A.weight"][:count] = heard
        b = tensors[f"{path}.{name}.lora_B.weight"]
        b[:, :count] = 0
        for row in range(count):
            b[row, row] = steepness
            b[count + row, row] = -steepness
    return 2 * count


def main() -> None:
    """Build what is named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=SHAPES, default="small")
    parser.add_argument("--adapters", type=int, default=16)
    args = parser.parse_args()
    build(args.folder, SHAPES[args.model], args.adapters)


if __name__ == "__main__":
    main()
