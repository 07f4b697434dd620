"""`make gpu-smoke` where there is no GPU: the dry run, the predictions, what happens to faults.

Faults are planted: wrong sums in a way that is compared, items that raise, processes that hang.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from oneplusn.kernels import reference
from oneplusn.kernels.plan import SiteSpec, build_plan
from oneplusn.kernels.smoke import __main__ as smoke
from oneplusn.kernels.smoke import (
    attention,
    attention_timing,
    baselines,
    roofline,
    supervisor,
    timing,
)
from oneplusn.kernels.smoke.attention import Batch
from oneplusn.kernels.smoke.baselines import Merged, Sorted
from oneplusn.kernels.smoke.cases import Mix, equal_shares, make_bed
from oneplusn.kernels.smoke.items import ODD, Item
from oneplusn.kernels.smoke.outcome import Outcome, error_of
from oneplusn.kernels.smoke.report import model_table, report, timing_tables
from oneplusn.kernels.smoke.roofline import SITES, Case, Phase
from oneplusn.kernels.smoke.supervisor import Orders, Row, Supervisor
from oneplusn.kernels.smoke.worker import BROKEN, work
from tolerances import assert_delta_close

CPU = torch.device("cpu")
SPEC = SiteSpec("qkv", 48, (32, 16, 16), ("q", "k", "v"))
PAGE = Path(__file__).resolve().parents[2] / "docs/benchmarks/kernels-h200.md"
ALWAYS = time.time() + 1e6


def test_the_dry_run_checks_everything_and_measures_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, rows = tmp_path / "report.md", tmp_path / "rows.json"

    options = ["--budget", "1000", "--out", str(out), "--json", str(rows)]
    assert smoke.main(options) == 0

    text = capsys.readouterr().out
    assert out.read_text() == text
    assert "Dry run" in text
    assert timing_tables({}) in text
    done = [row for row in json.loads(rows.read_text())["rows"] if not row["outcome"]["left_out"]]
    ways = {part: {row["way"] for row in done if row["part"] == part} for part in smoke.PARTS}
    assert ways == {
        "correctness": {
            "one launch",
            "two launches",
            "any grid, any batch",
            "delta alone",
            "plan on the device",
            "reference",
            "paged attention",
            "paged attention, any mix",
        },
        "replays": {"one launch", "two launches"},
        "timing": {
            "base GEMM",
            "one launch",
            "base with one launch beside it",
            "two launches",
            "grouped_mm twice",
            "loop over tasks",
            "gathered bmm",
            "paged attention",
            "torch SDPA, gathered",
        },
        "sharing": {"one launch"},
    }


def layer(values: Sequence[float]) -> float:
    return round(sum(values), 1)


@pytest.mark.parametrize(
    ("site", "base_mb", "base_us", "a_mb", "b_mb"),
    [
        (0, 50.3, 11.7, 0.393, 0.197),
        (1, 33.6, 7.8, 0.131, 0.131),
        (2, 234.9, 54.6, 0.262, 0.918),
        (3, 117.4, 27.3, 0.459, 0.131),
    ],
)
def test_bytes_of_a_site(
    site: int, base_mb: float, base_us: float, a_mb: float, b_mb: float
) -> None:
    spec = SITES[site]
    a, b = roofline.rank_row_bytes(spec)
    assert round(2 * spec.in_features * spec.out_features / 1e6, 1) == base_mb
    assert round(roofline.base_us(spec, 0), 1) == base_us
    assert (round(16 * a / 1e6, 3), round(16 * b / 1e6, 3)) == (a_mb, b_mb)


@pytest.mark.parametrize(
    ("rows", "us"), [(1, 101.5), (8, 101.7), (32, 102.5), (128, 105.6), (256, 141.4)]
)
def test_base_of_a_layer(rows: int, us: float) -> None:
    assert layer([roofline.base_us(spec, rows) for spec in SITES]) == us


@pytest.mark.parametrize(("experts", "us"), [(3, 1.8), (12, 7.3), (24, 14.6), (80, 48.8)])
def test_weights_of_a_layer(experts: int, us: float) -> None:
    assert layer([roofline.weights_us(spec, 16 * experts) for spec in SITES]) == us


@pytest.mark.parametrize(("rows", "us"), [(8, 0.4), (32, 1.7), (128, 6.7), (2048, 107.3)])
def test_activations_of_a_layer(rows: int, us: float) -> None:
    assert layer([roofline.activations_us(spec, rows) for spec in SITES]) == us


def test_items_of_a_step_are_those_of_the_kernels() -> None:
    """Four clusters of 8 rows: a tile each, with 2 + 4 pages, which are two chunks."""
    load = roofline.load_of(Case(32, Mix(16, 4)))
    shape = roofline.tuning.shape_for(SITES[0], 16, 90)._replace(block_n=128, split_k=512)
    assert (load.need.tiles, load.need.chunks, load.rank_rows) == (4, 8, 24 * 16)
    assert load.shrink(SITES[0], shape).items == 8 * 3 * 8
    assert load.expand(SITES[0], shape).items == 4 * (32 + 8 + 8)
    assert load.expand(SITES[0], shape).memory_bytes == 24 * 16 * 12_288 + 2 * 2 * 32 * 6144


@pytest.mark.parametrize(
    ("phase", "us"),
    [
        pytest.param(Phase(4.3e6, 4.3e6, 0, 132), 1.0, id="memory"),
        pytest.param(Phase(0, 6e6, 0, 132), 1.0, id="L2"),
        pytest.param(Phase(0, 0, 790e6, 132), 1.0, id="flops"),
        pytest.param(Phase(0, 80e3, 0, 1), 1.0, id="one item"),
        pytest.param(Phase(0, 133 * 40e3, 0, 133), 1.0, id="two rounds"),
        pytest.param(Phase(0, 0, 0, 0), 0.0, id="nothing"),
    ],
)
def test_a_phase_takes_as_long_as_its_bottleneck(phase: Phase, us: float) -> None:
    assert round(phase.us, 3) == us


def test_sharing_less_costs_more() -> None:
    times = [roofline.predict(roofline.ONE, SITES[2], case) for case in roofline.SHARING]
    assert times == sorted(times)
    assert roofline.load_of(roofline.SHARING[0]).rank_rows == 18 * 16
    assert roofline.load_of(roofline.SHARING[-1]).rank_rows == 48 * 16


@pytest.mark.parametrize(
    ("batch", "us"),
    [
        # 8,192 keys and values of 8 heads of 128 in bf16, and 32 heads in and out.
        (Batch((8192,)), (33_554_432 + 16_384) / 4.3e6),
        (Batch((2048,) * 32), 32 * (8_388_608 + 16_384) / 4.3e6),
        # Two products of 128 for each of 32 heads and 2,048 * 2,049 / 2 pairs of rows.
        (Batch(chunks=((2048, 2048),)), 4 * 128 * 32 * 2048 * 2049 / 2 / 790e6),
    ],
    ids=str,
)
def test_bound_of_attention(batch: Batch, us: float) -> None:
    assert attention_timing.predict(attention_timing.BOUND, batch) == pytest.approx(us)


def test_attention_that_loses_a_token_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(q, k_cache, v_cache, meta, **options):
        short = replace(meta, context_lens=meta.context_lens - 1)
        return paged_attention(q, k_cache, v_cache, short, **options)

    paged_attention = attention.paged_attention
    monkeypatch.setattr(attention, "paged_attention", lose)
    found = attention.check(attention.TINY_FAMILIES[0], Batch((20, 33)), torch.float32, CPU)
    assert found.fault.startswith("error ")


def test_attention_whose_bits_depend_on_the_batch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def drift(q, *args, **options):
        return paged_attention(q, *args, **options) + len(q) * 1e-6

    paged_attention = attention.paged_attention
    monkeypatch.setattr(attention, "paged_attention", drift)
    tiny = attention.TINY_FAMILIES[0]
    found = attention.check_mixes(tiny, Batch((20, 33)), torch.float32, 4, CPU)
    assert "other bits" in found.fault


def test_the_page_has_the_predictions_of_the_code() -> None:
    page = PAGE.read_text()
    assert timing_tables({}) in page
    assert model_table() in page


def test_pages_and_drawn_experts_are_the_same() -> None:
    bed = make_bed(SPEC, ODD, dtype=torch.float32, device=CPU)
    row_slots = [0, *bed.layout.slots]
    x = torch.randn(len(row_slots), SPEC.in_features, generator=torch.Generator().manual_seed(0))
    whole = torch.full((len(row_slots), SPEC.out_features), torch.nan)
    ys = whole.split(SPEC.slices, dim=1)
    plan = build_plan(row_slots, bed.layout.slots)
    for site in (bed.site, *bed.copies(2)):
        reference.gated_delta(ys, x, site, plan, into="delta")
        assert_delta_close(whole, bed.delta(row_slots, x), torch.float32)


@pytest.mark.parametrize(
    "mix", [Mix(1, 1), Mix(5, 2), Mix(4, 2, common=(4, 4), own=((4,),))], ids=str
)
@pytest.mark.parametrize("way", [baselines.loop, baselines.gathered, baselines.grouped])
def test_a_way_that_is_compared_computes_the_delta(way, mix: Mix) -> None:
    bed = make_bed(SPEC, mix, dtype=torch.bfloat16, device=CPU)
    slots = build_plan(equal_shares(mix, 7), bed.layout.slots).slots.tolist()
    segments = build_plan(slots, bed.layout.slots).segments
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, SPEC.in_features, generator=generator).bfloat16()
    whole = torch.randn(7, SPEC.out_features, generator=generator).bfloat16()
    expected = whole.double() + bed.delta(slots, x)

    way(whole.split(SPEC.slices, 1), Sorted.of(x, segments), baselines.merge(bed, segments))

    assert_delta_close(whole, expected, torch.bfloat16)


def refuse(*args: object, **kwargs: object) -> torch.Tensor:
    raise RuntimeError("strides\nat some place")


def test_a_torch_that_refuses_grouped_products_or_has_none_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case(3, Mix(3, 1))
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", refuse)
    outcome = timing.time_way(roofline.GROUPED, SPEC, case, CPU)
    assert outcome == Outcome(left_out="refused: strides")
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    outcome = timing.time_way(roofline.GROUPED, SPEC, case, CPU)
    assert outcome == Outcome(left_out=f"torch {torch.__version__} has no grouped_mm")


def done(items: Sequence[Item], until: float = ALWAYS, avoid: Sequence[str] = ()) -> list[Row]:
    """Do items in this process, and let a supervisor take in what comes of them."""
    out, parts = io.StringIO(), {item.part for item in items}
    orders = Orders((), (), 0, 1, avoid, dict.fromkeys(parts, until), dry=True)
    assert work(items, orders, out) == 0
    script = f"print({out.getvalue()!r}, end='')"
    supervisor = Supervisor(lambda first, avoid: [sys.executable, "-c", script], str, ALWAYS)
    supervisor.run()
    return supervisor.rows


def item(way: str, run, part: str = "timing") -> Item:
    return Item(part, "a case", "qkv", way, run)


def forget_a_task(ys: Sequence[torch.Tensor], batch: Sorted, experts: Merged) -> None:
    short = Sorted(batch.x, batch.spans[1:], batch.ends, batch.tasks)
    experts = Merged(experts.a[1:], tuple(b[1:] for b in experts.bs))
    baselines.loop(ys, short, experts)


def test_a_way_that_is_wrong_is_reported_and_the_others_are_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(timing.LIBRARY, roofline.LOOP, forget_a_task)
    case = Case(6, Mix(3, 1))

    rows = done(
        [
            item(way, lambda until, way=way: timing.time_way(way, SPEC, case, CPU))
            for way in (roofline.LOOP, roofline.GATHERED)
        ]
    )

    assert [row.way for row in rows] == [roofline.LOOP, roofline.GATHERED]
    assert rows[0].outcome.fault.startswith("error ")
    assert rows[1].outcome.fault == ""
    monkeypatch.setattr(smoke, "_supervise", lambda orders, deadline: (rows, {}))
    assert smoke.main([]) == 1
    text = capsys.readouterr().out
    assert "1 of 2 items failed" in text
    assert f"timing, qkv, a case, {roofline.LOOP}: FAILED: error " in text


def raise_an_error(until: float) -> Outcome:
    raise ValueError("a planted\nerror")


def test_an_item_that_raises_has_its_error_in_its_row(capsys: pytest.CaptureFixture[str]) -> None:
    rows = done([item("first", raise_an_error), item("second", lambda until: Outcome(2.5))])
    assert rows[0].outcome == Outcome(fault="ValueError: a planted error")
    assert rows[1].outcome == Outcome(2.5)
    assert "Traceback" in capsys.readouterr().err


def test_what_is_late_or_has_hung_before_is_left_out() -> None:
    (late,) = done([item("first", raise_an_error)], until=0.0)
    (avoided,) = done([item("first", raise_an_error)], avoid=["first"])
    assert late.outcome == Outcome(left_out="out of time")
    assert avoided.outcome == Outcome(left_out="'first' failed before")


def supervise(script: str, *, deadline: float = ALWAYS) -> list[Row]:
    """Run a supervisor over processes of Python; `first` and `avoid` are arguments."""
    supervisor = Supervisor(
        lambda first, avoid: [sys.executable, "-c", PROCESS + script, str(first), *avoid],
        str,
        deadline,
    )
    supervisor.run()
    return supervisor.rows


PROCESS = """
import json, os, sys, threading
first, avoid = int(sys.argv[1]), sys.argv[2:]
def begin(number, form="form"):
    event = {"begin": number, "item": ["timing", "case", "site", str(number)], "form": form}
    print(json.dumps(event), flush=True)
