"""`oneplusn data`: what it finds, what it repairs, and that a backup is a data folder."""

from __future__ import annotations

import argparse
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from bundles import small_bundle
from oneplusn.adapters.registry import Registry
from oneplusn.errors import AdapterCorrupt, ConfigError
from oneplusn.server import data as data_module
from oneplusn.server.data import check_data, copy_data, declare, run
from prepared_bundles import prepared

LETTERS = small_bundle(tasks=("vowels", "upper"))
SUMS = small_bundle(tasks=("add",), seed=4)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two adapters, nobody using them."""
    registry = Registry(tmp_path / "data", base_name="base")
    registry.bind("base:1")
    registry.publish(*prepared(LETTERS, "letters", tmp_path))
    registry.publish(*prepared(SUMS, "sums", tmp_path))
    registry.close()
    return tmp_path / "data"


@pytest.fixture
def serving(folder) -> Iterator[Registry]:
    registry = Registry(folder, base_name="base")
    yield registry
    registry.close()


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def blob(folder: Path, digest: str) -> Path:
    return folder / "blobs" / digest.removeprefix("sha256:")


def problems(folder: Path, *, repair: bool = False) -> list[str]:
    return [found.text for found in check_data(folder, repair=repair) if found.is_problem]


def command(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    declare(parser)
    return run(parser.parse_args([str(argument) for argument in arguments]))


class TestCheck:
    def test_a_sound_folder(self, folder, capsys) -> None:
        assert command("check", "--data", folder) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "ok  no server is using the folder"
        assert lines[1] == "ok  registry.db has schema 2, generation 2, for base:1"
        assert lines[2].startswith("ok  2 versions with ")
        assert len(lines) == 3

    def test_while_a_server_uses_it(self, serving, folder) -> None:
        found = check_data(folder)
        assert found[0].text == "a server is using the folder"
        assert problems(folder) == []
        with pytest.raises(ConfigError, match="in use"):
            check_data(folder, repair=True)

    def test_damaged_content_is_found_and_put_aside(self, folder) -> None:
        spoil(blob(folder, SUMS.digest) / "adapter_model.safetensors")
        (found,) = problems(folder)
        assert "another content" in found
        assert blob(folder, SUMS.digest).is_dir()

        (repaired,) = problems(folder, repair=True)

        assert "was put aside" in repaired
        assert not blob(folder, SUMS.digest).exists()
        registry = Registry(folder, base_name="base")
        assert registry.resolve("vowels").number == 1
        with pytest.raises(AdapterCorrupt):
            registry.resolve("add")
        registry.close()

    def test_missing_content_is_found(self, folder, tmp_path) -> None:
        blob(folder, SUMS.digest).rename(tmp_path / "elsewhere")
        (found,) = problems(folder)
        assert "cannot be read" in found

    def test_what_nobody_names_is_told_and_goes_after_a_day(self, folder) -> None:
        fresh, old = (blob(folder, f"sha256:{digit * 64}") for digit in "01")
        for path in (fresh, old):
            path.mkdir()
        os.utime(old, (0, 0))
        texts = [found.text for found in check_data(folder)]
        assert f"blobs/{fresh.name} is of no version; it goes in 24 h" in texts
        assert f"blobs/{old.name} is of no version; it goes when a server starts" in texts
        assert problems(folder, repair=True) == []
        assert (fresh.exists(), old.exists()) == (True, False)

    def test_a_damaged_image_is_no_problem_and_can_be_removed(self, folder) -> None:
        image = next((folder / "images").iterdir())
        spoil(image)
        assert f"images/{image.name} is damaged" in " ".join(f.text for f in check_data(folder))
        assert problems(folder) == []
        check_data(folder, repair=True)
        assert not image.exists()

    def test_rows_that_lead_nowhere_are_found(self, folder) -> None:
        connection = sqlite3.connect(folder / "registry.db")
        connection.execute("DELETE FROM blobs")
        connection.commit()
        connection.close()
        (found,) = problems(folder)
        assert "2 rows lead nowhere" in found

    def test_a_database_that_is_none(self, folder) -> None:
        for path in folder.glob("registry.db*"):
            path.write_bytes(b"not a database" * 100)
        with pytest.raises(ConfigError, match="is damaged"):
            check_data(folder)

    def test_problems_give_an_exit_code(self, folder, capsys) -> None:
        spoil(blob(folder, SUMS.digest) / "bundle.json")
        assert command("check", "--data", folder) == 1
        assert "BAD bundle.json of" in capsys.readouterr().out

    def test_a_folder_without_data(self, tmp_path) -> None:
        with pytest.raises(ConfigError, match=r"has no registry\.db"):
            check_data(tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_the_folder_has_to_be_said(self, monkeypatch, folder) -> None:
        monkeypatch.delenv("ONEPLUSN_DATA", raising=False)
        with pytest.raises(ConfigError, match="--data FOLDER, or ONEPLUSN_DATA"):
            command("check")
        monkeypatch.setenv("ONEPLUSN_DATA", str(folder))
        assert command("check") == 0


class TestBackup:
    def test_it_is_a_data_folder(self, serving, folder, tmp_path, capsys) -> None:
        dest = tmp_path / "backup"
        assert command("backup", dest, "--data", folder) == 0
        assert "holds 2 versions" in capsys.readouterr().out
        assert problems(dest) == []
        copy = Registry(dest, base_name="base")
        assert copy.adapters() == serving.adapters()
        with pytest.raises(ConfigError):
            copy.bind("base:2")
        copy.close()

    def test_it_is_of_one_moment(self, serving, folder, tmp_path, monkeypatch) -> None:
        """What is deleted while the blobs are copied is still there: it is swept a day later."""
        copy_blob = data_module._copy_blob

        def delete_first(*args: object, **options: object) -> None:
            for adapter in serving.adapters():
                serving.delete(adapter.name)
            copy_blob(*args, **options)

        monkeypatch.setattr(data_module, "_copy_blob", delete_first)
        assert copy_data(folder, tmp_path / "backup", link=True) == 2
        assert problems(tmp_path / "backup") == []
        assert serving.adapters() == []

    def test_one_disk_holds_the_content_once(self, folder, tmp_path) -> None:
        copy_data(folder, tmp_path / "backup", link=True)
        one, two = (
            blob(where, SUMS.digest) / "bundle.json" for where in (folder, tmp_path / "backup")
        )
        assert one.samefile(two)

    def test_another_disk_gets_a_copy(self, folder, tmp_path, monkeypatch) -> None:
        def cross_device(*_: object) -> None:
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", cross_device)
        copy_data(folder, tmp_path / "backup", link=True)
        assert problems(tmp_path / "backup") == []

    def test_a_damaged_blob_makes_no_backup(self, folder, tmp_path) -> None:
        spoil(blob(folder, SUMS.digest) / "bundle.json")
        with pytest.raises(AdapterCorrupt):
            copy_data(folder, tmp_path / "backup", link=True)
        assert not (tmp_path / "backup/registry.db").exists()

    def test_what_is_put_aside_already_is_left_out(self, folder, tmp_path) -> None:
        spoil(blob(folder, SUMS.digest) / "bundle.json")
        check_data(folder, repair=True)
        assert copy_data(folder, tmp_path / "backup", link=True) == 1
        copy = Registry(tmp_path / "backup", base_name="base")
        assert copy.resolve("vowels").number == 1
        copy.close()

    def test_nothing_is_overwritten(self, folder, tmp_path) -> None:
        dest = tmp_path / "backup"
        dest.mkdir()
        (dest / "precious").touch()
        with pytest.raises(ConfigError, match="is not empty"):
            copy_data(folder, dest, link=True)
        assert (dest / "precious").exists()


class TestRestore:
    @pytest.fixture
    def backup(self, folder, tmp_path) -> Path:
        copy_data(folder, tmp_path / "backup", link=True)
        return tmp_path / "backup"

    def test_it_fills_an_empty_folder(self, backup, tmp_path) -> None:
        fresh = tmp_path / "fresh"
        fresh.mkdir()
        assert command("restore", backup, "--data", fresh) == 0
        registry = Registry(fresh, base_name="base")
        assert registry.resolve("add").label == "sums@1"
        registry.close()
        one, two = (blob(where, SUMS.digest) / "bundle.json" for where in (backup, fresh))
        assert not one.samefile(two)

    def test_it_does_not_touch_a_folder_with_data(self, backup, folder) -> None:
        with pytest.raises(ConfigError, match="is not empty"):
            command("restore", backup, "--data", folder)

    def test_one_that_broke_off_is_seen(self, backup, tmp_path, monkeypatch) -> None:
        def fail(*_: object, **__: object) -> None:
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(data_module, "sync", fail)
            with pytest.raises(OSError, match="Input/output"):
                copy_data(backup, tmp_path / "fresh", link=False)
        with pytest.raises(ConfigError, match=r"holds adapters and no registry\.db"):
            Registry(tmp_path / "fresh", base_name="base")

    def test_a_folder_that_is_no_backup(self, tmp_path) -> None:
        with pytest.raises(ConfigError, match=r"has no registry\.db"):
            copy_data(tmp_path, tmp_path / "fresh", link=False)
        assert not (tmp_path / "fresh").exists()
