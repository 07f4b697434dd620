"""`oneplusn convert`: what is read, what it is called, what comes out, and what is refused."""

from __future__ import annotations

import argparse
import json
import tarfile
from pathlib import Path

import pytest
import torch

from foreign import Foreign, lora, moelora, mtl_lora, poly
from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.converters import READERS, WRITERS, cli, detect, read
from oneplusn.adapters.converters.combine import SEMANTICS, blend
from oneplusn.adapters.converters.source import Source
from oneplusn.adapters.files import read_adapter, write_bundle
from oneplusn.errors import (
    AdapterExists,
    AdapterInvalid,
    AdapterMediaType,
    AdapterNotFound,
    InvalidRequest,
)

WEIGHTS = [0.7, -0.3]


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    cli.declare(parser)
    return cli.run(parser.parse_args([str(argument) for argument in arguments]))


def bundle_in(folder: Path) -> Bundle:
    return read_adapter(folder, name="unused")


@pytest.fixture
def loras(tmp_path) -> list[Path]:
    return [lora(seed=i).save(tmp_path / name) for i, name in enumerate(["Lora News", "legal_v2"])]


class TestIn:
    def test_folders_become_tasks_of_their_names(self, loras, tmp_path, capsys) -> None:
        assert run("in", *loras, tmp_path / "press") == 0
        bundle = bundle_in(tmp_path / "press")
        assert bundle.tasks == ("lora-news", "legal_v2")
        shown = capsys.readouterr()
        assert shown.out.splitlines() == [
            "method   lora",
            "tasks    lora-news, legal_v2",
            "experts  2 of rank 2",
            "modules  2",
            f"written  {tmp_path / 'press'}, {bundle.digest}",
        ]
        assert shown.err.splitlines() == [
            f"[1/2] {loras[0]}: peft-lora, 1 task",
            f"[2/2] {loras[1]}: peft-lora, 1 task",
        ]

    @pytest.mark.parametrize("semantics", SEMANTICS)
    def test_weights_make_one_task(self, loras, tmp_path, semantics) -> None:
        options = ["--weights", *WEIGHTS, "--semantics", semantics]
        assert run("in", *loras, tmp_path / "mix", *options) == 0
        parts = [
            read(Source(saved.config, saved.tensors, name=name))
            for saved, name in ((lora(seed=0), "lora-news"), (lora(seed=1), "legal_v2"))
        ]
        assert (
            bundle_in(tmp_path / "mix").digest
            == blend(parts, WEIGHTS, semantics, task="mix").digest
        )

    def test_cat_is_what_weights_mean_unless_said(self, loras, tmp_path) -> None:
        run("in", *loras, tmp_path / "mix", "--weights", 1, 1, "--task", "both")
        bundle = bundle_in(tmp_path / "mix")
        assert (bundle.tasks, len(bundle.experts)) == (("both",), 2)

    def test_numbered_tasks_get_names(self, tmp_path) -> None:
        run("in", poly().save(tmp_path / "p"), tmp_path / "qa", "--task", "qa", "nli", "title")
        assert bundle_in(tmp_path / "qa").tasks == ("qa", "nli", "title")

    def test_names_go_through_all_folders(self, loras, tmp_path) -> None:
        folders = [loras[0], poly(tasks=2).save(tmp_path / "p")]
        run("in", *folders, tmp_path / "all", "--task", "p-1", "p-0", "c")
        assert bundle_in(tmp_path / "all").tasks == ("p-1", "p-0", "c")

    def test_a_task_of_mtl_lora_is_a_folder(self, tmp_path, capsys) -> None:
        folders = [
            mtl_lora(task, seed=seed).save(tmp_path / task, weights)
            for task, seed, weights in (
                ("i", 3, "adapter.safetensors"),
                ("k", 4, "pytorch_adapter.bin"),
            )
        ]
        (folders[0] / "model_head.safetensors").touch()
        assert run("in", *folders, tmp_path / "mtl", "--format", "mtl-lora") == 0
        bundle = bundle_in(tmp_path / "mtl")
        assert (bundle.method, bundle.tasks) == ("mtl-lora", ("i", "k"))
        assert "warning: never opened, so no part of what comes out: 'model_head.safetensors'" in (
            capsys.readouterr().err
        )

    def test_a_moelora_trainers_folder_is_read_as_it_is(self, tmp_path) -> None:
        folder = moelora().save(tmp_path / "med", "adapter_model.bin")
        run("in", folder, tmp_path / "out")
        assert bundle_in(tmp_path / "out").tasks == ("med-1", "med-2", "med-3")

    def test_a_converted_pissa_is_taken_at_its_word(self, tmp_path) -> None:
        folder = lora().but(init_lora_weights="pissa").save(tmp_path / "p")
        with pytest.raises(AdapterInvalid, match="assume_converted"):
            run("in", folder, tmp_path / "out")
        run("in", folder, tmp_path / "out", "--assume-converted")
        assert bundle_in(tmp_path / "out").tasks == ("p",)

    @pytest.mark.parametrize(
        ("options", "error", "says"),
        [
            (["--task", "a"], InvalidRequest, "1 names for 2 tasks, 'lora-news, legal_v2'"),
            (["--task", "a", "a"], AdapterExists, "'a' is in more than one"),
            (["--task", "a", "B"], AdapterInvalid, "task name 'B'"),
            (["--semantics", "cat"], InvalidRequest, "add --weights"),
            (["--weights", "1"], InvalidRequest, "1 weights for 2 LoRAs"),
            (
                ["--weights", "1", "1", "--task", "a", "b"],
                InvalidRequest,
                "2 names for the one task",
            ),
            (["--format", "moelora"], AdapterInvalid, "is peft-lora, and --format says moelora"),
        ],
    )
    def test_what_is_refused_leaves_nothing(self, loras, tmp_path, options, error, says) -> None:
        with pytest.raises(error) as refusal:
            run("in", *loras, tmp_path / "x", *options)
        assert says in str(refusal.value)
        assert sorted(tmp_path.iterdir()) == sorted(loras)


