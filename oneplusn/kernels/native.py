"""Build and load the compiled kernels of the CPU, where a C++ compiler is at hand.

The source lies beside this file; it is compiled for this machine's processor in some seconds
when it is first used, and kept in the user's cache under a name that holds everything it depends
on. `ONEPLUSN_KERNELS=torch` does without.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch

from oneplusn.kernels.plan import IntArray, Plan, Site

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("csrc")
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fPIC", "-pthread", "-Wno-psabi")
COMPILE_S = 120.0
"""Seconds after which a compiler is given up."""
SITE_ARRAYS = ("run_first", "run_rows", "gate_first", "gates")
"""Arrays of a `SiteTable` that the kernel reads, in its order."""
STEP_ARRAYS = (
    *("rows", "segment_rows", "segment_uses", "slots"),
    *("clusters", "use_run", "use_k", "by_key"),
)


Library = ctypes.CDLL


class SiteArguments(ctypes.Structure):
    """`Site` of the source: where pages and tables of one site lie."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", *SITE_ARRAYS, "bounds")),
        ("width", ctypes.c_int64),
        ("slices", ctypes.c_int32),
        ("max_runs", ctypes.c_int32),
    )


class StepArguments(ctypes.Structure):
    """`Step` of the source: which rows use which runs."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in STEP_ARRAYS),
        *((name, ctypes.c_int32) for name in ("segments", "num_clusters", "uses")),
    )


_address, _int, _long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
SIGNATURES = {
    "oneplusn_delta": [*[_address] * 2, _int, _address, _long, *[_address] * 2, _int],
    "oneplusn_attention": [_address, _int, _int],
    "oneplusn_write_cache": [*[_address] * 3, _int, _long, _int, _int, *[_long] * 3],
    "oneplusn_pack_linear": [_address, _address, _int, _long, _long],
    "oneplusn_pack_int8_linear": [_address, _address, _long, _long],
    "oneplusn_linear": [_address, _int, _address, _long, _address, _long, _long, _int],
    "oneplusn_draw": [_address, _int],
    "oneplusn_layers": [_address, _long, _address, _address, _int, _address, _int],
}
"""Arguments of every function of the library; none returns anything."""


class Arguments:
    """What the compiled kernel is called with: addresses, looked up once; shared by a pool."""

    def __init__(self) -> None:
        self._sites: dict[Site, tuple[SiteArguments, IntArray]] = {}
        self._plan: Plan | None = None
        self._step = StepArguments()
        self._composition: object = None
        self._arrays: list[IntArray] = []

    def site(self, site: Site) -> SiteArguments:
        """Return the addresses of a site; its arrays stay where they are as long as it lives."""
        if site not in self._sites:
            bounds = np.array(site.spec.bounds, dtype=np.int32)
            table = site.table
            arrays = [site.a, site.b, *(getattr(table, name) for name in SITE_ARRAYS)]
            assert all(array.is_contiguous() for array in arrays), site.spec
            self._sites[site] = (
                SiteArguments(
                    *[array.data_ptr() for array in arrays],
                    bounds.ctypes.data,
                    site.spec.in_features,
                    site.spec.num_slices,
                    table.gate_first.shape[1],
                ),
                bounds,
            )
        return self._sites[site][0]

    def step(self, plan: Plan) -> StepArguments:
        """Return the addresses of a plan's rows and uses; made when the composition changes."""
        if plan is not self._plan:
            composition = (plan.segments, plan.infos, plan.rows.tobytes())
            if composition != self._composition:
                self._arrays = _step_arrays(plan)
                counts = (len(plan.segments), len(plan.clusters), len(self._arrays[-1]))
                self._step = StepArguments(*[a.ctypes.data for a in self._arrays], *counts)
                self._composition = composition
            self._plan = plan
        return self._step


def _step_arrays(plan: Plan) -> list[IntArray]:
    """Write a plan as the arrays of STEP_ARRAYS."""
    stops = [0, *(segment.stop for segment in plan.segments)]
    places = {stop: place for place, stop in enumerate(stops)}
    clusters = [0, *(places[stop] for _, stop in plan.clusters)]
    bounds = [0, *accumulate(len(info.uses) for info in plan.infos)]
    uses = [use for info in plan.infos for use in info.uses]
    keys = [info.run_keys[k] for info in plan.infos for _, k in info.uses]
    by_key = list[int]()
    for first, last in pairwise(clusters):
        mine = range(bounds[first], bounds[last])
        # The uses of one segment are in this order already.
        by_key += mine if last - first == 1 else sorted(mine, key=keys.__getitem__)
    lists = (
        *(stops, bounds, [segment.slot for segment in plan.segments], clusters),
        *([run for run, _ in uses], [k for _, k in uses], by_key),
    )
    return [plan.rows, *(np.array(values, dtype=np.int32) for values in lists)]


class _Threads:
    """How many threads the kernels compute with, in this process; bits do not depend on it."""

    count = 1


def use_threads(count: int) -> None:
    """Compute with so many threads from now on, in this process.

    Where the kernels are compiled, torch is left with one: two teams of threads that wait for
    work by spinning would keep the cores from each other.
    """
    from oneplusn.kernels import ops  # which asks for the library in its turn

    _Threads.count = count
    torch.set_num_threads(1 if ops.compiled() else count)


def threads() -> int:
    """Return how many threads the kernels compute with."""
    return _Threads.count


def required() -> Library:
    """Return the compiled kernels, for those who were chosen because they are there."""
    found = loaded()
    assert found is not None, "chosen without compiled kernels"
    return found


@cache
def loaded() -> Library | None:
    """Return the compiled kernels; None, with the reason logged once, where there are none."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        logger.info("no C++ compiler: the CPU computes the slower way; install g++ to change it")
        return None
    try:
        opened = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        logger.warning("compiling the CPU's kernels failed, going the slower way: %s", detail)
        return None
    for name, types in SIGNATURES.items():
        function = getattr(opened, name)
        function.restype, function.argtypes = None, types
    return opened


def _built(compiler: str) -> Path:
    """Return the library for this source, compiler and processor; compile it if it is not there.

    Raises:
        OSError: The cache cannot be written, or the compiler not started.
        subprocess.SubprocessError: The compiler fails, or takes too long.
    """
    version = _output([compiler, "--version"])
    texts = [path.read_text("utf-8") for path in sorted(SOURCES.iterdir())]
    identity = "\n".join([*texts, *FLAGS, version, _processor()])
    target = _cache_folder() / f"kernels-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            _compile(compiler, made)
            made.replace(target)
    return target


def _compile(compiler: str, made: Path) -> None:
    """Compile every source at once, and link them."""
    sources = {made.with_name(f"{path.stem}.o"): path for path in sorted(SOURCES.glob("*.cpp"))}
    commands = [
        [compiler, *FLAGS, "-c", "-o", str(part), str(source)] for part, source in sources.items()
    ]
    with ThreadPoolExecutor(len(commands)) as threads:
        list(threads.map(_output, commands))
    _output([compiler, "-shared", "-pthread", "-o", str(made), *map(str, sources)])


def _output(command: list[str]) -> str:
    done = subprocess.run(  # noqa: S603 (the user's compiler on our own source)
        command, check=True, capture_output=True, text=True, timeout=COMPILE_S
    )
    return done.stdout


def _processor() -> str:
    """Describe what `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _cache_folder() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "oneplusn"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder
