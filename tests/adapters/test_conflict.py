"""A small E1: where tasks partly disagree, gates beat one LoRA for all and one for each.

And what the experiments' figures mean, and that a grid goes on where it was.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from types import ModuleType

import pytest
import torch

from oneplusn.adapters.bundle import Expert
from oneplusn.adapters.files import write_bundle
from oneplusn.server.engine.llm import Engine

ROOT = Path(__file__).parents[2]
SEEDS = (0, 1, 2)
MARGIN = 0.1


@pytest.fixture(scope="module")
def experiments():
    """Import the folder beside the package; the root itself must not be on the path."""
    spec = importlib.util.spec_from_file_location(
        "experiments", ROOT / "experiments" / "__init__.py"
    )
    sys.modules["experiments"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["experiments"])
    yield importlib.import_module("experiments.e1"), importlib.import_module("experiments.run")
    for name in [name for name in sys.modules if name.partition(".")[0] == "experiments"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def bed(experiments) -> ModuleType:
    return sys.modules["experiments.bed"]


@pytest.fixture(scope="module")
def base(bed, tmp_path_factory):
    """A base that can only copy takes a third of the time, and copying is no part of the claim."""
    torch.set_num_threads(1)
    settings = bed.Pretraining(arrangements=("copy",), steps=220)
    folder = bed.make_base(tmp_path_factory.mktemp("base") / "base", settings, progress=False)
    model, _ = bed.load_base(folder)
    assert bed.base_accuracy(model, "copy") > 0.99
    return folder


@pytest.fixture(scope="module")
def trained(experiments, base):
    """Method -> bundle and outcome by seed: a conflict of 0.4, all of 12 rank rows, equal rates.

    The experiment's own recipe, with rates that rise over 30 % of the steps: no seed collapses.
    """
    e1, run = experiments
    found = {}
    for each in e1.settings(0.4):
        if each.label in (e1.SHARED, e1.OWN, e1.MOE, e1.CGC):
            options = {**each.options, "arrangement": "copy"}
            small = replace(each, options=options, examples=8, steps=80)
            found[each.method] = [run.execute(small.at(1.6e-2, 2e-2, seed), base) for seed in SEEDS]
    return found


def test_methods_of_equal_size(trained):
    sizes = [sum(outcome.parameters) for runs in trained.values() for _, outcome in runs]
    assert max(sizes) < 1.05 * min(sizes)


@pytest.mark.parametrize("value", ["mean", "worst"])
@pytest.mark.parametrize("plain", ["shared-lora", "lora"])
@pytest.mark.parametrize("gated", ["moelora", "cgc-lora"])
def test_gated_experts_beat_one_lora_for_all_tasks_and_one_for_each(trained, gated, plain, value):
    def over_seeds(method):
        return fmean(getattr(outcome, value) for _, outcome in trained[method])

    assert over_seeds(gated) > over_seeds(plain) + MARGIN


def test_the_accuracy_is_that_of_what_is_served(experiments, trained, bed, base, tmp_path):
    """Letter by letter after the right ones before it, as it is counted."""
    bundle, outcome = trained["cgc-lora"][0]
    write_bundle(bundle, tmp_path / "cluster")
    tasks = outcome.run.family_tasks()
    model, tokenizer = bed.load_base(base)
    data = bed.encode(bed.draw(tasks, 8, split="test", seed=0), tasks, tokenizer)
    prompt = len(data[0]["input_ids"]) - bed.LENGTH - 1
    asked = [(row, prompt + place) for row in data for place in range(bed.LENGTH)]
    with Engine(base, adapters={"cluster": tmp_path / "cluster"}, threads=1) as engine:
        answers = engine.generate(
            [row["input_ids"][:end] for row, end in asked],
            tasks=[tasks[row["task_ids"]].name for row, _ in asked],
            max_tokens=1,
        )
    served = dict.fromkeys(bundle.tasks, 0.0)
    for answer, (row, end) in zip(answers, asked, strict=True):
        right = answer.token_ids == [row["input_ids"][end]]
        served[answer.task] += right / (8 * bed.LENGTH)
    score = importlib.import_module("experiments.score")
    counted = score.accuracies(model, bundle, data, pad_token_id=model.config.pad_token_id)
    assert served == pytest.approx(counted, abs=1 / (8 * bed.LENGTH))


EXPERTS = (
    *(Expert(f"common-{i}", "common", None, 1) for i in range(2)),
    *(Expert(f"{task}-0", "own", task, 1) for task in ("a", "b", "c", "d")),
)


def test_the_planted_partition_is_found_in_gate_rows(experiments):
    score = importlib.import_module("experiments.score")
    rows = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8]])
    assert score.agreement([rows, rows], ["x", "x", "y", "y"]) == 1
    assert score.agreement([rows], ["x", "y", "x", "y"]) < 0
    assert score.agreement([torch.eye(4)], ["x", "x", "y", "y"]) is None
    assert score.agreement([rows], ["x"] * 4) is None


def test_entropy_and_borrowing(experiments):
    score = importlib.import_module("experiments.score")
    own = torch.eye(4)
    own[0, 1] = -1.0  # a takes away as much of b's skill as b adds
    even = torch.cat([torch.full((4, 2), 0.5), own], dim=1)
    single = torch.cat([torch.tensor([[1.0, 0.0]] * 4), torch.eye(4)], dim=1)
    assert score.common_entropy(EXPERTS, [even]) == pytest.approx(1)
    assert score.common_entropy(EXPERTS, [single]) == pytest.approx(0)
    assert score.common_entropy(EXPERTS[2:], [own]) is None
    assert score.borrowed_mass("abcd", EXPERTS, [even]) == pytest.approx(1 / 5)
    assert score.borrowed_mass("abcd", EXPERTS, [single]) == 0
    assert score.borrowed_mass("abcd", EXPERTS[:2], [even[:, :2]]) is None


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ([0.1, 0.2, 0.02], "better in all 3 seeds"),
        ([-0.1, -0.2], "worse in all 2 seeds"),
        ([0.1, -0.2], "the sign depends on the seed"),
        ([0.004, 0.003], "no difference"),
    ],
)
def test_a_difference_is_one_in_every_seed(experiments, differences, words):
    assert words in importlib.import_module("experiments.report").verdict(differences)


@pytest.fixture
def grid(experiments, tmp_path, monkeypatch):
    """A grid whose runs take no time, and the runs that it did; accuracy is the experts' rate."""
    run = experiments[1]
    module = importlib.import_module("experiments.grid")
    ran = []

    def outcome(fields):
        done = run.Run(**fields)
        ran.append((done.label, done.rate, done.gate_rate, done.seed))
        found = {"a": done.rate + done.gate_rate / 100}
        made = run.Outcome(done, (1, 2), found, found, None, None, None, 0.1)
        return json.dumps(asdict(made)) + "\n"

    def process(self, module, arguments, text):
        yield from map(outcome, json.loads(text))

    monkeypatch.setattr(module.Grid, "process", process)
    return module, tmp_path / "e1.jsonl", ran


