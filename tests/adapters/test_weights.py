"""What a safetensors file may be, decided before the library sees it."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adapter_samples import safetensors, with_header
from oneplusn.adapters import weights
from oneplusn.adapters.files import check_safetensors_header
from oneplusn.adapters.weights import read_tensors, write_tensors
from oneplusn.errors import AdapterInvalid, AdapterMediaType


class Payload:
    """Unpickling this makes a folder, which a test would see."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def entry(start: int, stop: int, shape: object, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def described(data_bytes: int = 0, **entries: object) -> bytes:
    return with_header(json.dumps(entries).encode(), bytes(data_bytes))


ONE = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
VALID = safetensors({"a": torch.ones(2, 3), "b": torch.ones(4)})

REFUSED = {
    "empty": (b"", "safetensors_invalid", "header of 0 bytes in a file of 0"),
    "shorter than a length": (b"\x08\0\0", "safetensors_invalid", "in a file of 3"),
    "header cut off": (VALID[:40], "safetensors_invalid", "in a file of 40"),
    "data cut off": (VALID[:-1], "safetensors_invalid", "take 40 bytes and the file holds 39"),
    "data appended": (VALID + b"x", "safetensors_invalid", "the file holds 41"),
    "length 2^63": ((2**63).to_bytes(8, "little"), "safetensors_invalid", "9223372036854775808"),
    "length past the end": ((9).to_bytes(8, "little") + b"{}", "safetensors_invalid", "of 9 bytes"),
    "not JSON": (with_header(b"{'a': 1}"), "json_malformed", "not valid JSON"),
    "not UTF-8": (with_header(b'{"\xff": 1}'), "json_malformed", "not valid JSON"),
    "an array": (with_header(b"[]"), "json_invalid", "Expected `object`"),
    "deep": (with_header(b'{"a":' * 5000 + b"1" + b"}" * 5000), "json_malformed", "too deeply"),
    "duplicate tensor": (
        with_header(f'{{"a":{ONE},"a":{ONE}}}'.encode(), bytes(4)),
        "json_duplicate_key",
        "'a' occurs twice",
    ),
    "duplicate by an escape": (
        with_header(f'{{"a":{ONE},"\\u0061":{ONE}}}'.encode(), bytes(4)),
        "json_duplicate_key",
        "'a' occurs twice",
    ),
    "duplicate field": (
        with_header(b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
        "json_duplicate_key",
        "'dtype' occurs twice",
    ),
    "unknown field": (
        described(4, a=entry(0, 4, [1]) | {"stride": 1}),
        "safetensors_invalid",
        "`stride`",
    ),
    "missing field": (
        described(a={"dtype": "F32", "shape": []}),
        "safetensors_invalid",
        "`data_off",
    ),
    "overlap": (
        described(12, a=entry(0, 8, [2]), b=entry(4, 12, [2])),
        "safetensors_invalid",
        "'b' overlaps the tensor before it: it starts at 4, expected 8",
    ),
    "gap": (
        described(12, a=entry(0, 4, [1]), b=entry(8, 12, [1])),
        "safetensors_invalid",
        "'b' leaves a gap before it: it starts at 8, expected 4",
    ),
    "gap at the start": (described(8, a=entry(4, 8, [1])), "safetensors_invalid", "expected 0"),
    "two tensors, one place": (
        described(4, a=entry(0, 4, [1]), b=entry(0, 4, [1])),
        "safetensors_invalid",
        "overlaps",
    ),
    "offsets reversed": (described(4, a=entry(4, 0, [1])), "safetensors_invalid", "span -4"),
    "offsets past the end": (described(4, a=entry(0, 8, [2])), "safetensors_invalid", "holds 4"),
    "negative offset": (described(4, a=entry(-4, 0, [1])), "safetensors_invalid", ">= 0"),
    "offset beyond 64 bits": (
        described(4, a=entry(0, 2**70, [1])),
        "safetensors_invalid",
        "$.data",
    ),
    "three offsets": (
        described(4, a={"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}),
        "safetensors_invalid",
        "length 2",
    ),
    "shape of other bytes": (described(8, a=entry(0, 8, [3])), "safetensors_invalid", "takes 12"),
    "shape that overflows 64 bits": (
        described(0, a=entry(0, 0, [2**31 - 1] * 4)),
        "safetensors_invalid",
        "takes 85070591",
    ),
    "shape that wraps to its bytes": (
        described(0, a=entry(0, 0, [2**31 - 1, 2**31 - 1, 4])),
        "safetensors_invalid",
        "span 0",
    ),
    "dimension too large": (described(0, a=entry(0, 0, [2**31])), "safetensors_invalid", "<= 2147"),
    "negative dimension": (described(0, a=entry(0, 0, [-1])), "safetensors_invalid", ">= 0"),
    "fractional dimension": (described(4, a=entry(0, 4, [1.5])), "safetensors_invalid", "`int`"),
    "boolean dimension": (described(4, a=entry(0, 4, [True])), "safetensors_invalid", "`int`"),
    "eight dimensions": (
        described(4, a=entry(0, 4, [1] * 8)),
        "safetensors_invalid",
        "length <= 4",
    ),
    "double": (described(8, a=entry(0, 8, [1], "F64")), "dtype_not_supported", "'F64'"),
    "bytes": (described(1, a=entry(0, 1, [1], "I8")), "dtype_not_supported", "F32, F16, BF16"),
    "unknown dtype": (described(4, a=entry(0, 4, [1], "f32")), "dtype_not_supported", "'f32'"),
    "path as a name": (described(4, **{"../a": entry(0, 4, [1])}), "safetensors_invalid", "'../a'"),
    "NUL in a name": (described(4, **{"a\0": entry(0, 4, [1])}), "safetensors_invalid", "x00"),
    "name without letters": (described(4, **{"": entry(0, 4, [1])}), "safetensors_invalid", "''"),
    "name too long": (described(4, **{"a" * 513: entry(0, 4, [1])}), "safetensors_invalid", "512"),
    "metadata not text": (
        safetensors({"a": torch.ones(1)}, metadata={"step": 3}),
        "json_invalid",
        "__metadata__",
    ),
    "metadata nested": (safetensors({}, metadata={"a": {}}), "json_invalid", "Expected `str`"),
}


@pytest.mark.parametrize(("content", "code", "says"), REFUSED.values(), ids=REFUSED)
def test_a_malformed_file_is_refused_with_its_reason(tmp_path, content, code, says):
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(content)
    with pytest.raises(AdapterInvalid) as refusal:
        read_tensors(path)
    assert (refusal.value.code, refusal.value.status_code) == (code, 422)
    assert says in str(refusal.value)
    assert "adapter_model.safetensors" in str(refusal.value)
    assert str(tmp_path) not in str(refusal.value)


def test_a_header_above_the_limit_is_not_read(tmp_path):
    path = tmp_path / "weights.safetensors"
    with path.open("wb") as file:
        file.write((weights.MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(weights.MAX_HEADER_BYTES + 100)
    with pytest.raises(AdapterInvalid, match="header of 8388609 bytes"):
        check_safetensors_header(path)


def test_too_many_tensors_are_refused_before_the_library_builds_them(tmp_path):
    count = weights.MAX_TENSORS + 1
    header = "{" + ",".join(
        f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(count)
    )
    path = tmp_path / "weights.safetensors"
    path.write_bytes(with_header(header.encode() + b"}"))
    with pytest.raises(AdapterInvalid, match="65537 tensors, the limit is 65536"):
        check_safetensors_header(path)


@pytest.mark.parametrize("disguise", ["pickle", "zip of a pickle"])
def test_a_pickle_under_another_name_is_never_opened(tmp_path, disguise):
    path, marker = tmp_path / "adapter_model.safetensors", tmp_path / "ran"
    if disguise == "pickle":
        path.write_bytes(pickle.dumps(Payload(marker)))
    else:
        torch.save({"a": Payload(marker)}, path)
    with pytest.raises(AdapterMediaType) as refusal:
        read_tensors(path)
    assert (refusal.value.code, refusal.value.status_code) == ("pickle_rejected", 415)
    assert not marker.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_the_library_writes_passes_the_check(tmp_path, dtype):
    path = tmp_path / "weights.safetensors"
    tensors = {"b.A": torch.ones(3, 5, dtype=dtype), "a": torch.zeros(2), "empty": torch.ones(0, 4)}
    save_file(tensors, path, metadata={"format": "pt"})
    entries = check_safetensors_header(path)
    assert {name: entry.shape for name, entry in entries.items()} == {
        "a": (2,),
        "b.A": (3, 5),
        "empty": (0, 4),
    }
    for name, tensor in read_tensors(path).items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name])


def test_tensors_own_their_memory(tmp_path):
    path = tmp_path / "weights.safetensors"
    write_tensors({"a": torch.ones(1000)}, path)
    tensors = read_tensors(path)
    with path.open("r+b") as file:
        file.truncate(0)
    assert tensors["a"].sum() == 1000


def test_equal_tensors_give_equal_bytes_whatever_their_order_and_strides(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    write_tensors({"a": base, "b": base.T}, tmp_path / "one")
    write_tensors({"b": base.T.clone(), "a": base}, tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
