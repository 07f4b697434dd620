"""What the scale benchmark measures, part by part; each adds to what is known of its part."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from oneplusn.loadtest import scale_server
from oneplusn.loadtest.bench_cases import Work
from oneplusn.loadtest.bench_load import ANSWER_LIMIT_S, composer, kept, planned
from oneplusn.loadtest.dialects import DIALECTS
from oneplusn.loadtest.drive import Driver, Limits
from oneplusn.loadtest.fixtures import SHAPES, Fixtures
from oneplusn.loadtest.processes import ChildFailed, python, run_json
from oneplusn.loadtest.scale_model import CLUSTER, CLUSTER_TASKS, EDGE, LORA, task_names
from oneplusn.loadtest.scale_server import BASE, Data, Served, budget, disk_bytes, grown
from oneplusn.loadtest.transport import reach
from oneplusn.loadtest.workload import Popularity

ROUTE = DIALECTS["completions"]
MOST_RESIDENT = 1000
"""Tasks that are resident at once at most: an engine has slots for 1,023."""
HOST_LIMIT_S = 600.0
ZIPF = Popularity("zipf", 1.0)
HOT, ALL = "the same 16 tasks", "all tasks in turn"
CONTROL = "-again"
COUNTED = {
    "hits": "adapter_cache_hits_total",
    "misses": "adapter_cache_misses_total",
    "evictions": "adapter_cache_evictions_total",
    "loads": "adapter_load_seconds_count",
    "load_seconds": "adapter_load_seconds_sum",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured.

    Attributes:
        folder: Where the model and the data folders are.
        sizes: Registered tasks, ascending; the first is as many as there are streams.
        resident: Adapters that there is memory for.
        requests: Of one load, per stream.
        many: Streams of the part that looks at the API's process.
    """

    folder: Path
    model: str
    sizes: tuple[int, ...]
    resident: int
    streams: int
    many: int
    requests: int
    prompt: int
    output: int
    threads: int
    rounds: int

    @property
    def base(self) -> Path:
        """The model."""
        return self.folder / BASE

    def data(self, form: str, tasks: int, label: str = "") -> Data:
        """Return the data folder with so many tasks."""
        return Data(self.folder / f"data-{form}-{tasks}{label}", tasks)

    def work(self, streams: int) -> Work:
        """Return the work of a load, as the benchmark's helpers take it."""
        return Work(
            model=self.model,
            streams=streams,
            prompt=self.prompt,
            output=self.output,
            rounds=self.requests,
            repeats=1,
            threads=self.threads,
            fixtures=Fixtures(self.folder, streams),
        )

    def serving(self, data: Data, pages: int) -> AbstractContextManager[Served]:
        """Run a server with room for so many adapters of one page."""
        return scale_server.serving(
            self.base,
            data,
            adapter_memory=budget(SHAPES[self.model], pages),
            threads=self.threads,
            context=self.work(1).context,
            streams=self.many,
        )


def load(plan: Plan, served: Served, asked: Sequence[str], streams: int) -> dict[str, Any]:
    """Send a closed loop; request i asks the i-th of `asked`, in turn; return what was found.

    Raises:
        LoadFailed: A request failed, or the server did other work than was asked for.
    """
    work = plan.work(streams)
    server = reach(served.address)
    requests = plan.requests * streams
    compose = composer(ROUTE, work, random.Random(), server.post)
    driver = Driver(server, ROUTE, compose, Limits(None, requests, timeout=ANSWER_LIMIT_S))
    before, cpu, begin = served.counters(), served.api_seconds(), time.perf_counter()
    outcome = asyncio.run(driver.run_closed(planned(work, asked, requests), streams))
    seconds, cpu = time.perf_counter() - begin, served.api_seconds() - cpu
    after = served.counters()
    steps = grown(before, after, "batch_distinct_tasks_count")
    distinct = grown(before, after, "batch_distinct_tasks_sum")
    return {
        **kept(outcome, work),
        **{name: grown(before, after, metric) for name, metric in COUNTED.items()},
        "distinct_tasks": distinct / steps if steps else 0.0,
        "api_cpu_share": cpu / seconds,
        "api_us_per_token": cpu / (requests * plan.output) * 1e6,
        "resident": after.get("adapters_resident", 0.0),
        "resident_bytes": after.get("adapter_resident_bytes", 0.0),
        "memory": served.memory(),
    }


