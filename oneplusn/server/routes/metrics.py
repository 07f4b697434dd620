"""GET /metrics, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from oneplusn.server.routes.common import ServerDep

router = APIRouter(tags=["metrics"])


@router.get("/metrics", response_class=PlainTextResponse)
async def scrape(server: ServerDep) -> Response:
    """Return every metric in Prometheus' text format."""
    return Response(server.metrics.scrape(), headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})
