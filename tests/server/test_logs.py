"""The log: one line a request, without prompts, that nobody can forge."""

from __future__ import annotations

import json
import logging
import time

import pytest

from oneplusn.server.logs import (
    RequestRecord,
    configure_logging,
    log_request,
    read_trace_id,
)
from oneplusn.server.settings import Settings
from serving import wait_until


@pytest.fixture
def written(monkeypatch, capsys):
    """Configure as the server does, and undo it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    others = [logging.getLogger(name) for name in ("uvicorn", "httpx")]

    def configure(**settings: object) -> None:
        configure_logging(Settings.model_validate({"model": "m", **settings}))

    yield configure
    root.handlers[:] = handlers
    root.setLevel(level)
    for other in others:
        other.setLevel(logging.NOTSET)


def record() -> RequestRecord:
    return RequestRecord(
        "id-1", "POST", route="/generate", task="add", status=200, e2e_ms=12.345, prompt_tokens=0
    )


def test_a_line_of_pairs(written, capsys) -> None:
    written(log_format="text")
    log_request(record())
    stamp, rest = capsys.readouterr().err.split(" ", 1)
    assert stamp.endswith("Z")
    assert rest == (
        "INFO request request_id=id-1 method=POST route=/generate task=add status=200 "
        "prompt_tokens=0 e2e_ms=12.3\n"
    )


def test_a_line_of_json(written, capsys) -> None:
    written(log_format="json")
    log_request(record())
    line = json.loads(capsys.readouterr().err)
    assert (line["message"], line["task"], line["status"]) == ("request", "add", 200)
    assert "code" not in line


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_one_request_is_one_line_whatever_it_holds(written, capsys, log_format) -> None:
    written(log_format=log_format)
    forged = record()
    forged.task = 'x\n2026 INFO request status=200 "'
    log_request(forged)
    logging.getLogger("oneplusn").warning("a caller sent %s", "a\r\nb")
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_quieter_levels_are_left_out(written, capsys) -> None:
    written(log_level="warning")
    log_request(record())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("level", "lines"), [("info", 0), ("debug", 1)])
def test_probes_are_left_out_unless_asked_for(written, capsys, level, lines) -> None:
    written(log_level=level)
    log_request(RequestRecord("id", "GET", route="/health/ready", status=200))
    assert len(capsys.readouterr().err.splitlines()) == lines


def test_a_fault_is_logged_with_its_traceback(written, capsys) -> None:
    written(log_format="text")
    try:
        {}["nothing"]
    except KeyError:
        logging.getLogger("oneplusn").exception("failed")
    assert "Traceback" in capsys.readouterr().err


def test_a_served_request_leaves_its_figures_and_no_prompt(http, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="oneplusn.access"):
        secret = "my secret prompt"
        http.post("/generate", json={"task": "add", "inputs": secret})
        wait_until(lambda: bool(caplog.records))

    (line,) = caplog.records
    fields = line.fields
    assert secret not in caplog.text + str(fields)
    assert (fields["route"], fields["status"], fields["task"]) == ("/generate", 200, "add")
    assert (fields["adapter"], fields["finish_reason"]) == ("sums@1", "stop")
    assert (fields["prompt_tokens"], fields["completion_tokens"]) == (17, 23)
    assert 0 < fields["ttft_ms"] <= fields["e2e_ms"] < time.monotonic() * 1000


def test_a_refused_request_leaves_its_code(http, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="oneplusn.access"):
        http.post("/generate", json={"task": "nope", "inputs": "x"})
        wait_until(lambda: bool(caplog.records))
    assert caplog.records[0].fields["code"] == "model_not_found"


TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (f"00-{TRACE}-00f067aa0ba902b7-01", TRACE),
        (f"cc-{TRACE}-00f067aa0ba902b7-01-later", TRACE),
        (f"00-{TRACE}-00f067aa0ba902b7-01x", None),
        (f"00-{'0' * 32}-00f067aa0ba902b7-01", None),
        (f"00-{TRACE.upper()}-00f067aa0ba902b7-01", None),
        ("", None),
    ],
    ids=["version-0", "later-version", "longer", "no-trace", "upper-case", "absent"],
)
def test_a_trace_is_read_as_the_standard_says(header, found) -> None:
    assert read_trace_id(header) == found


def test_a_request_of_a_trace_leaves_its_id(http, caplog) -> None:
    headers = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
    with caplog.at_level(logging.INFO, logger="oneplusn.access"):
        http.get("/v1/models", headers=headers)
        wait_until(lambda: bool(caplog.records))
    assert caplog.records[0].fields["trace_id"] == TRACE


def test_a_line_says_how_long_a_request_waited(written, capsys) -> None:
    written(log_format="text")
    waited = record()
    waited.queue_ms = 3.21
    log_request(waited)
    assert " queue_ms=3.2 " in capsys.readouterr().err
