from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from oneplusn.loadtest import processes
from oneplusn.loadtest.processes import ChildFailed, named, run_json, serving


def script(text: str, *arguments: str) -> list[str]:
    return [sys.executable, "-P", "-c", text, *arguments]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_options_name_every_adapter() -> None:
    adapters = {"a": Path("/x"), "b": Path("/y")}

    assert named(adapters, "--adapter") == ["--adapter", "a=/x", "--adapter", "b=/y"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("print('noise'); print('[1, 2]')", [1, 2]),
        ("pass", None),
        ("import os; print(os.environ['OMP_NUM_THREADS'])", 3),
    ],
)
def test_the_last_line_printed_is_the_result(text: str, expected: object) -> None:
    assert run_json(script(text), threads=3, limit_s=30) == expected


def test_a_child_that_fails_shows_what_it_wrote() -> None:
    with pytest.raises(ChildFailed, match=r"exit code 3:\nwhy"):
        run_json(
            script("import sys; print('why', file=sys.stderr); sys.exit(3)"), threads=1, limit_s=30
        )


def test_a_child_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    text = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"

    with pytest.raises(ChildFailed, match="longer than 3 s"):
        run_json(script(text, str(note)), threads=1, limit_s=3)

    assert not alive(int(note.read_text()))


SERVER = """
import http.server, json, os, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps([os.getpid(), sys.argv]).encode()
        self.send_response(200 if self.path == "/health/ready" else 404)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def use_server(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(processes, "python", lambda _module, *rest: script(text, *rest))


def test_a_server_is_up_inside_and_gone_after_an_interrupt(monkeypatch) -> None:
    use_server(monkeypatch, SERVER)
    pid = 0

    def interrupted() -> None:
        nonlocal pid
        with serving(["--model", "x"], threads=2) as address:
            pid, argv = processes.httpx.get(f"{address}/health/ready").json()
            assert argv[-2:] == ["--model", "x"]
            assert argv[argv.index("--threads") + 1] == "2"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    assert pid
    assert not alive(pid)


def test_a_server_that_ends_at_once_shows_why(monkeypatch) -> None:
    use_server(monkeypatch, "import sys; sys.exit('no such model')")

    with pytest.raises(ChildFailed, match="exit code 1:\nno such model"), serving([], threads=1):
        pass
