from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from oneplusn.adapters.files import read_adapter
from oneplusn.loadtest.fixtures import SHAPES, Fixtures, Shape, build, tasks_of

SHAPE = SHAPES["tiny"]


def test_there_is_a_task_for_every_request(fixtures: Fixtures) -> None:
    assert list(fixtures.loras) == ["lora-00", "lora-01", "lora-02", "lora-03", "lora-04"]
    assert list(fixtures.clusters) == ["cgc-0", "cgc-1"]
    assert len(fixtures.cluster_tasks) == 8


@pytest.mark.parametrize(("name", "parameters"), [("small", 134_515_008), ("mid", 494_032_768)])
def test_the_shapes_are_those_of_the_models_they_stand_for(name: str, parameters: int) -> None:
    assert count(SHAPES[name]) == parameters


def count(shape: Shape) -> int:
    """Parameters with tied embeddings; Qwen2 has biases on q, k and v."""
    linears = sum(map(prod, shape.linears.values()))
    biases = sum(shape.linears[f"self_attn.{name}_proj"][1] for name in "qkv")
    layer = linears + 2 * shape.hidden + (biases if shape.family == "qwen2" else 0)
    return shape.layers * layer + shape.hidden * (shape.vocab + 1)


def test_base_is_a_bf16_model_of_the_shape(fixtures: Fixtures) -> None:
    tensors = load_file(fixtures.base / "model.safetensors")

    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in tensors.values()) == count(SHAPE)


def test_tokenizer_has_a_word_for_every_token(fixtures: Fixtures) -> None:
    described = json.loads((fixtures.base / "tokenizer.json").read_text(encoding="utf-8"))

    assert described["model"]["vocab"] == {f"t{i}": i for i in range(SHAPE.vocab)}


@pytest.mark.parametrize(("name", "rank"), [("lora-00", 8), ("lora-03", 64), ("lora-04", 8)])
def test_a_lora_reads_as_one_task_on_all_seven_linears(
    fixtures: Fixtures, name: str, rank: int
) -> None:
    bundle = read_adapter(fixtures.loras[name], name=name)

    assert bundle.tasks == (name,)
    assert [expert.rank for expert in bundle.experts] == [rank]
    assert len(bundle.modules) == 7 * SHAPE.layers
    for delta in bundle.modules.values():
        assert delta.a.dtype == torch.bfloat16
        assert delta.a.count_nonzero() > 0
        assert delta.b.count_nonzero() > 0


def test_a_cluster_reads_as_four_tasks_on_common_and_own_experts(fixtures: Fixtures) -> None:
    bundle = read_adapter(fixtures.clusters["cgc-1"], name="cgc-1")

    assert bundle.tasks == tuple(tasks_of("cgc-1"))
    assert [expert.rank for expert in bundle.experts] == [4] * 8
    assert bundle.runs().common == (0, 1, 2, 3)
    assert list(bundle.runs().own.values()) == [(4,), (5,), (6,), (7,)]


def test_what_is_there_is_not_built_again(fixtures: Fixtures) -> None:
    weights = fixtures.base / "model.safetensors"
    before = weights.stat().st_mtime_ns

    build(Fixtures(Path(fixtures.folder), 5), SHAPE)

    assert weights.stat().st_mtime_ns == before
