"""The options of `oneplusn loadtest` and of the benchmarks, checked before anything is sent."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from oneplusn.loadtest.checks import DEFAULT_DURATION_S, KEY_VARIABLE
from oneplusn.loadtest.dialects import DIALECTS
from oneplusn.loadtest.examples import (
    ABOUT,
    COMPARE_EXAMPLES,
    EXAMPLES,
    LOAD_EXAMPLES,
    SWEEP_EXAMPLES,
)
from oneplusn.loadtest.fixtures import SHAPES
from oneplusn.loadtest.slo import FORM, TIMES, Bound, Slo
from oneplusn.loadtest.values import (
    SWEPT,
    above_0,
    an_object,
    at_least_0,
    churn_adapter,
    names,
    read,
    share,
    swept,
    whole,
    whole_or_0,
)
from oneplusn.loadtest.workload import LENGTHS, POPULARITIES, Length, Popularity

DEFAULT_TIMEOUT_S = 600.0


class _Verbs(argparse._SubParsersAction):  # type: ignore[type-arg]  # generic in stubs only
    """Takes an address where a verb is expected for `load ADDRESS`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - argparse's own
        super().__init__(*args, **kwargs)
        self.choices = None  # type: ignore[assignment]  # an address is none of the verbs

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Parse the rest as the verb's options."""
        assert values
        words = list(values)
        if ":" in words[0]:
            words.insert(0, "load")
        elif words[0] not in self._name_parser_map:
            verbs = ", ".join(self._name_parser_map)
            parser.error(
                f"{words[0]!r} is neither an address nor one of {verbs}; "
                "begin with one, as in http://127.0.0.1:8000 --rate 5"
            )
        super().__call__(parser, namespace, words, option_string)


Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare every verb with its options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = ABOUT, EXAMPLES
    verbs = parser.add_subparsers(
        title="verbs", dest="verb", required=True, metavar="URL | VERB", action=_Verbs
    )
    load = _verb(verbs, "load", "send one load", LOAD_EXAMPLES)
    load.prog = parser.prog
    _declare_load(load)
    _declare_churn(load)
    load.set_defaults(over=None)
    sweep = _verb(verbs, "sweep", "send a load for each of several values", SWEEP_EXAMPLES)
    sweep.add_argument(
        "--over",
        type=swept,
        required=True,
        metavar="NAME=V1,V2,...",
        help=f"What varies, and its values: {', '.join(SWEPT)}.",
    )
    _declare_load(sweep)
    sweep.set_defaults(churn=None, churn_adapter=None)
    _declare_compare(_verb(verbs, "compare", "say what differs between reports", COMPARE_EXAMPLES))


def _verb(verbs: Verbs, name: str, about: str, examples: str) -> argparse.ArgumentParser:
    return verbs.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


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


def _declare_load(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="The server, as http://127.0.0.1:8000.")
    _declare_amount(parser)
    _declare_requests(parser)
    _declare_judgement(parser)
    _declare_rest(parser)


def _declare_amount(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how much")
    add = group.add_argument
    add(
        "--rate",
        type=above_0,
        metavar="R",
        help="Requests per second, sent when they are due however many are unanswered (open loop).",
    )
    add(
        "--concurrency",
        type=whole,
        metavar="N",
        help="Clients that send the next request once they have their answer (closed loop).",
    )
    add(
        "--burstiness",
        type=above_0,
        metavar="B",
        help="Shape of the gamma distribution of gaps between arrivals: 1 is a Poisson process, "
        "less comes in bursts, more evenly. Default: 1.",
    )
    add(
        "--ramp-to",
        type=above_0,
        metavar="R",
        help="Let the rate grow or fall evenly to this one until the end of --duration.",
    )
    add(
        "--duration",
        type=above_0,
        metavar="S",
        help=f"Seconds of sending. Default: {DEFAULT_DURATION_S:g}, without --num-requests.",
    )
    add("--num-requests", type=whole, metavar="N", help="Requests after which it ends.")
    add(
        "--warmup",
        type=at_least_0,
        default=0.0,
        metavar="S",
        help="Seconds of the same load before anything counts. Default: 0.",
    )
    add(
        "--processes",
        type=whole,
        default=1,
        metavar="N",
        help="Client processes among which the load is shared. Default: 1.",
    )


def _declare_requests(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what")
    add = group.add_argument
    add(
        "--tasks",
        "--model",
        type=names,
        metavar="NAME,...",
        help="Tasks, adapters or models to ask. Default: what /v1/models lists.",
    )
    add(
        "--popularity",
        type=read(Popularity.parse),
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
            type=read(Length.parse),
            default=Length.parse(default),
            metavar="LENGTH",
            help=f"{', '.join(LENGTHS)}. Default: {default}.",
        )
    add(
        "--prompts",
        "--trace",
        type=Path,
        metavar="FILE",
        help="JSON lines, each with prompt, messages or input_tokens, and optionally output_tokens "
        "and task.",
    )
    add("--extra-body", type=an_object, default={}, metavar="JSON", help="Added to every request.")
    add("--seed", type=int, default=0, help="Of times, tasks, lengths and texts. Default: 0.")


def _declare_churn(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("adapters that change meanwhile")
    group.add_argument("--churn", type=above_0, metavar="SWAPS_PER_S", help="Uploads per second.")
    group.add_argument(
        "--churn-adapter",
        type=churn_adapter,
        metavar="NAME=DIR_A,DIR_B",
        help="The adapter, and its two versions that replace each other.",
    )


def _declare_judgement(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is good enough")
    group.add_argument(
        "--slo",
        type=read(Slo.parse),
        metavar="LIMITS",
        help=f"Most time of each of {', '.join(TIMES)}, as {FORM}; itl is the longest wait between "
        "two tokens of an answer, tpot the mean.",
    )
    group.add_argument(
        "--min-goodput",
        type=read(Bound.parse),
        metavar="BOUND",
        help="Exit status 3 if fewer requests meet --slo: 95%%, or 4/s.",
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
        type=above_0,
        default=DEFAULT_TIMEOUT_S,
        metavar="S",
        help=f"Seconds that an answer may take. Default: {DEFAULT_TIMEOUT_S:g}.",
    )
    add(
        "--retries",
        type=whole_or_0,
        default=0,
        metavar="N",
        help="Send again after Retry-After, up to N times; the time goes on. Default: 0.",
    )
    add("--out", type=Path, metavar="DIR", help="Write the report as JSON, Markdown and HTML.")
    add("--quiet", action="store_true", help="Show no progress.")


def _declare_compare(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "reports",
        type=Path,
        nargs="+",
        metavar="REPORT",
        help="Folders that --out wrote, or the report.json in them; the first is compared with.",
    )
    add(
        "--least",
        type=share,
        default=0.02,
        metavar="SHARE",
        help="A difference that may be less than this is called none: 2%% or 0.02. Default: 2%%.",
    )
    add("--force", action="store_true", help="Compare although different loads were sent.")
    add("--out", type=Path, metavar="DIR", help="Write the comparison as JSON, Markdown and HTML.")
