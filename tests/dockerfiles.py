"""Read a Dockerfile, and carry out the steps of a stage without a container engine."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

# What only an engine can do in an image: the operating system's packages and users.
OF_THE_SYSTEM = re.compile(r"(apt-get|groupadd|useradd) ")


@dataclass(frozen=True)
class Step:
    """One instruction: `RUN`, and what follows it with its lines joined."""

    name: str
    text: str

    @property
    def words(self) -> list[str]:
        """The arguments, of either form: as JSON, or split at spaces."""
        return json.loads(self.text) if self.text.startswith("[") else self.text.split()


@dataclass
class Stage:
    """One stage: the image that it begins with, and all steps since then."""

    name: str
    base: str
    steps: list[Step] = field(default_factory=list)

    def all(self, name: str) -> list[Step]:
        return [step for step in self.steps if step.name == name]

    def one(self, name: str) -> Step:
        (step,) = self.all(name)
        return step

    @property
    def environment(self) -> dict[str, str]:
        pairs = [pair for step in self.all("ENV") for pair in step.words]
        return dict(pair.split("=", 1) for pair in pairs)


def read(path: Path, **arguments: str) -> dict[str, Stage]:
    """Return the stages by name, in order, for these build arguments."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    stages: dict[str, Stage] = {}
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if not line.strip():
            continue
        name, _, rest = line.partition(" ")
        if name == "FROM":
            base, sign, stage = re.sub(r"\$\{(\w+)\}", lambda at: arguments[at[1]], rest).split()
            assert sign == "AS", "every stage has a name"
            before = stages.get(base, Stage(base, base))
            stages[stage] = Stage(stage, before.base, [*before.steps])
        elif not stages:
            assert name == "ARG"
            arguments.setdefault(*rest.split("="))
        else:
            list(stages.values())[-1].steps.append(Step(name, rest.strip()))
    return stages


@dataclass
class Rehearsal:
    """Carries out stages in folders that stand for the images' roots.

    Paths that the steps name (`/src`, `/wheels`, `/opt/…`, `/data`) lie below `root`, a link to the
    folder of the stage that is under way: what notes its own path finds itself in a later stage.
    Steps that need the image's operating system are left out, and listed.
    """

    stages: Mapping[str, Stage]
    context: Path
    folder: Path
    environment: Mapping[str, str]
    left_out: list[str] = field(default_factory=list)

    @property
    def root(self) -> Path:
        return self.folder / "root"

    def run(self, name: str) -> dict[str, str]:
        """Carry out a stage, after those it copies from; return the environment it leaves."""
        stage, own = self.stages[name], self.folder / name
        copied = re.findall(r"--from=(\S+)", " ".join(step.text for step in stage.all("COPY")))
        for other in copied:
            if not (self.folder / other).exists():
                self.run(other)
        own.mkdir(parents=True)
        self.root.unlink(missing_ok=True)
        self.root.symlink_to(own)
        environment, where = {**self.environment, "HOME": str(self.root)}, self.root
        for step in stage.steps:
            if step.name == "WORKDIR":
                where = Path(self._moved(step.text))
                where.mkdir(parents=True, exist_ok=True)
            elif step.name == "ARG":
                key, _, value = step.text.partition("=")
                environment.setdefault(key, value.strip('"'))
            elif step.name == "COPY":
                self._copy(step, where)
            elif step.name == "RUN":
                self._execute(step, where, environment)
        for key, value in stage.environment.items():
            environment[key] = self._moved(value.replace("$PATH", environment["PATH"]))
        return environment

    def _copy(self, step: Step, where: Path) -> None:
        *sources, target = step.words
        base = self.context
        if sources[0].startswith("--from="):
            base = self.folder / sources.pop(0).removeprefix("--from=")
        place = Path(self._moved(target)) if target.startswith("/") else where / target
        for path in (base / source.lstrip("/") for source in sources):
            if path.is_dir():
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(path, place, symlinks=True, ignore=ignore, dirs_exist_ok=True)
            else:
                shutil.copy(path, place)

    def _execute(self, step: Step, where: Path, environment: Mapping[str, str]) -> None:
        if OF_THE_SYSTEM.match(step.text):
            self.left_out.append(step.text)
            return
        command = ["sh", "-ec", self._moved(step.text)]
        subprocess.run(command, cwd=where, env=environment, check=True)

    def _moved(self, text: str) -> str:
        return re.sub(r"(?<![\w/.])/(?=(src|wheels|opt|data)\b)", f"{self.root}/", text)
