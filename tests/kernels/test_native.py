"""The compiled kernel of the CPU: the formula, the same bits in any company, how it is built."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from delta_batches import (
    FULL_PAGES,
    NO_OWN,
    PLAIN,
    SHARED_PAGE,
    Batch,
    batches,
    check,
    equal_bits,
    fixed_batch,
)
from oneplusn.kernels import cpu_native, native
from oneplusn.kernels.cpu_step import TASK_ROWS
from oneplusn.kernels.plan import Planner, SlotInfo, build_plan
from site_builder import Cluster

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def deltas(batch: Batch, row_slots: Sequence[int], x: torch.Tensor) -> torch.Tensor:
    """Return the deltas `[T, N]` of some rows in the world of a batch."""
    spec = batch.world.site.spec
    whole = torch.empty(len(row_slots), spec.out_features, dtype=x.dtype)
    plan = build_plan(row_slots, batch.world.slots)
    ys = list(whole.split(spec.slices, dim=1))
    cpu_native.gated_delta(ys, x, batch.world.site, plan, into="delta")
    return whole


@settings(max_examples=100)
@given(batch=batches(torch.float32))
def test_it_is_the_formula_in_fp32(batch: Batch) -> None:
    check(cpu_native.gated_delta, batch, torch.float32)


@settings(max_examples=60)
@given(batch=batches(torch.bfloat16))
def test_it_is_the_formula_in_bf16(batch: Batch) -> None:
    check(cpu_native.gated_delta, batch, torch.bfloat16)


@pytest.mark.parametrize("width", [1, 31, 32, 33, 127, 128, 129, 300])
@DTYPES
def test_widths_around_those_of_a_vector_and_a_block(width: int, dtype: torch.dtype) -> None:
    batch = fixed_batch([FULL_PAGES, NO_OWN], [1, 2, 0, 3], dtype, slices=(width, 5, width))
    check(cpu_native.gated_delta, batch, dtype)


@DTYPES
def test_long_tasks_go_run_by_run_beside_the_short_ones(dtype: torch.dtype) -> None:
    row_slots = [2, 3, 1, 4, 0] + [3] * TASK_ROWS + [1, 2]
    check(cpu_native.gated_delta, fixed_batch([FULL_PAGES, PLAIN, NO_OWN], row_slots, dtype), dtype)


@DTYPES
@settings(max_examples=30)
@given(data=batches(torch.float32, max_rows=24))
def test_a_row_has_the_same_bits_alone_and_in_any_batch(data: Batch, dtype: torch.dtype) -> None:
    shape = [FULL_PAGES, SHARED_PAGE, PLAIN]
    slots = [slot % 8 for slot in data.row_slots]
    batch = fixed_batch(shape, slots, dtype, slices=(48, 130))
    together = deltas(batch, slots, batch.x)
    for row, slot in enumerate(slots):
        alone = deltas(batch, [slot], batch.x[row : row + 1])
        assert equal_bits(together[row : row + 1], alone)


@DTYPES
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    shape = [Cluster((16, 16), ((64,), (64,))), PLAIN]
    batch = fixed_batch(shape, [1, 2, 3, 0, 1], dtype, slices=(700, 300))
    results = []
    for threads in (1, 2):
        native.use_threads(threads)
        try:
            results.append(deltas(batch, batch.row_slots, batch.x))
        finally:
            native.use_threads(1)
    assert equal_bits(*results)


def test_what_was_packed_for_nobody_is_not_there() -> None:
    batch = fixed_batch([FULL_PAGES, PLAIN], [1, 2, 3], torch.bfloat16)
    deltas(batch, batch.row_slots, batch.x)
    assert batch.world.site.slabs.builds == 0


@pytest.fixture
def _building(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Build into an empty cache, and forget what was built."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.loaded.cache_clear()
    yield
    native.loaded.cache_clear()


@pytest.mark.usefixtures("_building")
def test_it_is_compiled_once(tmp_path: Path) -> None:
    assert native.loaded() is not None
    (made,) = (tmp_path / "oneplusn").iterdir()
    before = made.stat()
    native.loaded.cache_clear()

    assert native.loaded() is not None
    assert [path.stat() for path in (tmp_path / "oneplusn").iterdir()] == [before]


@pytest.mark.usefixtures("_building")
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        pytest.param("#!/bin/sh\necho 'no such flag' >&2; exit 1\n", "no such flag", id="it fails"),
        pytest.param("#!/bin/sh\nexit 0\n", "No such file", id="it makes nothing"),
        pytest.param(None, "No such file", id="it is not there"),
    ],
)
def test_a_compiler_that_fails_is_logged_and_leaves_nothing(
    compiler: str | None,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    script = tmp_path / "cxx"
    if compiler is not None:
        script.write_text(compiler)
        script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with caplog.at_level(logging.WARNING):
        assert native.loaded() is None
    assert reason in caplog.text
    folder = tmp_path / "oneplusn"
    assert not folder.exists() or not list(folder.iterdir())


@pytest.mark.usefixtures("_building")
def test_without_a_compiler_the_log_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with caplog.at_level(logging.INFO):
        assert native.loaded() is None
    assert "install g++" in caplog.text


def num_calls(work: Callable[[], object]) -> int:
    """Count the calls, of Python's functions and of C's, that some work makes."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def lone_tasks(count: int) -> dict[int, SlotInfo]:
    """Return slots of so many tasks, each of an adapter of its own."""
    return {
        index: SlotInfo(f"{index:05}/t", (f"{index:05}",), (index,), ((f"{index:05}", 0),), (1,))
        for index in range(1, count + 1)
    }


class TestTheHostsWorkOfAStep:
    """Counted, not timed: what a plan and its arrays take must not grow with what is resident."""

    ROWS = 64

    def calls(self, resident: int, rows: int) -> int:
        planner, arguments = Planner(lone_tasks(resident)), native.Arguments()
        batch = list(range(resident, resident - rows, -1))
        return num_calls(lambda: arguments.step(planner.plan(batch)))

    def test_it_depends_on_the_rows_and_not_on_what_is_resident(self) -> None:
        calls = self.calls(self.ROWS, self.ROWS)

        assert self.calls(4096, self.ROWS) < calls + self.ROWS / 2
        assert calls < 12 * self.ROWS

    def test_a_step_like_the_one_before_looks_once_at_every_slot(self) -> None:
        planner, arguments = Planner(lone_tasks(4096)), native.Arguments()
        batch = list(range(1, self.ROWS + 1))
        first = arguments.step(planner.plan(batch))

        assert num_calls(lambda: arguments.step(planner.plan(batch))) < 4 * self.ROWS
        assert arguments.step(planner.plan(batch)) is first

    def test_the_kernel_reads_no_tiles_so_none_are_cut(self) -> None:
        planner, arguments = Planner(lone_tasks(4096)), native.Arguments()
        plan = planner.plan([1, 2, 2, 0, 4096])
        arguments.step(plan)

        assert "_tiles" not in vars(plan)

    def test_another_version_in_the_same_slot_is_another_step(self) -> None:
        slots = lone_tasks(3)
        arguments = native.Arguments()
        first = arguments.step(build_plan([1, 2], slots))
        slots[2] = SlotInfo("other/t", ("other",), (7,), (("other", 0),), (1,))

        assert arguments.step(build_plan([1, 2], slots)) is not first