def saved_with(**options: object) -> Foreign:
    return lora().but(**options)


FOLDERS = {
    "X-LoRA": (saved_with(peft_type="XLORA"), "token_dependent_gate", "depends on the token"),
    "MixLoRA": (saved_with(peft_type="MIXLORA"), "token_dependent_gate", "'MIXLORA'"),
    "LoRAMoE": (saved_with(lora_nums=8), "token_dependent_gate", "lora_nums = 8"),
    "Arrow": (saved_with(arrow_config={"top_k": 3}), "token_dependent_gate", "arrow_config"),
    "AdapterHub, gated by its input": (
        mtl_lora().but(config=mtl_lora().config["config"] | {"use_gating": True}),
        "token_dependent_gate",
        "use_gating = True",
    ),
    "AdapterHub, DoRA": (
        mtl_lora().but(config=mtl_lora().config["config"] | {"use_dora": True}),
        "dora_not_supported",
        "use_dora = True",
    ),
    "AdapterHub, something new": (
        mtl_lora().but(config=mtl_lora().config["config"] | {"vera_d": 0.1}),
        "option_not_supported",
        "'vera_d' = 0.1",
    ),
    "AdapterHub, another method": (
        mtl_lora().but(config={"architecture": "prefix_tuning"}),
        "converter_missing",
        "config.architecture = 'prefix_tuning', for which there is no converter",
    ),
    "IA3": (saved_with(peft_type="IA3"), "converter_missing", "peft_type = 'IA3'"),
    "nothing known": (Foreign({}, {}), "converter_missing", "peft_type = None"),
}


