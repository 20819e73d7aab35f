"""Settings of a client's sessions."""

from dataclasses import dataclass

from swarm.protocol import Encoding


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionConfig:
    """How patient a session is, and how it talks."""

    open_timeout_s: float = 10.0
    """To connect to a server and open the session there."""
    step_timeout_s: float = 120.0
    """For a server that lives to get further with a step; less where steps like it were measured."""
    max_wait_s: float = 30.0
    """To wait for missing blocks or busy servers before giving up; the session can go on later."""
    late_s: float = 0.5
    """A step that is quiet for so long, and for four times what it should take, makes us ask the servers."""
    probe_timeout_s: float = 1.0
    """For a server to answer that; a dead or stopped one is noticed by the transport's heartbeat, too."""
    chunk_tokens: int = 512
    """Most tokens in one message, so that hops work on a long prompt at the same time."""
    push: bool = True
    """Whether servers send to each other; if not, everything goes through the client."""
    reroute: bool = True
    """Whether a session may leave a server that works for one that has been much quicker for a while."""
    encoding: Encoding = Encoding.RAW
    """How hidden states cross the wire."""
