"""What a scrape looks like: read by Prometheus' own parser, held to its rules, and cheap."""

from __future__ import annotations

import math
import shutil
import subprocess
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from metric_lint import problems
from oneplusn.server.metric_rows import METRICS, Row
from oneplusn.server.metric_series import preamble, series_of
from oneplusn.server.metrics import MAX_TASK_LABELS, Metrics

NASTY = 'a"b\\c\nd{e}=ü,'
NO_PROMTOOL = (
    "promtool is not installed (Debian's package prometheus); metric_lint.py has its rules"
)


def text_of(row: Row, *told: tuple[float, dict[str, str]]) -> str:
    series = series_of(row)
    tell = getattr(series, {"counter": "add", "gauge": "set"}.get(row.type, "observe"))
    for amount, labels in told:
        tell(amount, labels)
    return preamble(row.exposed, row.type, row.help) + "".join(series.lines())


def busy(tasks: int = MAX_TASK_LABELS) -> Metrics:
    """Metrics in which every row has something, and every task its series."""
    metrics = Metrics("base")
    for index in range(tasks):
        label = metrics.task_label(f"task-{index}")
        for row in METRICS:
            values = {name: label if name == "task" else "some" for name in row.labels}
            if row.type == "counter":
                metrics.count(row.name, 2, **values)
            elif row.type == "gauge" and not row.labels:
                metrics.set(row.name, index)
            elif row.type in ("histogram", "summary"):
                metrics.observe(row.name, index / 7, **values)
    return metrics


def test_numbers() -> None:
    row = Row("things", "counter", "Things.", ("kind",))
    assert text_of(row, (1, {"kind": "a"}), (0.5, {"kind": "a"}), (3, {"kind": "b"})) == (
        "# HELP oneplusn_things_total Things.\n"
        "# TYPE oneplusn_things_total counter\n"
        'oneplusn_things_total{kind="a"} 1.5\n'
        'oneplusn_things_total{kind="b"} 3.0\n'
    )


def test_a_counter_without_labels_begins_at_zero_and_a_gauge_when_it_is_known() -> None:
    assert text_of(Row("a", "counter", "A.")).endswith("\noneplusn_a_total 0.0\n")
    assert text_of(Row("a", "gauge", "A.")).endswith("gauge\n")
    assert text_of(Row("a", "gauge", "A."), (2, {}), (1, {})).endswith("\noneplusn_a 1.0\n")


def test_a_histogram_counts_each_value_in_every_bucket_that_holds_it() -> None:
    row = Row("seconds", "histogram", "Seconds.", buckets=(0.5, 1, 2))
    told = [(value, {}) for value in (0.25, 1.0, 1.5, 8.0)]
    assert text_of(row, *told) == (
        "# HELP oneplusn_seconds Seconds.\n"
        "# TYPE oneplusn_seconds histogram\n"
        'oneplusn_seconds_bucket{le="0.5"} 1\n'
        'oneplusn_seconds_bucket{le="1.0"} 2\n'
        'oneplusn_seconds_bucket{le="2.0"} 3\n'
        'oneplusn_seconds_bucket{le="+Inf"} 4\n'
        "oneplusn_seconds_count 4\n"
        "oneplusn_seconds_sum 10.75\n"
    )


def test_a_summary_is_a_count_and_a_sum() -> None:
    row = Row("seconds", "summary", "Seconds.", ("task",))
    assert text_of(row, (0.5, {"task": "a"}), (1, {"task": "a"})).splitlines()[2:] == [
        'oneplusn_seconds_count{task="a"} 2',
        'oneplusn_seconds_sum{task="a"} 1.5',
    ]


def test_any_label_value_comes_back_as_it_was() -> None:
    row = Row("things", "gauge", "Things.", ("name",))
    (family,) = text_string_to_metric_families(text_of(row, (math.pi, {"name": NASTY})))
    (sample,) = family.samples
    assert (sample.labels, sample.value) == ({"name": NASTY}, math.pi)


@pytest.mark.parametrize("row", METRICS, ids=lambda row: row.name)
def test_a_row_is_well_formed(row) -> None:
    assert row.help.endswith(".")
    assert "\n" not in row.help
    assert "\\" not in row.help
    assert bool(row.buckets) == (row.type == "histogram")
    assert list(row.buckets) == sorted(set(row.buckets))


def test_a_scrape_keeps_the_rules() -> None:
    assert problems(busy(3).scrape().decode()) == []


@pytest.mark.skipif(shutil.which("promtool") is None, reason=NO_PROMTOOL)
def test_promtool_finds_nothing() -> None:
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=busy(3).scrape(), capture_output=True, timeout=30
    )
    assert (checked.stdout + checked.stderr).decode() == ""
    assert checked.returncode == 0


HELP = "# HELP {0} It.\n# TYPE {0} "
PLANTED = {
    "no-help": "# TYPE a gauge\na 1\n",
    "no-total": HELP.format("a") + "counter\na 1\n",
    "total-on-a-gauge": HELP.format("a_total") + "gauge\na_total 1\n",
    "colon": HELP.format("a:b") + "gauge\na:b 1\n",
    "camel-case": HELP.format("aB") + "gauge\naB 1\n",
    "milliseconds": HELP.format("a_ms") + "gauge\na_ms 1\n",
    "minutes": HELP.format("a_minutes_total") + "counter\na_minutes_total 1\n",
    "reserved-end": HELP.format("a_count") + "gauge\na_count 1\n",
    "reserved-end-of-counter": HELP.format("a_sum_total") + "counter\na_sum_total 1\n",
    "type-in-name": HELP.format("a_gauge") + "gauge\na_gauge 1\n",
    "reserved-label": HELP.format("a") + 'gauge\na{le="1"} 1\n',
    "label-case": HELP.format("a") + 'gauge\na{taskName="1"} 1\n',
    "twice": HELP.format("a") + 'gauge\na{b="1"} 1\na{b="1"} 2\n',
}


@pytest.mark.parametrize("text", PLANTED.values(), ids=PLANTED)
def test_the_rules_find_what_breaks_them(text) -> None:
    assert len(problems(text)) == 1


def test_a_scrape_of_200_tasks_is_cheap() -> None:
    metrics = busy()
    lines = metrics.scrape().count(b"\n")
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        metrics.scrape()
        seconds.append(time.perf_counter() - started)
    assert lines > 2000
    assert min(seconds) < 0.020


def test_more_tasks_than_have_labels_add_no_series() -> None:
    assert busy(2 * MAX_TASK_LABELS).scrape().count(b"\n") == busy().scrape().count(b"\n")
