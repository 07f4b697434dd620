"""The base with a cluster beside its linears: mixed batches, checkpoints, and what comes out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from oneplusn.adapters.attach import find_sites
from oneplusn.adapters.methods import CgcLora, CPoly, LoraPerTask, Mhr, MoeLora, Poly, SharedLora
from oneplusn.adapters.methods.budget import budget
from oneplusn.adapters.training.model import ClusterModel
from oneplusn.errors import InvalidRequest
from tolerances import assert_close

TASKS = ("keep", "turn", "drop")
OUTPUT_MIX = [
    LoraPerTask(TASKS, rank=4),
    SharedLora(TASKS, rank=4),
    CgcLora(TASKS, num_common=2, num_own=1, rank=2, own_rank=3),
    CgcLora(TASKS, num_common=1, num_own=2, rank=2, softmax="group", gate_scope="model"),
    CPoly(TASKS, num_common=2, num_own=1, rank=2, borrows={"keep": ("turn",)}),
    MoeLora(TASKS, num_experts=3, rank=2),
    MoeLora(TASKS, num_experts=3, rank=2, gate_scope="site"),
]
FACTOR_MIX = [
    CPoly(TASKS, num_common=2, rank=2, mix="factor", num_splits=2, borrows="all"),
    CPoly(TASKS, num_common=2, num_own=2, rank=2, mix="factor", fixed_own=True),
    Poly(TASKS, num_skills=3, rank=2),
    Mhr(TASKS, num_skills=3, rank=2, num_splits=4),
]
ALL = [*OUTPUT_MIX, *FACTOR_MIX]
CGC = OUTPUT_MIX[2]


def name(value):
    return getattr(value, "name", "")


@pytest.fixture
def base():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.2,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tokens():
    return torch.randint(0, 32, (3, 6), generator=torch.Generator().manual_seed(1))


def cluster(base, method, **options):
    torch.manual_seed(0)
    model = ClusterModel(base, method, find_sites(base), **options)
    with torch.no_grad():
        for parameter in [*model.gate_parameters(), *model.expert_parameters()]:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def assert_same_gradients(actual, expected):
    assert actual.keys() == expected.keys()
    for key in actual:
        assert_close(actual[key], expected[key])


@pytest.mark.parametrize("method", ALL, ids=name)
def test_a_mixed_batch_is_its_rows_one_by_one(base, tokens, method):
    model = cluster(base, method)
    task_ids = torch.tensor([0, 2, 0])
    mixed = model(tokens, task_ids).logits
    alone = [model(tokens[i : i + 1], task_ids[i : i + 1]).logits for i in range(3)]
    assert_close(mixed, torch.cat(alone))


@pytest.mark.parametrize(
    "other",
    [
        lambda: GPT2LMHeadModel(
            GPT2Config(
                vocab_size=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1
            )
        ),
        lambda: OPTForCausalLM(
            OPTConfig(
                vocab_size=32,
                hidden_size=16,
                ffn_dim=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                word_embed_proj_dim=16,
            )
        ),
    ],
    ids=["gpt2, which has Conv1D", "opt, which flattens the batch"],
)
def test_a_mixed_batch_on_another_base(other, tokens):
    model = cluster(other().eval(), CGC)
    task_ids = torch.tensor([0, 2, 0])
    mask = torch.ones_like(tokens)
    mixed = model(tokens, task_ids, attention_mask=mask).logits
    alone = [
        model(tokens[i : i + 1], task_ids[i : i + 1], attention_mask=mask[:1]).logits
        for i in range(3)
    ]
    assert_close(mixed, torch.cat(alone))
    assert not torch.allclose(mixed[0], model.base(tokens[:1], attention_mask=mask[:1]).logits[0])


def test_rows_that_belong_to_nobody_are_refused(base, tokens):
    model = cluster(base, CGC)
    with (
        model.using(torch.tensor([0, 1])),
        pytest.raises(InvalidRequest, match=r"a linear reads \[3, 6, 16\] where the batch has 2"),
    ):
        model.base(tokens)


@pytest.mark.parametrize("method", ALL, ids=name)
def test_the_bundle_computes_what_was_trained(base, tokens, method):
    model = cluster(base, method)
    bundle = model.bundle(base_fingerprint="base:0", dtype=torch.float32, metadata={"a": "b"})
    assert (bundle.method, bundle.tasks, bundle.base) == (method.name, TASKS, "base:0")
    assert bundle.metadata == {"a": "b"}
    with torch.no_grad():
        expected = [model(tokens, torch.tensor([j] * 3)).logits for j in range(3)]
        model.detach()
        bare = {path: base.get_submodule(path).weight.clone() for path in bundle.modules}
        for task, logits in enumerate(expected):
            for path, delta in bundle.modules.items():
                gates = delta.weights[task].repeat_interleave(torch.tensor(delta.ranks))
                merged = bare[path] + (delta.b * gates) @ delta.a
                base.get_submodule(path).weight.copy_(merged)
            assert_close(base(tokens).logits, logits)


@pytest.mark.parametrize("method", [CGC, FACTOR_MIX[3]], ids=name)
def test_packed_sequences_have_the_task_of_each_token(base, tokens, method):
    model = cluster(base, method)
    first, second, third = (tokens[i : i + 1, :n] for i, n in enumerate((4, 6, 2)))
    packed = torch.cat([first, second, third], dim=1)
    positions = torch.cat([torch.arange(n) for n in (4, 6, 2)]).unsqueeze(0)
    task_ids = torch.tensor([[1] * 4 + [0] * 6 + [2] * 2])
    together = model(packed, task_ids, position_ids=positions).logits
    parts = [(first, 1), (second, 0), (third, 2)]
    alone = [model(part, torch.tensor([task])).logits for part, task in parts]
    assert_close(together, torch.cat(alone, dim=1))


def test_the_number_of_operations_does_not_grow_with_the_tasks(base, tokens):
    def operations(num_tasks):
        method = CgcLora(tuple(f"t{i}" for i in range(num_tasks)), num_common=2)
        model = cluster(base, method)
        seen = []

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                seen.append(func)
                return func(*args, **(kwargs or {}))

        task_ids = torch.arange(3) % num_tasks
        with Count():
            model(tokens, task_ids, labels=tokens).loss.backward()
        model.detach()
        return len(seen)

    assert operations(2) == operations(3) == operations(40)


def test_the_base_alone_computes_what_it_did(base, tokens):
    with torch.no_grad():
        expected = base(tokens).logits
        model = cluster(base, CGC).train()
        task_ids = torch.tensor([0, 1, 2])
        inside = model(tokens, task_ids).logits
        assert not torch.allclose(inside, expected)
        assert model.base(tokens).logits.equal(expected)
        with model.using(task_ids):
            assert model.base(tokens).logits.equal(inside)
        model.detach()
        with model.using(task_ids):
            assert base(tokens).logits.equal(expected)
    assert not base.training, "as it was"


def test_an_untrained_cluster_is_the_base(base, tokens):
    model = ClusterModel(base, CGC, find_sites(base))
    assert model(tokens, torch.tensor([0, 1, 2])).logits.equal(model.base(tokens).logits)


@pytest.mark.parametrize("method", ALL, ids=name)
def test_what_learns_is_what_the_budget_counts(base, method):
    model = ClusterModel(base, method, find_sites(base))
    experts, gates = model.expert_parameters(), model.gate_parameters()
    counted = budget(method, model.sites)
    assert sum(p.numel() for p in experts) == counted.experts
    assert sum(p.numel() for p in gates) == counted.gates
    learning = {id(p) for p in model.parameters() if p.requires_grad}
    assert learning == {id(p) for p in [*experts, *gates]}


@pytest.mark.parametrize("method", ALL, ids=name)
def test_every_parameter_gets_a_gradient(base, tokens, method):
    model = cluster(base, method).train()
    model(tokens, torch.tensor([0, 1, 2]), labels=tokens).loss.backward()
    for key, gradient in gradients(model).items():
        assert gradient.any(), key


def test_one_tasks_examples_leave_another_tasks_experts_alone(base, tokens):
    model = cluster(base, CGC)
    model(tokens, torch.tensor([0, 0, 0]), labels=tokens).loss.backward()
    owners = [expert.owner for expert in CGC.experts() for _ in range(expert.rank)]
    for delta in model.deltas:
        for rank_row, owner in enumerate(owners):
            assert bool(delta.a.grad[rank_row].any()) == (owner in (None, "keep"))


@pytest.mark.parametrize("method", [CGC, CPoly(TASKS, noise=True), FACTOR_MIX[3]], ids=name)
def test_checkpointing_changes_no_gradient(base, tokens, method):
    task_ids = torch.tensor([0, 1, 2])
    model = cluster(base, method, dropout=0.2).train()

    def run():
        torch.manual_seed(5)
        model(tokens, task_ids, labels=tokens).loss.backward()
        return gradients(model)

    expected = run()
    model.activation_checkpointing_enable({"use_reentrant": True})
    assert_same_gradients(run(), expected)


def test_a_checkpoint_is_computed_again_under_its_own_tasks(base, tokens):
    model = cluster(base, CGC).train()
    first, second = torch.tensor([0, 1, 2]), torch.tensor([2, 2, 0])
    model(tokens, first, labels=tokens).loss.backward()
    expected = gradients(model)
    model.activation_checkpointing_enable()
    loss = model(tokens, first, labels=tokens).loss
    with torch.no_grad():
        model(tokens, second)
        model.base(tokens)
    loss.backward()
    assert_same_gradients(gradients(model), expected)


def test_autocast_computes_in_bf16_and_rounds_no_gate(base, tokens):
    model = cluster(base, CGC).train()
    task_ids = torch.tensor([0, 1, 2])
    exact = model(tokens, task_ids, labels=tokens).loss
    seen = []
    prepare = model.deltas[0].prepare
    model.deltas[0].prepare = lambda gates: seen.append(gates) or prepare(gates)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(tokens, task_ids, labels=tokens)
    assert output.logits.dtype == torch.bfloat16
    assert torch.stack(seen).equal(torch.stack(model.gate_rows()))
    assert_close(output.loss, exact, dtype=torch.bfloat16)
    output.loss.backward()
    assert {gradient.dtype for gradient in gradients(model).values()} == {torch.float32}


def test_a_base_in_bf16_takes_experts_in_fp32(base, tokens):
    model = cluster(base.bfloat16(), CGC)
    assert {p.dtype for p in model.expert_parameters()} == {torch.float32}
    assert model(tokens, torch.tensor([0, 1, 2])).logits.dtype == torch.bfloat16


def test_dropout_is_the_methods_unless_another_is_given(base, tokens):
    method = replace(CGC, dropout=0.5)
    task_ids = torch.tensor([0, 1, 2])

    def outputs(model):
        return [model(tokens, task_ids).logits for _ in range(2)]

    model = cluster(base, method)
    first, second = outputs(model)
    assert first.equal(second), "none in evaluation"
    first, second = outputs(model.train())
    assert not first.equal(second)
    model.detach()
    first, second = outputs(cluster(base, method, dropout=0.0).train())
    assert first.equal(second)


@pytest.mark.parametrize("method", ALL, ids=name)
def test_a_checkpoint_holds_what_was_trained_and_nothing_else(base, tokens, method):
    model = cluster(base, method)
    task_ids = torch.tensor([0, 1, 2])
    expected = model(tokens, task_ids).logits
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert sum(value.numel() for value in state.values()) == budget(method, model.sites).total
    with torch.no_grad():
        for parameter in [*model.gate_parameters(), *model.expert_parameters()]:
            parameter.normal_()
    assert not torch.allclose(model(tokens, task_ids).logits, expected)
    model.load_state_dict(state)
    assert model(tokens, task_ids).logits.equal(expected)
    del state["deltas.0.a"]
    with pytest.raises(RuntimeError, match=r"deltas\.0\.a"):
        model.load_state_dict(state)


@pytest.mark.parametrize("method", OUTPUT_MIX, ids=name)
def test_a_bundle_can_be_trained_on(base, tokens, method):
    model = cluster(base, method)
    task_ids = torch.tensor([0, 1, 2])
    expected = model(tokens, task_ids).logits
    bundle = model.bundle(base_fingerprint=None, dtype=torch.float32)
    model.detach()
    torch.manual_seed(9)
    fresh = ClusterModel(base, method, find_sites(base)).eval()
    fresh.load_bundle(bundle)
    assert_close(fresh(tokens, task_ids).logits, expected)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (replace(CGC, tasks=("keep", "turn", "fly")), r"tasks are \('keep', 'turn', 'drop'\)"),
        (replace(CGC, num_common=3), "adapter's experts are"),
        (replace(CGC, scale=2.0), "scales"),
        (replace(CGC, gate_scope="model"), r"the gates of cgc-lora come within"),
        (replace(CGC, embedding_dim=1), "the gates of cgc-lora come within"),
        (FACTOR_MIX[2], "an adapter of poly holds mixed factors"),
    ],
    ids=["tasks", "experts", "scale", "one gate for all", "too narrow", "factor mix"],
)
def test_a_bundle_of_another_layout_is_refused(base, method, reason):
    model = cluster(base, CGC)
    bundle = model.bundle(base_fingerprint=None, dtype=torch.float32)
    model.detach()
    with pytest.raises(InvalidRequest, match=reason):
        ClusterModel(base, method, find_sites(base)).load_bundle(bundle)


def test_a_bundle_of_other_modules_is_refused(base):
    model = cluster(base, CGC)
    bundle = model.bundle(base_fingerprint=None, dtype=torch.float32)
    model.detach()
    with pytest.raises(InvalidRequest, match="modules"):
        ClusterModel(base, CGC, find_sites(base)[:1]).load_bundle(bundle)


def test_a_cluster_at_no_linear_is_refused(base):
    with pytest.raises(InvalidRequest, match="no linear of LlamaForCausalLM matches the targets"):
        ClusterModel(base, CGC, [])
