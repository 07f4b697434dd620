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


@dataclass(frozen=True, slots=True)
class Plan:
    """Hold the settings of an experiment, each to be run with every rate and seed.

    Attributes:
        name: Of the experiment, for the progress bar.
        settings: Runs whose rate and seed are replaced.
        rates: To choose from, the same for every setting.
        seeds: Of the tasks, the data and the training.
    """

    name: str
    settings: Sequence[Run]
    rates: Sequence[float]
    seeds: Sequence[int]

    def runs(self, setting: Run, rate: float) -> list[Run]:
        """List a setting at one rate with every seed."""
        return [setting.at(rate, seed) for seed in self.seeds]

    def execute(self, grid: Grid, only: str = "") -> None:
        """Run what is missing of the settings whose label matches a pattern."""
        chosen = [each for each in self.settings if re.search(only, each.label)]
        runs = [run for each in chosen for rate in self.rates for run in self.runs(each, rate)]
        grid.run(runs, self.name)

    def finished(self, grid: Grid) -> tuple[list[Outcome], list[Outcome]]:
        """Return the outcomes of the settings that are complete.

        Returns:
            One outcome per setting and seed, all of a setting at the rate whose accuracy on the
            validation split is best in the mean over the seeds; and those of all rates.
        """
        best: list[Outcome] = []
        tried: list[Outcome] = []
        for setting in self.settings:
            rates = [self.runs(setting, rate) for rate in self.rates]
            if all(run.key in grid.done for runs in rates for run in runs):
                found = [[grid.done[run.key] for run in runs] for runs in rates]
                best += max(found, key=lambda outcomes: sum(o.chosen_by for o in outcomes))
                tried += [outcome for outcomes in found for outcome in outcomes]
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
