"""All that `make gpu-smoke` does, as a list of small items.

The list is the same in every process, so that another one can go on where one was lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import NamedTuple

import torch

from oneplusn.kernels.plan import SiteSpec
from oneplusn.kernels.smoke import (
    attention,
    attention_timing,
    checks,
    replays,
    roofline,
    timing,
    tune,
)
from oneplusn.kernels.smoke.cases import Mix
from oneplusn.kernels.smoke.checks import BITS, DELTA, FORMS, ONE, PDL, PLAN, REFERENCE, TWO, Size
from oneplusn.kernels.smoke.compile import Variant, compile_plan, compile_variant
from oneplusn.kernels.smoke.outcome import Outcome
from oneplusn.kernels.smoke.roofline import Case

ODD = Mix(12, 3, common=(4, 8, 17, 64), own=((17,), (), (64, 4), (8,)), blends=2)
"""Ranks that do not fill pages, tasks without experts of their own, blends."""
TINY_ODD = Mix(4, 2, common=(4, 17), own=((8,), (), (33,)), blends=1)
OTHER_DTYPES = (torch.float32, torch.float16)
# Which form of the kernels an item runs, where its name does not say so.
FORM_OF = {
    BITS: ONE,
    DELTA: ONE,
    roofline.EAGER_ONE: ONE,
    roofline.EAGER_TWO: TWO,
    roofline.BESIDE: ONE,
    attention.MIXES: attention.PAGED,
}


class Item(NamedTuple):
    """A piece of work.

    Attributes:
        part: Which part of the report it belongs to.
        case: On what.
        site: At which site.
        way: In which way.
        run: Does it; is given the time, in seconds since the epoch, by which it should be done.
    """

    part: str
    case: str
    site: str
    way: str
    run: Callable[[float], Outcome]

    @property
    def form(self) -> str:
        """The form of the kernels that it runs, or what it does instead."""
        return FORM_OF.get(self.way, self.way)


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of everything: those of a real model, or those that Triton's interpreter can do.

    Attributes:
        sites: Of one layer.
        mixes: Checked at all sites.
        odd: Checked at some sites too, and replayed.
        odd_sites: Those; at the first in other dtypes as well.
        sizes: Of the steps that are checked.
        plan_sizes: Of the steps whose plan is made on the device.
        replays: Of the graph of a layer.
        cases: That are timed in all ways.
        sharing: That are timed to see what sharing saves.
        families: Whose attention is checked; that of the first is timed.
        ragged: The sequences of these checks.
        shuffles: Random steps of these sequences.
        batches: On which attention is timed.
    """

    sites: tuple[SiteSpec, ...]
    mixes: tuple[Mix, ...]
    odd: Mix
    odd_sites: tuple[SiteSpec, ...]
    sizes: tuple[Size, ...]
    plan_sizes: tuple[Size, ...]
    replays: replays.Size
    cases: tuple[Case, ...]
    sharing: tuple[Case, ...]
    families: tuple[attention.Heads, ...]
    ragged: attention.Batch
    shuffles: int
    batches: tuple[attention.Batch, ...]


