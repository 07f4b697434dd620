"""Settings: where they come from, which source wins, and what is refused."""

from __future__ import annotations

import io
import re
import subprocess
from dataclasses import fields
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from pydantic import ValidationError

from oneplusn import cli
from oneplusn.errors import ConfigError
from oneplusn.server.engine.engine import EngineConfig
from oneplusn.server.engine.model import load_model
from oneplusn.server.host import available_memory, free_cores, physical_cores
from oneplusn.server.launch import ChildProcess, build_engine, read_settings
from oneplusn.server.settings import (
    ENGINE_SETTINGS,
    ENV_PREFIX,
    Settings,
    load_settings,
    shown_default,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "settings.md"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"{ENV_PREFIX}{name.upper()}", raising=False)


def config(folder: Path, text: str, name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


class TestPrecedence:
    def test_defaults(self) -> None:
        settings = load_settings({})
        assert (settings.model, settings.host, settings.port) == ("demo", "127.0.0.1", 8000)
        assert 1 <= settings.threads <= physical_cores()
        assert settings.adapter == {}
        assert settings.base_name == "demo"

    def test_command_line_then_environment_then_file(self, tmp_path, monkeypatch) -> None:
        file = config(tmp_path, "port: 1\nhost: file\nmodel: file\n")
        monkeypatch.setenv("ONEPLUSN_PORT", "2")
        monkeypatch.setenv("ONEPLUSN_HOST", "environment")

        settings = load_settings({"port": "3"}, config=file)

        assert (settings.port, settings.host, settings.model) == (3, "environment", "file")

    def test_the_file_can_be_named_by_the_environment(self, tmp_path, monkeypatch) -> None:
        monkeypatch.setenv("ONEPLUSN_CONFIG", str(config(tmp_path, "port: 5")))
        assert load_settings({}).port == 5

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("a.yaml", "kv-memory: 2GiB\nadapter:\n  a: /x\n"),
            ("a.toml", 'kv-memory = "2GiB"\n[adapter]\na = "/x"\n'),
        ],
    )
    def test_yaml_and_toml_say_the_same(self, tmp_path, name, text) -> None:
        settings = load_settings({}, config=config(tmp_path, text, name))
        assert settings.kv_memory == 2 << 30
        assert settings.adapter == {"a": Path("/x")}

    def test_an_empty_file_is_fine(self, tmp_path) -> None:
        assert load_settings({}, config=config(tmp_path, "")).port == 8000

    def test_they_cannot_change(self) -> None:
        with pytest.raises(ValidationError):
            load_settings({}).port = 9


class TestValues:
    @pytest.mark.parametrize(
        ("text", "size"), [("2GiB", 2 << 30), ("512MB", 512_000_000), ("1024", 1024), (7, 7)]
    )
    def test_sizes(self, text, size) -> None:
        assert load_settings({"kv_memory": text}).kv_memory == size

    def test_adapters_of_the_command_line(self) -> None:
        settings = load_settings({"adapter": ["news=/a/b", "law=c=d"]})
        assert settings.adapter == {"news": Path("/a/b"), "law": Path("c=d")}

    def test_adapters_of_the_environment(self, monkeypatch) -> None:
        monkeypatch.setenv("ONEPLUSN_ADAPTER", "news=/a,law=/b")
        assert load_settings({}).adapter == {"news": Path("/a"), "law": Path("/b")}

    @pytest.mark.parametrize(
        ("model", "served", "name"),
        [("demo", None, "demo"), ("org/m", None, "m"), ("/a/b/", None, "b"), ("demo", "x", "x")],
    )
    def test_the_base_has_a_name(self, model, served, name) -> None:
        given = {"model": model, **({"served_model_name": served} if served else {})}
        assert load_settings(given).base_name == name


