"""The dashboard: made by its script, well formed, and every metric in it is in a live scrape."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path

import pytest
import yaml

GRAFANA = Path(__file__).parents[2] / "deploy" / "grafana"
DASHBOARD = json.loads((GRAFANA / "dashboards" / "oneplusn.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS = [
    pytest.param(target, id=f"{panel['title']}-{target['refId']}")
    for panel in PANELS
    for target in panel["targets"]
]
NO_PROMTOOL = "promtool is not installed (Debian's package prometheus)"


@pytest.fixture(scope="module")
def exposed(http) -> dict[str, str]:
    """Every name that a line of a live scrape can begin with, and its metric's type."""
    names = {}
    scrape = http.get("/metrics").text
    for name, kind in re.findall(r"^# TYPE (\w+) (\w+)$", scrape, re.MULTILINE):
        ends = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}
        names.update({name + end: kind for end in ends.get(kind, ("",))})
    return names


def metrics_in(query: str) -> list[str]:
    return re.findall(r"\boneplusn_\w+", query)


def variables_in(query: str) -> set[str]:
    return set(re.findall(r"\$\{?(\w+)", query)) - {"__rate_interval", "__range"}


def test_it_is_what_its_script_writes() -> None:
    spec = importlib.util.spec_from_file_location("dashboard", GRAFANA / "dashboard.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.dashboard() == DASHBOARD


def test_it_can_be_provisioned() -> None:
    assert (DASHBOARD["uid"], DASHBOARD["title"]) == ("oneplusn", "oneplusn")
    assert DASHBOARD["schemaVersion"] >= 36
    assert "id" not in DASHBOARD, "an id is given by the Grafana that imports it"
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert source["type"] == "prometheus"
    assert source["isDefault"]


def test_its_source_is_a_variable() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    assert metrics_in(variables["instance"]["definition"]) == ["oneplusn_build_info"]
    sources = [item["datasource"] for panel in PANELS for item in (panel, *panel["targets"])]
    assert {source["uid"] for source in sources} == {"${datasource}"}


def test_panels_have_titles_ids_and_places_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    for one, other in combinations((panel["gridPos"] for panel in panels), 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)


@pytest.mark.parametrize("target", TARGETS)
def test_a_query_asks_for_what_a_scrape_has(exposed, target) -> None:
    found = metrics_in(target["expr"])
    assert found
    assert set(found) <= exposed.keys()
    assert variables_in(target["expr"]) <= {"instance"}
    for name in found:
        counts = exposed[name] != "gauge"
        assert counts == bool(re.search(rf"(rate|increase)\({name}\b", target["expr"])), name


@pytest.mark.skipif(shutil.which("promtool") is None, reason=NO_PROMTOOL)
def test_prometheus_understands_every_query(tmp_path) -> None:
    queries = [target["expr"] for panel in PANELS for target in panel["targets"]]
    rules = [
        {"record": f"query:{number}", "expr": re.sub(r"\[\$__\w+\]", "[5m]", query)}
        for number, query in enumerate(queries)
    ]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    checked = subprocess.run(["promtool", "check", "rules", file], capture_output=True, timeout=30)
    assert checked.returncode == 0, checked.stderr.decode()
