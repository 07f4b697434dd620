"""Show what the scale benchmark found, and what of it misses its target."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from oneplusn.loadtest.document import Block, Heading, Table, Text
from oneplusn.loadtest.scale_parts import CONTROL, HOT

Run = Mapping[str, Any]
MOST_LOSS = 0.05
"""Of throughput, from the fewest to the most registered tasks."""
MOST_PLAN_MS = 0.2
MOST_SAMPLER_MS = 3.0
MOST_API_SHARE = 0.25
MB = 1e6


def blocks(known: Mapping[str, Mapping[str, Any]]) -> Iterator[Block]:
    """Yield the page, part by part, for the parts that are known."""
    yield Text(
        "`make bench-scale` wrote this page. The base is the random model of the CPU benchmark; a "
        "task is a LoRA of rank 4 on queries and values, as PEFT adapts by default, each with "
        "weights of its own, uploaded through `POST /v1/adapters`. Where the load average before a "
        "part is above 1, others computed meanwhile: its rows took turns and can be compared with "
        "each other, and with no other table."
    )
    if costs := list(_costs(known)):
        yield Heading("What a task costs in memory")
        yield Text(
            "Differences of PSS between servers that differ in one thing, and counts of the "
            "server's own. A task of rank 4 takes whole pages of 16 rank rows at every site that "
            "it adapts. An active task is one that is in a step."
        )
        yield Table(["", "measured as", "KB a task"], costs)
    for name, part in known.items():
        title, show = PAGES[name]
        yield Heading(title)
        setting, where = part["setting"], part["machine"]
        yield Text(
            f"{part['date']}. Model {setting['model']} in bf16, {setting['threads']} threads; "
            f"{where['cpu']}, {where['cores']} cores, load average before {where['load_before']}."
        )
        yield from show(part["runs"], setting)


def unreached(known: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the targets that are missed."""
    missed = list[str]()
    if "registered" in known:
        share = _shares(known["registered"]["runs"])[_largest(known["registered"]["runs"])]
        if share < 1 - MOST_LOSS:
            missed.append(f"throughput with the most tasks is {share:.1%} of that with the fewest")
    for run in known.get("host", {}).get("runs", [])[-1:]:
        missed += _slow(run["plan"], MOST_PLAN_MS)
        missed += _slow([c for c in run["sampler"] if _is_bound(c)], MOST_SAMPLER_MS)
    if "streams" in known:
        share = median(run["api_cpu_share"] for run in known["streams"]["runs"])
        if share > MOST_API_SHARE:
            missed.append(f"the API's process takes {share:.0%} of a core")
    return missed


def _costs(known: Mapping[str, Mapping[str, Any]]) -> Iterator[list[str]]:
    """Yield what a registered, a resident and an active task take."""
    if uploads := known.get("register", {}).get("runs"):
        last = [run for run in uploads if run["form"] == "lora"][-1]
        size = last["disk_bytes"] / last["registered"]
        yield ["registered", "disk: content and page image", _kb(size)]
    if runs := known.get("registered", {}).get("runs"):
        ends = [
            [r for r in runs if r["server"] == s] for s in (runs[0]["server"], _largest(runs)[0])
        ]
        few, many = (median(run["memory"]["api"] for run in end) for end in ends)
        if tasks := int(ends[1][0]["server"]) - int(ends[0][0]["server"]):
            yield ["registered", "PSS of the API's process", _kb((many - few) / tasks)]
    runs = known.get("zipf", {}).get("runs", [])
    for size in dict.fromkeys(run["registered"] for run in runs):
        mine = [run for run in runs if run["registered"] == size]
        small, large = (
            [run for run in mine if run["room"] == room][-1]
            for room in (min(run["room"] for run in mine), max(run["room"] for run in mine))
        )
        more = large["resident"] - small["resident"]
        grown = large["memory"]["engine"] - small["memory"]["engine"]
        if more > 0:
            how = f"PSS of the engine, {more:.0f} more of {size} resident"
            yield ["resident", how, _kb(grown / more)]
            yield [
                "resident",
                "the pool's own count",
                _kb(large["resident_bytes"] / large["resident"]),
            ]
    active = {run["asked"]: run for run in known.get("active", {}).get("runs", [])}
    if len(active) > 1:
        added = active["tasks"]["memory"]["engine"] - active["base"]["memory"]["engine"]
        count = active["tasks"]["streams"]
        how = f"PSS of the engine after {count} tasks in a step, over the bare base"
        yield ["active", how, _kb(added / count)]


def _kb(size: float) -> str:
    return f"{size / 1e3:.1f}"


