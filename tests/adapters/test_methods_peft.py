"""Poly and MHR against the layer of the real `peft`."""

from __future__ import annotations

import pytest
import torch
from peft import PolyConfig
from peft.tuners.poly.layer import Linear
from torch import nn

from oneplusn.adapters.methods import Mhr, Poly
from tolerances import assert_close

TASKS = ("add", "sort", "largest")


@pytest.mark.parametrize(
    "method",
    [Poly(TASKS, num_skills=3, rank=2), Mhr(TASKS, num_skills=3, rank=2, num_splits=4)],
    ids=["n_splits 1", "n_splits 4"],
)
def test_the_same_weights_give_the_same_output(method):
    torch.manual_seed(0)
    linear = nn.Linear(8, 12)
    config = PolyConfig(r=2, n_tasks=3, n_skills=3, n_splits=method.splits, init_weights=False)
    layer = Linear(linear, "default", config).eval()
    delta, gate = method.delta(8, 12), method.gate(None).eval()
    with torch.no_grad():
        layer.poly_router["default"].module_logits.normal_()
        gate.logits.copy_(layer.poly_router["default"].module_logits.view_as(gate.logits))
        delta.a.copy_(layer.poly_lora_A["default"].transpose(-1, -2))
        delta.b.copy_(layer.poly_lora_B["default"])
        x = torch.randn(4, 5, 8)
        task_ids = torch.tensor([2, 0, 1, 2])
        expected = layer(x, task_ids=task_ids)
        assert_close(linear(x) + delta(x, gate()[task_ids]), expected)
        module = method.export(delta, gate(), torch.float32)
        for row, task in enumerate(task_ids.tolist()):
            gates = module.weights[task].repeat_interleave(torch.tensor(module.ranks))
            merged = linear.weight + (module.b * gates) @ module.a
            assert_close(nn.functional.linear(x[row], merged, linear.bias), expected[row])
