from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from oneplusn.loadtest import bench_server
from oneplusn.loadtest.bench_cases import Work
from oneplusn.loadtest.bench_process import listening
from oneplusn.loadtest.fixtures import Fixtures
from oneplusn.loadtest.peers import llama_cpp, static_batch, transformers_serve, vllm
from oneplusn.loadtest.peers.system import Absent, Places, Served, package_version, version_of
from oneplusn.loadtest.processes import ChildFailed


@pytest.fixture
def work(fixtures: Fixtures) -> Work:
    """The tiny model with five LoRAs and two clusters."""
    return Work("tiny", 5, 16, 8, 2, 1, 2, fixtures)


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """Every peer is there."""
    for name in ("gguf", "transformers", "peft"):
        folder = tmp_path / "environments" / name / "bin"
        folder.mkdir(parents=True)
        (folder / "python").touch()
    environments = tmp_path / "environments"
    return Places(environments, Path("/x/llama-server"), Path("/x/python"), tmp_path / "scratch")


def option(served: Served, name: str) -> str:
    command = served.command(1234)
    return command[command.index(name) + 1]


def test_what_is_not_here_says_how_to_get_it(work: Work, tmp_path: Path) -> None:
    nothing = Places(tmp_path, None, None, tmp_path)

    for systems, way_out in (
        (llama_cpp.systems, "--llama-server"),
        (vllm.systems, "--vllm"),
        (transformers_serve.systems, "make bench-peers"),
        (static_batch.transformers, "make bench-peers"),
        (static_batch.peft, "make bench-peers"),
    ):
        with pytest.raises(Absent, match=way_out):
            systems(work, nothing)


def test_without_environments_libraries_run_in_this_interpreter(work: Work, tmp_path: Path) -> None:
    (library,) = static_batch.peft(work, Places(None, None, None, tmp_path))

    assert library.python == sys.executable


def test_every_server_gets_the_same_threads_and_room(work: Work, places: Places) -> None:
    ours, bare = bench_server.systems(work)
    (llama,) = llama_cpp.systems(work, places)
    off, on = vllm.systems(work, places)
    (serve,) = transformers_serve.systems(work, places)

    tokens = 5 * 2 * (16 + 8)
    assert work.cache_tokens == tokens
    assert (
        option(ours, "--threads") == option(bare, "--threads") == option(llama, "--threads") == "2"
    )
    # 2 layers of keys and values, 2 heads of 16 numbers of 2 bytes
    assert (
        option(ours, "--kv-memory") == option(bare, "--kv-memory") == str(tokens * 2 * 2 * 32 * 2)
    )
    assert option(llama, "--ctx-size") == str(tokens)
    assert int(option(serve, "--cb-num-blocks")) * 32 >= tokens
    assert {option(server, "--max-num-seqs") for server in (off, on)} == {"5"}
    assert {option(server, "--host") for server in (ours, bare, llama, off, on, serve)} == {
        "127.0.0.1"
    }


def test_adapters_are_given_to_those_that_support_them(work: Work, places: Places) -> None:
    ours, bare = bench_server.systems(work)
    (llama,) = llama_cpp.systems(work, places)
    off, on = vllm.systems(work, places)

    assert ours.command(1).count("--adapter") == 5 + 2
    assert bare.command(1).count("--adapter") == 0
    assert option(llama, "--lora").count(".gguf") == 5
    assert "--enable-lora" not in off.command(1)
    assert option(on, "--max-lora-rank") == "64"
    assert ours.held.adapters > on.held.adapters == llama.held.adapters > 0 == off.held.adapters


@pytest.mark.parametrize(
    ("printed", "found"),
    [
        ("version: 7240 (a1b2c3)\nbuilt with cc\n", "7240 (a1b2c3)"),
        ("a warning\npytest 9.9\n", "pytest 9.9"),
        ("", ""),
    ],
)
def test_a_peer_says_its_version(printed: str, found: str) -> None:
    assert version_of([sys.executable, "-c", f"print({printed!r}, end='')"]) == found


def test_a_package_goes_by_the_first_name_that_is_there() -> None:
    command = package_version(sys.executable, "no-such-package", "pytest")
    assert version_of(command) == f"pytest {pytest.__version__}"


