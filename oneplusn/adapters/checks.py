"""Check what every reader of foreign bytes meets: names, and JSON documents."""

from __future__ import annotations

import json
import re
from typing import TypeVar

import msgspec

from oneplusn.errors import AdapterInvalid

T = TypeVar("T")

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
"""Names of adapters, tasks, experts and methods; safe in a path, a label and a header."""

SHOWN_CHARS = 80


def shown(value: object) -> str:
    """Return a value as a message may hold it: printable ASCII, one line, short."""
    text = ascii(value[: SHOWN_CHARS + 1] if isinstance(value, str | bytes) else value)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."


def check_name(name: object, what: str) -> None:
    """Refuse a name that could not stand in a path, a metric's label or a header.

    Raises:
        AdapterInvalid: `name_invalid`.
    """
    if not isinstance(name, str) or NAME.fullmatch(name) is None:
        raise AdapterInvalid(
            f"{what} {shown(name)}: a name is 1 to 64 of a-z, 0-9, '.', '_', '-' and starts with"
            " a letter or digit; rename it",
            code="name_invalid",
        )


def decode_json(data: bytes, form: type[T], *, what: str, max_bytes: int) -> T:
    """Decode one JSON document into `form`, strictly.

    Besides what `form` demands, it refuses what parsers read differently from each other: a key
    twice in one object, bytes that are not UTF-8, NaN and infinities, text after the end.

    Raises:
        AdapterInvalid: `json_too_large`, `json_malformed`, `json_duplicate_key`, or
            `json_invalid` where the document is sound but not of this form.
    """
    if len(data) > max_bytes:
        raise AdapterInvalid(
            f"{what}: {len(data)} bytes, the limit is {max_bytes}; remove what is not needed",
            code="json_too_large",
        )
    try:
        json.loads(data.decode("utf-8"), object_pairs_hook=_refuse_duplicates)
        return msgspec.json.decode(data, type=form)
    except msgspec.ValidationError as error:
        raise AdapterInvalid(f"{what}: {error}; correct that field", code="json_invalid") from None
    except RecursionError:
        raise AdapterInvalid(
            f"{what}: nested too deeply; no field here needs more than 4 levels",
            code="json_malformed",
        ) from None
    except _DuplicateKey as error:
        raise AdapterInvalid(
            f"{what}: key {shown(error.key)} occurs twice in one object; keep one of them",
            code="json_duplicate_key",
        ) from None
    except ValueError as error:
        raise AdapterInvalid(
            f"{what}: not valid JSON ({shown(str(error))}); write it again with a JSON library",
            code="json_malformed",
        ) from None


class _DuplicateKey(Exception):
    """One object names a key twice."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> None:
    """Look at the keys of one object; the values are read by the typed decoder."""
    seen = set[str]()
    for key, _ in pairs:
        if key in seen:
            raise _DuplicateKey(key)
        seen.add(key)
