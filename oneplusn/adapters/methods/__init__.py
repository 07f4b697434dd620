"""Trainable methods: how the experts of a cluster are laid out and how their gates are made.

One file a method, one interface (`oneplusn.adapters.methods.base.Method`): parameters of one site
-> gate rows. What the server loads is always the result: experts and static gate rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from oneplusn.adapters.checks import shown
from oneplusn.adapters.methods.base import Method
from oneplusn.adapters.methods.cgc import CgcLora
from oneplusn.adapters.methods.cpoly import CPoly
from oneplusn.adapters.methods.lora import LoraPerTask, SharedLora
from oneplusn.adapters.methods.moelora import MoeLora
from oneplusn.adapters.methods.poly import Mhr, Poly
from oneplusn.adapters.methods.settings import declared
from oneplusn.errors import InvalidRequest

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (CgcLora, CPoly, MoeLora, Poly, Mhr, LoraPerTask, SharedLora)
}

__all__ = [
    "METHODS",
    "CPoly",
    "CgcLora",
    "LoraPerTask",
    "Method",
    "Mhr",
    "MoeLora",
    "Poly",
    "SharedLora",
    "make_method",
]


def make_method(name: str, tasks: Sequence[str], settings: Mapping[str, object]) -> Method:
    """Make a method by its name.

    Args:
        name: one of `METHODS`.
        tasks: names of the cluster's tasks.
        settings: fields of the method; those left out keep their defaults.

    Raises:
        InvalidRequest: an unknown method or field, or a value that is not allowed.
    """
    cls = METHODS.get(name) if isinstance(name, str) else None
    if cls is None:
        raise InvalidRequest(
            f"method {shown(name)} is unknown; known: {', '.join(METHODS)}", param="method"
        )
    known = declared(cls)
    for field in settings:
        if field not in known:
            raise InvalidRequest(
                f"{name} has no setting {shown(field)}; it has {', '.join(known)}",
                param=str(field),
            )
    fields: dict[str, Any] = dict(settings)
    return cls(tuple(tasks), **fields)
