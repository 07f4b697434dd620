"""What an engine's process imports, and what can still be imported in it afterwards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from oneplusn.server.engine_process import ENGINE_MODULES
from oneplusn.server.lean_imports import UNUSED

# torch says itself that it has no torch.distributed when it is asked afterwards.
LEAN = f"""
import sys
from oneplusn.server.lean_imports import import_lean

import_lean(*{ENGINE_MODULES})
heavy = {{"torch._dynamo", "torch._inductor", "sympy", *{UNUSED}}}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()

import torch
from transformers import masking_utils

with masking_utils.TransformGetItemToIndex() as mode:
    assert type(mode).__module__ == "torch._dynamo._trace_wrapped_higher_order_op"
compiled = torch.compile(lambda x: x + 1, backend="eager")
assert compiled(torch.ones(2)).tolist() == [2, 2]
import sympy, scipy
print("lean")
"""
# A module that the stubs are not enough for.
WHOLE = """
import logging
import sys
from oneplusn.server.lean_imports import import_lean

logging.basicConfig(format="%(message)s")
import_lean("derived")
assert issubclass(sys.modules["derived"].Derived, BaseException)
import torch.distributed
assert torch.distributed.is_available()
print("whole")
"""
DERIVED = """
import torch._dynamo

class Derived(torch._dynamo.exc.TorchDynamoException):
    pass
"""


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_an_engine_imports_nothing_that_compiles(tmp_path) -> None:
    done = run(LEAN, tmp_path)
    assert (done.stdout, done.returncode) == ("lean\n", 0), done.stderr
    assert "imported whole" not in done.stderr


def test_what_the_stubs_are_not_enough_for_is_imported_whole(tmp_path) -> None:
    (tmp_path / "derived.py").write_text(DERIVED)
    done = run(WHOLE, tmp_path)
    assert (done.stdout, done.returncode) == ("whole\n", 0), done.stderr
    assert "imported whole" in done.stderr
