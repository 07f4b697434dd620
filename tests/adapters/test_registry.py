"""Names and versions of adapters: what they stand for, how they change, and what is refused."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bundles import small_bundle
from oneplusn.adapters import registry_rows
from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.files import read_adapter
from oneplusn.adapters.refs import TaskRef
from oneplusn.adapters.registry import Registry, Version
from oneplusn.errors import (
    AdapterConflict,
    AdapterCorrupt,
    AdapterExists,
    AdapterInvalid,
    AdapterNotFound,
    GenerationMismatch,
    RegistryBusy,
    UnknownTask,
)
from prepared_bundles import prepared

LETTERS = small_bundle(tasks=("vowels", "upper"))
LETTERS_2 = small_bundle(tasks=("vowels", "lower"), seed=2)
LETTERS_3 = small_bundle(tasks=("vowels", "lower"), seed=3)
SUMS = small_bundle(tasks=("add",), seed=4)
DAY = 24 * 60 * 60


@pytest.fixture
def registry(tmp_path) -> Iterator[Registry]:
    opened = Registry(tmp_path / "data", base_name="base")
    yield opened
    opened.close()


Publish = Callable[..., tuple[Version, bool]]


@pytest.fixture
def publish(registry, tmp_path) -> Publish:
    def publish(bundle: Bundle, name: str = "letters", **options: object) -> tuple[Version, bool]:
        made, out = prepared(bundle, name, tmp_path)
        return registry.publish(made, out, **options)

    return publish


def contents(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if not path.name.startswith("registry.db")
    }


def active(registry: Registry, name: str = "letters") -> int | None:
    version = registry.adapter(name).active
    return version and version.number


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


class TestActivation:
    def test_a_version_is_activated_by_its_number(self, registry, publish) -> None:
        publish(LETTERS)
        publish(LETTERS_2)

        version = registry.activate("letters", 1)

        assert (version.number, version.active) == (1, True)
        assert registry.resolve("upper") == version
        assert active(registry) == 1

    def test_rollback_goes_back_step_by_step(self, registry, publish) -> None:
        for bundle in (LETTERS, LETTERS_2, LETTERS_3):
            publish(bundle)
        registry.activate("letters", 1)  # 1, 2, 3, 1

        back = [(registry.previous("letters").number, registry.rollback("letters").number)]
        back += [(registry.previous("letters").number, registry.rollback("letters").number)]
        back += [(registry.previous("letters").number, registry.rollback("letters").number)]

        assert back == [(3, 3), (2, 2), (1, 1)]
        with pytest.raises(AdapterConflict) as caught:
            registry.rollback("letters")
        assert caught.value.code == "no_previous_version"

    def test_activating_what_is_active_is_no_step(self, registry, publish) -> None:
        publish(LETTERS)
        publish(LETTERS_2)
        publish(LETTERS_2)
        registry.activate("letters", 2)
        assert registry.rollback("letters").number == 1

    def test_a_deleted_version_is_no_step(self, registry, publish) -> None:
        for bundle in (LETTERS, LETTERS_2, LETTERS):  # 1, 2, 1
            publish(bundle)
        registry.activate("letters", 2)  # 1, 2, 1, 2
        registry.activate("letters", 1)
        registry.delete("letters", 2)
        with pytest.raises(AdapterConflict):
            registry.rollback("letters")

    def test_without_an_active_version_its_tasks_are_unknown(self, registry, publish) -> None:
        publish(LETTERS)
        publish(LETTERS_2)
        assert registry.deactivate("letters").active is None
        with pytest.raises(UnknownTask):
            registry.resolve("vowels")
        publish(small_bundle(tasks=("vowels",), seed=5), "others")
        with pytest.raises(AdapterExists):
            registry.activate("letters", 2)
        registry.delete("others")
        assert registry.rollback("letters").number == 2
        assert registry.rollback("letters").number == 1

    def test_a_pinned_adapter_stays_active(self, registry, publish) -> None:
        publish(LETTERS)
        registry.pin("letters", pinned=True)
        with pytest.raises(AdapterConflict) as caught:
            registry.deactivate("letters")
        assert caught.value.code == "adapter_pinned"
        assert active(registry) == 1

    def test_what_was_never_active_has_no_way_back(self, registry, publish) -> None:
        publish(LETTERS, activate=False)
        with pytest.raises(AdapterConflict):
            registry.rollback("letters")

    def test_the_way_back_is_bounded(self, registry, publish, monkeypatch) -> None:
        monkeypatch.setattr(registry_rows, "MAX_ACTIVATIONS", 3)
        publish(LETTERS)
        publish(LETTERS_2)
        for number in (1, 2, 1, 2):
            registry.activate("letters", number)
        assert [registry.rollback("letters").number for _ in range(2)] == [1, 2]
        with pytest.raises(AdapterConflict):
            registry.rollback("letters")

    def test_a_stale_generation_is_refused(self, registry, publish) -> None:
        publish(LETTERS)
        seen = registry.adapter("letters").generation
        publish(LETTERS_2, if_match=seen)
        for change in (
            lambda: publish(LETTERS_3, if_match=seen),
            lambda: registry.activate("letters", 1, if_match=seen),
            lambda: registry.rollback("letters", if_match=seen),
            lambda: registry.delete("letters", if_match=seen),
        ):
            with pytest.raises(GenerationMismatch):
                change()
        assert [v.number for v in registry.versions("letters")] == [1, 2]
        now = registry.adapter("letters").generation
        assert registry.activate("letters", 1, if_match=now).active

    def test_generation_zero_means_that_there_is_none_yet(self, registry, publish) -> None:
        publish(LETTERS, if_match=0)
        with pytest.raises(GenerationMismatch, match="at generation 1, not 0"):
            publish(LETTERS_2, if_match=0)

    def test_every_change_is_counted(self, registry, publish) -> None:
        counts = [registry.generation]
        for change in (
            lambda: publish(LETTERS),
            lambda: publish(SUMS, "sums"),
            lambda: registry.pin("letters", pinned=True),
            lambda: registry.save_blend("mix", {"vowels": 0.5, "add": 0.5}),
            lambda: registry.delete_blend("mix"),
            lambda: registry.delete("sums"),
        ):
            change()
            counts.append(registry.generation)
        assert counts == list(range(7))


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


class TestDeletion:
    def test_a_version_that_is_not_active(self, registry, publish) -> None:
        publish(LETTERS)
        publish(LETTERS_2)
        gone = registry.delete("letters", 1)
        assert [version.digest for version in gone] == [LETTERS.digest]
        assert [version.number for version in registry.versions("letters")] == [2]

    def test_the_active_one_stays(self, registry, publish) -> None:
        publish(LETTERS)
        with pytest.raises(AdapterConflict, match="letters@1 is active") as caught:
            registry.delete("letters", 1)
        assert (caught.value.code, caught.value.status_code) == ("adapter_active", 409)

    def test_a_whole_adapter(self, registry, publish) -> None:
        publish(LETTERS)
        publish(LETTERS_2)
        publish(SUMS, "sums")
        assert [version.number for version in registry.delete("letters")] == [1, 2]
        assert [adapter.name for adapter in registry.adapters()] == ["sums"]
        with pytest.raises(UnknownTask):
            registry.resolve("vowels")

    def test_numbers_are_not_given_out_again(self, registry, publish) -> None:
        publish(LETTERS)
        publish(LETTERS_2)
        registry.activate("letters", 1)
        registry.delete("letters", 2)
        assert publish(LETTERS_3)[0].number == 3
        registry.delete("letters")
        assert publish(LETTERS)[0].number == 4

    def test_what_was_never_active_leaves_no_trace(self, registry, publish) -> None:
        publish(LETTERS, activate=False)
        registry.delete("letters")
        assert publish(LETTERS)[0].number == 1

    def test_a_pinned_adapter_stays(self, registry, publish) -> None:
        publish(LETTERS)
        assert registry.pin("letters", pinned=True).pinned
        with pytest.raises(AdapterConflict) as caught:
            registry.delete("letters")
        assert caught.value.code == "adapter_pinned"
        registry.pin("letters", pinned=False)
        registry.delete("letters")

    def test_content_stays_for_a_day_and_as_long_as_it_has_a_name(
        self, registry, publish, tmp_path
    ) -> None:
        publish(LETTERS)
        publish(LETTERS, "letters-2", activate=False)
        publish(SUMS, "sums")
        blob, image = registry.blob(SUMS.digest), next((tmp_path / "data/images").glob("*"))
        now = blob.stat().st_mtime
        registry.delete("sums")
        registry.delete("letters")
        assert registry.sweep(lambda: now + DAY - 60) == []
        swept = registry.sweep(lambda: now + DAY + 60)
        assert blob.name in swept
        assert not blob.exists()
        assert {name.partition(".")[0] for name in swept} == {blob.name}
        assert registry.blob(LETTERS.digest).is_dir()
        assert image.parent.is_dir()


class TestBlends:
    def test_a_blend_has_a_name_and_means_its_tasks(self, registry, publish) -> None:
        publish(LETTERS)
        publish(SUMS, "sums")
        blend = registry.save_blend("mix", {"upper": 0.7, "add": -0.3})
        assert registry.blends() == [blend]
        assert [(part.version.label, part.ref) for part in registry.parts("mix", 2.0)] == [
            ("letters@1", TaskRef(LETTERS.digest, "upper", 1.4)),
            ("sums@1", TaskRef(SUMS.digest, "add", -0.6)),
        ]

    def test_a_task_is_a_blend_of_one(self, registry, publish) -> None:
        publish(LETTERS)
        assert [part.ref for part in registry.parts("upper", 0.5)] == [
            TaskRef(LETTERS.digest, "upper", 0.5)
        ]

    def test_it_follows_its_tasks(self, registry, publish) -> None:
        publish(LETTERS)
        registry.save_blend("mix", {"vowels": 1.0, "upper": 1.0})
        publish(LETTERS_2)
        with pytest.raises(UnknownTask, match="'upper'"):
            registry.parts("mix")
        registry.rollback("letters")
        assert len(registry.parts("mix")) == 2

    def test_saving_again_changes_the_weights(self, registry, publish) -> None:
        publish(LETTERS)
        registry.save_blend("mix", {"vowels": 1.0})
        registry.save_blend("mix", {"upper": 2.0})
        assert [blend.weights for blend in registry.blends()] == [{"upper": 2.0}]

    def test_names_are_taken_both_ways(self, registry, publish) -> None:
        publish(LETTERS)
        with pytest.raises(AdapterExists, match="belongs to the adapter 'letters'"):
            registry.save_blend("vowels", {"upper": 1.0})
        with pytest.raises(AdapterInvalid):
            registry.save_blend("base", {"upper": 1.0})
        registry.save_blend("add", {"upper": 1.0})
        with pytest.raises(AdapterExists, match="saved blend"):
            publish(SUMS, "sums")
        registry.delete_blend("add")
        publish(SUMS, "sums")

    def test_its_parts_are_tasks(self, registry, publish) -> None:
        publish(LETTERS)
        registry.save_blend("mix", {"upper": 1.0})
        for part in ("nope", "base", "mix"):
            with pytest.raises(UnknownTask):
                registry.save_blend("more", {part: 1.0})

    def test_an_unknown_one_cannot_be_deleted(self, registry) -> None:
        with pytest.raises(AdapterNotFound):
            registry.delete_blend("mix")


class TestCorruption:
    def spoil(self, registry: Registry, bundle: Bundle) -> None:
        path = registry.blob(bundle.digest) / "adapter_model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    def test_a_damaged_blob_takes_its_adapter_out_and_no_other(
        self, registry, publish, tmp_path
    ) -> None:
        publish(LETTERS)
        publish(SUMS, "sums")
        registry.verify(LETTERS.digest)
        self.spoil(registry, LETTERS)

        with pytest.raises(AdapterCorrupt, match="another content"):
            registry.verify(LETTERS.digest)

        for refused in (registry.resolve, registry.parts):
            with pytest.raises(AdapterCorrupt) as caught:
                refused("vowels")
            assert (caught.value.status_code, caught.value.code) == (503, "adapter_corrupt")
        assert registry.resolve("add").label == "sums@1"
        put_aside = tmp_path / "data/quarantine" / LETTERS.digest.removeprefix("sha256:")
        assert len(list(put_aside.iterdir())) == 2
        assert not registry.blob(LETTERS.digest).exists()

    def test_another_version_of_it_can_be_activated(self, registry, publish) -> None:
        publish(LETTERS)
        publish(LETTERS_2)
        registry.quarantine(LETTERS_2.digest, "a bit flipped")
        with pytest.raises(AdapterCorrupt):
            registry.activate("letters", 2)
        assert registry.rollback("letters").number == 1
        assert registry.resolve("vowels").number == 1

    def test_it_stays_out_after_a_restart(self, registry, publish, tmp_path) -> None:
        publish(LETTERS)
        registry.quarantine(LETTERS.digest, "a bit flipped")
        registry.close()
        again = Registry(tmp_path / "data", base_name="base")
        with pytest.raises(AdapterCorrupt, match="a bit flipped"):
            again.resolve("vowels")
        again.close()

    def test_the_same_content_again_makes_it_whole(self, registry, publish) -> None:
        publish(LETTERS)
        publish(LETTERS, "twin", activate=False)
        self.spoil(registry, LETTERS)
        with pytest.raises(AdapterCorrupt):
            registry.verify(LETTERS.digest)

        version, new = publish(LETTERS)

        assert (version.number, new, version.corrupt) == (1, False, None)
        registry.verify(LETTERS.digest)
        assert registry.resolve("vowels") == version
        assert registry.version("twin", 1).corrupt is None

    def test_a_blob_that_is_gone_is_found_when_the_folder_is_opened(
        self, registry, publish, tmp_path
    ) -> None:
        publish(LETTERS)
        publish(SUMS, "sums")
        registry.close()
        registry.blob(SUMS.digest).rename(tmp_path / "elsewhere")
        again = Registry(tmp_path / "data", base_name="base")
        with pytest.raises(AdapterCorrupt, match="missing"):
            again.resolve("add")
        assert again.resolve("vowels").number == 1
        again.close()
