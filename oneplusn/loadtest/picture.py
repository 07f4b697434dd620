"""Draw charts as PNG, for pages that show no SVG. The one module here that needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from oneplusn.loadtest.chart import Chart

PANEL = (4.6, 3.1)
"""Inches of one chart."""

DPI = 110
COLOURS = ("#1f6feb", "#d1602a", "#1a7f4b", "#8250c4", "#b3261e", "#57606a")


def draw(path: Path, rows: Sequence[Sequence[Chart]]) -> None:
    """Write rows of charts to a PNG."""
    across = max(len(row) for row in rows)
    figure = Figure(
        figsize=(PANEL[0] * across, PANEL[1] * len(rows)), dpi=DPI, layout="constrained"
    )
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), across, squeeze=False)
    for row, panels in zip(rows, grid, strict=True):
        for panel in panels[len(row) :]:
            panel.set_visible(False)
        for chart, panel in zip(row, panels, strict=False):
            _draw(chart, panel)
    figure.savefig(path)


def _draw(chart: Chart, panel: Axes) -> None:
    for index, line in enumerate(chart.series):
        xs, ys = [chart.place(x) for x, _ in line.points], [y for _, y in line.points]
        style = {"line": "-", "marked": "o-", "dots": "o"}[line.kind]
        panel.plot(xs, ys, style, color=COLOURS[index % len(COLOURS)], label=line.name, ms=4)
    ticks = chart.x_ticks()
    panel.set_xticks([chart.place(x) for x, _ in ticks], [label for _, label in ticks])
    panel.set_ylim(bottom=0)
    panel.set_title(chart.title, fontsize=10, loc="left")
    panel.set_xlabel(chart.x, fontsize=9)
    panel.set_ylabel(chart.y, fontsize=9)
    panel.tick_params(labelsize=8)
    panel.grid(axis="y", color="#dcdfe3", linewidth=0.8)
    panel.spines[["top", "right"]].set_visible(False)
    if len(chart.series) > 1:
        panel.legend(fontsize=8, frameon=False)
