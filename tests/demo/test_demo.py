"""The packaged demo: what it promises in numbers, and that one mixed batch keeps the promise."""

from __future__ import annotations

import json
from statistics import mean

import pytest

import oneplusn
from oneplusn.adapters.files import read_adapter
from oneplusn.adapters.fingerprint import base_fingerprint
from oneplusn.demo.build import accuracy, train
from oneplusn.demo.corpus import SIZES
from oneplusn.demo.run import measure
from oneplusn.demo.tasks import CLUSTERS, TASKS
from oneplusn.errors import AdapterIncompatible
from oneplusn.server.engine.model import demo_data
from prepared_bundles import base_for, prepared

MEASURED = json.loads((demo_data() / "accuracy.json").read_text())
BASE = base_fingerprint(demo_data() / "base")
ROWS = MEASURED["tasks"]


def bundle(cluster):
    return read_adapter(demo_data() / "adapters" / cluster, name=cluster)


def test_package_is_small() -> None:
    files = [path for path in demo_data().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 16e6


def test_table_is_of_the_adapters_that_ship() -> None:
    assert MEASURED["adapters"] == {cluster: bundle(cluster).digest for cluster in CLUSTERS}
    assert [row["task"] for row in ROWS] == list(TASKS)
    assert MEASURED["n"] == 512


@pytest.mark.parametrize("cluster", CLUSTERS)
class TestBase:
    """Every bundle names the base that ships with it, and takes no other."""

    def test_a_bundle_names_it(self, cluster) -> None:
        assert bundle(cluster).base == BASE

    def test_a_bundle_fits_it_without_a_warning(self, cluster, tmp_path) -> None:
        base = base_for(bundle(cluster), fingerprint=BASE)
        assert prepared(bundle(cluster), cluster, tmp_path, base=base)[0].report.warnings == []

    def test_a_bundle_is_refused_on_another_by_name(self, cluster, tmp_path) -> None:
        other = f"base:{'0' * 32}"
        base = base_for(bundle(cluster), fingerprint=other)
        with pytest.raises(AdapterIncompatible) as caught:
            prepared(bundle(cluster), cluster, tmp_path, base=base)
        assert caught.value.code == "base_mismatch"
        assert f"trained on {BASE} and this base is {other}" in caught.value.message

    def test_a_bundle_trained_again_names_it(self, cluster, monkeypatch) -> None:
        monkeypatch.setitem(SIZES, cluster, 8)
        monkeypatch.setattr("oneplusn.demo.corpus.VALIDATION_EXAMPLES", 4)
        monkeypatch.setattr(
            "oneplusn.adapters.training.report.write_report", lambda folder, *_: folder
        )
        quick = {"training.steps": 1, "training.batch_size": 2, "training.progress": False}
        again = train(demo_data() / "base", cluster, seed=0, overrides=quick)
        assert again.base == BASE
        shipped = bundle(cluster)
        assert (again.method, again.tasks) == (shipped.method, shipped.tasks)
        assert (again.experts, again.metadata) == (shipped.experts, shipped.metadata)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["task"])
def test_a_task_needs_its_adapter(row) -> None:
    assert row["accuracy"] >= 0.93
    assert row["base_accuracy"] <= 0.30


@pytest.mark.parametrize("without", ["without_common", "without_own"])
@pytest.mark.parametrize("cluster", ["text", "numbers"])
def test_a_gated_cluster_needs_both_kinds_of_experts(cluster, without) -> None:
    rows = [row for row in ROWS if row["cluster"] == cluster]
    assert mean(row["accuracy"] - row[without] for row in rows) >= 0.2


def test_one_task_borrows_anothers_skill() -> None:
    numbers = bundle("numbers")
    owners = [expert.owner for expert in numbers.experts]
    borrowed = {
        (task, owners[expert])
        for task, row in zip(numbers.tasks, numbers.gated.tolist(), strict=True)
        for expert, used in enumerate(row)
        if used and owners[expert] not in (None, task)
    }
    assert borrowed == {("largest", "sort_numbers")}


def test_all_tasks_answer_in_one_mixed_batch() -> None:
    with oneplusn.Engine("demo", threads=1) as engine:
        adapted = accuracy(engine, TASKS, 8, adapted=True)
        bare = accuracy(engine, TASKS, 8, adapted=False)
    assert mean(adapted.values()) >= 0.93
    assert mean(bare.values()) <= 0.30


@pytest.mark.e2e
def test_demo_command_mixes_all_tasks_over_http() -> None:
    result = measure(6, threads=1, quiet=True)
    assert result.max_tasks_per_step == len(TASKS)
    assert [row.task for row in result.tasks] == list(TASKS)
    assert {row.method for row in result.tasks} == {"cgc-lora", "c-poly", "lora"}
    assert mean(row.accuracy for row in result.tasks) >= 0.93
    assert mean(row.base_accuracy for row in result.tasks) <= 0.30
