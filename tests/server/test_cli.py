"""The command line: help, mistakes in one line, and what runs without a server."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from bundles import write_adapter
from oneplusn import __version__, cli
from oneplusn.server.settings import Settings


def run(*arguments: str) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as done:  # argparse leaves this way
        return int(done.code or 0)


class TestHelp:
    def test_the_commands_are_listed(self, capsys) -> None:
        assert run("--help") == 0
        shown = capsys.readouterr().out
        for command in cli.COMMANDS:
            assert f"    {command.name} " in shown
            assert command.help in shown

    def test_serve_explains_every_setting_and_shows_examples(self, capsys) -> None:
        assert run("serve", "--help") == 0
        shown = " ".join(capsys.readouterr().out.split())
        for name, field in Settings.model_fields.items():
            assert f"--{name.replace('_', '-')} " in shown
            assert field.description in shown
        assert "oneplusn serve --model ./qwen3" in shown
        assert "trust-remote-code" not in shown

    @pytest.mark.parametrize("command", [command.name for command in cli.COMMANDS])
    def test_every_command_has_help(self, command, capsys) -> None:
        assert run(command, "--help") == 0
        assert capsys.readouterr().out.startswith(f"usage: oneplusn {command}")

    def test_version(self, capsys) -> None:
        assert run("--version") == 0
        assert capsys.readouterr().out == f"oneplusn {__version__}\n"


class TestMistakes:
    """One line on stderr, exit code 2, no traceback."""

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("serve", "--port", "abc"), "--port"),
            (("serve", "--trust-remote-code"), "Python code is never run"),
            (("serve", "--trust-remote-code", "true"), "Python code is never run"),
            (("serve", "--config", "/none.yaml"), "cannot read the settings file"),
            (("serve", "--adapter", "news"), "expected NAME=PATH"),
            (("adapters", "check", "/no/such/folder"), "neither a folder nor an archive"),
        ],
    )
    def test_one_line(self, arguments, said, capsys) -> None:
        assert run(*arguments) == 2
        shown = capsys.readouterr().err
        assert shown.startswith("oneplusn: ")
        assert said in shown
        assert shown.count("\n") == 1

    def test_a_port_that_is_taken(self, capsys) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            assert run("serve", "--model", "unused", "--port", str(port)) == 2
        assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err

    @pytest.mark.parametrize("arguments", [(), ("nope",), ("serve", "--nope")])
    def test_what_argparse_refuses(self, arguments, capsys) -> None:
        assert run(*arguments) == 2
        assert "Traceback" not in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("error", "code", "said"),
        [
            (KeyboardInterrupt(), 130, ""),
            (RuntimeError("odd"), 1, "unexpected RuntimeError: odd\n"),
        ],
    )
    def test_what_nobody_expected(self, monkeypatch, capsys, error, code, said) -> None:
        def fail(_: object) -> int:
            raise error

        (doctor,) = [command for command in cli.COMMANDS if command.name == "doctor"]
        monkeypatch.setattr(cli, "COMMANDS", (doctor._replace(run=fail),))
        assert run("doctor") == code
        assert capsys.readouterr().err == (f"oneplusn: {said}" if said else "")


class TestAdaptersCheck:
    def test_a_folder_is_described(self, tmp_path, capsys) -> None:
        folder = write_adapter(tmp_path / "letters", tasks=("vowels", "upper"))

        assert run("adapters", "check", str(folder)) == 0

        shown = capsys.readouterr().out
        assert "tasks    vowels, upper\n" in shown
        assert "experts  3, of which 1 serve several tasks\n" in shown
        assert "shared: rank 2, common\n" in shown
        assert "own-upper: rank 4, of upper\n" in shown

    def test_a_broken_one_is_refused(self, tmp_path, capsys) -> None:
        (tmp_path / "letters").mkdir()
        (tmp_path / "letters" / "adapter_model.bin").touch()
        assert run("adapters", "check", str(tmp_path / "letters")) == 2
        assert "only safetensors" in capsys.readouterr().err


def test_help_loads_nothing_heavy() -> None:
    code = "from oneplusn import cli; cli._parser(); import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    heavy = {"fastapi", "pydantic", "sqlalchemy", "torch", "transformers"}
    assert heavy.isdisjoint(done.stdout.split())
