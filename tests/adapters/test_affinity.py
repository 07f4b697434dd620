"""Clustering of tasks: gradients compared, tasks joined, and the command around both."""

from __future__ import annotations

import json
import random
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from oneplusn import demo
from oneplusn.adapters.training.affinity import Affinity, AffinitySettings, task_affinity
from oneplusn.adapters.training.clusters import cluster_tasks
from oneplusn.adapters.training.config import read_clusters
from oneplusn.adapters.training.data import Example, TaskDataset
from oneplusn.adapters.training.gradients import Gradients, Linear, compare
from oneplusn.cli import main
from oneplusn.demo.tasks import TASKS, examples
from oneplusn.demo.tokenizer import END_ID, PAD_ID, build_tokenizer
from oneplusn.errors import InvalidRequest
from tiny_models import tiny_model
from tolerances import assert_close
from training_cases import write_rows

DEMO_BASE = Path(demo.__file__).parent / "data" / "base"
LETTERS = "abcdefghijklmnop"
QUICK = AffinitySettings(steps=10, points=2, batches=4, batch_size=16, progress=False)
LINEAR = Linear(start=0, in_features=6, out_features=5, rank=2)


def flat(a, b):
    return torch.cat([a.flatten(), b.flatten()])


def exact(*tasks):
    """Gradients without noise, each given as A [R, K] and B [N, R]."""
    rows = torch.stack([flat(*task) for task in tasks])
    return Gradients(torch.stack([rows, rows], dim=1), torch.ones(rows.shape[1]))


def one(shape, *places):
    matrix = torch.zeros(shape)
    for place in places:
        matrix[place] = 1.0
    return matrix


A, B = one((2, 6), (0, 1), (1, 2)), one((5, 2), (3, 0))
OTHER_A, OTHER_B = one((2, 6), (0, 4)), one((5, 2), (2, 1))


@pytest.mark.parametrize(
    ("first", "second", "overlap", "direction"),
    [
        ((A, B), (A, B), 1.0, 1.0),
        ((A, B), (-A, -B), 1.0, -1.0),
        ((A, B), (3 * A, 3 * B), 1.0, 1.0),
        ((A, B), (A.flip(0), B.flip(1)), 1.0, 0.0),
        ((A, B), (OTHER_A, OTHER_B), 0.0, 0.0),
        ((A, B), (OTHER_A, B), 1.0, 1 / 6**0.5),
        ((A, B), (A, OTHER_B), 1.0, 2 / 3),
        ((0 * A, B), (0 * A, OTHER_B), 0.0, 0.0),
    ],
    ids=[
        "equal", "opposite", "larger", "rank rows exchanged", "nothing in common",
        "write the same", "read the same", "no gradient at A",
    ],
)  # fmt: skip
def test_two_tasks_are_alike_as_far_as_their_gradients_use_the_same_directions(
    first, second, overlap, direction
):
    found = compare(exact(first, second), [LINEAR])
    assert found.overlap[0, 1].item() == pytest.approx(overlap)
    assert found.direction[0, 1].item() == pytest.approx(direction)


@given(st.integers(0, 2**32), st.integers(2, 6))
def test_overlap_is_a_similarity_that_no_tasks_scale_changes(seed, num_tasks):
    generator = torch.Generator().manual_seed(seed)
    halves = torch.randn(num_tasks, 2, LINEAR.stop, generator=generator)
    variance = torch.rand(LINEAR.stop, generator=generator)
    found = compare(Gradients(halves, variance), [LINEAR])
    assert found.overlap.diagonal().eq(1).all()
    assert_close(found.overlap, found.overlap.T)
    assert 0 <= found.overlap.min() <= found.overlap.max() <= 1
    assert -1 <= found.direction.min() <= found.direction.max() <= 1
    assert -1 <= found.reliability <= 1
    sizes = torch.rand(num_tasks, 1, 1, generator=generator) + 0.5
    scaled = compare(Gradients(halves * sizes, variance), [LINEAR])
    assert_close(scaled.overlap, found.overlap, dtype=torch.float32)
    assert_close(scaled.direction, found.direction, dtype=torch.float32)


