"""The command line: `oneplusn serve | train | adapters | ...`; COMMANDS lists all of it.

Mistakes of the caller end in one line on stderr and exit code 2, Ctrl-C in 130; nobody is shown a
traceback, unless the log level is debug. Every command imports what it needs when it is chosen.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from oneplusn import __version__
from oneplusn.errors import OneplusnError

if TYPE_CHECKING:
    from oneplusn.server.settings import Settings

EXIT_FAULT = 1
EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130

SERVE_EXAMPLES = """\
examples:
  oneplusn serve
      the demo model on http://127.0.0.1:8000
  oneplusn serve --model ./qwen3 --adapter news=./lora-news --adapter legal=./lora-legal
      a model from a folder with two adapters; each plain LoRA is one task of its name
  oneplusn serve --config server.yaml --data ./data --kv-memory 2GiB
      settings from a file, uploads kept on disk

every setting can also come from the environment (ONEPLUSN_PORT=9000) or from the file given by
--config (port: 9000); the command line wins, then the environment, then the file
"""


class Command(NamedTuple):
    """One subcommand: what it is called, what it does, its options, and how to run it."""

    name: str
    help: str
    declare: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    epilog: str | None = None


class _Parser(argparse.ArgumentParser):
    """A parser whose options are declared when it is the one that parses."""

    declare: Callable[[argparse.ArgumentParser], None] | None = None

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  (overloaded)
        """Declare the options, then parse."""
        if self.declare is not None:
            declare, self.declare = self.declare, None
            declare(self)
        return super().parse_known_args(*args, **kwargs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    args = _parser().parse_args(arguments)
    command: Command = args.command
    try:
        return command.run(args)
    except OneplusnError as error:
        return _complain(error.message, EXIT_MISTAKE)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:
        if getattr(args, "log_level", None) == "debug":
            raise
        return _complain(f"unexpected {type(error).__name__}: {error}", EXIT_FAULT)


def _complain(message: str, code: int) -> int:
    print(f"oneplusn: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="oneplusn", description="Serve many fine-tuned tasks from one base model."
    )
    parser.add_argument("--version", action="version", version=f"oneplusn {__version__}")
    commands = parser.add_subparsers(
        title="commands", required=True, metavar="COMMAND", parser_class=_Parser
    )
    for command in COMMANDS:
        sub = commands.add_parser(
            command.name,
            help=command.help,
            description=command.help,
            epilog=command.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.declare = command.declare
        sub.set_defaults(command=command)
    return parser


def _declare_settings(parser: argparse.ArgumentParser, names: Sequence[str] | None = None) -> None:
    """Add one flag per setting; those that are not given do not appear in the result."""
    from oneplusn.server.settings import REFUSED, Settings, shown_default

    for name in names or Settings.model_fields:
        field = Settings.model_fields[name]
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            action="append" if name == "adapter" else "store",
            default=argparse.SUPPRESS,
            metavar="NAME=PATH" if name == "adapter" else "VALUE",
            help=f"{field.description}{_default(shown_default(name))}".replace("%", "%%"),
        )
    parser.add_argument("--config", type=Path, help="Settings file, YAML or TOML.")
    for name in REFUSED:
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(
            flag, nargs="?", const="true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )


def _default(shown: str) -> str:
    return "" if shown == "none" else f" Default: {shown}."


def _settings(args: argparse.Namespace) -> Settings:
    """Read the settings that a command was given."""
    from oneplusn.server.settings import REFUSED, Settings, load_settings

    known = {*Settings.model_fields, *REFUSED}
    given = {name: value for name, value in vars(args).items() if name in known}
    return load_settings(given, config=args.config)


def _serve(args: argparse.Namespace) -> int:
    from oneplusn.server.serve import serve

    serve(_settings(args))
    return 0


def _declare_generate(parser: argparse.ArgumentParser) -> None:
    from oneplusn.server.settings import ENGINE_SETTINGS

    parser.add_argument("prompt", nargs="+", help="Texts to answer, all in one batch.")
    parser.add_argument("--task", help="The task that answers; the bare base otherwise.")
    parser.add_argument("--max-tokens", type=int, default=128, help="Most tokens of an answer.")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = the likeliest tokens.")
    _declare_settings(parser, (*ENGINE_SETTINGS, "adapter", "log_level"))


def _generate(args: argparse.Namespace) -> int:
    settings = _settings(args)
    from oneplusn.server.engine.llm import Engine

    engine = Engine(
        settings.model,
        adapters=settings.adapter,
        revision=settings.revision,
        dtype=settings.dtype,
        quantize=settings.quantize,
        device=settings.device,
        threads=settings.threads,
        kv_memory=settings.kv_memory,
        adapter_memory=settings.adapter_memory,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        token_budget=settings.token_budget,
        max_adapters=settings.max_adapters,
    )
    with engine:
        answers = engine.generate(
            args.prompt, args.task, max_tokens=args.max_tokens, temperature=args.temperature
        )
    for answer in answers:
        print(answer.text)
    return 0


def _train(args: argparse.Namespace) -> int:
    from oneplusn.adapters.training import cli
    from oneplusn.server.adapters_cli import publisher

    return cli.run(args, publisher=publisher)


def _loadtest(args: argparse.Namespace) -> int:
    from oneplusn.loadtest import load

    return load.run(args)


def _declared_by(module: str) -> Callable[[argparse.ArgumentParser], None]:
    """Have a module declare its options when its command is chosen."""

    def declare(parser: argparse.ArgumentParser) -> None:
        import_module(module).declare(parser)

    return declare


def _run_by(module: str) -> Callable[[argparse.Namespace], int]:
    """Have a module run its command."""

    def run(args: argparse.Namespace) -> int:
        code: int = import_module(module).run(args)
        return code

    return run


def _declare_demo(parser: argparse.ArgumentParser) -> None:
    from oneplusn.demo import run

    run.add_arguments(parser)


def _demo(args: argparse.Namespace) -> int:
    from oneplusn.demo import run

    return run.main(args)


def _declare_doctor(parser: argparse.ArgumentParser) -> None:
    from oneplusn.server.settings import MODEL_SETTINGS

    _declare_settings(parser, (*MODEL_SETTINGS, "log_level"))


def _doctor(args: argparse.Namespace) -> int:
    settings = _settings(args)
    from oneplusn.server.doctor import report

    for line in report(settings):
        print(line, flush=True)
    return 0


TRAIN = "oneplusn.adapters.training.cli"
CLUSTER = "oneplusn.adapters.training.cluster_cli"
CONVERT = "oneplusn.adapters.converters.cli"
EDIT = "oneplusn.adapters.training.edit_cli"
ADAPTERS = "oneplusn.server.adapters_cli"
DATA = "oneplusn.server.data"
LOADTEST = "oneplusn.loadtest.options"

COMMANDS = (
    Command("serve", "serve a model over HTTP", _declare_settings, _serve, SERVE_EXAMPLES),
    Command("generate", "answer prompts without a server", _declare_generate, _generate),
    Command("train", "train the adapters of task clusters", _declared_by(TRAIN), _train),
    Command(
        "cluster",
        "find out which tasks belong into one cluster",
        _declared_by(CLUSTER),
        _run_by(CLUSTER),
    ),
    Command(
        "convert", "read and write other adapter formats", _declared_by(CONVERT), _run_by(CONVERT)
    ),
    Command(
        "edit",
        "make a new version of an adapter",
        _declared_by(EDIT),
        _run_by(EDIT),
    ),
    Command(
        "adapters",
        "upload, activate and look at adapters",
        _declared_by(ADAPTERS),
        _run_by(ADAPTERS),
    ),
    Command("data", "check, back up and restore a data folder", _declared_by(DATA), _run_by(DATA)),
    Command("loadtest", "load any OpenAI-compatible server", _declared_by(LOADTEST), _loadtest),
    Command("demo", "serve the demo model, ask every task at once, show it", _declare_demo, _demo),
    Command("doctor", "say what this machine can serve", _declare_doctor, _doctor),
)

if __name__ == "__main__":
    sys.exit(main())