@pytest.mark.parametrize(("saved", "code", "says"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_of_no_known_format_is_refused_with_the_reason(
    tmp_path, saved, code, says
) -> None:
    folder = saved.save(tmp_path / "saved", "adapter.safetensors")
    with pytest.raises(AdapterInvalid) as refusal:
        run("in", folder, tmp_path / "out")
    assert refusal.value.code == code
    assert says in str(refusal.value)
    if code == "converter_missing":
        assert all(
            f"{name} ({reader.summary})" in str(refusal.value) for name, reader in READERS.items()
        )
        with pytest.raises(AdapterInvalid):
            detect(folder)


def remove(name: str):
    return lambda folder: (folder / name).unlink()


def own(folder: Path) -> None:
    (folder / "adapter_config.json").rename(folder / "bundle.json")


def is_folder(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").mkdir()


def no_json(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{'peft_type': 'LORA'}")


def pickled(folder: Path) -> None:
    torch.save({}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (remove("adapter_config.json"), AdapterInvalid, "has no adapter_config.json; give"),
        (own, AdapterInvalid, "it is an adapter of this project already"),
        (is_folder, AdapterInvalid, "has no adapter_config.json"),
        (no_json, AdapterInvalid, "not valid JSON"),
        (remove("adapter_model.safetensors"), AdapterInvalid, "has none of adapter_model.safetens"),
        (pickled, AdapterMediaType, "is a zip archive, not safetensors"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(tmp_path, damage, error, says) -> None:
    folder = lora().save(tmp_path / "saved")
    damage(folder)
    with pytest.raises(error) as refusal:
        run("in", folder, tmp_path / "out")
    assert says in str(refusal.value)
    assert not (tmp_path / "out").exists()


class TestOut:
    @pytest.fixture
    def cluster(self, tmp_path) -> Path:
        run("in", poly().save(tmp_path / "poly"), tmp_path / "cluster")
        return tmp_path / "cluster"

    def test_a_task_becomes_a_lora(self, cluster, tmp_path, capsys) -> None:
        assert run("out", cluster, "--task", "poly-1", "--to", "peft", tmp_path / "lora") == 0
        assert capsys.readouterr().out.splitlines()[-3:] == [
            "task     poly-1",
            "rank     3",
            f"written  {tmp_path / 'lora'}",
        ]
        config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
        assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 3)

    def test_an_archive_and_a_foreign_folder_will_do(self, cluster, tmp_path) -> None:
        with tarfile.open(tmp_path / "cluster.tar.gz", "w:gz") as archive:
            archive.add(cluster, "cluster")
        for number, source in enumerate([cluster, tmp_path / "cluster.tar.gz", tmp_path / "poly"]):
            run("out", source, tmp_path / f"lora-{number}", "--task", "poly-2", "--svd", 2)
        written = [
            (tmp_path / f"lora-{number}" / "adapter_model.safetensors").read_bytes()
            for number in range(3)
        ]
        assert written[0] == written[1] == written[2]

    def test_the_only_task_needs_no_name(self, tmp_path, capsys) -> None:
        run("out", lora().save(tmp_path / "news"), tmp_path / "again")
        assert "task     news" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("options", "error", "says"),
        [
            ([], AdapterNotFound, "3 tasks, 'poly-0, poly-1, poly-2'; say which one with --task"),
            (["--task", "poly-9"], AdapterNotFound, "no task 'poly-9'"),
            (["--task", "poly-0", "--svd", "0"], InvalidRequest, "rank 0"),
            (["--task", "poly-0", "--model", "x"], InvalidRequest, "model = x"),
            (["--task", "poly-0", "--to", "base"], InvalidRequest, "give its folder"),
        ],
    )
    def test_what_is_refused_leaves_nothing(self, cluster, tmp_path, options, error, says) -> None:
        with pytest.raises(error) as refusal:
            run("out", cluster, tmp_path / "x", *options)
        assert says in str(refusal.value)
        assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("action", ["in", "out"])
def test_what_is_there_is_never_overwritten(tmp_path, action) -> None:
    folder, out = lora().save(tmp_path / "lora"), tmp_path / "taken"
    out.mkdir()
    assert run(action, folder, out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(AdapterExists, match="exists and nothing is overwritten"):
        run(action, folder, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("action", "named"), [("in", {**READERS, **SEMANTICS}), ("out", WRITERS)], ids=["in", "out"]
)
def test_help_says_what_each_name_means(action, named, capsys) -> None:
    with pytest.raises(SystemExit):
        run(action, "--help")
    shown = capsys.readouterr().out
    for name, row in named.items():
        assert f"  {name:<10} {row.summary}\n" in shown


def test_what_was_written_is_read_back_the_same(tmp_path) -> None:
    for name, saved in {
        "l": lora(),
        "p": poly(splits=4),
        "c": poly("cpoly"),
        "m": moelora(),
    }.items():
        run("in", saved.save(tmp_path / name), tmp_path / f"{name}-out")
        again = bundle_in(tmp_path / f"{name}-out")
        write_bundle(again, tmp_path / f"{name}-again")
        assert bundle_in(tmp_path / f"{name}-again").digest == again.digest