@pytest.mark.parametrize(("signal", "reliable"), [(1.0, True), (0.0, False)])
def test_noise_makes_equal_tasks_no_less_alike_and_differences_no_more_certain(signal, reliable):
    torch.manual_seed(0)
    linear = Linear(start=0, in_features=3000, out_features=3000, rank=2)
    common, special = torch.randn(linear.stop), signal * torch.randn(2, 1, 1, linear.stop)
    halves = common + special.expand(2, 2, 2, -1).flatten(0, 1) + torch.randn(4, 2, linear.stop)
    found = compare(Gradients(halves, torch.full((linear.stop,), 2.0)), [linear])
    assert found.overlap[0, 1] > 0.95
    assert (found.overlap[0, 2] < 0.8) == reliable
    assert (found.reliability > 0.3) == reliable
    assert (found.reliability < 0.1) != reliable
    assert (found.significance > 20) == reliable
    assert (found.significance < 3) != reliable


def affinity(matrix, significance=20.0):
    matrix = torch.tensor(matrix, dtype=torch.float64).fill_diagonal_(1.0)
    return Affinity(tuple("abcdef"[: len(matrix)]), matrix, matrix, (0.5,), significance)


def blocks(within, between, sizes=(3, 2)):
    label = torch.tensor([i for i, size in enumerate(sizes) for _ in range(size)])
    matrix = torch.where(label[:, None] == label, within, between)
    return affinity(matrix.tolist())


@pytest.mark.parametrize(
    ("measured", "n", "expected", "reason"),
    [
        (blocks(0.8, 0.2), "auto", ["abc", "de"], "the largest silhouette, 0.75"),
        (blocks(0.8, 0.2), 1, ["abcde"], "as asked for"),
        (blocks(0.8, 0.2), 5, ["a", "b", "c", "d", "e"], "as asked for"),
        (blocks(0.5, 0.5), "auto", ["abcde"], "no split stands out"),
        (blocks(0.5, 0.5), 5, ["a", "b", "c", "d", "e"], "as asked for"),
        (blocks(1.0, 1.0), "auto", ["abcde"], "no split stands out"),
        (replace(blocks(0.8, 0.2), significance=7.9), "auto", ["abcde"], "by 7.9 standard"),
        (blocks(0.9, 0.1, (1, 1)), "auto", ["ab"], "two tasks"),
        (blocks(0.9, 0.1, (1, 1)), 2, ["a", "b"], "as asked for"),
        (blocks(0.9, 0.1, (2, 1)), "auto", ["ab", "c"], "the largest silhouette"),
        (
            affinity([[1, 0.1, 0.9, 0.1], [0.1, 1, 0.1, 0.9]] * 2),
            "auto",
            ["ac", "bd"],
            "the largest silhouette, 0.94",
        ),
    ],
)  # fmt: skip
def test_tasks_are_joined(measured, n, expected, reason):
    found = cluster_tasks(measured, n)
    assert list(found.clusters) == [f"cluster-{i + 1}" for i in range(len(expected))]
    assert ["".join(tasks) for tasks in found.clusters.values()] == expected
    assert reason in found.reason
    assert sorted(found.silhouettes) == list(range(2, len(measured.tasks)))
    merged = int((found.linkage[:, 2] <= found.cut).sum())
    tied = len(set(found.linkage[:, 2])) < len(found.linkage)
    assert tied or merged == len(measured.tasks) - len(expected)


@pytest.mark.parametrize("n", [0, 6])
def test_a_number_of_clusters_that_cannot_be_is_refused(n):
    with pytest.raises(InvalidRequest, match=f"{n} clusters of 5 tasks; give 1 to 5, or auto"):
        cluster_tasks(blocks(0.8, 0.2), n)


def substitution(rng, common, conflict):
    """Vary a substitution of letters: a share of them gets each other's images."""
    own = rng.sample(range(len(LETTERS)), round(conflict * len(LETTERS)))
    images = [common[i] for i in own]
    rng.shuffle(images)
    table = list(common)
    for i, image in zip(own, images, strict=True):
        table[i] = image
    return str.maketrans(LETTERS, "".join(table))


