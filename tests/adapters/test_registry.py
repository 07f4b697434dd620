"""Names of adapters and tasks: what they stand for, what is refused, who comes first."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest

from bundles import small_bundle
from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.files import read_adapter
from oneplusn.adapters.refs import TaskRef
from oneplusn.errors import (
    AdapterExists,
    AdapterInvalid,
    AdapterNotFound,
    GenerationMismatch,
    RegistryBusy,
    UnknownTask,
)
from prepared_bundles import prepared
from registries import LETTERS, LETTERS_2, SUMS, active, contents


class TestPublish:
    def test_the_first_version_is_active(self, registry, publish) -> None:
        version, new = publish(LETTERS)

        assert new
        assert (version.label, version.number, version.active) == ("letters@1", 1, True)
        assert (version.digest, version.method, version.rank) == (LETTERS.digest, "cgc", 4)
        assert version.tasks == {"vowels": "the first", "upper": "adapter number 0"}
        assert version.ref("upper", 0.5) == TaskRef(LETTERS.digest, "upper", 0.5)
        blob = registry.blob(version.digest)
        assert version.num_bytes == sum(path.stat().st_size for path in blob.iterdir())
        assert read_adapter(blob, name="letters").digest == LETTERS.digest

    def test_blob_and_image_are_moved_out_of_the_folder(self, registry, tmp_path) -> None:
        made, out = prepared(LETTERS, "letters", tmp_path)
        registry.publish(made, out)
        assert not out.exists()
        assert registry.image(made.digest, made.layout).is_file()
        assert {path.name for path in registry.blob(made.digest).iterdir()} == {
            "bundle.json",
            "adapter_model.safetensors",
        }

    def test_versions_are_numbered_and_the_last_one_counts(self, registry, publish) -> None:
        publish(LETTERS)
        publish(LETTERS_2)

        assert [(v.number, v.active) for v in registry.versions("letters")] == [
            (1, False),
            (2, True),
        ]
        assert registry.resolve("lower").number == 2
        with pytest.raises(UnknownTask):
            registry.resolve("upper")

    def test_the_same_content_is_the_same_version(self, registry, publish) -> None:
        publish(LETTERS)
        publish(LETTERS_2)

        version, new = publish(LETTERS)

        assert (version.number, version.active, new) == (1, True, False)
        assert registry.resolve("upper") == version
        assert len(registry.versions("letters")) == 2

    def test_it_can_be_kept_without_being_activated(self, registry, publish) -> None:
        version, new = publish(LETTERS, activate=False)

        assert (new, version.active, active(registry)) == (True, False, None)
        assert registry.tasks() == []
        with pytest.raises(UnknownTask):
            registry.resolve("vowels")

    def test_defaults_of_tasks_are_kept(self, registry, publish) -> None:
        bundle = Bundle(
            method="lora",
            tasks=SUMS.tasks,
            experts=SUMS.experts,
            modules=SUMS.modules,
            defaults={"add": {"temperature": 0.5, "stop": ["\n"]}},
        )
        version, _ = publish(bundle, "sums")
        assert version.defaults == {"add": {"temperature": 0.5, "stop": ["\n"]}}
        assert registry.resolve("add").defaults == version.defaults

    def test_adapters_are_listed_by_name(self, registry, publish) -> None:
        publish(SUMS, "zebra")
        publish(LETTERS)
        assert [adapter.name for adapter in registry.adapters()] == ["letters", "zebra"]
        assert [version.adapter for version in registry.active()] == ["letters", "zebra"]
        assert [task for task, _ in registry.tasks()] == ["vowels", "upper", "add"]

    def test_unknown_names(self, registry, publish) -> None:
        publish(LETTERS)
        with pytest.raises(UnknownTask, match="'nope'"):
            registry.resolve("nope")
        with pytest.raises(AdapterNotFound, match="'nope'"):
            registry.versions("nope")
        with pytest.raises(AdapterNotFound, match="no version 3; it has 1"):
            registry.version("letters", 3)


class TestRefusal:
    @pytest.mark.parametrize(
        ("bundle", "name"),
        [(LETTERS, "base"), (small_bundle(tasks=("base",)), "letters")],
        ids=["adapter", "task"],
    )
    def test_the_base_keeps_its_name(self, registry, publish, tmp_path, bundle, name) -> None:
        before = contents(tmp_path / "data")
        with pytest.raises(AdapterInvalid, match="base model") as caught:
            publish(bundle, name)
        assert caught.value.code == "name_reserved"
        assert contents(tmp_path / "data") == before

    def test_a_task_has_one_owner(self, registry, publish, tmp_path) -> None:
        publish(LETTERS)
        before = contents(tmp_path / "data")
        with pytest.raises(AdapterExists, match="'vowels' belongs to the adapter 'letters'"):
            publish(LETTERS_2, "others")
        assert contents(tmp_path / "data") == before

    def test_the_owner_is_asked_for_when_a_version_is_activated(self, registry, publish) -> None:
        publish(LETTERS)
        version, _ = publish(LETTERS_2, "others", activate=False)
        with pytest.raises(AdapterExists):
            registry.activate("others", version.number)
        registry.delete("letters")
        assert registry.activate("others", version.number).active

    def test_the_database_says_the_same(self, registry, publish, tmp_path) -> None:
        """Two servers on one database could both pass the check in memory."""
        publish(LETTERS)
        rows = "INSERT INTO task_owners (tenant, task, adapter) VALUES ('default', 'vowels', 1)"
        connection = sqlite3.connect(tmp_path / "data/registry.db")
        with pytest.raises(sqlite3.IntegrityError):
            connection.execute(rows)
        connection.close()

    def test_a_task_that_its_owner_gave_up_is_free(self, registry, publish) -> None:
        publish(LETTERS)
        publish(LETTERS_2)
        publish(small_bundle(tasks=("upper",)), "others")
        assert registry.resolve("upper").adapter == "others"

    def test_a_database_that_another_process_holds(
        self, registry, publish, tmp_path, monkeypatch
    ) -> None:
        monkeypatch.setattr("oneplusn.adapters.registry_schema.BUSY_SECONDS", 0.01)
        registry._engine.dispose()  # connections made from here on wait only so long
        before = contents(tmp_path / "data")
        holder = sqlite3.connect(tmp_path / "data/registry.db", isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(RegistryBusy) as caught:
            publish(LETTERS)
        holder.close()
        assert caught.value.retryable
        assert contents(tmp_path / "data") == before
        assert publish(LETTERS)[1]


class TestAtOnce:
    def test_equal_uploads_are_one_version(self, registry, tmp_path) -> None:
        made = [prepared(LETTERS, "letters", tmp_path) for _ in range(16)]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda pair: registry.publish(*pair), made))
        assert sorted(new for _, new in answers) == [False] * 15 + [True]
        assert {version.label for version, _ in answers} == {"letters@1"}
        registry.verify(LETTERS.digest)

    def test_one_of_those_that_saw_the_same_generation_wins(self, registry, tmp_path) -> None:
        bundles = [small_bundle(tasks=("t",), seed=seed) for seed in range(8)]
        made = [prepared(bundle, "letters", tmp_path) for bundle in bundles]

        def publish(pair) -> str | None:
            try:
                return registry.publish(*pair, if_match=0)[0].digest
            except GenerationMismatch:
                return None

        with ThreadPoolExecutor(8) as pool:
            (winner,) = filter(None, pool.map(publish, made))
        assert [version.digest for version in registry.versions("letters")] == [winner]
        assert len(list((tmp_path / "data/blobs").iterdir())) == 1

    def test_a_reader_sees_whole_versions(self, registry, tmp_path) -> None:
        """One thread flips, one asks: a task's version is never half of each."""
        for bundle in (LETTERS, LETTERS_2):
            registry.publish(*prepared(bundle, "letters", tmp_path))
        tasks = {1: {"vowels", "upper"}, 2: {"vowels", "lower"}}
        with ThreadPoolExecutor(1) as pool:
            flips = pool.submit(
                lambda: [registry.activate("letters", i % 2 + 1) for i in range(20)]
            )
            while not flips.done():
                version = registry.resolve("vowels")
                assert (version.active, set(version.tasks)) == (True, tasks[version.number])
        flips.result()
