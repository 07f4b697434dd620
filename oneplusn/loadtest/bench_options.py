"""The options of the benchmark."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from oneplusn.loadtest.fixtures import SHAPES
from oneplusn.loadtest.peers import PEERS

IN_PROCESS = ("peft", "transformers")
ALL = "all"
QUICK = {
    "model": ["tiny"],
    "streams": 2,
    "rounds": 1,
    "prompt": 16,
    "output": 8,
    "repeats": 1,
    "peers": [],
}


def parse(about: str, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; end the program with a message if it makes no sense."""
    parser = argparse.ArgumentParser(prog="bench", description=about.partition("\n")[0])
    _declare_work(parser)
    _declare_peers(parser)
    add = parser.add_argument
    add("--cache", type=Path, help="keep models and adapters in this folder")
    add("--json", type=Path, help="keep every figure in this file, and go on with what it holds")
    add("--again", type=_names, default=[], help="measure these peers, or oneplusn, once more")
    add("--minutes", type=float, help="begin nothing after that many; go on with --json later")
    add("--quick", action="store_true", help="a tiny model, few tokens, and no peers")
    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(QUICK)
    _check(parser, options)
    return options


def _declare_work(parser: argparse.ArgumentParser) -> None:
    add, cores = parser.add_argument, len(os.sched_getaffinity(0))
    add("--model", type=_names, default=["small"], help=f"some of {', '.join(SHAPES)} (small)")
    add("--threads", type=int, default=cores, help="of arithmetic (the cores)")
    add("--streams", type=int, default=16, help="clients at once (16)")
    add("--rounds", type=int, default=2, help="requests of each client (2)")
    add("--prompt", type=int, default=64, help="tokens (64)")
    add("--output", type=int, default=64, help="tokens (64)")
    add("--repeats", type=int, default=3, help="at most, of each case after a warm-up (3)")
    add("--no-profile", action="store_true", help="do not look where a step's time goes")
    add("--no-floors", action="store_true", help="exit with 0 though floors are missed")


def _declare_peers(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    there = ", ".join(PEERS)
    add("--peers", type=_names, default=list(IN_PROCESS), help=f"some of {there}; or all, or ''")
    add("--environments", type=Path, help="folder with the environments of the peers")
    add("--llama-server", type=_program, default=os.environ.get("LLAMA_SERVER"), metavar="PATH")
    add("--vllm", type=_program, default=os.environ.get("VLLM_PYTHON"), metavar="PYTHON")


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.peers == [ALL]:
        options.peers = list(PEERS)
    for what, given, there in (
        ("peer", options.peers, PEERS),
        ("model", options.model, SHAPES),
    ):
        if unknown := set(given) - set(there):
            names = ", ".join(sorted(unknown))
            parser.error(f"no {what} {names}; there are {', '.join(there)}")
    counts = (options.threads, options.streams, options.rounds, options.prompt, options.repeats)
    if min(counts) < 1:
        parser.error("--threads, --streams, --rounds, --prompt and --repeats are 1 or more")
    if options.output < 3:
        parser.error("--output is 3 or more, as the time between tokens is measured")
    options.llama_server = options.llama_server or _found("llama-server")
    if options.vllm is None and (vllm := _found("vllm")) is not None:
        options.vllm = vllm.with_name("python")


def _found(program: str) -> Path | None:
    path = shutil.which(program)
    return None if path is None else Path(path)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _program(text: str) -> Path:
    if shutil.which(text) is None:
        msg = f"{text} is no program"
        raise argparse.ArgumentTypeError(msg)
    return Path(text).absolute()