def test_llama_cpp_is_told_a_scale_in_every_request() -> None:
    route = llama_cpp.Scaled(["a", "b"])

    assert route.body("b", (1, 2), 4)["lora"] == [{"id": 1, "scale": 1.0}]
    assert route.body("base", (1, 2), 4)["lora"] == [{"id": 0, "scale": 0.0}]
    assert route.body("b", (1, 2), 4)["ignore_eos"] is True


def test_transformers_serve_gets_words_and_a_model_without_end(work: Work, tmp_path: Path) -> None:
    transformers_serve.write_without_end(work.fixtures.base, tmp_path)
    transformers_serve.write_without_end(work.fixtures.base, tmp_path)

    body = transformers_serve.Words(tmp_path).body("base", (7, 30), 4)

    assert body["prompt"] == "t7 t30"
    assert "ignore_eos" not in body
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] is None
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] is None
    assert (tmp_path / "model.safetensors").resolve() == work.fixtures.base / "model.safetensors"


class Writer:
    """Notes what would be in a GGUF file."""

    written: dict[str, Writer] = {}  # noqa: RUF012 - of the whole test

    def __init__(self, path: Path, architecture: str) -> None:
        self.tensors: dict[str, np.ndarray] = {}
        self.values: dict[str, object] = {}
        self.written[path.stem] = self
        path.touch()

    def add_tensor(self, name: str, data: np.ndarray, raw_dtype: object = None) -> None:
        self.tensors[name] = data.view(np.uint16) if raw_dtype == "bf16" else data

    def add_string(self, key: str, value: object) -> None:
        self.values[key] = value

    add_float32 = add_string

    def __getattr__(self, name: str):
        if not name.startswith(("add_", "write_", "close")):
            raise AttributeError(name)
        return lambda *_: None


@pytest.fixture
def gguf_files(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The converter, with a scripted package below it."""
    fake = SimpleNamespace(GGUFWriter=Writer, GGMLQuantizationType=SimpleNamespace(BF16="bf16"))
    monkeypatch.setitem(sys.modules, "gguf", fake)
    monkeypatch.setattr(Writer, "written", {})
    name = "oneplusn.loadtest.peers.inside.gguf_files"
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


def test_halves_of_a_head_become_neighbours(gguf_files: ModuleType) -> None:
    rows = np.arange(8)[:, None]

    assert gguf_files.interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_every_tensor_has_its_name_and_row_order_in_gguf(
    gguf_files: ModuleType, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = work.fixtures.loras["lora-00"]
    arguments = [str(tmp_path), "--model", str(work.fixtures.base), "--lora", f"lora-00={lora}"]
    monkeypatch.setattr(sys, "argv", ["gguf_files", *arguments])

    gguf_files.main()
    gguf_files.main()  # what is there is not written again

    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.gguf", "lora-00.gguf"]
    base, delta = Writer.written["base"].tensors, Writer.written["lora-00"].tensors
    plain = dict(gguf_files.tensors(work.fixtures.base / "model.safetensors"))
    assert len(base) == len(plain)
    query = plain["model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(base["blk.1.attn_q.weight"][:3], query[[0, 8, 1]])
    np.testing.assert_array_equal(
        base["blk.1.ffn_down.weight"], plain["model.layers.1.mlp.down_proj.weight"]
    )
    assert base["blk.0.attn_norm.weight"].dtype == np.float32
    assert base["output_norm.weight"].tolist() == [1.0] * 64
    b = dict(gguf_files.tensors(lora / "adapter_model.safetensors"))
    b = b["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    np.testing.assert_array_equal(delta["blk.0.attn_q.weight.lora_b"][:2], b[[0, 8]])
    assert len(delta) == 2 * 7 * 2
    assert Writer.written["lora-00"].values["adapter.lora.alpha"] == 8.0


def test_a_server_that_does_not_start_shows_its_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "x.log"
    command = [sys.executable, "-c", "print('a\\nb'); raise SystemExit(3)"]

    with (
        pytest.raises(ChildFailed, match=r"exit code 3. The end of .*x.log:\na\nb"),
        listening(command, 1, {}, ready="/health", log=log),
    ):
        pass


def test_a_program_that_is_none_says_so(tmp_path: Path) -> None:
    with (
        pytest.raises(ChildFailed, match="cannot be started"),
        listening([str(tmp_path / "none")], 1, {}, ready="/", log=tmp_path / "x.log"),
    ):
        pass
