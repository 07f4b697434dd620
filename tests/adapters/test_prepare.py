"""From an upload to a blob, an image and a report: what is said, what is refused, what is left."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bundles import MODULE, small_bundle
from oneplusn.adapters import prepare
from oneplusn.adapters.blobs import check_files
from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.files import read_adapter, write_bundle
from oneplusn.adapters.image import PageImage
from oneplusn.adapters.image_file import check_image
from oneplusn.adapters.norms import delta_norms
from oneplusn.adapters.prepare import Rules, prepare_adapter, rebuild_image
from oneplusn.adapters.prepared import BaseLayout, SiteInfo
from oneplusn.errors import (
    AdapterCorrupt,
    AdapterIncompatible,
    AdapterInvalid,
    AdapterTooLarge,
    StorageFull,
)
from oneplusn.kernels.plan import SiteSpec
from prepared_bundles import base_for, prepared
from random_bundles import delta_weight, make_bundle, shapes_of
from tolerances import assert_close

QKV = SiteInfo("l.0.q+k+v", 24, (16, 8, 8), ("l.0.q", "l.0.k", "l.0.v"))
DOWN = SiteInfo("l.0.down", 40, (24,), ("l.0.down",))
BASE = BaseLayout((QKV, DOWN), "float32", "base:1")
SPECS = [SiteSpec(s.name, s.in_features, s.slices, s.modules) for s in BASE.sites]
LETTERS = small_bundle(tasks=("vowels", "upper"))


def with_base(bundle: Bundle, base: str | None) -> Bundle:
    return Bundle(bundle.method, bundle.tasks, bundle.experts, bundle.modules, base=base)


class TestPrepared:
    def test_blob_and_image_are_written(self, tmp_path) -> None:
        made, out = prepared(LETTERS, "letters", tmp_path)
        assert {path.name for path in out.iterdir()} == {
            "bundle.json",
            "adapter_model.safetensors",
            "image.bin",
        }
        assert made.digest == LETTERS.digest == read_adapter(out_blob(out), name="x").digest
        check_files(out, made.files)
        check_image(out / "image.bin", made.digest)
        image = PageImage.open(out / "image.bin")
        assert (image.digest, image.num_bytes) == (made.digest, made.report.num_bytes)
        assert made.num_bytes == sum(file.size for file in made.files)

    def test_it_says_what_it_is(self, tmp_path) -> None:
        made, _ = prepared(LETTERS, "letters", tmp_path)
        assert (made.name, made.method, made.rank) == ("letters", "cgc", 4)
        assert made.tasks == ["vowels", "upper"]
        assert made.descriptions == {"vowels": "the first", "upper": "adapter number 0"}
        assert made.layout == base_for(LETTERS).key

    def test_a_dry_run_leaves_nothing(self, tmp_path) -> None:
        write_bundle(LETTERS, tmp_path / "source")
        out = tmp_path / "out"
        out.mkdir()
        made = prepare_adapter(
            tmp_path / "source",
            out,
            name="letters",
            base=base_for(LETTERS),
            rules=Rules(dry_run=True),
        )
        assert list(out.iterdir()) == []
        assert made.files == []
        assert made.digest == LETTERS.digest
        assert made.report == prepared(LETTERS, "letters", tmp_path)[0].report

    def test_equal_uploads_make_equal_files(self, tmp_path) -> None:
        one, two = (prepared(LETTERS, "letters", tmp_path)[0] for _ in range(2))
        assert one == two


def out_blob(out: Path) -> Path:
    """Take the image away, which has no place beside an adapter."""
    blob = out.with_name("blob")
    blob.mkdir()
    for name in ("bundle.json", "adapter_model.safetensors"):
        (blob / name).write_bytes((out / name).read_bytes())
    return blob


class TestReport:
    def test_modules_and_ranks(self, tmp_path) -> None:
        shapes = shapes_of(SPECS)
        del shapes["l.0.v"]
        bundle = make_bundle(shapes, seed=0, common=(2,), own={"t0": 3})
        report = prepared(bundle, "a", tmp_path, base=BASE)[0].report
        assert report.matched == ["l.0.q", "l.0.k", "l.0.down"]
        assert (report.unmatched, report.missing) == ([], ["l.0.v"])
        assert report.ranks == dict.fromkeys(report.matched, 5)
        assert report.num_bytes == 4 * 16 * (3 * 24 + 32 + 40 + 24)
        assert report.base_fingerprint is None

    def test_norms_are_those_of_the_weights_that_are_added(self) -> None:
        bundle = make_bundle(
            shapes_of(SPECS),
            seed=3,
            tasks=("t0", "t1"),
            common=(2, 5),
            own={"t1": 4},
            gates_differ=True,
        )
        norms = delta_norms(bundle, SPECS)
        for spec in SPECS:
            by_task = [
                torch.cat([weight_of(bundle, task, path) for path in spec.modules]).norm()
                for task in bundle.tasks
            ]
            assert_close(torch.tensor(norms[spec.name]), torch.stack(by_task).max().float())

    def test_factors_that_cancel_have_a_norm_of_zero(self) -> None:
        bundle = make_bundle({"l.0.down": (40, 24)}, seed=0, common=(1, 1), own={})
        delta = bundle.modules["l.0.down"]
        cancelling = replace(
            delta,
            a=delta.a[:1].repeat(2, 1),
            b=delta.b[:, :1].repeat(1, 2),
            gate=torch.tensor([[1.0, -1.0]]),
        )
        bundle = replace(bundle, modules={"l.0.down": cancelling})
        assert delta_norms(bundle, SPECS) == {"l.0.down": 0.0}

    def test_norms_that_take_too_long_are_left_out(self, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr("oneplusn.adapters.norms.MAX_PRODUCTS", 1)
        report = prepared(LETTERS, "letters", tmp_path)[0].report
        assert report.delta_norms == {}
        assert any("norms" in warning for warning in report.warnings)


def weight_of(bundle: Bundle, task: str, path: str) -> torch.Tensor:
    weight = delta_weight(bundle, task, path)
    assert weight is not None
    return weight.flatten()


class TestFit:
    def test_a_module_that_the_base_lacks_is_refused_unless_it_may(self, tmp_path) -> None:
        bundle = make_bundle(shapes_of(SPECS) | {"l.1.up": (4, 4)}, seed=0)
        with pytest.raises(AdapterIncompatible) as caught:
            prepared(bundle, "a", tmp_path, base=BASE)
        assert caught.value.code == "module_unmatched"
        report = prepared(bundle, "a", tmp_path, base=BASE, strict=False)[0].report
        assert report.unmatched == ["l.1.up"]
        assert any("1 modules are no linears" in warning for warning in report.warnings)

    @pytest.mark.parametrize(
        ("made_for", "served", "warned"),
        [("base:1", "base:1", False), (None, "base:1", True), ("base:1", None, False)],
    )
    def test_the_same_base_or_an_unknown_one(self, tmp_path, made_for, served, warned) -> None:
        bundle = with_base(LETTERS, made_for)
        base = base_for(bundle, fingerprint=served)
        report = prepared(bundle, "a", tmp_path, base=base)[0].report
        assert report.base_fingerprint == made_for
        assert [w for w in report.warnings if "base" in w] == (
            ["the adapter does not say which base it was trained on; shapes agree"]
            if warned
            else []
        )

    def test_another_base_is_refused_unless_it_may(self, tmp_path) -> None:
        bundle = with_base(LETTERS, "base:1")
        base = base_for(bundle, fingerprint="base:2")
        with pytest.raises(AdapterIncompatible, match="base:1 and this base is base:2") as caught:
            prepared(bundle, "a", tmp_path, base=base)
        assert caught.value.code == "base_mismatch"
        report = prepared(bundle, "a", tmp_path, base=base, strict=False)[0].report
        assert "the adapter was trained on base:1 and this base is base:2" in report.warnings

    def test_a_task_that_changes_nothing_is_refused_in_a_dry_run_too(self, tmp_path) -> None:
        zero = small_bundle(tasks=("t",))
        zero.modules[MODULE].b.zero_()
        write_bundle(zero, tmp_path / "source")
        (tmp_path / "out").mkdir()
        with pytest.raises(AdapterInvalid, match="change nothing"):
            prepare_adapter(
                tmp_path / "source",
                tmp_path / "out",
                name="a",
                base=base_for(zero),
                rules=Rules(dry_run=True),
            )

    def test_pages_that_no_pool_can_hold_are_refused(self, tmp_path) -> None:
        write_bundle(LETTERS, tmp_path / "source")
        (tmp_path / "out").mkdir()
        with pytest.raises(AdapterTooLarge, match="pages take 3072 bytes") as caught:
            prepare_adapter(
                tmp_path / "source",
                tmp_path / "out",
                name="a",
                base=base_for(LETTERS),
                rules=Rules(max_image_bytes=3071),
            )
        assert caught.value.status_code == 413

    def test_leftovers_of_training_are_told(self, tmp_path) -> None:
        write_bundle(LETTERS, tmp_path / "source")
        (tmp_path / "source/training_args.bin").write_bytes(b"never opened")
        (tmp_path / "out").mkdir()
        made = prepare_adapter(
            tmp_path / "source", tmp_path / "out", name="a", base=base_for(LETTERS)
        )
        assert "left by training and never opened: training_args.bin" in made.report.warnings

    def test_a_full_disk_is_told_as_such(self, tmp_path, monkeypatch) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(prepare, "write_files", full)
        with pytest.raises(StorageFull, match="No space left"):
            prepared(LETTERS, "a", tmp_path)


class TestRebuild:
    @pytest.fixture
    def blob(self, tmp_path) -> Path:
        write_bundle(LETTERS, tmp_path / "blob")
        return tmp_path / "blob"

    def test_it_is_the_image_that_was_made_first(self, tmp_path, blob) -> None:
        _, out = prepared(LETTERS, "letters", tmp_path)
        target = tmp_path / "again.img"
        num_bytes = rebuild_image(blob, target, digest=LETTERS.digest, base=base_for(LETTERS))
        assert target.read_bytes() == (out / "image.bin").read_bytes()
        assert num_bytes == PageImage.open(target).num_bytes

    def test_modules_that_were_left_out_once_are_left_out_again(self, tmp_path) -> None:
        bundle = make_bundle(shapes_of(SPECS) | {"l.1.up": (4, 4)}, seed=0)
        write_bundle(bundle, tmp_path / "blob")
        target = tmp_path / "again.img"
        rebuild_image(tmp_path / "blob", target, digest=bundle.digest, base=BASE)
        assert PageImage.open(target).sites.keys() == {QKV.name, DOWN.name}

    def test_other_content_is_corrupt(self, tmp_path, blob) -> None:
        other = small_bundle(tasks=("vowels", "upper"), seed=1)
        with pytest.raises(AdapterCorrupt, match="hold sha256"):
            rebuild_image(blob, tmp_path / "x", digest=other.digest, base=base_for(LETTERS))
        assert not (tmp_path / "x").exists()

    @pytest.mark.parametrize("name", ["bundle.json", "adapter_model.safetensors"])
    def test_content_that_cannot_be_read_is_corrupt(self, tmp_path, blob, name) -> None:
        (blob / name).write_bytes(b"\x80")
        with pytest.raises(AdapterCorrupt, match="cannot be read"):
            rebuild_image(blob, tmp_path / "x", digest=LETTERS.digest, base=base_for(LETTERS))


class TestLayoutKey:
    def test_it_tells_what_images_depend_on(self) -> None:
        other = SiteInfo("l.0.q+k+v", 24, (16, 16), ("l.0.q", "l.0.k"))
        keys = {
            BASE.key,
            BaseLayout((QKV, DOWN), "bfloat16").key,
            BaseLayout((DOWN, QKV), "float32").key,
            BaseLayout((other, DOWN), "float32").key,
        }
        assert len(keys) == 4
        assert BaseLayout((QKV, DOWN), "float32", "base:2").key == BASE.key
