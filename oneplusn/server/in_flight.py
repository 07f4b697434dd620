"""The requests that have not ended, so that they can be ended by their ids."""

from __future__ import annotations

from typing import Protocol


class Abortable(Protocol):
    """A request in flight."""

    def abort(self) -> None:
        """End it; whoever waits for its answer is told."""


class InFlight:
    """The requests that have not ended, by their ids. Two may have the same."""

    def __init__(self) -> None:
        self._requests: dict[str, set[Abortable]] = {}

    def add(self, request_id: str, request: Abortable) -> None:
        """Note that a request has begun."""
        self._requests.setdefault(request_id, set()).add(request)

    def remove(self, request_id: str, request: Abortable) -> None:
        """Note that it has ended."""
        same = self._requests.get(request_id, set())
        same.discard(request)
        if not same:
            self._requests.pop(request_id, None)

    def ids(self) -> list[str]:
        """List the ids of the requests in flight."""
        return list(self._requests)

    def abort(self, request_id: str) -> bool:
        """End what is in flight under an id; say whether there was anything."""
        same = self._requests.get(request_id, set())
        for request in same:
            request.abort()
        return bool(same)
