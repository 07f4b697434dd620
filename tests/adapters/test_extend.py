"""Edits that learn: a task joins a cluster and disturbs nobody, a blend is copied into one LoRA."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import pytest
import torch

from oneplusn.adapters.attach import find_sites
from oneplusn.adapters.bundle import Expert
from oneplusn.adapters.distil import blend_factors, distil
from oneplusn.adapters.edits import blended_gates
from oneplusn.adapters.files import read_adapter, write_bundle
from oneplusn.adapters.fingerprint import base_fingerprint
from oneplusn.adapters.training import edit_cli
from oneplusn.adapters.training.extend import NewTask, learn_task, refine
from oneplusn.adapters.training.rows import FitSettings, Fitting, LowRankDelta, added
from oneplusn.demo.tokenizer import END_ID, build_tokenizer
from oneplusn.errors import (
    AdapterExists,
    AdapterIncompatible,
    AdapterNotFound,
    ConfigError,
    InvalidRequest,
)
from oneplusn.server.engine.llm import Engine
from random_bundles import make_bundle, shapes_of
from tiny_engines import Job, cluster, record_logits, run, tiny_engine
from tiny_models import VOCAB, tiny_model

QUICK = FitSettings(steps=40, batch_size=8, learning_rate=1e-2, progress=False)
TRUTH = {"a": 0.7, "c": -0.4}
PROMPT_TOKENS = 4
MIB = 2**20


@pytest.fixture(scope="module")
def base():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def bundle(base):
    """Two common experts and an own one for each of two tasks, at every linear."""
    return cluster(base, ["up", "down"], common=(2, 1), seed=1)


@pytest.fixture(scope="module")
def loras(base):
    """Four tasks with one expert each and nothing in common."""
    return make_bundle(shapes_of(find_sites(base)), seed=1, tasks=["a", "b", "c", "d"])


def examples(tokens):
    """Rows of token ids as encoded examples of one task."""
    return [
        {
            "input_ids": row,
            "labels": [-100] * PROMPT_TOKENS + row[PROMPT_TOKENS:],
            "task_ids": 0,
        }
        for row in tokens.tolist()
    ]


def random_examples(count=8, length=8):
    draw = torch.Generator().manual_seed(3)
    return examples(torch.randint(2, VOCAB, (count, length), generator=draw))


@torch.no_grad()
def answers_of(base, bundle, weights, *, count, length):
    """Draw completions from what a blend predicts."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (count, PROMPT_TOKENS), generator=draw)
    with added(base, lora_deltas(bundle, weights)):
        for _ in range(length):
            chances = base(tokens).logits[:, -1].softmax(-1)
            tokens = torch.cat([tokens, chances.multinomial(1, generator=draw)], dim=1)
    return examples(tokens)


def lora_deltas(bundle, weights):
    factors = blend_factors(bundle, weights)
    return {path: LowRankDelta(pair.a, pair.b) for path, pair in factors.items()}


def loss_with(base, deltas, dataset):
    def loss(batch):
        with added(base, deltas):
            return base(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).loss

    return Fitting(base, dataset, QUICK, 0).mean(loss)


def test_a_task_is_learned_and_the_others_stay(base, bundle):
    task = NewTask("new", rank=3)
    learned = learn_task(base, bundle, task, random_examples(), QUICK, pad_token_id=0)
    assert learned.after < 0.5 * learned.before
    made = learned.bundle
    assert made.tasks == ("up", "down", "new")
    assert made.experts == (*bundle.experts, Expert("new", "own", "new", 3))
    for old in bundle.tasks:
        assert made.task_digest(old) == bundle.task_digest(old)
    gated = dict(
        zip((expert.name for expert in made.experts), made.gated[-1].tolist(), strict=True)
    )
    assert gated == {"c0": True, "c1": True, "own-up": False, "own-down": False, "new": True}
    for path, delta in made.modules.items():
        before = bundle.modules[path]
        assert delta.a[: len(before.a)].equal(before.a)
        assert delta.b[:, : before.b.shape[1]].equal(before.b)
        assert delta.gate[:2, :4].equal(before.gate)
    deltas = lora_deltas(made, {"new": 1.0})
    assert loss_with(base, deltas, random_examples()) == pytest.approx(learned.after, rel=1e-5)
    again = learn_task(base, bundle, task, random_examples(), QUICK, pad_token_id=0)
    assert again.bundle.digest == made.digest, "the same seed gives the same bundle"


def test_siblings_share_the_gates_that_they_learn(base, bundle):
    learned = learn_task(
        base, bundle, NewTask("new"), random_examples(), QUICK, pad_token_id=0
    ).bundle
    rows = {path: delta.gate[-1] for path, delta in learned.modules.items()}
    for site in find_sites(base):
        for path in site.modules[1:]:
            assert rows[path].equal(rows[site.modules[0]])
    assert len({tuple(row.tolist()) for row in rows.values()}) == len(find_sites(base))


def test_others_answer_the_same_bits_and_reuse_their_prefix(base, bundle, monkeypatch):
    made = learn_task(base, bundle, NewTask("new"), random_examples(), QUICK, pad_token_id=0).bundle
    prompt = tuple(range(2, 50))
    engine = tiny_engine(bundles=[bundle])
    logits = record_logits(engine, monkeypatch)
    before, after = {}, {}
    for version, found in ((bundle, before), (made, after)):
        if version is made:
            engine.load(made)
        for task in bundle.tasks:
            (answer,), _ = run(engine, [Job(prompt, ((version, task),))])
            found[task] = (answer, torch.stack(logits.pop("0")))
    for task in bundle.tasks:
        assert after[task][1].equal(before[task][1])
        assert (before[task][0].cached_tokens, after[task][0].cached_tokens) == (0, 32)
    fresh = tiny_engine(bundles=[made])
    logits = record_logits(fresh, monkeypatch)
    for task in bundle.tasks:
        run(fresh, [Job(prompt, ((made, task),))])
        assert torch.stack(logits.pop("0")).equal(before[task][1])
    engine.close()
    fresh.close()


def test_gates_alone_find_a_task_that_is_a_blend(base, loras):
    data = answers_of(base, loras, TRUTH, count=64, length=24)
    settings = replace(QUICK, steps=100, batch_size=16, gate_learning_rate=3e-2)
    task = NewTask("new", rank=None, gate_scope="model", max_experts=2)
    learned = learn_task(base, loras, task, data, settings, pad_token_id=0)
    made = learned.bundle
    assert made.experts == loras.experts
    truth = blended_gates(loras, TRUTH)
    for path, delta in made.modules.items():
        found = delta.gate[-1]
        assert found.nonzero().tolist() == truth[path].nonzero().tolist()
        assert (found - truth[path]).norm() < 0.1 * truth[path].norm()
    # The examples are a sample, which the best row fits a little better than the true one.
    assert learned.after < loss_with(base, lora_deltas(loras, TRUTH), data) < learned.before


def test_gates_start_at_the_blend_asked_for_or_at_the_mean(base, loras):
    still = replace(QUICK, steps=1, gate_learning_rate=1e-12)
    for start, expected in ((TRUTH, TRUTH), (None, dict.fromkeys(loras.tasks, 0.25))):
        task = NewTask("new", rank=None, start=start)
        made = learn_task(base, loras, task, random_examples(), still, pad_token_id=0).bundle
        for path, row in blended_gates(loras, expected).items():
            torch.testing.assert_close(made.modules[path].gate[-1], row)


@pytest.mark.parametrize(
    ("task", "gated"),
    [
        (NewTask("new", experts=["c1", "own-up"]), ["c1", "own-up", "new"]),
        (NewTask("new", start={"down": 1.0}), ["c0", "c1", "own-down", "new"]),
        (NewTask("new", rank=None), ["c0", "c1", "own-up", "own-down"]),
        (NewTask("new", experts=[]), ["new"]),
    ],
    ids=["named", "those of its start", "all without an own one", "none but its own"],
)
def test_which_experts_a_new_task_gates(base, bundle, task, gated):
    short = replace(QUICK, steps=2)
    made = learn_task(base, bundle, task, random_examples(), short, pad_token_id=0).bundle
    used = made.gated[-1].tolist()
    assert [e.name for e, is_used in zip(made.experts, used, strict=True) if is_used] == gated


