"""Damaged checkpoints of every format: refused with the name of what is wrong, or harmless."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foreign import SHAPES, Foreign, lora, moelora, mtl_lora, poly
from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.converters import read
from oneplusn.adapters.converters.source import Source
from oneplusn.errors import AdapterInvalid

FORMATS = {
    "LoRA": lora(),
    "Poly": poly(),
    "MHR": poly(splits=4),
    "C-Poly": poly("cpoly", splits=2),
    "simple C-Poly": poly("cpoly_simple"),
    "MOELoRA, a gate per linear": moelora("MMOELORA"),
    "MOELoRA, one gate": moelora("MMOELORAS"),
    "MTL-LoRA": mtl_lora(),
    "MTL-LoRA, full matrices": mtl_lora(matrix="linear"),
}
COUNTS = {"r", "n_tasks", "n_skills", "n_splits", "task_num", "expert_num", "task_embedding_dim"}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**40) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=3,
)

each_format = pytest.mark.parametrize("saved", FORMATS.values(), ids=FORMATS)


def convert(saved: Foreign) -> Bundle:
    return read(Source(saved.config, saved.tensors, name="t"))


def read_names(saved: Foreign) -> list[str]:
    """Tensors that mean something: not second names, nor gates at linears beside the model's."""
    unread = {name.replace(".mlp.weight", ".weight") for name in saved.tensors if ".mlp." in name}
    if saved.config.get("peft_type") == "MMOELORAS":
        gates = (".lora_gate.", ".lora_task_embedding.")
        unread |= {name for name in saved.tensors if any(gate in name for gate in gates)}
    return sorted(saved.tensors.keys() - unread)


def twins(saved: Foreign, name: str) -> list[str]:
    """A tensor and the other name that it has."""
    other = name.replace(".mlp.weight", ".weight")
    return [name, *({other} & saved.tensors.keys() - {name})]


def subject(name: str) -> str:
    """What a message has to name: the module, or the tensor where it belongs to the model."""
    return next((path for path in SHAPES if path in name), name)


@each_format
@settings(max_examples=15)
@given(data=st.data())
def test_a_missing_tensor_is_named(saved, data):
    name = data.draw(st.sampled_from(read_names(saved)))
    with pytest.raises(AdapterInvalid) as refusal:
        convert(saved.but(dict.fromkeys(twins(saved, name))))
    assert refusal.value.code == "tensor_missing"
    assert subject(name) in str(refusal.value)


@each_format
@settings(max_examples=15)
@given(data=st.data())
def test_a_number_that_is_none_is_named_with_its_tensor(saved, data):
    name = data.draw(st.sampled_from(read_names(saved)))
    tensor = saved.tensors[name].clone()
    place = data.draw(st.integers(0, tensor.numel() - 1))
    tensor.view(-1)[place] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf, 1e30]))
    with pytest.raises(AdapterInvalid) as refusal:
        convert(saved.but(dict.fromkeys(twins(saved, name), tensor)))
    assert refusal.value.code == "value_not_finite"
    assert subject(name) in str(refusal.value)


@each_format
@settings(max_examples=25)
@given(data=st.data())
def test_another_shape_is_refused_by_name_or_fits_another_base(saved, data):
    """What a linear reads and writes is known to the base alone, as long as its factors agree."""
    name = data.draw(st.sampled_from(read_names(saved)))
    shape = list(saved.tensors[name].shape)
    axis = data.draw(st.integers(0, len(shape)))
    if axis == len(shape):
        shape.insert(0, 1)
    else:
        shape[axis] = data.draw(st.integers(0, 2 * shape[axis]).filter(lambda n: n != shape[axis]))
    changed = saved.but(dict.fromkeys(twins(saved, name), torch.ones(shape)))
    bundle, refusal = None, None
    try:
        bundle = convert(changed)
    except AdapterInvalid as error:
        refusal = error
    if bundle is not None:
        inputs, outputs = SHAPES[subject(name)]
        module = bundle.modules[subject(name)]
        assert (module.a.shape[1], module.b.shape[0]) != (inputs, outputs)
    else:
        assert refusal.code in ("shape_mismatch", "rank_mismatch")
        assert subject(name) in str(refusal)


@each_format
@settings(max_examples=20)
@given(data=st.data())
def test_another_count_is_refused(saved, data):
    options = saved.config.get("config", saved.config)
    counted = sorted(options.keys() & (COUNTS | {"n_up_projection"}))
    option = data.draw(st.sampled_from(counted))
    other = data.draw(
        st.integers(-1, 2 * options[option] + 1).filter(lambda n: n != options[option])
    )
    changed = {**options, option: other}
    whole = {"config": changed} if "config" in saved.config else changed
    with pytest.raises(AdapterInvalid) as refusal:
        convert(saved.but(**whole))
    assert refusal.value.code in ("shape_mismatch", "rank_mismatch", "json_invalid")
    named = option in str(refusal.value) or any(
        subject(name) in str(refusal.value) for name in saved.tensors
    )
    assert named


@each_format
@settings(max_examples=40)
@given(data=st.data())
def test_options_of_any_kind_are_judged_and_never_crash(saved, data):
    inner = saved.config.get("config", {})
    options: dict[str, Any] = {**saved.config}
    for key in data.draw(st.sets(st.sampled_from(sorted({*options, *inner, "new"})), max_size=3)):
        value = data.draw(JSON)
        if key in inner:
            options["config"] = {**inner, key: value}
        else:
            options[key] = value
    refusal = None
    try:
        convert(Foreign(options, saved.tensors))
    except AdapterInvalid as error:
        refusal = error
    assert refusal is None or str(refusal).isprintable()


@each_format
def test_a_tensor_too_many_is_named(saved):
    path = next(iter(SHAPES))
    with pytest.raises(AdapterInvalid, match="surplus") as refusal:
        convert(saved.but({f"base_model.model.{path}.surplus": torch.ones(1)}))
    assert refusal.value.code == "tensor_unexpected"


@each_format
def test_no_tensors_at_all_are_refused(saved):
    with pytest.raises(AdapterInvalid, match="no tensors"):
        convert(Foreign(saved.config, {}))