def plan_of(module, e1, label, seeds, tuned_on):
    pairs = [module.Rates(*pair) for pair in ((1e-3, 0.1), (1e-3, 0.2), (1e-2, 0.1), (1e-2, 0.2))]
    chosen = [each for each in e1.settings(0.0) if each.label == label]
    return module.Plan("E1", chosen, pairs, seeds, tuned_on)


def test_an_interrupted_grid_goes_on_where_it_was(experiments, grid, tmp_path):
    e1 = experiments[0]
    module, results, ran = grid
    plan = plan_of(module, e1, e1.OWN, seeds=(0, 1), tuned_on=2)
    plan.execute(module.Grid(results, tmp_path))
    expected = [(e1.OWN, rate, 0.1, seed) for rate in (1e-3, 1e-2) for seed in (0, 1)]
    assert ran == expected, "what has no gates takes each rate of the experts once"
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join(lines[:3]))
    ran.clear()
    again = module.Grid(results, tmp_path)
    plan.execute(again)
    assert ran == expected[3:]
    best, tried = plan.finished(again)
    assert [(o.run.label, o.run.rate, o.run.gate_rate, o.run.seed) for o in best] == expected[2:]
    assert len(tried) == 4


def test_rates_are_chosen_by_the_first_seeds(experiments, grid, tmp_path):
    e1 = experiments[0]
    module, results, ran = grid
    plan = plan_of(module, e1, e1.CGC, seeds=(0, 1, 2), tuned_on=1)
    plan.execute(module.Grid(results, tmp_path))
    first = [(e1.CGC, rate, gate, 0) for rate in (1e-3, 1e-2) for gate in (0.1, 0.2)]
    assert ran == [*first, (e1.CGC, 1e-2, 0.2, 1), (e1.CGC, 1e-2, 0.2, 2)]
