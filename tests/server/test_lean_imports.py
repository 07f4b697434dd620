"""What an engine's process imports, and what can still be imported in it afterwards."""

from __future__ import annotations

import subprocess
import sys

import pytest

from oneplusn.server.lean_imports import UNUSED

LEAN = f"""
import sys
from oneplusn.server.lean_imports import build_lean

def build():
    from oneplusn.server.engine.engine import Engine, EngineConfig
    from oneplusn.server.engine.model import load_model

    return Engine(load_model("demo", threads=1), EngineConfig(kv_memory=1 << 20))

assert build_lean(build).model.vocab_size
heavy = {{"torch._dynamo", "torch._inductor", "sympy", *{UNUSED}}}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()

import torch
compiled = torch.compile(lambda x: x + 1, backend="eager")
assert compiled(torch.ones(2)).tolist() == [2, 2]
import sympy, scipy
assert sympy.Symbol("n").is_symbol
print("lean")
"""
# Something that the stand-ins are not enough for.
WHOLE = """
import logging
from oneplusn.server.lean_imports import build_lean

logging.basicConfig(format="%(message)s")

def build():
    import torch._dynamo
    return torch._dynamo.exc.TorchDynamoException

assert issubclass(build_lean(build), BaseException)
print("whole")
"""
# A function of transformers that needs the compiler after all.
INDEXED = """
from oneplusn.server.lean_imports import build_lean

def build():
    from transformers.masking_utils import TransformGetItemToIndex

    with TransformGetItemToIndex() as mode:
        return type(mode)

assert build_lean(build).__module__ == "torch._dynamo._trace_wrapped_higher_order_op"
print("indexed")
"""
REFUSED = """
from oneplusn.errors import ConfigError
from oneplusn.server.lean_imports import build_lean

times = []

def build():
    times.append(1)
    raise ConfigError("no such model")

try:
    build_lean(build)
except ConfigError:
    assert len(times) == 1
    print("refused")
"""


@pytest.mark.parametrize(
    ("code", "word"),
    [(LEAN, "lean"), (INDEXED, "indexed"), (REFUSED, "refused"), (WHOLE, "whole")],
    ids=["lean", "indexed", "refused", "whole"],
)
def test_a_process_that_builds_an_engine(code, word) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.stdout, done.returncode) == (f"{word}\n", 0), done.stderr
    assert ("built anew" in done.stderr) == (word == "whole")