FULL = Scale(
    sites=roofline.SITES,
    mixes=(Mix(1, 1), Mix(4, 2), Mix(16, 4), Mix(64, 8)),
    odd=ODD,
    odd_sites=roofline.SITES,
    sizes=(*(Size(rows, 16) for rows in (1, 8, 32, 128, 256)), Size(2048, 64)),
    plan_sizes=(Size(1, 16), Size(33, 16), Size(256, 16), Size(1000, 64)),
    replays=replays.Size(replays=1000, plans=16, rows=128),
    cases=roofline.CASES,
    sharing=roofline.SHARING,
    families=attention.FAMILIES,
    ragged=attention.RAGGED,
    shuffles=250,
    batches=attention_timing.TIMED,
)
TINY_O = SiteSpec("o", 32, (32,), ("o",))
TINY = Scale(
    sites=(
        SiteSpec("qkv", 32, (32, 16, 16), ("q", "k", "v")),
        TINY_O,
        SiteSpec("gate_up", 32, (16, 32), ("gate", "up")),
        SiteSpec("down", 96, (32,), ("down",)),
    ),
    mixes=(Mix(2, 1),),
    odd=TINY_ODD,
    odd_sites=(TINY_O,),
    sizes=(Size(4, 16), Size(18, 64)),
    plan_sizes=(Size(5, 16), Size(18, 64)),
    replays=replays.Size(replays=2, plans=2, rows=3),
    cases=(Case(3, Mix(2, 1)),),
    sharing=(Case(3, Mix(2, 1)),),
    families=attention.TINY_FAMILIES,
    ragged=attention.TINY_RAGGED,
    shuffles=2,
    batches=attention_timing.TINY_TIMED,
)


def list_items(parts: Sequence[str], scale: Scale, device: torch.device) -> list[Item]:
    """List the items of some parts, in the order of the parts."""
    makers: dict[str, Iterator[Item]] = {
        "compile": _compiling(parts, scale, device),
        "correctness": _checking(scale, device),
        "replays": _replaying(scale, device),
        "timing": _timing("timing", scale, device),
        "sharing": _timing("sharing", scale, device),
        "tune": _tuning(scale, device),
    }
    return [item for part in parts for item in makers[part]]


def _compiling(parts: Sequence[str], scale: Scale, device: torch.device) -> Iterator[Item]:
    for variant in _variants(parts, scale):
        run = partial(compile_variant, variant, device)
        yield Item("compile", str(variant), variant.spec.name, variant.form, _timeless(run))
    if "correctness" in parts:
        for size in scale.plan_sizes:
            run = partial(compile_plan, size, device)
            yield Item("compile", f"{size.rows} rows", "", PLAN, _timeless(run))
        for heads, dtype in _attention_kinds(scale):
            run = partial(attention.compile_family, heads, dtype, device)
            case = _kind_name(heads, dtype)
            yield Item("compile", case, attention.SITE, attention.PAGED, _timeless(run))


def _variants(parts: Sequence[str], scale: Scale) -> Iterator[Variant]:
    """Yield what the other parts launch, the slowest to compile first."""
    if set(parts) & {"correctness", "replays", "timing", "sharing"}:
        tiles = sorted({size.tile_rows for size in scale.sizes})
        for form, tile_rows, spec in product((ONE, TWO, PDL), tiles, scale.sites):
            yield Variant(form, spec, tile_rows)
        for spec in scale.sites:
            yield Variant(DELTA, spec, 16)
    if "correctness" in parts:
        for dtype, form in product(OTHER_DTYPES, (ONE, TWO, PDL)):
            yield Variant(form, scale.odd_sites[0], 16, dtype)
    if "tune" in parts:
        for case, spec in product(tune.CASES, scale.sites):
            for shape in dict.fromkeys(tune.first_round(spec, case)):
                yield Variant(ONE, spec, case.tile_rows, shape=shape)


