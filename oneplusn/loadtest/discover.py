"""Ask a server what it serves and how it counts tokens, before it is loaded."""

from __future__ import annotations

from http import HTTPStatus
from types import TracebackType
from typing import Any

import httpx
import msgspec

from oneplusn.loadtest.mistake import Mistake
from oneplusn.loadtest.prompts import Count
from oneplusn.loadtest.transport import trusted

ASK_LIMIT_S = 30.0
MODELS = "/v1/models"


class _Model(msgspec.Struct):
    id: str
    parent: str | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class Inquiry:
    """Asks one server; a context manager."""

    def __init__(self, url: str, key: str | None) -> None:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        # As the load goes: past the environment's proxy, with the system's certificates.
        self._client = httpx.Client(
            base_url=url,
            headers=headers,
            timeout=ASK_LIMIT_S,
            trust_env=False,
            verify=trusted(),
        )

    def __enter__(self) -> Inquiry:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()

    def tasks(self) -> tuple[str, ...]:
        """Return the names of all tasks or adapters; of all models, if none is an adapter.

        Raises:
            Mistake: It lists none.
            httpx.HTTPError: It does not answer.
        """
        answer = self._client.get(MODELS).raise_for_status()
        try:
            listed = msgspec.json.decode(answer.content, type=_Models).data
        except msgspec.DecodeError:
            listed = []
        if not listed:
            raise Mistake(f"{MODELS} lists no model; name one with --model")
        adapters = [model.id for model in listed if model.parent]
        return tuple(adapters or [model.id for model in listed])

    def count(self, model: str) -> Count | None:
        """Return how the server counts the tokens of a text; None if it does not tell."""

        def count(text: str) -> int:
            body = {"model": model, "prompt": text}
            answer = self._client.post("/tokenize", json=body).raise_for_status().json()
            return len(answer["tokens"])

        try:
            count("a")
        except (httpx.HTTPStatusError, ValueError, KeyError, TypeError):
            return None
        return count

    def description(self) -> dict[str, Any]:
        """Return what the server tells of itself under `/version`, empty if nothing."""
        try:
            answer = self._client.get("/version")
            found = answer.json() if answer.status_code == HTTPStatus.OK else None
        except (httpx.HTTPError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}