def _is_bound(cost: Run) -> bool:
    """Tell whether the sampler's target holds for it: compiled, and without log-probabilities."""
    return cost["how"] == "compiled" and "log-probabilities" not in cost["what"]


def _slow(costs: Sequence[Run], most: float) -> list[str]:
    return [
        f"{cost['what']}, {cost['how']}: {cost['p50_ms']:.3f} ms, and {most:g} are allowed"
        for cost in costs
        if cost["p50_ms"] > most
    ]


def _register(runs: Sequence[Run], _: Run) -> Iterator[Block]:
    yield Text(
        "One upload after the other to a server without load; a time is that of a whole upload, "
        "from the first byte to the answer that its tasks can be asked."
    )
    head = [
        "form",
        "tasks then",
        "tasks",
        "uploads",
        "MB each",
        "seconds",
        "tasks/s",
        "p50 / p99 ms",
    ]
    head += ["p50 of the first 64, of the last 64", "on disk, MB"]
    rows = [
        [
            run["form"],
            f"{run['registered']}",
            f"{run['tasks']}",
            f"{run['uploads']}",
            f"{run['upload_bytes'] / MB:.2f}",
            f"{run['seconds']:.1f}",
            f"{run['tasks'] / run['seconds']:.1f}",
            f"{run['p50_ms']:.0f} / {run['p99_ms']:.0f}",
            f"{run['first_p50_ms']:.0f}, {run['last_p50_ms']:.0f}",
            f"{run['disk_bytes'] / MB:.0f}",
        ]
        for run in runs
    ]
    yield Table(head, rows)


def _registered(runs: Sequence[Run], setting: Run) -> Iterator[Block]:
    yield Text(
        f"Servers side by side, each over a data folder of its own and with memory for "
        f"{setting['resident']} adapters; the load goes from one to the next, so that all see the "
        f"same machine. {setting['streams']} clients, {setting['prompt']} prompt and "
        f"{setting['output']} output tokens, greedy, another task each. Two servers have the same "
        "number of tasks: what lies between them is what chance does. Shares are medians over the "
        "rounds, each against the first server's load in the same round."
    )
    shares = _shares(runs)
    head = ["registered", "asked", "tokens/s", "share", "distinct tasks a step"]
    head += ["inter-token p50 / p99 ms", "loads", "ms each", "ready after, s", "rounds"]
    rows = list[list[str]]()
    for key in dict.fromkeys((run["server"], run["asked"]) for run in runs):
        mine = [run for run in runs if (run["server"], run["asked"]) == key]
        rows.append(
            [
                *key,
                f"{_mid(mine, 'output_throughput'):.0f}",
                f"{shares[key]:.3f}",
                f"{_mid(mine, 'distinct_tasks'):.1f}",
                f"{_mid(mine, 'p50_itl_ms'):.1f} / {_mid(mine, 'p99_itl_ms'):.1f}",
                f"{_mid(mine, 'loads'):.0f}",
                _load_ms(mine),
                f"{_mid(mine, 'ready_s'):.1f}",
                f"{len(mine)}",
            ]
        )
    yield Table(head, rows)


def _shares(runs: Sequence[Run]) -> dict[tuple[str, str], float]:
    """Return the throughput of every server and way of asking, over the first server's."""
    first, found = runs[0]["server"], dict[tuple[str, str], list[float]]()
    base: float | None = None
    pending = list[Run]()
    for run in runs:
        # A round has one load of the first server, and ends when the same load comes again.
        if any(_key(run) == _key(other) for other in pending):
            _settle(pending, base, found)
            base, pending = None, []
        pending.append(run)
        if _key(run) == (first, HOT):
            base = run["output_throughput"]
    _settle(pending, base, found)
    return {key: median(values) for key, values in found.items()}


def _key(run: Run) -> tuple[str, str]:
    return run["server"], run["asked"]


def _settle(
    runs: Sequence[Run], base: float | None, found: dict[tuple[str, str], list[float]]
) -> None:
    for run in runs if base else ():
        assert base is not None
        found.setdefault(_key(run), []).append(run["output_throughput"] / base)


def _largest(runs: Sequence[Run]) -> tuple[str, str]:
    names = {run["server"] for run in runs if not run["server"].endswith(CONTROL)}
    return max(names, key=int), HOT


