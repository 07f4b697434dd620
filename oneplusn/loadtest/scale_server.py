"""The server that the scale benchmark measures, and what it tells of itself."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from oneplusn.loadtest.bench_memory import PROC, family, resident
from oneplusn.loadtest.bench_process import Running, environment, free_port, listening
from oneplusn.loadtest.fixtures import Shape
from oneplusn.loadtest.processes import python

BASE = "base"
PAGE_ROWS, BYTES = 16, 2
GATE_BYTES = 16 * 16 * 4
"""Gates that there is room for, per page."""
TABLES = 16 << 20
"""Bytes of adapter memory for the tables of 1,024 tasks, in models of up to 120 sites."""
METRIC = re.compile(r"^oneplusn_([a-z_]+) ([0-9.e+-]+)$", re.MULTILINE)
CONTENTS = ("blobs", "images")


@dataclass(frozen=True, slots=True)
class Data:
    """A data folder, and what is registered in it."""

    folder: Path
    tasks: int


@dataclass(frozen=True, slots=True)
class Served:
    """A server, and what one can see of it from outside."""

    running: Running
    tasks: int

    @property
    def address(self) -> str:
        """Where it listens."""
        return self.running.address

    def counters(self) -> dict[str, float]:
        """Return the metrics that have no labels, by name."""
        text = httpx.get(f"{self.address}/metrics", timeout=60).text
        return {name: float(value) for name, value in METRIC.findall(text)}

    def memory(self) -> dict[str, int]:
        """Return the PSS in bytes of the API's process, of the engine's and of all others.

        The engine is the largest process that the first one started.
        """
        whole = resident(self.running.pid)["pss"]
        api, *others = (own_pss(pid) for pid in family(self.running.pid))
        engine = max(others, default=0)
        return {"api": api, "engine": engine, "others": whole - api - engine}

    def api_seconds(self) -> float:
        """Return the processor time of the API's process so far."""
        stat = (PROC / str(self.running.pid) / "stat").read_text(encoding="utf-8")
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def own_pss(pid: int, proc: Path = PROC) -> int:
    """Return the PSS of one process in bytes; 0 if it has ended."""
    try:
        text = (proc / str(pid) / "smaps_rollup").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"^Pss: +(\d+) kB", text, re.MULTILINE)
    return 0 if found is None else int(found[1]) * 1024


def page_bytes(shape: Shape) -> int:
    """Return what one page at every site of a model takes in 16 bits, with its gates."""
    size = {name.rpartition(".")[2]: width for name, width in shape.linears.items()}
    groups = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
    total = 0
    for group in groups:
        inputs = sum(size[name][0] for name in group)
        outputs = sum(size[name][1] for name in group)
        total += PAGE_ROWS * (inputs + outputs) * BYTES + GATE_BYTES
    return shape.layers * total


def budget(shape: Shape, pages: int) -> int:
    """Return the adapter memory with so many pages at every site."""
    return TABLES + pages * page_bytes(shape)


@contextmanager
def serving(
    base: Path, data: Data, *, adapter_memory: int, threads: int, context: int, streams: int
) -> Iterator[Served]:
    """Run a server over a data folder.

    Args:
        base: The model.
        data: What is registered.
        adapter_memory: Bytes.
        threads: Of arithmetic.
        context: Most tokens of a sequence.
        streams: Most sequences at once.

    Raises:
        ChildFailed: It ended, or was not ready in time.
    """
    port = free_port()
    command = python("oneplusn.cli", "serve", "--host", "127.0.0.1", "--port", str(port))
    command += ["--threads", str(threads), "--log-level", "warning"]
    command += ["--model", str(base), "--served-model-name", BASE]
    command += ["--max-model-len", str(context), "--max-num-seqs", str(streams)]
    command += ["--data", str(data.folder), "--adapter-memory", str(adapter_memory)]
    log = data.folder.parent / f"{data.folder.name}.log"
    data.folder.mkdir(parents=True, exist_ok=True)
    variables = environment(threads)
    with listening(command, port, variables, ready="/health/ready", log=log) as running:
        yield Served(running, data.tasks)


def twin(data: Data, name: str) -> Data:
    """Return a copy of a data folder for a second server; contents are linked, as none changes."""
    folder = data.folder.parent / name
    if folder.exists():
        shutil.rmtree(folder)

    def link(source: str, target: str) -> None:
        is_content = Path(source).relative_to(data.folder).parts[0] in CONTENTS
        (os.link if is_content else shutil.copy2)(source, target)

    shutil.copytree(data.folder, folder, copy_function=link)
    return Data(folder, data.tasks)


def disk_bytes(folder: Path) -> int:
    """Return what the files in a folder weigh."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def grown(before: Mapping[str, float], after: Mapping[str, float], name: str) -> float:
    """Return by how much a metric has grown; one that was not there began at zero."""
    return after.get(name, 0.0) - before.get(name, 0.0)
