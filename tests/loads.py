"""Loads on scripted servers, by the command line's own functions."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from oneplusn.loadtest import load

MODELS = [{"id": "base"}, {"id": "a", "parent": "base"}, {"id": "b", "parent": "base"}]
KEY = "secret-key"


def serve(script, models=MODELS, **stream):
    """A server that lists models, counts words as tokens and answers streams."""

    def behave(request):
        if request.path == "/v1/models":
            return script(content=json.dumps({"data": models}).encode())
        if request.path == "/tokenize":
            tokens = [0] * len(request.json["prompt"].split())
            return script(content=json.dumps({"tokens": tokens}).encode())
        if request.path == "/version":
            return script(content=b'{"version": "9"}')
        return script(**{"events": 3, "first_s": 0.01, "gap_s": 0.005, **stream})

    return behave


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    load.declare(parser)
    return load.run(parser.parse_args(arguments))


def children(parent: int, module: str) -> list[int]:
    """Processes that a process started to run a module."""
    found = list[int]()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            ppid = int((folder / "stat").read_text().rpartition(") ")[2].split()[1])
        except (OSError, IndexError):
            continue  # it ended meanwhile
        if ppid == parent and module.encode() in words:
            found.append(int(folder.name))
    return found


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))
