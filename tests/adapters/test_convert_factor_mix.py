"""Poly, MHR, C-Poly's branch and MTL-LoRA: one LoRA per task that computes what theirs computed."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

from adapter_samples import delta
from foreign import SHAPES, cpoly_delta, mtl_lora, mtl_lora_delta, poly
from oneplusn.adapters.converters import detect, factor_mix, read
from oneplusn.adapters.converters.source import Source
from oneplusn.adapters.files import read_adapter, read_upload
from oneplusn.errors import AdapterInvalid
from tiny_engines import merged
from tiny_models import VOCAB, tiny_model
from tolerances import assert_close

# peft reads an attribute of the model that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

TASKS = 3
ROWS = torch.randn(5, 16, generator=torch.Generator().manual_seed(7))


def peft_poly(folder: Path, *, splits: int) -> peft.PeftModel:
    """A Poly model of PEFT with every parameter random, saved by PEFT."""
    config = peft.PolyConfig(
        task_type="CAUSAL_LM",
        r=3,
        n_tasks=TASKS,
        n_skills=2,
        n_splits=splits,
        target_modules=["q_proj", "k_proj", "down_proj"],
    )
    model = peft.get_peft_model(tiny_model("llama"), config).eval()
    torch.manual_seed(splits)
    for name, parameter in model.named_parameters():
        if "poly_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("splits", "method"), [(1, "poly"), (4, "mhr")])
def test_pefts_poly_has_pefts_logits(tmp_path, splits, method):
    model = peft_poly(tmp_path / "saved", splits=splits)
    assert detect(tmp_path / "saved") == "peft-poly"
    bundle = read_adapter(tmp_path / "saved", name="cluster")
    assert (bundle.method, bundle.tasks) == (method, ("cluster-0", "cluster-1", "cluster-2"))
    assert [expert.rank for expert in bundle.experts] == [3] * TASKS

    prompts = torch.randint(VOCAB, (TASKS, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = model(input_ids=prompts, task_ids=torch.arange(TASKS)).logits
        for index, task in enumerate(bundle.tasks):
            ours = merged(tiny_model("llama"), (bundle, task, 1.0))(input_ids=prompts).logits
            assert_close(ours[index], theirs[index])


def test_a_poly_upload_is_read_as_any_other():
    bundle = read_upload(poly(splits=2).files(), name="cluster")
    assert bundle.tasks == ("cluster-0", "cluster-1", "cluster-2")
    assert bundle.runs().common == ()


def test_one_task_has_the_adapters_name():
    assert read_upload(poly(tasks=1).files(), name="alone").tasks == ("alone",)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("poly_type", ["cpoly", "cpoly_simple"])
def test_the_branch_of_c_poly_computes_what_it_published(tmp_path, poly_type, splits):
    saved = poly(poly_type, splits=splits)
    assert detect(saved.save(tmp_path / "saved")) == "c-poly"
    bundle = read(Source(saved.config, saved.tensors, name="cp"))
    assert (bundle.method, len(bundle.tasks)) == ("c-poly", TASKS)
    for path, (inputs, _) in SHAPES.items():
        for task in range(TASKS):
            x = ROWS[:, :inputs]
            theirs = cpoly_delta(saved, path, task, x)
            assert_close(delta(bundle.modules[path], task, x), theirs)


def test_specific_weights_of_c_poly_are_used_raw():
    saved = poly("cpoly", tasks=2)
    names = [name for name in saved.tensors if name.endswith("c_module_logits")]
    raw = torch.tensor([[3.0, 0.0], [0.0, -2.0]])
    bundles = [
        read(Source(changed.config, changed.tensors, name="cp"))
        for changed in (
            saved.but(dict.fromkeys(names, value)) for value in (raw, torch.zeros(2, 2))
        )
    ]
    path = next(iter(SHAPES))
    skill = saved.tensors[f"base_model.model.{path}.poly_lora_A"][0, 2:]
    own, without = (bundle.modules[path].a for bundle in bundles)
    assert_close((own - without)[:3], 3.0 * skill[0].T)
    assert_close((own - without)[3:], -2.0 * skill[1].T)


@pytest.mark.parametrize("matrix", ["singular_values", "linear"])
def test_mtl_lora_computes_what_it_published(tmp_path, matrix):
    saved = mtl_lora("i", matrix=matrix)
    assert detect(saved.save(tmp_path / "saved", "adapter.safetensors")) == "mtl-lora"
    bundle = read(Source(saved.config, saved.tensors, name="news"))
    assert (bundle.method, bundle.tasks) == ("mtl-lora", ("news",))
    assert bundle.metadata == {"base_model": "some/llama"}
    for path, (inputs, _) in SHAPES.items():
        x = ROWS[:, :inputs]
        assert_close(delta(bundle.modules[path], 0, x), mtl_lora_delta(saved, path, x))


def test_a_sharp_choice_of_projections_does_not_overflow():
    """exp(w / tau) is beyond fp32 at w = 5 and the default tau of 0.05."""
    saved = mtl_lora("i")
    path = next(iter(SHAPES))
    names = [name for name in saved.tensors if name.endswith(".weights")]
    sharp = saved.but(dict.fromkeys(names, torch.tensor([5.0, 1.0, 0.0])))
    module = read(Source(sharp.config, sharp.tensors, name="t")).modules[path]
    assert torch.equal(module.b, sharp.tensors[f"{path}.loras.i.lora_B"][0])


def test_a_number_of_tasks_cannot_fill_the_memory(monkeypatch):
    saved = poly()
    widths = sum(inputs + outputs for inputs, outputs in SHAPES.values())
    needed = 4 * TASKS * 3 * widths
    monkeypatch.setattr(factor_mix, "MAX_MIXED_BYTES", needed)
    assert len(read_upload(saved.files(), name="p").tasks) == TASKS
    monkeypatch.setattr(factor_mix, "MAX_MIXED_BYTES", needed - 1)
    with pytest.raises(AdapterInvalid, match=f"take {needed} bytes") as refusal:
        read_upload(saved.files(), name="p")
    assert refusal.value.code == "adapter_limit_exceeded"
