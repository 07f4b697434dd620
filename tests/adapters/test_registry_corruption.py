"""Content that was damaged: what it takes out of service, and how it comes back."""

from __future__ import annotations

import pytest

from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.registry import Registry
from oneplusn.errors import AdapterCorrupt
from registries import LETTERS, LETTERS_2, SUMS


def spoil(registry: Registry, bundle: Bundle) -> None:
    path = registry.blob(bundle.digest) / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_damaged_blob_takes_its_adapter_out_and_no_other(registry, publish, tmp_path) -> None:
    publish(LETTERS)
    publish(SUMS, "sums")
    registry.verify(LETTERS.digest)
    spoil(registry, LETTERS)

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


def test_another_version_of_it_can_be_activated(registry, publish) -> None:
    publish(LETTERS)
    publish(LETTERS_2)
    registry.quarantine(LETTERS_2.digest, "a bit flipped")
    with pytest.raises(AdapterCorrupt):
        registry.activate("letters", 2)
    assert registry.rollback("letters").number == 1
    assert registry.resolve("vowels").number == 1


def test_it_stays_out_after_a_restart(registry, publish, tmp_path) -> None:
    publish(LETTERS)
    registry.quarantine(LETTERS.digest, "a bit flipped")
    registry.close()
    again = Registry(tmp_path / "data", base_name="base")
    with pytest.raises(AdapterCorrupt, match="a bit flipped"):
        again.resolve("vowels")
    again.close()


def test_the_same_content_again_makes_it_whole(registry, publish) -> None:
    publish(LETTERS)
    publish(LETTERS, "twin", activate=False)
    spoil(registry, LETTERS)
    with pytest.raises(AdapterCorrupt):
        registry.verify(LETTERS.digest)

    version, new = publish(LETTERS)

    assert (version.number, new, version.corrupt) == (1, False, None)
    registry.verify(LETTERS.digest)
    assert registry.resolve("vowels") == version
    assert registry.version("twin", 1).corrupt is None


def test_a_blob_that_is_gone_is_found_when_the_folder_is_opened(
    registry, publish, tmp_path
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
