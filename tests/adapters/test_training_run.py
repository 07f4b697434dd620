"""One run from a configuration to a bundle: what it leaves, and that nothing of it is lost."""

from __future__ import annotations

import gc
import os
import signal

import pytest
import torch
from transformers import TrainerCallback, TrainerState

from oneplusn.adapters.files import read_adapter
from oneplusn.adapters.training.checkpoints import best_checkpoint, whole_checkpoints
from oneplusn.adapters.training.record import TrainingRecord
from oneplusn.adapters.training.run import Options, run
from oneplusn.errors import AdapterInvalid, InvalidRequest
from training_cases import TASKS, config, killed, row, rows, save_base, write_rows

QUIET = {"say": lambda line: None}

pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture(scope="module", autouse=True)
def settled_heap():
    """The Trainer collects garbage when it starts: not among what the libraries have loaded."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def no_plots(monkeypatch):
    """Leave out what has tests of its own and takes seconds."""
    monkeypatch.setattr(
        "oneplusn.adapters.training.report.write_report", lambda folder, *_: folder / "report.md"
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def folder(tmp_path, base):
    (tmp_path / "base").symlink_to(base)
    write_rows(tmp_path / "train.jsonl", rows())
    write_rows(tmp_path / "validation.jsonl", rows(["fc", "ga"]))
    return tmp_path


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            self.action(control)


class Forbidden(TrainerCallback):
    """Fails the test at the first step."""

    def on_step_begin(self, args, state, control, **_):
        pytest.fail(f"step {state.global_step + 1} was begun")


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_leaves_a_bundle_a_record_and_its_checkpoints(folder):
    said = []
    done = run(config(folder), Options(say=said.append))
    out = folder / "runs" / "tiny"
    assert [(d.name, d.bundle) for d in done] == [("tiny", out / "bundle")]
    bundle = read_adapter(out / "bundle", name="tiny")
    assert (bundle.digest, bundle.tasks, bundle.method) == (done[0].digest, TASKS, "cgc-lora")
    assert bundle.base is not None
    record = TrainingRecord.load(out / "record.json")
    assert record.tasks == TASKS
    assert set(record.metrics["turn"]) == {
        *("loss", "exact_match", "base_loss", "base_exact_match")
    }
    assert record.metrics["turn"]["loss"] < record.metrics["turn"]["base_loss"]
    steps = [entry["step"] for entry in record.history if "eval_turn_loss" in entry]
    assert steps == [4, 8, 12]
    assert any("keep_loss" in entry for entry in record.history)
    assert [c.step for c in whole_checkpoints(out / "checkpoints")] == [8, 12]
    parameters = sum(d.a.numel() + d.b.numel() for d in bundle.modules.values())
    assert record.parameters.experts == parameters
    assert f"tiny: {record.parameters.total:,} parameters" in said[0]


def test_a_dry_run_says_the_parameters_and_writes_nothing(folder):
    said = []
    assert run(config(folder), Options(dry_run=True, say=said.append)) == []
    assert "parameters" in said[0]
    assert not (folder / "runs").exists()


# Everything that draws random numbers or keeps a state, at once.
DEMANDING = {
    "method": {
        "name": "c-poly",
        "num_common": 2,
        "rank": 2,
        "noise": True,
        "dropout": 0.1,
    },
    "training": {"accumulate": 2, "packing": 24, "temperature": 2.0, "batch_size": 1},
}


UNEQUAL = [*rows(), *rows(tasks=["keep"])]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "base").symlink_to(base)
    write_rows(folder / "train.jsonl", UNEQUAL)
    write_rows(folder / "validation.jsonl", rows(["fc", "ga"]))
    done = run(config(folder, **DEMANDING), Options(**QUIET))[0]
    assert (done.bundle.parent / "report.md").read_text().startswith("# Training report: c-poly")
    return done.digest


@pytest.mark.parametrize("place", ["between steps", "inside a checkpoint", "inside the first"])
def test_a_killed_and_resumed_run_ends_with_the_same_bits(
    folder, uninterrupted, place, monkeypatch
):
    write_rows(folder / "train.jsonl", UNEQUAL)

    def doomed():
        if place == "between steps":
            return run(config(folder, **DEMANDING), Options(callbacks=[At(6, kill)], **QUIET))
        fatal = 8 if place == "inside a checkpoint" else 4
        save = TrainerState.save_to_json
        monkeypatch.setattr(
            TrainerState,
            "save_to_json",
            lambda self, path: kill() if self.global_step == fatal else save(self, path),
        )
        return run(config(folder, **DEMANDING), Options(**QUIET))

    assert killed(doomed) == signal.SIGKILL
    out = folder / "runs" / "tiny"
    assert not (out / "bundle").exists()
    left = 0 if place == "inside the first" else 1
    assert len(whole_checkpoints(out / "checkpoints")) == left
    done = run(config(folder, **DEMANDING), Options(resume=True, **QUIET))
    assert done[0].digest == uninterrupted


def test_a_finished_run_is_resumed_without_a_step(folder):
    digest = run(config(folder), Options(**QUIET))[0].digest
    again = run(config(folder), Options(resume=True, callbacks=[Forbidden()], **QUIET))
    assert again[0].digest == digest


@pytest.mark.parametrize(
    ("changes", "data", "reason"),
    [
        ({}, None, "holds an earlier run; --resume goes on"),
        ({"training": {"seed": 1}}, None, "other settings: training.seed;"),
        ({"bundle_dtype": "bfloat16"}, None, "other settings: bundle_dtype;"),
        ({}, rows(["ab"]), "other settings: the examples;"),
    ],
    ids=["not asked to", "a seed", "a dtype", "data"],
)
def test_a_run_goes_on_only_as_what_it_was(folder, changes, data, reason):
    run(config(folder, training={"steps": 1}), Options(**QUIET))
    if data:
        write_rows(folder / "train.jsonl", data)
    training = {"steps": 1} | changes.pop("training", {})
    resume = "earlier" not in reason
    with pytest.raises(InvalidRequest, match=reason):
        run(config(folder, training=training, **changes), Options(resume=resume, **QUIET))


def test_a_folder_with_a_bundle_of_something_else_is_left_alone(folder):
    (folder / "runs" / "tiny" / "bundle").mkdir(parents=True)
    with pytest.raises(InvalidRequest, match="a bundle of something else; choose another"):
        run(config(folder), Options(resume=True, **QUIET))


def test_a_stuck_validation_ends_the_run_with_its_best(folder, monkeypatch):
    # Validated on the contrary of what is trained, every step makes it worse.
    wrong = [{**each, "completion": "zz"} for each in rows(["ab", "cd"])]
    write_rows(folder / "validation.jsonl", wrong)
    settings = {"patience": 2, "checkpoint_every": 1, "steps": 40, "warmup": 0.0}
    settings = config(folder, training=settings)
    with monkeypatch.context() as patched:
        patched.setattr("oneplusn.adapters.training.run.write_bundle", kill)
        assert killed(lambda: run(settings, Options(**QUIET))) == signal.SIGKILL
    out = folder / "runs" / "tiny"
    history = TrainingRecord.load(out / "record.json").history
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(losses) < 40
    assert len(losses) - 1 - losses.index(min(losses)) == 2
    best = best_checkpoint(out / "checkpoints")
    assert best.step == losses.index(min(losses)) + 1
    # Resumed, it knows that it was over, and takes no further step.
    run(settings, Options(resume=True, callbacks=[Forbidden()], **QUIET))
    trained = read_adapter(out / "bundle", name="tiny").modules["model.layers.0.self_attn.q_proj"]
    assert any(torch.equal(trained.a, tensor) for tensor in best.weights().values())


def test_a_stopped_run_is_finished_from_its_best_checkpoint(folder):
    with pytest.raises(InvalidRequest, match="no run to finish; train first"):
        run(config(folder), Options(finish=True, **QUIET))
    assert killed(lambda: run(config(folder), Options(callbacks=[At(6, kill)], **QUIET)))
    done = run(config(folder), Options(finish=True, callbacks=[Forbidden()], **QUIET))
    assert read_adapter(done[0].bundle, name="tiny").digest == done[0].digest


def test_a_loss_that_is_not_finite_names_its_task_and_keeps_the_last_checkpoint(folder, base):
    broken = save_base(folder / "broken")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.get_input_embeddings().weight[ord("z")] = float("nan")
    model.save_pretrained(broken)
    write_rows(folder / "train.jsonl", [*rows(), row("turn", "az")])
    settings = {"batch_size": 1, "checkpoint_every": 1, "steps": 30, "seed": 1}
    settings = config(folder, base=str(broken), training=settings)
    with pytest.raises(InvalidRequest, match=r"the loss of task 'turn' is nan") as caught:
        run(settings, Options(**QUIET))
    assert caught.value.code == "training_diverged"
    checkpoints = folder / "runs" / "tiny" / "checkpoints"
    last = whole_checkpoints(checkpoints)[-1]
    assert f"{last.folder.name} is kept" in caught.value.message
    assert all(tensor.isfinite().all() for tensor in last.weights().values())
    done = run(settings, Options(finish=True, **QUIET))
    assert read_adapter(done[0].bundle, name="tiny").tasks == TASKS


def test_every_cluster_gets_an_adapter(folder):
    (folder / "clusters.yaml").write_text("clusters: {a: [turn], b: [keep]}\n")
    published = []

    def publish(bundle, name):
        published.append((bundle, name))
        return f"{name}@1"

    settings = config(folder, clusters=str(folder / "clusters.yaml"), training={"steps": 2})
    done = run(settings, Options(publish=publish, **QUIET))
    assert [(d.name, d.published) for d in done] == [("a", "a@1"), ("b", "b@1")]
    assert published == [(folder / "runs" / n / "bundle", n) for n in "ab"]
    assert [read_adapter(d.bundle, name=d.name).tasks for d in done] == [("turn",), ("keep",)]


@pytest.mark.parametrize(
    ("wanted", "rank"), [("lora", 8), (20_000, None)], ids=["a method", "a number"]
)
def test_ranks_are_matched_to_a_budget(folder, wanted, rank):
    settings = config(folder, method="lora", match_params=wanted, training={"steps": 1})
    run(settings, Options(**QUIET))
    record = TrainingRecord.load(folder / "runs" / "tiny" / "record.json")
    assert rank in (None, record.settings["method"]["rank"])
    if rank is None:
        assert abs(record.parameters.total - wanted) <= 0.05 * wanted


BAD = {
    "no rows of a task": ({"tasks": [*TASKS, "fly"]}, None, "task 'fly' has no rows in .*train"),
    "unknown task": ({"tasks": ["keep"]}, None, r"train.jsonl, line 2: task 'turn' is not one of"),
    "over the context": (
        {},
        [row("keep", "a" * 70)],
        r"line 1: an example of task 'keep' has 142 tokens, 71 of them its prompt, the limit is 64",
    ),
    "over a packed row": ({"training": {"packing": 5}}, [row("keep", "abc")], "the limit is 5"),
    "empty completion": (
        {},
        [{"task": "keep", "prompt": "a", "completion": ""}],
        "line 1: the completion of an example of task 'keep' has no token",
    ),
    "no examples": ({}, [], "data.train has no examples"),
    "no such target": (
        {"targets": ["q_proj", "query"]},
        None,
        "target 'query' matches no linear of LlamaForCausalLM; it has q_proj, k_proj,",
    ),
    "unknown method": ({"method": "cgc"}, None, "method 'cgc' is unknown; known: cgc-lora, c-poly"),
    "unknown field": (
        {"method": {"name": "lora", "ranks": 2}},
        None,
        "lora has no setting 'ranks'; it has rank",
    ),
    "unknown budget": ({"match_params": "lore"}, None, "a number of parameters or one of cgc-lora"),
    "no such base": ({"base": "./nowhere"}, None, "base './nowhere': no such folder"),
    "an adapter's name": ({"name": "A b"}, None, "adapter 'A b': a name is"),
    "a task's name": ({}, [{**row("keep", "a"), "task": "K"}], "task 'K': a name is"),
}


@pytest.mark.parametrize(("changes", "data", "reason"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_before_the_first_step(folder, changes, data, reason):
    if data is not None:
        write_rows(folder / "train.jsonl", data)
        (folder / "validation.jsonl").write_text("")
    with pytest.raises((InvalidRequest, AdapterInvalid), match=reason):
        run(config(folder, **changes), Options(**QUIET))
    assert not (folder / "runs").exists()


UNFIT = {
    "FSDP": ({"ACCELERATE_USE_FSDP": "true"}, 1, "FSDP cannot checkpoint .*; launch without it"),
    "DeepSpeed": ({"ACCELERATE_USE_DEEPSPEED": "true"}, 1, "DeepSpeed cannot checkpoint"),
    "DataParallel": ({}, 2, r"2 GPUs.* --num-processes 2 .*CUDA_VISIBLE_DEVICES=0"),
}


@pytest.mark.parametrize(("variables", "gpus", "reason"), UNFIT.values(), ids=UNFIT)
def test_processes_that_cannot_train_are_refused_before_the_first_step(
    folder, monkeypatch, variables, gpus, reason
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(InvalidRequest, match=reason):
        run(config(folder), Options(**QUIET))
    assert not (folder / "runs").exists()


def test_a_share_of_every_task_is_held_out(folder):
    settings = config(
        folder,
        data={"train": [{"path": str(folder / "train.jsonl")}], "validation_share": 0.1},
        training={"steps": 1},
    )
    said = []
    run(settings, Options(say=said.append))
    assert "tiny: examples keep 9, turn 9" in said
    metrics = TrainingRecord.load(folder / "runs" / "tiny" / "record.json").metrics
    assert set(metrics) == set(TASKS)


def test_tensorboard_gets_the_curves(folder):
    run(config(folder, tensorboard=True, training={"steps": 2}), Options(**QUIET))
    assert list((folder / "runs" / "tiny" / "tensorboard").glob("events.out.tfevents.*"))
