from __future__ import annotations

import random
from pathlib import Path

import pytest

from oneplusn.loadtest.mistake import Mistake
from oneplusn.loadtest.prompts import (
    POOL_WORDS,
    VOCABULARY,
    Line,
    Vocabulary,
    Words,
    read_lines,
)


def count_words(text: str) -> int:
    return 1 + len(text.split())  # a token that begins every text, and one a word


def count_pieces(text: str) -> int:
    return sum(-(-len(word) // 3) for word in text.split())


def count_bytes(text: str) -> int:
    return len(text)


def known_words(count, rng: random.Random) -> Words:
    known = Vocabulary() if count is None else Vocabulary.counted(count)
    return Words(known.costs, known.overhead, rng)


@pytest.mark.parametrize("count", [count_words, count_pieces, count_bytes])
@pytest.mark.parametrize("tokens", [24, 128, 1000])
def test_texts_have_the_tokens_that_were_asked_for(count, tokens: int) -> None:
    words = known_words(count, random.Random(0))

    lengths = {count(words.text(tokens, random.Random(seed))) for seed in range(50)}

    # Bytes cannot be hit when what is left is shorter than the shortest word and its space.
    slack = 2 if count is count_bytes else 0
    assert min(lengths) >= tokens - slack
    assert max(lengths) <= tokens


def test_a_text_may_be_longer_than_the_stock_of_words() -> None:
    words = known_words(None, random.Random(0))

    assert len(words.text(2 * POOL_WORDS + 5, random.Random(0)).split()) == 2 * POOL_WORDS + 5


def test_a_text_is_never_empty() -> None:
    assert known_words(count_bytes, random.Random(0)).text(1, random.Random(0)) in VOCABULARY


def test_texts_differ_from_their_first_words_on_and_the_seed_repeats_them() -> None:
    words = known_words(None, random.Random(0))
    texts = [words.text(64, random.Random(f"text {seed}")) for seed in range(200)]

    assert len({" ".join(text.split()[:4]) for text in texts}) == 200
    assert texts[7] == words.text(64, random.Random("text 7"))


def write(folder: Path, *lines: str) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_a_file_brings_prompts_and_chats(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '{"prompt": "x", "other": 1}',
        "",
        '{"messages": [{"role": "user", "content": "y"}], "task": "t", "output_tokens": 5}',
        '{"input_tokens": 7, "output_tokens": 3}',
    )

    assert list(read_lines(path, chat=True)) == [
        Line("x"),
        Line(({"role": "user", "content": "y"},), "t", 5),
        Line(input_tokens=7, output_tokens=3),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2: Input data was truncated"),
        ("5", "line 2: Expected `object`"),
        ("{}", "line 2: it needs one of prompt"),
        ('{"prompt": "x", "input_tokens": 3}', "line 2: it needs one of prompt"),
        ('{"input_tokens": 0}', "line 2: Expected `int` >= 1"),
        ('{"prompt": 5}', "line 2: Expected `str"),
        ('{"prompt": "x", "output_tokens": 0}', "line 2: Expected `int` >= 1"),
        ('{"messages": [{"role": "user"}]}', "line 2: messages are for --endpoint chat"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str, reason: str) -> None:
    with pytest.raises(Mistake, match=reason):
        read_lines(write(tmp_path, '{"prompt": "x"}', line), chat=False)


def test_a_file_without_lines_or_without_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Mistake, match="has no line"):
        read_lines(write(tmp_path, ""), chat=False)
    with pytest.raises(Mistake, match="No such file"):
        read_lines(tmp_path / "none", chat=False)
