"""`oneplusn train`: train adapters from a configuration file."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from oneplusn.errors import ConfigError, InvalidRequest

if TYPE_CHECKING:
    from oneplusn.adapters.training.run import Publish

Publisher = Callable[[str, str | None], "Publish"]
"""Makes of a server's address and key what sends bundles to it."""

EPILOG = """\
what a run does:
  reads and checks everything that can be known to be wrong before the first step, prints how many
  parameters it trains, trains with validations and checkpoints in between, and leaves in
  OUTPUT/NAME: bundle/ (what the server loads), report.md with plots, record.json, checkpoints/

examples:
  oneplusn train --print-config > mine.yaml
      every key with what it means and its default
  oneplusn train mine.yaml --dry-run
      check everything, print the parameters, and stop
  oneplusn train mine.yaml --resume
      go on after a crash or a kill; begins where there is nothing to go on with
  oneplusn train mine.yaml --method lora --match-params c-poly --name plain
      another method at the same number of parameters
  oneplusn train mine.yaml --publish http://127.0.0.1:8000
      send the adapter to a running server at the end
  accelerate launch --num-processes 4 -m oneplusn.cli train mine.yaml
      on four GPUs
"""

# flag -> dotted key of the configuration, type, help
OVERRIDES: dict[str, tuple[str, type, str]] = {
    "--name": ("name", str, "Name of the adapter."),
    "--base": ("base", str, "Base model: `demo`, a folder, or a hub id."),
    "--output": ("output", str, "Folder in which each adapter gets one of its name."),
    "--clusters": ("clusters", str, "File of `oneplusn cluster`: one adapter per cluster."),
    "--method": ("method", str, "Method, with its default settings; --set method.rank=8 and such."),
    "--match-params": (
        "match_params",
        str,
        "Change the ranks to the budget of this method at its defaults, or to this number.",
    ),
    "--steps": ("training.steps", int, "Optimiser steps."),
    "--seed": ("training.seed", int, "Of everything random."),
}


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `oneplusn train`."""
    parser.epilog = EPILOG
    parser.add_argument(
        "config", metavar="CONFIG.yaml", nargs="?", type=Path, help="What is to be trained."
    )
    parser.add_argument(
        "--print-config", action="store_true", help="Print an example with every key, and stop."
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="Check everything, print the parameters, and stop."
    )
    parser.add_argument(
        "--resume", action="store_true", help="Go on with the run that the output folder holds."
    )
    parser.add_argument(
        "--finish",
        action="store_true",
        help="Make the adapter of the best checkpoint that is there, without more training.",
    )
    for flag, (key, kind, text) in OVERRIDES.items():
        parser.add_argument(flag, type=kind, dest=key, default=argparse.SUPPRESS, help=text)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="Any key of the file, as --set training.batch_size=8; repeatable.",
    )
    parser.add_argument("--quiet", action="store_true", help="No progress bar.", dest="quiet")
    parser.add_argument("--publish", metavar="URL", help="Server to send the adapters to.")
    parser.add_argument(
        "--api-key",
        default=os.environ.get("ONEPLUSN_API_KEY"),
        help="Its key; better in ONEPLUSN_API_KEY, where no list of processes shows it.",
    )


def run(args: argparse.Namespace, *, publisher: Publisher | None = None) -> int:
    """Do what `declare` described; return the exit code.

    Args:
        args: parsed.
        publisher: makes what `--publish` needs; this package speaks no HTTP itself.

    Raises:
        InvalidRequest: bad input.
        ConfigError: a library or a publisher is missing.
    """
    if args.print_config:
        from oneplusn.adapters.training.example import example_config

        sys.stdout.write(example_config())
        return 0
    if args.config is None:
        raise InvalidRequest("no CONFIG.yaml given; --print-config prints one to begin with")
    if find_spec("accelerate") is None:
        raise ConfigError("training needs `pip install oneplusn[train]`")
    publish = None
    if args.publish is not None:
        if publisher is None:
            raise ConfigError("this installation cannot publish; use `oneplusn adapters upload`")
        publish = publisher(args.publish, args.api_key)
    from oneplusn.adapters.training.config import load_config
    from oneplusn.adapters.training.run import Options
    from oneplusn.adapters.training.run import run as train

    train(
        load_config(args.config, _overrides(args)),
        Options(
            resume=args.resume, finish=args.finish, dry_run=args.dry_run, publish=publish, say=_say
        ),
    )
    return 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _overrides(args: argparse.Namespace) -> dict[str, object]:
    """Collect what the command line says of the configuration; --set comes last."""
    from oneplusn.adapters.training.config_file import parse_value

    given = vars(args)
    found: dict[str, object] = {key: given[key] for key, _, _ in OVERRIDES.values() if key in given}
    wanted = str(found.get("match_params", ""))
    if wanted.isdecimal():
        found["match_params"] = int(wanted)
    if args.quiet:
        found["training.progress"] = False
    for item in args.set:
        key, sign, value = item.partition("=")
        if not (key and sign):
            raise InvalidRequest(f"--set {item!r}: expected KEY=VALUE")
        found[key] = parse_value(value)
    return found