def _zipf(runs: Sequence[Run], setting: Run) -> Iterator[Block]:
    yield Text(
        f"{setting['streams']} clients whose requests ask the i-th most popular task with a share "
        "of 1/i. Two servers take turns with the same requests: one has memory for few adapters, "
        "the other for as many as an engine has slots for. A miss is a request that had to wait "
        "for its adapter, from the page image on disk, here in the system's cache of files; load "
        "seconds are waited for beside the steps, not instead of them."
    )
    head = ["registered", "room for", "hit ratio", "loads", "load seconds", "ms each"]
    head += ["evictions", "tokens/s", "TTFT p50 / p99 ms", "inter-token p50 / p99 ms", "rounds"]
    rows = list[list[str]]()
    for key in dict.fromkeys((run["registered"], run["room"]) for run in runs):
        mine = [run for run in runs if (run["registered"], run["room"]) == key]
        hits, misses = (sum(run[name] for run in mine) for name in ("hits", "misses"))
        rows.append(
            [
                *map(str, key),
                f"{hits / (hits + misses):.1%}",
                f"{_mid(mine, 'loads'):.0f}",
                f"{_mid(mine, 'load_seconds'):.2f}",
                _load_ms(mine),
                f"{_mid(mine, 'evictions'):.0f}",
                f"{_mid(mine, 'output_throughput'):.0f}",
                f"{_mid(mine, 'p50_ttft_ms'):.0f} / {_mid(mine, 'p99_ttft_ms'):.0f}",
                f"{_mid(mine, 'p50_itl_ms'):.1f} / {_mid(mine, 'p99_itl_ms'):.1f}",
                f"{len(mine)}",
            ]
        )
    yield Table(head, rows)


def _active(runs: Sequence[Run], _: Run) -> Iterator[Block]:
    yield Text(
        "Memory after the same load, in PSS, which divides what processes share among them; a "
        "load of the bare base comes first. The pool's own count is what the pages hold."
    )
    head = ["asked", "streams", "tokens/s", "engine MB", "API MB", "resident", "pool's count, MB"]
    rows = [
        [
            run["asked"],
            f"{run['streams']}",
            f"{run['output_throughput']:.0f}",
            f"{run['memory']['engine'] / MB:.1f}",
            f"{run['memory']['api'] / MB:.1f}",
            f"{run['resident']:.0f}",
            f"{run['resident_bytes'] / MB:.1f}",
        ]
        for run in runs
    ]
    yield Table(head, rows)


def _streams(runs: Sequence[Run], setting: Run) -> Iterator[Block]:
    yield Text(
        f"{setting['many']} streams of server-sent events from the bare base: processor time of "
        "the API's process, which takes requests, turns tokens to text and writes the events."
    )
    head = ["round", "tokens/s", "share of a core", "us a token", "inter-token p50 / p99 ms"]
    rows = [
        [
            f"{number}",
            f"{run['output_throughput']:.0f}",
            f"{run['api_cpu_share']:.1%}",
            f"{run['api_us_per_token']:.0f}",
            f"{run['p50_itl_ms']:.1f} / {run['p99_itl_ms']:.1f}",
        ]
        for number, run in enumerate(runs, 1)
    ]
    yield Table(head, rows)


def _host(runs: Sequence[Run], _: Run) -> Iterator[Block]:
    run = runs[-1]
    yield Text(
        f"The plan of {run['rows']} rows, a task each, with the addresses that the compiled kernel "
        f"reads; and the sampler over {run['sampled']} rows of {run['vocab']:,} tokens, at a "
        "temperature of 0.8, both alone in a process. Torch computes with one thread there, as in "
        "the engine; both ways took turns."
    )
    yield Table(
        ["plan", "", "p50 ms", "p99 ms"],
        [[c["what"], c["how"], f"{c['p50_ms']:.3f}", f"{c['p99_ms']:.3f}"] for c in run["plan"]],
    )
    by_what = dict[str, dict[str, Run]]()
    for cost in run["sampler"]:
        by_what.setdefault(cost["what"], {})[cost["how"]] = cost
    rows = [
        [what, *(f"{ways[how]['p50_ms']:.2f}" for how in ("torch", "compiled"))]
        for what, ways in by_what.items()
    ]
    yield Table(["sampler", "torch, p50 ms", "compiled, p50 ms"], rows)


def _mid(runs: Sequence[Run], name: str) -> float:
    return float(median(run[name] for run in runs))


def _load_ms(runs: Sequence[Run]) -> str:
    """Return the mean time of a load over all runs."""
    loads = sum(run["loads"] for run in runs)
    return f"{sum(run['load_seconds'] for run in runs) / loads * 1e3:.1f}" if loads else "-"


PAGES: Mapping[str, tuple[str, Callable[[Sequence[Run], Run], Iterator[Block]]]] = {
    "register": ("Registering", _register),
    "registered": ("Registered tasks", _registered),
    "zipf": ("Popular and rare tasks", _zipf),
    "active": ("Memory", _active),
    "streams": ("The API's process", _streams),
    "host": ("The host's share of a step", _host),
}
