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
from functools import cache
from pathlib import Path

import numpy as np

from oneplusn.kernels.cpu_step import Step, Uses
from oneplusn.kernels.plan import IntArray, Site

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("csrc")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-Wno-psabi")
COMPILE_S = 120.0
"""Seconds after which a compiler is given up."""
SITE_ARRAYS = ("run_first", "run_rows", "gate_first", "gates")
"""Arrays of a `SiteTable` that the kernel reads, in its order."""
ATTENTION_ARRAYS = ("block_tables", "context_lens", "sinks")
"""What attention reads besides queries, keys and values."""


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
    """`Step` of the source: which row uses which run."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in Uses._fields),
        *((name, ctypes.c_int32) for name in ("num_runs", "num_rows", "num_clusters", "num_uses")),
    )


class AttentionArguments(ctypes.Structure):
    """`Attention` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", *ATTENTION_ARRAYS)),
        *(
            (name, ctypes.c_int64)
            for name in ("q_row_stride", "q_head_stride", "tokens", "table_stride")
        ),
        *(
            (name, ctypes.c_int32)
            for name in ("rows", "kv_heads", "group", "k_dim", "v_dim", "block_size", "window")
        ),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    )


_address, _int, _long, _float = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
SIGNATURES = {
    "oneplusn_delta": [
        ctypes.POINTER(SiteArguments),
        ctypes.POINTER(StepArguments),
        *(_int, _address, _long),
        *(ctypes.POINTER(_address), ctypes.POINTER(_long), _int),
    ],
    "oneplusn_attention": [ctypes.POINTER(AttentionArguments), _int, _int],
    "oneplusn_write_cache": [_address, _address, _address, *[_int] * 4, *[_long] * 3],
    "oneplusn_rms_norm": [*[_address] * 4, _int, _long, _long, _float, _int],
    "oneplusn_rotate": [
        *(_address, _long, *[_address] * 4),
        *(_int, _long, _int, _int, _long, _float, _int),
    ],
    "oneplusn_silu_mul": [_address, _address, _int, _long, _long, _int],
}
"""Arguments of every function of the library; none returns anything."""


class Arguments:
    """What the compiled kernel is called with: addresses, looked up once; shared by a pool."""

    def __init__(self) -> None:
        self._sites: dict[Site, tuple[SiteArguments, IntArray]] = {}
        self._step: tuple[Step, StepArguments] | None = None

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

    def step(self, step: Step) -> StepArguments:
        """Return the addresses of a step's pairs; made once per step, not once per site."""
        if self._step is None or self._step[0] is not step:
            uses = step.uses
            counts = (len(uses.runs), len(uses.rows), len(uses.clusters) - 1, len(uses.use_row))
            addresses = [array.ctypes.data for array in uses]
            self._step = step, StepArguments(*addresses, *counts)
        return self._step[1]


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
            _output([compiler, *FLAGS, "-o", str(made), *map(str, sorted(SOURCES.glob("*.cpp")))])
            made.replace(target)
    return target


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
