"""Read the values of options; what cannot be read is named with what could be."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def read(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Let argparse show what a parser that raises `ValueError` has to say."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def above_0(text: str) -> float:
    """Read a number above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        msg = f"{text} is not above 0; give a number that is"
        raise argparse.ArgumentTypeError(msg)
    return value


def at_least_0(text: str) -> float:
    """Read a number of 0 or more."""
    return 0.0 if _number(text) == 0 else above_0(text)


def share(text: str) -> float:
    """Read `2%` or `0.02`."""
    value = _number(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 <= value <= 1:
        msg = f"{text} is no share; give one from 0% to 100%, as 2% or 0.02"
        raise argparse.ArgumentTypeError(msg)
    return value


def whole(text: str, least: int = 1) -> int:
    """Read a whole number of 1 or more, or of another least."""
    value = _number(text)
    if not least <= value < math.inf or value != int(value):
        msg = f"{text} is no whole number of {least} or more; give one"
        raise argparse.ArgumentTypeError(msg)
    return int(value)


def whole_or_0(text: str) -> int:
    """Read a whole number of 0 or more."""
    return whole(text, 0)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        msg = f"{text!r} is no number; give one as 4"
        raise argparse.ArgumentTypeError(msg) from None


def names(text: str) -> tuple[str, ...]:
    """Read names between commas."""
    found = tuple(filter(None, (name.strip() for name in text.split(","))))
    if not found:
        raise argparse.ArgumentTypeError("it names nothing; give names between commas")
    return found


def an_object(text: str) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        msg = f'{text} is no JSON object; give one as {{"temperature": 0.7}}'
        raise argparse.ArgumentTypeError(msg)
    return content


def churn_adapter(text: str) -> tuple[str, tuple[Path, ...]]:
    """Read `NAME=DIR_A,DIR_B`."""
    name, _, folders = text.partition("=")
    paths = tuple(Path(folder) for folder in folders.split(",") if folder)
    if not name or len(paths) != 2:
        msg = f"{text!r} is not NAME=DIR_A,DIR_B; name an adapter and the folders of two versions"
        raise argparse.ArgumentTypeError(msg)
    if missing := [path for path in paths if not path.is_dir()]:
        msg = f"{missing[0]} is no folder; give one that holds an adapter"
        raise argparse.ArgumentTypeError(msg)
    return name, paths


def swept(text: str) -> tuple[str, tuple[float, ...]]:
    """Read `concurrency=1,2,4` or another kind of what a sweep varies."""
    kind, _, values = text.partition("=")
    read_one = SWEPT.get(kind)
    if read_one is None or not values:
        msg = f"{text!r} cannot be swept; give one of {', '.join(SWEPT)} with values, as in {FORM}"
        raise argparse.ArgumentTypeError(msg)
    found = tuple(read_one(value) for value in values.split(",") if value)
    if len(set(found)) < 2 or list(found) != sorted(set(found)):
        msg = f"{values} are not two or more values that grow; give them as in {FORM}"
        raise argparse.ArgumentTypeError(msg)
    return kind, found


FORM = "concurrency=1,2,4,8"
SWEPT: dict[str, Callable[[str], float]] = {
    "concurrency": whole,
    "rate": above_0,
    "tasks": whole,
    "input-tokens": whole,
    "output-tokens": whole,
}
