"""The modules of the API process load without torch."""

from __future__ import annotations

import subprocess
import sys

MODULES = "oneplusn.cli, oneplusn.server.app, oneplusn.server.serve"


def test_importing_them_loads_no_torch() -> None:
    code = f"import sys, {MODULES}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr
