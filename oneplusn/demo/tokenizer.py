"""Build the demo's tokenizer: one token a byte, and three special tokens."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

PAD_ID, END_ID, ANSWER_ID = 256, 257, 258
SPECIAL_TOKENS = {"<|pad|>": PAD_ID, "<|end|>": END_ID, "<|answer|>": ANSWER_ID}

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ message['content'] + '<|answer|>' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ message['content'] + '<|end|>' }}"
    "{%- else -%}{{ message['content'] + '\\n' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
)


def _byte_symbols() -> dict[str, int]:
    """Map the printable stand-in of each byte to the byte's value.

    Byte-level tokenizers show the bytes that print as themselves, and all others as the code
    points from 256 up, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}


def make_tokenizer() -> Tokenizer:
    """Make the tokenizer: id = byte value, and `<|answer|>` after every encoded text."""
    tokenizer = Tokenizer(models.BPE(vocab=_byte_symbols(), merges=[]))
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|answer|>",
        pair="$A $B <|answer|>",
        special_tokens=[("<|answer|>", ANSWER_ID)],
    )
    return tokenizer


def build_tokenizer(out_dir: Path, max_length: int = 512) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` with the chat template.

    Args:
        out_dir: the folder, made when absent.
        max_length: the longest sequence that the model takes, in tokens.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    make_tokenizer().save(str(out_dir / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "pad_token": "<|pad|>",
        "eos_token": "<|end|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(config, indent=2) + "\n"
    (out_dir / "tokenizer_config.json").write_text(text, encoding="utf-8")
