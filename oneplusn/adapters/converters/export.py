"""What is asked of a writer: one task of a bundle, in a foreign form, in a new folder."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from oneplusn.adapters.bundle import Bundle
from oneplusn.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """One task to be written.

    Attributes:
        bundle: where the task is.
        task: its name.
        out: the folder that it becomes.
        svd: largest rank at any module, cut by singular values; None keeps all of it.
        model: folder of the base model.
        lax: accept another base than the one it was trained on, and modules that it lacks.
        shard_size: most bytes of one file of weights, as transformers spells it.
    """

    bundle: Bundle
    task: str
    out: Path
    svd: int | None = None
    model: Path | None = None
    lax: bool = False
    shard_size: str = "5GB"

    def refuse(self, *names: str, format_name: str) -> None:
        """Refuse settings that a writer has no use for, where they differ from their defaults.

        Raises:
            InvalidRequest: one was given.
        """
        for field in fields(self):
            if field.name in names and getattr(self, field.name) != field.default:
                raise InvalidRequest(
                    f"{field.name} = {getattr(self, field.name)} is nothing that writing"
                    f" {format_name!r} can use; leave it out",
                    param=field.name,
                )
