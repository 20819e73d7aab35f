"""What one server accepts, and how long it waits."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlerLimits:
    """Limits of the handler and its sessions."""

    max_sessions: int = 256
    """Sessions at once."""
    max_rows: int = 2048
    """Sequences at once, over all sessions."""
    max_stateful_rows: int = 128
    """The same where each has a recurrent state."""
    max_peer_share: float = 0.5
    """Part of these that one peer may take; in a private swarm one member, however many processes it has."""
    max_new_sessions: int = 512
    """Sessions that one peer, or member, may open in one go ..."""
    new_sessions_per_s: float = 32.0
    """... and how many more each second."""
    max_step_tokens: int = 1024
    """Tokens in one message of a step, over all its rows."""
    max_pending_bytes: int = 32 << 20
    """Steps of one session that came over its own stream and wait for room; beyond, the stream is not read."""
    max_total_pending_bytes: int = 256 << 20
    """The same over all sessions; beyond, a session's stream is not read while one of its steps waits."""
    max_pushes: int = 8
    """Peers that push into one session at once; one more ends the oldest."""
    max_early_pushes: int = 256
    """Push streams of one peer that wait for a session which is not there yet."""
    max_forwards: int = 512
    """Push streams that one client may make this server open in one go ..."""
    forwards_per_s: float = 16.0
    """... and how many more each second."""
    history_bytes: int = 1 << 30
    """Memory for what was sent to next servers and is kept for their replacements; 0 keeps nothing."""
    open_timeout_s: float = 10.0
    """How long a new stream may take to say what it wants."""
    push_open_timeout_s: float = 8.0
    """How long opening a stream to the next server may take."""
    early_push_timeout_s: float = 5.0
    """How long a push stream waits for its session."""
    forward_timeout_s: float = 30.0
    """How long outputs without a receiver may hold a session up while the memory for histories is full."""
    idle_timeout_s: float = 900.0
    """How long a session may be silent before its cache is freed."""
    send_timeout_s: float = 30.0
    """How long a client may leave its answer unread."""
    push_timeout_s: float = 120.0
    """How long the next server, which may have to wait itself, may make no room."""
    move_timeout_s: float = 60.0
    """How long handing a session over may take, to its end."""
    max_arriving_bytes: int = 1 << 30
    """Of sessions that come from other servers at once."""
    gone_timeout_s: float = 10.0
    """How long the client of a session that was handed over may keep it open here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingLimits:
    """What one server accepts of training."""

    max_runs: int = 64
    """Streams at once."""
    max_runs_per_peer: int = 8
    """Or per member of a private swarm."""
    max_pending_bytes: int = 64 << 20
    """Of one run: micro-batches that wait to be run, and results that wait to be sent; beyond, it is not read."""
    max_parameter_bytes: int = 512 << 20
    """Of one run: all versions of its parameters together, usually two: a new one is made of the one before."""
    open_timeout_s: float = 10.0
    idle_timeout_s: float = 900.0
    """How long a run may be silent before it is ended."""
    send_timeout_s: float = 120.0
    """How long a client, or a neighbour, may leave its results unread."""
    link_timeout_s: float = 8.0
    """How long opening a stream to the next server may take."""
    max_forgotten: int = 1 << 14
    """Micro-batches that the client has forgotten before they came from the server before."""
