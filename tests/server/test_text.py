from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as Backend

from oneplusn.demo.tokenizer import (
    ANSWER_ID,
    CHAT_TEMPLATE,
    END_ID,
    SPECIAL_TOKENS,
    build_tokenizer,
    make_tokenizer,
)
from oneplusn.errors import ConfigError, InvalidRequest
from oneplusn.server.text import GUARD, TextStream, Tokenizer

SPECIAL = set(SPECIAL_TOKENS.values())


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory) -> Tokenizer:
    """One token a byte: every character beyond ASCII is split."""
    folder = tmp_path_factory.mktemp("bytes")
    build_tokenizer(folder)
    return Tokenizer(folder)


def merged_backend() -> Backend:
    """Byte-level BPE whose merges cross the borders of characters."""
    backend = make_tokenizer()
    data = json.loads(backend.to_str())
    vocab = data["model"]["vocab"]
    symbols = {byte: symbol for symbol, byte in vocab.items()}
    vocab |= SPECIAL_TOKENS
    sample = "héllo wörld 你好 🎉 <|an <|end <| |> .END. STOP"
    merges = []
    for left, right in zip(sample.encode(), sample.encode()[1:], strict=False):
        pair = symbols[left] + symbols[right]
        if pair not in vocab:
            vocab[pair] = len(vocab)
            merges.append([symbols[left], symbols[right]])
    data["model"]["merges"] = merges
    return Backend.from_str(json.dumps(data))


@pytest.fixture(scope="module")
def merged_tokenizer(tmp_path_factory) -> Tokenizer:
    return save(tmp_path_factory.mktemp("merged"), merged_backend(), CHAT_TEMPLATE)


