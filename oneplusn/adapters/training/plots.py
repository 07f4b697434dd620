"""Draw the figures of reports as PNG: Agg only, no display, no state between figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from scipy.cluster.hierarchy import dendrogram

Matrix = NDArray[np.float64]
Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Name -> steps and values."""

BASE_COLOUR, OURS_COLOUR, QUIET_COLOUR = "#9aa0a6", "#1f4e9c", "#c9cdd2"
COLOURS = (
    "#1f4e9c", "#d1603d", "#2e8b57", "#8e5ea2", "#b8860b",
    "#008b8b", "#c2437a", "#6b6b6b", "#7aa02c", "#3aa0d8",
)  # fmt: skip
"""Lines of one figure; more than these cannot be told apart."""

HIGHLIGHTED = 5
"""Lines in colour where there are more than there are colours."""

CELL, LONGEST = 0.24, 16.0
"""Side of a heat map's cell, and of a heat map; cells of larger ones shrink, inches."""

PANEL, WIDTH = 1.9, 11.0
"""Longest side of one of many heat maps, and of all side by side, inches."""

LEAST_NAMED_CELL = 0.1
"""Side of the smallest cell, in inches, to which a name fits."""

TREE, NAMES = 2.2, 1.6
"""Width of a dendrogram, and room for names beside and below a heat map, inches."""

NUMBERED_CELLS = 160
"""Largest heat map whose cells hold their numbers."""

LABEL_CHARS = 24
DPI = 120
SMALL, NORMAL = 7, 9


def draw_tasks(path: Path, panels: Mapping[str, Mapping[str, tuple[float, float]]]) -> None:
    """Draw what the bare base and the adapter reach on every task, a panel for each metric.

    Args:
        path: of the PNG.
        panels: metric -> task -> (base, adapter).
    """
    most = max(len(tasks) for tasks in panels.values())
    size = (4.2 * len(panels) + 1.2, _cell(most) * most + 1.1)
    figure, grid = _figure(size, (1, len(panels)))
    for axes, (metric, tasks) in zip(grid[0], panels.items(), strict=True):
        places = range(len(tasks))
        base, ours = zip(*tasks.values(), strict=True)
        axes.hlines(places, base, ours, color=QUIET_COLOUR, linewidth=2, zorder=1)
        axes.scatter(base, places, color=BASE_COLOUR, s=24, label="bare base", zorder=2)
        axes.scatter(ours, places, color=OURS_COLOUR, s=24, label="adapter", zorder=3)
        _names(axes, list(tasks), None)
        axes.set_ylim(len(tasks) - 0.5, -0.5)
        _plain(axes, title=metric)
        axes.grid(axis="x", color="#ececec")
    grid[0][0].legend(fontsize=SMALL, frameon=False, loc="best")
    _save(figure, path)


def draw_curves(path: Path, panels: Mapping[str, Curves]) -> None:
    """Draw curves over the steps, a panel for each group of them.

    Of more curves than there are colours, those that end highest are in colour, the others grey.
    """
    figure, grid = _figure((5.2 * len(panels), 3.4), (1, len(panels)))
    for axes, (title, curves) in zip(grid[0], panels.items(), strict=True):
        marked = list(curves)
        if len(marked) > len(COLOURS):
            marked = sorted(marked, key=lambda name: -curves[name][1][-1])[:HIGHLIGHTED]
        for name, (steps, values) in curves.items():
            if name not in marked:
                axes.plot(steps, values, color=QUIET_COLOUR, linewidth=1, zorder=1)
        for name, colour in zip(marked, COLOURS, strict=False):
            axes.plot(*curves[name], color=colour, linewidth=1.4, label=_short(name), zorder=2)
        _plain(axes, title=title)
        axes.set_xlabel("step", fontsize=SMALL)
        axes.set_yscale("log")
        axes.grid(color="#ececec")
        axes.legend(fontsize=SMALL, frameon=False, loc="best")
    _save(figure, path)


def draw_heat_map(
    path: Path, values: Matrix, rows: Sequence[str], columns: Sequence[str], title: str
) -> None:
    """Draw one matrix [rows, columns] with its names."""
    cell = _cell(max(len(rows), len(columns)))
    size = (cell * len(columns) + 2.6, cell * len(rows) + 2.0)
    figure, grid = _figure(size, (1, 1))
    image = _heat(grid[0][0], values, _limit(values), signed=bool((values < 0).any()))
    _names(grid[0][0], rows, columns)
    _numbers(grid[0][0], values)
    _plain(grid[0][0], title=title)
    figure.colorbar(image, ax=grid[0][0], shrink=0.8).ax.tick_params(labelsize=SMALL)
    _save(figure, path)