def end(number):
    outcome = [1.0, "", "", " ".join(avoid)]
    print(json.dumps({"end": number, "outcome": outcome, "seconds": 0}), flush=True)
"""


def test_a_process_that_hangs_is_ended_and_the_next_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "SILENCE_S", 0.2)
    rows = supervise("""
begin(first, "hangs" if first == 0 else "form")
if first == 0:
    threading.Event().wait()
end(first)
""")
    assert [(row.way, row.outcome) for row in rows] == [
        ("0", Outcome(fault="no answer for 0 s")),
        ("1", Outcome(1.0, note="hangs")),
    ]


def test_a_form_that_loses_processes_is_left_out_from_the_second_time_on() -> None:
    rows = supervise("""
begin(first)
if avoid:
    end(first)
else:
    os._exit(9)
""")
    lost = Outcome(fault="the process ended with status 9")
    assert [row.outcome for row in rows] == [lost, lost, Outcome(1.0, note="form")]


def test_a_process_that_gives_up_its_device_is_followed_by_another() -> None:
    rows = supervise(f"begin(first); end(first); os._exit({BROKEN} if first < 2 else 0)")
    assert [row.way for row in rows] == ["0", "1", "2"]


def test_a_process_that_cannot_start_is_one_fault() -> None:
    (row,) = supervise("sys.exit(1)")
    assert row.outcome.fault == "the process ended with status 1"


def test_what_runs_when_time_is_up_is_left_out() -> None:
    (row,) = supervise("begin(0); threading.Event().wait()", deadline=time.time() + 0.5)
    assert row.outcome == Outcome(left_out="time was up")


def test_one_wrong_block_of_one_row_breaks_the_bound_of_rows() -> None:
    delta = torch.randn(4096, 256, generator=torch.Generator().manual_seed(0)).double()
    actual = delta.bfloat16()
    assert error_of(actual, delta, delta).fault(torch.bfloat16, CPU) == ""
    actual[5, 32:64] = 0.0
    assert "of one row" in error_of(actual, delta, delta).fault(torch.bfloat16, CPU)


@pytest.mark.parametrize("actual", [torch.nan, 1e-30], ids=["NaN", "not zero"])
def test_no_bound_holds_for(actual: float) -> None:
    delta = torch.zeros(2, 3).double()
    error = error_of(torch.full((2, 3), actual), delta, delta)
    assert error.fault(torch.float32, CPU)


def test_a_report_names_what_was_left_out() -> None:
    row = Row("timing", "a case", "qkv", "a way", Outcome(left_out="no such thing"), 0.0)
    text = report([row, row], {"device": "a GPU"}, date="2026-11-22", seconds=1.0)
    assert "- timing, a way: no such thing (2)" in text
    assert "Dry run" not in text
