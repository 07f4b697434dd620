"""`oneplusn adapters` against a server on a real port."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from bundles import write_adapter
from oneplusn.cli import main
from oneplusn.server.settings import Settings
from serving import ScriptedCore, serving

TASKS = ("vowels", "upper")


@pytest.fixture
def url(tmp_path) -> Iterator[str]:
    settings = Settings(model="tiny-base", data=tmp_path / "data")
    with serving(settings, tmp_path / "model", ScriptedCore()) as running:
        yield running.url


@pytest.fixture
def letters(tmp_path) -> list[Path]:
    return [write_adapter(tmp_path / f"v{seed}", tasks=TASKS, seed=seed) for seed in (1, 2)]


@pytest.fixture
def cli(url, capsys):
    def run(*arguments: object) -> tuple[int, str, str]:
        action, *rest = map(str, arguments)
        code = main(["adapters", action, "--url", url, *rest])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_the_life_of_an_adapter(cli, letters, tmp_path) -> None:
    code, out, _ = cli("upload", letters[0], "--name", "letters", "--dry-run")
    assert code == 0
    assert "matched    1 modules" in out
    assert cli("show", "letters")[0] == 3

    for folder in letters:
        assert cli("upload", folder, "--name", "letters")[0] == 0
    code, out, _ = cli("list")
    assert out.splitlines()[1].split()[:3] == ["letters@2", "active", "cgc"]
    assert len(cli("versions", "letters")[1].splitlines()) == 3

    assert "letters@1" in cli("activate", "letters", 1)[1]
    assert "letters@2" in cli("rollback", "letters")[1]

    target = tmp_path / "letters.tar"
    assert cli("download", "letters", "--version", 1, "--out", target)[0] == 0
    code, out, _ = cli("upload", target, "--name", "copy", "--no-activate", "--json")
    assert json.loads(out)["state"] == "inactive"

    assert "pinned     True" in cli("pin", "letters")[1]
    code, _, err = cli("delete", "letters")
    assert (code, "pinned" in err) == (2, True)
    assert "pinned     False" in cli("pin", "letters", "--off")[1]
    assert cli("delete", "letters")[1] == "deleted    letters@1\ndeleted    letters@2\n"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("activate", "nobody", 1), 3, "no adapter is called"),
        (("upload", "/no/such/folder"), 2, "has no files to upload"),
    ],
)
def test_what_cannot_be_done_says_why(cli, arguments, code, words) -> None:
    found, _, err = cli(*arguments)
    assert (found, words in err) == (code, True), err


def test_a_server_that_is_not_there(capsys) -> None:
    assert main(["adapters", "list", "--url", "http://127.0.0.1:9"]) == 1
    assert "http://127.0.0.1:9 cannot be reached" in capsys.readouterr().err


def test_a_broken_download_leaves_nothing(cli, tmp_path) -> None:
    assert cli("download", "nobody", "--out", tmp_path / "x.tar")[0] == 3
    assert not list(tmp_path.glob("*x.tar*"))
