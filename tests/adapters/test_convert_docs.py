"""The path in docs/conversions.md, as it is written there, with PEFT at both ends."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from oneplusn import cli
from oneplusn.demo.tokenizer import END_ID, build_tokenizer
from server_processes import Process, running
from tiny_models import tiny_model
from tolerances import assert_close

# peft reads an attribute of the model that transformers has renamed.
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

PAGE = Path(__file__).parents[2] / "docs" / "conversions.md"
ADDRESS = "http://127.0.0.1:8000"
LORAS = {"news": (4, ["q_proj", "down_proj"]), "legal": (7, ["q_proj", "o_proj"])}
LIMITS = [
    "--port=0",
    "--dtype=float32",
    "--kv-memory=4MiB",
    "--adapter-memory=16MiB",
    "--threads=1",
]


def blocks(heading: str) -> list[tuple[str, str]]:
    """The code in a section: its language and its text, in order."""
    (section,) = re.findall(
        rf"^## {heading}\n(.*?)^## ", PAGE.read_text(), re.MULTILINE | re.DOTALL
    )
    return re.findall(r"^```(\w+)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


@pytest.fixture
def theirs(tmp_path) -> peft.PeftModel:
    """What a user of PEFT starts from: a base in a folder, two LoRAs, and their blend by PEFT."""
    base = tiny_model("llama", vocab_size=259, eos_token_id=END_ID)
    base.save_pretrained(tmp_path / "base")
    build_tokenizer(tmp_path / "base")
    model: Any = None
    for name, (rank, targets) in LORAS.items():
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules=targets)
        if model is None:
            model = peft.get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    for name in LORAS:
        (tmp_path / name).rename(tmp_path / f"lora-{name}")
    model.add_weighted_adapter(list(LORAS), [0.7, 0.3], "mix", "cat")
    model.set_adapter("mix")
    return model.eval()


@pytest.fixture
def server(theirs, tmp_path, monkeypatch) -> Iterator[Process]:
    """The server that the page starts, at another address and with less memory."""
    monkeypatch.chdir(tmp_path)
    (command,) = [text for language, text in path() if text.startswith("oneplusn serve")]
    arguments = shlex.split(command)[1:]
    data = [f"--data={tmp_path / 'data'}"]
    with running(["oneplusn.cli", *arguments, *LIMITS, *data], tmp_path / "log") as process:
        monkeypatch.setenv("ONEPLUSN_URL", process.url)
        yield process


def path() -> list[tuple[str, str]]:
    return blocks("From two PEFT LoRAs to a server and back")


def test_the_path_of_a_peft_user_runs_as_it_is_written(theirs, server, capsys) -> None:
    names: dict[str, Any] = {}
    for language, text in path():
        if language == "python":
            exec(text.replace(ADDRESS, server.url), names)
            continue
        for command in text.splitlines():
            program, *arguments = shlex.split(command)
            assert program == "oneplusn"
            if arguments[0] != "serve":
                assert cli.main(arguments) == 0, capsys.readouterr().err

    answer = names["ask"]("house-style")
    assert answer != names["ask"](None)

    tokenizer = AutoTokenizer.from_pretrained("base")
    prompt = torch.tensor([tokenizer("the court has")["input_ids"]])
    merged = AutoModelForCausalLM.from_pretrained("house-style").eval()
    with torch.no_grad():
        expected = theirs(input_ids=prompt).logits
        assert_close(names["model"].eval()(input_ids=prompt).logits, expected)
        assert_close(merged(input_ids=prompt).logits, expected)
        tokens = merged.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True) == answer


def test_every_format_has_its_row() -> None:
    from oneplusn.adapters.converters import READERS, WRITERS
    from oneplusn.adapters.converters.combine import SEMANTICS

    rows = re.findall(r"^\| `([a-z-]+)`", PAGE.read_text(), re.MULTILINE)
    assert rows == [*READERS, *SEMANTICS, *WRITERS]
