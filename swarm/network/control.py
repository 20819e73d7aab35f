"""A client of the libp2p daemon's control socket: unary calls, raw streams, and questions about peers.

It speaks hivemind's p2pd protocol (varint-delimited protobuf on a unix socket) in place of hivemind's own
ControlClient, with four of its faults cured: a reply that meets a cancelled call is dropped instead of ending the
reader (so one race can't hang every later call), the loss of the daemon fails all pending calls at once, an oversized
reply becomes an error for its caller, and every request has a deadline. It knows nothing of processes, the DHT or
what is in a call.

    unary:   call_unary_handler --callUnary--> [persistent connection] --requestHandling--> registered handler -> task
    streams: open_stream  --STREAM_OPEN-->  [one connection each] --> the caller's asyncio protocol takes it over
             daemon --StreamInfo--> [our listening socket] --> the protocol made by the registered factory takes it over
"""

import asyncio
import logging
import uuid
from collections.abc import Iterable
from typing import Any

from swarm.network.hive import Multiaddr, P2PDaemonError, P2PHandlerError, PeerID, p2pd_pb2
from swarm.network.unary import Handler, UnaryDesk
from swarm.network.underlay import StreamFactory
from swarm.network.wire import Delimited

log = logging.getLogger(__name__)

MAX_CONTROL_BYTES = 1 << 20
"""Largest reply to a control request, and largest head of a stream."""
MAX_UNSENT_BYTES = 64 << 20
"""Bytes that may wait for a daemon that does not read."""


class _Request(Delimited):
    """One control request and its reply."""

    def __init__(self, request: Any) -> None:
        super().__init__(MAX_CONTROL_BYTES)
        self.request = request
        self.reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.send(self.request)

    def received(self, message: bytes) -> bool:
        if not self.reply.done():
            self.reply.set_result(p2pd_pb2.Response.FromString(message))
        return False

    def lost(self, exc: Exception | None) -> None:
        if not self.reply.done():
            self.reply.set_exception(P2PDaemonError("the daemon closed the connection"))


class _Incoming(Delimited):
    """A stream that a remote peer opened: its head names the peer and the protocol."""

    def __init__(self, factories: dict[str, StreamFactory]) -> None:
        super().__init__(MAX_CONTROL_BYTES)
        self.factories = factories

    def received(self, message: bytes) -> bool:
        info = p2pd_pb2.StreamInfo.FromString(message)
        factory = self.factories.get(info.proto)
        if factory is None:
            self.transport.abort()
        else:
            self.switch(factory(PeerID(info.peer).to_base58()))
        return False


class _Persistent(Delimited):
    """The connection that multiplexes all unary calls of this process."""

    def __init__(self, control: "DaemonControl") -> None:
        super().__init__(control.max_message_bytes + 4096)
        self.control = control
        self.upgraded: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.send(p2pd_pb2.Request(type=p2pd_pb2.Request.PERSISTENT_CONN_UPGRADE))

    def received(self, message: bytes) -> bool:
        if not self.upgraded.done():
            _raise_if_failed(p2pd_pb2.Response.FromString(message))
            self.upgraded.set_result(None)
        else:
            self.control.dispatch(p2pd_pb2.PersistentConnectionResponse.FromString(message))
        return True

    def lost(self, exc: Exception | None) -> None:
        if not self.upgraded.done():
            self.upgraded.set_exception(P2PDaemonError("the daemon closed the connection"))
            self.upgraded.exception()  # retrieved, in case that nobody waits any more
        self.control.on_lost(self)