def _checking(scale: Scale, device: torch.device) -> Iterator[Item]:
    decode = tuple(size for size in scale.sizes if size.tile_rows == 16)
    grounds = list[tuple[SiteSpec, Mix, torch.dtype, tuple[Size, ...], tuple[str, ...]]]()
    for spec in scale.sites:
        mixes = (*scale.mixes, scale.odd) if spec in scale.odd_sites else scale.mixes
        grounds += [(spec, mix, torch.bfloat16, scale.sizes, FORMS) for mix in mixes]
        grounds.append((spec, scale.mixes[-1], torch.bfloat16, decode, (DELTA,)))
    grounds += [(scale.odd_sites[0], scale.odd, dtype, decode, FORMS) for dtype in OTHER_DTYPES]
    few = decode[:2]
    grounds.append((scale.sites[1], Mix(4, 2), torch.bfloat16, few, (REFERENCE,)))
    for spec, mix, dtype, sizes, forms in grounds:
        make = partial(checks.make_ground, spec, mix, dtype, sizes, device)
        case = f"{_mix_name(mix)}, {str(dtype).removeprefix('torch.')}"
        for form in forms:
            run = partial(_check_form, form, make)
            yield Item("correctness", case, spec.name, form, _timeless(run))
    for mix in (scale.mixes[-1], scale.odd):
        spec = scale.sites[1]
        make = partial(checks.make_ground, spec, mix, torch.bfloat16, scale.plan_sizes, device)
        yield Item("correctness", _mix_name(mix), "", PLAN, _timeless(partial(_check_plan, make)))
    for heads, dtype in _attention_kinds(scale):
        of = heads, scale.ragged, dtype
        case = _kind_name(heads, dtype)
        run = partial(attention.check, *of, device)
        yield Item("correctness", case, attention.SITE, attention.PAGED, _timeless(run))
        run = partial(attention.check_mixes, *of, scale.shuffles, device)
        yield Item("correctness", case, attention.SITE, attention.MIXES, _timeless(run))


def _attention_kinds(scale: Scale) -> Iterator[tuple[attention.Heads, torch.dtype]]:
    """Yield what attention is checked on: every family, and the first in other dtypes too."""
    yield from ((heads, torch.bfloat16) for heads in scale.families)
    yield from ((scale.families[0], dtype) for dtype in OTHER_DTYPES)


def _kind_name(heads: attention.Heads, dtype: torch.dtype) -> str:
    return f"{heads.name}, {str(dtype).removeprefix('torch.')}"


def _check_form(form: str, make: Callable[[], checks.Ground]) -> Outcome:
    return checks.check_form(form, make())


def _check_plan(make: Callable[[], checks.Ground]) -> Outcome:
    return checks.check_plan(make())


def _mix_name(mix: Mix) -> str:
    return f"{mix}, odd ranks, blends" if mix.blends else str(mix)


def _replaying(scale: Scale, device: torch.device) -> Iterator[Item]:
    def replay(form: str, *, busy: bool) -> Outcome:
        if busy and device.type != "cuda":
            return Outcome(left_out="nothing runs beside anything without a GPU")
        layer = replays.make_layer(scale.sites, scale.odd, scale.replays, device)
        beside = replays.heavy_neighbour(device) if busy else None
        return replays.check_replays(form, layer, scale.replays, beside=beside)

    for busy, form in product((False, True), (TWO, PDL, ONE)):
        where = "beside products and copies" if busy else "alone"
        run = partial(replay, form, busy=busy)
        yield Item("replays", where, "layer", form, _timeless(run))


def _timing(part: str, scale: Scale, device: torch.device) -> Iterator[Item]:
    cases, ways = {
        "timing": (scale.cases, [way for way in roofline.WAYS if way != roofline.IDEAL]),
        "sharing": (scale.sharing, [roofline.ONE, roofline.PDL]),
    }[part]
    for case, spec, way in product(cases, scale.sites, ways):
        if roofline.tried(way, case):
            run = partial(timing.time_way, way, spec, case, device)
            yield Item(part, str(case), spec.name, way, _timeless(run))
    for batch, way in product(scale.batches, attention_timing.WAYS[1:]) if part == "timing" else ():
        run = partial(attention_timing.time_way, way, scale.families[0], batch, device)
        yield Item(part, str(batch), attention.SITE, way, _timeless(run))


def _tuning(scale: Scale, device: torch.device) -> Iterator[Item]:
    for case, spec in product(tune.CASES, scale.sites):
        run = partial(tune.tune, spec, case, device)
        yield Item("tune", str(case), spec.name, ONE, run)


def _timeless(run: Callable[[], Outcome]) -> Callable[[float], Outcome]:
    """Return what need not know how long it may take."""
    return lambda until: run()
