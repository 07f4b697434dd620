"""Options of a load or a sweep that are right alone and wrong together."""

from __future__ import annotations

import argparse
import os

from oneplusn.loadtest.mistake import Mistake
from oneplusn.loadtest.slo import FORM

KEY_VARIABLE = "ONEPLUSN_API_KEY"
DEFAULT_DURATION_S = 30.0


def check(args: argparse.Namespace) -> None:
    """Fill in what follows from other options of a load or a sweep.

    Raises:
        Mistake: Options do not go together.
    """
    if args.duration is None and args.num_requests is None:
        args.duration = DEFAULT_DURATION_S
    for held, message in _conflicts(args):
        if held:
            raise Mistake(message)
    # What OpenAI's clients call the base address ends where our routes begin.
    args.url = args.url.rstrip("/").removesuffix("/v1")
    if args.api_key is None:
        args.api_key = os.environ.get(KEY_VARIABLE) or None


def _conflicts(args: argparse.Namespace) -> list[tuple[bool, str]]:
    """Return what may not be, and what is said then."""
    kind = args.over[0] if args.over else None
    loops = {"rate": args.rate, "concurrency": args.concurrency}
    fixed = [name for name, value in loops.items() if value is not None]
    is_open = args.rate is not None or kind == "rate"
    return [
        (
            kind in loops and bool(fixed),
            f"--over {kind} varies what --{fixed[0] if fixed else ''} fixes; give one of the two",
        ),
        (
            kind not in loops and len(fixed) != 1,
            "say how much is sent: give one of --rate R and --concurrency N",
        ),
        (
            (args.churn is None) != (args.churn_adapter is None),
            "--churn and --churn-adapter need each other; give both or none",
        ),
        (
            args.concurrency is not None and args.processes > args.concurrency,
            f"--processes {args.processes} is more than the clients of --concurrency "
            f"{args.concurrency}, and some would have none; give at most that many",
        ),
        (
            not is_open and (args.burstiness is not None or args.ramp_to is not None),
            "--burstiness and --ramp-to are of arrivals; give --rate with them",
        ),
        (
            args.ramp_to is not None and args.duration is None,
            "--ramp-to needs an end; give --duration",
        ),
        (
            args.min_goodput is not None and args.slo is None,
            f"--min-goodput needs limits; give --slo {FORM}",
        ),
    ]
