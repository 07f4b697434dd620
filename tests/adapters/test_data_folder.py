"""What lies in a data folder: what survives, what is swept, and who may open it."""

from __future__ import annotations

import errno
import io
import os
import shutil
import sqlite3
import tarfile
from pathlib import Path

import pytest
from sqlalchemy import Connection, text

from bundles import small_bundle
from oneplusn.adapters import blobs as blobs_module
from oneplusn.adapters import registry_schema
from oneplusn.adapters.blobs import Blobs, disk_errors, tar_bytes, tar_stream
from oneplusn.adapters.files import read_upload
from oneplusn.adapters.registry import Registry
from oneplusn.errors import ConfigError, StorageFull
from prepared_bundles import prepared
from registries import LETTERS, LETTERS_2, contents

HOUR = 60 * 60


@pytest.fixture
def data(tmp_path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def published(registry, tmp_path) -> Registry:
    registry.publish(*prepared(LETTERS, "letters", tmp_path))
    return registry


def reopen(registry: Registry, data: Path) -> Registry:
    registry.close()
    return Registry(data, base_name="base")


class TestDurability:
    def test_everything_is_there_after_a_restart(self, published, data, tmp_path) -> None:
        published.publish(*prepared(LETTERS_2, "letters", tmp_path))
        published.pin("letters", pinned=True)
        published.save_blend("mix", {"vowels": 0.5})
        before = (published.adapters(), published.blends(), published.generation)

        again = reopen(published, data)

        assert (again.adapters(), again.blends(), again.generation) == before
        assert again.rollback("letters").number == 1
        again.close()

    def test_a_commit_is_synced_to_the_disk(self, registry) -> None:
        with registry._engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"

    def test_a_blob_is_synced_before_it_has_its_name(self, registry, tmp_path, monkeypatch) -> None:
        steps = []
        sync, rename = blobs_module.sync, Path.rename

        def note_sync(path: Path) -> None:
            steps.append(f"sync {path.name}")
            sync(path)

        def note_rename(path: Path, target: Path) -> Path:
            if path.exists():
                steps.append(f"rename {path.name}")
            return rename(path, target)

        made, out = prepared(LETTERS, "letters", tmp_path)
        monkeypatch.setattr(blobs_module, "sync", note_sync)
        monkeypatch.setattr(Path, "rename", note_rename)
        registry.publish(made, out)
        assert steps == [
            "rename image.bin",
            "sync bundle.json",
            "sync adapter_model.safetensors",
            "sync out",
            "rename out",
            "sync blobs",
        ]

    @pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
    def test_a_full_disk_refuses_and_leaves_nothing(
        self, registry, data, tmp_path, monkeypatch, error
    ) -> None:
        def full(_: Path) -> None:
            raise OSError(error, os.strerror(error))

        before = contents(data)
        made, out = prepared(LETTERS, "letters", tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(blobs_module, "sync", full)
            with pytest.raises(StorageFull) as caught:
                registry.publish(made, out)
        assert caught.value.status_code == 507
        assert contents(data) == before
        assert registry.adapters() == []
        assert registry.publish(*prepared(LETTERS, "letters", tmp_path))[1]

    def test_a_full_disk_under_the_database_refuses_and_leaves_nothing(
        self, registry, data, tmp_path
    ) -> None:
        before = contents(data)
        with registry._engine.connect() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        bundle = small_bundle(tasks=tuple(f"t{i}" for i in range(500)))
        with pytest.raises(StorageFull):
            registry.publish(*prepared(bundle, "letters", tmp_path))
        assert contents(data) == before
        assert registry.adapters() == []

    def test_a_failing_disk_is_not_taken_for_a_full_one(self) -> None:
        with pytest.raises(OSError, match="Input/output"), disk_errors():
            raise OSError(errno.EIO, "Input/output error")


class TestSweep:
    def test_what_nobody_names_goes_after_a_day(self, published, data) -> None:
        digest = f"sha256:{'0' * 64}"
        orphans = [published.blob(digest), published.image(digest, "0123456789abcdef")]
        orphans[0].mkdir()
        orphans[1].write_bytes(b"x")
        half_written = data / "images" / ".half.1234"
        half_written.write_bytes(b"x")
        now = half_written.stat().st_mtime

        assert published.sweep(lambda: now + 23 * HOUR) == []
        assert sorted(published.sweep(lambda: now + 25 * HOUR)) == sorted(
            path.name for path in (*orphans, half_written)
        )
        assert published.blob(LETTERS.digest).is_dir()

    def test_a_start_sweeps(self, published, data) -> None:
        orphan = data / "blobs" / ("0" * 64)
        orphan.mkdir()
        os.utime(orphan, (0, 0))
        reopen(published, data).close()
        assert not orphan.exists()

    def test_an_upload_that_was_interrupted_goes_at_once(self, registry, data) -> None:
        left = data / "incoming/abc"
        left.mkdir()
        (left / "0").write_bytes(b"x" * 1000)
        again = reopen(registry, data)
        assert list((data / "incoming").iterdir()) == []
        again.close()

    def test_a_lent_folder_is_taken_back_whatever_happens(self, registry, data) -> None:
        with registry.incoming() as folder:
            (folder / "0").write_bytes(b"x")
        with pytest.raises(FileNotFoundError), registry.incoming() as folder:
            shutil.copy(folder / "missing", folder / "0")
        assert list((data / "incoming").iterdir()) == []

    def test_an_orphan_of_the_same_content_is_replaced(self, registry, tmp_path) -> None:
        half = registry.blob(LETTERS.digest)
        half.mkdir()
        (half / "bundle.json").write_bytes(b"cut o")
        registry.publish(*prepared(LETTERS, "letters", tmp_path))
        registry.verify(LETTERS.digest)


class TestOpening:
    def test_a_second_server_is_refused(self, registry, data) -> None:
        with pytest.raises(ConfigError, match="in use by another server"):
            Registry(data, base_name="base")

    def test_a_refused_opening_releases_the_folder(self, registry, data) -> None:
        registry.close()
        (data / "registry.db").write_bytes(b"not a database" * 100)
        for _ in range(2):
            with pytest.raises(
                ConfigError, match=r"registry\.db is damaged.*oneplusn data restore"
            ):
                Registry(data, base_name="base")

    def test_names_that_are_lost_are_not_taken_for_none(self, published, data) -> None:
        published.close()
        for path in data.glob("registry.db*"):
            path.unlink()
        with pytest.raises(ConfigError, match=r"holds adapters and no registry\.db"):
            Registry(data, base_name="base")
        assert published.blob(LETTERS.digest).is_dir()

    def test_a_damaged_page_is_found(self, published, data) -> None:
        published.close()
        database = data / "registry.db"
        content = bytearray(database.read_bytes())
        content[4096 + 100 : 2 * 4096] = b"\xff" * (4096 - 100)
        database.write_bytes(content)
        with pytest.raises(ConfigError, match="is damaged"):
            Registry(data, base_name="base")

    def test_a_folder_belongs_to_one_base(self, published, data) -> None:
        published.bind("base:1")
        published.bind("base:1")
        again = reopen(published, data)
        with pytest.raises(ConfigError, match=r"belong to the base model base:1.*give --data"):
            again.bind("base:2")
        again.bind("base:1")
        again.close()


class TestSchema:
    def version(self, data: Path) -> str:
        connection = sqlite3.connect(data / "registry.db")
        (found,) = connection.execute(
            "SELECT value FROM about WHERE key = 'schema_version'"
        ).fetchone()
        connection.close()
        return found

    def test_a_newer_schema_is_refused(self, registry, data, monkeypatch) -> None:
        registry.close()
        monkeypatch.setattr(registry_schema, "SCHEMA_VERSION", 1)
        with pytest.raises(ConfigError, match="schema 2, of a newer release"):
            Registry(data, base_name="base")

    def test_an_older_schema_without_a_way_is_refused(self, registry, data, monkeypatch) -> None:
        registry.close()
        monkeypatch.setattr(registry_schema, "SCHEMA_VERSION", 4)
        monkeypatch.setattr(registry_schema, "MIGRATIONS", {2: lambda _: None})
        with pytest.raises(ConfigError, match="schema 2, of an older release"):
            Registry(data, base_name="base")
        assert self.version(data) == "2"

    def test_an_older_schema_is_brought_forward(self, published, data, monkeypatch) -> None:
        published.close()
        done = []
        monkeypatch.setattr(registry_schema, "SCHEMA_VERSION", 4)
        monkeypatch.setattr(
            registry_schema,
            "MIGRATIONS",
            {
                2: lambda connection: add_column(connection, done),
                3: lambda _: done.append(3),
            },
        )
        again = Registry(data, base_name="base")
        assert again.resolve("vowels").number == 1
        again.close()
        assert (done, self.version(data)) == ([2, 3], "4")

    def test_a_migration_that_fails_changes_nothing(self, published, data, monkeypatch) -> None:
        published.close()

        def fail(connection: Connection) -> None:
            add_column(connection, [])
            raise ZeroDivisionError

        with monkeypatch.context() as patch:
            patch.setattr(registry_schema, "SCHEMA_VERSION", 3)
            patch.setattr(registry_schema, "MIGRATIONS", {2: fail})
            with pytest.raises(ZeroDivisionError):
                Registry(data, base_name="base")
        again = Registry(data, base_name="base")
        assert again.resolve("vowels").number == 1
        again.close()
        connection = sqlite3.connect(data / "registry.db")
        columns = {row[1] for row in connection.execute("PRAGMA table_info(versions)")}
        connection.close()
        assert "notes" not in columns


def add_column(connection: Connection, done: list[int]) -> None:
    connection.execute(text("ALTER TABLE versions ADD COLUMN notes VARCHAR"))
    done.append(2)


class TestDownload:
    def test_it_can_be_uploaded_again(self, published) -> None:
        version = published.resolve("vowels")
        packed = b"".join(tar_stream(published.blob(version.digest)))
        assert len(packed) == tar_bytes(version.files)
        assert read_upload({"a.tar": packed}, name="letters").digest == LETTERS.digest
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            assert [(m.name, m.mtime, m.uname) for m in archive] == [
                ("bundle.json", 0, ""),
                ("adapter_model.safetensors", 0, ""),
            ]

    def test_a_file_that_fills_its_blocks_has_no_padding(self, tmp_path) -> None:
        for name in ("bundle.json", "adapter_model.safetensors"):
            (tmp_path / name).write_bytes(b"x" * 1024)
        packed = b"".join(tar_stream(tmp_path))
        assert len(packed) == 2 * (512 + 1024) + 1024
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            assert [member.size for member in archive] == [1024, 1024]


@pytest.mark.parametrize("digest", ["sha256:../..", "0" * 64, f"sha256:{'A' * 64}", "sha256:"])
def test_a_digest_is_never_a_path(tmp_path, digest) -> None:
    with pytest.raises(AssertionError):
        Blobs(tmp_path).path(digest)
