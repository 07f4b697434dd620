"""Text to tokens, chats to tokens, and tokens back to text as they come. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from oneplusn.errors import ConfigError, InvalidRequest

# A noncharacter: Unicode keeps it for use inside a program, so no text needs it.
GUARD = "\ufdd0"


class Tokenizer:
    """Tokenizer and chat template of a model folder.

    What a user types never becomes a special token. Where the text spells one, GUARD is put after
    its first character; the backend knows GUARD as a token of its own, so what stands on its two
    sides is encoded apart, as plain text, and GUARD's id is dropped from the result. The special
    tokens that the chat template or the post-processor writes hold no GUARD. In a chat this goes
    for the beginning of a special token at the end of a string as well, because a template may
    put another user's string right behind it.

    A special token of a single character has no inside; no model in use has one.

    Safe to use from several threads.

    Attributes:
        backend: The fast tokenizer underneath.
        vocab_size: Tokens that it knows, GUARD not counted.
    """

    def __init__(self, folder: Path | str) -> None:
        """Load `tokenizer.json` with its configuration and chat template.

        Raises:
            ConfigError: The folder has no `tokenizer.json`, or its ids leave none for GUARD.
        """
        if not (Path(folder) / "tokenizer.json").is_file():
            msg = f"{folder} has no tokenizer.json; save the model's fast tokenizer there"
            raise ConfigError(msg)
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        self.backend: Backend = self._tokenizer.backend_tokenizer
        self.vocab_size: int = self.backend.get_vocab_size()
        self.backend.no_truncation()  # some files carry one; a prompt is never cut silently
        self.backend.no_padding()
        added = self.backend.get_added_tokens_decoder().values()
        special = [token.content for token in added if token.special]
        self._special_ids = {self.backend.token_to_id(token) for token in special}
        self._spelled = _spelled(special)
        self._begun = {token[:end] for token in special for end in range(1, len(token))}
        self._longest = max(map(len, special), default=0)
        vocab = self.backend.get_vocab()
        self._widest = max(map(len, vocab), default=1)
        ids = set(vocab.values())
        self.backend.add_special_tokens([AddedToken(GUARD, special=True, normalized=False)])
        self._guard_id: int = self.backend.token_to_id(GUARD)
        if self._guard_id in ids:
            msg = (
                f"{folder}: {len(ids)} tokens have ids up to {max(ids)}, so the id after them is "
                f"taken; renumber them without holes"
            )
            raise ConfigError(msg)

    @property
    def chat_template(self) -> str | None:
        """The template of a conversation; None where there is none."""
        template = self._tokenizer.chat_template
        return template if isinstance(template, str) else None

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` works."""
        return self._tokenizer.chat_template is not None

    def least_tokens(self, text: str) -> int:
        """Return how many tokens a text has at least, without encoding it."""
        return len(text) // self._widest

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Encode a prompt; `add_special` with what the model's post-processor adds to it."""
        encoded = self.backend.encode(self._guard_text(text), add_special_tokens=add_special)
        return self._without_guards(encoded.ids)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        switches: Mapping[str, bool] | None = None,
    ) -> list[int]:
        """Encode a conversation by the model's chat template, ready for the next answer.

        Args:
            messages: OpenAI's messages, oldest first.
            tools: OpenAI's tool descriptions, for templates that show them.
            switches: Further variables of the template.

        Raises:
            InvalidRequest: The model has no template, or the template rejects the messages.
        """
        if not self.has_chat_template:
            msg = "this model has no chat template; send a plain prompt to /v1/completions"
            raise InvalidRequest(msg, param="messages")
        try:
            text = self._tokenizer.apply_chat_template(
                self._guard(messages),
                tools=self._guard(tools),
                tokenize=False,
                add_generation_prompt=True,
                **(switches or {}),
            )
        except (TemplateError, TypeError, ValueError) as error:
            msg = f"the chat template rejects the messages: {error}"
            raise InvalidRequest(msg, param="messages") from error
        return self._without_guards(self.backend.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Decode tokens, special ones left out unless they are asked for."""
        text: str = self.backend.decode(token_ids, skip_special_tokens=skip_special)
        return text

    def is_special(self, token_id: int) -> bool:
        """Say whether a token is a mark rather than text."""
        return token_id in self._special_ids

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """Spell tokens as the vocabulary does; ids that it does not know are empty."""
        return [self.backend.id_to_token(token_id) or "" for token_id in token_ids]

    def _guard(self, value: Any) -> Any:  # noqa: ANN401  (any JSON value)
        """Copy a JSON value, with GUARD in every string that could make a special token."""
        if isinstance(value, str):
            return self._guard_end(self._guard_text(value))
        if isinstance(value, Mapping):
            return {self._guard(key): self._guard(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._guard(item) for item in value]
        return value

    def _guard_text(self, text: str) -> str:
        """Put GUARD into every special token that the text spells."""
        return self._spelled.sub(rf"\g<0>{GUARD}", text.replace(GUARD, ""))

    def _guard_end(self, text: str) -> str:
        """Put GUARD into the beginning of a special token that the text ends with.

        One GUARD in the shortest is enough, as it is part of the longer ones. Space may follow: a
        template that strips it would bring the parts together.
        """
        end = len(text.rstrip())
        for start in range(end - 1, max(0, end - self._longest) - 1, -1):
            if text[start:end] in self._begun:
                return f"{text[: start + 1]}{GUARD}{text[start + 1 :]}"
        return text

    def _without_guards(self, token_ids: list[int]) -> list[int]:
        return [token_id for token_id in token_ids if token_id != self._guard_id]


def _spelled(tokens: Iterable[str]) -> re.Pattern[str]:
    """Match the first character of each token where the rest follows."""
    rests: dict[str, list[str]] = {}
    for token in tokens:
        rests.setdefault(token[0], []).append(re.escape(token[1:]))
    # Grouped by first character, so that text full of it is not tried against every token.
    parts = (f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items())
    return re.compile("|".join(parts) or "(?!)")


class TextStream:
    """Text of one answer, given out token by token and cut at the first stop string.

    Text is held back while it may be the beginning of a stop string, and tokens while they end in
    the middle of a character. The pieces given out add up to the decoded tokens, cut where the
    first stop string to be completed begins; how the text is split into tokens does not matter.

    `tokenizers` has a `DecodeStream` for this. It fails for good when a model with byte tokens
    emits bytes that are no UTF-8, which any model may.

    Attributes:
        stopped_by: The stop string that ended the answer, if one did.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        skip_special: bool = True,
    ) -> None:
        """Start an empty answer.

        Args:
            tokenizer: Decodes the tokens.
            stop: Strings that end the answer, none of them empty.
            include_stop: Give out the stop string as well.
            skip_special: Leave special tokens out.

        Raises:
            InvalidRequest: A stop string is empty.
        """
        if "" in stop:
            msg = "stop holds an empty string, which every answer would end at; leave it out"
            raise InvalidRequest(msg, param="stop")
        self.stopped_by: str | None = None
        self._given: list[str] = []
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._skip_special = skip_special
        self._held = ""
        # The last tokens that made text, for the spaces of the next ones, and those since.
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []

    @property
    def text(self) -> str:
        """All text given out so far."""
        # In one piece again, so that asking now and then stays cheap.
        self._given = ["".join(self._given)]
        return self._given[0]

    @property
    def finished(self) -> bool:
        """Whether a stop string ended the answer; later tokens are ignored."""
        return self.stopped_by is not None

    def push(self, token_id: int) -> str:
        """Take a token and return the text that is now certain, often none."""
        if self.finished:
            return ""
        self._pending.append(token_id)
        text = self._decode_pending()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._context, self._pending = self._pending, []
        self._context_text = self._decode(self._context)
        return self._give(text)

    def flush(self) -> str:
        """Return the text held back, when no more tokens will come."""
        if self.finished:
            return ""
        given = self._give(self._decode_pending())
        self._pending = []
        if self.finished:
            return given
        rest, self._held = self._held, ""
        self._given.append(rest)
        return given + rest

    def _decode_pending(self) -> str:
        """Decode the pending tokens as they read after the context."""
        text = self._decode(self._context + self._pending)
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        # Byte tokens that are no UTF-8 turn the valid ones before them into replacements, too.
        return self._decode(self._pending)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special=self._skip_special)

    def _give(self, text: str) -> str:
        """Append decoded text; return what of it is certain, up to a stop string."""
        if not self._stop:
            self._given.append(text)
            return text
        text = self._held + text
        end, stop = self._first_stop(text)
        if stop:
            self.stopped_by = stop
            end = end if self._include_stop else end - len(stop)
        else:
            end = len(text) - self._stop_begun_at_end(text)
        self._held = text[end:]
        self._given.append(text[:end])
        return text[:end]

    def _first_stop(self, text: str) -> tuple[int, str]:
        """Find the stop string that ends first, the longest of those; (0, "") if there is none."""
        found = [(text.find(stop) + len(stop), stop) for stop in self._stop if stop in text]
        return min(found, key=lambda hit: (hit[0], -len(hit[1])), default=(0, ""))

    def _stop_begun_at_end(self, text: str) -> int:
        """Count the last characters of `text` that may be the beginning of a stop string."""
        longest = min(len(text), max(map(len, self._stop), default=1) - 1)
        return next(
            (
                length
                for length in range(longest, 0, -1)
                if any(stop.startswith(text[-length:]) for stop in self._stop)
            ),
            0,
        )
