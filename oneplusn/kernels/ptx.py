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
_ENTRY = re.compile(r"\.entry\s+(\w+)\([^)]*\)[^{]*\{")
_LABEL = re.compile(r"\s*([$\w]+):(?!:)")
_STATEMENT = re.compile(r"(@!?%\w+\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_ADDRESS = re.compile(r"\[([^\]]*)\]")
_NAME = re.compile(r"[%$\w]+")
_SPACES = {"global", "shared", "param", "local", "const"}
_ENDS = {"ret", "exit", "trap"}


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
    """The instructions of one kernel, and the paths between them."""

    def __init__(self, ptx: str, pointers: Mapping[int, str]) -> None:
        """Read a kernel.

        Args:
            ptx: The text of a module with one kernel.
            pointers: Names of the arguments that are pointers, by their position.
        """
        entry = _ENTRY.search(ptx)
        assert entry is not None, ptx[:200]
        statements, labels = _statements(_body(_COMMENT.sub("", ptx[entry.start() :])))
        owners = _owners(
            statements, {f"{entry[1]}_param_{i}": name for i, name in pointers.items()}
        )
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


def _body(text: str) -> str:
    """Return what stands between the braces of the first function."""
    start = text.index("{")
    depth = 0
    for brace in re.finditer(r"[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start + 1 : brace.start()]
    raise AssertionError(text[-200:])


def _statements(body: str) -> tuple[list[_Statement], dict[str, int]]:
    """Return the instructions of a function, and which of them a label names."""
    statements = [_Statement(guarded=False, parts=("entry",), operands="")]
    labels = dict[str, int]()
    for line in body.split(";"):
        text = line
        while label := _LABEL.match(text):
            labels[label[1]] = len(statements)
            text = text[label.end() :]
        # Inline assembly may open and close a scope around its instructions.
        if found := _STATEMENT.match(text.strip().lstrip("{} \t\n")):
            guard, opcode, operands = found.groups()
            statements.append(
                _Statement(guard is not None, tuple(opcode.split(".")), operands.strip())
            )
    return statements, labels


def _owners(
    statements: Sequence[_Statement], arguments: Mapping[str, str]
) -> dict[str, frozenset[str]]:
    """Return which pointer arguments each register may derive from, wherever it is set."""
    owners = dict[str, frozenset[str]]()
    changed = True
    while changed:
        changed = False
        for statement in statements:
            derived = _derived(statement, owners, arguments)
            for register in statement.targets if derived else ():
                known = owners.get(register, frozenset())
                if not derived <= known:
                    owners[register] = known | derived
                    changed = True
    return owners


def _derived(
    statement: _Statement, owners: Mapping[str, frozenset[str]], arguments: Mapping[str, str]
) -> frozenset[str]:
    """Return the pointer arguments from which a statement's result derives."""
    match statement.parts[0]:
        case "ld" if "param" in statement.parts:
            return frozenset(arguments[name] for name in statement.sources if name in arguments)
        case "st" | "red" | "atom" | "ld" | "cp" | "setp" | "bra" | "mma" | "wgmma" | "ldmatrix":
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
