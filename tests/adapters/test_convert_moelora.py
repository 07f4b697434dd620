"""MOELoRA-peft, and the weights in torch's own format that it saves."""

from __future__ import annotations

import io
import pickle
import sys
import zipfile

import pytest
import torch

from adapter_samples import delta
from foreign import PREFIX, SHAPES, Foreign, moelora, moelora_delta
from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.converters import checkpoints, detect, read
from oneplusn.adapters.converters.checkpoints import open_folder
from oneplusn.adapters.converters.source import Source
from oneplusn.adapters.files import read_upload
from oneplusn.errors import AdapterError, AdapterInvalid, AdapterMediaType, AdapterTooLarge
from tolerances import assert_close

PATH = next(iter(SHAPES))
EXPERT = f"{PREFIX}{PATH}.lora_A.loraA.0"


def converted(saved: Foreign) -> Bundle:
    return read(Source(saved.config, saved.tensors, name="med"))


@pytest.mark.parametrize("peft_type", ["MMOELORA", "MMOELORAS"])
def test_every_task_computes_what_the_authors_code_computed(peft_type):
    """With one gate for the model, those at the linears are in the file and mean nothing."""
    saved = moelora(peft_type)
    bundle = converted(saved)
    assert (bundle.method, bundle.tasks) == ("moelora", ("med-1", "med-2", "med-3"))
    assert [(expert.kind, expert.rank) for expert in bundle.experts] == [("common", 2)] * 4
    for path, (inputs, _) in SHAPES.items():
        x = torch.randn(5, inputs, generator=torch.Generator().manual_seed(0))
        for row in range(3):
            theirs = moelora_delta(saved, path, row + 1, x)
            assert_close(delta(bundle.modules[path], row, x), theirs)


def test_alpha_is_divided_by_the_whole_rank():
    assert converted(moelora()).modules[PATH].scale.tolist() == [32 / 8] * 4


def test_one_name_of_every_factor_is_enough():
    saved = moelora()
    whole = converted(saved).digest
    for ending in (".mlp.weight", ".weight"):
        twins = [name for name in saved.tensors if ".loraA." in name or ".loraB." in name]
        gone = [name for name in twins if name.endswith(".mlp.weight") == (ending != ".weight")]
        assert len(gone) == len(twins) / 2
        assert converted(saved.but(dict.fromkeys(gone))).digest == whole


def test_two_names_with_two_contents_are_refused():
    saved = moelora().but({f"{EXPERT}.weight": torch.ones(2, 8)})
    with pytest.raises(AdapterInvalid, match="and they differ") as refusal:
        converted(saved)
    assert f"{EXPERT}.weight" in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ({"expert_num": 3}, "rank_mismatch", "r = 8 over expert_num = 3"),
        ({"expert_num": 2}, "shape_mismatch", "lora_gate.GateL.weight' has shape [4, 5]"),
        ({"expert_num": 8}, "shape_mismatch", "lora_gate.GateL.weight' has shape [4, 5]"),
        ({"task_num": 4}, "shape_mismatch", "lora_task_embedding.weight' has shape [4, 5]"),
        ({"target_modules": ["q_proj"]}, "config_mismatch", "model.layers.1.mlp.down_proj"),
        ({"target_modules": ".*layers.0.*"}, "config_mismatch", "model.layers.1.mlp.down_proj"),
        ({"bias": "all"}, "bias_not_supported", "bias = 'all'"),
        ({"modules_to_save": ["x"]}, "modules_to_save_not_supported", "modules_to_save"),
        ({"task_num": None}, "json_invalid", "$.task_num"),
    ],
)
def test_a_configuration_of_something_else_is_refused(options, code, says):
    with pytest.raises(AdapterInvalid) as refusal:
        converted(moelora().but(**options))
    assert refusal.value.code == code
    assert says in str(refusal.value)


def test_an_expert_more_than_there_are_is_refused():
    more = {name.replace("loraA.0", "loraA.4"): torch.ones(2, 8) for name in moelora().tensors}
    more = {name: tensor for name, tensor in more.items() if "loraA.4" in name}
    with pytest.raises(AdapterInvalid, match="expert_num = 4, counted from 0") as refusal:
        converted(moelora().but(more))
    assert "lora_A.loraA.4.mlp.weight" in str(refusal.value)