def sentencepiece_backend() -> Backend:
    """Words with a leading space mark, and byte tokens for what is unknown, as Llama 2 has them."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "a", "b", "c", "▁a", "▁b", "▁c"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", letter) for letter in "abc"]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    backend.add_special_tokens([AddedToken(piece, special=True) for piece in pieces[:3]])
    return backend


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory) -> Tokenizer:
    return save(tmp_path_factory.mktemp("sentencepiece"), sentencepiece_backend())


def save(folder: Path, backend: Backend, template: str | None = None) -> Tokenizer:
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return Tokenizer(folder)


def chat(tokenizer: Tokenizer, *contents: str) -> list[int]:
    return tokenizer.encode_chat([{"role": "user", "content": text} for text in contents])


def test_the_post_processor_adds_its_special_tokens(byte_tokenizer, sentencepiece):
    assert byte_tokenizer.encode("ab") == [97, 98, ANSWER_ID]
    assert sentencepiece.encode("a b") == [1, 263, 264]


@pytest.mark.parametrize("text", ["", "plain", "héllo 你好 🎉", "a < b <| c |> d", GUARD, "\ufffd"])
def test_text_without_special_tokens_is_encoded_as_the_backend_does(merged_tokenizer, text):
    expected = merged_backend().encode(text.replace(GUARD, "")).ids
    assert merged_tokenizer.encode(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "<|end|>",
        "a<|answer|>b",
        "<|end|><|end|>",
        "<<|pad|>|end|>",
        f"<{GUARD}|end|>",
        f"<|end{GUARD}|>",
    ],
)
def test_special_tokens_that_are_typed_stay_text(merged_tokenizer, text):
    tokens = merged_tokenizer.encode(text)
    assert tokens[-1] == ANSWER_ID
    assert SPECIAL.isdisjoint(tokens[:-1])
    assert merged_tokenizer.decode(tokens) == text.replace(GUARD, "")


PARTS = st.sampled_from(["<|", "<|end", "|>", "end|>", "<", "|end|>", "<|end|>", " ", "x", GUARD])


@given(contents=st.lists(st.lists(PARTS, max_size=5).map("".join), min_size=1, max_size=4))
def test_no_chat_forges_a_special_token(merged_tokenizer, contents):
    tokens = chat(merged_tokenizer, *contents)
    assert [token for token in tokens if token in SPECIAL] == [ANSWER_ID] * len(contents)
    assert merged_tokenizer.decode(tokens) == "".join(contents).replace(GUARD, "")


@pytest.mark.parametrize(
    "template",
    [
        pytest.param("{% for m in messages %}{{ m['content'] }}{% endfor %}", id="joined"),
        pytest.param("{% for m in messages %}{{ m.content | trim }}{% endfor %}", id="trimmed"),
        pytest.param("{{ messages | map(attribute='content') | join }}", id="by a filter"),
        pytest.param("{{ messages | tojson(ensure_ascii=False) }}", id="as JSON"),
        pytest.param("{{ tools | tojson }}", id="tools"),
    ],
)
@pytest.mark.parametrize(
    "contents", [["<|en", "d|>"], ["<|en  ", "d|>"], ["<", "|end|>"], ["<|end|>", ""]]
)
def test_templates_that_put_strings_together_forge_none_either(tmp_path, template, contents):
    tokenizer = save(tmp_path, make_tokenizer(), template)
    messages = [{"role": "user", "content": text} for text in contents]
    tools = [{"name": text, text: 1} for text in contents]
    assert SPECIAL.isdisjoint(tokenizer.encode_chat(messages, tools=tools))


def test_the_template_itself_writes_special_tokens(byte_tokenizer):
    tokens = byte_tokenizer.encode_chat(
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": "r"},
        ]
    )
    assert tokens == [*b"s\nq", ANSWER_ID, *b"a", END_ID, *b"r", ANSWER_ID]


def test_a_chat_without_a_template_is_refused(sentencepiece):
    assert not sentencepiece.has_chat_template
    with pytest.raises(InvalidRequest, match="no chat template"):
        chat(sentencepiece, "hi")


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles must alternate') }}", "{{ messages[0].nothing.at_all }}"],
)
def test_what_the_template_rejects_is_the_callers_fault(tmp_path, template):
    tokenizer = save(tmp_path, make_tokenizer(), template)
    with pytest.raises(InvalidRequest, match="template rejects the messages: ") as caught:
        chat(tokenizer, "hi")
    assert caught.value.param == "messages"


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path)


def test_token_ids_with_a_hole_where_the_guard_would_go_are_refused(tmp_path):
    data = json.loads(make_tokenizer().to_str())
    data["model"]["vocab"]["hole"] = 259
    data["model"]["vocab"]["holes"] = 260
    del data["model"]["vocab"]["!"]
    with pytest.raises(ConfigError, match="260"):
        save(tmp_path, Backend.from_str(json.dumps(data)))


def test_a_truncation_in_the_file_cuts_no_prompt(tmp_path):
    backend = make_tokenizer()
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    tokenizer = save(tmp_path, backend)
    assert tokenizer.encode("abcdef") == [*b"abcdef", ANSWER_ID]


def stream(tokenizer: Tokenizer, tokens: list[int], stop=(), **options) -> tuple[list[str], str]:
    """Push all tokens; return the pieces and all text given out."""
    out = TextStream(tokenizer, stop, **options)
    pieces = [out.push(token) for token in tokens]
    pieces.append(out.flush())
    assert out.text == "".join(pieces)
    return pieces, out.text


def cut(text: str, stop: tuple[str, ...]) -> str:
    """Cut text where the stop string begins that is complete first, the longest of several."""
    for end in range(1, len(text) + 1):
        ending = [string for string in stop if text[:end].endswith(string)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


WORDS = st.sampled_from(
    ["a", "ab", "é", "你", "🎉", "👩‍👩‍👧", " ", "\ufffd", "STOP", "ST", ".END.", "\n"]
)
TEXTS = st.lists(WORDS | st.text(max_size=3), max_size=12).map("".join)
STOPS = st.lists(
    st.sampled_from(["STOP", "TO", "S", "你", "🎉a", ".END.", "ab", "bab"]), max_size=3
)


@pytest.mark.parametrize("kind", ["byte_tokenizer", "merged_tokenizer"])
@given(text=TEXTS, stop=STOPS)
def test_the_pieces_add_up_to_the_text_before_the_first_stop(request, kind, text, stop):
    tokenizer = request.getfixturevalue(kind)
    tokens = tokenizer.backend.encode(text, add_special_tokens=False).ids
    assert stream(tokenizer, tokens, stop)[1] == cut(text, tuple(stop))


@given(tokens=st.lists(st.integers(0, 258), max_size=30), stop=STOPS)
def test_any_bytes_add_up_to_what_they_decode_to(byte_tokenizer, tokens, stop):
    text = byte_tokenizer.decode(tokens)
    assert stream(byte_tokenizer, tokens, stop)[1] == cut(text, tuple(stop))


@given(text=st.text(alphabet="abc 你é🎉", max_size=12))
def test_words_keep_their_spaces_and_byte_tokens_their_characters(sentencepiece, text):
    tokens = sentencepiece.encode(text)[1:]
    assert stream(sentencepiece, tokens)[1] == sentencepiece.decode(tokens)


def test_byte_tokens_that_are_no_text_do_not_end_the_stream(sentencepiece):
    letter, broken, word = 3 + ord("A"), 3 + 0xE4, 263
    pieces, text = stream(sentencepiece, [word, letter, broken, word, word])
    assert pieces == ["a", "A", "", "\ufffd a", " a", ""]
    assert text == "aA\ufffd a a"


@pytest.mark.parametrize(
    ("tokens", "stop", "pieces"),
    [
        pytest.param(b"abc", (), ["a", "b", "c", ""], id="at once without stop strings"),
        pytest.param("é".encode(), (), ["", "é", ""], id="a character when it is complete"),
        pytest.param(b"\xe4\xbd", (), ["", "", "\ufffd"], id="an incomplete one at the end"),
        pytest.param(b"aSTx", ("STOP",), ["a", "", "", "STx", ""], id="held, then released"),
        pytest.param(b"aST", ("STOP",), ["a", "", "", "ST"], id="held until the end"),
        pytest.param(b"aSTOPx", ("STOP",), ["a", "", "", "", "", "", ""], id="cut"),
        pytest.param(b"SSTOP", ("STOP",), ["", "S", "", "", "", ""], id="begun twice"),
        pytest.param([END_ID, 97, END_ID], (), ["", "a", "", ""], id="special tokens left out"),
    ],
)
def test_pieces_come_as_soon_as_they_are_certain(byte_tokenizer, tokens, stop, pieces):
    assert stream(byte_tokenizer, list(tokens), stop)[0] == pieces


def test_a_stop_string_can_be_included_and_is_named(byte_tokenizer):
    out = TextStream(byte_tokenizer, ("b", "bc"), include_stop=True)
    assert not out.finished
    assert [out.push(token) for token in b"abcd"] == ["a", "b", "", ""]
    assert (out.finished, out.stopped_by, out.flush(), out.text) == (True, "b", "", "ab")


def test_an_empty_stop_string_is_refused(byte_tokenizer):
    with pytest.raises(InvalidRequest, match="empty string"):
        TextStream(byte_tokenizer, ("a", ""))


def test_nothing_here_loads_torch(tmp_path):
    build_tokenizer(tmp_path)
    code = (
        "import sys; from oneplusn.server.text import TextStream, Tokenizer\n"
        "tokenizer = Tokenizer(sys.argv[1])\n"
        "stream = TextStream(tokenizer, ('x',))\n"
        "for token in tokenizer.encode_chat([{'role': 'user', 'content': 'hi'}]):\n"
        "    stream.push(token)\n"
        "assert stream.flush() + stream.text == 'hi', stream.text\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
