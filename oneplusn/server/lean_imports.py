"""Import the engine without what transformers brings along and serving never uses.

transformers imports `torch._dynamo` for decorators of functions that we never compile, and with it
sympy, inductor and FSDP; and, where they are installed, scipy for losses and PIL for images. Of the
445 MB and 5 s that the imports of an engine took, these were 170 MB and 2.7 s. Only a process that
is nothing but an engine does this: what is hidden here is hidden from all of it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

UNUSED = ("scipy", "PIL", "torchvision")
"""Packages that transformers does without where they are not installed."""
COMPILER = "torch._dynamo"
_STUBS = (COMPILER, f"{COMPILER}._trace_wrapped_higher_order_op")
_log = logging.getLogger("oneplusn.engine")


def import_lean(*modules: str) -> None:
    """Import modules, and what they import of transformers, without the rest.

    Where that fails, as it may with another version of transformers, they are imported whole.
    Afterwards everything that was hidden can be imported, but torch goes on saying that it was
    built without `torch.distributed`: transformers believed that when it was imported.
    """
    import torch.distributed

    is_available = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        with _hidden():
            for name in modules:
                import_module(name)
    except Exception as error:
        # Whatever an import runs into, the whole libraries are the way out.
        _log.warning("transformers is imported whole, which takes longer: %r", error)
        torch.distributed.is_available = is_available
        _forget("transformers", *modules)
        for name in modules:
            import_module(name)


@contextmanager
def _hidden() -> Iterator[None]:
    """Have imports find nothing of the unused packages, and stubs of the compiler."""
    absent = [name for name in UNUSED if name not in sys.modules]
    stubbed = _STUBS if COMPILER not in sys.modules else ()
    sys.modules.update({name: _Stub(name) for name in stubbed})
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None: not to be found
    try:
        yield
    finally:
        _forget(*absent, *stubbed)


def _forget(*packages: str) -> None:
    """Have the next import of packages begin anew."""
    for name in list(sys.modules):
        if name in packages or name.startswith(tuple(f"{each}." for each in packages)):
            del sys.modules[name]


class _Stub(ModuleType):
    """Stands for a module of the compiler while others are imported."""

    __path__: list[str] = []  # noqa: RUF012 - what the import system reads of a package

    def __getattr__(self, name: str) -> _Later:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Later(self, name)


class _Later:
    """Stands for a function or class of the compiler.

    As a decorator, during the imports, it decorates nothing; afterwards a call imports the real
    one. Anything else raises, and so ends the imports.
    """

    __slots__ = ("_name", "_stub")

    def __init__(self, stub: _Stub, name: str) -> None:
        self._stub = stub
        self._name = name

    def __call__(self, *args: object, **options: object) -> object:
        module = self._stub.__name__
        if sys.modules.get(module) is not self._stub:
            return getattr(import_module(module), self._name)(*args, **options)
        return args[0] if args and callable(args[0]) else _decorate_nothing


def _decorate_nothing(function: Callable[..., object]) -> Callable[..., object]:
    return function
