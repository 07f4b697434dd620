"""What a foreign adapter brings to its reader, and the checks that every reader makes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from oneplusn.adapters.checks import shown
from oneplusn.adapters.converters.refusals import check_tensor_name
from oneplusn.adapters.validation import DTYPES, MAX_VALUE, check_path
from oneplusn.errors import AdapterInvalid

PREFIX = r"(base_model\.model\.)?"
"""What PEFT puts before the path of every module."""


@dataclass(frozen=True, slots=True)
class Source:
    """An adapter as its files say it, not judged yet.

    Attributes:
        config: `adapter_config.json`.
        tensors: the weights, by name.
        name: what the adapter is called; tasks that have no names of their own are named after it.
        assume_converted: take an adapter whose training changed the base's weights as converted
            to the unchanged base.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    name: str
    assume_converted: bool = False

    def task_names(self, count: int, *, first: int = 0) -> tuple[str, ...]:
        """Name tasks that a format only counts: after the adapter, with their number in training.

        Args:
            count: J.
            first: number of the first task.
        """
        if count == 1:
            return (self.name,)
        return tuple(f"{self.name}-{number}" for number in range(first, first + count))


def by_module(
    tensors: Mapping[str, Tensor], part: re.Pattern[str], what: str
) -> dict[str, dict[str, str]]:
    """Group the names of tensors by the module they belong to, and by what they are there.

    Args:
        tensors: by name.
        part: matches the whole of every name, with a group `path` and a group `part`.
        what: the parts of one module, for the message.

    Returns:
        Module path -> part -> name of the tensor, in the order of the paths.

    Raises:
        AdapterInvalid: `tensor_unexpected`, `tensor_missing` where there are none, or a code that
            names what a tensor belongs to.
    """
    modules: dict[str, dict[str, str]] = {}
    for name in tensors:
        check_tensor_name(name)
        match = part.fullmatch(name)
        if match is None or match["part"] in modules.get(match["path"], {}):
            raise AdapterInvalid(
                f"tensor {shown(name)}: expected {what} per module, each once, and nothing else;"
                " save the adapter again with the library that trained it",
                code="tensor_unexpected",
            )
        check_path(match["path"])
        modules.setdefault(match["path"], {})[match["part"]] = name
    if not modules:
        raise AdapterInvalid("the adapter has no tensors; save it again", code="tensor_missing")
    return dict(sorted(modules.items()))


def take(
    tensors: Mapping[str, Tensor], name: str | None, wanted: str, shape: Sequence[int | str]
) -> Tensor:
    """Return one tensor, checked where its name is still known.

    Args:
        tensors: by name.
        name: None if there is none of the kind.
        wanted: what it would be called, for the message.
        shape: one entry per dimension; a text stands for any size from 1 on.

    Raises:
        AdapterInvalid: `tensor_missing`, `shape_mismatch`, `dtype_not_supported` or
            `value_not_finite`.
    """
    if name is None or name not in tensors:
        raise AdapterInvalid(
            f"there is no {shown(wanted)}; the file is incomplete, save it again",
            code="tensor_missing",
        )
    tensor = tensors[name]
    fits = len(shape) == tensor.ndim and all(
        size >= 1 if isinstance(asked, str) else size == asked
        for size, asked in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        raise AdapterInvalid(
            f"{shown(name)} has shape {shown(list(tensor.shape))}, and the configuration asks for"
            f" [{', '.join(map(str, shape))}]; both must come from the same training",
            code="shape_mismatch",
        )
    if tensor.dtype not in DTYPES:
        raise AdapterInvalid(
            f"{shown(name)} is {tensor.dtype}, and only {', '.join(map(str, DTYPES))} are read;"
            " cast it before saving",
            code="dtype_not_supported",
        )
    largest = tensor.detach().abs().max().item()
    if math.isnan(largest) or largest > MAX_VALUE:
        raise AdapterInvalid(
            f"{shown(name)} holds {largest}; every number is finite and within {MAX_VALUE:g}; this"
            " is what a diverged training leaves, so use an earlier checkpoint",
            code="value_not_finite",
        )
    return tensor.detach()
