"""Files that no version names leave the data folder while the server runs."""

from __future__ import annotations

import os
import time

from oneplusn.server import state
from oneplusn.server.settings import Settings
from serving import serving, wait_until


def test_a_file_that_nobody_has_named_for_a_day_is_removed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(state, "SWEEP_EVERY_S", 0.05)
    data = tmp_path / "data"
    with serving(Settings(model="tiny-base", data=data), tmp_path / "model"):
        fresh, old = data / "blobs" / ("a" * 64), data / "blobs" / ("b" * 64)
        for folder in (fresh, old):
            folder.mkdir()
        two_days_ago = time.time() - 2 * 86_400
        os.utime(old, (two_days_ago, two_days_ago))
        wait_until(lambda: not old.exists())
        assert fresh.exists()
