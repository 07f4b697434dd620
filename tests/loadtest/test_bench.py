from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from oneplusn.loadtest import bench, bench_options, bench_server
from oneplusn.loadtest.bench_cases import Work
from oneplusn.loadtest.bench_results import Results
from oneplusn.loadtest.fixtures import Fixtures
from oneplusn.loadtest.peers import PEERS
from oneplusn.loadtest.peers.system import Absent, Places, Sink
from oneplusn.loadtest.processes import ChildFailed

BENCH = [sys.executable, "-P", "-m", "oneplusn.loadtest.bench"]


class Fake:
    """A system that notes what it was asked for, and does what it is told."""

    def __init__(self, name: str, *cases: str, breaks_at: str = "", ran: list[str]) -> None:
        self.name, self.cases, self.breaks_at, self.ran = name, cases, breaks_at, ran

    def run(self, cases: Sequence[str], sink: Sink) -> None:
        for case in cases:
            sink.check()
            if case == self.breaks_at:
                raise ChildFailed("exit code 1:\nno such option")
            self.ran.append(f"{self.name} {case}")
            sink.server(self.name, {"rss": 1})
            sink.row(self.name, case, {"output_throughput": 1.0})


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the benchmark on fakes: ours, a peer that breaks, one that is absent, one that runs."""
    monkeypatch.setattr(bench, "run_json", lambda *_args, **_kwargs: None)
    results = Results({}, {}, file=tmp_path / "figures.json")

    def run(
        ran: list[str], *arguments: str, breaks_at: str = "base", given: Mapping[str, Any] = {}
    ) -> Results:
        def absent(work: Work, places: Places) -> list[Fake]:
            raise Absent("install it")

        def peers(*fakes: Fake):
            return lambda work, places: fakes

        ours = [Fake("oneplusn", "one", "base", ran=ran)]
        monkeypatch.setattr(bench_server, "systems", lambda work: ours)
        breaking = Fake("broken server", "one", "base", breaks_at=breaks_at, ran=ran)
        monkeypatch.setitem(PEERS, "llama.cpp", peers(breaking))
        monkeypatch.setitem(PEERS, "vllm", given.get("vllm", absent))
        monkeypatch.setitem(PEERS, "peft", peers(Fake("PEFT", "loras", ran=ran)))
        words = ["--model", "tiny", "--peers", "llama.cpp,vllm,peft", "--no-profile", *arguments]
        bench.run(results, bench_options.parse("", words), tmp_path)
        return results

    return run


def test_a_peer_that_fails_or_is_absent_is_noted_and_the_others_run(measured) -> None:
    ran = list[str]()

    results = measured(ran)

    assert ran == ["oneplusn one", "oneplusn base", "broken server one", "PEFT loras"]
    assert results.missing == {
        "tiny": {"broken server": "exit code 1:\nno such option", "vllm": "install it"}
    }


def test_a_second_run_measures_what_the_first_did_not(measured) -> None:
    measured([])
    ran = list[str]()

    found = Fake("vLLM", "one", ran=ran)
    results = measured(ran, breaks_at="", given={"vllm": lambda work, places: [found]})

    assert ran == ["broken server base", "vLLM one"]
    assert results.missing == {"tiny": {}}


def test_systems_named_with_again_are_measured_once_more(measured) -> None:
    measured([])
    ran = list[str]()

    measured(ran, "--again", "oneplusn,peft")

    assert ran == ["oneplusn one", "oneplusn base", "PEFT loras"]


def test_nothing_begins_after_the_minutes_are_over(measured) -> None:
    ran = list[str]()

    with pytest.raises(bench.OutOfTime):
        measured(ran, "--minutes", "0")

    assert ran == []


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({}, 0),
        ({"llama.cpp": "does not start"}, 0),
        ({"oneplusn": "does not start"}, 1),
        ({"oneplusn, no adapters": "does not start"}, 1),
    ],
)
def test_only_our_own_failure_fails_the_run(
    found: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(results: Results, options: argparse.Namespace, folder: Path) -> None:
        results.missing["small"] = found

    monkeypatch.setattr(bench, "run", run)
    monkeypatch.setattr(sys, "argv", ["bench"])
    monkeypatch.setattr(bench.signal, "signal", lambda *_: None)

    assert bench.main() == expected


def test_request_i_asks_the_adapter_of_its_stream() -> None:
    work = Work("small", 5, 64, 64, 2, 3, 1, Fixtures(Path("x"), 5))

    assert work.asked("one") == ["base"]
    assert work.asked("base") == ["base"] * 5
    assert work.asked("lora") == ["lora-00"] * 5
    assert work.asked("loras") == ["lora-00", "lora-01", "lora-02", "lora-03", "lora-04"]
    assert work.asked("cgc") == [*(f"cgc-0-task-{task}" for task in range(4)), "cgc-1-task-0"]
    assert [work.requests(case) for case in ("one", "loras")] == [4, 10]
    assert work.title("cgc") == "5 tasks in 2 CGC clusters"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--peers", "tgi"], "no peer tgi; there are llama.cpp, vllm, transformers-serve"),
        (["--model", "small,huge"], "no model huge; there are tiny, small, mid"),
        (["--streams", "0"], "are 1 or more"),
        (["--output", "2"], "--output is 3 or more"),
        (["--vllm", "/no/such/python"], "/no/such/python is no program"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        bench_options.parse("", arguments)

    assert ended.value.code == 2
    assert reason in capsys.readouterr().err


def test_peers_of_the_user_are_found_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("llama-server", "vllm", "python"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_SERVER", raising=False)
    monkeypatch.delenv("VLLM_PYTHON", raising=False)

    options = bench_options.parse("", ["--peers", "all"])

    assert options.peers == list(PEERS)
    assert options.llama_server == tmp_path / "llama-server"
    assert options.vllm == tmp_path / "python"


@pytest.mark.e2e
@pytest.mark.slow
def test_quick_run_measures_every_case(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"

    done = subprocess.run(
        [*BENCH, "--quick", "--threads", "1", "--json", str(figures)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text(encoding="utf-8"))
    rows = found["rows"]["tiny"]
    assert list(rows["oneplusn"]) == ["one", "base", "lora", "loras", "cgc"]
    assert list(rows["oneplusn, no adapters"]) == ["one", "base"]
    assert all(row["output_throughput"] > 0 for row in rows["oneplusn"].values())
    assert list(found["shares"]["tiny"]) == ["base", "loras", "cgc"]
    for case, parts in found["shares"]["tiny"].items():
        assert (parts["delta"] > 0) == (case != "base")
        assert min(parts.values()) >= 0
    assert "| 2 different LoRAs | oneplusn |" in done.stdout
