"""Unary calls between two members of a private swarm, in both directions over one connection.

    link.call(name, data) ──Call──► the peer's UnaryDesk ──Answer or Failure──► result
    each side now and then ──Known(digest of revocations)──► a side that knows others ──Statements──►

What libp2p's daemon does for public swarms (`swarm.network.control`), without the daemon. It knows what revocations are
only in so far as it carries them: `swarm.network.members` decides.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Annotated, Protocol

import msgspec

from swarm.errors import PeerDisconnected, PeerError, PeerMisbehaved, SwarmError
from swarm.network.greeting import LENGTH_BYTES, FrameReader
from swarm.network.hive import PeerID
from swarm.network.unary import MAX_ERROR_CHARS, UnaryDesk
from swarm.private.certificates import Proven

log = logging.getLogger(__name__)

MAX_NAME_BYTES = 128
MAX_UNSENT_BYTES = 16 << 20
"""A peer that leaves more unread is given up."""
PERIOD_S = 5.0
"""How often each side says which revocations it knows, and so that it lives."""
SILENCE_S = 20.0
"""A peer that says nothing for so long is taken for dead."""

FRAME_TIMEOUT_S = 60.0
"""How long one message may take to come: until then its beginning waits in memory."""

Digest = Annotated[bytes, msgspec.Meta(max_length=16)]
CallId = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]


class Call(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=1):
    """Do this."""

    id: CallId
    name: Annotated[str, msgspec.Meta(max_length=MAX_NAME_BYTES)]
    data: bytes


class Answer(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=2):
    """Done."""

    id: CallId
    data: bytes


class Failure(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=3):
    """Not done."""

    id: CallId
    text: Annotated[str, msgspec.Meta(max_length=2 * MAX_ERROR_CHARS)]


class Cancel(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=4):
    """The caller does not want it any more."""

    id: CallId


class Known(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=5):
    """Which revocations the sender knows."""

    digest: Digest


class Statements(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=6):
    """Revocations, encoded."""

    data: bytes


LinkMessage = Call | Answer | Failure | Cancel | Known | Statements
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[LinkMessage] = msgspec.msgpack.Decoder(LinkMessage)


def decode_link_message(data: bytes) -> LinkMessage:
    """Read a message of a link.

    Raises:
        PeerMisbehaved: malformed.
    """
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PeerMisbehaved(f"malformed call: {error}") from error


class LinkOwner(Protocol):
    """Who keeps a link."""

    def on_known(self, link: "CallLink") -> None:
        """The peer has said which revocations it knows."""

    def on_statements(self, link: "CallLink", data: bytes) -> None:
        """The peer sends revocations.

        Raises:
            PeerMisbehaved: they are none.
        """

    def on_link_lost(self, link: "CallLink") -> None:
        """The link is over."""


class CallLink(asyncio.Protocol):
    """One connection with a member.

    Args:
        owner: is told what is not a call.
        proven: the member at the other end.
        desk: answers its calls.
        digest: says which revocations we know.
        max_bytes: largest request or answer.
    """

    def __init__(
        self, owner: LinkOwner, proven: Proven, desk: UnaryDesk, digest: Callable[[], bytes], *, max_bytes: int
    ) -> None:
        self.proven = proven
        self.is_lost = False
        self.last_used = time.monotonic()
        self.known = b""
        """Digest of the revocations that the peer says it knows."""
        self.told, self.told_at = b"", 0.0
        """Digest of those that the owner has told it last, and when."""
        self._owner, self._desk, self._digest = owner, desk, digest
        self._max_bytes = max_bytes
        self._reader = FrameReader(max_bytes + 4096)
        self._pending: dict[int, asyncio.Future[bytes]] = {}
        self._handling: dict[int, asyncio.Task[None]] = {}
        self._next_id = 0
        self._heard = time.monotonic()
        self._frame_since: float | None = None
        """Since when a message has been coming that is not there as a whole."""
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_usable(self) -> bool:
        """Whether calls can be made."""
        return not self.is_lost and not self._transport.is_closing()

    # --- calls ---

    async def call(self, name: str, data: bytes) -> bytes:
        """Ask the peer, without a deadline of our own.

        Raises:
            PeerError: the peer failed, or is gone.
        """
        if len(data) > self._max_bytes:
            raise PeerError(f"request of {len(data)} bytes, limit {self._max_bytes}", peer_id=self.proven.peer_id)
        if not self.is_usable:
            raise self._gone()
        self.last_used = time.monotonic()
        call_id, self._next_id = self._next_id, self._next_id + 1
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._pending[call_id] = future
        self._send(Call(call_id, name, data))
        try:
            return await future
        except asyncio.CancelledError:
            self._send(Cancel(call_id))
            raise
        finally:
            del self._pending[call_id]

    def tell(self, statements: bytes) -> None:
        """Pass revocations on."""
        self._send(Statements(statements))

    def close(self) -> None:
        """End the link."""
        if not self.is_lost:
            self._transport.close()
            asyncio.get_running_loop().call_later(1.0, self._transport.abort)  # a peer that does not read

    # --- the connection's side ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._tick()

    def data_received(self, data: bytes) -> None:
        self._heard = now = time.monotonic()
        self._reader.feed(data)
        try:
            while not self.is_lost and (piece := self._reader.next()) is not None:
                self._frame_since = None
                self._take(decode_link_message(piece))
            if self._reader.buffer and self._frame_since is None:
                self._frame_since = now
        except SwarmError as error:
            log.warning("dropping the link with %s: %s", self.proven.member, error)
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        if self._timer is not None:
            self._timer.cancel()
        for future in self._pending.values():
            if not future.done():
                future.set_exception(self._gone())
        for task in list(self._handling.values()):
            task.cancel()
        self._owner.on_link_lost(self)

    # --- inside ---

    def _take(self, message: LinkMessage) -> None:
        if isinstance(message, Call):
            self._start_handling(message)
        elif isinstance(message, Answer | Failure):
            self._settle(message)
        elif isinstance(message, Cancel):
            if (task := self._handling.get(message.id)) is not None:
                task.cancel()
        elif isinstance(message, Known):
            self.known = message.digest
            self._owner.on_known(self)
        else:
            self._owner.on_statements(self, message.data)
            self._send(Known(self._digest()))

    def _start_handling(self, call: Call) -> None:
        if call.id in self._handling:
            raise PeerMisbehaved(f"call {call.id} was made twice")
        self.last_used = time.monotonic()

        def reply(answer: bytes, error: str) -> None:
            if len(answer) > self._max_bytes:
                error = f"answer of {len(answer)} bytes, limit {self._max_bytes}"
            self._send(Failure(call.id, error) if error else Answer(call.id, answer))

        peer_id = PeerID.from_base58(self.proven.peer_id)
        account = self.proven.member.id
        task = self._desk.handle(call.name, call.data, peer_id=peer_id, account=account, reply=reply)
        if task is not None:
            self._handling[call.id] = task
            task.add_done_callback(lambda _: self._handling.pop(call.id, None))

    def _settle(self, message: Answer | Failure) -> None:
        future = self._pending.get(message.id)
        if future is None or future.done():
            log.debug("dropped a late answer of %s", self.proven.member)
        elif isinstance(message, Answer):
            future.set_result(message.data)
        else:
            future.set_exception(PeerError(message.text, peer_id=self.proven.peer_id))

    def _send(self, message: LinkMessage) -> None:
        if not self.is_usable:
            return
        if self._transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            log.warning("dropping the link with %s, who does not read", self.proven.member)
            self._transport.abort()
            return
        data = _encoder.encode(message)
        self._transport.write(len(data).to_bytes(LENGTH_BYTES, "big") + data)

    def _tick(self) -> None:
        now = time.monotonic()
        if self._frame_since is not None and now - self._frame_since > FRAME_TIMEOUT_S:
            log.warning("dropping the link with %s: a message takes over %g s", self.proven.member, FRAME_TIMEOUT_S)
            self._transport.abort()
            return
        if now - self._heard > SILENCE_S:
            log.info("%s has been silent for %g s", self.proven.member, SILENCE_S)
            self._transport.abort()
            return
        self._send(Known(self._digest()))
        self._timer = asyncio.get_running_loop().call_later(PERIOD_S, self._tick)

    def _gone(self) -> PeerDisconnected:
        return PeerDisconnected(f"the link with {self.proven.member} is gone", peer_id=self.proven.peer_id)
