"""Serve many fine-tuned tasks from one resident base model, in one mixed batch.

The Python interface is `Engine`:

    import oneplusn

    engine = oneplusn.Engine("demo")
    engine.generate(["Hello", "Hallo"], tasks=["news", None])

It is imported on first use, so that `import oneplusn` alone loads neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oneplusn.server.engine.llm import Engine

__all__ = ["Engine", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:  # noqa: ANN401  (the protocol of PEP 562)
    """Import `Engine` when it is first asked for.

    Raises:
        AttributeError: For any other name.
    """
    if name != "Engine":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from oneplusn.server.engine.llm import Engine

    return Engine