def test_experts_of_one_linear_have_its_width():
    changes = {f"{EXPERT}.{name}": torch.ones(2, 9) for name in ("weight", "mlp.weight")}
    with pytest.raises(AdapterInvalid, match=r"read \[8, 9\]") as refusal:
        converted(moelora().but(changes))
    assert PATH in str(refusal.value)


def test_the_bin_that_its_trainer_saves_is_read_from_a_folder(tmp_path):
    folder = moelora().save(tmp_path / "saved", "adapter_model.bin")
    assert detect(folder) == "moelora"
    assert read(open_folder(folder, name="med").source).digest == converted(moelora()).digest


def test_a_server_takes_safetensors_only():
    saved = moelora()
    assert read_upload(saved.files(), name="med").digest == converted(saved).digest
    with pytest.raises(AdapterMediaType):
        read_upload(saved.files("adapter_model.bin"), name="med")


class Code:
    """Runs something when it is unpickled."""

    def __reduce__(self):
        return sys.exit, ("what was in the file has run",)


def saved_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def compressed(data: bytes) -> bytes:
    """The same archive, its parts made smaller."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member), compress_type=zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


PLAIN = saved_bytes({"a": torch.ones(2, 3)})
BINS = {
    "code": (saved_bytes({"a": Code()}), "more than tensors"),
    "a bare pickle": (pickle.dumps({"a": Code()}), "no file of torch"),
    "cut off": (PLAIN[: len(PLAIN) // 2], "no file of torch"),
    "an empty zip": (b"PK\5\6" + bytes(18), "or is damaged"),
    "compressed": (compressed(saved_bytes({"a": torch.zeros(99, 99)})), "it is compressed"),
    "no table": (saved_bytes([torch.ones(2)]), "no table"),
    "an empty table": (saved_bytes({}), "no table"),
    "a number for a name": (saved_bytes({1: torch.ones(2)}), "1 is no tensor with a name"),
    "a table in a table": (saved_bytes({"a": {"b": torch.ones(2)}}), "'a' is no tensor"),
    "few bytes, many numbers": (saved_bytes({"a": torch.ones(1).expand(10**7)}), "no plain tensor"),
    "one storage, many names": (
        saved_bytes(dict.fromkeys("abc", torch.ones(999))),
        "more than twice",
    ),
    "a sparse tensor": (saved_bytes({"a": torch.eye(3).to_sparse()}), "tensor"),
}


@pytest.mark.parametrize(("data", "says"), BINS.values(), ids=BINS)
def test_a_bin_that_is_more_than_a_table_of_tensors_is_refused(tmp_path, data, says):
    path = tmp_path / "adapter_model.bin"
    path.write_bytes(data)
    with pytest.raises(AdapterError) as refusal:
        checkpoints.read_bin(path)
    assert refusal.value.code == "bin_refused"
    assert says in str(refusal.value)
    assert "safetensors.torch.save_file" in str(refusal.value)


def test_a_bin_has_a_largest_size(tmp_path, monkeypatch):
    path = tmp_path / "adapter_model.bin"
    path.write_bytes(PLAIN)
    assert list(checkpoints.read_bin(path)) == ["a"]
    monkeypatch.setattr(checkpoints, "MAX_BIN_BYTES", len(PLAIN) - 1)
    with pytest.raises(AdapterTooLarge, match=f"{len(PLAIN)} bytes"):
        checkpoints.read_bin(path)


def test_numbers_of_another_type_are_refused_by_name(tmp_path):
    saved = moelora().but({"lora_gate.GateL.weight": torch.ones(4, 5, dtype=torch.float64)})
    opened = open_folder(saved.save(tmp_path / "saved", "adapter_model.bin"), name="med")
    with pytest.raises(
        AdapterInvalid, match=r"lora_gate.GateL.weight' is torch.float64"
    ) as refusal:
        read(opened.source)
    assert refusal.value.code == "dtype_not_supported"
