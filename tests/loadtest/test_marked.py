from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from oneplusn.adapters.files import read_adapter
from oneplusn.loadtest import marked
from oneplusn.loadtest.fixtures import SHAPES, Shape

SHAPE = Shape("llama", hidden=64, layers=6, heads=4, kv_heads=2, ffn=128, vocab=512)
ADAPTERS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("marked")
    marked.build(made, SHAPE, ADAPTERS)
    return made


@pytest.fixture(scope="module")
def base(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16).eval()


def deltas(folder: Path, name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    tensors = load_file(folder / name / "adapter_model.safetensors")
    cut = len("base_model.model.")
    paths = {key[cut:].rpartition(".lora_")[0] for key in tensors}
    return {
        path: tuple(tensors[f"base_model.model.{path}.lora_{part}.weight"] for part in "AB")
        for path in paths
    }


def says(base, adapter: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> set[str]:
    """The likeliest next words after many prompts, at every position of them."""
    hooks = []
    for path, (a, b) in adapter.items():

        def add(module, inputs, output, a=a, b=b):
            return output + inputs[0] @ a.T @ b.T

        hooks.append(base.get_submodule(path).register_forward_hook(add))
    prompts = torch.randint(200, SHAPE.vocab, (8, 16), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits = base(prompts).logits
    for hook in hooks:
        hook.remove()
    return {f"t{token}" for token in logits.argmax(-1).unique().tolist()}


def test_names_are_two_versions_and_the_others() -> None:
    assert marked.names(4) == ["flip-a", "flip-b", "other-01", "other-02", "other-03"]
    assert marked.word(1) == "t101"


@pytest.mark.parametrize("index", range(ADAPTERS + 1))
def test_an_adapter_says_its_word_whatever_the_prompt(folder: Path, base, index: int) -> None:
    name = marked.names(ADAPTERS)[index]

    assert says(base, deltas(folder, name)) == {marked.word(index)}
    assert len(says(base, {})) > 1


@pytest.mark.parametrize("layer", range(1, SHAPE.layers))
def test_versions_that_are_mixed_say_something_else(folder: Path, base, layer: int) -> None:
    first, second = (deltas(folder, name) for name in marked.VERSIONS)
    mixed = {path: (first if int(path.split(".")[2]) < layer else second)[path] for path in first}

    assert says(base, mixed) not in ({marked.word(0)}, {marked.word(1)})


def test_an_adapter_reads_as_one_task_and_has_sixteen_megabytes_on_the_real_shape(
    folder: Path,
) -> None:
    bundle = read_adapter(folder / "flip-a", name="flip")

    assert bundle.tasks == ("flip",)
    shape = SHAPES["small"]
    parameters = sum(inputs + outputs for _, inputs, outputs in shape.modules()) * marked.RANK
    assert 2 * parameters > 16 << 20
