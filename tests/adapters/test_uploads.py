"""Which files and archives are taken, and that nothing of a refused one is left."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest

from adapter_samples import bundle_files, write_files
from oneplusn.adapters.files import read, read_adapter, read_upload
from oneplusn.errors import AdapterInvalid, AdapterMediaType, AdapterTooLarge

FILES = bundle_files()
WEIGHTS = FILES["adapter_model.safetensors"]
MIB = 1024 * 1024


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """Temporary files go where the test can see what is left of them."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def member(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def tar(*members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def packed(prefix: str = "", **options: int) -> bytes:
    return tar(*(member(prefix + name, content) for name, content in FILES.items()), **options)


def zipped(
    files: dict[str, bytes], *, kind: int = 0, compression: int = zipfile.ZIP_DEFLATED
) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (kind | 0o644) << 16
            info.compress_type = compression
            archive.writestr(info, content)
    return buffer.getvalue()


DIGEST = read_upload(FILES, name="a").digest

ACCEPTED = {
    "flat files": FILES,
    "ignored files beside": FILES | {"README.md": b"", "tokenizer_config.json": b"{{ bomb }}"},
    "router beside": FILES | {"router.safetensors": b"never read"},
    "flat files in a folder": {f"mine/{name}": content for name, content in FILES.items()},
    "tar": {"a.tar": packed()},
    "tar of a folder": {"a.tar": tar(member("x", type=tarfile.DIRTYPE), *(
        member(f"x/{name}", content) for name, content in FILES.items()
    ))},
    "tar of the current folder": {"a.tar": tar(member(".", type=tarfile.DIRTYPE), *(
        member(f"./{name}", content) for name, content in FILES.items()
    ))},
    "tar with pax headers": {"a.tar": tar(
        *(member(n, c, mtime=1.5, pax_headers={"comment": "é"}) for n, c in FILES.items()),
        format=tarfile.PAX_FORMAT,
    )},
    "setuid has no effect": {"a.tar": tar(
        *(member(name, content, mode=0o7777, uid=0) for name, content in FILES.items())
    )},
    "tar.gz": {"a.tar.gz": gzip.compress(packed())},
    "tgz, upper case": {"A.TGZ": gzip.compress(packed("top/"))},
    "zip": {"a.zip": zipped(FILES)},
    "zip, stored": {"a.zip": zipped(FILES, compression=zipfile.ZIP_STORED)},
    "zip of a folder": {"a.zip": zipped({"x/": b"", **{f"x/{n}": c for n, c in FILES.items()}})},
}  # fmt: skip


@pytest.mark.parametrize("files", ACCEPTED.values(), ids=ACCEPTED)
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_every_way_to_send_the_same_files_gives_the_same_bundle(tmp_path, files, place):
    if place == "disk":
        paths = {}
        for index, (name, content) in enumerate(files.items()):
            paths[name] = tmp_path / f"part-{index}"
            paths[name].write_bytes(content)
        assert read_upload(paths, name="a").digest == DIGEST
    else:
        assert read_upload(files, name="a").digest == DIGEST


def with_flag(archive: bytes, flag: int) -> bytes:
    """Set a bit of the general purpose flags in the central directory of a zip."""
    place = archive.index(b"PK\x01\x02") + 8
    return archive[:place] + bytes([archive[place] | flag]) + archive[place + 1 :]


def with_size(archive: bytes, size: bytes) -> bytes:
    """Write the size field of the first tar header anew, with its checksum."""
    block = archive[:124] + size.ljust(12, b"\0") + b" " * 8 + archive[132:512]
    block = block[:124] + size.ljust(12, b"\0") + archive[136:148] + b" " * 8 + archive[156:512]
    checksum = f"{sum(block):06o}\0 ".encode()
    return block[:148] + checksum + block[156:] + archive[512:]


LINK = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}
BOMB = {"bundle.json": bytes(50 * MIB)}
SPARSE = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}

MEMBER, DAMAGED = "archive_member_refused", "archive_damaged"

