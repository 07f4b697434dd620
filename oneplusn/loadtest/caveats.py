"""What a reader has to know before believing the figures of a load."""

from __future__ import annotations

from typing import Any

LATE_SHARE = 0.1
BUSY_SHARE = 0.5
JOINED = 1.05
"""Tokens per event from which on a gap between events is not one between tokens."""


def caveats(found: dict[str, Any]) -> list[str]:
    """Return what a reader has to know before believing the figures."""
    lines = list[str]()
    late, gap = found["p99_dispatch_delay_ms"], found["median_itl_ms"]
    if late is not None and gap is not None and late > LATE_SHARE * gap:
        lines.append(
            f"the client sent late: the dispatch delay's p99 of {late:.2f} ms is more than "
            f"{LATE_SHARE:.0%} of the median inter-token time of {gap:.2f} ms; its machine is too "
            "busy for this load, or all clients began at once without --warmup; the server may be "
            "better than these figures"
        )
    if (busy := found["client_cpu_share"]) is not None and busy > BUSY_SHARE:
        lines.append(
            f"a client process took {busy:.2f} of a core, and may have read late what had arrived; "
            f"share the load among more than {found['client_processes']} with --processes"
        )
    joined = found["tokens_per_event"]
    if joined is not None and joined > JOINED:
        lines.append(
            f"the server sends {joined:.2f} tokens an event: inter-token times are those between "
            "events; TPOT is by tokens"
        )
    if found["tokens_counted_by"] == "events":
        lines.append("the server tells no token counts: events with text are counted instead")
    if found["cached_input_tokens"]:
        share = found["cached_input_tokens"] / max(found["total_input_tokens"], 1)
        lines.append(f"{share:.1%} of the input tokens came from the server's prefix cache")
    return lines
