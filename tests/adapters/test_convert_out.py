"""One task taken out: as a LoRA that PEFT loads, and merged into the base."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import oneplusn
from oneplusn.adapters.attach import find_sites
from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.converters import WRITERS
from oneplusn.adapters.converters.export import Export
from oneplusn.adapters.files import read_adapter, write_bundle
from oneplusn.adapters.fingerprint import base_fingerprint
from oneplusn.adapters.training.merge import add_task
from oneplusn.demo.tokenizer import END_ID, build_tokenizer
from oneplusn.errors import (
    AdapterExists,
    AdapterIncompatible,
    AdapterNotFound,
    ConfigError,
    InvalidRequest,
)
from random_bundles import delta_weight, make_bundle, shapes_of
from tiny_engines import cluster, merged, record_logits
from tiny_models import tiny_model
from tolerances import assert_close

# peft reads an attribute of the model that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

PROMPT = [5, 17, 200, 33, 90, 4]
TOKENS = 5


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    tiny_model("llama", vocab_size=259, eos_token_id=END_ID).save_pretrained(folder)
    build_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(base) -> Bundle:
    return cluster(load(base), ["up", "down"], common=(2, 5), seed=1)


def load(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def written(to: str, export: Export) -> list[str]:
    return WRITERS[to].write(export)


class TestPeft:
    def test_pefts_logits_are_those_that_the_server_samples_from(
        self, base, bundle, tmp_path, monkeypatch
    ) -> None:
        write_bundle(bundle, tmp_path / "pair")
        limits = {"kv_memory": 4 << 20, "adapter_memory": 16 << 20, "threads": 1}
        adapters = {"pair": tmp_path / "pair"}
        with oneplusn.Engine(base, adapters=adapters, dtype="float32", **limits) as engine:
            rows = record_logits(engine.core, monkeypatch)
            (answer,) = engine.generate(PROMPT, "down", max_tokens=TOKENS, ignore_eos=True)
        (served,) = rows.values()

        written("peft", Export(bundle=bundle, task="down", out=tmp_path / "lora"))

        model = peft.PeftModel.from_pretrained(load(base), tmp_path / "lora").eval()
        tokens = torch.tensor([[*PROMPT, *answer.token_ids]])
        with torch.no_grad():
            theirs = model(input_ids=tokens).logits[0, len(PROMPT) - 1 : -1]
        assert_close(torch.stack(served), theirs)

    def test_it_comes_back_as_the_same_task(self, bundle, tmp_path) -> None:
        lines = written("peft", Export(bundle=bundle, task="up", out=tmp_path / "lora"))
        assert lines == ["rank     10"]
        back = read_adapter(tmp_path / "lora", name="up")
        for path in bundle.modules:
            assert_close(delta_weight(back, "up", path).float(), change(bundle, "up", path))

    def test_a_cut_is_the_nearest_of_its_rank_and_says_what_it_loses(
        self, bundle, tmp_path
    ) -> None:
        lines = written("peft", Export(bundle=bundle, task="up", out=tmp_path / "lora", svd=4))
        back = read_adapter(tmp_path / "lora", name="up")
        lost = {}
        for path in bundle.modules:
            whole = change(bundle, "up", path)
            error = (delta_weight(back, "up", path).float() - whole).norm()
            values = torch.linalg.svdvals(whole)
            assert_close(error, values[4:].norm())
            lost[path] = (error / whole.norm()).item()
        worst = max(lost, key=lambda path: lost[path])
        mean = sum(lost.values()) / len(lost)
        assert lines == [
            "rank     4",
            f"error    {mean:.2%} of what it adds, mean; {lost[worst]:.2%} at {worst}",
        ]

    def test_a_rank_that_others_do_not_take_is_a_warning(self, tmp_path) -> None:
        wide = make_bundle({"l.0.down": (80, 70)}, seed=0, own={"t0": 65})
        lines = written("peft", Export(bundle=wide, task="t0", out=tmp_path / "lora"))
        assert lines[1].startswith("warning  rank 65")
        assert "--max-lora-rank" in lines[1]

    @pytest.mark.parametrize(
        ("changes", "error", "says"),
        [
            ({"task": "sideways"}, AdapterNotFound, "'sideways'"),
            ({"svd": 0}, InvalidRequest, "rank 0"),
            (
                {"model": Path("llama")},
                InvalidRequest,
                "model = llama is nothing that writing 'peft'",
            ),
            ({"lax": True}, InvalidRequest, "lax = True"),
        ],
    )
    def test_what_cannot_be_written_leaves_nothing(
        self, bundle, tmp_path, changes, error, says
    ) -> None:
        with pytest.raises(error) as refusal:
            written(
                "peft", replace(Export(bundle=bundle, task="up", out=tmp_path / "x"), **changes)
            )
        assert says in str(refusal.value)
        assert list(tmp_path.iterdir()) == []

    def test_nothing_is_overwritten(self, bundle, tmp_path) -> None:
        export = Export(bundle=bundle, task="up", out=tmp_path / "lora")
        written("peft", export)
        before = (tmp_path / "lora" / "adapter_config.json").read_bytes()
        with pytest.raises(AdapterExists):
            written("peft", replace(export, task="down"))
        assert (tmp_path / "lora" / "adapter_config.json").read_bytes() == before


def change(bundle: Bundle, task: str, path: str) -> torch.Tensor:
    weight = delta_weight(bundle, task, path)
    assert weight is not None
    return weight.float()


class TestBase:
    def test_the_merged_model_has_the_tasks_logits(self, base, bundle, tmp_path) -> None:
        out = tmp_path / "merged"
        export = Export(bundle=bundle, task="up", out=out, model=base, shard_size="40KB")
        lines = written("base", export)

        shards = sorted(out.glob("*.safetensors"))
        assert lines == [
            "modules  14 of the base changed",
            f"weights  torch.float32, {len(shards)} files",
        ]
        assert len(shards) > 1
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert {path.name for path in shards} == set(index["weight_map"].values())
        assert AutoTokenizer.from_pretrained(out).get_vocab() == (
            AutoTokenizer.from_pretrained(base).get_vocab()
        )
        tokens = torch.tensor([PROMPT])
        with torch.no_grad():
            ours = load(out)(input_ids=tokens).logits
            assert_close(ours, merged(load(base), (bundle, "up", 1.0))(input_ids=tokens).logits)

    def test_only_the_tasks_modules_change(self, base, tmp_path) -> None:
        (site,) = [site for site in find_sites(load(base)) if site.name.endswith("1.mlp.down_proj")]
        small = make_bundle(shapes_of([site]), seed=3, own={"t0": 2})
        out = tmp_path / "merged"
        lines = written("base", Export(bundle=small, task="t0", out=out, model=base))
        assert lines == ["modules  1 of the base changed", "weights  torch.float32, 1 file"]
        before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
        assert before.keys() == after.keys()
        assert [name for name in before if not torch.equal(before[name], after[name])] == [
            "model.layers.1.mlp.down_proj.weight"
        ]

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_a_weight_is_rounded_once(self, family) -> None:
        model = tiny_model(family).to(torch.bfloat16)
        bundle = cluster(model, ["t"], seed=2)
        before = {name: weight.clone() for name, weight in model.named_parameters()}
        assert add_task(model, bundle, "t") == len(bundle.modules)
        for path in bundle.modules:
            weight = model.get_submodule(path).weight
            added = change(bundle, "t", path)
            added = added.T if family == "gpt2" else added
            expected = (before[f"{path}.weight"].float() + added).bfloat16()
            assert_close(weight, expected)
            assert weight.dtype == torch.bfloat16

    def test_another_base_is_refused_unless_it_is_accepted(self, base, bundle, tmp_path) -> None:
        fitting = replace(bundle, base=base_fingerprint(base))
        export = Export(bundle=fitting, task="up", out=tmp_path / "one", model=base)
        written("base", export)
        other = replace(export, bundle=replace(bundle, base="base:other"), out=tmp_path / "two")
        with pytest.raises(AdapterIncompatible, match="base:other") as refusal:
            written("base", other)
        assert refusal.value.code == "base_mismatch"
        written("base", replace(other, lax=True))
        files = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
        assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])

    @pytest.mark.parametrize(
        ("changes", "error", "says"),
        [
            ({"model": None}, InvalidRequest, "merging needs the model"),
            ({"model": Path("/no/such/folder")}, ConfigError, "/no/such/folder is no model"),
            ({"svd": 3}, InvalidRequest, "svd = 3 is nothing that writing 'base'"),
            ({"shard_size": "big"}, InvalidRequest, "shard size 'big'"),
            ({"task": "sideways"}, AdapterNotFound, "'sideways'"),
        ],
    )
    def test_what_cannot_be_merged_leaves_nothing(
        self, base, bundle, tmp_path, changes, error, says
    ) -> None:
        export = Export(bundle=bundle, task="up", out=tmp_path / "x", model=base)
        with pytest.raises(error) as refusal:
            written("base", replace(export, **changes))
        assert says in str(refusal.value)
        assert list(tmp_path.iterdir()) == []

    def test_a_base_of_an_unknown_kind_is_refused(self, base, bundle, tmp_path) -> None:
        shutil.copytree(base, tmp_path / "odd")
        config = json.loads((base / "config.json").read_text()) | {"model_type": "odd"}
        (tmp_path / "odd" / "config.json").write_text(json.dumps(config))
        export = Export(bundle=bundle, task="up", out=tmp_path / "x", model=tmp_path / "odd")
        with pytest.raises(ConfigError, match="is no language model that can be loaded"):
            written("base", export)
        assert not export.out.exists()

    def test_modules_and_shapes_must_be_the_models(self) -> None:
        model = tiny_model("llama")
        paths = ["model.layers.0.mlp.down_proj", "model.layers.7.mlp.down_proj"]
        known, unknown = (make_bundle({path: (64, 32)}, seed=0) for path in paths)
        both = make_bundle(dict.fromkeys(paths, (64, 32)), seed=0)
        with pytest.raises(AdapterIncompatible, match=r"1 of 2 modules.*layers\.7"):
            add_task(model, both, "t0")
        assert add_task(model, both, "t0", strict=False) == 1
        with pytest.raises(AdapterIncompatible, match="1 of 1 modules"):
            add_task(model, unknown, "t0", strict=False)
        wide = make_bundle({paths[0]: (64, 33)}, seed=0)
        with pytest.raises(AdapterIncompatible, match=r"64 -> 33 in the adapter.*\[32, 64\]"):
            add_task(model, wide, "t0")
        model.get_submodule(paths[0]).weight = None
        with pytest.raises(AdapterIncompatible, match="quantised or packed"):
            add_task(model, known, "t0")