def ciphers(seed, *, families, per_family, conflict, num_rows=64):
    """Plant families of tasks that write a letter as another: examples, and family of each task."""
    rng = random.Random(seed)
    rows, family = [], {}
    for index in range(families):
        common = rng.sample(LETTERS, len(LETTERS))
        for number in range(per_family):
            table = substitution(rng, common, conflict)
            name = f"f{index}-{number}"
            family[name] = index
            letters = rng.choices(LETTERS, k=num_rows)
            rows += [Example(name, letter, letter.translate(table)) for letter in letters]
    return rows, family


def random_base(seed):
    """A base that knows nothing, but tells letters apart."""
    torch.manual_seed(seed)
    return tiny_model(
        "llama",
        vocab_size=264,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=True,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base on the disk."""
    folder = tmp_path_factory.mktemp("base")
    random_base(0).save_pretrained(folder)
    build_tokenizer(folder, 64)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return PreTrainedTokenizerFast.from_pretrained(folder)


def clustered(tokenizer, seed, **planted):
    """Cluster planted tasks in a shuffled order: what was found, and how well it agrees."""
    rows, family = ciphers(seed, **planted)
    tasks = random.Random(seed).sample(list(family), len(family))
    dataset = TaskDataset(rows, tasks, tokenizer, max_tokens=64)
    settings = replace(QUICK, seed=seed)
    measured = task_affinity(random_base(seed), dataset, settings, pad_token_id=PAD_ID)
    found = cluster_tasks(measured, "auto")
    return found, adjusted_rand_score([family[task] for task in tasks], found.labels(tasks))


def test_planted_clusters_are_found_without_their_number(tokenizer):
    planted = {"families": 3, "per_family": 3, "conflict": 0.25}
    scores = [clustered(tokenizer, seed, **planted)[1] for seed in range(3)]
    assert statistics.median(scores) >= 0.9


@pytest.mark.parametrize(
    ("conflict", "reason"), [(0.0, "do not tell the tasks apart"), (1.0, "no split stands out")]
)
def test_tasks_without_groups_are_one_cluster(tokenizer, conflict, reason):
    found, _ = clustered(tokenizer, 0, families=1, per_family=6, conflict=conflict)
    assert len(found.clusters) == 1
    assert reason in found.reason


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(3))
def test_the_demos_tasks_fall_into_their_families(seed):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(DEMO_BASE)
    base = AutoModelForCausalLM.from_pretrained(DEMO_BASE, dtype=torch.float32)
    rows = [Example(task, *pair) for task in TASKS for pair in examples(task, "train", 128, seed)]
    dataset = TaskDataset(rows, list(TASKS), tokenizer, max_tokens=512)
    settings = AffinitySettings(seed=seed, progress=False)
    found = cluster_tasks(task_affinity(base, dataset, settings, pad_token_id=PAD_ID), "auto")
    families = [TASKS[task].cluster for task in TASKS]
    assert adjusted_rand_score(families, found.labels(list(TASKS))) >= 0.9


def test_the_same_seed_measures_the_same_and_leaves_the_base_as_it_was(tokenizer):
    rows, family = ciphers(0, families=1, per_family=3, conflict=0.5)
    dataset = TaskDataset(rows, list(family), tokenizer, max_tokens=64)
    base = random_base(0)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    drawn = torch.get_rng_state()
    first, second = (task_affinity(base, dataset, QUICK, pad_token_id=PAD_ID) for _ in range(2))
    assert torch.get_rng_state().equal(drawn)
    assert first.matrix.equal(second.matrix)
    assert first.reliability == second.reliability
    assert all(tensor.equal(before[name]) for name, tensor in base.state_dict().items())
    assert not any(module._forward_hooks for module in base.modules())


def test_a_loss_that_is_not_finite_names_the_task(tokenizer):
    rows, family = ciphers(0, families=1, per_family=2, conflict=0.5)
    dataset = TaskDataset(rows, list(family), tokenizer, max_tokens=64)
    base = random_base(0).requires_grad_(requires_grad=False)
    base.model.norm.weight.fill_(torch.nan)
    with pytest.raises(InvalidRequest, match="the loss of task 'f0-0' is nan"):
        task_affinity(base, dataset, QUICK, pad_token_id=PAD_ID)


def test_a_task_with_fewer_rows_than_batches_is_refused(tokenizer):
    rows, family = ciphers(0, families=1, per_family=2, conflict=0.5)
    few = [row for row in rows if row.task == "f0-0"] + rows[-3:]
    dataset = TaskDataset(few, list(family), tokenizer, max_tokens=64)
    with pytest.raises(InvalidRequest, match="task 'f0-1' has 3 rows; 4 batches"):
        task_affinity(random_base(0), dataset, QUICK, pad_token_id=PAD_ID)


@pytest.mark.parametrize(
    ("field", "value"),
    [("batches", 1), ("points", 0), ("steps", 0), ("rank", 0), ("learning_rate", 0.0)],
)
def test_settings_have_limits(field, value):
    with pytest.raises(InvalidRequest, match=field):
        AffinitySettings(**{field: value})


@pytest.fixture
def data(tmp_path):
    rows, _ = ciphers(1, families=2, per_family=2, conflict=0.1)
    fields = ("task", "prompt", "completion")
    content = [{name: getattr(row, name) for name in fields} for row in rows]
    return write_rows(tmp_path / "data.jsonl", content)


def cluster(data, base, *arguments):
    quick = ["--steps", "6", "--points", "2", "--batches", "4", "--batch-size", "16", "--quiet"]
    out = data.parent / "out"
    return main(["cluster", str(data), "--base", str(base), "--out", str(out), *quick, *arguments])


def test_the_command_writes_what_train_takes_and_says_why(data, folder, capsys):
    assert cluster(data, folder) == 0
    out = data.parent / "out"
    expected = {"cluster-1": ["f0-0", "f0-1"], "cluster-2": ["f1-0", "f1-1"]}
    assert read_clusters(out / "clusters.yaml") == expected
    said = capsys.readouterr().out
    assert "cluster-1: f0-0, f0-1\n    affinity within 0." in said
    assert "number of clusters 2: the largest silhouette" in said
    record = json.loads((out / "affinity.json").read_text())
    assert record["clusters"] == expected
    assert record["settings"]["steps"] == 6
    assert (out / "affinity.png").read_bytes().startswith(b"\x89PNG")
    assert cluster(data, folder) == 2, "clusters that may have been edited are kept"
    assert "exists and may have been edited" in capsys.readouterr().err


def test_the_command_takes_some_tasks_and_a_number(data, folder):
    assert cluster(data, folder, "--tasks", "f1-0", "f0-0", "f1-1", "--n", "3") == 0
    clusters = read_clusters(data.parent / "out" / "clusters.yaml")
    assert list(clusters.values()) == [["f1-0"], ["f0-0"], ["f1-1"]]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--tasks", "f0-0"], "one task ('f0-0') has nothing to be compared with"),
        (["--tasks", "f0-0", "f9"], "task 'f9' has no rows in"),
        (["--tasks", "f0-0", "f9"], "it has 'f0-0, f0-1, f1-0, f1-1'"),
        (["--n", "5"], "--n 5: there are 4 tasks; give 1 to 4, or auto"),
        (["--n", "0"], "--n 0: there are 4 tasks"),
        (["--examples", "0"], "--examples 0: give at least 1"),
        (["--examples", "3"], "has 3 rows; 4 batches"),
        (["--batches", "1"], "batches 1: give at least 2"),
        (["--targets", "nothing"], "target 'nothing' matches no linear"),
    ],
)  # fmt: skip
def test_the_command_refuses_in_one_line(data, folder, arguments, reason, capsys):
    assert cluster(data, folder, *arguments) == 2
    assert reason in capsys.readouterr().err
    assert not (data.parent / "out").exists()


@pytest.mark.parametrize(
    ("content", "reason"), [("", "has no rows"), (None, "cannot be read")], ids=["empty", "missing"]
)
def test_data_that_is_not_there_is_refused(tmp_path, folder, content, reason, capsys):
    path = tmp_path / "nothing.jsonl"
    if content is not None:
        path.write_text(content)
    assert cluster(path, folder) == 2
    assert reason in capsys.readouterr().err
