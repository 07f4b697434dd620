"""The forms in which the Triton kernels are launched, and what each must hold before it ever runs.

    python -m oneplusn.kernels.aot_forms

compiles every form for every target with the Triton that this process finds, and prints one JSON
object a line. `oneplusn.server.tools.kernel_report` does so for several versions of Triton.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from oneplusn.kernels import (
    triton_attention,
    triton_attention_backend,
    triton_attention_decode,
    triton_delta,
    triton_plan,
    tuning,
)
from oneplusn.kernels.aot import DEVICES, Facts, compile_kernel
from oneplusn.kernels.plan import MAX_RUNS, SiteSpec
from oneplusn.kernels.ptx_order import Handover, order_faults
from oneplusn.kernels.tuning import Shape

# Llama-3-8B: three slices, two, and one whose K is cut into the most parts.
QKV = SiteSpec("q+k+v", 4096, (4096, 1024, 1024), ("q", "k", "v"))
GATE_UP = SiteSpec("gate+up", 4096, (14336, 14336), ("gate", "up"))
DOWN = SiteSpec("down", 14336, (4096,), ("down",))


class Limit(NamedTuple):
    """Registers that a thread may take, and why."""

    registers: int
    reason: str


# Blocks of a multiprocessor share 65,536 registers, which are handed out in eights per thread.
ONE_LAUNCH = Limit(168, "three blocks of 4 warps: one waits, one loads, one multiplies")
SHRINK = Limit(128, "four blocks of 4 warps: their copies together keep the memory busy")
EXPAND = Limit(96, "five blocks of 4 warps: it streams B and computes little")
PLAN = Limit(64, "one block with nothing beside it: more would mean a table kept in registers")
DECODE = Limit(168, "three blocks of 4 warps: their copies together keep the memory busy")
MERGE = Limit(64, "eight blocks of 4 warps, or four of 8: it waits for memory and for nothing else")
PREFILL = Limit(255, "one block of 8 warps: sums, scores and queries are held between the loads")
WRITE = Limit(32, "a row is a program: as many as there is room for")


class Form(NamedTuple):
    """One kernel as it is launched, and what is asked of it.

    Attributes:
        label: Which step and site it serves.
        kernel: The jitted function.
        constexprs: Its compile-time arguments, but for PDL.
        limit: Registers.
        handover: How H gets from shrink to expand.
        num_warps: Of a block.
        num_stages: Of the software pipeline.
        programs: Blocks that a launch puts on a multiprocessor.
        max_registers: Bound that a launch sets; None leaves the choice to the assembler.
    """

    label: str
    kernel: Any
    constexprs: Mapping[str, Any]
    limit: Limit
    handover: Handover = "none"
    num_warps: int = 4
    num_stages: int = 3
    programs: int = 1
    max_registers: int | None = None

    def pdl(self, capability: int) -> bool:
        """Tell whether launches of this form overlap on a device."""
        return "PDL" in self.kernel.arg_names and capability >= 90

    def compiled(self, capability: int) -> Facts:
        """Compile the form for a target."""
        pdl = self.pdl(capability)
        chained = {"PDL": pdl} if "PDL" in self.kernel.arg_names else {}
        return compile_kernel(
            self.kernel,
            {**self.constexprs, **chained},
            capability=capability,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            max_registers=self.max_registers,
            pdl=pdl,
        )

    def order_faults(self, facts: Facts) -> list[str]:
        """Return what is wrong with the order in which H and its parts are left and found."""
        return order_faults(
            facts.program,
            self.handover,
            splits=self.constexprs.get("SPLITS", 1) > 1,
            adds=self.constexprs.get("ADD", False),
            pdl=self.pdl(facts.capability),
        )

    def faults(self, facts: Facts) -> list[str]:
        """Return which figures are not as they should be; nothing = it may be launched."""
        wanted = self._matrix_units(facts.capability)
        blocks = facts.blocks_per_multiprocessor
        checks = {
            f"{facts.spill_bytes} bytes spilled to a stack of {facts.stack_bytes}": (
                facts.spill_bytes or facts.stack_bytes
            ),
            f"{facts.registers} registers, limit {self.limit.registers}": (
                facts.registers > self.limit.registers
            ),
            f"{blocks} blocks fit, {self.programs} are launched": blocks < self.programs,
            f"multiplies by {facts.matrix_units}, not {wanted}": facts.matrix_units != wanted,
            "no asynchronous copies": wanted != "none" and not facts.async_copies,
        }
        return [fault for fault, broken in checks.items() if broken]

    def _matrix_units(self, capability: int) -> str:
        """Return the instruction that a kernel of this form should multiply with."""
        if "BM" not in self.constexprs:
            return "none"
        # A warp group multiplies at least 64 rows at once.
        return "HGMMA" if capability >= 90 and self.constexprs["BM"] >= 64 else "HMMA"


def _shrink_constexprs(spec: SiteSpec, rows: int, shape: Shape) -> dict[str, Any]:
    return {
        "S": spec.num_slices,
        "SPLITS": shape.splits(spec.in_features),
        "SPLIT_K": shape.split_k,
        "EVEN_K": shape.even(spec.in_features),
        "BM": rows,
        "BK": shape.block_k,
    }


def _expand_constexprs(spec: SiteSpec, rows: int, shape: Shape, *, adds: bool) -> dict[str, Any]:
    return {"S": spec.num_slices, "BM": rows, "BN": shape.block_n, "ADD": adds}


def _one_launch(spec: SiteSpec, rows: int, capability: int, *, adds: bool = True) -> Form:
    shape = tuning.shape_for(spec, rows, capability)
    step = "decode" if rows == 16 else "prefill"
    return Form(
        f"{step} {spec.name}{'' if adds else ', delta alone'}",
        triton_delta.delta_kernel,
        _shrink_constexprs(spec, rows, shape) | _expand_constexprs(spec, rows, shape, adds=adds),
        ONE_LAUNCH,
        "counter",
        shape.num_warps,
        shape.num_stages,
        shape.programs,
        shape.max_registers,
    )


def _two_launches(spec: SiteSpec, rows: int, capability: int) -> list[Form]:
    shape = tuning.shape_for(spec, rows, capability)
    shrink = _shrink_constexprs(spec, rows, shape)
    expand = _expand_constexprs(spec, rows, shape, adds=True)
    sizes = shape.num_warps, shape.num_stages
    return [
        Form("shrink apart", triton_delta.shrink_kernel, shrink, SHRINK, "shrink", *sizes),
        Form("expand apart", triton_delta.expand_kernel, expand, EXPAND, "expand", *sizes),
    ]


class _Heads(NamedTuple):
    """What attention of a family is compiled for, besides its phase."""

    label: str
    heads: int
    group: int
    dim: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


LLAMA = _Heads("heads of 128", 8, 4, 128)
GEMMA2 = _Heads("heads of 256, window, softcap", 8, 2, 256, 4096, 50.0)
GPT_OSS = _Heads("heads of 64, window, sinks", 8, 8, 64, 128, sinks=True)
PHI3 = _Heads("heads of 96, window, no groups", 32, 1, 96, 2047)


def _attention(phase: triton_attention_backend.Phase, heads: _Heads, capability: int) -> Form:
    dims = heads.dim, heads.dim
    shape = triton_attention_backend.shape_for(phase, capability, dims, 2)
    sizes = triton_attention_backend.sizes_of(shape, heads.heads, heads.group, dims)
    options = {"SCALE": heads.dim**-0.5, "WINDOW": heads.window, "SOFTCAP": heads.softcap}
    constexprs = {**sizes, **options, "BLOCK": 16}
    label = f"attention: {phase}, {heads.label}"
    pipeline = shape.num_warps, shape.num_stages
    if phase == "prefill":
        kernel = triton_attention.prefill_kernel
        return Form(label, kernel, {**constexprs, "SINKS": heads.sinks}, PREFILL, "none", *pipeline)
    kernel = triton_attention_decode.decode_kernel
    constexprs |= {"SPLIT": shape.split, "MAX_SPLITS": triton_attention_backend.MAX_SPLITS}
    return Form(label, kernel, constexprs, DECODE, "none", *pipeline, shape.programs)


def _attention_rest(capability: int) -> list[Form]:
    """Return the kernels that multiply nothing, for the widest heads."""
    shape = triton_attention_backend.shape_for("decode", capability, (256, 256), 2)
    merge = {
        **{"VD": 256, "VP": 256, "WINDOW": 4096, "SINKS": True},
        **{"SPLIT": shape.split, "MAX_SPLITS": triton_attention_backend.MAX_SPLITS},
    }
    write = {"HEADS": 8, "HP": 8, "KD": 256, "DP": 256, "VD": 256, "VP": 256, "LARGEST": 3e38}
    warps = triton_attention_backend.merge_warps(256)
    kernel = triton_attention_decode.merge_kernel
    return [
        Form("attention: merge", kernel, merge, MERGE, num_warps=warps),
        Form("attention: write", triton_attention.write_kernel, write, WRITE),
    ]


def forms(capability: int) -> list[Form]:
    """Return the forms on devices of this capability: the delta's at the sites of Llama-3-8B."""
    candidates = (16 * MAX_RUNS - 1).bit_length()
    return [
        _one_launch(QKV, 16, capability),
        _one_launch(GATE_UP, 16, capability),
        _one_launch(DOWN, 16, capability, adds=False),
        _one_launch(GATE_UP, 64, capability),
        _one_launch(DOWN, 64, capability),
        *_two_launches(QKV, 16, capability),
        Form("plan: sort", triton_plan.sort_kernel, {"TILE_ROWS": 16, "LOG": 8}, PLAN),
        Form("plan: unite", triton_plan.union_kernel, {"LOG": candidates}, PLAN),
        Form("plan: lay out", triton_plan.layout_kernel, {"LOG": candidates, "TILES": 64}, PLAN),
        *(_attention("decode", heads, capability) for heads in (LLAMA, GEMMA2)),
        *(_attention("prefill", heads, capability) for heads in (LLAMA, GEMMA2, GPT_OSS, PHI3)),
        *_attention_rest(capability),
    ]


def num_forms() -> int:
    """Return how many kernels are compiled for all targets together."""
    return sum(len(forms(capability)) for capability in DEVICES)


def main() -> None:
    """Compile all forms; print a line of JSON for each as it is done."""
    for capability in sorted(DEVICES, reverse=True):
        for form in forms(capability):
            facts = form.compiled(capability)
            order_faults = form.order_faults(facts)
            row = {
                "form": form.label,
                **facts.summary(),
                "handover": form.handover,
                "order": "broken" if order_faults else "holds",
                "faults": form.faults(facts) + order_faults,
            }
            sys.stdout.write(f"{json.dumps(row)}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
