"""What several tests of the engine use."""

from __future__ import annotations

import pytest


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy one page at a time, so that the tiny adapters take many pieces."""
    monkeypatch.setattr("oneplusn.adapters.storage.PIECE_BYTES", 1)
