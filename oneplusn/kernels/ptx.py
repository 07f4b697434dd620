"""Read the PTX of a kernel: whose memory each instruction touches, and in what order they can run.

The order is checked on paths: "no path from P to Q without passing R". A path follows the
branches of the program and knows nothing of values, so a rule that holds here holds for every
input; a rule that breaks may break on a path that no input takes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

_COMMENT = re.compile(r"//[^\n]*|^[ \t]*\.loc\b[^\n]*", re.MULTILINE)
_HEAD = re.compile(
    r"\.(?P<kind>entry|func)\s+(?:\([^)]*\)\s*)?(?P<name>[\w$]+)\s*\([^)]*\)[^{;]*\{"
)
# Inline assembly may open and close a scope around its instructions.
_LABEL = re.compile(r"[\s{}]*([$\w]+):(?!:)")
_STATEMENT = re.compile(r"[\s{}]*(@!?%\w+\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_ADDRESS = re.compile(r"\[([^\]]*)\]")
_NAME = re.compile(r"[%$\w]+")
_SYMBOL = re.compile(r"(?<![%$\w])[%$_a-zA-Z][$\w]*")
_ARGUMENT = re.compile(r"\bparam\d+\b")
_SPACES = {"global", "shared", "param", "local", "const"}
_ENDS = {"ret", "exit", "trap"}
# Their results hold nothing of their operands' addresses.
_UNRELATED = {"st", "red", "atom", "ld", "cp", "setp", "bra", "call", "mma", "wgmma", "ldmatrix"}


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction.

    Attributes:
        parts: Words of the opcode: `ld.global.gpu.acquire.b32` has five.
        operands: The rest of the line.
        reads: Pointer arguments through which it may read device memory, `UNKNOWN` among them
            when the address comes from elsewhere.
        writes: Those through which it may write.
        follows: Numbers of the instructions that can run next.
    """

    parts: tuple[str, ...]
    operands: str
    reads: frozenset[str]
    writes: frozenset[str]
    follows: tuple[int, ...]

    @property
    def is_block_barrier(self) -> bool:
        """Whether every thread of the block waits here for the others."""
        return self.parts[:2] in {("bar", "sync"), ("barrier", "sync")} and self.operands == "0"


UNKNOWN = "?"
"""Stands for the pointer of an address that derives from no argument."""


@dataclass(slots=True)
class _Statement:
    """An instruction as it is written."""

    guarded: bool
    parts: tuple[str, ...]
    operands: str
    addresses: list[str] = field(init=False)
    targets: list[str] = field(init=False)
    sources: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.addresses = _ADDRESS.findall(self.operands)
        first, _, rest = self.operands.partition(",")
        if first.startswith("{"):
            first, _, rest = self.operands.partition("}")
        self.targets = _NAME.findall(first)
        self.sources = _NAME.findall(rest)

    def accesses(self) -> tuple[list[str], list[str]]:
        """Return the addresses in device memory that are read, and those that are written."""
        spaces = [word for part in self.parts if (word := part.split("::")[0]) in _SPACES]
        match self.parts[0], spaces:
            case "cp", ["shared", "global", *_]:
                return self.addresses[1:2], []
            case _, [space, *_] if space != "global":
                return [], []
            case "ld" | "ldu", _:
                return self.addresses, []
            case "st", _:
                return [], self.addresses
        return self.addresses, self.addresses


class Program:
    """The instructions of one kernel, and the paths between them; calls are followed."""

    def __init__(self, ptx: str, pointers: Mapping[int, str]) -> None:
        """Read a kernel.

        Args:
            ptx: The text of a module with one kernel.
            pointers: Names of the arguments that are pointers, by their position.
        """
        entry, functions = _functions(_COMMENT.sub("", ptx))
        statements = [_Statement(guarded=False, parts=("entry",), operands="")]
        labels = dict[str, int]()
        _flatten(functions, entry, "", statements, labels)
        owners = {f"{entry}_param_{i}": frozenset({name}) for i, name in pointers.items()}
        _spread(statements, owners)
        self.instructions = tuple(
            Instruction(
                parts=statement.parts,
                operands=statement.operands,
                reads=_owners_of(statement.accesses()[0], owners),
                writes=_owners_of(statement.accesses()[1], owners),
                follows=_follows(i, statement, labels, len(statements)),
            )
            for i, statement in enumerate(statements)
        )

    def __iter__(self) -> Iterator[tuple[int, Instruction]]:
        """Yield the instructions with their numbers, in the order of the text; 0 is the entry."""
        return iter(enumerate(self.instructions))

    def after(self, starts: Collection[int], *, without: Collection[int] = ()) -> set[int]:
        """Return what can run after `starts` before any instruction of `without` has run."""
        found = set[int]()
        open_ends = list(starts)
        while open_ends:
            for i in self.instructions[open_ends.pop()].follows:
                if i not in found:
                    found.add(i)
                    if i not in without:
                        open_ends.append(i)
        return found