class TestRefusal:
    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"port": "abc"}, "--port (or ONEPLUSN_PORT) = 'abc': Input should be a valid integer"),
            ({"port": "70000"}, "less than or equal to 65535"),
            ({"kv_memory": "lots"}, "--kv-memory"),
            ({"kv_memory": "0"}, "greater than 0"),
            ({"max_adapters": "0"}, "--max-adapters"),
            ({"max_image": "-1"}, "--max-image"),
            ({"header_timeout": "0"}, "--header-timeout"),
            ({"device": "tpu"}, "'auto', 'cpu' or 'cuda'"),
            ({"adapter": ["news"]}, "expected NAME=PATH, not 'news'"),
            ({"adapter": ["=x"]}, "expected NAME=PATH"),
            ({"adapter": ["a=x", "a=y"]}, "the name 'a' is given twice"),
            ({"trust_remote_code": "true"}, "Python code is never run"),
        ],
    )
    def test_a_bad_value_is_named_with_its_limit(self, given, said) -> None:
        with pytest.raises(ConfigError, match=re.escape(said)):
            load_settings(given)

    def test_all_bad_values_are_named(self) -> None:
        with pytest.raises(ConfigError, match=r"--port .*; --device "):
            load_settings({"port": "abc", "device": "tpu"})

    def test_an_unknown_key_is_named_with_its_likeliest_meaning(self, tmp_path) -> None:
        with pytest.raises(ConfigError, match="unknown setting 'prot'; did you mean port"):
            load_settings({}, config=config(tmp_path, "prot: 80"))

    def test_a_key_like_nothing_else(self, tmp_path) -> None:
        with pytest.raises(ConfigError, match="unknown setting 'zzz'; see oneplusn serve --help"):
            load_settings({}, config=config(tmp_path, "zzz: 1"))

    def test_remote_code_is_refused_from_a_file(self, tmp_path) -> None:
        with pytest.raises(ConfigError, match="never run"):
            load_settings({}, config=config(tmp_path, "trust_remote_code: true"))

    def test_remote_code_is_refused_from_the_environment(self, monkeypatch) -> None:
        monkeypatch.setenv("ONEPLUSN_TRUST_REMOTE_CODE", "1")
        with pytest.raises(ConfigError, match="never run"):
            load_settings({})

    @pytest.mark.parametrize(
        ("name", "text"), [("a.yaml", "a: [1"), ("a.toml", "a ="), ("a.yaml", "- 1")]
    )
    def test_a_malformed_file(self, tmp_path, name, text) -> None:
        with pytest.raises(ConfigError, match=re.escape(name)):
            load_settings({}, config=config(tmp_path, text, name))

    def test_a_missing_file(self, tmp_path) -> None:
        with pytest.raises(ConfigError, match="cannot read the settings file"):
            load_settings({}, config=tmp_path / "none.yaml")


def test_the_document_lists_every_setting() -> None:
    rows = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if "| `--" in line]
    documented = {row.split("`")[1].removeprefix("--").replace("-", "_"): row for row in rows}

    assert documented.keys() == Settings.model_fields.keys()
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert f"| {field.description} |" in documented[name]
        assert f"| {shown_default(name)} |" in documented[name]


class TestEngineSettings:
    """One table says which settings are the engine's."""

    def test_they_are_what_an_engine_is_built_with(self) -> None:
        limits = {field.name for field in fields(EngineConfig)}
        loading = signature(load_model).parameters.keys() - {"path_or_id"}
        assert set(ENGINE_SETTINGS) == {"model"} | loading | limits & Settings.model_fields.keys()

    def test_the_child_gets_them_and_how_to_log(self, monkeypatch) -> None:
        settings = load_settings({"max_adapters": "3", "port": "9", "max_image": "1GiB"})
        sent = run_child(settings, monkeypatch)
        assert sent.keys() == {*ENGINE_SETTINGS, "log_level", "log_format"}
        assert read_settings(msgspec.json.encode(sent)).max_adapters == 3

    def test_the_limits_reach_the_engine(self, monkeypatch) -> None:
        limits = {"kv_memory": 1 << 20, "adapter_memory": 1 << 20, "max_model_len": 64}
        limits |= {"max_num_seqs": 3, "token_budget": 32, "max_adapters": 2}
        built = build(load_settings({"model": "m", **limits}), monkeypatch)
        assert {name: getattr(built, name) for name in limits} == limits

    def test_they_are_options_of_generate(self, capsys) -> None:
        with pytest.raises(SystemExit):
            cli.main(["generate", "--help"])
        shown = capsys.readouterr().out
        for name in (*ENGINE_SETTINGS, "adapter", "log_level"):
            assert f"--{name.replace('_', '-')} " in shown


