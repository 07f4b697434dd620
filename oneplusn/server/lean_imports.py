"""Build an engine without importing what transformers brings along and serving never uses.

transformers imports `torch._dynamo` for decorators of functions that we never compile, torch itself
does to make a model without memory, and with it come sympy, inductor, FSDP and Triton; and, where
they are installed, scipy for losses and PIL for images. That was 250 MB of an engine of 1,000, and
3 of the 8 s that it took to start. Only a process that is nothing but an engine may do this: what
is hidden here is hidden from all of it.
"""

from __future__ import annotations

import logging
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import TypeVar

from oneplusn.errors import OneplusnError

UNUSED = ("scipy", "PIL", "torchvision")
"""Packages that transformers does without where they are not installed."""
_INDEXING = "torch._dynamo._trace_wrapped_higher_order_op"

T = TypeVar("T")
_log = logging.getLogger("oneplusn.engine")


def build_lean(build: Callable[[], T]) -> T:
    """Call what imports and builds, with the compiler and the unused packages out of its sight.

    Where that fails, as it may with another version of torch or transformers, it is called once
    more with everything in place. Afterwards all of it can be imported; but torch goes on saying
    that it was built without `torch.distributed`, as transformers has believed it.

    Raises:
        OneplusnError: What it raises itself.
    """
    import torch.distributed

    torch.distributed.is_available = lambda: False
    try:
        with _hidden():
            return build()
    except OneplusnError:
        raise
    except Exception as error:
        # Whatever it ran into, the whole libraries are the way out.
        _log.warning("the engine is built anew, with all of transformers: %r", error)
    return build()


@contextmanager
def _hidden() -> Iterator[None]:
    """Have imports find nothing of the unused packages, and stand-ins for the compiler."""
    absent = [name for name in UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None: not to be found
    for name, attributes in STAND_INS.items():
        if name not in sys.modules:
            sys.modules[name] = _StandIn(name, attributes)
    try:
        yield
    finally:
        for name in absent:
            sys.modules.pop(name, None)
        _show_compiler()


def _show_compiler() -> None:
    """Have the next import of the compiler find the real one."""
    for name in STAND_INS:
        if isinstance(sys.modules.get(name), _StandIn):
            del sys.modules[name]


class _StandIn(ModuleType):
    """A module of the compiler, as far as it is needed where nothing is compiled."""

    def __init__(self, name: str, attributes: Mapping[str, object]) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        vars(self).update(attributes)


def _decorate_nothing(function: object = None, *_: object, **__: object) -> object:
    return _decorate_nothing if function is None else function


def _index_by_tensors() -> object:
    """Make the real context manager, which is needed at once."""
    _show_compiler()
    made: object = import_module(_INDEXING).TransformGetItemToIndex()
    return made


STAND_INS: Mapping[str, Mapping[str, object]] = {
    "torch._dynamo": {
        "disable": _decorate_nothing,
        "assume_constant_result": _decorate_nothing,
        "allow_in_graph": _decorate_nothing,
    },
    _INDEXING: {"TransformGetItemToIndex": _index_by_tensors},
    # Without a compiler no size is a symbol, so every question about sizes has its answer.
    "torch.fx.experimental.symbolic_shapes": {
        **dict.fromkeys(("expect_true", "guard_or_false", "guard_or_true"), bool),
        **dict.fromkeys(("guard_size_oblivious", "statically_known_true"), bool),
        "guarding_hint_or_throw": lambda size: size,
        "has_guarding_hint": lambda _: True,
        "is_nested_int": lambda _: False,
        "sym_and": lambda *facts: all(facts),
        "sym_eq": operator.eq,
        "sym_or": lambda *facts: any(facts),
    },
    "sympy": {"Basic": type("Basic", (), {})},
}
"""Modules and what stands in for them; whatever else is asked of them ends the attempt."""
