"""The OpenAPI document of the page's API, made from the types that it serves, so that the two can't differ.

State, ReachReport (msgspec) ─► schema_components ─► OpenAPI 3.1
"""

from typing import Annotated, Any

import msgspec

from swarm import __version__
from swarm.health.state import State, Value


class CarrierReport(Value, frozen=True):
    """What one way to a peer gave."""

    ok: Annotated[bool, msgspec.Meta(description="Whether the peer answered.")]
    ms: Annotated[float | None, msgspec.Meta(description="Milliseconds to connect and be answered.")] = None
    message: Annotated[str, msgspec.Meta(description="Why it did not.")] = ""


class ReachReport(Value, frozen=True):
    """Whether this page can reach a peer now."""

    peer_id: Annotated[str, msgspec.Meta(description="The peer that was tried.")]
    ok: Annotated[bool, msgspec.Meta(description="Whether it answered on any way.")]
    direct: Annotated[CarrierReport, msgspec.Meta(description="Over a TCP connection of its own: the fast way.")]
    p2p: Annotated[CarrierReport, msgspec.Meta(description="Through libp2p.")]
    relay: Annotated[CarrierReport, msgspec.Meta(description="Through peers that carry connections to it.")]


class ErrorReport(Value, frozen=True):
    """Why there is no answer."""

    error: str


def document() -> dict[str, Any]:
    """The OpenAPI document."""
    (state, reach, error), components = msgspec.json.schema_components(
        (State, ReachReport, ErrorReport), ref_template="#/components/schemas/{name}"
    )
    peer = {
        "name": "peer",
        "in": "path",
        "required": True,
        "description": "The peer's base58 id.",
        "schema": {"type": "string", "pattern": "^12D3KooW[1-9A-HJ-NP-Za-km-z]{44}$"},
    }
    model = {
        "name": "model",
        "in": "query",
        "description": "Beginning of a digest; the model of most servers if not given.",
        "schema": {"type": "string"},
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Swarm health",
            "version": __version__,
            "description": "How a swarm is, as one peer sees it. What servers say of themselves is not proven.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": {
            "/api/v1/state": _get("getState", "All models, their servers and the last canaries.", _json(state)),
            "/api/v1/reachable/{peer}": _get(
                "getReachable",
                "Dial a peer now, both ways; what came of it is kept for some seconds.",
                _json(reach),
                parameters=[peer],
                errors={"400": ("This is no peer id.", _json(error)), "503": ("Too many dials at once.", _json(error))},
            ),
            "/metrics": _get("getMetrics", "The same for Prometheus.", {"text/plain": {}}),
            "/badge.svg": _get("getBadge", "A picture of how a model is.", {"image/svg+xml": {}}, parameters=[model]),
        },
        "components": {"schemas": components},
    }


def _get(
    name: str,
    summary: str,
    content: dict[str, Any],
    *,
    parameters: list[dict[str, Any]] | None = None,
    errors: dict[str, tuple[str, dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    responses = {"200": {"description": summary, "content": content}}
    for status, (description, body) in (errors or {}).items():
        responses[status] = {"description": description, "content": body}
    operation: dict[str, Any] = {"operationId": name, "summary": summary, "responses": responses}
    return {"get": {**operation, "parameters": parameters} if parameters else operation}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
