"""Limits of the API."""

from dataclasses import dataclass

from swarm.rates import Rate

REQUESTS = Rate(burst=1024, per_s=64)


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiLimits:
    """What one gateway takes on, and how patient it is."""

    max_rows: int = 64
    """Answers that are generated at once; each request has a thread, so this is memory as well."""
    max_rows_per_request: int = 16
    """Answers that one request may ask for: prompts times `n`."""
    max_waiting: int = 64
    """Requests that wait for a turn; more are sent away with 429."""
    max_wait_s: float = 30.0
    """How long a request waits for its turn."""
    max_tokens: int = 4096
    """Longest answer, in tokens."""
    request_rate: Rate = REQUESTS
    """Requests of one account, or of one address where no keys are asked for; beyond, they get 429."""
    max_body_bytes: int = 1 << 20
    """Largest body of a request."""
    body_timeout_s: float = 30.0
    """For the body of a request to arrive."""
    send_timeout_s: float = 30.0
    """For a client to take what it is sent."""
    max_clients: int = 16
    """Accounts that are clients of the swarm at once; each has a process of about 40 MB."""
