"""Match module paths against regular expressions that an upload brings, in bounded time.

Python's matcher cannot be stopped, so `(a|a)*b` in an `adapter_config.json` would hang whoever
reads it. The `regex` library, which transformers brings along, takes the same patterns and a time
limit.
"""

from __future__ import annotations

import time

import regex

from oneplusn.adapters.checks import shown
from oneplusn.errors import AdapterInvalid

MAX_PATTERN_CHARS = 4096
BUDGET_S = 1.0
"""Seconds for all patterns of one adapter over all modules of the base."""


class Matcher:
    """Match the patterns of one adapter, and time all of them together."""

    def __init__(self, budget_s: float = BUDGET_S) -> None:
        self._left_s = budget_s
        self._compiled: dict[str, regex.Pattern[str]] = {}

    def fullmatch(self, pattern: str, text: str) -> bool:
        """Say whether `pattern` matches all of `text`, as `re.fullmatch` would.

        Raises:
            AdapterInvalid: `pattern_not_supported` or `pattern_too_costly`.
        """
        return self._match(pattern, text, prefix="")

    def match_tail(self, pattern: str, path: str) -> bool:
        """Say whether `pattern` matches `path` or what follows one of its dots.

        Raises:
            AdapterInvalid: `pattern_not_supported` or `pattern_too_costly`.
        """
        return self._match(pattern, path, prefix=r"(?:.*\.)?")

    def _match(self, pattern: str, text: str, *, prefix: str) -> bool:
        whole = f"{prefix}(?:{pattern})"
        started = time.perf_counter()
        if whole not in self._compiled:
            self._compiled[whole] = _compile(pattern, whole)
        try:
            # A limit of zero would mean none.
            limit = max(self._left_s, 1e-6)
            found = self._compiled[whole].fullmatch(text, timeout=limit, concurrent=True)
        except TimeoutError:
            self._left_s = 0.0
        else:
            self._left_s -= time.perf_counter() - started
        if self._left_s <= 0:
            raise AdapterInvalid(
                "the patterns in adapter_config.json take too long to match against the modules;"
                " give the names of the modules instead",
                code="pattern_too_costly",
            )
        return found is not None


def _compile(pattern: str, whole: str) -> regex.Pattern[str]:
    """Compile an upload's pattern.

    Raises:
        AdapterInvalid: `pattern_not_supported`.
    """
    reason = f"it has {len(pattern)} characters"
    if len(pattern) <= MAX_PATTERN_CHARS:
        try:
            return regex.compile(whole)
        except (regex.error, RecursionError, OverflowError) as error:
            reason = str(error)
    raise AdapterInvalid(
        f"pattern {shown(pattern)}: {reason}; write a regular expression of at most"
        f" {MAX_PATTERN_CHARS} characters, or give a list of names",
        code="pattern_not_supported",
    )
