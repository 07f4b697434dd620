"""Show what `make gpu-smoke` found, in Markdown: verdicts, and timings beside their predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from oneplusn.kernels.plan import SiteSpec
from oneplusn.kernels.smoke import attention_timing, roofline
from oneplusn.kernels.smoke.roofline import BASE, BESIDE, CASES, IDEAL, SHARING, SITES, WAYS, Case
from oneplusn.kernels.smoke.supervisor import Row

Measured = Mapping[tuple[str, str, str], float]
"""Microseconds by case, site and way."""
Figure = Callable[[SiteSpec], float | None]
DRY = (
    "**Dry run: there is no GPU.** The same code ran at tiny shapes in Triton's interpreter, "
    "which proves neither speed nor the absence of races. Nothing below was measured."
)


def report(rows: Sequence[Row], facts: Mapping[str, str], *, date: str, seconds: float) -> str:
    """Return the report of a run."""
    measured = {
        (row.case, row.site, row.way): row.outcome.value
        for row in rows
        if row.outcome.value is not None and row.part in {"timing", "sharing"}
    }
    device = facts.get("device") or "no GPU"
    versions = [f"{name} {facts[name]}" for name in ("driver", "torch", "triton") if name in facts]
    failed = [row for row in rows if row.outcome.fault]
    verdict = f"{len(failed)} of {len(rows)} items failed." if failed else "All that ran is right."
    parts = [
        f"# The kernels on {device}",
        f"{date}; {', '.join(versions)}. {seconds:.0f} s. {verdict}",
        *([DRY] if not facts.get("device") else []),
        _section("What failed", [f"- {row}" for row in failed]),
        _section("What ran", _parts(rows)),
        _section("Against fp64", _grid([row for row in rows if row.part == "correctness"])),
        _section("Replays that differ", _grid([row for row in rows if row.part == "replays"])),
        _section("What was left out", _left_out(rows)),
        _section("Block shapes", [f"- `{row.outcome.note}`" for row in rows if row.part == "tune"]),
        "## Microseconds, predicted and measured",
        timing_tables(measured),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _section(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"## {title}", "", *lines]) if lines else ""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _parts(rows: Sequence[Row]) -> list[str]:
    """Count the items of every part."""
    lines = []
    for part in dict.fromkeys(row.part for row in rows):
        of_part = [row for row in rows if row.part == part]
        failed = sum(bool(row.outcome.fault) for row in of_part)
        left_out = sum(bool(row.outcome.left_out) for row in of_part)
        done = len(of_part) - failed - left_out
        seconds = sum(row.seconds for row in of_part)
        lines.append([part, str(done), str(failed), str(left_out), f"{seconds:.1f}"])
    header = ["part", "right", "failed", "left out", "seconds, all processes"]
    return _table(header, lines) if lines else []


def _grid(rows: Sequence[Row]) -> list[str]:
    """Return a table with the ways as columns."""
    ways = list(dict.fromkeys(row.way for row in rows))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        cells.setdefault((row.site, row.case), {})[row.way] = _cell(row)
    lines = [[*key, *(line.get(way, "") for way in ways)] for key, line in cells.items()]
    return _table(["site", "case", *ways], lines) if lines else []


def _cell(row: Row) -> str:
    if row.outcome.fault:
        return "**FAILED**"
    if row.outcome.left_out or row.outcome.value is None:
        return "-"
    return f"{row.outcome.value:.2g}"


def _left_out(rows: Sequence[Row]) -> list[str]:
    """Count what was left out, by way and reason."""
    counts: dict[tuple[str, str, str], int] = {}
    for row in rows:
        if row.outcome.left_out:
            key = row.part, row.way, row.outcome.left_out
            counts[key] = counts.get(key, 0) + 1
    return [f"- {part}, {way}: {why} ({n})" for (part, way, why), n in counts.items()]


def model_table() -> str:
    """Return what the predictions are made of."""
    rates = {
        "memory, bytes read and written": (roofline.MEMORY_BANDWIDTH, "a copy by torch"),
        "L2": (roofline.CACHE_BANDWIDTH, "estimate"),
        "one multiprocessor alone": (roofline.PROGRAM_BANDWIDTH, "estimate"),
    }
    latencies = {
        "a launch within a graph": roofline.LAUNCH_US,
        "loads that wait for one another, before the first useful byte": roofline.PATH_US,
        "the last part of K to arrive sums the planes": roofline.PLANE_SUM_US,
        "shrink item to expand item within a launch": roofline.HANDOVER_US,
        "first to second launch with PDL": roofline.DEPENDENT_US,
        "a side stream that begins and ends within a graph": roofline.FORK_US,
        "Python's share of one of our launches": roofline.EAGER_US,
    }
    lines = [
        *([name, f"{rate / 1e12:g} TB/s", source] for name, (rate, source) in rates.items()),
        ["bf16 products", f"{roofline.MATRIX_RATE / 1e12:g} TFLOP/s", "a product by torch"],
        *([name, f"{us:g} us", "estimate"] for name, us in latencies.items()),
        *(
            [f"{way}, {phase}: of bytes or flops", f"{100 * share:g} %", "estimate"]
            for (way, phase), share in attention_timing.EFFICIENCY.items()
        ),
    ]
    return "\n".join(_table(["assumed of an H200", "value", "from"], lines))


def timing_tables(measured: Measured) -> str:
    """Return a table for every case, and one for what sharing saves.

    Args:
        measured: What is known; what is not stays empty.
    """
    tables = [_case_table(case, measured) for case in CASES]
    return "\n\n".join([*tables, _sharing_table(measured), _attention_table(measured)])


def _case_table(case: Case, measured: Measured) -> str:
    columns = [*(spec.name for spec in SITES), "layer", "of base", "of ideal"]
    header = ["", *(name for column in columns for name in (column, "measured"))]
    lines = [[way, *_figures(way, case, measured)] for way in WAYS if roofline.tried(way, case)]
    return "\n".join([f"### {str(case).capitalize()}", "", *_table(header, lines)])


def _figures(way: str, case: Case, measured: Measured) -> list[str]:
    """Return the cells of a way, predicted and measured in turn."""
    predicted = partial(_predicted, case)
    known = partial(_known, case, measured)
    cells = list[str]()
    for spec in SITES:
        cells += [_us(predicted(way)(spec)), _us(known(way)(spec))]
    for figure in (predicted, known):
        layer, base = _layer(figure(way)), _layer(figure(BASE))
        # Nobody measures what is ideal.
        ideal = None if way in {BASE, IDEAL, BESIDE} else _layer(predicted(IDEAL))
        cells += [_us(layer), _percent(layer, base), _times(layer, ideal)]
    *sites, layer_p, base_p, ideal_p, layer_m, base_m, ideal_m = cells
    return [*sites, layer_p, layer_m, base_p, base_m, ideal_p, ideal_m]


def _predicted(case: Case, way: str) -> Figure:
    return lambda spec: roofline.predict(way, spec, case)


def _known(case: Case, measured: Measured, way: str) -> Figure:
    return lambda spec: measured.get((str(case), spec.name, way))


def _layer(figure: Figure) -> float | None:
    """Return the sum over the sites, if all are known."""
    values = [value for spec in SITES if (value := figure(spec)) is not None]
    return sum(values) if len(values) == len(SITES) else None


def _sharing_table(measured: Measured) -> str:
    ways = (roofline.ONE, roofline.PDL)
    header = ["clusters", "experts", "ideal", *(cell for way in ways for cell in (way, "measured"))]
    lines = []
    for case in SHARING:
        load = roofline.load_of(case)
        cells = [str(case.mix.clusters), str(load.rank_rows // 16)]
        cells.append(_us(_layer(_predicted(case, IDEAL))))
        for way in ways:
            known = _known(case, measured, way)
            cells += [_us(_layer(_predicted(case, way))), _us(_layer(known))]
        lines.append(cells)
    title = "### What sharing saves: 32 rows of 16 tasks, a layer, by clusters"
    return "\n".join([title, "", *_table(header, lines)])


def _attention_table(measured: Measured) -> str:
    ways = attention_timing.WAYS[1:]
    columns = [cell for way in ways for cell in (way, "measured", "of the rate")]
    header = ["", attention_timing.BOUND, *columns]
    lines = []
    for batch in attention_timing.TIMED:
        bound = attention_timing.predict(attention_timing.BOUND, batch)
        cells = [str(batch), _us(bound)]
        for way in ways:
            known = measured.get((str(batch), attention_timing.SITE, way))
            share = None if known is None else bound / known
            cells += [_us(attention_timing.predict(way, batch)), _us(known), _percent(share, 1.0)]
        lines.append(cells)
    title = "### Attention over the KV cache, a layer of Llama-3-8B"
    return "\n".join([title, "", *_table(header, lines)])


def _us(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _percent(value: float | None, base: float | None) -> str:
    return "" if value is None or base is None else f"{100 * value / base:.0f} %"


def _times(value: float | None, ideal: float | None) -> str:
    return "" if value is None or ideal is None else f"{value / ideal:.1f}x"
