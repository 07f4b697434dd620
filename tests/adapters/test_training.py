"""Training of a cluster in Python: mixed-task batches, the loop, and the bundle that comes out."""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from oneplusn.adapters.attach import find_sites
from oneplusn.adapters.methods import CgcLora, CPoly, LoraPerTask, Poly
from oneplusn.adapters.training.data import IGNORED_LABEL, Collate, Example, TaskDataset
from oneplusn.adapters.training.metrics import TaskLosses, by_task, completion_losses, row_results
from oneplusn.adapters.training.model import ClusterModel
from oneplusn.adapters.training.trainer import (
    Plan,
    TrainSettings,
    count_steps,
    fit,
    train_cluster,
)
from oneplusn.demo.tokenizer import END_ID, PAD_ID, build_tokenizer
from tiny_models import tiny_model
from tolerances import assert_close

TASKS = ("keep", "turn")
METHODS = [
    LoraPerTask(TASKS, rank=4),
    CgcLora(TASKS, num_common=2, num_own=1, rank=2),
    CPoly(TASKS, num_common=2, num_own=1, rank=2, borrows={"keep": ("turn",)}),
]
QUICK = {"learning_rate": 2e-2, "bf16": False, "progress": False, "clip": 1.0}


@pytest.fixture(scope="module", autouse=True)
def settled_heap():
    """The Trainer collects garbage when it starts: not among what the libraries have loaded."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def base():
    return tiny_model("llama", vocab_size=264, eos_token_id=END_ID, pad_token_id=PAD_ID)


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


def trained(base, dataset, **settings):
    """Weights, and loss and norm of the gradient at every step, after a few steps."""
    torch.manual_seed(0)
    model = ClusterModel(base, METHODS[1], find_sites(base))
    plan = Plan(dataset, Collate(PAD_ID))
    history = fit(model, plan, TrainSettings(**QUICK | {"steps": 3} | settings))
    model.detach()
    weights = torch.cat([p.detach().flatten() for p in model.expert_parameters()])
    steps = [(row["loss"], row["grad_norm"]) for row in history if "loss" in row]
    return weights, torch.tensor(steps)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_two_tasks_with_the_same_prompts_are_told_apart(base, dataset, method):
    settings = TrainSettings(steps=60, batch_size=8, **QUICK)
    bundle = train_cluster(base, method, dataset, settings, pad_token_id=PAD_ID)
    assert bundle.tasks == TASKS
    batch = Collate(PAD_ID)([dataset[i] for i in range(len(dataset))])
    model = ClusterModel(base, method, find_sites(base))
    model.load_bundle(bundle)
    model.eval()
    with torch.no_grad():
        adapted = model(**batch).loss
        batch.pop("task_ids")
        assert adapted < 0.5 * model.base(**batch).loss


def test_the_same_seed_gives_the_same_bundle(base, dataset):
    def digest(seed):
        settings = TrainSettings(steps=3, batch_size=8, seed=seed, **QUICK)
        return train_cluster(base, METHODS[2], dataset, settings, pad_token_id=PAD_ID).digest

    assert digest(0) == digest(0) != digest(1)


def test_accumulated_batches_are_one_large_batch(base, tokenizer):
    # Completions of unlike lengths: the mean is over the tokens of the whole step.
    pairs = [Example(task, "ab", "c" * n) for n in (1, 9) for task in TASKS]
    dataset = TaskDataset(pairs, TASKS, tokenizer, max_tokens=16)
    whole = trained(base, dataset, batch_size=4)[1]
    assert_close(trained(base, dataset, batch_size=1, accumulate=4)[1], whole)


def test_packing_learns_what_padding_learns(base, dataset):
    padded = trained(base, dataset, batch_size=8)[1]
    assert_close(trained(base, dataset, batch_size=8, packing=16)[1], padded)


def test_checkpointed_activations_learn_the_same_from_twice_the_work(base, dataset):
    calls = []
    base.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    kept = trained(base, dataset, batch_size=8)[0]
    assert len(calls) == 3
    again = trained(base, dataset, batch_size=8, gradient_checkpointing=True)[0]
    assert len(calls) == 3 + 6
    assert again.equal(kept)
    trained(base, dataset, batch_size=8)
    assert len(calls) == 3 + 6 + 3, "the base is left as it was"


def test_experts_and_gates_have_rates_of_their_own(base, dataset):
    model = ClusterModel(base, METHODS[1], find_sites(base))
    experts = [p.detach().clone() for p in model.expert_parameters()]
    gates = [p.detach().clone() for p in model.gate_parameters()]
    tiny = {"learning_rate": 1e-30, "gate_learning_rate": 1e-2, "steps": 2, "warmup": 0.0}
    # B starts at zero, where gates have no gradient.
    with torch.no_grad():
        for delta in model.deltas:
            delta.b.add_(0.1)
    fit(model, Plan(dataset, Collate(PAD_ID)), TrainSettings(**QUICK | tiny))
    assert all(
        torch.allclose(p, before + 0.1 * (before == 0).all(), atol=1e-7)
        for p, before in zip(model.expert_parameters(), experts, strict=True)
    )
    assert any(
        not p.equal(before) for p, before in zip(model.gate_parameters(), gates, strict=True)
    )


@pytest.mark.parametrize("method", [METHODS[1], Poly(TASKS, rank=2)], ids=lambda m: m.name)
def test_the_history_has_the_loss_of_every_task(base, dataset, method):
    model = ClusterModel(base, method, find_sites(base))
    settings = TrainSettings(steps=2, batch_size=8, **QUICK)
    history = fit(model, Plan(dataset, Collate(PAD_ID), dataset), settings)
    trained = [row for row in history if "loss" in row]
    validated = [row for row in history if "eval_loss" in row]
    assert [row["step"] for row in trained] == [1, 2]
    # Every word of both tasks has as many tokens, so the mean over tokens is that over tasks.
    assert trained[0]["loss"] == pytest.approx(
        (trained[0]["keep_loss"] + trained[0]["turn_loss"]) / 2
    )
    for row in validated:
        figures = [row[f"eval_{task}_loss"] for task in TASKS]
        assert row["eval_loss"] == pytest.approx(sum(figures) / 2)


@pytest.mark.parametrize(
    ("settings", "rows", "processes", "steps"),
    [
        ({"steps": 7}, 100, 1, 7),
        ({"epochs": 1, "batch_size": 32}, 100, 1, 4),
        ({"epochs": 2.5, "batch_size": 32}, 100, 1, 10),
        ({"epochs": 1, "batch_size": 8, "accumulate": 4}, 100, 1, 4),
        ({"epochs": 1, "batch_size": 8}, 100, 4, 4),
    ],
)
def test_epochs_become_steps(settings, rows, processes, steps):
    assert count_steps(rows, TrainSettings(**settings), processes) == steps


class TestMetrics:
    LABELS = torch.tensor([[IGNORED_LABEL, 1, 2], [IGNORED_LABEL, IGNORED_LABEL, 0]])

    def logits(self, chosen):
        return 9.0 * torch.nn.functional.one_hot(torch.tensor(chosen), 3)

    def test_the_loss_is_of_completion_tokens_each_with_its_task(self):
        logits = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0))
        losses, tasks = completion_losses(logits, self.LABELS, torch.tensor([1, 0]))
        chances = logits.log_softmax(-1)
        assert_close(losses, -torch.stack([chances[0, 0, 1], chances[0, 1, 2], chances[1, 1, 0]]))
        assert tasks.tolist() == [1, 1, 0]
        per_token = torch.tensor([[1, 1, 0], [0, 0, 0]])
        assert completion_losses(logits, self.LABELS, per_token)[1].tolist() == [1, 0, 0]

    @pytest.mark.parametrize(
        ("chosen", "exact"),
        [([[1, 2, 0], [0, 0, 0]], [1, 1]), ([[1, 1, 0], [2, 0, 1]], [0, 1])],
        ids=["all right", "one token wrong"],
    )
    def test_a_row_is_exact_when_all_its_tokens_are_chosen(self, chosen, exact):
        results = row_results(self.logits(chosen), self.LABELS)
        assert results[:, 1].tolist() == [2, 1]
        assert results[:, 2].tolist() == exact

    def test_losses_are_summed_by_task_until_they_are_read(self):
        losses = TaskLosses(3)
        assert losses.means() == [None, None, None]
        losses.add(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 2, 2]))
        losses.add(torch.tensor([2.0]), torch.tensor([0]))
        assert losses.means() == [1.5, None, 4.0]
        losses.clear()
        assert losses.means() == [None, None, None]

    def test_a_task_without_rows_has_no_figures(self):
        results = torch.tensor([[6.0, 3.0, 1.0], [2.0, 1.0, 0.0]]).numpy()
        found = by_task(results, torch.tensor([1, 1]).numpy(), TASKS)
        assert found == {"turn": {"loss": 2.0, "exact_match": 0.5}}
