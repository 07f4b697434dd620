from __future__ import annotations

from oneplusn.loadtest.drive import Counts
from oneplusn.loadtest.progress import line


def test_one_line_says_how_it_goes() -> None:
    counts = Counts(sent=9, done=6, failed=1, tokens=40, first_tokens=(0.03, 0.01, 0.02))

    assert line(counts, 123.4) == "sent 9, done 6, failed 1, 123 tok/s, TTFT p50 20 ms"


def test_without_a_first_token_there_is_no_median() -> None:
    assert line(Counts(sent=1), 0.0) == "sent 1, done 0, failed 0, 0 tok/s, TTFT p50 -"


def test_counts_of_several_processes_add_up() -> None:
    assert Counts(3, 2, 1, 9, (0.1,)) + Counts(4, 4, 0, 8, (0.2, 0.3)) == Counts(
        7, 6, 1, 17, (0.1, 0.2, 0.3)
    )
