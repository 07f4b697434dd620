"""From rows of data to batches: examples, chat templates, sources, padding and packing."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from oneplusn.adapters.attach import find_sites
from oneplusn.adapters.methods import CgcLora
from oneplusn.adapters.training.base import check_packing, select_sites
from oneplusn.adapters.training.config import Source
from oneplusn.adapters.training.data import (
    IGNORED_LABEL,
    Collate,
    Example,
    TaskDataset,
    encode,
    read_jsonl,
)
from oneplusn.adapters.training.metrics import completion_losses
from oneplusn.adapters.training.model import ClusterModel
from oneplusn.adapters.training.packing import PackedDataset, PackedSampler, pack
from oneplusn.adapters.training.sampling import TaskSampler, quotas
from oneplusn.adapters.training.sources import read_sources
from oneplusn.demo.tokenizer import ANSWER_ID, END_ID, build_tokenizer
from oneplusn.errors import InvalidRequest
from tiny_models import VOCAB, tiny_model
from tolerances import assert_close
from training_cases import rows, write_rows

TASKS = ("keep", "turn")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder, 64)
    return PreTrainedTokenizerFast.from_pretrained(folder)


class Tokens:
    """Rows that are token ids already."""

    def __init__(self, sequences):
        self.sequences = sequences

    def __len__(self):
        return len(self.sequences)

    def __getitem__(self, index):
        task, tokens, prompt = self.sequences[index]
        labels = [IGNORED_LABEL] * prompt + tokens[prompt:]
        return {"input_ids": tokens, "labels": labels, "task_ids": task}


class TestExamples:
    def test_an_example_becomes_tokens_with_loss_on_the_completion_only(self, tokenizer):
        dataset = TaskDataset([Example("turn", "ab", "ba")], TASKS, tokenizer, max_tokens=16)
        assert dataset[0] == {
            "input_ids": [ord("a"), ord("b"), ANSWER_ID, ord("b"), ord("a"), END_ID],
            "labels": [IGNORED_LABEL] * 3 + [ord("b"), ord("a"), END_ID],
            "task_ids": 1,
        }
        assert (dataset.lengths, dataset.sizes, len(dataset)) == ([6], [0, 1], 1)

    def test_messages_become_what_the_chat_template_makes_of_them(self, tokenizer):
        messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "ab"}]
        prompt, completion = encode(Example("turn", messages, "ba"), tokenizer)
        assert tokenizer.decode(prompt) == "s\nab<|answer|>"
        assert tokenizer.decode(completion) == "ba<|end|>"

    def test_a_completion_ends_once(self, tokenizer):
        assert encode(Example("turn", "a", "b<|end|>"), tokenizer)[1] == [ord("b"), END_ID]

    @pytest.mark.parametrize(
        ("example", "reason"),
        [
            (Example("fly", "a", "b"), "'fly' is not one of the cluster's: keep, turn"),
            (
                Example("keep", "a" * 20, "b"),
                "23 tokens, 21 of them its prompt, the limit is 16: shorten it or raise the limit",
            ),
            (Example("keep", "a", ""), "the completion of an example of task 'keep' has no token"),
            (Example("keep", [{"role": "user", "content": "a"}], ""), "completion .* has no token"),
        ],
        ids=["unknown task", "too long", "no completion", "no completion of a chat"],
    )
    def test_bad_examples_are_refused(self, tokenizer, example, reason):
        with pytest.raises(InvalidRequest, match=reason):
            TaskDataset([example], TASKS, tokenizer, max_tokens=16)

    def test_a_tokenizer_without_a_template_takes_no_messages(self, tokenizer, monkeypatch):
        monkeypatch.setattr(tokenizer, "chat_template", None)
        chat = Example("keep", [{"role": "user", "content": "a"}], "b", "d.jsonl, line 7")
        with pytest.raises(InvalidRequest, match=r"d\.jsonl, line 7: .* has no chat template"):
            encode(chat, tokenizer)

    def test_a_digest_tells_data_apart(self, tokenizer):
        words = [Example("keep", "a", "b"), Example("keep", "a", "c"), Example("turn", "a", "b")]
        digests = [TaskDataset([e], TASKS, tokenizer, max_tokens=16).digest for e in words]
        again = TaskDataset(words[:1], TASKS, tokenizer, max_tokens=16).digest
        assert len(set(digests)) == 3
        assert again == digests[0]


class TestSources:
    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ("{", "line 2"),
            ("[]", r"line 2: \[\] is no object"),
            ('{"task": "keep", "prompt": "a"}', "line 2: completion is None"),
            ('{"task": 1, "prompt": "a", "completion": "b"}', "line 2: task is 1"),
            ('{"task": "keep", "completion": "b"}', 'either "prompt" or "messages"'),
            (
                '{"task": "keep", "prompt": "a", "messages": [], "completion": "b"}',
                'either "prompt" or "messages"',
            ),
            ('{"task": "keep", "messages": ["a"], "completion": "b"}', "the prompt is"),
        ],
        ids=["no JSON", "no object", "a field missing", "no name", "no prompt", "two", "no role"],
    )
    def test_a_bad_line_is_named(self, tmp_path, line, reason):
        path = tmp_path / "data.jsonl"
        good = json.dumps({"task": "keep", "prompt": "a", "completion": "a"})
        path.write_text(f"{good}\n{line}\n")
        with pytest.raises(InvalidRequest, match=reason):
            read_jsonl(path)
        path.write_text(f"{good}\n\n")
        assert read_jsonl(path) == [Example("keep", "a", "a")]

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(InvalidRequest, match=r"gone\.jsonl cannot be read"):
            read_sources([Source(path=tmp_path / "gone.jsonl")])

    def test_a_saved_data_set_is_read_with_its_own_columns(self, tmp_path):
        import datasets

        table = datasets.Dataset.from_list([{"q": "ab", "a": "ba"}, {"q": "cd", "a": "dc"}])
        datasets.DatasetDict({"test": table}).save_to_disk(tmp_path / "saved")
        columns = {"prompt": "q", "completion": "a"}
        folder = str(tmp_path / "saved")
        source = Source(dataset=folder, split="test", task="turn", columns=columns)
        expected = [Example("turn", "ab", "ba"), Example("turn", "cd", "dc")]
        assert read_sources([source]) == expected
        with pytest.raises(InvalidRequest, match="has no split 'train'; it has test"):
            read_sources([Source(dataset=folder, task="turn", columns=columns)])

    def test_a_folder_of_files_is_read_by_datasets(self, tmp_path, monkeypatch):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        (tmp_path / "files").mkdir()
        write_rows(tmp_path / "files" / "train.jsonl", rows(["ab"]))
        found = read_sources([Source(dataset=str(tmp_path / "files"))])
        assert found == [Example("keep", "ab", "ab"), Example("turn", "ab", "ba")]


class TestQuotas:
    @pytest.mark.parametrize(
        ("sizes", "temperature", "expected"),
        [
            ([90, 10], 1.0, [90, 10]),
            ([90, 10], 2.0, [75, 25]),
            ([90, 10], float("inf"), [50, 50]),
            ([1000, 1], 1.0, [1000, 1]),
            ([5, 0, 5], 3.0, [5, 0, 5]),
            ([3, 3, 1], float("inf"), [3, 2, 2]),
        ],
    )
    def test_temperature_decides_the_mixture(self, sizes, temperature, expected):
        assert quotas(sizes, temperature) == expected

    @given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.floats(1, 100))
    def test_an_epoch_is_as_long_as_the_data_and_leaves_no_task_out(self, sizes, temperature):
        sizes = [*sizes, 3]
        found = quotas(sizes, temperature)
        assert sum(found) == sum(sizes)
        assert [bool(count) for count in found] == [bool(size) for size in sizes]


class TestSampler:
    @given(
        st.lists(st.integers(0, 2), min_size=1, max_size=30), st.integers(0, 5), st.integers(0, 5)
    )
    def test_an_epoch_at_temperature_1_is_every_example_once(self, task_ids, seed, epoch):
        sampler = TaskSampler(task_ids, temperature=1, seed=seed)
        assert sorted(sampler.draws(epoch)) == list(range(len(task_ids)))

    def test_no_example_comes_again_before_all_of_its_task_have(self):
        task_ids = [0] * 12 + [1] * 4
        sampler = TaskSampler(task_ids, temperature=float("inf"), seed=3)
        large = [i for epoch in range(3) for i in sampler.draws(epoch) if i < 12]
        assert sorted(set(large[:24])) == list(range(12))
        assert [large.count(i) for i in range(12)] == [2] * 12

    def test_order_depends_on_seed_and_epoch_alone(self):
        task_ids = [0, 1] * 8
        draws = [
            TaskSampler(task_ids, temperature=1, seed=seed).draws(epoch)
            for seed, epoch in ((0, 0), (0, 0), (1, 0), (0, 1))
        ]
        assert draws[0] == draws[1]
        assert draws[2] != draws[0] != draws[3]

    def test_it_asks_which_epoch_it_is_whenever_it_begins(self):
        sampler = TaskSampler([0, 1] * 8, temperature=1, seed=0)
        sampler.epoch = lambda: 2
        assert list(sampler) == sampler.draws(2)


class TestPacking:
    @given(st.lists(st.integers(1, 20), min_size=1, max_size=40))
    def test_every_item_is_in_one_bin_and_no_bin_is_too_full(self, lengths):
        bins = pack(lengths, 20)
        assert sorted(item for each in bins for item in each) == list(range(len(lengths)))
        filled = [sum(lengths[item] for item in each) for each in bins]
        assert all(each <= 20 for each in filled)
        assert all(a + b > 20 for a, b in pairwise(filled)), "no two fit"

    def test_every_epoch_has_as_many_rows(self):
        lengths = [3, 9, 5, 7, 2, 8, 6, 4] * 3
        draws = TaskSampler([0] * 16 + [1] * 8, temperature=4, seed=0)
        sampler = PackedSampler(draws, lengths, row_tokens=12, seed=0)
        for epoch in range(8):
            found = sampler.rows(epoch)
            assert len(found) == len(sampler)
            assert all(sum(lengths[i] for i in row) <= 12 for row in found)

    def test_a_packed_batch_restarts_positions_at_every_sequence(self):
        dataset = PackedDataset(Tokens([(1, [5, 6, 7], 1), (0, [8, 9], 1)]))
        batch = Collate(0)([dataset[0, 1], dataset[(1,)]])
        assert {name: tensor.tolist() for name, tensor in batch.items()} == {
            "input_ids": [[5, 6, 7, 8, 9], [8, 9, 0, 0, 0]],
            "labels": [[-100, 6, 7, -100, 9], [-100, 9, -100, -100, -100]],
            "task_ids": [[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]],
            "position_ids": [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]],
        }

    @pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3", "gpt2"])
    def test_packed_and_padded_batches_have_the_same_losses(self, family):
        base = tiny_model(family)
        check_packing(base, 2)
        model = ClusterModel(base, CgcLora(TASKS, rank=2), find_sites(base)).eval()
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for delta in model.deltas:
                delta.b.normal_(std=0.3, generator=draw)

        def tokens(length):
            return torch.randint(2, VOCAB, (length,), generator=draw).tolist()

        # Longer than the sliding windows of 20, and of both tasks in one row.
        sequences = Tokens([(0, tokens(30), 2), (1, tokens(9), 3), (1, tokens(25), 1)])
        packed = PackedDataset(sequences)
        padded_batch = Collate(0)([sequences[index] for index in range(3)])
        packed_batch = Collate(0)([packed[0, 1], packed[(2,)]])
        with torch.no_grad():
            padded, packed = (
                completion_losses(
                    model(**{k: v for k, v in batch.items() if k != "labels"}).logits,
                    batch["labels"],
                    batch["task_ids"],
                )
                for batch in (padded_batch, packed_batch)
            )
        assert_close(packed[0], padded[0])
        assert packed[1].tolist() == padded[1].tolist()

    def test_a_base_that_does_not_keep_sequences_apart_is_refused(self):
        with pytest.raises(InvalidRequest, match="BloomForCausalLM lets packed sequences see"):
            check_packing(tiny_model("bloom"), 2)


def test_a_batch_is_padded_on_the_right():
    batch = Collate(9)([Tokens([(1, [1, 2], 1)])[0], Tokens([(0, [3], 0)])[0]])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2], [3, 9]],
        "attention_mask": [[1, 1], [1, 0]],
        "labels": [[IGNORED_LABEL, 2], [3, IGNORED_LABEL]],
        "task_ids": [1, 0],
    }


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        (["q_proj", "v_proj"], [("q_proj", "v_proj")] * 2),
        (["mlp.down_proj"], [("down_proj",)] * 2),
        (["*.layers.1.*_proj"], [("q_proj", "k_proj", "v_proj"), ("o_proj",)]),
    ],
    ids=["leaves", "the end of a path", "a pattern"],
)
def test_targets_choose_linears_and_siblings_stay_one_site(targets, modules):
    sites = select_sites(tiny_model("llama"), targets)
    found = [tuple(path.rpartition(".")[2] for path in site.modules) for site in sites]
    assert found[: len(modules)] == modules
    assert [len(site.slices) for site in sites] == [len(site.modules) for site in sites]
    assert select_sites(tiny_model("llama"), ["all"]) == find_sites(tiny_model("llama"))
