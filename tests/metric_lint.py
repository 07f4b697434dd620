"""Prometheus' naming rules for exporters, as `promtool check metrics` holds them, over a scrape."""

from __future__ import annotations

import re
from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

TYPE_NAMES = ("counter", "gauge", "histogram", "summary")
RESERVED_ENDS = ("_bucket", "_count", "_sum")
RESERVED_LABELS = {"histogram": "le", "summary": "quantile"}
# Anything but a base unit, and abbreviations of units.
BAD_UNITS = re.compile(
    r"_(ms|us|ns|s|sec|secs|milliseconds?|microseconds?|minutes?|hours?|days?|kb|mb|gb|kib|mib|gib"
    r"|kilobytes?|megabytes?|gigabytes?|bits?|percent|perc)(_|\Z)"
)


def problems(scrape: str) -> list[str]:
    """List what is wrong with the names of a scrape, as `name: reason`."""
    found = []
    series: set[tuple[str, ...]] = set()
    declared = [line.split()[2] for line in scrape.splitlines() if line.startswith("# TYPE ")]
    found += [f"{name}: declared twice" for name in {n for n in declared if declared.count(n) > 1}]
    for family in text_string_to_metric_families(scrape):
        # The parser takes the ending off a counter's name; without it, there is none to take.
        exposed = f"{family.name}_total" if family.type == "counter" else family.name
        if exposed not in declared:
            found.append(f"{family.name}: a {family.type} without _total, or without a type")
        found += [f"{exposed}: {reason}" for reason in _of_family(exposed, family)]
        for sample in family.samples:
            key = (sample.name, *(part for pair in sorted(sample.labels.items()) for part in pair))
            if key in series:
                found.append(f"{sample.name}: the labels {sample.labels} are there twice")
            series.add(key)
    return found


def _of_family(name: str, family: Metric) -> Iterator[str]:
    if not family.documentation:
        yield "no help"
    if ":" in name:
        yield "colons are for recording rules"
    if name.lower() != name:
        yield "not in snake case"
    if family.type != "counter" and name.endswith("_total"):
        yield f"a {family.type} with _total"
    if name.removesuffix("_total").endswith(RESERVED_ENDS):
        yield "ends as the lines of a histogram do"
    if any(kind in name.split("_") for kind in TYPE_NAMES):
        yield "its type is in its name"
    if BAD_UNITS.search(name.removesuffix("_total")):
        yield "not in a base unit"
    labels = {label for sample in family.samples for label in sample.labels}
    for kind, label in RESERVED_LABELS.items():
        if label in labels and family.type != kind:
            yield f"the label {label} is a {kind}'s"
    yield from (f"the label {label} is not in snake case" for label in labels if _is_bad(label))


def _is_bad(label: str) -> bool:
    return label.lower() != label or label.startswith("__")
