"""Versions of an adapter: which one counts, the way back, and how they end."""

from __future__ import annotations

import pytest

from bundles import small_bundle
from oneplusn.adapters import registry_rows
from oneplusn.errors import AdapterConflict, AdapterExists, GenerationMismatch, UnknownTask
from registries import LETTERS, LETTERS_2, LETTERS_3, SUMS, active

DAY = 24 * 60 * 60


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
