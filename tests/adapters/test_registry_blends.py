"""Blends that are saved under a name."""

from __future__ import annotations

import pytest

from oneplusn.adapters.refs import TaskRef
from oneplusn.errors import AdapterExists, AdapterInvalid, AdapterNotFound, UnknownTask
from registries import LETTERS, LETTERS_2, SUMS


def test_a_blend_has_a_name_and_means_its_tasks(registry, publish) -> None:
    publish(LETTERS)
    publish(SUMS, "sums")
    blend = registry.save_blend("mix", {"upper": 0.7, "add": -0.3})
    assert registry.blends() == [blend]
    assert [(part.version.label, part.ref) for part in registry.parts("mix", 2.0)] == [
        ("letters@1", TaskRef(LETTERS.digest, "upper", 1.4)),
        ("sums@1", TaskRef(SUMS.digest, "add", -0.6)),
    ]


def test_a_task_is_a_blend_of_one(registry, publish) -> None:
    publish(LETTERS)
    assert [part.ref for part in registry.parts("upper", 0.5)] == [
        TaskRef(LETTERS.digest, "upper", 0.5)
    ]


def test_it_follows_its_tasks(registry, publish) -> None:
    publish(LETTERS)
    registry.save_blend("mix", {"vowels": 1.0, "upper": 1.0})
    publish(LETTERS_2)
    with pytest.raises(UnknownTask, match="'upper'"):
        registry.parts("mix")
    registry.rollback("letters")
    assert len(registry.parts("mix")) == 2


def test_saving_again_changes_the_weights(registry, publish) -> None:
    publish(LETTERS)
    registry.save_blend("mix", {"vowels": 1.0})
    registry.save_blend("mix", {"upper": 2.0})
    assert [blend.weights for blend in registry.blends()] == [{"upper": 2.0}]


def test_names_are_taken_both_ways(registry, publish) -> None:
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


def test_its_parts_are_tasks(registry, publish) -> None:
    publish(LETTERS)
    registry.save_blend("mix", {"upper": 1.0})
    for part in ("nope", "base", "mix"):
        with pytest.raises(UnknownTask):
            registry.save_blend("more", {part: 1.0})


def test_an_unknown_one_cannot_be_deleted(registry) -> None:
    with pytest.raises(AdapterNotFound):
        registry.delete_blend("mix")
