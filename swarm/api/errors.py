"""What the API refuses or can't do, in OpenAI's form: status, type, code, the parameter to blame.

    SwarmError ─► as_api_error ─► ApiError ─► {"error": {"message", "type", "param", "code"}}, Retry-After

Knows nothing of HTTP libraries.
"""

import math

import msgspec

from swarm.errors import InvalidRequest, PeerBusy, RouteNotFound, SwarmError

RETRY_WITHOUT_ROUTE_S = 10.0
"""When to come back where blocks are missing: about the time in which a server's record spreads."""
RETRY_AFTER_FAILURE_S = 2.0


class ApiError(SwarmError):
    """A request that gets an error for an answer.

    Args:
        message: for the person who sent it.
        status: of HTTP.
        type: OpenAI's class of error.
        code: for programs.
        param: the field of the request that is to blame.
        retry_after_s: when the same request may succeed.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ):
        super().__init__(message)
        self.status, self.type, self.code, self.param = status, type, code, param
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> bytes:
        """The JSON object of the answer."""
        return msgspec.json.encode({"error": self.details})

    @property
    def details(self) -> dict[str, str | None]:
        """What is under "error"."""
        return {"message": str(self), "type": self.type, "param": self.param, "code": self.code}

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After, in whole seconds, where it is known."""
        return {} if self.retry_after_s is None else {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}


def overloaded(message: str, retry_after_s: float) -> ApiError:
    """Too much at once."""
    return ApiError(
        message, status=429, type="rate_limit_error", code="rate_limit_exceeded", retry_after_s=retry_after_s
    )


def as_api_error(error: SwarmError) -> ApiError:
    """What a failure of the swarm means for whoever asked."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequest):
        return ApiError(str(error))
    if isinstance(error, PeerBusy):
        return overloaded(f"the swarm has no room: {error}", error.retry_after_s)
    code, retry_after_s = "swarm_failed", RETRY_AFTER_FAILURE_S
    if isinstance(error, RouteNotFound):
        code, retry_after_s = "blocks_missing", RETRY_WITHOUT_ROUTE_S
    return ApiError(str(error), status=503, type="server_error", code=code, retry_after_s=retry_after_s)