def run_child(settings: Settings, monkeypatch) -> dict[str, object]:
    """Start an engine that only says what it was told."""
    written = io.BytesIO()
    written.close = lambda: None
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: SimpleNamespace(stdin=written))
    ChildProcess(settings, "ipc://x")
    return msgspec.json.decode(written.getvalue())


class _Built(Exception):
    """Carries the configuration out of an engine that was never made."""


def build(settings: Settings, monkeypatch) -> EngineConfig:
    def engine(model: object, config: EngineConfig) -> None:
        raise _Built(config)

    monkeypatch.setattr("oneplusn.server.engine.engine.Engine", engine)
    monkeypatch.setattr("oneplusn.server.engine.model.load_model", lambda *_, **__: None)
    with pytest.raises(_Built) as built:
        build_engine(settings)
    return built.value.args[0]


class TestHost:
    """Cores and memory, read from a made-up `/sys` and `/proc`."""

    @pytest.fixture
    def root(self, tmp_path) -> Path:
        for cpu in range(8):
            topology = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
            topology.mkdir(parents=True)
            (topology / "core_cpus_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text("0::/pod/box\n")
        (tmp_path / "proc/meminfo").write_text("MemTotal: 100 kB\nMemAvailable:  64 kB\n")
        (tmp_path / "sys/fs/cgroup/pod/box").mkdir(parents=True)
        return tmp_path

    @pytest.mark.parametrize(
        ("cpus", "cores"), [(range(8), 4), ((0, 4), 1), ((0, 1, 5), 2), ((7,), 1)]
    )
    def test_hardware_threads_of_a_core_count_once(self, root, cpus, cores) -> None:
        assert physical_cores(root, frozenset(cpus)) == cores

    @pytest.mark.parametrize(
        ("own", "parent", "cores"),
        [
            ("max 100000", "max 100000", 4),
            ("250000 100000", "max 100000", 2),
            ("max 100000", "100000 100000", 1),
            ("50000 100000", "max 100000", 1),
        ],
    )
    def test_the_tightest_quota_counts(self, root, own, parent, cores) -> None:
        (root / "sys/fs/cgroup/pod/box/cpu.max").write_text(own)
        (root / "sys/fs/cgroup/pod/cpu.max").write_text(parent)
        assert physical_cores(root, frozenset(range(8))) == cores

    def test_a_quota_of_the_first_kind_of_cgroups(self, root) -> None:
        folder = root / "sys/fs/cgroup/cpu"
        folder.mkdir()
        (folder / "cpu.cfs_quota_us").write_text("300000")
        (folder / "cpu.cfs_period_us").write_text("100000")
        assert physical_cores(root, frozenset(range(8))) == 3

    def test_memory_is_what_is_free_within_the_limit(self, root) -> None:
        assert available_memory(root) == 64 * 1024
        (root / "sys/fs/cgroup/pod/memory.max").write_text("50000")
        (root / "sys/fs/cgroup/pod/memory.current").write_text("20000")
        assert available_memory(root) == 30_000

    def test_this_machine_has_both(self) -> None:
        assert physical_cores() >= 1
        assert available_memory() > 0


@pytest.mark.parametrize(("load", "threads"), [(0.0, 4), (0.4, 4), (1.7, 2), (9.0, 1)])
def test_threads_are_the_cores_that_nobody_computes_on(load, threads, monkeypatch) -> None:
    monkeypatch.setattr("oneplusn.server.host.physical_cores", lambda: 4)
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    assert free_cores() == threads
