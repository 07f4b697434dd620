"""The options of `oneplusn loadtest` and of the benchmarks, checked before anything is sent."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from oneplusn.loadtest.dialects import DIALECTS
from oneplusn.loadtest.fixtures import SHAPES
from oneplusn.loadtest.workload import LENGTHS, POPULARITIES, Length, Popularity

KEY_VARIABLE = "ONEPLUSN_API_KEY"
DEFAULT_DURATION_S = 30.0
DEFAULT_TIMEOUT_S = 600.0

EXAMPLES = """\
examples:
  oneplusn loadtest http://127.0.0.1:8000 --concurrency 16 --duration 30
      sixteen clients, each sending its next request once it has its answer
  oneplusn loadtest http://127.0.0.1:8000 --rate 5 --popularity zipf:1.1 --out results
      five requests a second on average, some tasks more often than others, report in a folder
  oneplusn loadtest http://127.0.0.1:8000 --concurrency 8 \\
      --churn 0.5 --churn-adapter letters=./letters-1,./letters-2
      replace an adapter every two seconds meanwhile

exit status: 0; 1 if requests failed; 2 if nothing could be sent; 130 if it was interrupted
"""

T = TypeVar("T")


class Mistake(Exception):
    """Options that do not go together."""


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare all options."""
    parser.add_argument("url", help="The server, for example http://127.0.0.1:8000.")
    _declare_load(parser)
    _declare_requests(parser)
    _declare_churn(parser)
    _declare_rest(parser)


def benchmark(name: str, about: str, *, tokens: int, quick: str) -> argparse.ArgumentParser:
    """Return a parser of what all benchmarks ask.

    Args:
        name: Of the benchmark.
        about: Its module's docstring.
        tokens: Default of prompts and of answers.
        quick: What `--quick` makes of it.
    """
    parser = argparse.ArgumentParser(prog=name, description=about.partition("\n")[0])
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=cores, help="of arithmetic (the cores)")
    parser.add_argument("--model", choices=SHAPES, default="small")
    parser.add_argument("--prompt", type=int, default=tokens, help=f"tokens ({tokens})")
    parser.add_argument("--output", type=int, default=tokens, help=f"tokens on average ({tokens})")
    parser.add_argument("--cache", type=Path, help="keep models and adapters in this folder")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def check(args: argparse.Namespace) -> None:
    """Fill in what follows from other options.

    Raises:
        Mistake: Options do not go together.
    """
    if args.duration is None and args.num_requests is None:
        args.duration = DEFAULT_DURATION_S
    if (args.churn is None) != (args.churn_adapter is None):
        raise Mistake("--churn and --churn-adapter need each other")
    # What OpenAI's clients call the base address ends where our routes begin.
    args.url = args.url.rstrip("/").removesuffix("/v1")
    if args.api_key is None:
        args.api_key = os.environ.get(KEY_VARIABLE) or None


def _declare_load(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how much")
    loop = group.add_mutually_exclusive_group(required=True)
    loop.add_argument(
        "--rate",
        type=_above_0(float),
        metavar="R",
        help="Requests per second, sent when they are due: Poisson arrivals (open loop).",
    )
    loop.add_argument(
        "--concurrency",
        type=_above_0(int),
        metavar="N",
        help="Clients that send the next request once they have their answer (closed loop).",
    )
    group.add_argument(
        "--duration",
        type=_above_0(float),
        metavar="S",
        help=f"Seconds of sending. Default: {DEFAULT_DURATION_S:g}, without --num-requests.",
    )
    group.add_argument(
        "--num-requests", type=_above_0(int), metavar="N", help="Requests after which it ends."
    )
    group.add_argument(
        "--warmup",
        type=_seconds,
        default=0.0,
        metavar="S",
        help="Seconds of the same load before anything counts. Default: 0.",
    )


def _declare_requests(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what")
    add = group.add_argument
    add(
        "--tasks",
        "--model",
        type=_names,
        metavar="NAME,...",
        help="Tasks, adapters or models to ask. Default: what /v1/models lists.",
    )
    add(
        "--popularity",
        type=_read(Popularity.parse),
        default=Popularity("uniform"),
        metavar="KIND",
        help=f"How often each is asked: {', '.join(POPULARITIES)}. Default: uniform.",
    )
    add(
        "--endpoint",
        choices=DIALECTS,
        default="completions",
        help="Kind of route. Default: completions.",
    )
    for name, default in (("input", "128"), ("output", "64")):
        add(
            f"--{name}-tokens",
            type=_read(Length.parse),
            default=Length.parse(default),
            metavar="LENGTH",
            help=f"{', '.join(LENGTHS)}. Default: {default}.",
        )
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="JSON lines with prompt or messages, and optionally task and output_tokens.",
    )
    add("--extra-body", type=_object, default={}, metavar="JSON", help="Added to every request.")
    add("--seed", type=int, default=0, help="Of times, tasks, lengths and texts. Default: 0.")


def _declare_churn(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("adapters that change meanwhile")
    group.add_argument(
        "--churn", type=_above_0(float), metavar="SWAPS_PER_S", help="Uploads per second."
    )
    group.add_argument(
        "--churn-adapter",
        type=_read(_churn_adapter),
        metavar="NAME=DIR_A,DIR_B",
        help="The adapter, and its two versions that replace each other.",
    )


def _declare_rest(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--api-key",
        metavar="KEY",
        help=f"Bearer key; better in the environment as {KEY_VARIABLE}.",
    )
    add(
        "--timeout",
        type=_above_0(float),
        default=DEFAULT_TIMEOUT_S,
        metavar="S",
        help=f"Seconds that an answer may take. Default: {DEFAULT_TIMEOUT_S:g}.",
    )
    add(
        "--retries",
        type=int,
        default=0,
        metavar="N",
        help="Send again after Retry-After, up to N times; the time goes on. Default: 0.",
    )
    add("--out", type=Path, metavar="DIR", help="Write report.json, report.md, requests.jsonl.")
    add("--quiet", action="store_true", help="Show no progress.")


def _read(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Let argparse show what a parser has to say."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _above_0(kind: Callable[[str], T]) -> Callable[[str], T]:
    def convert(text: str) -> T:
        value = kind(text)
        if not 0 < value < float("inf"):  # type: ignore[operator]  # int or float
            msg = f"{text} is not above 0"
            raise argparse.ArgumentTypeError(msg)
        return value

    convert.__name__ = getattr(kind, "__name__", "number")
    return convert


def _seconds(text: str) -> float:
    return 0.0 if float(text) == 0 else _above_0(float)(text)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(filter(None, text.split(",")))
    if not names:
        raise argparse.ArgumentTypeError("it names nothing")
    return names


def _object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        msg = f"{text} is no JSON object"
        raise argparse.ArgumentTypeError(msg)
    return content


def _churn_adapter(text: str) -> tuple[str, tuple[Path, ...]]:
    name, _, folders = text.partition("=")
    paths = tuple(Path(folder) for folder in folders.split(",") if folder)
    if not name or len(paths) != 2:
        msg = f"{text!r} is not NAME=DIR_A,DIR_B"
        raise ValueError(msg)
    if missing := [path for path in paths if not path.is_dir()]:
        msg = f"{missing[0]} is no folder"
        raise ValueError(msg)
    return name, paths
