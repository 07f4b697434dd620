"""Several LoRAs as one adapter: side by side, or as one task by weights, as PEFT and LoRAHub do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer

from adapter_samples import delta
from foreign import PREFIX, SHAPES, Foreign, lora, moelora, poly
from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.converters import read
from oneplusn.adapters.converters.combine import blend, renamed, side_by_side
from oneplusn.adapters.converters.peft_lora import to_peft
from oneplusn.adapters.converters.source import Source
from oneplusn.adapters.files import read_adapter
from oneplusn.errors import AdapterExists, AdapterIncompatible, AdapterInvalid, InvalidRequest
from tiny_engines import merged
from tiny_models import VOCAB, tiny_model
from tolerances import assert_close

# peft reads an attribute of the model that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

WEIGHTS = [0.75, -0.4]
TARGETS = {"news": ["q_proj", "down_proj"], "legal": ["q_proj", "o_proj"]}


def converted(saved: Foreign, name: str) -> Bundle:
    return read(Source(saved.config, saved.tensors, name=name))


def two_of_peft(folder: Path, **ranks: int) -> peft.PeftModel:
    """A model with two random LoRAs of other targets and scales, each saved in a folder."""
    model: peft.PeftModel | None = None
    for name, targets in TARGETS.items():
        options = {"r": ranks.get(name, 4), "lora_alpha": 6 if name == "news" else 10}
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, **options)
        if model is None:
            model = peft.get_peft_model(tiny_model("llama"), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model.eval()


def factors_of(model: peft.PeftModel, adapter: str) -> Mapping[str, tuple[torch.Tensor, float]]:
    return {
        name: (layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight, layer.scaling[adapter])
        for name, layer in model.base_model.model.named_modules()
        if isinstance(layer, LoraLayer) and adapter in layer.lora_A
    }


@pytest.mark.parametrize("semantics", ["cat", "linear"])
@pytest.mark.parametrize("ranks", [{}, {"legal": 7}], ids=["ranks alike", "ranks differ"])
def test_a_blend_is_what_peft_adds(tmp_path, semantics, ranks):
    model = two_of_peft(tmp_path, **ranks)
    bundles = [read_adapter(tmp_path / name, name=name) for name in TARGETS]
    if semantics == "linear" and ranks:
        with pytest.raises(ValueError, match="same r value"):
            model.add_weighted_adapter(list(TARGETS), WEIGHTS, "mix", semantics)
        with pytest.raises(AdapterIncompatible, match=r"ranks \[4, 7\]"):
            blend(bundles, WEIGHTS, semantics, task="mix")
        return
    model.add_weighted_adapter(list(TARGETS), WEIGHTS, "mix", semantics)
    model.set_adapter("mix")

    bundle = blend(bundles, WEIGHTS, semantics, task="mix")

    theirs = factors_of(model, "mix")
    assert set(bundle.modules) == set(theirs)
    for path, (product, scale) in theirs.items():
        assert scale == 1
        identity = torch.eye(product.shape[1])
        assert_close(delta(bundle.modules[path], 0, identity).T, product)
    prompts = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = merged(tiny_model("llama"), (bundle, "mix", 1.0))(input_ids=prompts).logits
        assert_close(ours, model(input_ids=prompts).logits)


def test_cat_keeps_the_loras_as_experts_and_linear_makes_one():
    loras = [converted(lora(seed=seed), f"l{seed}") for seed in range(2)]
    cat = blend(loras, WEIGHTS, "cat", task="mix")
    assert [(e.name, e.owner, e.rank) for e in cat.experts] == [("l0", "mix", 2), ("l1", "mix", 2)]
    path = next(iter(SHAPES))
    assert_close(cat.modules[path].gate, torch.tensor([WEIGHTS]))
    assert cat.modules[path].scale.tolist() == [1.5, 1.5]
    assert to_peft(cat, "mix")[0]["r"] == 4
    linear = blend(loras, WEIGHTS, "linear", task="mix")
    assert [(e.name, e.owner, e.rank) for e in linear.experts] == [("mix", "mix", 2)]


def test_lorahub_weighs_every_tensor_and_keeps_the_first_configuration():
    saved = [lora(alpha=3, seed=0), lora(alpha=8, seed=1), lora(alpha=1, seed=2)]
    weights = [0.5, -1.25, 1.5]
    bundle = blend(
        [converted(one, f"l{i}") for i, one in enumerate(saved)], weights, "lorahub", task="found"
    )
    for path, (inputs, _) in SHAPES.items():
        names = [f"{PREFIX}{path}.lora_{side}.weight" for side in "AB"]
        a, b = (
            sum(w * one.tensors[name].double() for w, one in zip(weights, saved, strict=True))
            for name in names
        )
        x = torch.randn(4, inputs, generator=torch.Generator().manual_seed(0))
        assert_close(delta(bundle.modules[path], 0, x), (x.double() @ a.T @ b.T) * 3 / 2)


def test_rslora_means_the_same_scale_in_a_blend():
    """PEFT 0.21 keeps use_rslora in the merged configuration, whose scale is then no longer 1."""
    saved = [lora(seed=seed).but(use_rslora=True) for seed in range(2)]
    bundle = blend([converted(one, "x") for one in saved], [1.0, 1.0], "cat", task="mix")
    for path, (inputs, _) in SHAPES.items():
        identity = torch.eye(inputs)
        parts = [delta(converted(one, "x").modules[path], 0, identity) for one in saved]
        assert_close(delta(bundle.modules[path], 0, identity), parts[0] + parts[1])


@pytest.mark.parametrize(
    ("bundles", "weights", "semantics", "error", "says"),
    [
        ([lora(), lora()], [1.0], "cat", InvalidRequest, "1 weights for 2 LoRAs"),
        ([lora(), lora()], [1.0, 0.0], "cat", InvalidRequest, "weight 0.0"),
        ([lora(), lora()], [1.0, float("nan")], "linear", InvalidRequest, "weight nan"),
        ([lora(), lora()], [1.0, float("inf")], "lorahub", InvalidRequest, "weight inf"),
        ([lora(), poly()], [1.0, 1.0], "linear", AdapterIncompatible, "3 tasks and 3 experts"),
        ([lora(), moelora(tasks=1)], [1.0, 1.0], "cat", AdapterIncompatible, "4 experts"),
        (
            [lora(), lora(shapes=dict.fromkeys(SHAPES, (8, 9)))],
            [1.0, 1.0],
            "cat",
            AdapterIncompatible,
            "8 -> 12 in one adapter and 8 -> 9",
        ),
        (
            [lora(), lora(shapes=dict([*SHAPES.items()][:1]))],
            [1.0, 1.0],
            "lorahub",
            AdapterIncompatible,
            "1 of 2 LoRAs adapt model.layers.1.mlp.down_proj",
        ),
        ([lora(), lora(rank=3)], [1.0, 1.0], "lorahub", AdapterIncompatible, "ranks [2, 3]"),
    ],
)
def test_what_cannot_be_blended_is_refused(bundles, weights, semantics, error, says):
    loras = [converted(saved, f"l{i}") for i, saved in enumerate(bundles)]
    with pytest.raises(error) as refusal:
        blend(loras, weights, semantics, task="mix")
    assert says in str(refusal.value)


def test_side_by_side_every_task_stays_what_it_was():
    parts = [converted(lora(seed=0), "one"), converted(poly(), "two"), converted(moelora(), "med")]
    together = side_by_side(parts)
    assert together.tasks == ("one", "two-0", "two-1", "two-2", "med-1", "med-2", "med-3")
    assert [together.task_digest(task) for task in together.tasks] == [
        part.task_digest(task) for part in parts for task in part.tasks
    ]


def test_factors_of_several_dtypes_become_fp32():
    half = lora(seed=1)
    half = half.but({name: tensor.half() for name, tensor in half.tensors.items()})
    together = side_by_side([converted(lora(), "one"), converted(half, "two")])
    assert {delta.a.dtype for delta in together.modules.values()} == {torch.float32}


def test_two_tasks_of_one_name_are_refused():
    with pytest.raises(AdapterExists, match="'same'"):
        side_by_side([converted(lora(), "same"), converted(poly(tasks=1), "same")])


def test_tasks_get_other_names_at_once():
    bundle = converted(poly(tasks=2), "p")
    named = renamed(bundle, ["p-1", "p-0"])
    assert named.tasks == ("p-1", "p-0")
    assert [(e.name, e.owner) for e in named.experts] == [("p-1", "p-1"), ("p-0", "p-0")]
    assert [named.task_digest(task) for task in ("p-1", "p-0")] == [
        bundle.task_digest(task) for task in ("p-0", "p-1")
    ]


@pytest.mark.parametrize(
    ("names", "error", "says"),
    [
        (["a"], InvalidRequest, "1 names for 2 tasks ('p-0, p-1')"),
        (["a", "B"], AdapterInvalid, "task name 'B'"),
        (["a", "a"], AdapterInvalid, "'a' is listed twice"),
    ],
)
def test_names_that_do_not_fit_are_refused(names, error, says):
    with pytest.raises(error) as refusal:
        renamed(converted(poly(tasks=2), "p"), names)
    assert says in str(refusal.value)
