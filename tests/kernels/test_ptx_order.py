"""The order of what one program leaves for another: rules that hold, each of which can fail."""

from __future__ import annotations

import pytest

from oneplusn.kernels.ptx import Program
from oneplusn.kernels.ptx_order import order_faults

# The skeleton of the kernel: items of shrink above, items of expand below EXPAND.
ONE_LAUNCH = """
.version 8.7
.visible .entry delta(
    .param .u64 delta_param_0, .param .u64 delta_param_1,
    .param .u64 delta_param_2, .param .u64 delta_param_3, .param .u32 delta_param_4
)
.reqntid 128
{
    .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [delta_param_0];
    ld.param.b64 %rd2, [delta_param_1];
    ld.param.b64 %rd3, [delta_param_2];
    ld.param.b64 %rd4, [delta_param_3];
    mad.wide.s32 %rd5, %r9, 2, %rd1;
$TICKET:  // h = %rd1, planes = %rd2, control = %rd3, y0 = %rd4
    @%p1 atom.global.gpu.relaxed.add.u32 %r1, [ %rd3 + 0 ], %r2;
    @%p2 bra $DONE;
    @%p3 bra $EXPAND;
    st.global.b32 [ %rd2 + 0 ], { %r3 };
    bar.sync 0;
    @%p1 atom.global.gpu.acq_rel.add.u32 %r4, [ %rd3 + 12 ], %r2;
    bar.sync 0;
    @%p4 bra $TICKET;
    ld.global.cg.b32 { %r5 }, [ %rd2 + 0 ];
    st.global.b16 [ %rd5 + 0 ], { %rs1 };
    bar.sync 0;
    @%p1 atom.global.gpu.release.add.u32 %r6, [ %rd3 + 8 ], %r2;
    bra.uni $TICKET;
$EXPAND:
    ld.global.b16 { %rs2 }, [ %rd4 + 0 ];
$WAIT:
    @%p1 ld.global.gpu.acquire.b32 %r7, [ %rd3 + 8 ];
    bar.sync 0;
    @%p5 bra $WAIT;
    cp.async.cg.shared.global [ %r8 + 0 ], [ %rd5 + 0 ], 0x10, %r9;
    st.global.b16 [ %rd4 + 0 ], { %rs2 };
    bra.uni $TICKET;
$DONE:
    ret;
}
"""
POINTERS = dict(enumerate(("h", "planes", "control", "y0")))
PART_LOAD = "ld.global.cg.b32 { %r5 }, [ %rd2 + 0 ];"
PART_STORE = "st.global.b32 [ %rd2 + 0 ], { %r3 };"
ARRIVE = "@%p1 atom.global.gpu.acq_rel.add.u32 %r4, [ %rd3 + 12 ], %r2;"
H_STORE = "st.global.b16 [ %rd5 + 0 ], { %rs1 };"
RAISE = "@%p1 atom.global.gpu.release.add.u32 %r6, [ %rd3 + 8 ], %r2;"
Y_LOAD = "ld.global.b16 { %rs2 }, [ %rd4 + 0 ];"
POLL = "@%p1 ld.global.gpu.acquire.b32 %r7, [ %rd3 + 8 ];"
H_LOAD = "cp.async.cg.shared.global [ %r8 + 0 ], [ %rd5 + 0 ], 0x10, %r9;"
BARRIER = "bar.sync 0;"


def gone(*lines: str) -> str:
    """Return the kernel without a line, or without the two that stand one behind the other."""
    text = "\n    ".join(lines)
    assert ONE_LAUNCH.count(text) == 1
    return ONE_LAUNCH.replace(text, "")


def moved(line: str, *, before: str = "", behind: str = "") -> str:
    """Return the kernel with a line at another place."""
    there = before or behind
    assert ONE_LAUNCH.count(line) == ONE_LAUNCH.count(there) == 1
    pair = f"{line}\n{there}" if before else f"{there}\n{line}"
    return ONE_LAUNCH.replace(line, "").replace(there, pair)


