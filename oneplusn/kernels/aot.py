"""Compile a kernel for a GPU that is not there, and read from the result what it will do on one.

The figures come from the machine code that Triton would launch, by the disassembler that Triton
brings along; only the order of accesses is read from PTX, where arguments still have names.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from oneplusn.kernels.ptx import Program

_ELEMENT_TYPES = {
    **dict.fromkeys(("x", "a", "b", "y0", "y1", "y2", "h"), "bf16"),
    **dict.fromkeys(("q", "k", "v", "k_cache", "v_cache", "y", "sinks"), "bf16"),
    **dict.fromkeys(("planes", "gates", "parts", "weights"), "fp32"),
    "kv_pos": "i64",
}
"""What pointer arguments point to, by their names; all others point to int32."""
_NUMBER = re.compile(r"[A-Z]\d*|(max|num)_\w+|\w+_stride")
"""Names of the arguments that are numbers, int32."""

_INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)([.\w]*)", re.MULTILINE
)
_RESOURCES = r"Function {}:\s+REG:(\d+) STACK:(\d+)"


class Device(NamedTuple):
    """What a multiprocessor has to share among the blocks that run on it.

    Attributes:
        warps: Warps at once.
        blocks: Blocks at once.
        shared_bytes: Shared memory.
    """

    warps: int
    blocks: int
    shared_bytes: int


DEVICES = {80: Device(64, 32, 164 * 1024), 90: Device(64, 32, 228 * 1024)}
"""By compute capability: A100, H100 and H200. Both have 65,536 registers a multiprocessor."""
_REGISTERS = 65_536
_WARP_REGISTERS = 256
_RESERVED_SHARED_BYTES = 1024
"""Shared memory that the driver takes from every block."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a kernel before it runs.

    Attributes:
        triton: Version that compiled it.
        capability: Compute capability that it was compiled for.
        registers: Per thread.
        stack_bytes: Per thread.
        spill_bytes: Stores to and loads from the stack, in the text of the kernel, per thread.
        shared_bytes: Per block.
        num_warps: Per block.
        num_stages: Depth of the software pipeline that was asked for.
        instructions: How often each instruction of the machine occurs in the text.
        program: The kernel in PTX.
    """

    triton: str
    capability: int
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    num_warps: int
    num_stages: int
    instructions: Mapping[str, int]
    program: Program

    @property
    def matrix_units(self) -> str:
        """The instruction that it multiplies with: HGMMA (four warps), HMMA (one), or none."""
        return next((name for name in ("HGMMA", "HMMA") if self.instructions.get(name)), "none")

    @property
    def async_copies(self) -> int:
        """Copies to shared memory that the kernel does not stand still for (cp.async)."""
        return self.instructions.get("LDGSTS", 0)

    @property
    def blocks_per_multiprocessor(self) -> int:
        """Blocks that run on a multiprocessor at once, by registers, shared memory and warps."""
        device = DEVICES[self.capability]
        unit = _WARP_REGISTERS // 32
        warp_registers = -(-self.registers // unit) * unit * 32
        return min(
            device.blocks,
            device.warps // self.num_warps,
            _REGISTERS // warp_registers // self.num_warps,
            device.shared_bytes // (self.shared_bytes + _RESERVED_SHARED_BYTES),
        )

    def summary(self) -> dict[str, str | int]:
        """Return the figures of a report's row."""
        return {
            "triton": self.triton,
            "capability": self.capability,
            "registers": self.registers,
            "stack_bytes": self.stack_bytes,
            "spill_bytes": self.spill_bytes,
            "shared_bytes": self.shared_bytes,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "matrix_units": self.matrix_units,
            "async_copies": self.async_copies,
            "blocks_per_multiprocessor": self.blocks_per_multiprocessor,
        }


def compile_kernel(
    kernel: Any,  # noqa: ANN401 - Triton ships no types
    constexprs: Mapping[str, object],
    *,
    capability: int,
    num_warps: int = 4,
    num_stages: int = 3,
    max_registers: int | None = None,
    pdl: bool = False,
) -> Facts:
    """Compile a kernel as a launch with wide shapes would.

    Args:
        kernel: A jitted function, whose arguments have the names of `triton_delta`.
        constexprs: Its compile-time arguments by name, all of them.
        capability: Compute capability, 80 or 90.
        num_warps: Of a block.
        num_stages: Of the software pipeline.
        max_registers: Bound that the launch sets; the assembler chooses below it.
        pdl: Whether it is launched by programmatic dependent launch.
    """
    arguments = [
        (i, argument) for i, argument in enumerate(kernel.params) if not argument.is_constexpr
    ]
    types = {argument.name: _type_of(argument.name) for _, argument in arguments}
    source = ASTSource(
        kernel,
        signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constexprs.items()},
        # What a launch finds out about its arguments: allocations begin, and widths are, multiples.
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, argument in arguments
            if not argument.do_not_specialize
        },
    )
    options = {
        "num_warps": num_warps,
        "num_stages": num_stages,
        "maxnreg": max_registers,
        "launch_pdl": pdl,
    }
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    pointers = {i: name for i, (name, kind) in enumerate(types.items()) if kind.startswith("*")}
    text = _disassemble(compiled.asm["cubin"])
    resources = re.search(_RESOURCES.format(compiled.metadata.name), text)
    assert resources is not None, text[:500]
    instructions = _INSTRUCTION.findall(text)
    return Facts(
        triton=triton.__version__,
        capability=capability,
        registers=int(resources[1]),
        stack_bytes=int(resources[2]),
        spill_bytes=sum(_width(suffix) for name, suffix in instructions if name in {"LDL", "STL"}),
        shared_bytes=compiled.metadata.shared,
        num_warps=compiled.metadata.num_warps,
        num_stages=num_stages,
        instructions=Counter(name for name, _ in instructions),
        program=Program(compiled.asm["ptx"], pointers),
    )


def _type_of(name: str) -> str:
    return "i32" if _NUMBER.fullmatch(name) else f"*{_ELEMENT_TYPES.get(name, 'i32')}"


def _disassemble(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", path]
        return subprocess.run(  # noqa: S603 - Triton's own tool, on a file of our own
            command, capture_output=True, text=True, check=True
        ).stdout


def _width(suffix: str) -> int:
    """Return the bytes per thread that a load or store with this suffix moves."""
    widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    return next((widths[word] for word in suffix.split(".") if word in widths), 4)
