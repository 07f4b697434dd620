"""The layers hold: who may import whom, and what must stay importable without torch."""

from __future__ import annotations

import ast
import importlib.machinery
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
STDLIB = sys.stdlib_module_names
LINKS = ("adapters", "kernels", "loadtest", "server")


class Rule(NamedTuple):
    """A folder or file, and what its modules may import: ours by prefix, others by top name."""

    scope: str
    ours: tuple[str, ...]
    others: frozenset[str] | None
    except_for: tuple[str, ...] = ()


KERNELS = ("oneplusn.errors", "oneplusn.kernels")
ADAPTERS = (*KERNELS, "oneplusn.adapters")
ENGINE_LIBRARIES = frozenset(
    {"torch", "transformers", "triton", "numpy", "safetensors", "msgspec", "regex"}
)

# `others=None` leaves a folder free to use every declared dependency.
RULES = (
    Rule("oneplusn/errors.py", (), frozenset()),
    Rule("oneplusn/kernels", KERNELS, frozenset({"torch", "triton", "numpy"})),
    Rule(
        "oneplusn/adapters",
        ADAPTERS,
        ENGINE_LIBRARIES - {"transformers"},
        except_for=("oneplusn/adapters/registry*.py", "oneplusn/adapters/training"),
    ),
    Rule("oneplusn/adapters/registry*.py", ADAPTERS, None),
    Rule("oneplusn/adapters/training", ADAPTERS, None),
    Rule("oneplusn/server", (*ADAPTERS, "oneplusn.server", "oneplusn.demo"), None),
    Rule("oneplusn/loadtest", ("oneplusn.loadtest",), None),
)

# The modules of the API process, the registry it reads, and the host logic of the engine.
TORCH_FREE = (
    "oneplusn/__init__.py",
    "oneplusn/cli.py",
    "oneplusn/errors.py",
    "oneplusn/adapters/refs.py",
    "oneplusn/adapters/blobs.py",
    "oneplusn/adapters/fingerprint.py",
    "oneplusn/adapters/image_file.py",
    "oneplusn/adapters/prepared.py",
    "oneplusn/adapters/registry*.py",
    "oneplusn/loadtest/**/*.py",
    "oneplusn/server/*.py",
    "oneplusn/server/jobs/*.py",
    "oneplusn/server/routes/**/*.py",
    "oneplusn/server/engine/batch.py",
    "oneplusn/server/engine/kv_cache.py",
    "oneplusn/server/engine/scheduler.py",
    "oneplusn/server/engine/sequence.py",
)
# The one process kind that validates tensors.
NOT_TORCH_FREE = ("oneplusn/server/worker.py",)

