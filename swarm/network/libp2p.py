"""The underlay of open swarms: hivemind's libp2p daemon, kept alive whatever happens to it.

Libp2p.start ──► Daemon (p2pd) ◄── DaemonControl ◄── calls and raw streams of the node
                    ^                    ^
                    └─── supervise: replaces a daemon that died, hangs, is too large, or outdated ──┘
"""

import asyncio
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from swarm.errors import ConfigError, PeerTimeout, PeerUnreachable
from swarm.identity import Identity
from swarm.network.addresses import PeerAddress
from swarm.network.config import NodeConfig, listen_addresses, tcp_address
from swarm.network.control import DaemonControl
from swarm.network.daemon import Daemon, DaemonSettings, make_directory
from swarm.network.hive import P2PDaemonError, PeerID
from swarm.network.records import SignedRecords
from swarm.network.underlay import Expelled, Restarted, StreamFactory

log = logging.getLogger(__name__)

WATCH_PERIOD_S = 2.0
"""How often the supervisor looks at the daemon."""
HANG_TIMEOUT_S = 8.0
"""A daemon that answers no question for so long is replaced."""
ISOLATION_TIMEOUT_S = 60.0
"""A daemon without a connection for so long is replaced: libp2p waits ever longer (to 5 min) between its dials."""
RENEWAL_TIMEOUT_S = 60.0
"""How long a daemon with other settings may take to come."""
MAX_DAEMON_BYTES = 1 << 30
"""A daemon whose memory has grown to this is replaced: it has no limits of its own on what strangers make it hold."""
MAX_UNARY_BYTES = 4 << 20
_SLOW = ("deadline exceeded", "i/o timeout")
"""What the daemon says of peers that did not answer, but did not refuse either."""