def past_the_wait(line: str, jump: str) -> str:
    """Return the kernel with a jump, in place of a line, to where H is loaded."""
    assert ONE_LAUNCH.count(line) == 1
    return ONE_LAUNCH.replace(line, jump).replace(H_LOAD, f"$SKIP: {H_LOAD}")


def faults_of(ptx: str) -> list[str]:
    return order_faults(Program(ptx, POINTERS), "counter", splits=True, adds=True)


def test_an_ordered_kernel_has_no_faults() -> None:
    assert faults_of(ONE_LAUNCH) == []


BROKEN = [
    pytest.param(
        past_the_wait("@%p3 bra $EXPAND;", "@%p3 bra $EXPAND; @%p6 bra $SKIP;"),
        ["H is read without a wait for its flag"],
        id="a path around the wait",
    ),
    pytest.param(
        past_the_wait("$WAIT:", "@%p6 bra $SKIP; $WAIT:"),
        ["H is read without a wait for its flag"],
        id="a wait for the item before alone",
    ),
    pytest.param(
        moved(H_LOAD, before=Y_LOAD),
        ["H is read without a wait for its flag", "H is read within the wait"],
        id="H loaded before the wait",
    ),
    pytest.param(
        gone(POLL, BARRIER).replace("$WAIT:", f"$WAIT: {POLL}"),
        ["H is read by threads that saw no flag"],
        id="no barrier behind the wait",
    ),
    pytest.param(
        moved(H_LOAD, before="@%p5 bra $WAIT;"), ["H is read within the wait"], id="in it"
    ),
    pytest.param(
        gone("@%p5 bra $WAIT;"),
        ["no polls", "H is read without a wait for its flag"],
        id="one look at the flag, no wait",
    ),
    pytest.param(
        ONE_LAUNCH.replace("gpu.acquire", "gpu.relaxed"),
        ["no polls", "H is read without a wait for its flag"],
        id="a wait that acquires nothing",
    ),
    pytest.param(
        gone(H_STORE, BARRIER).replace(RAISE, f"{H_STORE} {RAISE}"),
        ["the flag is raised before all threads stored H"],
        id="no barrier before the flag",
    ),
    pytest.param(
        moved(H_STORE, behind=RAISE), ["H is stored after its flag is raised"], id="flag first"
    ),
    pytest.param(
        ONE_LAUNCH.replace("gpu.release", "gpu.relaxed"),
        ["no raises"],
        id="a flag that releases nothing",
    ),
    pytest.param(
        moved(Y_LOAD, behind="@%p5 bra $WAIT;"),
        ["y is read behind the wait, not beside the shrink"],
        id="y loaded behind the wait",
    ),
    pytest.param(
        moved(PART_LOAD, before=PART_STORE),
        ["a part is read before its split arrived"],
        id="parts summed before the count",
    ),
    pytest.param(
        gone(ARRIVE, BARRIER).replace(PART_LOAD, f"{ARRIVE} {PART_LOAD}"),
        ["parts are read by threads that saw no arrival"],
        id="no barrier behind the count",
    ),
    pytest.param(
        gone(PART_STORE, BARRIER).replace(ARRIVE, f"{PART_STORE} {ARRIVE}"),
        ["a split arrives before all threads stored"],
        id="no barrier before the count",
    ),
    pytest.param(
        moved(PART_STORE, behind=ARRIVE),
        ["a part is stored after its split arrived"],
        id="counted, then stored",
    ),
    pytest.param(
        ONE_LAUNCH.replace("ld.global.cg", "ld.global.nc"),
        ["H or its parts are read through a cache that may hold what was there before"],
        id="the read-only cache",
    ),
    pytest.param(
        ONE_LAUNCH.replace("[ %rd4 + 0 ], { %rs2 }", "[ %rd8 + 0 ], { %rs2 }"),
        ["an address derives from no argument, so its order cannot be known"],
        id="an address from nowhere",
    ),
]


