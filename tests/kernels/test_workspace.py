"""What the kernels share: one copy of the plan per step, buffers that stay where they are."""

from __future__ import annotations

import pytest
import torch

from oneplusn.kernels.device_plan import DevicePlan, pack
from oneplusn.kernels.plan import build_plan
from oneplusn.kernels.workspace import Scratch, Workspace
from site_builder import Cluster, build_world

SLOTS = build_world([Cluster((4,), ((3,), (20,)))]).slots


def staged(rows: int) -> DevicePlan:
    return pack(build_plan([1] * rows, SLOTS))


def scratch(workspace: Workspace, rows: int, *, dtype: torch.dtype = torch.float32) -> Scratch:
    return workspace.scratch(staged(rows), slices=2, splits=3, dtype=dtype)


def test_a_plan_is_copied_once_for_all_sites() -> None:
    workspace = Workspace("cpu")
    first, second = build_plan([1, 0], SLOTS), build_plan([2, 2], SLOTS)
    assert workspace.stage(first) is workspace.stage(first)
    assert workspace.stage(second).slots[:2].tolist() == [2, 2]


def test_a_smaller_step_gets_the_same_buffers() -> None:
    workspace = Workspace("cpu")
    large = scratch(workspace, 600)
    small = scratch(workspace, 3)
    assert [t.data_ptr() for t in small] == [t.data_ptr() for t in large]
    assert scratch(workspace, 3, dtype=torch.bfloat16).h.dtype == torch.bfloat16


def test_control_words_are_zero_however_large() -> None:
    assert not scratch(Workspace("cpu"), 5_000).control.any()


def test_nothing_grows_once_a_graph_holds_the_addresses() -> None:
    workspace = Workspace("cpu")
    scratch(workspace, 40)
    workspace.freeze()
    scratch(workspace, 40)
    with pytest.raises(AssertionError, match="has to grow"):
        scratch(workspace, 5_000)