def other_shapes(base):
    shapes = {
        path: (inputs, outputs + 1)
        for path, (inputs, outputs) in shapes_of(find_sites(base)).items()
    }
    return make_bundle(shapes, seed=0, tasks=["up"])


REFUSED = {
    "a name that is taken": (
        lambda base, bundle: (bundle, NewTask("up"), random_examples()),
        AdapterExists,
        "'up' already",
    ),
    "no examples": (
        lambda base, bundle: (bundle, NewTask("new"), []),
        InvalidRequest,
        "no examples",
    ),
    "an unknown expert": (
        lambda base, bundle: (bundle, NewTask("new", experts=["c9"]), random_examples()),
        InvalidRequest,
        "no expert 'c9' in this adapter; it has 'c0, c1, own-up, own-down'",
    ),
    "nothing to learn": (
        lambda base, bundle: (bundle, NewTask("new", rank=None, experts=[]), random_examples()),
        InvalidRequest,
        "none that it may gate",
    ),
    "an unknown start": (
        lambda base, bundle: (bundle, NewTask("new", start={"left": 1.0}), random_examples()),
        AdapterNotFound,
        "'left'",
    ),
    "another base": (
        lambda base, bundle: (replace(bundle, base="base:1"), NewTask("new"), random_examples()),
        AdapterIncompatible,
        "trained on base:1 and this base is base:2",
    ),
    "other shapes": (
        lambda base, bundle: (other_shapes(base), NewTask("new"), random_examples()),
        AdapterIncompatible,
        "32 -> 33 in the adapter and 32 -> 32 in this base",
    ),
    "other modules": (
        lambda base, bundle: (
            make_bundle({"layers.9.proj": (4, 4)}, seed=0),
            NewTask("new"),
            random_examples(),
        ),
        AdapterIncompatible,
        "no linear in this base",
    ),
}


@pytest.mark.parametrize(("make", "error", "says"), REFUSED.values(), ids=REFUSED)
def test_bad_additions_are_refused_before_the_first_step(base, bundle, make, error, says):
    cluster, task, data = make(base, bundle)
    with pytest.raises(error) as refusal:
        learn_task(base, cluster, task, data, QUICK, pad_token_id=0, base_fingerprint="base:2")
    assert says in str(refusal.value)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: NewTask("new", rank=0), "rank 0"),
        (lambda: NewTask("new", max_experts=0), "max_experts 0"),
        (lambda: NewTask("new", gate_scope="token"), "'token': it is 'site' or 'model'"),
        (lambda: FitSettings(steps=0), "steps 0"),
        (lambda: FitSettings(learning_rate=float("nan")), "learning_rate nan"),
    ],
    ids=["rank", "experts", "scope", "steps", "rate"],
)
def test_bad_numbers_are_refused(make, says):
    with pytest.raises(InvalidRequest, match=says):
        make()


def test_a_loss_that_is_not_finite_stops_the_learning(base, bundle):
    wild = replace(QUICK, learning_rate=1e30)
    with pytest.raises(InvalidRequest, match=r"the loss is (nan|inf) at step \d+; lower the rates"):
        learn_task(base, bundle, NewTask("new"), random_examples(), wild, pad_token_id=0)


def test_a_cut_comes_closer_to_its_blend_on_examples(base, loras):
    cut = distil(loras, TRUTH, task="one", rank=2)
    data = answers_of(base, loras, TRUTH, count=16, length=8)
    settings = replace(QUICK, learning_rate=1e-3, steps=30)
    refined = refine(base, loras, TRUTH, cut, data, settings, pad_token_id=0)
    assert 0 < refined.after < 0.7 * refined.before
    assert refined.distilled.bundle.tasks == ("one",)
    for path, error in refined.distilled.errors.items():
        assert error >= cut.errors[path], "no factors are nearer in weights than the cut"
    exact = distil(loras, TRUTH, task="one")
    kept = refine(base, loras, TRUTH, exact, data, settings, pad_token_id=0)
    assert kept.distilled is exact, "what cannot come closer stays as it is"


