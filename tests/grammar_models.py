"""A tiny engine that can be constrained: random weights over a small vocabulary of ASCII."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from oneplusn.server.engine.engine import Engine, EngineConfig
from oneplusn.server.engine.model import prepare_model
from tiny_models import tiny_model

EOS = 1
# One token a character, and some that reach across the parts of a JSON document.
PIECES = (
    '{"',
    '"}',
    '":',
    '",',
    '", "',
    '"abc',
    'abc"',
    '": "',
    "}]",
    "true",
    "12",
    "\\n",
    "\\u00",
)
ASCII = [chr(code) for code in range(0x20, 0x7F)]
SPECIAL = ("<pad>", "<end>", "<call>")
VOCAB = len(SPECIAL) + len(ASCII) + len(PIECES)
MIB = 2**20


def write_tokenizer(folder: Path) -> Path:
    """Write a byte-level tokenizer; the ids of the special tokens come first."""
    texts = [*ASCII, *PIECES]
    vocab = {token: index for index, token in enumerate(SPECIAL)}
    vocab |= {text.replace(" ", "Ġ"): index for index, text in enumerate(texts, len(SPECIAL))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.save_pretrained(folder)
    return folder


def grammar_engine(folder: Path, **limits: int) -> Engine:
    """Make an engine of the vocabulary above, its tokenizer in `folder`."""
    limits = {"kv_memory": 4 * MIB, "adapter_memory": MIB} | limits
    loaded = prepare_model(tiny_model("llama", vocab_size=VOCAB), write_tokenizer(folder))
    return Engine(loaded, EngineConfig(**limits))
