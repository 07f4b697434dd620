"""Fields of a method that a user sets: what each means, and which values it takes.

Meaning and rule stand beside the default, so the check, the message and the help text cannot
differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from oneplusn.adapters.checks import shown
from oneplusn.errors import InvalidRequest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MEANING = "meaning"
RULE = "rule"


@dataclass(frozen=True, slots=True)
class Rule:
    """What a value must be.

    Attributes:
        expects: completes the sentence "it is ...".
        holds: tells whether a value keeps the rule.
    """

    expects: str
    holds: Callable[[object], bool]

    def or_none(self, meaning: str) -> Rule:
        """Allow None as well, which means `meaning`."""
        return Rule(f"{self.expects}, or null for {meaning}", lambda v: v is None or self.holds(v))


def whole(low: int, high: int) -> Rule:
    """Allow integers from low to high."""
    return Rule(
        f"a whole number from {low} to {high}",
        lambda value: isinstance(value, int) and not _is_bool(value) and low <= value <= high,
    )


def number(above: float, below: float) -> Rule:
    """Allow finite numbers between two bounds, the bounds left out."""
    return Rule(
        f"a number above {above:g} and below {below:g}",
        lambda value: (
            isinstance(value, int | float)
            and not _is_bool(value)
            and math.isfinite(value)
            and above < value < below
        ),
    )


def share() -> Rule:
    """Allow 0 to 1, the 1 left out."""
    return Rule(
        "a number from 0 up to, but not, 1",
        lambda value: isinstance(value, int | float) and not _is_bool(value) and 0 <= value < 1,
    )


def one_of(*values: str) -> Rule:
    """Allow some words."""
    return Rule(
        f"one of {', '.join(values)}", lambda value: isinstance(value, str) and value in values
    )


def flag() -> Rule:
    """Allow true and false."""
    return Rule("true or false", _is_bool)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def setting(default: object, meaning: str, rule: Rule | None = None) -> Any:  # noqa: ANN401 - as dataclasses.field
    """Declare a field with its default, what it means, and the rule that its values keep."""
    return field(default=default, metadata={MEANING: meaning, RULE: rule})


def declared(cls: type[DataclassInstance]) -> Mapping[str, Field[Any]]:
    """Return the fields of a class that were declared by `setting`, by name."""
    return {entry.name: entry for entry in fields(cls) if MEANING in entry.metadata}


def check(instance: DataclassInstance, owner: str) -> None:
    """Check every setting of an instance.

    Raises:
        InvalidRequest: a value that does not keep its rule.
    """
    for name, entry in declared(type(instance)).items():
        rule: Rule | None = entry.metadata[RULE]
        value = getattr(instance, name)
        if rule is not None and not rule.holds(value):
            raise InvalidRequest(
                f"{owner}: {name} is {shown(value)}; it is {rule.expects}", param=name
            )
