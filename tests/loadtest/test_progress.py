from __future__ import annotations

from types import SimpleNamespace

from oneplusn.loadtest.progress import line


def test_one_line_says_how_it_goes() -> None:
    driver = SimpleNamespace(sent=9, done=6, failed=1, first_tokens=[0.03, 0.01, 0.02])

    assert line(driver, 123.4) == "sent 9, done 6, failed 1, 123 tok/s, TTFT p50 20 ms"


def test_without_a_first_token_there_is_no_median() -> None:
    driver = SimpleNamespace(sent=1, done=0, failed=0, first_tokens=[])

    assert line(driver, 0.0) == "sent 1, done 0, failed 0, 0 tok/s, TTFT p50 -"
