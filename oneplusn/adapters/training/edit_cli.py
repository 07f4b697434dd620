"""`oneplusn edit`: make a new version of an adapter; what is given stays as it is.

Exit codes: 0 done, 2 refused. Nothing is written unless all of it is.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.checks import shown
from oneplusn.adapters.distil import distil
from oneplusn.adapters.edits import (
    add_task,
    blended_gates,
    check_base,
    check_new_task,
    drop_task,
    merge,
    rename_task,
)
from oneplusn.adapters.files import read_adapter, write_bundle
from oneplusn.adapters.fingerprint import base_fingerprint
from oneplusn.adapters.training.data import TaskDataset, read_jsonl
from oneplusn.adapters.training.edit_report import errors_of, gates_of_last, summary
from oneplusn.adapters.training.extend import NewTask, learn_task, refine
from oneplusn.adapters.training.rows import FitSettings
from oneplusn.errors import AdapterExists, ConfigError, InvalidRequest

EXAMPLES = """\
examples:
  oneplusn edit drop-task ./text shout --out ./text-2
      without the task and the experts that only it used
  oneplusn edit merge ./lora-news ./lora-legal --out ./press
      two adapters of one base as one; each plain LoRA is one task of its folder's name
  oneplusn edit add-task ./text brief --blend shorten=0.6 title=0.4 --out ./text-2
      a task that is a blend of others, exactly; no data
  oneplusn edit add-task ./text brief --data brief.jsonl --model ./base --gate-only --out ./text-2
      learn from a few examples how much of every expert the task wants
  oneplusn edit add-task ./text brief --data brief.jsonl --model ./base --rank 4 --out ./text-2
      learn a gate row and an expert of the task's own
  oneplusn edit distil ./text brief --blend shorten=0.6 title=0.4 --rank 8 --out ./brief
      one plain LoRA in place of the blend, and how far it is from it

an adapter is a folder or an archive, in the project's form or PEFT's; `oneplusn adapters upload`
makes the folder that comes out a new version on a server
"""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

FIT_HELP = {
    "steps": "Optimiser steps.",
    "batch_size": "Examples per step.",
    "learning_rate": "Peak rate of factors.",
    "gate_learning_rate": "Peak rate of gates.",
    "clip": "Largest norm of the gradient.",
    "seed": "Of everything random.",
}

OWN_RANK = 4

DISTIL_RATE = 3e-4
"""Factors that are nearly right already take smaller steps than those that start from nothing."""


class _Edited(NamedTuple):
    """What an action made of what, and what else it has to say."""

    sources: Sequence[Bundle]
    result: Bundle
    notes: Sequence[str] = ()


class _Action(NamedTuple):
    """One action: its help, its arguments, and what it makes."""

    help: str
    declare: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], _Edited]


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the actions to the parser of `oneplusn edit`."""
    parser.epilog = EXAMPLES
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION", dest="action")
    for name, action in ACTIONS.items():
        sub = actions.add_parser(name, help=action.help, description=action.help)
        action.declare(sub)
        sub.add_argument(
            "--out", type=Path, required=True, help="Folder for the new version; must not exist."
        )


def run(args: argparse.Namespace) -> int:
    """Do what `declare` described; return the exit code.

    Raises:
        AdapterExists: the folder to write is there already.
        OneplusnError: the edit is refused.
    """
    if args.out.exists():
        raise AdapterExists(
            f"{shown(str(args.out))} exists and a version is never overwritten; choose another"
            " folder or remove that one"
        )
    edited = ACTIONS[args.action].run(args)
    write_bundle(edited.result, args.out)
    for line in [*summary(edited.sources, edited.result), *edited.notes]:
        print(line)
    print(f"written to {args.out}, {edited.result.digest}")
    return 0


def _read(path: Path) -> Bundle:
    """Read an adapter; a plain LoRA becomes one task of its folder's name."""
    name = path.resolve().name.lower()
    stem = name if path.is_dir() else name.partition(".")[0]
    return read_adapter(path, name=re.sub(r"[^a-z0-9._-]", "-", stem).lstrip("._-") or "adapter")


def _adapter_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, help="Folder or archive.")


def _declare_drop(parser: argparse.ArgumentParser) -> None:
    _adapter_argument(parser)
    parser.add_argument("task", nargs="+", help="Tasks to take out.")


