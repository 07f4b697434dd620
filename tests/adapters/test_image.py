"""A page image in a file is the one in memory, and a damaged file is never taken for one."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bundles import small_bundle
from oneplusn.adapters import image_file
from oneplusn.adapters.image import PageImage
from oneplusn.adapters.image_file import check_image, map_image
from oneplusn.adapters.layout import page_image
from oneplusn.errors import AdapterCorrupt
from oneplusn.kernels.plan import SiteSpec
from random_bundles import make_bundle, shapes_of

QKV = SiteSpec("l.0.q+k+v", 3, (4, 2, 2), ("l.0.q", "l.0.k", "l.0.v"))
DOWN = SiteSpec("l.0.down", 5, (3,), ("l.0.down",))
SPECS = (QKV, DOWN)


def an_image(seed: int = 0) -> PageImage:
    bundle = make_bundle(shapes_of(SPECS), seed=seed, tasks=("t0", "t1"), common=(9, 9))
    return page_image(bundle, SPECS, torch.bfloat16)


def assert_same(one: PageImage, other: PageImage) -> None:
    for name in ("digest", "tasks", "task_keys", "task_runs", "num_runs", "num_bytes"):
        assert getattr(one, name) == getattr(other, name), name
    assert list(one.sites) == list(other.sites)
    for name, site in one.sites.items():
        like = other.sites[name]
        assert site.run_rows == like.run_rows
        for ours, theirs in ((site.a, like.a), (site.b, like.b)):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
        assert list(site.gates) == list(like.gates)
        for task, gates in site.gates.items():
            assert [run.tolist() for run in gates] == [run.tolist() for run in like.gates[task]]


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "image.bin"
    an_image().save(path, layout="abc")
    return path


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10_000),
    num_tasks=st.integers(1, 4),
    common=st.lists(st.integers(1, 20), max_size=3),
    own=st.lists(st.integers(0, 17), min_size=4, max_size=4),
    modules=st.sets(st.sampled_from([*QKV.modules, *DOWN.modules]), min_size=1),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    gates_differ=st.booleans(),
)
def test_what_is_opened_is_what_was_saved(
    tmp_path, seed, num_tasks, common, own, modules, dtype, gates_differ
) -> None:
    tasks = tuple(f"t{i}" for i in range(num_tasks))
    ranks = {task: rank for task, rank in zip(tasks, own, strict=False) if rank}
    if len(ranks) < num_tasks and not common:
        common = [1]
    shapes = {path: shape for path, shape in shapes_of(SPECS).items() if path in modules}
    bundle = make_bundle(
        shapes, seed=seed, tasks=tasks, common=common, own=ranks, gates_differ=gates_differ
    )
    image = page_image(bundle, SPECS, dtype)
    path = tmp_path / "image.bin"
    image.save(path)
    check_image(path, bundle.digest)
    assert_same(PageImage.open(path), image)


def test_pages_are_where_they_lie_in_the_file(saved, monkeypatch) -> None:
    maps = []
    mapped = image_file.mmap.mmap

    def note(*args: object, **kwargs: object) -> mmap.mmap:
        maps.append(mapped(*args, **kwargs))
        return maps[-1]

    monkeypatch.setattr(image_file.mmap, "mmap", note)
    image = PageImage.open(saved)
    first = image.sites[QKV.name].a.view(torch.uint8).flatten()
    start = torch.frombuffer(maps[0], dtype=torch.uint8).data_ptr()
    offset = first.data_ptr() - start
    assert 0 < offset < len(maps[0])
    assert saved.read_bytes()[offset : offset + len(first)] == bytes(first.tolist())
    for site in image.sites.values():
        for array in (site.a, site.b):
            assert (array.data_ptr() - start) % image_file.ALIGNMENT == 0


def test_an_open_image_survives_its_file(saved) -> None:
    image = PageImage.open(saved)
    saved.unlink()
    assert_same(image, an_image())


def test_a_file_is_replaced_whole(saved) -> None:
    old = PageImage.open(saved)
    an_image(seed=1).save(saved)
    assert_same(old, an_image())
    assert_same(PageImage.open(saved), an_image(seed=1))
    assert [path.name for path in saved.parent.iterdir()] == ["image.bin"]


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        an_image().save(tmp_path / "image.bin")
    assert list(tmp_path.iterdir()) == []


def test_the_layout_is_noted(saved) -> None:
    assert map_image(saved).header.layout == "abc"


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


class TestDamage:
    @pytest.mark.parametrize("offset", [0, 9, 12, 16, 24, 300])
    def test_in_the_header_is_seen_when_it_is_opened(self, saved, offset) -> None:
        flip(saved, offset)
        with pytest.raises(AdapterCorrupt, match=r"page image image\.bin cannot be used"):
            PageImage.open(saved)

    @pytest.mark.parametrize("keep", [0, 10, 40, 1000, -1])
    def test_a_file_that_was_cut_off(self, saved, keep) -> None:
        saved.write_bytes(saved.read_bytes()[:keep])
        with pytest.raises(AdapterCorrupt, match="cannot be used"):
            PageImage.open(saved)

    def test_a_file_that_has_more(self, saved) -> None:
        saved.write_bytes(saved.read_bytes() + b"\0")
        with pytest.raises(AdapterCorrupt, match="and should have"):
            PageImage.open(saved)

    def test_a_file_that_is_missing(self, tmp_path) -> None:
        with pytest.raises(AdapterCorrupt, match="No such file"):
            PageImage.open(tmp_path / "image.bin")

    def test_in_the_pages_is_seen_when_it_is_checked(self, saved) -> None:
        digest = map_image(saved).header.digest
        check_image(saved, digest)
        for offset in (map_image(saved).start, -1):
            flip(saved, offset)
            with pytest.raises(AdapterCorrupt, match="arrays"):
                check_image(saved, digest)
            flip(saved, offset)
        check_image(saved, digest)

    def test_an_image_of_another_version(self, saved) -> None:
        other = small_bundle(tasks=("t",)).digest
        with pytest.raises(AdapterCorrupt, match="it is of sha256"):
            check_image(saved, other)
