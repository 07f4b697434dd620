"""Register many tasks with a running server, by uploading them one after the other.

    python -m oneplusn.loadtest.scale_model http://127.0.0.1:8000 --count 4096

An upload is a LoRA with a task of its own, or a cluster of 16 tasks. Each has weights of its own,
and adapts what PEFT adapts by default, the queries and the values. Run as a module, so that torch
is loaded in a process of its own; only the uploads are timed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from oneplusn.loadtest.churn import ACCEPTED, ROUTE, Package
from oneplusn.loadtest.discover import Inquiry
from oneplusn.loadtest.fixtures import SHAPES, Shape, lora_tensors, write_cluster, write_lora
from oneplusn.loadtest.stats import percentile
from oneplusn.loadtest.stream import LoadFailed
from oneplusn.loadtest.transport import Server, reach

if TYPE_CHECKING:
    from torch import Generator

ADAPTED = ("self_attn.q_proj", "self_attn.v_proj")
RANK = 4
CLUSTER_TASKS = 16
LORA, CLUSTER = "lora", "cluster"
FORMS = (LORA, CLUSTER)
UPLOAD_LIMIT_S = 600.0
EDGE = 64
"""Uploads at the beginning and at the end whose times are told apart."""

Write = Callable[[Path, str, "Generator"], None]


class Narrow(Shape):
    """A shape of which few linears are adapted."""

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the adapted linears of one layer."""
        return {name: super(Narrow, self).linears[name] for name in ADAPTED}


def narrow(model: str) -> Narrow:
    """Return a shape of which queries and values are adapted."""
    return Narrow(**asdict(SHAPES[model]))


def uploads(form: str, tasks: int) -> dict[str, list[str]]:
    """Return what is uploaded so that there are so many tasks: name -> its tasks."""
    if form == LORA:
        names = [f"lora-{index:05}" for index in range(tasks)]
        return {name: [name] for name in names}
    found = dict[str, list[str]]()
    for first in range(0, tasks, CLUSTER_TASKS):
        name = f"cluster-{first // CLUSTER_TASKS:04}"
        count = min(CLUSTER_TASKS, tasks - first)
        found[name] = [f"{name}-task-{index:02}" for index in range(count)]
    return found


def task_names(form: str, tasks: int) -> list[str]:
    """Name the tasks, in the order in which they are uploaded."""
    return [task for names in uploads(form, tasks).values() for task in names]


def writer(form: str, shape: Shape, tasks: dict[str, list[str]]) -> Write:
    """Return what writes an upload of this form into a folder."""

    def write(folder: Path, name: str, seeds: Generator) -> None:
        if form == LORA:
            write_lora(folder, shape, RANK, lora_tensors(shape, RANK, seeds))
        else:
            write_cluster(folder, shape, tasks[name], seeds)

    return write


def packages(names: Sequence[str], write: Write) -> Iterator[Package]:
    """Make every upload in turn."""
    import torch

    torch.set_num_threads(1)
    for name in names:
        # By its name, so that an upload that is made again is the same.
        seeds = torch.Generator().manual_seed(int.from_bytes(name.encode()) % 2**63)
        with tempfile.TemporaryDirectory(prefix="oneplusn-scale-") as folder:
            write(Path(folder), name, seeds)
            yield Package.read(name, Path(folder))


def upload(server: Server, package: Package) -> float:
    """Send an upload; return the seconds until it was answered.

    Raises:
        LoadFailed: The server refuses it, or cannot be reached.
    """
    headers = {"Content-Type": f"multipart/form-data; boundary={package.boundary}"}
    begin = time.perf_counter()
    status, answer = server.send("POST", ROUTE, package.body, headers, limit_s=UPLOAD_LIMIT_S)
    if status not in ACCEPTED:
        shown = answer[:500].decode(errors="replace")
        raise LoadFailed(f"the upload was answered {status}: {shown}", group=f"upload {status}")
    return time.perf_counter() - begin


def main() -> int:
    """Upload what the command line asks for and is not there; print what it took."""
    args = _options()
    shape, tasks = narrow(args.model), uploads(args.form, args.count)
    with Inquiry(args.url, None) as inquiry:
        known = set(inquiry.tasks())
    names = [name for name, mine in tasks.items() if not known.issuperset(mine)]
    server, seconds, num_bytes = reach(args.url), list[float](), 0
    made = packages(names, writer(args.form, shape, tasks))
    for package in tqdm(made, total=len(names), desc="uploads", disable=None):
        num_bytes += len(package.body)
        seconds.append(upload(server, package))
    found: dict[str, float] = {
        "uploads": len(names),
        "tasks": sum(map(len, map(tasks.__getitem__, names))),
    }
    if seconds:
        found |= {
            "seconds": sum(seconds),
            "upload_bytes": num_bytes / len(names),
            "p50_ms": percentile(seconds, 50) * 1e3,
            "p99_ms": percentile(seconds, 99) * 1e3,
            "first_p50_ms": percentile(seconds[:EDGE], 50) * 1e3,
            "last_p50_ms": percentile(seconds[-EDGE:], 50) * 1e3,
        }
    sys.stdout.write(f"{json.dumps(found)}\n")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scale_model", description=__doc__.partition("\n")[0])
    parser.add_argument("url", help="address of the server")
    parser.add_argument("--model", choices=SHAPES, default="small", help="that it serves (small)")
    parser.add_argument("--form", choices=FORMS, default=LORA, help="of an upload (lora)")
    parser.add_argument("--count", type=int, default=4096, help="tasks that shall be there (4096)")
    args = parser.parse_args()
    if args.count < 1:
        parser.error(f"--count {args.count} is below 1; give 1 or more")
    return args


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LoadFailed as error:
        sys.exit(f"scale_model: {error}")
