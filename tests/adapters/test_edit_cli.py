"""`oneplusn edit` without training, and the example of its page."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from adapter_samples import peft_files, write_files
from edit_samples import pair
from oneplusn.adapters import edits
from oneplusn.adapters.distil import distil
from oneplusn.adapters.files import read_adapter, write_bundle
from oneplusn.adapters.training import edit_cli
from oneplusn.errors import AdapterExists, AdapterInvalid, AdapterNotFound, InvalidRequest


def edit(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    edit_cli.declare(parser)
    return edit_cli.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def folder(tmp_path):
    write_bundle(pair(), tmp_path / "pair")
    return tmp_path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_drop_from_the_command_line_says_what_changed(folder, capsys):
    before = contents(folder / "pair")
    assert edit("drop-task", folder / "pair", "sort", "--out", folder / "new") == 0
    assert contents(folder / "pair") == before
    new = read_adapter(folder / "new", name="new")
    assert new.digest == edits.drop_task(pair(), "sort").digest
    assert capsys.readouterr().out.splitlines() == [
        "                      before          after",
        "tasks                      2              1",
        "experts                    3              2",
        "rank columns               4              3",
        "bytes                    148            100",
        "tasks gone: sort",
        "tasks unchanged: add",
        "experts gone: sort",
        f"written to {folder / 'new'}, {new.digest}",
    ]


def test_every_edit_from_the_command_line(folder, capsys):
    pair_folder, renamed, merged, wide, one = (
        folder / name for name in ("pair", "renamed", "merged", "wide", "one")
    )
    edit("drop-task", pair_folder, "sort", "--out", folder / "lone")
    edit("rename-task", folder / "lone", "add", "plus", "--out", renamed)
    edit("merge", pair_folder, renamed, "--out", merged)
    edit("add-task", merged, "mix", "--blend", "sort=0.5", "plus=-1", "--out", wide)
    capsys.readouterr()
    edit("distil", wide, "one", "--blend", "mix", "--rank", "2", "--out", one)
    said = capsys.readouterr().out
    bundle = read_adapter(wide, name="x")
    assert bundle.tasks == ("add", "sort", "plus", "mix")
    made = distil(bundle, {"mix": 1.0}, task="one", rank=2)
    assert read_adapter(one, name="x").digest == made.bundle.digest
    assert f"layers.0.q rank 2: {made.errors['layers.0.q']:.2e}" in said
    assert "tasks added: one" in said


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (("drop-task", "pair", "sort", "--out", "pair"), AdapterExists, "never overwritten"),
        (("drop-task", "pair", "mul", "--out", "new"), AdapterNotFound, "'mul'"),
        (("drop-task", "none", "mul", "--out", "new"), AdapterInvalid, "neither a folder"),
        (("merge", "pair", "pair", "--out", "new"), AdapterExists, "'add' is in more than"),
        (("add-task", "pair", "mul", "--out", "new"), InvalidRequest, "needs --blend, or --data"),
        (
            ("add-task", "pair", "mul", "--blend", "add=1", "--rank", "2", "--out", "new"),
            InvalidRequest,
            "--rank is for learning",
        ),
        (
            ("add-task", "pair", "mul", "--blend", "add=1", "add=2", "--out", "new"),
            InvalidRequest,
            "names a task twice",
        ),
        (("distil", "pair", "x", "--blend", "mul", "--out", "new"), AdapterNotFound, "'mul'"),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, tuple) else None,
)
def test_what_the_command_line_refuses_leaves_nothing(folder, monkeypatch, arguments, error, says):
    monkeypatch.chdir(folder)
    before = contents(folder / "pair")
    with pytest.raises(error, match=says):
        edit(*arguments)
    assert contents(folder / "pair") == before
    assert not (folder / "new").exists()


def test_the_example_of_the_docs_runs_on_two_loras_of_peft(tmp_path, monkeypatch):
    document = Path(__file__).parents[2] / "docs" / "edits.md"
    (code,) = re.findall(r"^```python\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE)
    for name in ("lora-news", "lora-legal"):
        write_files(tmp_path / name, peft_files())
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)  # the page's own code
    assert read_adapter(tmp_path / "press", name="press").tasks == ("news", "legal", "brief")
    assert names["lora"].tasks == ("brief",)


def test_a_weight_that_is_no_number_is_a_usage_error(folder, capsys):
    with pytest.raises(SystemExit):
        edit("distil", folder / "pair", "x", "--blend", "add=much", "--out", folder / "new")
    assert "expected a task and its weight, as sort=0.5" in capsys.readouterr().err
