from __future__ import annotations

import asyncio
import json
from email import message_from_bytes
from email.policy import HTTP
from itertools import cycle
from pathlib import Path

import pytest

from oneplusn.loadtest.churn import Churn, Package
from oneplusn.loadtest.dialects import DIALECTS
from oneplusn.loadtest.stream import LoadFailed
from oneplusn.loadtest.transport import reach

ROUTE = DIALECTS["completions"]
WEIGHTS = bytes(range(256)) * 4 + b"\r\n--x\r\n"


@pytest.fixture
def packages(tmp_path: Path) -> list[Package]:
    made = list[Package]()
    for version in ("one", "two"):
        folder = tmp_path / version
        folder.mkdir()
        (folder / "config.json").write_text(version)
        (folder / "weights.bin").write_bytes(WEIGHTS)
        (folder / "checkpoints").mkdir()
        made.append(Package.read("letters", folder))
    return made


def parts(body: bytes, content_type: str) -> dict[str, bytes]:
    """Read a form with a parser of somebody else's."""
    message = message_from_bytes(
        f"content-type: {content_type}\r\n\r\n".encode() + body, policy=HTTP
    )
    return {
        part.get_filename() or part.get_param("name", header="content-disposition"):
            part.get_payload(decode=True)
        for part in message.iter_parts()
    }  # fmt: skip


class Adapters:
    """The behaviour of a server that keeps versions by content and answers with the active one."""

    def __init__(self, script, *, refuse: bool = False, lag: bool = False) -> None:
        self._script = script
        self._refuse = refuse
        self._lag = lag
        self.contents: list[bytes] = []
        self.uploads: list[dict[str, bytes]] = []
        self.active = 0

    def __call__(self, request):
        if not request.path.startswith("/v1/adapters"):
            active = self.active - self._lag
            return self._script(adapter=f"letters@{active}", events=1, first_s=0.02)
        if (request.method, request.path) == ("PUT", "/v1/adapters/letters"):
            self.active = json.loads(request.body)["version"]
            return self._script(content=json.dumps(self._described).encode())
        form = parts(request.body, request.headers["content-type"])
        self.uploads.append(form)
        if self._refuse and len(self.uploads) > 1:
            return self._script(status=422, content=b'{"error": {"code": "adapter_invalid"}}')
        content = form["config.json"]
        if content not in self.contents:
            self.contents.append(content)
        self.active = self.contents.index(content) + 1
        return self._script(content=json.dumps(self._described).encode())

    @property
    def _described(self) -> dict[str, object]:
        tasks = ["vowels", "upper"]
        return {"id": f"letters@{self.active}", "version": self.active, "tasks": tasks}


def churned(address: str, packages: list[Package], count: int, *, how: str = "upload") -> Churn:
    server = reach(address)
    asked = list[str]()

    def ask(task: str) -> bytes:
        asked.append(task)
        if len(asked) == count:
            churn.halted.set()
        return server.post(ROUTE.path, json.dumps(ROUTE.body(task, "x", 1)).encode())

    churn = Churn(server, ROUTE, "letters", cycle(packages), 20.0, 10.0, ask, how)
    churn.prepare(1 if how == "upload" else len(packages))
    asyncio.run(asyncio.wait_for(churn.run(), 20))
    assert set(asked) == {"vowels"}
    return churn


def test_a_form_has_the_name_and_the_files_as_they_are(scripted, script, packages) -> None:
    behave = Adapters(script)
    churned(scripted(behave).address, packages, 1)

    assert behave.uploads[0] == {
        "name": b"letters",
        "config.json": b"one",
        "weights.bin": WEIGHTS,
    }


def test_versions_take_turns_and_their_first_tokens_are_timed(scripted, script, packages) -> None:
    churn = churned(scripted(Adapters(script)).address, packages, 5)

    assert churn.tasks == ("vowels", "upper")
    assert [swap.version for swap in churn.swaps] == [
        "letters@1", "letters@2", "letters@1", "letters@2", "letters@1", "letters@2",
    ]  # fmt: skip
    assert [Path(swap.content).name for swap in churn.measured[:2]] == ["two", "one"]
    for swap in churn.measured:
        assert swap.failure is None
        assert swap.due <= swap.started < swap.answered < swap.first_token
        assert swap.first_token - swap.answered > 0.02
    dues = [swap.due for swap in churn.measured]
    assert [later - dues[0] for later in dues] == pytest.approx([i / 20 for i in range(5)])


def test_versions_that_are_there_are_activated_and_not_sent_again(
    scripted, script, packages
) -> None:
    behave = Adapters(script)
    churn = churned(scripted(behave).address, packages, 4, how="activate")

    assert len(behave.uploads) == 2
    assert [swap.version for swap in churn.measured] == [
        "letters@1", "letters@2", "letters@1", "letters@2",
    ]  # fmt: skip
    assert not [swap for swap in churn.measured if swap.failure]


def test_asking_changes_nothing(scripted, script, packages) -> None:
    behave = Adapters(script)
    churn = churned(scripted(behave).address, packages, 3, how="ask")

    assert len(behave.uploads) == 2
    assert [swap.version for swap in churn.measured] == ["letters@2"] * 3
    assert not [swap for swap in churn.measured if swap.failure]


def test_an_old_version_that_answers_after_the_swap_is_a_failure(
    scripted, script, packages
) -> None:
    churn = churned(scripted(Adapters(script, lag=True)).address, packages, 1)

    (swap,) = churn.measured
    assert swap.first_token is None
    assert "letters@2 was active, and the next answer named letters@1" in str(swap.failure)


def test_a_refused_upload_is_noted_and_the_next_one_is_due(scripted, script, packages) -> None:
    def four():
        for index, package in enumerate(cycle(packages)):
            if index == 4:
                churn.halted.set()
            yield package

    server = reach(scripted(Adapters(script, refuse=True)).address)
    churn = Churn(server, ROUTE, "letters", four(), 50.0, 10.0)
    churn.prepare()
    asyncio.run(churn.run())

    assert [swap.failure.group for swap in churn.measured if swap.failure] == ["upload 422"] * 3


@pytest.mark.parametrize(
    ("content", "status", "reason"),
    [(b"[]", 200, "names no version"), (b"x", 200, "names no version"), (b"", 404, "answered 404")],
)
def test_an_upload_that_is_not_answered_with_a_version_is_refused(
    scripted, script, packages, content, status, reason
) -> None:
    server = scripted(lambda request: script(content=content, status=status))
    churn = Churn(reach(server.address), ROUTE, "letters", cycle(packages), 1.0, 10.0)

    with pytest.raises(LoadFailed, match=reason):
        churn.prepare()
