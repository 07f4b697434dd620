"""The project's own format: bundle.json beside adapter_model.safetensors, out and in again."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapter_samples import (
    BUNDLE_JSON,
    bundle_files,
    bundle_tensors,
    bundles,
    peft_files,
    safetensors,
    write_files,
)
from oneplusn.adapters import files, folders
from oneplusn.adapters.bundle import Bundle, Expert
from oneplusn.adapters.files import read_adapter, read_upload, write_bundle
from oneplusn.errors import AdapterError, AdapterExists, AdapterInvalid

PATH = "model.layers.0.o_proj"
SHARED, OWN = BUNDLE_JSON["experts"]


def test_what_is_on_disk_is_what_is_in_memory():
    bundle = read_upload(bundle_files(base="sha256:abc", metadata={"by": "me"}), name="a")
    assert bundle.method == "cgc"
    assert bundle.base == "sha256:abc"
    assert bundle.tasks == ("sort", "add")
    assert bundle.experts == (Expert("shared", "common", None, 2), Expert("add", "own", "add", 1))
    assert bundle.metadata == {"by": "me"}
    module, tensors = bundle.modules[PATH], bundle_tensors()
    assert module.ranks == (2, 1)
    assert torch.equal(module.a, tensors[f"{PATH}.A"])
    assert torch.equal(module.b, tensors[f"{PATH}.B"])
    assert torch.equal(module.gate, tensors[f"{PATH}.gate"])
    assert torch.equal(module.scale, tensors[f"{PATH}.scale"])


def test_defaults_of_a_task_are_kept():
    defaults = {"add": {"temperature": 0.5, "max_tokens": 8, "stop": ["\n"], "greedy": True}}
    assert read_upload(bundle_files(defaults=defaults), name="a").defaults == defaults


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bundle=bundles(), seed=st.integers(0, 2**32 - 1))
def test_a_bundle_survives_the_disk_whatever_the_order_of_keys(tmp_path, bundle, seed):
    folder = tmp_path / f"{seed}-{len(list(tmp_path.iterdir()))}"
    write_bundle(bundle, folder)
    same = read_adapter(folder, name="a")
    assert same.digest == bundle.digest
    assert {t: same.task_digest(t) for t in same.tasks} == {
        t: bundle.task_digest(t) for t in bundle.tasks
    }

    document = json.loads((folder / "bundle.json").read_text())
    shuffled = list(document.items())
    random.Random(seed).shuffle(shuffled)
    document = dict(shuffled) | {"sites": dict(reversed(document["sites"].items()))}
    (folder / "bundle.json").write_text(json.dumps(document))
    assert read_adapter(folder, name="b").digest == bundle.digest


def without(key: str) -> dict[str, bytes]:
    document = {name: value for name, value in BUNDLE_JSON.items() if name != key}
    return bundle_files() | {"bundle.json": json.dumps(document).encode()}


def with_text(text: str | bytes) -> dict[str, bytes]:
    return bundle_files() | {"bundle.json": text if isinstance(text, bytes) else text.encode()}


def with_tensors(**tensors: torch.Tensor | None) -> dict[str, bytes]:
    changed = bundle_tensors() | {f"{PATH}.{part}": value for part, value in tensors.items()}
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    return bundle_files() | {"adapter_model.safetensors": safetensors(kept)}


TEXT = json.dumps(BUNDLE_JSON)
REFUSED = {
    "not JSON": (with_text("{'a'}"), "json_malformed", "not valid JSON"),
    "empty": (with_text(""), "json_malformed", "not valid JSON"),
    "two documents": (with_text(TEXT + TEXT), "json_malformed", "Extra data"),
    "byte order mark": (with_text(b"\xef\xbb\xbf" + TEXT.encode()), "json_malformed", "BOM"),
    "UTF-16": (with_text(TEXT.encode("utf-16-le")), "json_malformed", "not valid JSON"),
    "NaN": (bundle_files(metadata={"a": float("nan")}), "json_malformed", "not valid JSON"),
    "number out of range": (with_text(TEXT[:-1] + ', "x": 1e999}'), "json_invalid", "`x`"),
    "long number": (
        with_text(f'{{"schema_version": {"9" * 5000}}}'),
        "json_malformed",
        "not valid",
    ),
    "deep": (
        with_text(TEXT[:-1] + ', "metadata": ' + "[" * 9999 + "]" * 9999 + "}"),
        "json_malformed",
        "nested too deeply",
    ),
    "large": (with_text(TEXT + " " * 2**23), "json_too_large", "the limit is 8388608"),
    "duplicate key": (
        with_text(TEXT[:-1] + ', "tasks": ["mul"]}'),
        "json_duplicate_key",
        "'tasks' occurs twice",
    ),
    "duplicate site": (
        with_text(TEXT.replace(f'"{PATH}":', f'"{PATH}": {{"ranks": []}}, "{PATH}":')),
        "json_duplicate_key",
        "'model.layers.0.o_proj' occurs twice",
    ),
    "an array": (with_text("[]"), "json_invalid", "Expected `object`"),
    "no version": (without("schema_version"), "json_invalid", "`schema_version`"),
    "a later version": (
        with_text('{"schema_version": 2, "clusters": []}'),
        "schema_version_unsupported",
        "schema_version 2, this server reads 1",
    ),
    "unknown key": (bundle_files(gates=1), "json_invalid", "unknown field `gates`"),
    "unknown key of an expert": (
        bundle_files(experts=[SHARED | {"alpha": 1}, OWN]),
        "json_invalid",
        "unknown field `alpha` - at `$.experts[0]`",
    ),
    "missing key": (without("tasks"), "json_invalid", "missing required field `tasks`"),
    "missing owner": (
        bundle_files(experts=[SHARED, {"name": "add", "kind": "own", "rank": 1}]),
        "json_invalid",
        "`owner` - at `$.experts[1]`",
    ),
    "kind": (
        bundle_files(experts=[SHARED | {"kind": "general"}, OWN]),
        "json_invalid",
        "'general' - at `$.experts[0].kind`",
    ),
    "a rank as text": (
        bundle_files(sites={PATH: {"ranks": ["2", "1"]}}),
        "json_invalid",
        "Expected `int`, got `str`",
    ),
    "a fractional rank": (
        bundle_files(sites={PATH: {"ranks": [2.5, 1]}}),
        "json_invalid",
        "Expected `int`, got `float`",
    ),
    "tasks as an object": (bundle_files(tasks={"sort": 0}), "json_invalid", "Expected `array`"),
    "too many tasks": (
        bundle_files(tasks=[f"t{i}" for i in range(4097)]),
        "json_invalid",
        "length <= 4096 - at `$.tasks`",
    ),
    "too many experts": (bundle_files(experts=[SHARED] * 4097), "json_invalid", "`$.experts`"),
    "too many modules": (
        bundle_files(sites={f"m.{i}": {"ranks": [1, 1]} for i in range(16_385)}),
        "json_invalid",
        "length <= 16384",
    ),
    "too many ranks": (
        bundle_files(sites={PATH: {"ranks": [1] * 4097}}),
        "json_invalid",
        "length <= 4096",
    ),
    "a default that is an object": (
        bundle_files(defaults={"add": {"logit_bias": {"1": 2}}}),
        "json_invalid",
        "$.defaults",
    ),
    "enormous ranks": (
        bundle_files(sites={PATH: {"ranks": [2**70, 1]}}),
        "shape_mismatch",
        "A (3, 4)",
    ),
    "a module without tensors": (
        bundle_files(sites=BUNDLE_JSON["sites"] | {"model.layers.1.o_proj": {"ranks": [2, 1]}}),
        "tensor_missing",
        "lacks 'model.layers.1.o_proj.A'",
    ),
    "a tensor is missing": (with_tensors(scale=None), "tensor_missing", "o_proj.scale'"),
    "a tensor too many": (
        with_tensors(router=torch.ones(1)),
        "tensor_unexpected",
        "has 'model.layers.0.o_proj.router'",
    ),
    "a task without a gate row": (
        bundle_files(tasks=["sort", "add", "mul"]),
        "shape_mismatch",
        "(2, 2) torch.float32; expected (3, 2)",
    ),
    "a gate in half precision": (
        with_tensors(gate=torch.ones(2, 2, dtype=torch.bfloat16)),
        "shape_mismatch",
        "torch.bfloat16",
    ),
    "not a number": (
        with_tensors(A=torch.full((3, 4), float("nan"))),
        "value_not_finite",
        "o_proj.A holds",
    ),
    "infinity": (
        with_tensors(B=torch.full((5, 3), float("inf"), dtype=torch.float32)),
        "value_not_finite",
        "o_proj.B holds inf",
    ),
    "overflow": (with_tensors(A=torch.full((3, 4), 1e30)), "value_not_finite", "65504"),
    "a name": (bundle_files(tasks=["sort", "Add"]), "name_invalid", "'Add'"),
}


@pytest.mark.parametrize(("upload", "code", "says"), REFUSED.values(), ids=REFUSED)
def test_a_bundle_that_is_not_exactly_right_is_refused(upload, code, says):
    with pytest.raises(AdapterInvalid) as refusal:
        read_upload(upload, name="a")
    assert (refusal.value.code, refusal.value.status_code) == (code, 422)
    assert says in str(refusal.value)


@settings(max_examples=150)
@given(st.data())
def test_damage_is_refused_or_harmless_but_never_a_crash(data):
    upload = data.draw(st.sampled_from([bundle_files(), peft_files()]))
    name = data.draw(st.sampled_from(sorted(upload)))
    content = bytearray(upload[name])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    refusal = None
    try:
        read_upload(upload | {name: bytes(content)}, name="a").validate()
    except AdapterError as error:
        refusal = error
    assert refusal is None or (refusal.status_code in (415, 422) and str(refusal).isprintable())


def test_a_folder_is_written_whole_and_never_over_another(tmp_path):
    bundle = read_upload(bundle_files(), name="a")
    folder = tmp_path / "store" / "one"
    write_bundle(bundle, folder)
    assert {path.name for path in folder.iterdir()} == {"bundle.json", "adapter_model.safetensors"}

    other = read_upload(bundle_files(method="other"), name="a")
    with pytest.raises(AdapterExists) as refusal:
        write_bundle(other, folder)
    assert refusal.value.status_code == 409
    assert read_adapter(folder, name="a").digest == bundle.digest
    assert [path.name for path in folder.parent.iterdir()] == ["one"]


def test_an_empty_folder_may_be_filled(tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    write_bundle(read_upload(bundle_files(), name="a"), folder)
    assert read_adapter(folder, name="a").tasks == ("sort", "add")


def test_equal_bundles_are_equal_files(tmp_path):
    for name in ("one", "two"):
        write_bundle(read_upload(bundle_files(), name="a"), tmp_path / name)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    )
    assert one == two


@pytest.mark.parametrize(
    ("module", "step"), [(files, "write_tensors"), (folders, "sync"), (folders, "_move")]
)
def test_a_failure_at_any_step_leaves_nothing(tmp_path, monkeypatch, module, step):
    def fail(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, step, fail)
    with pytest.raises(OSError, match="No space left"):
        write_bundle(read_upload(bundle_files(), name="a"), tmp_path / "one")
    assert list(tmp_path.iterdir()) == []


def test_contents_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def log_fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def log_rename(path: Path, target: Path) -> Path:
        events.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(Path, "rename", log_rename)
    write_bundle(read_upload(bundle_files(), name="a"), tmp_path / "one")
    scratch = events[2]
    assert events == [
        "adapter_model.safetensors",
        "bundle.json",
        scratch,
        "rename",
        tmp_path.name,
    ]
    assert scratch.startswith(".one.")


def test_shared_and_strided_tensors_are_written(tmp_path):
    bundle = read_upload(bundle_files(), name="a")
    module = bundle.modules[PATH]
    other = type(module)(module.a, module.b.T.contiguous().T, (2, 1), module.gate, module.scale)
    both = Bundle("cgc", bundle.tasks, bundle.experts, {PATH: module, "other": other})
    write_bundle(both, tmp_path / "both")
    assert read_adapter(tmp_path / "both", name="a").digest == both.digest


def test_a_file_that_cannot_be_read_is_no_traceback(tmp_path, monkeypatch):
    folder = write_files(tmp_path / "adapter", bundle_files())

    def denied(_path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files, "_read_json", denied)
    with pytest.raises(AdapterInvalid, match="Permission denied") as refusal:
        read_adapter(folder, name="a")
    assert refusal.value.code == "file_unreadable"
