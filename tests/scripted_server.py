"""`oneplusn serve` as a process, with a scripted engine in its child process: nobody loads torch.

python -m scripted_server SETTINGS_JSON          the server
python -m scripted_server ADDRESS PARENT_PID     its engine, settings on stdin
"""

from __future__ import annotations

import sys
from pathlib import Path

from oneplusn.server.settings import Settings
from scripted_engine import ScriptedCore, ready_message


def run_server(settings: str) -> None:
    import msgspec

    from oneplusn.demo.tokenizer import build_tokenizer
    from oneplusn.server import serve
    from oneplusn.server.launch import ChildProcess
    from oneplusn.server.workers import Workers

    given = Settings(**msgspec.json.decode(settings))
    build_tokenizer(Path(given.model))
    Workers.start = lambda self: None
    serve.launcher = lambda given: lambda at: ChildProcess(given, at, module="scripted_server")
    serve.serve(given)


def build_engine(settings: Settings):
    core = ScriptedCore(step_seconds=0.005)
    return core, lambda load: load, ready_message(Path(settings.model))


def run_engine() -> int:
    from oneplusn.server import engine_process

    engine_process.build_engine = build_engine
    engine_process.build_lean = lambda build: build()
    return engine_process.main()


if __name__ == "__main__":
    if len(sys.argv) == 3:
        sys.exit(run_engine())
    run_server(sys.argv[1])
