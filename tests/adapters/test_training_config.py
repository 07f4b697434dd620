"""The configuration file: what it may say, what is said about mistakes, and the command line."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from oneplusn.adapters.training import cli
from oneplusn.adapters.training.config import (
    TrainConfig,
    TrainSettings,
    changed,
    load_config,
    make_config,
    read_clusters,
)
from oneplusn.adapters.training.config_errors import section_of
from oneplusn.adapters.training.config_file import parse_value
from oneplusn.adapters.training.example import example_config, fields_of, in_yaml, shown_value
from oneplusn.errors import ConfigError, InvalidRequest

DATA = {"train": [{"path": "train.jsonl"}]}
SMALLEST = {"base": "demo", "data": DATA}
PAGE = Path(__file__).parents[2] / "docs" / "training.md"


def test_the_smallest_configuration():
    config = make_config(SMALLEST)
    assert config.method.name == "cgc-lora"
    assert config.training == TrainSettings()
    assert config.targets == ["all"]


def test_a_method_may_be_its_name_alone():
    assert make_config({**SMALLEST, "method": "lora"}).method.name == "lora"
    config = make_config({**SMALLEST, "method": {"name": "lora", "rank": 3}})
    assert config.method.settings == {"rank": 3}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"stepz": 1}, r"unknown key 'stepz', known: name, output, base"),
        ({"training": {"stepz": 1}}, r"'training.stepz' \(did you mean 'steps'\?\), known: steps,"),
        ({"data": {"train": [{"pth": "a"}]}}, r"'data.train.0.pth' \(did you mean 'path'\?\)"),
        ({"training": {"steps": "9"}}, "training.steps is '9': Input should be a valid integer"),
        ({"training": {"steps": 0}}, "training.steps is 0: Input should be greater than 0"),
        ({"training": {"temperature": 0.5}}, "temperature is 0.5: .* greater than or equal to 1"),
        ({"training": {"bf16": "yes"}}, "training.bf16 is 'yes': .* valid boolean"),
        ({"base": None}, "base is None: Input should be a valid string"),
        ({"data": {"train": []}}, "data.train is .*at least 1 item"),
        ({"data": {"train": [{}]}}, "data.train.0: give either path or dataset"),
        (
            {"data": {"train": [{"dataset": "d", "columns": {"answer": "a"}}]}},
            "columns has 'answer'; known: task, prompt, messages, completion",
        ),
        (
            {"data": {**DATA, "validation": [{"path": "a"}], "validation_share": 0.1}},
            "either validation or validation_share",
        ),
        ({"training": {"patience": 1}}, "patience needs data.validation"),
        ({"tasks": ["a"], "clusters": "c.yaml"}, "either tasks or clusters"),
        ({"method": {"rank": 2, "name": 3}}, "method.name is 3"),
    ],
)
def test_a_mistake_is_named_with_the_way_out(changes, reason):
    with pytest.raises(InvalidRequest, match=reason):
        make_config({**SMALLEST, **changes})


def test_several_mistakes_are_told_at_once():
    with pytest.raises(InvalidRequest) as caught:
        make_config({"base": 3, "data": {"train": [{"path": "a", "spilt": "x"}]}})
    assert "base is 3" in caught.value.message
    assert "did you mean 'split'?" in caught.value.message


def write(path, text):
    path.write_text(text)
    return path


FILE = """\
base: demo
method: c-poly
training: {learning_rate: 3e-3, temperature: .inf}
data: {train: [{path: a.jsonl}]}
"""


def test_a_file_is_read_with_its_name_and_the_overrides(tmp_path):
    path = write(tmp_path / "Mine.yaml", FILE)
    config = load_config(path, {"training.steps": 7, "method.rank": 2})
    assert config.name == "mine"
    assert (config.training.learning_rate, config.training.steps) == (3e-3, 7)
    assert config.training.temperature == float("inf")
    assert (config.method.name, config.method.settings) == ("c-poly", {"rank": 2})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("base: [", "is no YAML"),
        ("- base", "holds"),
        ("base: demo\nbase: other\n", "the key 'base' is there twice"),
    ],
    ids=["no YAML", "a list", "a key twice"],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text, reason):
    with pytest.raises(InvalidRequest, match=reason):
        load_config(write(tmp_path / "c.yaml", text))
    with pytest.raises(InvalidRequest, match="cannot be read"):
        load_config(tmp_path / "gone.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-3", 3e-3),
        ("1", 1),
        ("true", True),
        ("[a, b]", ["a", "b"]),
        ("e5", "e5"),
        ("-1e2", -1e2),
    ],
)
def test_values_of_the_command_line_are_yaml(text, value):
    assert parse_value(text) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("clusters: {a: [x], b: [x]}", "task 'x' is in 'a' and in 'b'"),
        ("clusters: {a: []}", "cluster 'a' has no task"),
        ("clusters: {}", "at least 1 item"),
        ("cluster: {a: [x]}", "unknown key 'cluster'"),
    ],
)
def test_a_clusters_file_gives_every_task_to_one_cluster(tmp_path, text, reason):
    path = write(tmp_path / "clusters.yaml", text)
    with pytest.raises(InvalidRequest, match=reason):
        read_clusters(path)
    write(path, "clusters: {a: [x, y], b: [z]}")
    assert read_clusters(path) == {"a": ["x", "y"], "b": ["z"]}


def test_only_what_decides_the_result_counts_as_a_change():
    before = {"output": "a", "seed": 1, "training": {"steps": 1, "progress": True}}
    now = {"output": "b", "seed": 1, "training": {"steps": 2, "progress": False}, "new": 1}
    assert changed(before, now) == ["new", "training.steps"]


def test_the_example_has_every_key_and_is_a_configuration(tmp_path):
    text = example_config()
    config = load_config(write(tmp_path / "example.yaml", text))
    assert config.model_copy(update={"method": make_config(SMALLEST).method}) == make_config(
        {**SMALLEST, "name": "adapter"}
    )
    for line in text.splitlines():
        assert len(line) <= 100
        assert line.lstrip().startswith("#") or re.match(r" *\w+:", line)


def table(section, prefix=""):
    """The lines that the page has about the keys of a section."""
    for name, field in fields_of(section).items():
        inner = section_of(field.annotation)
        default = "required" if field.is_required() else f"`{in_yaml(shown_value(field))}`"
        if inner is not None and not isinstance(shown_value(field), list):
            default = default if field.is_required() else ""
        yield f"| `{prefix}{name}` | {field.description} | {default} |"
        if inner is not None and name != "validation":
            yield from table(inner, f"{prefix}{name}.")


def test_the_page_explains_every_key():
    text = PAGE.read_text(encoding="utf-8").partition("## Every key")[2]
    assert [line for line in text.splitlines() if line.startswith("| `")] == list(
        table(TrainConfig)
    )


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    cli.declare(parser)
    return parser.parse_args(arguments)


class TestCommand:
    def test_flags_become_keys(self, monkeypatch, tmp_path):
        found = []
        monkeypatch.setattr(
            "oneplusn.adapters.training.run.run", lambda *given: found.append(given) or []
        )
        path = write(tmp_path / "c.yaml", FILE)
        flags = ["--steps", "9", "--method", "lora", "--match-params", "5000", "--quiet"]
        assert cli.run(parsed(str(path), *flags, "--set", "training.clip=1e-1", "--resume")) == 0
        config, options = found[0]
        assert (config.training.steps, config.training.clip) == (9, 0.1)
        assert (config.method.name, config.match_params) == ("lora", 5000)
        assert not config.training.progress
        assert (options.resume, options.finish, options.publish) == (True, False, None)

    def test_publishing_uses_what_the_caller_brings(self, monkeypatch, tmp_path):
        found = []
        monkeypatch.setattr(
            "oneplusn.adapters.training.run.run", lambda *given: found.append(given) or []
        )
        path = str(write(tmp_path / "c.yaml", FILE))
        args = parsed(path, "--publish", "http://x", "--api-key", "k")
        cli.run(args, publisher=lambda url, key: lambda folder, name: f"{url} {key} {name}")
        assert found[0][1].publish(Path(), "n") == "http://x k n"
        with pytest.raises(ConfigError, match="oneplusn adapters upload"):
            cli.run(args)

    def test_an_example_is_printed(self, capsys):
        assert cli.run(parsed("--print-config")) == 0
        assert capsys.readouterr().out == example_config()

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            ([], "no CONFIG.yaml given; --print-config"),
            (["c.yaml", "--set", "steps"], "expected KEY=VALUE"),
            (["c.yaml", "--set", "steps=["], "is no YAML value"),
        ],
    )
    def test_mistakes(self, arguments, reason):
        with pytest.raises(InvalidRequest, match=reason):
            cli.run(parsed(*arguments))

    def test_help_explains(self):
        parser = argparse.ArgumentParser()
        cli.declare(parser)
        text = parser.format_help()
        assert "--resume" in text
        assert "accelerate launch" in text
