"""The socket between the API and the engine: where it lies, and that nothing on it waits."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from oneplusn.errors import ConfigError
from oneplusn.server.channel import ApiEnd, EngineEnd, socket_folder
from oneplusn.server.messages import Cancel, Freed, FromEngine, Loaded, ToEngine
from serving import wait_until

LONGEST_ADDRESS = 107


@pytest.fixture
def deep(tmp_path) -> Path:
    """A folder whose path alone is longer than a socket's address may be."""
    folder = tmp_path / ("d" * 60) / ("e" * 60)
    folder.mkdir(parents=True)
    return folder


class TestFolder:
    def test_it_is_private_and_its_path_is_short(self, deep) -> None:
        folder = socket_folder([str(deep), "/tmp"])
        try:
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert len(os.fsencode(folder / "999999")) < LONGEST_ADDRESS
        finally:
            folder.rmdir()

    def test_the_users_own_place_comes_first(self, tmp_path, monkeypatch) -> None:
        short = Path("/tmp") / f"x{os.getpid()}"
        short.mkdir()
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(short))
        folder = socket_folder()
        assert folder.parent == short
        folder.rmdir()
        short.rmdir()

    def test_a_place_that_cannot_be_used_is_passed_over(self, tmp_path) -> None:
        folder = socket_folder([None, "", str(tmp_path / "none"), "/tmp"])
        assert folder.parent == Path("/tmp")
        folder.rmdir()

    def test_no_place_at_all_is_said(self, deep) -> None:
        with pytest.raises(ConfigError, match="make /tmp writable"):
            socket_folder([str(deep)])


class TestMessages:
    @pytest.fixture
    def path(self) -> Iterator[Path]:
        folder = socket_folder(["/tmp"])
        yield folder / "0"
        shutil.rmtree(folder)

    @pytest.mark.anyio
    async def test_they_arrive_in_order_however_many_there_are(self, path) -> None:
        received: list[FromEngine] = []
        context = zmq.Context[zmq.Socket[bytes]]()
        api = ApiEnd(context, path, received.append)
        engine = EngineEnd(api.address)
        told = [Freed(str(number), number) for number in range(5000)]

        for message in told:  # while nobody reads: the event loop stands still
            engine.send(message)
        await until(lambda: len(received) == len(told))

        assert received == told
        api.close()
        engine.close()
        context.term()

    @pytest.mark.anyio
    async def test_a_reply_that_comes_while_something_is_sent_is_not_missed(self, path) -> None:
        """Sending may swallow the signal of the socket that there is something to read."""
        received: list[FromEngine] = []
        context = zmq.Context[zmq.Socket[bytes]]()
        api = ApiEnd(context, path, received.append)
        echo = threading.Thread(target=echo_until_stopped, args=[api.address])
        echo.start()
        await until(lambda: len(received) == 1)
        for number in range(1000):
            api.send(Cancel(str(number)))
            await asyncio.sleep(0)
        await until(lambda: len(received) == 1001)
        api.send(Cancel("stop"))
        await asyncio.to_thread(echo.join)
        assert received == [Loaded("hello"), *(Loaded(str(number)) for number in range(1000))]
        api.close()
        context.term()

    @pytest.mark.anyio
    async def test_what_is_sent_to_nobody_is_dropped(self, path) -> None:
        context = zmq.Context[zmq.Socket[bytes]]()
        api = ApiEnd(context, path, lambda _: None)
        api.send(Cancel("a"))
        api.close()
        api.send(Cancel("b"))
        context.term()


async def until(condition: Callable[[], bool]) -> None:
    await asyncio.to_thread(wait_until, condition)


def echo_until_stopped(address: str) -> None:
    engine = EngineEnd(address)
    engine.send(Loaded("hello"))
    messages: list[ToEngine] = []
    while Cancel("stop") not in messages:
        engine.wait(1)
        messages = engine.receive()
        for message in messages:
            if isinstance(message, Cancel) and message.id != "stop":
                engine.send(Loaded(message.id))
    engine.close()
