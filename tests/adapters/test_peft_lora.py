"""PEFT adapters in and out: equal to PEFT's own forward, or refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from peft.tuners.lora import LoraLayer

from adapter_samples import (
    PEFT_JSON,
    PEFT_MODULE,
    bundles,
    delta,
    peft_files,
    peft_tensors,
    safetensors,
)
from oneplusn.adapters.converters.peft_lora import to_bundle, to_peft
from oneplusn.adapters.files import read_adapter, read_upload
from oneplusn.errors import AdapterInvalid, AdapterNotFound
from tiny_models import tiny_model
from tolerances import assert_close

# peft reads an attribute of the model that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

LLAMA_PATTERNS = {
    "rank_pattern": {r"layers\.1\..*q_proj": 3, "down_proj": 5},
    "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 1, "down_proj": 7},
}
CASES = {
    "llama": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "llama, patterns": (
        "llama",
        {"target_modules": ["q_proj", "down_proj", "o_proj"], **LLAMA_PATTERNS},
    ),
    "llama, rsLoRA with patterns": (
        "llama",
        {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, **LLAMA_PATTERNS},
    ),
    "llama, regex": ("llama", {"target_modules": r".*\.(self_attn\.[qk]|mlp\.up)_proj"}),
    "llama, all linear": ("llama", {"target_modules": "all-linear"}),
    "llama, one layer": (
        "llama",
        {"target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [1]},
    ),
    "llama, one layer of a list": (
        "llama",
        {
            "target_modules": ["k_proj", "o_proj"],
            "layers_to_transform": 0,
            "layers_pattern": "layers",
        },
    ),
    "llama, exclusion": (
        "llama",
        {"target_modules": "all-linear", "exclude_modules": r".*layers\.0\.mlp.*"},
    ),
    "llama, excluded names": (
        "llama",
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.1.mlp.up_proj"]},
    ),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "gpt2, rsLoRA": (
        "gpt2",
        {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True, "use_rslora": True},
    ),
    "orthogonal init": (
        "llama",
        {"target_modules": ["k_proj"], "init_lora_weights": "orthogonal"},
    ),
}


def saved(folder: Path, family: str, options: dict) -> peft.PeftModel:
    """Train nothing, but make every factor random; save as PEFT does."""
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **options)
    model = peft.get_peft_model(tiny_model(family), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model


def lora_layers(model: peft.PeftModel) -> dict[str, LoraLayer]:
    return {
        name: layer
        for name, layer in model.base_model.model.named_modules()
        if isinstance(layer, LoraLayer)
    }


@pytest.mark.parametrize(("family", "options"), CASES.values(), ids=CASES)
def test_every_module_computes_what_peft_computes(tmp_path, family, options):
    model = saved(tmp_path, family, options)
    bundle = read_adapter(tmp_path, name="mine")
    layers = lora_layers(model)
    assert bundle.method == "lora"
    assert bundle.tasks == ("mine",)
    assert set(bundle.modules) == set(layers)
    for path, layer in layers.items():
        module = bundle.modules[path]
        x = torch.randn(7, module.a.shape[1])
        with torch.no_grad():
            assert_close(layer.base_layer(x) + delta(module, 0, x), layer(x))


@pytest.mark.parametrize(("family", "options"), CASES.values(), ids=CASES)
def test_the_modules_of_the_base_are_those_with_tensors(tmp_path, family, options):
    model = saved(tmp_path, family, options)
    linears = [
        name
        for name, module in model.get_base_model().named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") or isinstance(module, LoraLayer)
        if "lora_" not in name and "base_layer" not in name and name != "lm_head"
    ]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = {
        f"base_model.model.{path}.lora_{side}.weight": factor
        for path, module in read_adapter(tmp_path, name="t").modules.items()
        for side, factor in (("A", module.a), ("B", module.b))
    }
    to_bundle(config, tensors, task="t", modules=linears)
    path = next(iter(lora_layers(model)))
    partial = {name: tensor for name, tensor in tensors.items() if path not in name}
    with pytest.raises(AdapterInvalid, match=f"targets {path}") as refusal:
        to_bundle(config, partial, task="t", modules=linears)
    assert refusal.value.code == "config_mismatch"


REFUSED_OPTIONS = {
    "DoRA": ({"use_dora": True}, "dora_not_supported", "use_dora = True"),
    "bias": ({"bias": "all"}, "bias_not_supported", "bias = 'all'"),
    "bias of the LoRA layers": ({"bias": "lora_only"}, "bias_not_supported", "bias='none'"),
    "bias of B": ({"lora_bias": True}, "bias_not_supported", "lora_bias"),
    "modules to save": (
        {"modules_to_save": ["lm_head"]},
        "modules_to_save_not_supported",
        "['lm_head']",
    ),
    "token indices": (
        {"trainable_token_indices": [1, 2]},
        "embedding_not_supported",
        "trainable_token_indices",
    ),
    "Arrow": ({"arrow_config": {"top_k": 3}}, "token_dependent_gate", "depends on the token"),
    "LoRAMoE": ({"lora_nums": 8}, "token_dependent_gate", "lora_nums = 8"),
    "X-LoRA": ({"peft_type": "XLORA"}, "token_dependent_gate", "peft_type = 'XLORA'"),
    "MixLoRA": ({"peft_type": "MIXLORA"}, "token_dependent_gate", "'MIXLORA'"),
    "Poly": ({"peft_type": "POLY"}, "option_not_supported", "'lora_alpha' = 4"),
    "another Poly": (
        {"peft_type": "POLY", "poly_type": "poly3"},
        "converter_missing",
        "poly_type = 'poly3'",
    ),
    "AdaLoRA": ({"peft_type": "ADALORA"}, "converter_missing", "'ADALORA'"),
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, "converter_missing", "'PROMPT_TUNING'"),
    "no type": ({"peft_type": None}, "converter_missing", "peft_type = None"),
    "a list as type": ({"peft_type": ["LORA"]}, "converter_missing", "['LORA']"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "base_weights_changed", "'pissa'"),
    "PiSSA, fast": ({"init_lora_weights": "pissa_niter_16"}, "base_weights_changed", "niter_16"),
    "OLoRA": ({"init_lora_weights": "olora"}, "base_weights_changed", "'olora'"),
    "CorDA": ({"init_lora_weights": "corda"}, "base_weights_changed", "'corda'"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "base_weights_changed", "assume_converted"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "base_weights_changed", "'loftq'"),
    "LoftQ configured": ({"loftq_config": {"bits": 4}}, "base_weights_changed", "loftq_config"),
    "unknown init": ({"init_lora_weights": ["new"]}, "base_weights_changed", "['new']"),
    "layer replication": (
        {"layer_replication": [[0, 2], [1, 3]]},
        "layer_replication_not_supported",
        "repeated layers",
    ),
    "Megatron": ({"megatron_config": {"tp": 2}}, "megatron_not_supported", "Megatron"),
    "aLoRA": ({"alora_invocation_tokens": [5]}, "alora_not_supported", "part of the tokens"),
    "parameters": (
        {"target_parameters": ["experts.gate_up_proj"]},
        "target_parameters_not_supported",
        "target_modules",
    ),
    "QA-LoRA": ({"use_qalora": True}, "option_not_supported", "'use_qalora' = True"),
    "BD-LoRA": ({"use_bdlora": {"nblocks": 2}}, "option_not_supported", "'use_bdlora'"),
    "KaSA": ({"kasa_config": {"beta": 1e-4}}, "option_not_supported", "'kasa_config'"),
    "MonteCLoRA": ({"monteclora_config": {"x": 1}}, "option_not_supported", "is unknown here"),
    "an option of tomorrow": ({"use_twist": 2}, "option_not_supported", "'use_twist' = 2"),
    "rank as text": ({"r": "2"}, "json_invalid", "$.r"),
    "rank 0": ({"r": 0}, "json_invalid", ">= 1"),
    "rank 10^6": ({"r": 10**6}, "json_invalid", "<= 4096"),
    "rank missing": ({"r": None}, "json_invalid", "Expected `int`, got `null`"),
    "alpha as text": ({"lora_alpha": "4"}, "json_invalid", "$.lora_alpha"),
    "alpha infinite": ({"lora_alpha": float("inf")}, "json_malformed", "not valid JSON"),
    "alpha enormous": ({"lora_alpha": 1e300}, "value_not_finite", "scale holds inf"),
    "targets as a number": ({"target_modules": 5}, "json_invalid", "$.target_modules"),
    "another rank": ({"r": 8}, "rank_mismatch", "A [2, 4] and B [6, 2]"),
    "another rank by pattern": (
        {"rank_pattern": {".*q_proj": 3}},
        "rank_mismatch",
        "the configuration says rank 3",
    ),
    "other targets": ({"target_modules": ["k_proj"]}, "config_mismatch", PEFT_MODULE),
    "targets by regex": ({"target_modules": ".*[kv]_proj"}, "config_mismatch", "leaves out"),
    "target is a part of a name": ({"target_modules": ["proj"]}, "config_mismatch", PEFT_MODULE),
    "another layer": ({"layers_to_transform": [1, 2]}, "config_mismatch", PEFT_MODULE),
    "another list of layers": (
        {"layers_to_transform": [0], "layers_pattern": "blocks"},
        "config_mismatch",
        PEFT_MODULE,
    ),
    "excluded": ({"exclude_modules": ["q_proj"]}, "config_mismatch", PEFT_MODULE),
    "excluded by regex": ({"exclude_modules": ".*q_proj"}, "config_mismatch", PEFT_MODULE),
    "invalid regex": ({"target_modules": "(q_proj"}, "pattern_not_supported", "'(q_proj'"),
}


@pytest.mark.parametrize(("changes", "code", "says"), REFUSED_OPTIONS.values(), ids=REFUSED_OPTIONS)
def test_a_configuration_of_more_than_a_plain_lora_is_refused(changes, code, says):
    with pytest.raises(AdapterInvalid) as refusal:
        read_upload(peft_files(**changes), name="a")
    assert (refusal.value.code, refusal.value.status_code) == (code, 422)
    assert says in str(refusal.value)


NAME = f"base_model.model.{PEFT_MODULE}"
ONE = torch.ones(2, 4)
REFUSED_TENSORS = {
    "DoRA": (f"{NAME}.lora_magnitude_vector", "dora_not_supported"),
    "DoRA, as weight": (f"{NAME}.lora_magnitude_vector.default.weight", "dora_not_supported"),
    "bias of B": (f"{NAME}.lora_B.bias", "bias_not_supported"),
    "bias of the base": (f"{NAME}.base_layer.bias", "target_parameters_not_supported"),
    "bias beside": (f"{NAME}.bias", "bias_not_supported"),
    "saved module": ("base_model.model.score.modules_to_save.weight", "modules_to_save_not_sup"),
    "embedding": ("base_model.model.model.embed_tokens.lora_embedding_A", "embedding_not_supp"),
    "whole embedding": ("base_model.model.model.embed_tokens.weight", "embedding_not_supported"),
    "GPT-2 embedding": ("base_model.model.transformer.wte.weight", "embedding_not_supported"),
    "head": ("base_model.model.lm_head.lora_A.weight", "lm_head_not_supported"),
    "whole head": ("base_model.model.lm_head.weight", "lm_head_not_supported"),
    "LoRAMoE router": (f"{NAME}.lora_route.weight", "token_dependent_gate"),
    "LoRAMoE expert": (f"{NAME}.lora_A0.weight", "token_dependent_gate"),
    "HydraLoRA": (f"{NAME}.lora_B2.weight", "token_dependent_gate"),
    "MixLoRA": ("mixlora.layers.0.mlp.up_proj.experts.0.lora_A.weight", "token_dependent_gate"),
    "X-LoRA": ("internal_xlora_classifier.layers.0.weight", "token_dependent_gate"),
    "Poly": (f"{NAME}.poly_lora_A", "tensor_unexpected"),
    "Poly router": (f"{NAME}.poly_router.module_logits", "tensor_unexpected"),
    "parameters": (
        "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight",
        "target_parameters_not_supported",
    ),
    "another adapter's name": (f"{NAME}.lora_A.other.weight", "tensor_unexpected"),
    "a norm": ("base_model.model.model.norm.weight", "tensor_unexpected"),
    "KaSA": (f"{NAME}.lora_diag", "tensor_unexpected"),
    "the same factor twice": (f"{NAME}.lora_A.default.weight", "tensor_unexpected"),
    "the same factor without prefix": (f"{PEFT_MODULE}.lora_A.weight", "tensor_unexpected"),
    "a module that is no path": ("base_model.model.a..b.lora_A.weight", "module_path_invalid"),
}


@pytest.mark.parametrize(("name", "code"), REFUSED_TENSORS.values(), ids=REFUSED_TENSORS)
def test_a_tensor_of_more_than_a_plain_lora_is_refused_by_its_name(name, code):
    with pytest.raises(AdapterInvalid) as refusal:
        to_bundle(PEFT_JSON, peft_tensors() | {name: ONE}, task="t")
    assert refusal.value.code.startswith(code)
    assert name[:40] in str(refusal.value) or code == "module_path_invalid"


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ({"lora_B.weight": None}, "tensor_missing", f"{PEFT_MODULE} has no lora_B.weight"),
        ({"lora_A.weight": None}, "tensor_missing", "has no lora_A.weight"),
        ({"lora_A.weight": torch.ones(3, 4)}, "rank_mismatch", "A [3, 4] and B [6, 2]"),
        ({"lora_B.weight": torch.ones(2, 6)}, "rank_mismatch", "B [2, 6]"),
        ({"lora_A.weight": torch.ones(2, 4, 1, 1)}, "shape_mismatch", "[2, 4, 1, 1]"),
        ({"lora_A.weight": torch.ones(8)}, "shape_mismatch", "2 dimensions"),
        ({"lora_B.weight": torch.ones(6, 2).half()}, "dtype_not_supported", "torch.float16"),
        ({"lora_A.weight": torch.full((2, 4), torch.nan)}, "value_not_finite", "A holds nan"),
        ({"lora_A.weight": torch.full((2, 4), 1e30)}, "value_not_finite", "65504"),
    ],
)
def test_factors_that_do_not_fit_are_refused(change, code, says):
    changed = peft_tensors() | {f"{NAME}.{side}": tensor for side, tensor in change.items()}
    tensors = {name: tensor for name, tensor in changed.items() if tensor is not None}
    with pytest.raises(AdapterInvalid) as refusal:
        to_bundle(PEFT_JSON, tensors, task="t")
    assert refusal.value.code == code
    assert says in str(refusal.value)


def test_an_adapter_without_tensors_is_refused():
    with pytest.raises(AdapterInvalid, match="no tensors"):
        to_bundle(PEFT_JSON, {}, task="t")


@pytest.mark.parametrize("option", [{"init_lora_weights": "pissa"}, {"loftq_config": {"bits": 4}}])
def test_a_converted_adapter_is_taken_at_its_word(option):
    upload = peft_files(**option)
    with pytest.raises(AdapterInvalid):
        read_upload(upload, name="a")
    assert read_upload(upload, name="a", assume_converted=True).tasks == ("a",)


@pytest.mark.parametrize(
    "option",
    [
        *(
            {"init_lora_weights": value}
            for value in (True, False, None, "gaussian", "eva", "orthogonal", "mica")
        ),
        {"lora_dropout": 0.1, "task_type": "CAUSAL_LM", "peft_version": "0.9.0"},
        {"base_model_name_or_path": "C:\\models\\..\\base", "revision": "main"},
        {"use_rslora": None, "rank_pattern": None, "alpha_pattern": {}, "exclude_modules": []},
        {"use_twist": False, "twist_config": None, "twists": []},
        {"layers_to_transform": [], "target_modules": "ALL-LINEAR"},
        {"target_modules": None},
        {"fan_in_fan_out": True},
    ],
    ids=str,
)
def test_options_that_do_not_change_the_delta_are_ignored(option):
    bundle = read_upload(peft_files(**option), name="a")
    assert bundle.modules[PEFT_MODULE].scale.tolist() == [2.0]


@pytest.mark.parametrize(
    "form",
    [
        "base_model.model.{}.lora_{}.weight",
        "base_model.model.{}.lora_{}.default.weight",
        "{}.lora_{}.weight",
    ],
)
def test_every_spelling_of_a_tensor_name_is_read(form):
    a, b = peft_tensors().values()
    tensors = {form.format(PEFT_MODULE, "A"): a, form.format(PEFT_MODULE, "B"): b}
    assert list(to_bundle(PEFT_JSON, tensors, task="t").modules) == [PEFT_MODULE]


def test_where_the_base_was_is_noted_and_never_opened():
    bundle = read_upload(peft_files(base_model_name_or_path="../../etc/passwd"), name="a")
    assert bundle.metadata == {"base_model": "../../etc/passwd"}


def test_many_exact_patterns_on_many_modules_stay_within_the_budget():
    """One entry per module is what rank allocation by EVA leaves."""
    paths = [f"model.layers.{i}.self_attn.q_proj" for i in range(200)]
    tensors = {name: t for path in paths for name, t in peft_tensors(path).items()}
    config = PEFT_JSON | {"rank_pattern": dict.fromkeys(paths, 2)}
    assert len(to_bundle(config, tensors, task="t").modules) == 200


def test_a_hostile_pattern_is_refused_within_its_budget():
    path = "model.layers.11.self_attn.q_proj"
    config = PEFT_JSON | {"rank_pattern": {"(?:.|.|.|..)*[!?]": 2}}
    with pytest.raises(AdapterInvalid) as refusal:
        to_bundle(config, peft_tensors(path), task="t")
    assert refusal.value.code == "pattern_too_costly"


@settings(max_examples=25)
@given(bundles())
def test_a_flattened_task_computes_what_the_task_computed(bundle):
    for row, task in enumerate(bundle.tasks):
        config, tensors = to_peft(bundle, task)
        flat = to_bundle(json.loads(json.dumps(config)), tensors, task=task)
        for path, module in bundle.modules.items():
            x = torch.randn(3, module.a.shape[1], generator=torch.Generator().manual_seed(row))
            expected = delta(module, row, x)
            if path in flat.modules:
                assert_close(delta(flat.modules[path], 0, x), expected)
                assert flat.modules[path].scale.tolist() == [1.0]
            else:
                assert not expected.any()


def test_peft_loads_what_was_flattened(tmp_path):
    saved(tmp_path / "in", "llama", {"target_modules": ["q_proj", "down_proj"], **LLAMA_PATTERNS})
    bundle = read_adapter(tmp_path / "in", name="mine")
    config, tensors = to_peft(bundle, "mine")
    out = tmp_path / "out"
    out.mkdir()
    (out / "adapter_config.json").write_text(json.dumps(config))
    (out / "adapter_model.safetensors").write_bytes(safetensors(tensors))
    torch.manual_seed(0)
    layers = lora_layers(peft.PeftModel.from_pretrained(tiny_model("llama"), out).eval())
    assert set(layers) == set(bundle.modules)
    for path, layer in layers.items():
        x = torch.randn(5, layer.in_features)
        with torch.no_grad():
            assert_close(layer(x) - layer.base_layer(x), delta(bundle.modules[path], 0, x))


def test_flattening_names_a_task_that_is_not_there():
    with pytest.raises(AdapterNotFound, match="'mul'"):
        to_peft(to_bundle(PEFT_JSON, peft_tensors(), task="add"), "mul")