def _drop(args: argparse.Namespace) -> _Edited:
    source = bundle = _read(args.adapter)
    for task in args.task:
        bundle = drop_task(bundle, task)
    return _Edited([source], bundle)


def _declare_rename(parser: argparse.ArgumentParser) -> None:
    _adapter_argument(parser)
    parser.add_argument("task", help="The task.")
    parser.add_argument("name", help="Its new name.")


def _rename(args: argparse.Namespace) -> _Edited:
    source = _read(args.adapter)
    return _Edited([source], rename_task(source, args.task, args.name))


def _declare_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, nargs="+", help="Folders or archives, two or more.")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="Of all factors; needed where the adapters differ. Tasks whose dtype changes get new"
        " digests.",
    )


def _merge(args: argparse.Namespace) -> _Edited:
    sources = [_read(path) for path in args.adapter]
    merged = merge(sources, dtype=DTYPES.get(args.dtype))
    notes = []
    if merged.base is None:
        notes.append("the base is not recorded, as not every adapter says which it was trained on")
    return _Edited(sources, merged, notes)


def _declare_add(parser: argparse.ArgumentParser) -> None:
    _adapter_argument(parser)
    parser.add_argument("task", help="Name of the new task.")
    _blend_argument(
        parser,
        "What it is, or with --data what it starts from; otherwise it starts from the mean of all"
        " tasks.",
    )
    learned = parser.add_argument_group("learned from examples")
    own = learned.add_mutually_exclusive_group()
    own.add_argument("--rank", type=int, help=f"Of its own expert. Default: {OWN_RANK}.")
    own.add_argument("--gate-only", action="store_true", help="No expert of its own.")
    learned.add_argument(
        "--experts",
        nargs="+",
        metavar="NAME",
        help="Experts it may gate. Default: the common ones, or all with --gate-only.",
    )
    learned.add_argument(
        "--max-experts", type=int, metavar="N", help="Gate at most N of them; learns twice."
    )
    learned.add_argument(
        "--gate-scope",
        choices=("site", "model"),
        default="site",
        help="Change the gates of every site by itself, or of the whole model at once, which has"
        " fewer numbers to learn from few examples. Default: site.",
    )
    _fit_arguments(learned, FIT_HELP, FitSettings())


def _add(args: argparse.Namespace) -> _Edited:
    source = _read(args.adapter)
    check_new_task(source, args.task)
    weights = _blend(args.blend) if args.blend else None
    if args.data is None:
        _refuse_without_data(args, "model", "rank", "gate_only", "experts", "max_experts")
        if weights is None:
            raise InvalidRequest("a task needs --blend, or --data with --model to learn from")
        return _Edited([source], add_task(source, args.task, blended_gates(source, weights)))
    task = NewTask(
        args.task,
        rank=None if args.gate_only else OWN_RANK if args.rank is None else args.rank,
        experts=args.experts,
        max_experts=args.max_experts,
        start=weights,
        gate_scope=args.gate_scope,
    )
    settings = _fit_settings(args)
    base = _Base(args, source)
    learned = learn_task(
        base.model,
        source,
        task,
        base.dataset(args.data, args.task, only=True),
        settings,
        pad_token_id=base.pad_token_id,
    )
    note = f"loss per completion token: {learned.before:.4f} before, {learned.after:.4f} after"
    return _Edited([source], learned.bundle, [note, *gates_of_last(learned.bundle)])


def _declare_distil(parser: argparse.ArgumentParser) -> None:
    _adapter_argument(parser)
    parser.add_argument("task", help="Name of the task that comes out.")
    _blend_argument(parser, "The blend; weight 1 where none is given.", required=True)
    parser.add_argument(
        "--rank", type=int, help="Cut every module to this rank. Default: exact, all ranks."
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="Of the factors. Default: float32."
    )
    closer = parser.add_argument_group("then brought closer on examples, if --data is given")
    names = [name for name in FIT_HELP if name != "gate_learning_rate"]
    _fit_arguments(closer, names, FitSettings(learning_rate=DISTIL_RATE))


