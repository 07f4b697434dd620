"""Run a grid of trainings, one process at a time or several, and keep what is done.

Every finished run is one JSON line of the results file, so an interrupted grid goes on where it
was. Each process has one thread and takes a few runs, as starting one costs as much as half a run.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from experiments.bed import make_base
from experiments.run import Outcome, Run

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "experiments"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def read_results(path: Path) -> dict[str, Outcome]:
    """Read a results file: key of the run -> outcome."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    outcomes = (Outcome.from_json(line) for line in lines)
    return {outcome.run.key: outcome for outcome in outcomes}


class Grid:
    """Runs what a results file lacks.

    Attributes:
        results: The file; read at the start, appended to.
        base: Folder of the base model.
        jobs: Processes at a time.
        chunk: Runs a process takes.
        prefix: Words before each command, as `nice -n 10`.
        done: Key of a run -> its outcome.
    """

    def __init__(
        self, results: Path, base: Path, *, jobs: int = 1, chunk: int = 6, prefix: str = ""
    ) -> None:
        self.results = results
        self.base = base
        self.jobs = jobs
        self.chunk = chunk
        self.prefix = shlex.split(prefix)
        self._write = threading.Lock()
        self.done = read_results(results)

    def run(self, runs: Sequence[Run], label: str) -> None:
        """Run those that are not done yet.

        Raises:
            RuntimeError: A process failed; what the others finished is kept.
        """
        missing = [run for key, run in {r.key: r for r in runs}.items() if key not in self.done]
        chunks: queue.SimpleQueue[list[Run]] = queue.SimpleQueue()
        rest = iter(missing)
        while chunk := list(islice(rest, self.chunk)):
            chunks.put(chunk)
        with tqdm(total=len(missing), desc=label, unit="run", dynamic_ncols=True) as bar:
            workers = [
                threading.Thread(target=self._work, args=(chunks, bar)) for _ in range(self.jobs)
            ]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        lost = [run for run in missing if run.key not in self.done]
        if lost:
            raise RuntimeError(f"{len(lost)} of {len(missing)} runs failed, the first: {lost[0]}")

    def _work(self, chunks: queue.SimpleQueue[list[Run]], bar: tqdm[None]) -> None:
        while True:
            try:
                chunk = chunks.get_nowait()
            except queue.Empty:
                return
            text = json.dumps([asdict(run) for run in chunk])
            for line in self.process("experiments.run", ["--base", str(self.base)], text):
                outcome = Outcome.from_json(line)
                with self._write:
                    self.done[outcome.run.key] = outcome
                    with self.results.open("a", encoding="utf-8") as file:
                        file.write(line)
                    bar.update()

    def process(
        self, module: str, arguments: Sequence[str], standard_input: str = ""
    ) -> Iterator[str]:
        """Yield the lines that a module prints, run as a process; the rest goes to a log."""
        command = [*self.prefix, sys.executable, "-m", module, *arguments]
        with (self.base.parent / "runs.log").open("a", encoding="utf-8") as log:
            process = subprocess.Popen(  # noqa: S603 - our own module
                command,
                cwd=ROOT,
                env=os.environ | ONE_THREAD | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(standard_input)
            process.stdin.close()
            yield from process.stdout
            process.wait()


class Rates(NamedTuple):
    """Peak learning rates of one training."""

    experts: float
    gates: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Hold the settings of an experiment, and what they are tuned over.

    Attributes:
        name: Of the experiment, for the progress bar.
        settings: Runs whose rates and seed are replaced.
        grid: Rates to choose from, the same for every setting; one that has no gates takes each
            rate of the experts once.
        seeds: Of the tasks, the data and the training.
        tuned_on: How many of the seeds, from the first, every pair of rates is run with. The
            others are run with the pair that is chosen.
    """

    name: str
    settings: Sequence[Run]
    grid: Sequence[Rates]
    seeds: Sequence[int]
    tuned_on: int

    def choices(self, setting: Run) -> list[Rates]:
        """List the pairs of rates that a setting is tried with."""
        if setting.has_gates:
            return list(self.grid)
        return [rates for rates in self.grid if rates.gates == self.grid[0].gates]

    def runs(self, setting: Run, rates: Rates, seeds: Sequence[int]) -> list[Run]:
        """List a setting at one pair of rates."""
        return [setting.at(*rates, seed) for seed in seeds]

    def execute(self, grid: Grid, only: str = "") -> None:
        """Run what is missing of the settings whose label matches a pattern."""
        chosen = [each for each in self.settings if re.search(only, each.label)]
        first = self.seeds[: self.tuned_on]
        tried = [self.runs(each, rates, first) for each in chosen for rates in self.choices(each)]
        grid.run([run for runs in tried for run in runs], f"{self.name}, rates")
        best = [self.runs(each, self.best(grid, each), self.seeds) for each in chosen]
        grid.run([run for runs in best for run in runs], f"{self.name}, seeds")

    def best(self, grid: Grid, setting: Run) -> Rates:
        """Return the rates whose validation accuracy is best in the mean over the first seeds."""

        def score(rates: Rates) -> float:
            runs = self.runs(setting, rates, self.seeds[: self.tuned_on])
            return sum(grid.done[run.key].chosen_by for run in runs)

        return max(self.choices(setting), key=score)

    def finished(self, grid: Grid) -> tuple[list[Outcome], list[Outcome]]:
        """Return the outcomes of the settings that are complete.

        Returns:
            One outcome per setting and seed, all of a setting at its best rates; and those of all
            rates, of the seeds that these were chosen by.
        """
        best: list[Outcome] = []
        tried: list[Outcome] = []
        first = self.seeds[: self.tuned_on]
        for setting in self.settings:
            runs = [
                run for rates in self.choices(setting) for run in self.runs(setting, rates, first)
            ]
            if any(run.key not in grid.done for run in runs):
                continue
            chosen = self.runs(setting, self.best(grid, setting), self.seeds)
            if all(run.key in grid.done for run in chosen):
                best += [grid.done[run.key] for run in chosen]
                tried += [grid.done[run.key] for run in runs]
        return best, tried


def main(
    experiment: str, run: Callable[[Grid, argparse.Namespace], None], text: str | None
) -> None:
    """Parse the command line that all experiments share, and run one of them."""
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{experiment}", description=text)
    build = ROOT / "build" / "experiments"
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread at a time")
    parser.add_argument("--chunk", type=int, default=6, help="runs a process takes")
    parser.add_argument("--prefix", default="", help="words before each command")
    parser.add_argument("--base", type=Path, default=build / "base", help="made when absent")
    parser.add_argument("--results", type=Path, help="JSON lines, read and appended to")
    parser.add_argument("--only", default="", help="pattern of the labels to run")
    parser.add_argument("--quick", action="store_true", help="few points and one seed, elsewhere")
    args = parser.parse_args()
    folder = build / "quick" if args.quick else DOCS
    results = args.results or folder / f"{experiment}.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    base = make_base(args.base)
    run(Grid(results, base, jobs=args.jobs, chunk=args.chunk, prefix=args.prefix), args)