# From the command line to an answer: a base with a tokenizer, and a cluster for it.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edits")
    model = tiny_model("llama", vocab_size=259, eos_token_id=END_ID)
    model.save_pretrained(folder / "base")
    build_tokenizer(folder / "base", 256)
    made = cluster(model, ["up", "down"], common=(2,), seed=1)
    write_bundle(replace(made, base=base_fingerprint(folder / "base")), folder / "pair")
    rows = [
        {"task": "spell", "prompt": prompt, "completion": completion}
        for prompt, completion in (("one", "eno"), ("two", "owt"), ("six", "xis"), ("ten", "net"))
    ]
    write_lines(folder / "data.jsonl", [*rows, {"task": "x", "prompt": "a", "completion": "b"}])
    return folder


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def edit(*arguments):
    parser = argparse.ArgumentParser()
    edit_cli.declare(parser)
    return edit_cli.run(parser.parse_args([str(argument) for argument in arguments]))


def test_an_added_task_is_served_beside_the_old_ones(folder, capsys):
    learning = ("--data", folder / "data.jsonl", "--model", folder / "base", "--no-progress")
    rates = ("--rank", 8, "--steps", 80, "--learning-rate", 2e-2, "--clip", 1)
    edit("add-task", folder / "pair", "spell", *learning, *rates, "--out", folder / "three")
    assert "tasks unchanged: up, down" in capsys.readouterr().out
    answers = {}
    for name in ("pair", "three"):
        limits = {"kv_memory": 4 * MIB, "adapter_memory": 16 * MIB, "threads": 1}
        with Engine(folder / "base", adapters={"words": folder / name}, **limits) as engine:
            asked = ["up", "down"] + ["spell"] * 3 * (name == "three")
            texts = engine.generate(
                ["one", "two", "one", "two", "six"][: len(asked)], tasks=asked, max_tokens=6
            )
            answers[name] = [completion.text for completion in texts]
    assert answers["three"][:2] == answers["pair"]
    assert answers["three"][2:] == ["eno", "owt", "xis"]


def test_a_blend_is_distilled_on_examples_from_the_command_line(folder, capsys):
    edit(
        *("distil", folder / "pair", "both", "--blend", "up", "down=-1", "--rank", 2),
        *("--data", folder / "data.jsonl", "--model", folder / "base", "--no-progress"),
        *("--steps", 5, "--learning-rate", 1e-4, "--out", folder / "both"),
    )
    said = capsys.readouterr().out
    assert "KL from the blend per completion token" in said
    assert "q_proj rank 2: " in said
    assert read_adapter(folder / "both", name="both").tasks == ("both",)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (("--data", "data.jsonl"), ConfigError, "--data needs --model"),
        (("--data", "none.jsonl", "--model", "base"), ConfigError, "none.jsonl cannot be read"),
        (("--data", "data.jsonl", "--model", "pair"), ConfigError, "is no model"),
        (
            ("--data", "empty.jsonl", "--model", "base"),
            InvalidRequest,
            "no example of task 'new'; it has examples of 'none'",
        ),
        (
            ("--data", "data.jsonl", "--model", "base"),
            InvalidRequest,
            "no example of task 'new'; it has examples of 'spell, x'",
        ),
    ],
    ids=["no base", "no file", "no model", "no example at all", "no example of it"],
)
def test_what_the_command_line_cannot_learn_from(folder, monkeypatch, arguments, error, says):
    monkeypatch.chdir(folder)
    write_lines(folder / "empty.jsonl", [])
    with pytest.raises(error, match=says):
        edit("add-task", "pair", "new", *arguments, "--no-progress", "--out", "refused")
    assert not (folder / "refused").exists()


def test_an_adapter_of_another_base_is_refused(folder):
    stranger = replace(read_adapter(folder / "pair", name="pair"), base="base:other")
    write_bundle(stranger, folder / "stranger")
    with pytest.raises(AdapterIncompatible, match="trained on base:other"):
        edit(
            *("add-task", folder / "stranger", "new", "--data", folder / "data.jsonl"),
            *("--model", folder / "base", "--out", folder / "refused"),
        )
