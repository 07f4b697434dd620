"""Trainable methods: how the experts of a cluster are laid out and how their gates are made.

One file a method, one interface (`oneplusn.adapters.methods.base.Method`): parameters of one site
-> gate rows. What the server loads is always the result: experts and static gate rows.
"""

from __future__ import annotations

from oneplusn.adapters.methods.base import Method
from oneplusn.adapters.methods.cgc import CgcLora
from oneplusn.adapters.methods.cpoly import CPoly
from oneplusn.adapters.methods.lora import LoraPerTask

METHODS: dict[str, type[Method]] = {method.name: method for method in (CgcLora, CPoly, LoraPerTask)}

__all__ = ["METHODS", "CPoly", "CgcLora", "LoraPerTask", "Method"]
