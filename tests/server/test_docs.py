"""The document of the interface names every route, and no other."""

from __future__ import annotations

import re
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "api.md"


def test_every_route_is_documented(http) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    served = {f"{method.upper()} {path}" for path, by in paths.items() for method in by}

    text = DOCUMENT.read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `((?:GET|POST|PUT|DELETE) \S+)` \|", text, re.MULTILINE))

    assert documented == served
