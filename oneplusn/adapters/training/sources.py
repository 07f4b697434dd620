"""Read the examples that a configuration names: JSONL files, and data sets of Hugging Face."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from oneplusn.adapters.checks import shown
from oneplusn.adapters.training.config import Source
from oneplusn.adapters.training.data import Example, make_example, read_jsonl
from oneplusn.errors import InvalidRequest

SAVED = ("dataset_info.json", "dataset_dict.json")
"""What `save_to_disk` leaves in a folder."""


def read_sources(sources: Sequence[Source]) -> list[Example]:
    """Read all examples of some sources, in their order.

    Raises:
        InvalidRequest: a source that cannot be read, or a row that is no example.
    """
    return [example for source in sources for example in _read(source)]


def _read(source: Source) -> Iterable[Example]:
    if source.path is not None and not (source.task or source.columns):
        try:
            return read_jsonl(source.path)
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"{source.path} cannot be read: {error}") from error
    rows, name = _rows(source)
    return [
        make_example(_renamed(row, source), f"{name}, row {number}")
        for number, row in enumerate(rows)
    ]


def _rows(source: Source) -> tuple[Iterable[Any], str]:
    import datasets

    try:
        if source.path is not None:
            files = str(source.path)
            return datasets.load_dataset("json", data_files=files, split="train"), source.path.name
        name = str(source.dataset)
        if any((Path(name) / file).is_file() for file in SAVED):
            return _saved(datasets.load_from_disk(name), source), name
        return datasets.load_dataset(name, source.config, split=source.split), name
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        where = source.path or source.dataset
        raise InvalidRequest(f"the data of {shown(str(where))} cannot be read: {error}") from error


def _saved(found: Any, source: Source) -> Iterable[Any]:  # noqa: ANN401 - datasets has both forms
    if not isinstance(found, Mapping):
        rows: Iterable[Any] = found
        return rows
    if source.split not in found:
        known = ", ".join(map(str, found))
        message = f"{source.dataset} has no split {shown(source.split)}; it has {known}"
        raise InvalidRequest(message)
    split: Iterable[Any] = found[source.split]
    return split


def _renamed(row: object, source: Source) -> object:
    """Give a row the names that an example has."""
    if not isinstance(row, Mapping):
        return row
    names = {name: source.columns.get(name, name) for name in ("task", "prompt", "completion")}
    if "messages" in source.columns or "messages" in row:
        names["messages"] = source.columns.get("messages", "messages")
    fields = {name: row.get(column) for name, column in names.items()}
    return fields if source.task is None else {**fields, "task": source.task}
