"""The socket that the server listens on."""

from __future__ import annotations

import socket

import pytest

from oneplusn.errors import ConfigError
from oneplusn.server.serve import _listen
from oneplusn.server.settings import Settings


def test_what_is_accepted_sends_at_once() -> None:
    """Without it, every answer on a connection that is kept open comes 40 ms late."""
    with _listen(Settings(port=0)) as listener:
        client = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        with client, accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_port_that_is_taken_is_refused_with_the_way_out() -> None:
    with _listen(Settings(port=0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match="choose another --port"):
            _listen(Settings(port=port))
