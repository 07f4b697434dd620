"""The demo's tasks, its splits and its byte tokenizer."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from oneplusn.demo.pretrain import IGNORED, collate, encode
from oneplusn.demo.tasks import CLUSTERS, TASKS, WORDS, draw_input, examples, is_heldout
from oneplusn.demo.tokenizer import ANSWER_ID, END_ID, PAD_ID, build_tokenizer, make_tokenizer

RECORD = "city=Lyon; name=Ada Quill; born=3 March 1984"
TOKENIZER = make_tokenizer()


@pytest.mark.parametrize(
    ("task", "text", "expected"),
    [
        ("reverse_words", "three blind mice", "mice blind three"),
        ("drop_vowels", "three blind mice", "thr blnd mc"),
        ("title_case", "three blind mice", "Three Blind Mice"),
        ("initials", "three blind mice", "tbm"),
        ("sort_numbers", "4 82 9 13", "4 9 13 82"),
        ("sort_numbers", "7 0 7 99", "0 7 7 99"),
        ("largest", "4 82 9 13", "82"),
        ("reverse_numbers", "4 82 9 13", "13 9 82 4"),
        ("add_ends", "4 82 9 13", "17"),
        ("add_ends", "99 0 0 99", "198"),
        ("city", RECORD, "Lyon"),
        ("surname", RECORD, "Quill"),
        ("iso_date", RECORD, "1984-03-03"),
        ("iso_date", "born=28 December 1900; city=Fez; name=Leo Pike", "1900-12-28"),
        ("csv", RECORD, "Ada Quill,Lyon,3 March 1984"),
    ],
)
def test_a_task_is_a_function_of_its_input(task: str, text: str, expected: str) -> None:
    assert TASKS[task].function(text) == expected


def test_every_cluster_has_four_tasks() -> None:
    counts = {name: sum(t.cluster == name for t in TASKS.values()) for name in CLUSTERS}
    assert counts == {"text": 4, "numbers": 4, "records": 4}


def test_words_are_distinct_lowercase_and_leave_a_consonant() -> None:
    assert len(set(WORDS)) == len(WORDS) >= 300
    assert all(3 <= len(word) <= 7 and word.isascii() and word.islower() for word in WORDS)
    assert all(TASKS["drop_vowels"].function(word) for word in WORDS)


@pytest.mark.parametrize("task", TASKS)
def test_no_held_out_input_is_trained_on(task: str) -> None:
    trained = {text for text, _ in examples(task, "train", 500, seed=3)}
    kept = {text for text, _ in examples(task, "heldout", 500, seed=3)}
    assert all(map(is_heldout, kept))
    assert not any(map(is_heldout, trained))


def test_the_split_is_the_same_on_every_machine() -> None:
    assert is_heldout("three blind mice") is False
    assert examples("sort_numbers", "heldout", 3, seed=0) == [
        ("49 97 53 5", "5 49 53 97"),
        ("33 65 62 51", "33 51 62 65"),
        ("38 61 45 74", "38 45 61 74"),
    ]


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_examples(task: str) -> None:
    assert examples(task, "train", 20, seed=5) == examples(task, "train", 20, seed=5)
    assert examples(task, "train", 20, seed=5) != examples(task, "train", 20, seed=6)


def test_tasks_of_a_cluster_share_their_inputs() -> None:
    for cluster in CLUSTERS:
        names = [task.name for task in TASKS.values() if task.cluster == cluster]
        inputs = [[text for text, _ in examples(name, "train", 20, seed=5)] for name in names]
        assert all(texts == inputs[0] for texts in inputs)


@pytest.mark.parametrize("task", TASKS)
def test_repeating_the_input_is_hardly_ever_right(task: str) -> None:
    pairs = examples(task, "heldout", 400, seed=0)
    assert sum(text == answer for text, answer in pairs) / 400 <= 0.10


def test_a_drawn_input_is_in_the_split_that_was_asked_for() -> None:
    rng = random.Random(0)
    assert all(is_heldout(draw_input(CLUSTERS["text"], "heldout", rng)) for _ in range(50))


@given(st.text())
def test_text_comes_back_from_its_bytes(text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    assert TOKENIZER.decode(ids) == text


@given(st.text(alphabet=st.characters(exclude_characters="|")))
def test_a_token_is_a_byte_and_the_answer_mark_comes_last(text: str) -> None:
    assert TOKENIZER.encode(text).ids == [*text.encode(), ANSWER_ID]


def test_training_sees_the_tokens_that_a_user_sends() -> None:
    example = encode("4 82", "82 é")
    assert example.prompt == TOKENIZER.encode("4 82").ids
    assert example.answer == [*TOKENIZER.encode("82 é", add_special_tokens=False).ids, END_ID]


def test_the_loss_is_on_the_answer_and_its_end_alone() -> None:
    ids, targets = collate([encode("a", "bc"), encode("abc", "d")])
    assert ids.tolist() == [[97, ANSWER_ID, 98, 99, PAD_ID], [97, 98, 99, ANSWER_ID, 100]]
    assert targets.tolist() == [
        [IGNORED, 98, 99, END_ID, IGNORED],
        [IGNORED, IGNORED, IGNORED, 100, END_ID],
    ]


def test_a_special_token_typed_as_text_is_special_unless_switched_off() -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.encode("a<|end|>b").ids == [97, END_ID, 98, ANSWER_ID]
    tokenizer.encode_special_tokens = True
    assert tokenizer.encode("a<|end|>b").ids == [*b"a<|end|>b", ANSWER_ID]


@pytest.fixture
def loaded(tmp_path: Path) -> PreTrainedTokenizerFast:
    build_tokenizer(tmp_path, max_length=512)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


def test_transformers_loads_the_same_tokenizer(loaded: PreTrainedTokenizerFast) -> None:
    assert loaded("three é").input_ids == TOKENIZER.encode("three é").ids
    assert (loaded.pad_token_id, loaded.eos_token_id, len(loaded)) == (PAD_ID, END_ID, 259)
    assert loaded.model_max_length == 512


@pytest.mark.parametrize("generation_prompt", [True, False])
def test_the_chat_template_asks_for_an_answer(
    loaded: PreTrainedTokenizerFast, generation_prompt: bool
) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "4 82"},
        {"role": "assistant", "content": "82 4"},
        {"role": "user", "content": "1 2"},
    ]
    text = loaded.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generation_prompt
    )
    assert text == "Be brief.\n4 82<|answer|>82 4<|end|>1 2<|answer|>"


def test_a_chat_of_one_message_is_the_plain_prompt(loaded: PreTrainedTokenizerFast) -> None:
    chat = loaded.apply_chat_template([{"role": "user", "content": "4 82"}], tokenize=False)
    assert loaded(chat, add_special_tokens=False).input_ids == loaded("4 82").input_ids


def test_the_tokenizer_does_without_torch() -> None:
    modules = "oneplusn.demo.tasks, oneplusn.demo.tokenizer"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
