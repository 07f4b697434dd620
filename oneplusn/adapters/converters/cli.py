"""`oneplusn convert`: foreign adapters in, one task out.

Nothing is written unless all of it is, and nothing that is there is ever overwritten.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.checks import shown
from oneplusn.adapters.converters import READERS, WRITERS, format_of
from oneplusn.adapters.converters.checkpoints import open_folder
from oneplusn.adapters.converters.combine import SEMANTICS, blend, renamed, side_by_side
from oneplusn.adapters.converters.export import Export
from oneplusn.adapters.files import read_adapter, write_bundle
from oneplusn.errors import AdapterExists, AdapterInvalid, AdapterNotFound, InvalidRequest

AUTO = "auto"
MAX_NAME_CHARS = 56
"""Leaves room for the number of a task."""

EXAMPLES = """\
examples:
  oneplusn convert in ./lora-news ./lora-legal ./press
      two LoRAs of PEFT as one adapter with two tasks, named after their folders
  oneplusn convert in ./lora-news ./lora-legal ./mix --weights 0.7 0.3 --task mix
      one task that is their weighted sum, exactly as PEFT's add_weighted_adapter("cat")
  oneplusn convert in ./poly ./cluster --task qa nli summary
      a Poly adapter of PEFT, whose tasks have numbers and get these names
  oneplusn convert out ./cluster --task qa --to peft ./qa-lora
      one task as a plain LoRA for PEFT and other servers
  oneplusn convert out ./cluster --task qa --to base --model ./llama ./llama-qa
      the base with the task added to its weights