class Libp2p:
    """One process's libp2p daemon.

    Args:
        config: where to listen.
        identity: who we are.
    """

    is_private = False
    entrance = None

    def __init__(self, config: NodeConfig, identity: Identity) -> None:
        listen, announce = listen_addresses(config)
        directory = make_directory()
        try:
            identity.save(directory / "identity.key")
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        self.num_restarts = 0
        self.denied = asyncio.Event()  # never set
        self.settings = DaemonSettings(
            directory=directory,
            identity_path=directory / "identity.key",
            listen=listen,
            announce=announce,
            nat_port_map=config.nat_port_map,
            max_message_bytes=MAX_UNARY_BYTES,
        )
        self.caller = DaemonControl(
            daemon_path=self.settings.control_path,
            listen_path=self.settings.listen_path,
            max_message_bytes=MAX_UNARY_BYTES,
        )
        self.listening: tuple[str, ...] = ()
        """Full addresses on which it listens, or that it announces in their place."""
        self._identity = identity
        self._startup_timeout_s = config.startup_timeout_s
        self._is_alone_on_purpose = not config.initial_peers
        self._daemon: Daemon | None = None
        self._outdated, self._renewed = asyncio.Event(), asyncio.Event()

    async def start(self) -> None:
        """Start the daemon.

        Raises:
            ConfigError: it does not start.
        """
        try:
            self._daemon = await Daemon.start(self.settings, timeout_s=self._startup_timeout_s)
            await self.caller.listen()
            await self.caller.attach()
            await self._refresh_addresses()
        except P2PDaemonError as error:
            raise ConfigError(str(error)) from error

    @property
    def endpoints(self) -> tuple[str, ...]:
        """See Underlay."""
        return () if self.settings.is_hidden else self.listening

    @property
    def is_up(self) -> bool:
        """Whether the daemon is connected."""
        return self.caller.attached.is_set()

    @property
    def daemon_pid(self) -> int:
        """Process id of the daemon at present."""
        assert self._daemon is not None, "not started"
        return self._daemon.pid

    def make_records(self) -> SignedRecords:
        """Whoever signs a record has a right to it."""
        return SignedRecords(self._identity)

    def account_of(self, peer_id: str) -> str:
        """Every peer stands for itself."""
        return peer_id

    def may_be_asked(self, peer_id: str) -> bool:
        """Everybody may."""
        return True

    def check_access(self) -> None:
        """Everybody may join."""

    def check_may_announce(self) -> None:
        """Everybody may announce."""

    def on_expelled(self, listener: Expelled) -> None:
        """Nobody is."""

    async def present(self, announce: Sequence[str], *, is_hidden: bool) -> None:
        """Replace the daemon by one that announces other addresses; nothing is done where that is so already.

        Streams through it end. Identity and port stay the same.

        Args:
            announce: hosts, in place of those found.
            is_hidden: whether nobody can connect to us.

        Raises:
            PeerTimeout: the daemon does not answer, or none has come in its place yet.
        """
        port = int(self.settings.listen[0].split("/")[4])
        addresses = tuple(tcp_address(host, port) for host in announce)
        settings = replace(self.settings, announce=addresses, is_hidden=is_hidden)
        if settings == self.settings:
            try:
                return await self._refresh_addresses()  # those of this machine may be others
            except (P2PDaemonError, TimeoutError) as error:
                raise PeerTimeout(f"the libp2p daemon does not say where it listens: {error}") from error
        self.settings = settings
        self._renewed.clear()
        self._outdated.set()
        try:
            async with asyncio.timeout(RENEWAL_TIMEOUT_S):
                await self._renewed.wait()
        except TimeoutError as error:
            reason = f"no libp2p daemon announces the new addresses after {RENEWAL_TIMEOUT_S:g} s"
            raise PeerTimeout(reason) from error

    async def close(self) -> None:
        """End the daemon, remove the sockets."""
        await self.caller.aclose()
        if self._daemon is not None:
            await self._daemon.stop()
        shutil.rmtree(self.settings.directory, ignore_errors=True)

    # --- peers ---

    async def connect(self, peer: PeerAddress, *, timeout_s: float) -> str:
        """See Underlay."""
        assert peer.peer_id is not None
        try:
            await self.caller.connect(PeerID.from_base58(peer.peer_id), [peer.multiaddr], timeout_s=timeout_s)
        except P2PDaemonError as error:
            raise PeerUnreachable(str(error), peer_id=peer.peer_id) from error
        except TimeoutError as error:
            raise PeerTimeout(f"no answer within {timeout_s:g} s", peer_id=peer.peer_id) from error
        return peer.peer_id

    async def list_peers(self) -> list[str]:
        """See Underlay."""
        try:
            return [peer_id.to_base58() for peer_id in await self.caller.list_peers()]
        except (P2PDaemonError, TimeoutError) as error:
            raise PeerTimeout(f"the libp2p daemon does not say whom it knows: {error}") from error

    async def list_addresses(self) -> list[str]:
        """See Underlay."""
        try:
            return await self.caller.list_addresses()
        except (P2PDaemonError, TimeoutError) as error:
            raise PeerTimeout(f"the libp2p daemon does not say whom it knows: {error}") from error

    async def open_stream(self, peer_id: str, name: str, protocol: asyncio.Protocol, *, timeout_s: float) -> None:
        """See Underlay."""
        try:
            target = PeerID.from_base58(peer_id)
        except ValueError as error:
            raise PeerUnreachable(f"{peer_id!r} is not a peer id", peer_id=peer_id) from error
        try:
            await self.caller.open_stream(target, name, protocol, timeout_s=timeout_s)
        except P2PDaemonError as error:
            is_slow = any(words in str(error) for words in _SLOW)
            kind = PeerTimeout if is_slow else PeerUnreachable
            raise kind(f"can't open {name} to {peer_id}: {error}", peer_id=peer_id) from error
        except TimeoutError as error:
            raise PeerTimeout(f"{peer_id} did not accept {name} within {timeout_s:g} s", peer_id=peer_id) from error

    async def add_stream_factory(self, name: str, factory: StreamFactory) -> None:
        """See Underlay."""
        try:
            await self.caller.add_stream_factory(name, factory)
        except (P2PDaemonError, TimeoutError) as error:
            log.warning("%s will be served when the daemon is back: %s", name, error)

    async def remove_stream_factory(self, name: str) -> None:
        """See Underlay."""
        try:
            await self.caller.remove_stream_factory(name)
        except (P2PDaemonError, TimeoutError) as error:
            log.debug("the daemon was not told that %s is no longer served: %s", name, error)

    async def _refresh_addresses(self) -> None:
        _, addresses = await self.caller.identify()
        texts = sorted(map(str, addresses), key=lambda text: text.startswith(("/ip4/127.", "/ip6/::1/")))
        self.listening = tuple(f"{text}/p2p/{self._identity.peer_id}" for text in texts)

    # --- the supervisor ---

    async def supervise(self, on_restart: Restarted) -> None:
        """Replace the daemon when it dies, loses our connection, hangs, takes too much memory, or is outdated."""
        while True:
            assert self._daemon is not None, "not started"
            ends = {
                asyncio.ensure_future(self._outdated.wait()): "announces what is not so any more",
                asyncio.ensure_future(self._daemon.wait()): "died",
                asyncio.ensure_future(self.caller.lost.wait()): "dropped us",
                asyncio.ensure_future(self._wait_until_hung()): "does not answer",
                asyncio.ensure_future(self._wait_until_large()): f"takes over {MAX_DAEMON_BYTES >> 20} MiB of memory",
            }
            try:
                done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                log.log(
                    logging.INFO if self._outdated.is_set() else logging.WARNING,
                    "the libp2p daemon %s; starting another",
                    ends[done.pop()],
                )
            finally:
                for end in ends:
                    end.cancel()
            self._outdated.clear()
            await self._restart()
            await on_restart()
            if not self._outdated.is_set():
                self._renewed.set()

    async def _wait_until_hung(self) -> None:
        """Returns when the daemon has not answered for HANG_TIMEOUT_S, or has had no peer for ISOLATION_TIMEOUT_S."""
        loop = asyncio.get_running_loop()
        silent_s = alone_s = 0.0  # counted attempt by attempt: a clock would blame the daemon when we stood still
        while silent_s < HANG_TIMEOUT_S and alone_s < ISOLATION_TIMEOUT_S:
            asked = loop.time()
            try:
                peers = await self.caller.list_peers()
            except (P2PDaemonError, TimeoutError):
                silent_s += min(loop.time() - asked, self.caller.timeout_s) + WATCH_PERIOD_S
            else:
                silent_s = 0.0
                alone_s = 0.0 if peers or self._is_alone_on_purpose else alone_s + WATCH_PERIOD_S
            await asyncio.sleep(WATCH_PERIOD_S)

    async def _wait_until_large(self) -> None:
        while resident_bytes(self.daemon_pid) < MAX_DAEMON_BYTES:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(WATCH_PERIOD_S)

    async def _restart(self) -> None:
        """Start a new daemon with the same identity and port, and register the handlers with it."""
        pause_s = 0.1
        while True:
            self.caller.detach()
            assert self._daemon is not None, "not started"
            self._daemon.kill()
            await self._daemon.stop()
            try:
                self._daemon = await Daemon.start(self.settings, timeout_s=self._startup_timeout_s)
                await self.caller.attach()
                await self._refresh_addresses()
            except (P2PDaemonError, TimeoutError) as error:
                log.error("the libp2p daemon can't be restarted: %s", error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, 10.0)
            else:
                break
        self.num_restarts += 1


def resident_bytes(pid: int) -> int:
    """Memory of a process, 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0
