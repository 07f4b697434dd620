"""Say which modules a PEFT configuration adapts, by PEFT's own rules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from oneplusn.adapters.converters.patterns import Matcher
from oneplusn.errors import AdapterInvalid


class TargetFields(msgspec.Struct, frozen=True, kw_only=True):
    """The options that say which modules are adapted, and of which base."""

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    base_model_name_or_path: str | None = None


class Targets:
    """The modules that one configuration adapts."""

    def __init__(self, fields: TargetFields, matcher: Matcher) -> None:
        """Keep the options; `matcher` bounds the work of all patterns of one adapter."""
        self._fields = fields
        self._matcher = matcher

    def __contains__(self, path: str) -> bool:
        """Say whether a module is adapted."""
        fields = self._fields
        if fields.exclude_modules and self._is_named(fields.exclude_modules, path):
            return False
        names = fields.target_modules
        if names is None or (isinstance(names, str) and names.lower() == "all-linear"):
            return True
        if not self._is_named(names, path):
            return False
        layers = fields.layers_to_transform
        if isinstance(names, str) or path in names or layers in (None, []):
            return True
        return self._layer(path) in ([layers] if isinstance(layers, int) else layers or [])

    def check(self, paths: Iterable[str]) -> None:
        """Refuse modules that have tensors and are not adapted: PEFT would drop them silently.

        Raises:
            AdapterInvalid: `config_mismatch`.
        """
        for path in paths:
            if path not in self:
                raise mismatch(f"there are tensors for {path}, which the configuration leaves out")

    def _is_named(self, names: list[str] | str, path: str) -> bool:
        if isinstance(names, str):
            return self._matcher.fullmatch(names, path)
        return any(path == name or path.endswith(f".{name}") for name in names)

    def _layer(self, path: str) -> int | None:
        """Return the first index in the path, or the first below a list that is configured."""
        patterns = self._fields.layers_pattern or []
        patterns = [patterns] if isinstance(patterns, str) else patterns
        for parent, index in _indices(path):
            named = any(self._matcher.match_tail(pattern, parent) for pattern in patterns)
            if named or (not patterns and "." in parent):
                return index
        return None


def mismatch(fault: str) -> AdapterInvalid:
    """Return the error that refuses a configuration and tensors which disagree."""
    return AdapterInvalid(
        f"{fault}; adapter_config.json and the tensors must come from the same training",
        code="config_mismatch",
    )


def _indices(path: str) -> Iterator[tuple[str, int]]:
    """Yield every index in a path that has something after it, with the path before it."""
    parts = path.split(".")
    for place, part in enumerate(parts[:-1]):
        if part.isdigit():
            yield ".".join(parts[:place]), int(part)
