"""A report as a list of blocks, and two ways to write it: Markdown, and a page that needs no other.

The page has no script and fetches nothing. Whatever a server said is text in it, never markup.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from oneplusn.loadtest.chart import Chart, svg
from oneplusn.loadtest.report import table

STYLE = """
:root { color-scheme: light dark; --page: #fff; --box: #f4f5f7; --text: #1d2125; --dim: #5c646d;
  --rule: #dcdfe3; --alarm: #b3261e;
  --c0: #1f6feb; --c1: #d1602a; --c2: #1a7f4b; --c3: #8250c4; --c4: #b3261e; --c5: #57606a; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --box: #1e2228; --text: #e4e7ea;
  --dim: #9aa3ad; --rule: #343a42; --alarm: #ff8a80;
  --c0: #6cabff; --c1: #ff9d66; --c2: #56d394; --c3: #c49bff; --c4: #ff8a80; --c5: #aab2bb; } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem; max-width: 1240px; background: var(--page);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0 0 1rem } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
p { margin: .5rem 0; max-width: 90ch } p.alarm { border-left: 4px solid var(--alarm);
  padding: .3rem .8rem; background: var(--box) }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem }
.tiles div { background: var(--box); border-radius: 6px; padding: .6rem .8rem }
.tiles b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums }
.tiles span, figcaption span { color: var(--dim); font-size: .85rem }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr));
  gap: 1rem; margin: 1rem 0 } .three { grid-template-columns:
  repeat(auto-fit, minmax(min(22rem, 100%), 1fr)) }
figure { margin: 0; background: var(--box); border-radius: 6px; padding: .7rem }
figcaption b { margin-right: .8rem } figcaption i { display: inline-block; width: .7em;
  height: .7em; border-radius: 50%; margin: 0 .35em 0 .6em }
svg { display: block; width: 100%; height: auto } svg text { fill: var(--dim); font-size: 13px }
.three svg text { font-size: 17px } svg path { fill: none }
.grid { stroke: var(--rule) } .axis { stroke: var(--dim) }
.line { stroke-width: 1.8; stroke-linejoin: round } .dots { stroke-width: 6;
  stroke-linecap: round; opacity: .75 }
.scroll { overflow-x: auto } table { border-collapse: collapse; margin: .6rem 0 }
th, td { padding: .25rem .8rem .25rem 0; text-align: right; border-bottom: 1px solid var(--rule);
  font-variant-numeric: tabular-nums; vertical-align: top }
th { color: var(--dim); font-weight: 500 } th:first-child, td:first-child { text-align: left }
"""


@dataclass(frozen=True, slots=True)
class Heading:
    """Begins a part."""

    text: str


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph; an alarm is one that nobody may miss."""

    text: str
    alarm: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a head."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Tiles:
    """What a reader looks for first, by name; on the page only."""

    values: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Charts:
    """Charts side by side; on the page only."""

    charts: Sequence[Chart]


Block = Heading | Text | Table | Tiles | Charts


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """Return a report as Markdown."""
    return "\n\n".join([f"# {title}", *filter(None, map(_markdown, blocks))])


def _markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {text}"
        case Text(text, alarm):
            return f"**{alarm}:** {text}" if alarm else text
        case Table(head, rows):
            return table([_cell(name) for name in head], [[*map(_cell, row)] for row in rows])
        case _:
            return ""


def _cell(text: str) -> str:
    """Keep a server's text inside its cell."""
    return text.replace("|", "\\|").replace("\n", " ")


def page(title: str, blocks: Sequence[Block]) -> str:
    """Return a report as one HTML file."""
    body = "\n".join("".join(_html(block)) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def _html(block: Block) -> Iterator[str]:
    match block:
        case Heading(text):
            yield f"<h2>{escape(text)}</h2>"
        case Text(text, alarm):
            yield f'<p class="alarm"><b>{escape(alarm)}:</b> ' if alarm else "<p>"
            yield f"{escape(text)}</p>"
        case Table(head, rows):
            yield '<div class="scroll"><table>'
            yield _row("th", head)
            yield from (_row("td", row) for row in rows)
            yield "</table></div>"
        case Tiles(values):
            tiles = (f"<div><b>{escape(v)}</b><span>{escape(k)}</span></div>" for k, v in values)
            yield f'<div class="tiles">{"".join(tiles)}</div>'
        case Charts(charts):
            three = "" if len(charts) % 3 else " three"
            yield f'<div class="charts{three}">{"".join(map(_figure, charts))}</div>'


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _figure(chart: Chart) -> str:
    """Return a chart under its title and the names of its lines."""
    keys = "".join(
        f'<span><i style="background:var(--c{colour})"></i>{escape(name)}</span>'
        for name, colour in chart.colours.items()
        if len(chart.colours) > 1
    )
    caption = f"<figcaption><b>{escape(chart.title)}</b>{keys}</figcaption>"
    return f"<figure>{caption}{svg(chart)}</figure>"


def save(stem: Path, title: str, blocks: Sequence[Block], content: Mapping[str, Any]) -> None:
    """Write a report as JSON for programs, and as Markdown and a page for people.

    Args:
        stem: Path of the files without what tells them apart.
        title: Of the page.
        blocks: What people read.
        content: What programs read.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    stem.with_suffix(".md").write_text(f"{markdown(title, blocks)}\n", encoding="utf-8")
    stem.with_suffix(".html").write_text(page(title, blocks), encoding="utf-8")


def shown(value: object) -> str:
    """Return a value as a cell shows it."""
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
