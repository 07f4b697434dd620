"""Load a server over HTTP and measure it: any server that speaks OpenAI's routes."""

from __future__ import annotations

import argparse
import sys

import httpx

from oneplusn.loadtest import load_report, options
from oneplusn.loadtest.checks import check
from oneplusn.loadtest.job import Composer as Composer
from oneplusn.loadtest.measure import EXIT_FAILED, find, measure, status
from oneplusn.loadtest.mistake import Mistake
from oneplusn.loadtest.processes import ChildFailed
from oneplusn.loadtest.stream import LoadFailed

EXIT_MISTAKE = 2

declare = options.declare


def run(args: argparse.Namespace) -> int:
    """Run `oneplusn loadtest`; return the exit status."""
    try:
        return _run(args)
    except ChildFailed as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return EXIT_FAILED
    except (Mistake, LoadFailed, OSError, httpx.HTTPError) as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return EXIT_MISTAKE


def _run(args: argparse.Namespace) -> int:
    """Run a verb; those that need more libraries bring them when they are chosen."""
    if args.verb == "compare":
        from oneplusn.loadtest import compare

        return compare.run(args)
    check(args)
    if args.verb == "sweep":
        from oneplusn.loadtest import sweep

        return sweep.run(args)
    report, outcome = measure(args, target := find(args))
    if args.out:
        load_report.write(args.out, report, outcome, target.churn)
    print(load_report.render(report))
    return status(args, report)
