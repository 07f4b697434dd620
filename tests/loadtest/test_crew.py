from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from loads import KEY, children, report, run, serve

PROGRAM = """
import argparse, sys
from oneplusn.loadtest import load
parser = argparse.ArgumentParser()
load.declare(parser)
sys.exit(load.run(parser.parse_args()))
"""


@pytest.mark.parametrize("loop", [["--rate", "60"], ["--concurrency", "5"]])
def test_several_processes_send_one_load(scripted, script, tmp_path: Path, loop) -> None:
    server = scripted(serve(script, first_s=0.02))

    code = run(
        server.address, *loop, "--num-requests", "31", "--processes", "3", "--warmup", "0.1",
        "--output-tokens", "3", "--api-key", KEY, "--out", str(tmp_path),
    )  # fmt: skip

    assert code == 0
    found = report(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    counted = [row for row in rows if row["counts"]]
    assert (found["completed"], found["client_processes"]) == (31, 3)
    assert len({row["index"] for row in rows}) == len(rows)
    assert found["total_output_tokens"] == sum(row["output_tokens"] for row in counted) == 93
    prompts = [request.json["prompt"] for request in server.streams]
    assert len(set(prompts)) == len(prompts) == len(rows)
    assert max(found["client_cpu_shares"]) == found["client_cpu_share"] > 0
    if loop[0] == "--rate":
        # Together they keep the schedule that one process would have kept.
        assert [row["index"] for row in sorted(rows, key=lambda row: row["due"])] == list(
            range(len(rows))
        )
    else:
        assert 3 <= found["max_concurrent_requests"] <= 5


def test_a_client_process_that_dies_ends_the_load(
    scripted, script, capfd: pytest.CaptureFixture[str]
) -> None:
    asked, inner = threading.Event(), serve(script, first_s=30.0)

    def behave(request):
        if request.is_stream:
            asked.set()
        return inner(request)

    def kill() -> None:
        assert asked.wait(30)
        os.kill(children(os.getpid(), "oneplusn.loadtest.worker")[0], signal.SIGKILL)

    address = scripted(behave).address
    killing = threading.Thread(target=kill)
    killing.start()
    code = run(address, "--concurrency", "2", "--processes", "2", "--duration", "60")
    killing.join()

    assert code == 1
    assert "a client process ended early, with exit code -9" in capfd.readouterr().err
    assert children(os.getpid(), "oneplusn.loadtest.worker") == []


@pytest.mark.parametrize(
    "loop", [["--rate", "40"], ["--concurrency", "2"], ["--concurrency", "2", "--processes", "2"]]
)
def test_ctrl_c_ends_with_a_report_of_what_was_measured(
    scripted, script, tmp_path: Path, loop: list[str]
) -> None:
    several = threading.Event()
    inner = serve(script)

    def behave(request):
        if len(server.streams) > 6:
            several.set()
        return inner(request)

    server = scripted(behave)
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", PROGRAM, server.address, *loop, "--duration", "600",
         "--out", str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert several.wait(30)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()

    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "**Interrupted:**" in out
    found = report(tmp_path)
    assert found["interrupted"]
    assert found["completed"] >= 4
    assert found["failed"] == 0


def test_nothing_stays_behind_when_the_parent_dies(scripted, script) -> None:
    asked, inner = threading.Event(), serve(script, first_s=30.0)

    def behave(request):
        if request.is_stream:
            asked.set()
        return inner(request)

    load_of = [scripted(behave).address, "--concurrency", "2", "--processes", "2"]
    parent = subprocess.Popen([sys.executable, "-P", "-c", PROGRAM, *load_of])
    try:
        assert asked.wait(30)
        clients = [
            os.pidfd_open(child) for child in children(parent.pid, "oneplusn.loadtest.worker")
        ]
        assert len(clients) == 2
    finally:
        parent.kill()
        parent.wait()

    for client in clients:
        ended, _, _ = select.select([client], [], [], 30)
        os.close(client)
        assert ended
