"""Names, versions and contents of adapters: what is kept, what is refused, what a crash leaves."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bundles import small_bundle
from oneplusn.adapters import registry as registry_module
from oneplusn.adapters.files import read_adapter
from oneplusn.adapters.refs import TaskRef
from oneplusn.adapters.registry import Registry
from oneplusn.errors import (
    AdapterExists,
    AdapterInvalid,
    AdapterNotFound,
    ConfigError,
    UnknownTask,
)

LETTERS = small_bundle(tasks=("vowels", "upper"))
LETTERS_2 = small_bundle(tasks=("vowels", "lower"), seed=2)


@pytest.fixture
def registry(tmp_path) -> Iterator[Registry]:
    opened = Registry(tmp_path, base_name="base")
    yield opened
    opened.close()


def contents(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if not path.name.startswith("registry.db")
    }


class TestPublish:
    def test_the_first_version_is_active(self, registry, tmp_path) -> None:
        version, new = registry.publish(LETTERS, "letters")

        assert new
        assert (version.label, version.number, version.active) == ("letters@1", 1, True)
        assert (version.digest, version.method, version.rank) == (LETTERS.digest, "cgc", 4)
        assert version.tasks == {"vowels": "the first", "upper": "adapter number 0"}
        assert version.ref("upper", 0.5) == TaskRef(LETTERS.digest, "upper", 0.5)
        blob = registry.blob(version.digest)
        assert version.num_bytes == sum(path.stat().st_size for path in blob.iterdir())
        assert read_adapter(blob, name="letters").digest == LETTERS.digest

    def test_versions_are_numbered_and_the_last_one_counts(self, registry) -> None:
        registry.publish(LETTERS, "letters")
        registry.publish(LETTERS_2, "letters")

        assert [(v.number, v.active) for v in registry.versions("letters")] == [
            (1, False),
            (2, True),
        ]
        assert registry.resolve("lower").number == 2
        with pytest.raises(UnknownTask):
            registry.resolve("upper")

    def test_the_same_content_is_the_same_version(self, registry) -> None:
        registry.publish(LETTERS, "letters")
        registry.publish(LETTERS_2, "letters")

        version, new = registry.publish(LETTERS, "letters")

        assert (version.number, version.active, new) == (1, True, False)
        assert registry.resolve("upper") == version
        assert len(registry.versions("letters")) == 2

    def test_adapters_are_listed_by_name(self, registry) -> None:
        registry.publish(small_bundle(tasks=("b",)), "zebra")
        registry.publish(LETTERS, "letters")
        assert [version.adapter for version in registry.active()] == ["letters", "zebra"]
        assert [task for task, _ in registry.tasks()] == ["vowels", "upper", "b"]

    def test_unknown_names(self, registry) -> None:
        with pytest.raises(UnknownTask, match="'nope'"):
            registry.resolve("nope")
        with pytest.raises(AdapterNotFound, match="'nope'"):
            registry.versions("nope")


class TestRefusal:
    @pytest.mark.parametrize(
        ("bundle", "name"),
        [(LETTERS, "base"), (small_bundle(tasks=("base",)), "letters")],
        ids=["adapter", "task"],
    )
    def test_the_base_keeps_its_name(self, registry, tmp_path, bundle, name) -> None:
        before = contents(tmp_path)
        with pytest.raises(AdapterInvalid, match="base model") as caught:
            registry.publish(bundle, name)
        assert caught.value.code == "name_reserved"
        assert contents(tmp_path) == before

    def test_a_task_has_one_owner(self, registry, tmp_path) -> None:
        registry.publish(LETTERS, "letters")
        before = contents(tmp_path)
        with pytest.raises(AdapterExists, match="'vowels' belongs to the adapter 'letters'"):
            registry.publish(LETTERS_2, "others")
        assert contents(tmp_path) == before

    def test_the_database_says_the_same(self, registry, tmp_path) -> None:
        """Two servers on one database could both pass the check in memory."""
        registry.publish(LETTERS, "letters")
        rows = "INSERT INTO task_owners (tenant, task, adapter) VALUES ('default', 'vowels', 1)"
        connection = sqlite3.connect(tmp_path / "registry.db")
        with pytest.raises(sqlite3.IntegrityError):
            connection.execute(rows)
        connection.close()

    def test_a_task_that_its_owner_gave_up_is_free(self, registry) -> None:
        registry.publish(LETTERS, "letters")
        registry.publish(LETTERS_2, "letters")
        registry.publish(small_bundle(tasks=("upper",)), "others")
        assert registry.resolve("upper").adapter == "others"

    def test_a_failed_commit_leaves_no_blob(self, registry, tmp_path, monkeypatch) -> None:
        def fail(*_: object) -> int:
            raise OSError("disk full")

        before = contents(tmp_path)
        monkeypatch.setattr(Registry, "_version_row", fail)
        with pytest.raises(OSError, match="disk full"):
            registry.publish(LETTERS, "letters")
        assert contents(tmp_path) == before
        assert registry.active() == []


class TestDurability:
    def test_everything_is_there_after_a_restart(self, registry, tmp_path) -> None:
        registry.publish(LETTERS, "letters")
        registry.publish(LETTERS_2, "letters")
        before = registry.versions("letters")
        registry.close()

        again = Registry(tmp_path, base_name="base")

        assert again.versions("letters") == before
        again.close()

    def test_a_commit_is_synced_to_the_disk(self, registry) -> None:
        with registry._engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"

    def test_blobs_without_a_row_are_swept(self, registry, tmp_path) -> None:
        registry.publish(LETTERS, "letters")
        kept = contents(tmp_path)
        registry.close()
        (tmp_path / "blobs" / ("0" * 64)).mkdir()
        (tmp_path / "blobs" / ".half-written").mkdir()

        Registry(tmp_path, base_name="base").close()

        assert contents(tmp_path) == kept

    def test_a_kill_before_the_commit_leaves_nothing_after_the_restart(self, tmp_path) -> None:
        """The process dies right after the blob is on the disk."""
        script = (
            "import os, sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]);"
            "from bundles import small_bundle;"
            "from oneplusn.adapters.registry import Registry;"
            "Registry._commit = lambda *_: os.kill(os.getpid(), 9);"
            "registry = Registry(Path(sys.argv[1]), base_name='base');"
            "registry.publish(small_bundle(tasks=('t',)), 'adapter')"
        )
        tests = Path(__file__).parents[1]
        done = subprocess.run([sys.executable, "-P", "-c", script, tmp_path, tests], check=False)
        assert done.returncode == -9
        assert len(list((tmp_path / "blobs").iterdir())) == 1

        again = Registry(tmp_path, base_name="base")

        assert again.active() == []
        assert list((tmp_path / "blobs").iterdir()) == []
        again.close()


class TestFolder:
    def test_a_second_server_is_refused(self, registry, tmp_path) -> None:
        with pytest.raises(ConfigError, match="in use by another server"):
            Registry(tmp_path, base_name="base")

    def test_another_schema_is_refused(self, registry, tmp_path, monkeypatch) -> None:
        registry.close()
        monkeypatch.setattr(registry_module, "SCHEMA_VERSION", 2)
        with pytest.raises(ConfigError, match="schema 1, this version reads 2"):
            Registry(tmp_path, base_name="base")
