"""What a sequence has said so far: its distinct tokens, and how often its output has each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


class History:
    """The distinct tokens of one sequence; grows with its output, of which it reads what is new."""

    def __init__(self, prompt: Sequence[int]) -> None:
        """Begin with a prompt and no output."""
        self._tokens = np.unique(np.array(prompt, np.int64))
        self._counts = np.zeros(len(self._tokens), np.int64)
        self._places = {token: place for place, token in enumerate(self._tokens.tolist())}
        self._num_read = 0

    @property
    def tokens(self) -> Ids:
        """The distinct tokens of prompt and output."""
        return self._tokens[: len(self._places)]

    @property
    def counted(self) -> tuple[Ids, Ids]:
        """The distinct tokens of the output, and how often each is in it."""
        counts = self._counts[: len(self._places)]
        said = counts > 0
        return self.tokens[said], counts[said]

    def read(self, output: Sequence[int]) -> None:
        """Take in what has come to the output since the last call."""
        for token in output[self._num_read :]:
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._tokens):
                self._tokens = _longer(self._tokens)
                self._counts = _longer(self._counts)
            self._tokens[place] = token
            self._counts[place] += 1
        self._num_read = len(output)


def _longer(values: Ids) -> Ids:
    return np.concatenate([values, np.zeros(len(values) + 64, np.int64)])