@pytest.mark.parametrize(("ptx", "faults"), BROKEN)
def test_a_broken_order_is_found(ptx: str, faults: list[str]) -> None:
    assert faults_of(ptx) == faults


CALLED = """
.func called(.param .b64 called_param_0, .param .b64 called_param_1)
{
    ld.param.b64 %rd1, [called_param_0];
    ld.param.b64 %rd2, [called_param_1];
    BODY
    ret;
}
"""
CALL = """{ // callseq 0, 0
    .param .b64 param0; .param .b64 param1;
    st.param.b64 [param0], %rd5;
    st.param.b64 [param1], %rd3;
    call.uni called, (param0, param1);
    }"""


RAISED = f"{H_STORE}\n    {BARRIER}\n    {RAISE}"
WAITED = f"$WAIT:\n    {POLL}\n    {BARRIER}\n    @%p5 bra $WAIT;"


@pytest.mark.parametrize(
    ("lines", "body", "call", "faults"),
    [
        pytest.param(RAISED, RAISED, CALL, [], id="the flag raised there"),
        pytest.param(
            RAISED,
            RAISED.replace(BARRIER, ""),
            CALL,
            ["the flag is raised before all threads stored H"],
            id="without a barrier",
        ),
        pytest.param(WAITED, WAITED, CALL, [], id="the wait there"),
        pytest.param(
            WAITED,
            WAITED,
            CALL.replace("call.uni", "@%p7 call.uni"),
            ["H is read without a wait for its flag"],
            id="under a condition",
        ),
    ],
)
def test_calls_are_followed(lines: str, body: str, call: str, faults: list[str]) -> None:
    """Lines stand in a function, whose arguments are the kernel's %rd5 and %rd3."""
    assert ONE_LAUNCH.count(lines) == 1
    inside = body.replace("%rd5", "%rd1").replace("%rd3", "%rd2")
    ptx = ONE_LAUNCH.replace(lines, call) + CALLED.replace("BODY", inside)
    assert faults_of(ptx) == faults


OVERLAPPING = """
.visible .entry launch(.param .u64 launch_param_0, .param .u64 launch_param_1)
{
    ld.param.b64 %rd1, [launch_param_0];
    ld.param.b64 %rd2, [launch_param_1];
    BODY
    ret;
}
"""
WAIT, NEXT = "griddepcontrol.wait;", "griddepcontrol.launch_dependents;"
LOAD, STORE = "ld.global.b32 { %r1 }, [ %rd1 + 0 ];", "st.global.b32 [ %rd2 + 0 ], { %r1 };"
TOUCHED = "memory in use is touched before the wait"
BEGINS = "the next launch begins before the last has ended"


@pytest.mark.parametrize(
    ("handover", "pointers", "body", "faults"),
    [
        ("shrink", ("x", "h"), [WAIT, NEXT, LOAD, STORE], []),
        ("shrink", ("x", "h"), [LOAD, WAIT, NEXT, STORE], [TOUCHED]),
        ("shrink", ("x", "h"), [NEXT, WAIT, LOAD, STORE], [BEGINS]),
        ("shrink", ("x", "h"), [NEXT, LOAD, STORE], [TOUCHED, BEGINS]),
        ("expand", ("h", "y0"), [NEXT, WAIT, LOAD, STORE], []),
        ("expand", ("h", "y0"), [NEXT, LOAD, WAIT, STORE], [TOUCHED]),
    ],
)
def test_launches_that_overlap_wait(handover, pointers, body, faults) -> None:
    program = Program(OVERLAPPING.replace("BODY", "\n".join(body)), dict(enumerate(pointers)))
    assert order_faults(program, handover, splits=False, adds=False, pdl=True) == faults