def draw_heat_maps(
    path: Path, maps: Mapping[str, Matrix], rows: Sequence[str], columns: Sequence[str]
) -> None:
    """Draw small matrices of one shape on one scale, with names at the outer ones if they fit."""
    cell = min(CELL * 0.6, PANEL / max(len(rows), len(columns)))
    named = cell >= LEAST_NAMED_CELL
    width, height = cell * len(columns) + 0.25, cell * len(rows) + 0.4
    across = max(1, min(len(maps), int(WIDTH / width)))
    down = -(-len(maps) // across)
    room = NAMES if named else 0.2
    figure, grid = _figure((across * width + room + 0.8, down * height + room), (down, across))
    limit = max(_limit(values) for values in maps.values())
    signed = any((values < 0).any() for values in maps.values())
    for index, (name, values) in enumerate(maps.items()):
        axes = grid[index // across][index % across]
        image = _heat(axes, values, limit, signed=signed)
        first, last = index % across == 0, index + across >= len(maps)
        _names(axes, rows if named and first else (), columns if named and last else ())
        _plain(axes, title=name)
    for axes in grid[-1][len(maps) - across * (down - 1) :]:
        axes.axis("off")
    every = [axes for line in grid for axes in line]
    bar = figure.colorbar(image, ax=every, shrink=0.6, fraction=0.03)
    bar.ax.tick_params(labelsize=SMALL)
    _save(figure, path)


def draw_affinity(
    path: Path,
    maps: Mapping[str, Matrix],
    tasks: Sequence[str],
    tree: tuple[Matrix, float],
    clusters: Sequence[int],
) -> None:
    """Draw a dendrogram, and beside it matrices [J, J] in its order with a frame per cluster.

    Args:
        path: of the PNG.
        maps: title -> matrix with values in -1..1.
        tasks: names, in the order of the matrices.
        tree: linkage as scipy's, and the distance at which it is cut.
        clusters: of each task.
    """
    merges, cut = tree
    drawn = dendrogram(merges, no_plot=True)
    order = drawn["leaves"]
    names = [_short(tasks[index]) for index in order]
    bounds = [i for i in range(1, len(order)) if clusters[order[i]] != clusters[order[i - 1]]]
    side = max(_cell(len(tasks)) * len(tasks), 1.6)
    size = (TREE + len(maps) * (side + 1.0) + NAMES + 0.4, side + NAMES + 0.5)
    figure = Figure(figsize=size, facecolor="white")
    FigureCanvasAgg(figure)

    def place(left: float, width: float) -> Axes:
        """Add axes as high as the matrices; everything in inches, so that rows meet leaves."""
        box = (left / size[0], NAMES / size[1], width / size[0], side / size[1])
        return figure.add_axes(box)

    axes = place(0.2, TREE)
    for distances, places in zip(drawn["dcoord"], drawn["icoord"], strict=True):
        # scipy places leaf i at 10 i + 5
        axes.plot(distances, [(y - 5) / 10 for y in places], color=OURS_COLOUR, linewidth=1.2)
    axes.axvline(cut, color=COLOURS[1], linewidth=1, linestyle="--")
    axes.set_xlim(max(float(merges[:, 2].max()), cut) * 1.05 or 1.0, 0)
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.set_yticks([])
    axes.set_xlabel("1 - affinity", fontsize=SMALL)
    _plain(axes, title="tree, cut at the line")
    for index, (title, values) in enumerate(maps.items()):
        left = 0.2 + TREE + NAMES + index * (side + 1.0)
        axes = place(left, side)
        image = _heat(axes, values[np.ix_(order, order)], 1.0, signed=bool((values < 0).any()))
        _names(axes, names if index == 0 else (), names)
        _plain(axes, title=title)
        for start, stop in zip([0, *bounds], [*bounds, len(order)], strict=True):
            corner = (start - 0.5, start - 0.5)
            width = stop - start
            axes.add_patch(Rectangle(corner, width, width, fill=False, edgecolor=COLOURS[1]))
        figure.colorbar(image, cax=place(left + side + 0.1, 0.12)).ax.tick_params(labelsize=SMALL)
    _save(figure, path)


def _figure(size: tuple[float, float], shape: tuple[int, int]) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(*shape, squeeze=False).tolist()


def _save(figure: Figure, path: Path) -> None:
    # Without the library's name and version, so that equal figures are equal files.
    figure.savefig(path, dpi=DPI, bbox_inches="tight", pad_inches=0.1, metadata={"Software": None})


def _plain(axes: Axes, *, title: str) -> None:
    axes.set_title(title, fontsize=NORMAL, loc="left")
    axes.tick_params(labelsize=SMALL, length=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _heat(axes: Axes, values: Matrix, limit: float, *, signed: bool) -> AxesImage:
    """Draw white for 0, blue above; where there are negative values, red below."""
    colours = "RdBu" if signed else "Blues"
    return axes.imshow(
        values, cmap=colours, vmin=-limit if signed else 0, vmax=limit, aspect="equal"
    )


def _limit(values: Matrix) -> float:
    return float(np.abs(values).max()) or 1.0


def _cell(count: int) -> float:
    return min(CELL, LONGEST / count)


def _names(axes: Axes, rows: Sequence[str], columns: Sequence[str] | None) -> None:
    """Name rows and columns; too many go without names, and None leaves an axis as it is."""
    for axis, names in ((axes.yaxis, rows), (axes.xaxis, columns)):
        if names is not None:
            shown = names if _cell(len(names) or 1) >= LEAST_NAMED_CELL else ()
            axis.set_ticks(range(len(shown)), [_short(name) for name in shown])
    if columns is not None:
        axes.tick_params(axis="x", rotation=90)


def _numbers(axes: Axes, values: Matrix) -> None:
    if values.size > NUMBERED_CELLS:
        return
    dark = _limit(values) * 0.6
    for (row, column), value in np.ndenumerate(values):
        if value:
            colour = "white" if abs(value) > dark else "black"
            text = f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}".replace("0.", ".", 1)
            axes.text(column, row, text, ha="center", va="center", fontsize=5.5, color=colour)


def _short(name: str) -> str:
    """Shorten a name in the middle, since names of a family differ at the end."""
    kept = LABEL_CHARS // 2
    return name if len(name) <= LABEL_CHARS else f"{name[: kept - 1]}…{name[-kept:]}"
