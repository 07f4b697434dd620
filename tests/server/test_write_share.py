"""How long a swap may write between two steps."""

from __future__ import annotations

import pytest

from oneplusn.server.engine_process import write_seconds


@pytest.mark.parametrize(
    ("last_step", "seconds"),
    [
        pytest.param(None, 0.02, id="no step waits"),
        pytest.param(0.04, 0.0032, id="a share of a step"),
        pytest.param(0.001, 0.0005, id="never nothing"),
        pytest.param(0.0, 0.0005, id="before the first step"),
    ],
)
def test_a_swap_may_write_for(last_step: float | None, seconds: float) -> None:
    assert write_seconds(last_step) == pytest.approx(seconds)