def register(plan: Plan) -> Iterator[dict[str, Any]]:
    """Upload what is not there yet, to a server per number of tasks; tell what it took."""
    cases = [(LORA, plan.data(LORA, size)) for size in plan.sizes]
    clustered = max(plan.sizes[-1] // CLUSTER_TASKS, 1)
    cases.append((CLUSTER, plan.data(CLUSTER, clustered)))
    for form, data in cases:
        yield from _register(plan, form, data, data.tasks)
    # Some more beside the most: whether an upload takes longer where there are many already.
    largest = cases[len(plan.sizes) - 1][1]
    copy = scale_server.twin(largest, f"{largest.folder.name}-more")
    yield from _register(plan, LORA, copy, largest.tasks + EDGE)


def _register(plan: Plan, form: str, data: Data, tasks: int) -> Iterator[dict[str, Any]]:
    with plan.serving(data, plan.resident) as served:
        found = _upload(served.address, plan.model, form, tasks)
        if found["uploads"]:
            size, memory = disk_bytes(data.folder), served.memory()
            told = {"form": form, "registered": tasks, "disk_bytes": size, "memory": memory}
            yield {**found, **told}


def _upload(address: str, model: str, form: str, tasks: int) -> dict[str, Any]:
    """Let a process of its own upload; its progress is shown.

    Raises:
        ChildFailed: It ended with an error.
    """
    command = python("oneplusn.loadtest.scale_model", address, "--model", model)
    command += ["--form", form, "--count", str(tasks)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)  # noqa: S603 - our own module
    if done.returncode:
        raise ChildFailed(f"{tasks} tasks could not be registered; the reason is above")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def registered(plan: Plan) -> Iterator[dict[str, Any]]:
    """Send the same load to servers that differ in the number of registered tasks, in turn.

    They run side by side, and the one under load changes after every load, so that all of them see
    the same machine. Two have the fewest tasks: how far they differ is what a difference may be.
    """
    smallest = plan.data(LORA, plan.sizes[0])
    copy = scale_server.twin(smallest, f"data-{LORA}-{plan.sizes[0]}{CONTROL}")
    folders = {str(size): plan.data(LORA, size) for size in plan.sizes}
    folders[f"{plan.sizes[0]}{CONTROL}"] = copy
    with ExitStack() as running:
        servers = {
            name: running.enter_context(plan.serving(data, plan.resident))
            for name, data in folders.items()
        }
        names = list(servers)
        for name in names:
            load(plan, servers[name], _hot(plan, servers[name].tasks), plan.streams)
        for number in range(plan.rounds):
            for name in (*names[number % len(names) :], *names[: number % len(names)]):
                served = servers[name]
                for how, asked in _askings(plan, served.tasks, number):
                    found = load(plan, served, asked, plan.streams)
                    ready = round(served.running.ready_s, 1)
                    yield {"server": name, "asked": how, "round": number, "ready_s": ready, **found}


def _hot(plan: Plan, tasks: int) -> list[str]:
    """Return as many tasks as there are streams, from all over."""
    names = task_names(LORA, tasks)
    return names[:: tasks // plan.streams][: plan.streams]


def _askings(plan: Plan, tasks: int, number: int) -> Iterator[tuple[str, list[str]]]:
    yield HOT, _hot(plan, tasks)
    if tasks > plan.streams:
        # Another part of them in every round.
        names = random.Random(0).sample(task_names(LORA, tasks), tasks)
        first = number * plan.streams * plan.requests % tasks
        yield ALL, [*names[first:], *names[:first]]


def zipf(plan: Plan) -> Iterator[dict[str, Any]]:
    """Ask popular tasks often and others rarely, with memory for few adapters and for all.

    The two servers take turns; both see the same requests.
    """
    for size in plan.sizes[1:]:
        few = plan.data(LORA, size)
        most = min(size, MOST_RESIDENT)
        all_ = scale_server.twin(few, f"data-{LORA}-{size}{CONTROL}")
        with (
            plan.serving(few, plan.resident) as cramped,
            plan.serving(all_, most + plan.streams) as roomy,
        ):
            servers = {plan.resident: cramped, most: roomy}
            for number in range(-1, plan.rounds):  # the first one only fills the memory
                draws = _popular(size, number)
                asked = list(islice(draws, plan.requests * plan.streams))
                for room, served in servers.items():
                    found = load(plan, served, asked, plan.streams)
                    if number >= 0:
                        yield {"registered": size, "room": room, "round": number, **found}


def _popular(size: int, number: int) -> Iterator[str]:
    """Draw tasks without end; which of them are popular does not depend on the round."""
    names = random.Random(0).sample(task_names(LORA, size), size)
    return ZIPF.draws(names, random.Random(f"{size} {number}"))


def active(plan: Plan) -> Iterator[dict[str, Any]]:
    """Compare the engine's memory after steps of the base and after steps of many tasks."""
    size = plan.sizes[1]
    data = plan.data(LORA, size)
    count = min(plan.many, size)
    with plan.serving(data, min(size, MOST_RESIDENT) + plan.streams) as served:
        tasks = task_names(LORA, size)[:count]
        for what, asked in (("base", [BASE] * count), ("tasks", tasks)):
            for _ in range(2):
                found = load(plan, served, asked, count)
            yield {"asked": what, "streams": count, **found}


def streams(plan: Plan) -> Iterator[dict[str, Any]]:
    """Send many streams to the bare base, and see what the API's process spends on them."""
    data = plan.data(LORA, plan.sizes[0])
    with plan.serving(data, plan.resident) as served:
        load(plan, served, [BASE], plan.many)
        for number in range(plan.rounds):
            found = load(plan, served, [BASE], plan.many)
            yield {"streams": plan.many, "round": number, **found}


def host(plan: Plan) -> Iterator[dict[str, Any]]:
    """Time the plan and the sampler alone."""
    command = python("oneplusn.server.tools.host_cost", "--json", "--threads", str(plan.threads))
    if plan.model == "tiny":
        command += ["--vocab", "4096", "--repeats", "8"]
    yield run_json(command, threads=plan.threads, limit_s=HOST_LIMIT_S)


Part = Callable[[Plan], Iterator[dict[str, Any]]]
PARTS: Mapping[str, Part] = {
    "register": register,
    "registered": registered,
    "zipf": zipf,
    "active": active,
    "streams": streams,
    "host": host,
}
