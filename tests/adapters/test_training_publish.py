"""`oneplusn train --publish`: from a configuration to what a running server answers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import yaml

from oneplusn import cli
from oneplusn.server.engine.llm import Engine
from server_processes import Process, running
from training_cases import TASKS, content, rows, save_base, write_rows

pytestmark = pytest.mark.e2e

LIMITS = ["--port=0", "--dtype=float32", "--kv-memory=4MiB", "--adapter-memory=16MiB"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "oneplusn.adapters.training.report.write_report", lambda folder, *_: folder / "report.md"
    )
    save_base(tmp_path / "base")
    write_rows(tmp_path / "train.jsonl", rows())
    write_rows(tmp_path / "validation.jsonl", rows(["fc", "ga"]))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content(tmp_path)))
    return tmp_path


@pytest.fixture
def server(folder) -> Iterator[Process]:
    given = [f"--model={folder / 'base'}", f"--data={folder / 'data'}", "--threads=1", *LIMITS]
    with running(["oneplusn.cli", "serve", *given], folder / "log") as process:
        yield process


def train(folder, url):
    return cli.main(["train", str(folder / "tiny.yaml"), "--publish", url])


def test_what_was_trained_is_served_once_it_is_published(folder, server, capsys):
    assert train(folder, server.url) == 0
    assert "tiny@1" in capsys.readouterr().out
    bundle = folder / "runs" / "tiny" / "bundle"
    with Engine(folder / "base", adapters={"tiny": bundle}, threads=1) as engine:
        for task in TASKS:
            body = {"task": task, "inputs": "ab", "parameters": {"max_new_tokens": 6}}
            found = server.http.post("/generate", json=body).json()["generated_text"]
            (expected,) = engine.generate(["ab"], tasks=[task], max_tokens=6)
            assert found == expected.text


def test_a_server_that_is_not_there_costs_no_training(folder, capsys):
    assert train(folder, "http://127.0.0.1:9") != 0
    said = capsys.readouterr().err
    assert "http://127.0.0.1:9 cannot be reached" in said
    assert f"the bundle stays in {folder / 'runs' / 'tiny' / 'bundle'}" in said
    assert (folder / "runs" / "tiny" / "bundle" / "bundle.json").is_file()