def _distil(args: argparse.Namespace) -> _Edited:
    source = _read(args.adapter)
    weights = _blend(args.blend)
    made = distil(source, weights, task=args.task, rank=args.rank, dtype=DTYPES[args.dtype])
    if args.data is None:
        _refuse_without_data(args, "model")
        return _Edited([source], made.bundle, errors_of(made))
    settings = _fit_settings(args)
    base = _Base(args, source)
    refined = refine(
        base.model,
        source,
        weights,
        made,
        base.dataset(args.data, args.task, only=False),
        settings,
        pad_token_id=base.pad_token_id,
    )
    note = (
        f"KL from the blend per completion token: {refined.before:.5f} before,"
        f" {refined.after:.5f} after"
    )
    return _Edited([source], refined.distilled.bundle, [*errors_of(refined.distilled), note])


def _blend_argument(parser: argparse.ArgumentParser, text: str, *, required: bool = False) -> None:
    parser.add_argument(
        "--blend", nargs="+", type=_weighted, metavar="TASK=WEIGHT", required=required, help=text
    )


def _weighted(text: str) -> tuple[str, float]:
    name, separator, number = text.partition("=")
    try:
        return name, float(number) if separator else 1.0
    except ValueError:
        message = f"{text!r}: expected a task and its weight, as sort=0.5"
        raise argparse.ArgumentTypeError(message) from None


def _blend(pairs: Sequence[tuple[str, float]]) -> dict[str, float]:
    weights = dict(pairs)
    if len(weights) < len(pairs):
        raise InvalidRequest("--blend names a task twice; give each once, with its whole weight")
    return weights


def _fit_arguments(
    group: argparse._ArgumentGroup, names: Iterable[str], defaults: FitSettings
) -> None:
    group.add_argument("--data", type=Path, help="Examples: JSONL with task, prompt, completion.")
    group.add_argument("--model", type=Path, help="Folder of the base.")
    group.add_argument("--device", help="As cuda or cpu. Default: cuda where there is one.")
    group.add_argument(
        "--base-dtype", choices=DTYPES, default="float32", help="Of the base. Default: float32."
    )
    for name in names:
        default = getattr(defaults, name)
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(default),
            default=default,
            help=f"{FIT_HELP[name]} Default: {default}.",
        )
    group.add_argument("--no-progress", action="store_true", help="Show no bar.")


def _fit_settings(args: argparse.Namespace) -> FitSettings:
    given = {name: getattr(args, name) for name in FIT_HELP if hasattr(args, name)}
    return FitSettings(**given, progress=not args.no_progress)


def _refuse_without_data(args: argparse.Namespace, *names: str) -> None:
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]
    if given:
        raise InvalidRequest(f"{given[0]} is for learning from examples; give them with --data")


class _Base:
    """The base and its tokenizer, once the adapter is known to belong to it."""

    def __init__(self, args: argparse.Namespace, bundle: Bundle) -> None:
        """Load the model that `--model` names.

        Raises:
            ConfigError: there is none.
            AdapterIncompatible: the adapter was trained on another.
        """
        if args.model is None:
            raise ConfigError("--data needs --model, the folder of the base")
        check_base(bundle, base_fingerprint(args.model))
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            args.model, dtype=DTYPES[args.base_dtype]
        )
        nn.Module.to(self.model, device)

    @property
    def pad_token_id(self) -> int:
        """What fills up shorter sequences; any token will do, as it is masked."""
        return self.tokenizer.pad_token_id or 0

    def dataset(self, path: Path, task: str, *, only: bool) -> TaskDataset:
        """Read the examples of a task, or of any task in its name.

        Raises:
            InvalidRequest: there are none, or one is not an example.
        """
        try:
            found = read_jsonl(path)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        examples = [example for example in found if example.task == task or not only]
        if not examples:
            there = ", ".join(sorted({example.task for example in found})) or "none"
            raise InvalidRequest(
                f"{path} has no example of task {task!r}; it has examples of {shown(there)}"
            )
        return TaskDataset(
            [replace(example, task=task) for example in examples],
            (task,),
            self.tokenizer,
            max_tokens=self.model.config.max_position_embeddings,
        )


ACTIONS: Mapping[str, _Action] = {
    "drop-task": _Action("take tasks out of an adapter", _declare_drop, _drop),
    "rename-task": _Action("give a task another name", _declare_rename, _rename),
    "merge": _Action("put adapters of one base together as one", _declare_merge, _merge),
    "add-task": _Action(
        "add a task: a blend of others, or learned from examples with all else frozen",
        _declare_add,
        _add,
    ),
    "distil": _Action("turn a blend of tasks into one plain LoRA", _declare_distil, _distil),
}