# What runs on a bare GPU machine; these libraries bring tokenizers and jinja2 along themselves.
BARE = ("oneplusn/kernels/**/*.py", "oneplusn/adapters/**/*.py", "oneplusn/server/engine/**/*.py")
NOT_BARE = ("oneplusn/adapters/registry*.py", "oneplusn/adapters/training/**/*.py")
BARE_LIBRARIES = ENGINE_LIBRARIES | {"tokenizers", "jinja2"}


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def statements(tree: ast.AST, *, at_import: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield import statements: all that can run, or only those that run at import."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.stmt) and is_type_checking(node):
            continue
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        yield from statements(node, at_import=at_import)


class Tree:
    """The package's files and the imports in them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def files(self, *patterns: str) -> set[str]:
        paths = (path for pattern in patterns for path in self.root.glob(pattern))
        return {path.relative_to(self.root).as_posix() for path in paths if path.suffix == ".py"}

    def file_of(self, module: str) -> str | None:
        base = module.replace(".", "/")
        candidates = (f"{base}.py", f"{base}/__init__.py")
        return next((file for file in candidates if (self.root / file).is_file()), None)

    def is_module(self, name: str) -> bool:
        return self.file_of(name) is not None or (self.root / name.replace(".", "/")).is_dir()

    def imports(self, file: str, *, at_import: bool = False) -> set[str]:
        """Full names of the modules that a file imports; `from a import b` is a.b if a module."""
        names = set[str]()
        source = (self.root / file).read_text(encoding="utf-8")
        for node in statements(ast.parse(source), at_import=at_import):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
                continue
            assert node.level == 0, f"{file}:{node.lineno} is a relative import"
            assert node.module is not None
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in full if self.is_module(name)}
            names.update(modules)
            if modules != full or self.file_of(node.module):
                names.add(node.module)
        return names - {"__future__"}

    def parents(self, module: str) -> Iterator[str]:
        parts = module.split(".")
        return (".".join(parts[:end]) for end in range(1, len(parts) + 1))

    def reach(self, file: str) -> dict[str, str]:
        """Map every library loaded by importing a file to the chain of files that leads there."""
        found: dict[str, str] = {}
        seen = {file}
        queue = [(file, file)]
        while queue:
            current, chain = queue.pop()
            for name in sorted(self.imports(current, at_import=True)):
                if not is_ours(name):
                    found.setdefault(top(name), f"{chain} -> {name}")
                    continue
                files = {file for parent in self.parents(name) if (file := self.file_of(parent))}
                queue += [(new, f"{chain} -> {new}") for new in sorted(files - seen)]
                seen |= files
        return {name: chain for name, chain in found.items() if name not in STDLIB}


def top(name: str) -> str:
    return name.partition(".")[0]


def is_ours(name: str) -> bool:
    return top(name) == "oneplusn"


def allowed(name: str, rule: Rule) -> bool:
    if is_ours(name):
        return name == "oneplusn" or any(
            name == prefix or name.startswith(f"{prefix}.") for prefix in rule.ours
        )
    return rule.others is None or top(name) in STDLIB | rule.others


def violations(tree: Tree) -> list[str]:
    return [
        f"{file} imports {name}"
        for rule in RULES
        for file in sorted(
            tree.files(rule.scope, f"{rule.scope}/**/*.py")
            - tree.files(*rule.except_for, *(f"{path}/**/*.py" for path in rule.except_for))
        )
        for name in sorted(tree.imports(file))
        if not allowed(name, rule)
    ]


def torch_chains(tree: Tree) -> list[str]:
    files = tree.files(*TORCH_FREE) - tree.files(*NOT_TORCH_FREE)
    # transformers loads lazily: the fast tokenizers of server/text.py come without torch, which
    # tests/server/test_no_torch.py holds in a process of its own.
    heavy = ("torch", "triton")
    reached = (tree.reach(file) for file in sorted(files))
    return [chains[name] for chains in reached for name in heavy if name in chains]


def bare_chains(tree: Tree) -> list[str]:
    files = tree.files(*BARE) - tree.files(*NOT_BARE)
    return [
        chain
        for file in sorted(files)
        for name, chain in sorted(tree.reach(file).items())
        if name not in BARE_LIBRARIES
    ]


def test_imports_follow_the_arrows() -> None:
    assert violations(Tree(ROOT)) == []


def test_api_and_host_logic_load_no_torch() -> None:
    assert torch_chains(Tree(ROOT)) == []


def test_kernels_adapters_and_engine_load_on_a_bare_gpu_machine() -> None:
    assert bare_chains(Tree(ROOT)) == []


PLANTED = [
    pytest.param("kernels/a.py", "import transformers", violations, id="kernels-transformers"),
    pytest.param("kernels/a.py", "from oneplusn.adapters import b", violations, id="kernels-up"),
    pytest.param("adapters/a.py", "from pydantic import BaseModel", violations, id="pydantic"),
    pytest.param("adapters/a.py", "import oneplusn.server.b", violations, id="adapters-server"),
    pytest.param("adapters/a.py", "def f():\n    import transformers", violations, id="nested"),
    pytest.param("server/a.py", "import oneplusn.loadtest.b", violations, id="server-loadtest"),
    pytest.param("loadtest/a.py", "import oneplusn.errors", violations, id="loadtest-ours"),
    pytest.param("server/routes/a.py", "import torch", torch_chains, id="route-torch"),
    pytest.param("server/a.py", "from oneplusn.kernels import b", torch_chains, id="indirect"),
    pytest.param("server/engine/a.py", "import fastapi", bare_chains, id="engine-fastapi"),
]


@pytest.mark.parametrize(("file", "source", "check"), PLANTED)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, source: str, check) -> None:
    planted = {
        "__init__.py": "",
        "errors.py": "",
        "kernels/b.py": "import torch",
        "adapters/b.py": "",
        "server/b.py": "",
        "loadtest/b.py": "",
        file: source,
    }
    for name, text in planted.items():
        path = tmp_path / "oneplusn" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    found = check(Tree(tmp_path))

    assert len(found) == 1
    assert file in found[0]


@pytest.mark.parametrize("name", LINKS)
def test_link_points_into_the_package(name: str) -> None:
    link = ROOT / name
    assert link.is_symlink()
    assert link.readlink() == Path("oneplusn") / name
    assert link.resolve() == ROOT / "oneplusn" / name


@pytest.mark.parametrize("name", ["adapters", "kernels"])
def test_a_library_of_the_same_name_wins_over_our_folder(tmp_path: Path, name: str) -> None:
    library = tmp_path / name / "__init__.py"
    library.parent.mkdir()
    library.touch()

    found = importlib.machinery.PathFinder.find_spec(name, [str(ROOT), str(tmp_path)])

    assert found is not None
    assert found.origin == str(library)


@pytest.mark.parametrize("name", ["adapters", "kernels"])
def test_our_folder_alone_is_no_regular_package(name: str) -> None:
    found = importlib.machinery.PathFinder.find_spec(name, [str(ROOT)])

    assert found is None or found.origin is None


@pytest.mark.parametrize("module", ["oneplusn", "oneplusn.errors"])
def test_importing_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


def test_structure_page_has_a_line_for_every_module() -> None:
    package = ROOT / "oneplusn"
    page = (ROOT / "docs/structure.md").read_text()
    listed = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    modules = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if path.name != "__init__.py" or path.parent == package
    }
    assert listed == modules
