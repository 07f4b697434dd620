from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

from oneplusn.loadtest.chart import Chart, Series
from oneplusn.loadtest.document import (
    Charts,
    Heading,
    Table,
    Text,
    Tiles,
    markdown,
    page,
    save,
    shown,
)

BLOCKS = [
    Text("be careful", alarm="Warning"),
    Tiles([("speed", "9")]),
    Charts([Chart("t & u", "x", "y", [Series("a<b", [(0, 1), (1, 2)]), Series("c", [(0, 1)])])]),
    Heading("Part"),
    Table(["a", "b|c"], [["1", "x\n|<i>"]]),
]
MARKDOWN = """\
# T <1>

**Warning:** be careful

## Part

| a | b\\|c |
| --- | --- |
| 1 | x \\|<i> |"""


def test_markdown_has_the_texts_and_tables() -> None:
    assert markdown("T <1>", BLOCKS) == MARKDOWN


class Words(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags, self.open, self.words = list[str](), list[str](), list[str]()

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append(tag)

    def handle_data(self, data) -> None:
        self.words.append(data.strip())


def test_a_page_has_everything_and_text_is_never_markup() -> None:
    found = Words()
    found.feed(page("T <1>", BLOCKS))
    found.close()

    assert found.open == []
    assert found.words.count("T <1>") == 2
    for words in ("be careful", "speed", "9", "t & u", "a<b", "Part", "b|c", "x\n|<i>"):
        assert words in found.words
    assert found.tags.count("svg") == 1
    assert not {"script", "link", "img"} & {*found.tags}


def test_a_report_is_saved_for_programs_and_for_people(tmp_path: Path) -> None:
    save(tmp_path / "new" / "report", "T <1>", BLOCKS, {"a": [1.5]})

    folder = tmp_path / "new"
    assert json.loads((folder / "report.json").read_text()) == {"a": [1.5]}
    assert (folder / "report.md").read_text() == f"{MARKDOWN}\n"
    assert (folder / "report.html").read_text() == page("T <1>", BLOCKS)


def test_values_are_shown_as_cells() -> None:
    assert [shown(value) for value in (None, 1.005, 7, "x")] == ["-", "1.00", "7", "x"]