def _functions(text: str) -> tuple[str, dict[str, str]]:
    """Return the name of the kernel, and the bodies of all functions by name."""
    bodies = dict[str, str]()
    entry = ""
    for head in _HEAD.finditer(text):
        bodies[head["name"]] = _body(text[head.end() :])
        if head["kind"] == "entry":
            entry = head["name"]
    return entry, bodies


def _body(text: str) -> str:
    """Return what stands before the brace that closes a function."""
    depth = 1
    for brace in re.finditer(r"[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[: brace.start()]
    raise AssertionError(text[-200:])


def _flatten(
    functions: Mapping[str, str],
    name: str,
    prefix: str,
    statements: list[_Statement],
    labels: dict[str, int],
) -> None:
    """Append the statements of a function, each call replaced by those of what it calls.

    Args:
        functions: Bodies by name.
        name: The function.
        prefix: Keeps the names in this copy of it apart from others.
        statements: Receives the statements.
        labels: Receives the number of the statement behind each label.
    """
    calls = 0
    for line in functions[name].split(";"):
        text = line
        while label := _LABEL.match(text):
            labels[prefix + label[1]] = len(statements)
            text = text[label.end() :]
        found = _STATEMENT.match(text)
        if found is None:
            continue
        guard, opcode, operands = found.groups()
        callee = next((word for word in _NAME.findall(operands) if word in functions), None)
        # Every call has arguments of the same names.
        operands = _ARGUMENT.sub(rf"\g<0>_{calls}", operands.strip())
        operands = _SYMBOL.sub(rf"{prefix}\g<0>", operands)
        parts = tuple(opcode.split("."))
        if parts[0] == "ret" and prefix:
            parts, operands = ("bra",), f"{prefix}end"
        if parts[0] != "call" or callee is None:
            statements.append(_Statement(guard is not None, parts, operands))
            continue
        calls += 1
        inner = f"{prefix}{calls}_"
        if guard:
            statements.append(_Statement(True, ("bra",), f"{inner}end"))
        arguments = _NAME.findall(operands.rpartition("(")[2])
        statements += [
            _Statement(False, ("mov",), f"{inner}{callee}_param_{i}, {argument}")
            for i, argument in enumerate(arguments)
        ]
        _flatten(functions, callee, inner, statements, labels)
    labels[f"{prefix}end"] = len(statements)


def _spread(statements: Sequence[_Statement], owners: dict[str, frozenset[str]]) -> None:
    """Add to `owners` the pointer arguments from which each register may derive."""
    changed = True
    while changed:
        changed = False
        for statement in statements:
            derived = _derived(statement, owners)
            for register in statement.targets if derived else ():
                known = owners.get(register, frozenset())
                if not derived <= known:
                    owners[register] = known | derived
                    changed = True


def _derived(statement: _Statement, owners: Mapping[str, frozenset[str]]) -> frozenset[str]:
    """Return the pointer arguments from which a statement's result derives."""
    if statement.parts[0] in _UNRELATED and "param" not in statement.parts:
        return frozenset()
    known = (owners[name] for name in statement.sources if name in owners)
    return frozenset[str]().union(*known)


def _owners_of(addresses: Sequence[str], owners: Mapping[str, frozenset[str]]) -> frozenset[str]:
    names = frozenset[str]()
    for address in addresses:
        derived = (owners.get(name, frozenset()) for name in _NAME.findall(address))
        names |= frozenset[str]().union(*derived) or {UNKNOWN}
    return names


def _follows(
    i: int, statement: _Statement, labels: Mapping[str, int], num_statements: int
) -> tuple[int, ...]:
    """Return which instructions can run after number `i`."""
    kind = statement.parts[0]
    assert kind != "brx", "branch tables are not read"
    target = [labels[statement.operands]] if kind == "bra" else []
    falls_through = statement.guarded or kind not in {"bra", *_ENDS}
    here = target + ([i + 1] if falls_through else [])
    return tuple(j for j in here if j < num_statements)