REFUSED = {
    "path upwards": ({"a.tar": tar(member("../bundle.json"))}, MEMBER, "'../bundle.json'"),
    "path upwards inside": ({"a.tar": tar(member("x/../bundle.json"))}, MEMBER, "side by side"),
    "absolute path": ({"a.tar": tar(member("/bundle.json"))}, MEMBER, "'/bundle.json'"),
    "two levels": ({"a.tar": tar(member("x/y/bundle.json"))}, MEMBER, "'x/y/bundle.json'"),
    "two top folders": (
        {"a.tar": tar(member("x/bundle.json"), member("y/README.md"))},
        MEMBER,
        "one common folder",
    ),
    "folder in the folder": (
        {"a.tar": tar(member("x/runs", type=tarfile.DIRTYPE))},
        MEMBER,
        "'x/runs'",
    ),
    "backslashes": ({"a.tar": tar(member("x\\bundle.json"))}, "file_not_allowed", "x\\\\bundle"),
    "symlink": ({"a.tar": tar(member("bundle.json", **LINK))}, MEMBER, "is a link"),
    "hard link": (
        {"a.tar": tar(member("bundle.json", type=tarfile.LNKTYPE, linkname="x"))},
        MEMBER,
        "is a link",
    ),
    "device": ({"a.tar": tar(member("bundle.json", type=tarfile.CHRTYPE))}, MEMBER, "a device"),
    "pipe": ({"a.tar": tar(member("bundle.json", type=tarfile.FIFOTYPE))}, MEMBER, "a device"),
    "unknown type": ({"a.tar": tar(member("bundle.json", type=b"Z"))}, MEMBER, "only regular"),
    "old sparse": (
        {"a.tar": tar(member("bundle.json", type=tarfile.GNUTYPE_SPARSE))},
        MEMBER,
        "sparse",
    ),
    "sparse by pax": (
        {
            "a.tar": tar(
                member("bundle.json", b"1\n0\n9\n".ljust(512, b"\0"), pax_headers=SPARSE),
                format=tarfile.PAX_FORMAT,
            )
        },
        MEMBER,
        "sparse",
    ),
    "duplicate": (
        {"a.tar": tar(member("bundle.json", b"{}"), member("./bundle.json", b"{}"))},
        MEMBER,
        "occurs twice",
    ),
    "duplicate ignored file": (
        {"a.tar": tar(member("README.md"), member("README.md"))},
        MEMBER,
        "occurs twice",
    ),
    "long pax header": (
        {
            "a.tar": tar(
                member("README.md", pax_headers={"comment": "x" * 100_000}),
                format=tarfile.PAX_FORMAT,
            )
        },
        DAMAGED,
        "more than 65536 bytes of the archive belong to no file",
    ),
    "long name": ({"a.tar": tar(member("x" * 100_000))}, DAMAGED, "more than 65536"),
    "header after a large ignored file": (
        {"a.tar": tar(member("README.md", bytes(MIB // 2)), member("y" * 100_000))},
        DAMAGED,
        "more than 65536",
    ),
    "folder with a size": (
        {"a.tar": with_size(tar(member("x", type=tarfile.DIRTYPE)), b"7777777\0") + bytes(90_000)},
        DAMAGED,
        "more than 65536",
    ),
    "negative size": (
        {"a.tar": with_size(tar(member("bundle.json")), b"\xff" * 12)},
        MEMBER,
        "'bundle.json'",
    ),
    "size past the end": (
        {"a.tar": with_size(tar(member("bundle.json")), b"7777777777\0")},
        DAMAGED,
        "unexpected end of data",
    ),
    "bytes after the end": ({"a.tar": packed() + bytes(90_000)}, DAMAGED, "more than 65536"),
    "second header damaged": (
        {"a.tar": packed().replace(b"adapter_model", b"adapter-model") + bytes(90_000)},
        DAMAGED,
        "more than 65536",
    ),
    "tar cut off": ({"a.tar": packed()[:700]}, DAMAGED, "pack it again"),
    "not a tar": ({"a.tar": b"bundle.json"}, DAMAGED, "pack it again"),
    "empty": ({"a.tar": b""}, DAMAGED, "empty"),
    "checksum": ({"a.tar": b"x" + packed()[1:]}, DAMAGED, "pack it again"),
    "gzip cut off": ({"a.tar.gz": gzip.compress(packed())[:-20]}, DAMAGED, "end-of-stream"),
    "not gzip": ({"a.tar.gz": packed()}, DAMAGED, "gzip"),
    "gzip checksum": ({"a.tgz": gzip.compress(packed())[:-8] + bytes(8)}, DAMAGED, "CRC"),
    "too many members": (
        {"a.tar": tar(*(member("x", type=tarfile.DIRTYPE) for _ in range(65)))},
        "archive_too_many_files",
        "more than 64 files",
    ),
    "zip of many": (
        {"a.zip": zipped({f"{i}": b"" for i in range(2000)})},
        "archive_too_many_files",
        "the limit is 65536",
    ),
    "zip path upwards": ({"a.zip": zipped({"../bundle.json": b""})}, MEMBER, "'../bundle.json'"),
    "zip member without a name": ({"a.zip": zipped({"": b""})}, MEMBER, "path ''"),
    "zip symlink": ({"a.zip": zipped(FILES, kind=0o120000)}, MEMBER, "is a link"),
    "zip device": ({"a.zip": zipped(FILES, kind=0o020000)}, MEMBER, "a device"),
    "zip encrypted": ({"a.zip": with_flag(zipped(FILES), 1)}, MEMBER, "encrypted"),
    "zip by lzma": (
        {"a.zip": zipped(FILES, compression=zipfile.ZIP_LZMA)},
        MEMBER,
        "compressed in a rare way",
    ),
    "zip of two names": (
        {"a.zip": zipped(FILES).replace(b"bundle.json", b"README.mdxx", 1)},
        DAMAGED,
        "differ",
    ),
    "zip cut off": ({"a.zip": zipped(FILES)[:-5]}, DAMAGED, "plain end record"),
    "zip with a comment": ({"a.zip": zipped(FILES)[:-2] + b"\x01\0x"}, DAMAGED, "comment"),
    "zip64": (
        {"a.zip": zipped(FILES)[:-22] + b"PK\x06\x07" + bytes(16) + zipped(FILES)[-22:]},
        DAMAGED,
        "zip64",
    ),
    "zip with a wrong checksum": (
        {"a.zip": zipped(FILES, compression=zipfile.ZIP_STORED).replace(b"cgc", b"cgd")},
        DAMAGED,
        "CRC",
    ),
    "archive in an archive": ({"a.zip": zipped({"b.zip": b""})}, "file_not_allowed", "'b.zip'"),
    "archive beside files": (FILES | {"b.zip": b""}, "file_not_allowed", "'b.zip'"),
    "other archive": ({"a.tar.bz2": b""}, "file_not_allowed", "one .tar, .tar.gz or .zip"),
    "code": (FILES | {"modeling.py": b""}, "file_not_allowed", "'modeling.py'"),
    "shards": (
        {"adapter_model-00001-of-00002.safetensors": WEIGHTS},
        "file_not_allowed",
        "does not belong",
    ),
    "name with a line break": ({"a\r\nb": b""}, "file_not_allowed", "a\\r\\nb"),
    "flat path upwards": ({"../bundle.json": b""}, MEMBER, "'../bundle.json'"),
    "flat duplicate": ({"bundle.json": b"", "./bundle.json": b""}, MEMBER, "occurs twice"),
    "no file": ({}, "file_missing", "adapter_model.safetensors is missing; found none"),
    "no weights": (
        {"bundle.json": b"{}"},
        "file_missing",
        "adapter_model.safetensors is missing; found bundle.json",
    ),
    "no description": (
        {"adapter_model.safetensors": WEIGHTS},
        "file_missing",
        "bundle.json or adapter_config.json is missing",
    ),
    "two descriptions": (FILES | {"adapter_config.json": b"{}"}, "adapter_ambiguous", "leave one"),
}


@pytest.mark.parametrize(("files", "code", "says"), REFUSED.values(), ids=REFUSED)
def test_an_upload_that_is_not_an_adapter_is_refused(files, code, says):
    with pytest.raises(AdapterInvalid) as refusal:
        read_upload(files, name="a")
    assert (refusal.value.code, refusal.value.status_code) == (code, 422)
    assert says in str(refusal.value)


BOMBS = {
    "gzip": {"a.tar.gz": gzip.compress(tar(*(member(*pair) for pair in BOMB.items())))},
    "gzip, in an ignored file": {
        "a.tar.gz": gzip.compress(tar(member("README.md", bytes(50 * MIB))))
    },
    "zip": {"a.zip": zipped(BOMB)},
}


@pytest.mark.parametrize("files", BOMBS.values(), ids=BOMBS)
def test_an_archive_that_expands_too_far_is_too_large(files):
    with pytest.raises(AdapterTooLarge, match="100 times its size") as refusal:
        read_upload(files, name="a")
    assert (refusal.value.code, refusal.value.status_code) == ("upload_too_large", 413)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.PT", "Adapter_Model-1.pkl"])
@pytest.mark.parametrize("packing", ["flat", "folder", "tar", "zip"])
def test_an_adapter_that_is_a_pickle_is_refused_by_its_name(tmp_path, name, packing):
    refusal = refused_beside(tmp_path, FILES, {name: b"never opened"}, packing)
    assert repr(name) in refusal.message


@pytest.mark.parametrize("name", ["a.pt", "a.PTH", "weights.pkl", "x.npy", "x.ckpt", "model.bin"])
@pytest.mark.parametrize("packing", ["flat", "folder", "tar", "zip"])
def test_where_only_a_pickle_can_be_the_weights_it_is_refused(tmp_path, name, packing):
    others = {"bundle.json": FILES["bundle.json"]}
    refusal = refused_beside(tmp_path, others, {name: b"never opened"}, packing)
    assert repr(name) in refusal.message


@pytest.mark.parametrize("packing", ["flat", "folder", "tar", "zip"])
def test_pickles_that_training_left_beside_the_weights_are_not_opened(tmp_path, packing):
    left = dict.fromkeys(("training_args.bin", "optimizer.pt", "rng.pth"), b"never opened")
    reading = read(packings(tmp_path, FILES | left)[packing], name="a")
    assert reading.bundle.digest == DIGEST
    assert set(reading.leftovers) == left.keys()


def packings(tmp_path: Path, files: dict[str, bytes]) -> dict[str, Path | dict[str, bytes]]:
    return {
        "flat": files,
        "folder": write_files(tmp_path / "adapter", files),
        "tar": {"a.tar": tar(*(member(*pair) for pair in files.items()))},
        "zip": {"a.zip": zipped({f"x/{name}": content for name, content in files.items()})},
    }


def refused_beside(
    tmp_path: Path, files: dict[str, bytes], odd: dict[str, bytes], packing: str
) -> AdapterMediaType:
    with pytest.raises(AdapterMediaType) as refusal:
        read(packings(tmp_path, files | odd)[packing], name="a")
    assert (refusal.value.code, refusal.value.status_code) == ("pickle_rejected", 415)
    assert "safetensors" in refusal.value.message
    return refusal.value


@pytest.mark.parametrize("form", ["flat", "tar", "tar.gz", "zip"])
def test_the_limit_counts_bytes_as_they_expand(form):
    noise = os.urandom(200_000)
    files = FILES | {"README.md": noise, "bundle.json": FILES["bundle.json"] + b" " * 200_000}
    contents = [member(name, content) for name, content in files.items()]
    upload = {
        "flat": files,
        "tar": {"a.tar": tar(*contents)},
        "tar.gz": {"a.tar.gz": gzip.compress(tar(*contents))},
        "zip": {"a.zip": zipped(files)},
    }[form]
    limit = {"flat": 400_000, "tar": 400_000, "tar.gz": 300_000, "zip": 200_000}[form]
    with pytest.raises(AdapterTooLarge, match=f"the limit for this upload is {limit}") as refusal:
        read_upload(upload, name="a", max_bytes=limit)
    assert (refusal.value.code, refusal.value.status_code) == ("upload_too_large", 413)
    assert read_upload(upload, name="a", max_bytes=500_000).digest == DIGEST


@pytest.mark.parametrize("kind", ["link to a file", "link to a folder", "folder", "pipe"])
def test_a_folder_holds_regular_files_only(tmp_path, kind):
    folder = write_files(tmp_path / "adapter", FILES)
    odd = folder / "README.md"
    if kind == "folder":
        odd.mkdir()
    elif kind == "pipe":
        os.mkfifo(odd)
    else:
        odd.symlink_to(folder / "bundle.json" if kind == "link to a file" else tmp_path)
    with pytest.raises(AdapterInvalid) as refusal:
        read_adapter(folder, name="a")
    assert refusal.value.code == "file_not_allowed"
    assert "'README.md'" in str(refusal.value)


def test_a_folder_and_an_archive_on_disk_are_read_alike(tmp_path):
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(gzip.compress(packed("adapter/")))
    folder = write_files(tmp_path / "adapter", FILES)
    assert read_adapter(archive, name="a").digest == DIGEST
    assert read_adapter(folder, name="a").digest == DIGEST


def test_a_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(AdapterInvalid, match=r"missing' is neither a folder nor an archive"):
        read_adapter(tmp_path / "missing", name="a")
    with pytest.raises(AdapterInvalid) as refusal:
        read_upload({"bundle.json": tmp_path / "gone"}, name="a")
    assert refusal.value.code == "file_unreadable"
    assert "No such file" in str(refusal.value)
    assert str(tmp_path) not in str(refusal.value)


@pytest.mark.parametrize("name", ["", "../x", "A", "a/b", "a,b", "-a", ".", "a\0", "a" * 65, "ä"])
def test_the_name_of_an_adapter_is_checked_before_any_file(name):
    with pytest.raises(AdapterInvalid) as refusal:
        read_upload({"x.pkl": b""}, name=name)
    assert refusal.value.code == "name_invalid"


def test_an_archive_is_not_changed_and_nothing_is_written_beside_it(tmp_path):
    folder = tmp_path / "inbox"
    folder.mkdir()
    path = folder / "upload"
    path.write_bytes(packed())
    read_upload({"a.tar": path}, name="a")
    assert [entry.name for entry in Path(folder).iterdir()] == ["upload"]
    assert path.read_bytes() == packed()