lists (--task, --weights) come after the folders; `oneplusn adapters upload` serves what
`convert in` makes
"""


class _Action(NamedTuple):
    """One action: its help, its arguments, what may be named in them, and what it does."""

    help: str
    declare: Callable[[argparse.ArgumentParser], None]
    lists: list[str]
    run: Callable[[argparse.Namespace], list[str]]


def declare(parser: argparse.ArgumentParser) -> None:
    """Add `in` and `out` to the parser of `oneplusn convert`."""
    parser.epilog = EXAMPLES
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION", dest="action")
    for name, action in ACTIONS.items():
        sub = actions.add_parser(
            name,
            help=action.help,
            description=action.help,
            epilog="\n".join(action.lists),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        action.declare(sub)


def run(args: argparse.Namespace) -> int:
    """Do what `declare` described; return the exit code.

    Raises:
        AdapterExists: the folder to write is there already.
        OneplusnError: the conversion is refused.
    """
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise AdapterExists(
            f"{shown(str(args.out))} exists and nothing is overwritten; choose another folder or"
            " remove that one"
        )
    _say(ACTIONS[args.action].run(args), sys.stdout)
    return 0


def _declare_in(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="What trainers saved."
    )
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="Folder for the adapter; must not exist."
    )
    parser.add_argument(
        "--format",
        choices=(AUTO, *READERS),
        default=AUTO,
        help="What the folders must be; told from their adapter_config.json otherwise.",
    )
    parser.add_argument(
        "--task",
        nargs="+",
        metavar="NAME",
        help="Names of all tasks in the order of the folders, or of the one that weights make."
        " Default: the folders' names, with numbers where one holds several tasks.",
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        type=float,
        metavar="W",
        help="Make one task of all folders, plain LoRAs, by these weights.",
    )
    parser.add_argument(
        "--semantics",
        choices=SEMANTICS,
        help="What the weights mean. Default: cat.",
    )
    parser.add_argument(
        "--assume-converted",
        action="store_true",
        help="Take PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ as converted to the unchanged base.",
    )


def _declare_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle",
        type=Path,
        metavar="BUNDLE",
        help="Adapter: a folder or an archive, in any form that a server reads.",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="Folder to write; must not exist.")
    parser.add_argument("--task", help="The task to take out. Default: the only one.")
    parser.add_argument("--to", choices=WRITERS, default="peft", help="Default: peft.")
    parser.add_argument(
        "--svd",
        type=int,
        metavar="K",
        help="peft: cut to rank K by singular values, and say what is lost. Default: nothing is.",
    )
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="base: the model that the task is added to."
    )
    parser.add_argument(
        "--shard-size",
        default="5GB",
        metavar="SIZE",
        help="base: most bytes of one file of weights. Default: 5GB.",
    )
    parser.add_argument(
        "--lax", action="store_true", help="base: accept another base, and modules that it lacks."
    )


def _convert_in(args: argparse.Namespace) -> list[str]:
    if args.semantics is not None and args.weights is None:
        raise InvalidRequest(
            f"--semantics {args.semantics} says what weights mean, and there are none; add"
            " --weights with one for each folder, or leave it out",
            param="semantics",
        )
    bundles = [
        _read(folder, args, f"[{number}/{len(args.folders)}]")
        for number, folder in enumerate(args.folders, start=1)
    ]
    if args.weights is None:
        bundle = side_by_side(bundles if args.task is None else _named(bundles, args.task))
    else:
        names = args.task or [_name_of(args.out)]
        if len(names) > 1:
            raise InvalidRequest(
                f"{len(names)} names for the one task that weights make; give one", param="task"
            )
        bundle = blend(bundles, args.weights, args.semantics or "cat", task=names[0])
    write_bundle(bundle, args.out)
    return [*_describe(bundle), f"written  {args.out}, {bundle.digest}"]


def _read(folder: Path, args: argparse.Namespace, progress: str) -> Bundle:
    """Read one folder, and say so.

    Raises:
        AdapterInvalid: it is of another format than asked for, or cannot be converted.
    """
    opened = open_folder(folder, name=_name_of(folder), assume_converted=args.assume_converted)
    found = format_of(opened.source.config)
    if args.format not in (AUTO, found):
        raise AdapterInvalid(
            f"{shown(str(folder))} is {found}, and --format says {args.format}; leave that out, or"
            " give another folder",
            code="format_mismatch",
        )
    bundle = READERS[found].read(opened.source)
    count = f"{len(bundle.tasks)} task{'s' if len(bundle.tasks) > 1 else ''}"
    lines = [f"{progress} {folder}: {found}, {count}"]
    if opened.left:
        left = ", ".join(opened.left)
        lines.append(f"warning: never opened, so no part of what comes out: {shown(left)}")
    _say(lines, sys.stderr)
    return bundle


def _named(bundles: Sequence[Bundle], names: Sequence[str]) -> list[Bundle]:
    """Give the tasks of all bundles their names.

    Raises:
        InvalidRequest: there are more or fewer names than tasks.
    """
    counts = [len(bundle.tasks) for bundle in bundles]
    if len(names) != sum(counts):
        tasks = ", ".join(task for bundle in bundles for task in bundle.tasks)
        raise InvalidRequest(
            f"{len(names)} names for {sum(counts)} tasks, {shown(tasks)}; give one for each, in"
            " this order",
            param="task",
        )
    rest = iter(names)
    return [
        renamed(bundle, [next(rest) for _ in range(count)])
        for bundle, count in zip(bundles, counts, strict=True)
    ]


def _convert_out(args: argparse.Namespace) -> list[str]:
    bundle = read_adapter(args.bundle, name=_name_of(args.bundle))
    if args.task is None and len(bundle.tasks) > 1:
        raise AdapterNotFound(
            f"the adapter has {len(bundle.tasks)} tasks, {shown(', '.join(bundle.tasks))}; say"
            " which one with --task"
        )
    task = args.task or bundle.tasks[0]
    export = Export(
        bundle=bundle,
        task=task,
        out=args.out,
        svd=args.svd,
        model=args.model,
        lax=args.lax,
        shard_size=args.shard_size,
    )
    lines = WRITERS[args.to].write(export)
    return [f"task     {task}", *lines, f"written  {args.out}"]


def _describe(bundle: Bundle) -> list[str]:
    ranks = sorted({expert.rank for expert in bundle.experts})
    return [
        f"method   {bundle.method}",
        f"tasks    {', '.join(bundle.tasks)}",
        f"experts  {len(bundle.experts)} of rank {', '.join(map(str, ranks))}",
        f"modules  {len(bundle.modules)}",
    ]


def _name_of(path: Path) -> str:
    """Make a name of a path's last part, as far as it can be one."""
    name = path.resolve().name.lower()
    for suffix in (".tar.gz", ".tgz", ".tar", ".zip"):
        name = name.removesuffix(suffix)
    return re.sub(r"[^a-z0-9._-]+", "-", name).strip("-._")[:MAX_NAME_CHARS] or "adapter"


def _table(rows: Iterable[tuple[str, str]]) -> list[str]:
    return [f"  {name:<10} {summary}" for name, summary in rows]


def _say(lines: Iterable[str], stream: TextIO) -> None:
    stream.writelines(f"{line}\n" for line in lines)
    stream.flush()


ACTIONS: dict[str, _Action] = {
    "in": _Action(
        "convert foreign adapters into one of this project's",
        _declare_in,
        [
            "formats:",
            *_table((name, reader.summary) for name, reader in READERS.items()),
            "semantics of --weights:",
            *_table((name, semantics.summary) for name, semantics in SEMANTICS.items()),
        ],
        _convert_in,
    ),
    "out": _Action(
        "take one task out of an adapter",
        _declare_out,
        ["formats of --to:", *_table((name, writer.summary) for name, writer in WRITERS.items())],
        _convert_out,
    ),
}
