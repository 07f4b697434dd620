"""Training of a cluster: mixed-task batches, the loop, and the bundle that comes out."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from oneplusn.adapters.attach import find_sites
from oneplusn.adapters.methods import CgcLora, CPoly, LoraPerTask
from oneplusn.adapters.training.data import IGNORED_LABEL, Collate, Example, TaskDataset, read_jsonl
from oneplusn.adapters.training.model import ClusterModel
from oneplusn.adapters.training.trainer import TrainSettings, train_cluster
from oneplusn.demo.tokenizer import ANSWER_ID, END_ID, PAD_ID, build_tokenizer
from oneplusn.errors import InvalidRequest
from tolerances import assert_close

TASKS = ("keep", "turn")
METHODS = [
    LoraPerTask(TASKS, rank=4),
    CgcLora(TASKS, num_common=2, num_own=1, rank=2),
    CPoly(TASKS, num_common=2, num_own=1, rank=2, borrows={"keep": ("turn",)}),
]


@pytest.fixture
def base():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,  # large enough that the frozen head can tell tokens apart
        tie_word_embeddings=True,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder, 64)
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture
def dataset(tokenizer):
    words = ["ab", "cd", "ae", "fb"]
    pairs = [Example("keep", word, word) for word in words]
    pairs += [Example("turn", word, word[::-1]) for word in words]
    return TaskDataset(pairs, TASKS, tokenizer, max_tokens=16)


def randomise(model):
    with torch.no_grad():
        for delta in model.deltas:
            delta.b.normal_(std=0.1)


def test_an_example_becomes_tokens_with_loss_on_the_completion_only(dataset):
    assert dataset[4] == {
        "input_ids": [ord("a"), ord("b"), ANSWER_ID, ord("b"), ord("a"), END_ID],
        "labels": [IGNORED_LABEL] * 3 + [ord("b"), ord("a"), END_ID],
        "task_ids": 1,
    }


def test_a_batch_is_padded_on_the_right():
    rows = [
        {"input_ids": [1, 2], "labels": [IGNORED_LABEL, 2], "task_ids": 1},
        {"input_ids": [3], "labels": [3], "task_ids": 0},
    ]
    batch = {name: tensor.tolist() for name, tensor in Collate(9)(rows).items()}
    assert batch == {
        "input_ids": [[1, 2], [3, 9]],
        "attention_mask": [[1, 1], [1, 0]],
        "labels": [[IGNORED_LABEL, 2], [3, IGNORED_LABEL]],
        "task_ids": [1, 0],
    }


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2"),
        ("[]", "line 2"),
        ('{"task": "keep", "prompt": "a"}', "completion"),
    ],
    ids=["no JSON", "no object", "a field missing"],
)
def test_a_bad_line_is_named(tmp_path, line, reason):
    path = tmp_path / "data.jsonl"
    good = json.dumps({"task": "keep", "prompt": "a", "completion": "a"})
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(InvalidRequest, match=reason):
        read_jsonl(path)
    path.write_text(f"{good}\n\n")
    assert read_jsonl(path) == [Example("keep", "a", "a")]


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (Example("fly", "a", "b"), "'fly' is not one of the cluster's: keep, turn"),
        (Example("keep", "a" * 20, "b"), "23 tokens, the limit is 16"),
    ],
    ids=["unknown task", "too long"],
)
def test_bad_examples_are_refused(tokenizer, example, reason):
    with pytest.raises(InvalidRequest, match=reason):
        TaskDataset([example], TASKS, tokenizer, max_tokens=16)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_sequence_does_not_see_its_neighbours_tasks(base, method):
    model = ClusterModel(base, method, find_sites(base))
    randomise(model)
    model.eval()
    tokens = torch.randint(0, 256, (3, 5))
    mixed = model(tokens, task_ids=torch.tensor([0, 1, 0])).logits
    alone = [
        model(tokens[i : i + 1], task_ids=torch.tensor([task])).logits
        for i, task in enumerate([0, 1, 0])
    ]
    assert_close(mixed, torch.cat(alone))
    assert not torch.allclose(mixed[1], model(tokens[1:2], task_ids=torch.tensor([0])).logits[0])


def test_an_untrained_cluster_is_the_base_and_leaves_it_as_it_was(base):
    tokens = torch.randint(0, 256, (2, 5))
    with torch.no_grad():
        expected = base(tokens).logits
        model = ClusterModel(base, METHODS[1], find_sites(base))
        assert model(tokens, task_ids=torch.tensor([0, 1])).logits.equal(expected)
        randomise(model)
        assert not model(tokens, task_ids=torch.tensor([0, 1])).logits.equal(expected)
        model.detach()
        assert base(tokens).logits.equal(expected)


def test_only_experts_and_gates_learn(base):
    model = ClusterModel(base, METHODS[1], find_sites(base))
    trained = {id(p) for p in model.parameters()}
    assert trained == {id(p) for p in [*model.expert_parameters(), *model.gate_parameters()]}
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_one_tasks_examples_leave_another_tasks_experts_alone(base):
    method = METHODS[1]
    model = ClusterModel(base, method, find_sites(base))
    randomise(model)
    tokens = torch.randint(0, 256, (2, 5))
    model(tokens, task_ids=torch.tensor([0, 0]), labels=tokens).loss.backward()
    owners = [method.experts()[e].owner for e in model.deltas[0].rank_expert.tolist()]
    for delta in model.deltas:
        for rank_row, owner in enumerate(owners):
            touched = bool(delta.a.grad[rank_row].any())
            assert touched == (owner in (None, "keep"))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_bundle_computes_what_the_training_form_computes(base, method):
    model = ClusterModel(base, method, find_sites(base))
    randomise(model)
    model.eval()
    bundle = model.bundle(base_fingerprint=None, dtype=torch.float32)
    tokens = torch.randint(0, 256, (1, 5))
    with torch.no_grad():
        expected = [model(tokens, task_ids=torch.tensor([j])).logits for j in range(len(TASKS))]
        model.detach()
        bare = {path: base.get_submodule(path).weight.clone() for path in bundle.modules}
        for j, logits in enumerate(expected):
            for path, delta in bundle.modules.items():
                rank_gates = delta.weights[j].repeat_interleave(torch.tensor(delta.ranks))
                weight = bare[path] + (delta.b * rank_gates) @ delta.a
                base.get_submodule(path).weight.copy_(weight)
            assert_close(base(tokens).logits, logits)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_two_tasks_with_the_same_prompts_are_told_apart(base, dataset, method):
    settings = TrainSettings(
        steps=60, batch_size=8, learning_rate=2e-2, bf16=False, progress=False, clip=1.0
    )
    bundle = train_cluster(base, method, dataset, settings, pad_token_id=PAD_ID)
    assert bundle.tasks == TASKS
    again = train_cluster(base, method, dataset, settings, pad_token_id=PAD_ID)
    assert bundle.digest == again.digest, "the same seed gives the same bundle"
    batch = Collate(PAD_ID)([dataset[i] for i in range(len(dataset))])
    assert loss_with(base, bundle, method, batch) < 0.5 * base_loss(base, batch)


def base_loss(base, batch):
    with torch.no_grad():
        return base(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).loss


def loss_with(base, bundle, method, batch):
    model = ClusterModel(base, method, find_sites(base))
    gates = {site.modules[0]: index for index, site in enumerate(model.sites)}
    with torch.no_grad():
        for path, delta in zip(model.module_paths, model.deltas, strict=True):
            delta.a.copy_(bundle.modules[path].a)
            delta.b.copy_(bundle.modules[path].b)
            if path in gates:
                rows = bundle.modules[path].gate
                model.gates[gates[path]].forward = lambda rows=rows: rows
        loss = model(**batch).loss
    model.detach()
    return loss
