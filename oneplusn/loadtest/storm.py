"""Check answers given while an adapter is replaced: each is wholly of the version it names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle

from oneplusn.loadtest.churn import Package, Swap
from oneplusn.loadtest.drive import Record
from oneplusn.loadtest.stream import Answer
from oneplusn.loadtest.workload import Planned

WORD = re.compile(r"t\d+")
LOW_BITS = 0x7F
"""The mantissa of a bfloat16: changing it changes a weight by less than half."""


@dataclass(slots=True)
class Ledger:
    """Which word each version says.

    Attributes:
        fixed: Adapter -> its word, for those with one version.
        versions: Version label -> its word, for those that are replaced.
    """

    fixed: Mapping[str, str]
    versions: dict[str, str] = field(default_factory=dict)

    def learn(self, swaps: Iterable[Swap], words: Mapping[str, str]) -> None:
        """Take from the answers to uploads which label has which content; `words` is by content."""
        for swap in swaps:
            if swap.version is not None:
                self.versions[swap.version] = words[swap.content]

    def faults(self, planned: Planned, answer: Answer) -> Iterator[str]:
        """Yield what is wrong with an answer, nothing if it is whole."""
        if len(answer.versions) != 1:
            yield f"{planned.task}: the answer names {len(answer.versions)} versions, not one"
            return
        (label,) = answer.versions
        if label.rpartition("@")[0] != planned.task:
            yield f"{planned.task}: the answer is of {label}"
            return
        expected = self.fixed.get(planned.task) or self.versions.get(label)
        if expected is None:
            yield f"{label}: no upload was answered with this version"
            return
        if answer.cached_tokens:
            yield f"{label}: {answer.cached_tokens} prompt tokens came from the cache, not computed"
        said = WORD.findall(answer.text)
        if strange := sorted({word for word in said if word != expected}):
            first = said.index(next(word for word in said if word != expected))
            words = ", ".join(strange)
            yield f"{label}: says {words} from token {first + 1} on, {expected} is its word"
        if len(said) != planned.output_tokens or answer.tokens != planned.output_tokens:
            yield f"{label}: {len(said)} tokens, {planned.output_tokens} were asked for"

    def check(self, records: Iterable[Record]) -> list[str]:
        """Return what is wrong with the answers of a load, and which requests have none."""
        found = list[str]()
        for record in records:
            if record.answer is not None:
                found += self.faults(record.planned, record.answer)
            else:
                found.append(f"{record.planned.task}: {record.failure or 'no answer'}")
        return found


def vary(package: Package, index: int) -> None:
    """Give a package a content that was never sent, but says the same: a few bits of two weights.

    It happens in place, so that nothing is copied while a load runs.

    Args:
        package: Its last file are weights in safetensors, whose last tensor is bfloat16.
        index: Up to 2 ** 14 give different contents.
    """
    end = len(package.body) - len(package.closing)
    for place, bits in ((end - 4, index >> 7), (end - 2, index)):
        package.body[place] = package.body[place] & ~LOW_BITS | bits & LOW_BITS


def new_versions(packages: Sequence[Package]) -> Iterator[Package]:
    """Yield packages in turn without end, each time with a new content."""
    for index, package in enumerate(cycle(packages)):
        vary(package, index)
        yield package