class DaemonControl:
    """One process's client of its daemon. It survives the daemon: `attach` connects it to the next one.

    Args:
        daemon_path: the daemon's control socket.
        listen_path: our own socket, to which the daemon brings incoming streams.
        max_message_bytes: largest unary request or reply; the daemon must be started with the same limit.
        timeout_s: deadline of each control request.
    """

    def __init__(self, *, daemon_path: str, listen_path: str, max_message_bytes: int, timeout_s: float = 5.0) -> None:
        self.daemon_path = daemon_path
        self.listen_path = listen_path
        self.max_message_bytes = max_message_bytes
        self.timeout_s = timeout_s
        self.attached = asyncio.Event()
        self.lost = asyncio.Event()
        self._desk = UnaryDesk()
        self._stream_factories: dict[str, StreamFactory] = {}
        self._pending: dict[bytes, asyncio.Future[Any]] = {}
        self._handling: dict[bytes, asyncio.Task[Any]] = {}
        self._persistent: _Persistent | None = None
        self._server: asyncio.Server | None = None

    async def listen(self) -> None:
        """Open our own socket for incoming streams."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _Incoming(self._stream_factories), self.listen_path)

    async def attach(self) -> None:
        """Connect to a daemon that has just started, and register all handlers with it.

        Raises:
            P2PDaemonError: when it can't be reached or does not answer in time.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.timeout_s):
                _, persistent = await loop.create_unix_connection(lambda: _Persistent(self), self.daemon_path)
                self._persistent = persistent
                await persistent.upgraded
        except (OSError, TimeoutError) as error:
            raise P2PDaemonError(f"no connection to the daemon: {error!r}") from error
        self.attached.set()
        self.lost.clear()
        for name in list(self._desk.handlers):
            await self._register_unary(name)
        for name in list(self._stream_factories):
            await self._register_stream(name)

    def detach(self) -> None:
        """Drop the connection to the daemon; pending calls fail."""
        if self._persistent is not None:
            self._persistent.transport.abort()
            self.on_lost(self._persistent)

    async def aclose(self) -> None:
        """Drop the connection, stop listening and end the handlers."""
        self.detach()
        if self._server is not None:
            self._server.close()
        await self._desk.close()

    # --- unary calls, in the form in which hivemind's P2P makes them ---

    async def call_unary_handler(self, peer_id: Any, name: str, data: bytes) -> bytes:
        """Call a peer's unary handler. Cancelling the call tells the daemon, at no risk for other calls.

        Raises:
            P2PDaemonError: when the peer can't be reached or the daemon is lost. P2PHandlerError: when the handler
            failed.
        """
        request = p2pd_pb2.CallUnaryRequest(peer=peer_id.to_bytes(), proto=name, data=data)
        reply: bytes = await self._call(callUnary=request)
        return reply

    async def add_unary_handler(self, name: str, handler: Handler, balanced: bool = False) -> None:
        """Serve `name` to all peers, on this daemon and on those that follow it."""
        if name in self._desk.handlers:
            raise P2PDaemonError(f"handler {name} is registered already")
        self._desk.handlers[name] = handler
        await self._register_unary(name)

    async def remove_unary_handler(self, name: str) -> None:
        """Stop serving `name`."""
        if self._desk.handlers.pop(name, None) is not None and self.attached.is_set():
            await self._call_in_time(removeUnaryHandler=p2pd_pb2.RemoveUnaryHandlerRequest(proto=name))

    # --- raw streams ---

    async def open_stream(self, peer_id: Any, name: str, protocol: asyncio.Protocol, *, timeout_s: float) -> None:
        """Open a raw stream to a peer and hand it to `protocol`.

        Raises:
            P2PDaemonError: when it can't be opened. TimeoutError: when the deadline passes.
        """
        request = p2pd_pb2.Request(
            type=p2pd_pb2.Request.STREAM_OPEN,
            streamOpen=p2pd_pb2.StreamOpenRequest(
                peer=peer_id.to_bytes(), proto=[name], timeout=max(1, round(timeout_s))
            ),
        )
        connection, _ = await self._request(request, timeout_s)
        connection.switch(protocol)

    async def add_stream_factory(self, name: str, factory: StreamFactory) -> None:
        """Serve raw streams of `name` to all peers, on this daemon and on those that follow it."""
        is_new = name not in self._stream_factories
        self._stream_factories[name] = factory
        if is_new:
            await self._register_stream(name)

    async def remove_stream_factory(self, name: str) -> None:
        """Stop serving streams of `name`; those that are open stay."""
        if self._stream_factories.pop(name, None) is not None and self.attached.is_set():
            address = Multiaddr(f"/unix{self.listen_path}").to_bytes()
            handler = p2pd_pb2.RemoveStreamHandlerRequest(addr=address, proto=[name])
            request = p2pd_pb2.Request(type=p2pd_pb2.Request.REMOVE_STREAM_HANDLER, removeStreamHandler=handler)
            await self._ask(request)

    # --- questions about peers ---

    async def identify(self) -> tuple[Any, tuple[Any, ...]]:
        """The daemon's own peer id and the addresses that others may dial (multiaddrs without the peer id)."""
        reply = await self._ask(p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY))
        return PeerID(reply.identify.id), tuple(Multiaddr(address) for address in reply.identify.addrs)

    async def connect(self, peer_id: Any, addresses: Iterable[Any], *, timeout_s: float) -> None:
        """Connect to a peer at any of `addresses`.

        Raises:
            P2PDaemonError: when no address works. TimeoutError: when the deadline passes.
        """
        target = p2pd_pb2.ConnectRequest(
            peer=peer_id.to_bytes(),
            addrs=[address.to_bytes() for address in addresses],
            timeout=max(1, round(timeout_s)),
        )
        await self._ask(p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=target), timeout_s)

    async def list_peers(self) -> list[Any]:
        """Ids of the peers to which the daemon has a connection."""
        reply = await self._ask(p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS))
        return [PeerID(peer.id) for peer in reply.peers]

    async def list_addresses(self) -> list[str]:
        """Full addresses of these peers, as far as the daemon knows them."""
        reply = await self._ask(p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS))
        return [
            f"{Multiaddr(address)}/p2p/{PeerID(peer.id).to_base58()}" for peer in reply.peers for address in peer.addrs
        ]

    # --- below: one request, one call, one event of the persistent connection ---

    async def _ask(self, request: Any, timeout_s: float | None = None) -> Any:
        connection, reply = await self._request(request, timeout_s or self.timeout_s)
        connection.transport.close()
        return reply

    async def _request(self, request: Any, timeout_s: float) -> tuple[_Request, Any]:
        """Send a control request on a connection of its own; the caller owns the connection when it succeeds."""
        connection = _Request(request)
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.get_running_loop().create_unix_connection(lambda: connection, self.daemon_path)
                reply = await connection.reply
            _raise_if_failed(reply)
            return connection, reply
        except BaseException as error:
            if hasattr(connection, "transport"):
                connection.transport.abort()
            connection.reply.cancel()
            if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                raise P2PDaemonError(f"the daemon is not there: {error!r}") from error
            raise

    async def _call(self, **message: Any) -> Any:
        """Send a message over the persistent connection and wait for its reply, without a deadline of our own."""
        persistent, call_id = self._persistent, uuid.uuid4().bytes
        if persistent is None or persistent.is_lost:
            raise P2PDaemonError("the daemon is not there")
        request = p2pd_pb2.PersistentConnectionRequest(callId=call_id, **message)
        if request.ByteSize() > self.max_message_bytes:
            raise P2PDaemonError(f"request of {request.ByteSize()} bytes, limit {self.max_message_bytes}")
        if persistent.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            raise P2PDaemonError(f"the daemon does not read: over {MAX_UNSENT_BYTES} bytes are waiting for it")
        future = self._pending[call_id] = asyncio.get_running_loop().create_future()
        try:
            persistent.send(request)
            return await future
        except asyncio.CancelledError:
            if not persistent.transport.is_closing():
                persistent.send(p2pd_pb2.PersistentConnectionRequest(callId=call_id, cancel=p2pd_pb2.Cancel()))
            raise
        finally:
            self._pending.pop(call_id, None)

    async def _call_in_time(self, **message: Any) -> Any:
        try:
            async with asyncio.timeout(self.timeout_s):
                return await self._call(**message)
        except TimeoutError as error:
            raise P2PDaemonError(f"the daemon did not answer within {self.timeout_s} s") from error

    async def _register_unary(self, name: str) -> None:
        if self.attached.is_set():
            await self._call_in_time(addUnaryHandler=p2pd_pb2.AddUnaryHandlerRequest(proto=name, balanced=False))

    async def _register_stream(self, name: str) -> None:
        if self.attached.is_set():
            address = Multiaddr(f"/unix{self.listen_path}").to_bytes()
            handler = p2pd_pb2.StreamHandlerRequest(addr=address, proto=[name], balanced=False)
            await self._ask(p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_HANDLER, streamHandler=handler))

    def dispatch(self, response: Any) -> None:
        """Route one message of the persistent connection: the reply to a call of ours, or a request of a peer."""
        kind = response.WhichOneof("message")
        if kind == "requestHandling":
            self._start_handling(response.callId, response.requestHandling)
        elif kind == "cancel" and response.callId in self._handling:
            self._handling[response.callId].cancel()
        elif (future := self._pending.get(response.callId)) is None or future.done():
            log.debug("dropped a late %s", kind)  # the caller has gone: nothing to tell it, nothing to break
        elif kind == "daemonError":
            future.set_exception(P2PDaemonError(_one_line(response.daemonError.message)))
        elif kind != "callUnaryResponse":
            future.set_result(None)
        elif response.callUnaryResponse.HasField("error"):
            text = response.callUnaryResponse.error.decode(errors="replace")
            future.set_exception(P2PHandlerError(_one_line(text)))
        else:
            future.set_result(response.callUnaryResponse.response)

    def _start_handling(self, call_id: bytes, request: Any) -> None:
        task = self._desk.handle(
            request.proto,
            request.data,
            peer_id=PeerID(request.peer),
            account=request.peer.hex(),
            reply=lambda response, error: self._reply(call_id, response=response, error=error),
        )
        if task is not None:
            self._handling[call_id] = task
            task.add_done_callback(lambda _: self._handling.pop(call_id, None))

    def _reply(self, call_id: bytes, *, response: bytes, error: str) -> None:
        if len(response) > self.max_message_bytes - 128:
            error = f"reply of {len(response)} bytes, limit {self.max_message_bytes}"
        result = {"error": error.encode()} if error else {"response": response}
        reply = p2pd_pb2.CallUnaryResponse(**result)
        if self._persistent is not None and not self._persistent.transport.is_closing():
            self._persistent.send(p2pd_pb2.PersistentConnectionRequest(callId=call_id, unaryResponse=reply))

    def on_lost(self, persistent: _Persistent) -> None:
        """The persistent connection is gone: nothing pending will ever be answered."""
        if self._persistent is not persistent:
            return
        self._persistent = None
        self.attached.clear()
        self.lost.set()
        for future in self._pending.values():
            if not future.done():
                future.set_exception(P2PDaemonError("the daemon was lost"))
        for task in list(self._handling.values()):
            task.cancel()


def _raise_if_failed(response: Any) -> None:
    if response.type == p2pd_pb2.Response.ERROR:
        raise P2PDaemonError(_one_line(response.error.msg))


def _one_line(text: str) -> str:
    return " ".join(text[:1024].split())
