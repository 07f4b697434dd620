"""What `oneplusn demo` reads from the server's metrics."""

from __future__ import annotations

import pytest

from oneplusn.demo.run import most_tasks_in_a_step, questions
from oneplusn.demo.tasks import TASKS


def histogram(**counts: float) -> str:
    bounds = {"le1": "1.0", "le2": "2.0", "le12": "12.0", "inf": "+Inf"}
    return "\n".join(
        f'oneplusn_batch_distinct_tasks_bucket{{le="{bounds[name]}"}} {count}'
        for name, count in counts.items()
    )


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"le1": 0, "le2": 0, "le12": 0, "inf": 0}, 0),
        ({"le1": 4, "le2": 4, "le12": 4, "inf": 4}, 1),
        ({"le1": 4, "le2": 9, "le12": 9, "inf": 9}, 2),
        ({"le1": 0, "le2": 0, "le12": 3, "inf": 3}, 12),
        ({"le1": 1, "le2": 2, "le12": 3, "inf": 4}, 12),
    ],
    ids=["no step", "one task", "two tasks", "twelve at once", "beyond the last bound"],
)
def test_the_widest_step_is_the_highest_bucket_that_grew(counts, expected):
    assert most_tasks_in_a_step(histogram(**counts)) == expected


def test_every_task_and_the_base_get_the_same_inputs():
    asked = questions(4)
    assert len(asked) == len(TASKS) * 4 * 2
    for task in TASKS:
        mine = [question for question in asked if question.task == task]
        adapted = sorted(question.text for question in mine if question.adapted)
        assert adapted == sorted(question.text for question in mine if not question.adapted)
