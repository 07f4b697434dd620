"""kill -9 at any point: what was acknowledged is there, and what is there is whole."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

import crashing
from bundles import small_bundle
from crashing import STATES, STEPS
from oneplusn.adapters.registry import Registry
from oneplusn.server.data import check_data
from prepared_bundles import prepared

BLOBS = "oneplusn.adapters.blobs"
ROWS = "oneplusn.adapters.registry_rows"
REGISTRY = "oneplusn.adapters.registry:Registry"
POINTS = {
    "before the image moves": f"{BLOBS}:Blobs.keep_image",
    "before the blob is synced": f"{BLOBS}:sync",
    "before the folder of blobs is synced": f"{BLOBS}:sync@4",
    "in the transaction": f"{ROWS}:add_version",
    "before the commit": f"{ROWS}:set_active",
    "before a commit of a second version": f"{ROWS}:set_active@2",
    "after the commit, unacknowledged": f"{REGISTRY}._read@2",
    "in a rollback": f"{ROWS}:step_back",
    "after a deletion is committed": f"{BLOBS}:Blobs.release",
    "between the note of damage and the move": f"{BLOBS}:Blobs.quarantine",
    "after damaged content is moved": f"{BLOBS}:Blobs.discard",
}
# Whatever changes a disk, and every how manieth of its calls is tried.
SYSCALLS = {
    "write": 1,
    "pwrite64": 3,
    "fsync": 1,
    "fdatasync": 1,
    "rename": 1,
    "unlink": 1,
    "rmdir": 1,
    "ftruncate": 1,
    "mkdir": 1,
    "utimensat": 1,
}
ERRORS = {
    "fsync": "EIO",
    "fdatasync": "EIO",
    "pwrite64": "ENOSPC",
    "rename": "ENOSPC",
    "mkdir": "ENOSPC",
}


class Ended(NamedTuple):
    """How a process came to its end, and the steps that it had acknowledged."""

    code: int
    acknowledged: list[str]


@pytest.fixture(scope="session")
def uploads(tmp_path_factory) -> Path:
    """Two uploads as a worker leaves them, to be copied."""
    folder = tmp_path_factory.mktemp("uploads")
    for seed, name in enumerate(("one", "two")):
        made, out = prepared(small_bundle(tasks=("t",), seed=seed), "a", folder)
        (folder / name).mkdir()
        out.rename(folder / name / "out")
        (folder / name / "prepared.json").write_bytes(msgspec.json.encode(made))
    return folder


def run(uploads: Path, folder: Path, *point: str, under: tuple[str, ...] = ()) -> Ended:
    """Take all steps in a process of its own, until it ends or is killed."""
    shutil.rmtree(folder / "work", ignore_errors=True)
    shutil.copytree(uploads, folder / "work")
    command = [*under, sys.executable, "-P", crashing.__file__, folder / "data", folder / "work"]
    done = subprocess.run([*command, *point], capture_output=True, text=True, timeout=60)
    is_error = any("error=" in argument for argument in under)
    assert done.returncode in (0, -signal.SIGKILL, 1 if is_error else 0), done.stderr
    return Ended(done.returncode, done.stdout.splitlines())


def check(folder: Path, ended: Ended) -> None:
    """Look at what a killed process left."""
    steps = len(ended.acknowledged)
    assert ended.acknowledged == list(STEPS)[:steps]
    registry = Registry(folder / "data", base_name="base")
    try:
        assert crashing.state(registry) in STATES[steps : steps + 2]
        for adapter in registry.adapters():
            for version in adapter.versions:
                if version.corrupt is None:
                    registry.verify(version.digest)
        assert list((folder / "data/incoming").iterdir()) == []
    finally:
        registry.close()
    problems = [found.text for found in check_data(folder / "data") if found.is_problem]
    assert all("put aside" in text for text in problems), problems


def test_without_a_kill_every_step_is_taken(uploads, tmp_path) -> None:
    ended = run(uploads, tmp_path)
    assert ended == (0, list(STEPS))
    check(tmp_path, ended)


@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
def test_a_kill_leaves_the_state_before_or_after(uploads, tmp_path, point) -> None:
    ended = run(uploads, tmp_path, point)
    assert ended.code == -signal.SIGKILL
    check(tmp_path, ended)


def sweep(uploads: Path, folder: Path, syscall: str, what: str) -> int:
    """Let one call after the other fail, until there is no further one; return how many did."""
    log, number = folder / "strace.log", 1
    while True:
        shutil.rmtree(folder / "data", ignore_errors=True)
        inject = f"inject={syscall}:{what}:when={number}"
        under = ("strace", "-qqq", "-o", str(log), "-e", f"trace={syscall}", "-e", inject)
        ended = run(uploads, folder, under=under)
        if (folder / "data/registry.db").exists():
            check(folder, ended)
        else:
            assert ended.acknowledged == []
        if not ended.code and "(INJECTED)" not in log.read_text():
            assert ended.acknowledged == list(STEPS)
            return number - 1
        number += SYSCALLS[syscall]


needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None, reason="needs strace, which fails a system call on demand"
)


@needs_strace
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("syscall", SYSCALLS)
def test_a_kill_at_any_system_call(uploads, tmp_path, syscall) -> None:
    assert sweep(uploads, tmp_path, syscall, "signal=SIGKILL") > 1


@needs_strace
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("syscall", "error"), ERRORS.items())
def test_a_disk_that_fails_at_any_system_call(uploads, tmp_path, syscall, error) -> None:
    """Here the process goes on, and may end with an exception instead of a step."""
    assert sweep(uploads, tmp_path, syscall, f"error={error}") > 1
