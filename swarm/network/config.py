"""How a node presents itself and whom it joins, checked before anything is started.

NodeConfig --load_identity, listen_addresses--> Identity, multiaddrs --> Node
"""

from dataclasses import dataclass
from pathlib import Path

from swarm.errors import ConfigError
from swarm.identity import Identity
from swarm.network.daemon import claim_port, resolve_host
from swarm.network.hive import Multiaddr, MultiaddrError
from swarm.private.credentials import Credentials


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """How a node presents itself and whom it joins.

    Attributes:
        identity: who we are; or `identity_path`, a file that is created when missing; with neither, a new identity.
        initial_peers: full addresses (/ip4/HOST/tcp/PORT/p2p/PEER_ID) of peers to join; none starts a new swarm.
        host: address to listen on.
        port: TCP port to listen on; 0 picks a free one.
        announce: addresses to announce in place of those found: hosts (then with our port) or multiaddrs.
        client_mode: accept no connections and store nothing for others.
        nat_port_map: ask the router for a port (UPnP, NAT-PMP).
        startup_timeout_s: deadline for the daemon, in seconds.
        join_timeout_s: deadline for the first initial peer to answer, in seconds.
        credentials: our invitation into a private swarm; None is an open one. In a private swarm initial peers may be
            given without a peer id, `announce` takes IP addresses, and port mapping is not used.
        state_dir: where a member keeps what it has heard of revocations; None for the cache directory.
    """

    identity: Identity | None = None
    identity_path: str | Path | None = None
    initial_peers: tuple[str, ...] = ()
    host: str = "0.0.0.0"
    port: int = 0
    announce: tuple[str, ...] = ()
    client_mode: bool = False
    nat_port_map: bool = False
    startup_timeout_s: float = 30.0
    join_timeout_s: float = 10.0
    credentials: Credentials | None = None
    state_dir: Path | None = None


def load_identity(config: NodeConfig) -> Identity:
    """The identity that the settings name, or a new one.

    Raises:
        ConfigError: for a bad identity file.
    """
    if config.identity is not None:
        return config.identity
    return Identity.load_or_create(config.identity_path) if config.identity_path else Identity.generate()


def listen_addresses(config: NodeConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Multiaddrs to listen on and to announce, with a port that is free; none for a client.

    Raises:
        ConfigError: for a port in use, or an address that is none.
    """
    if config.client_mode:
        return (), ()
    if not 0 <= config.port <= 65535:
        raise ConfigError(f"port {config.port} is not in 0..65535")
    port = claim_port(config.host, config.port)
    announce = tuple(text if text.startswith("/") else tcp_address(text, port) for text in config.announce)
    for text in announce:
        try:
            Multiaddr(text)
        except (MultiaddrError, ValueError) as error:
            raise ConfigError(f"address to announce {text!r} is neither a host nor a multiaddr") from error
    return (tcp_address(config.host, port),), announce


def tcp_address(host: str, port: int) -> str:
    """The multiaddr of a host and a TCP port.

    Raises:
        ConfigError: there is no such host.
    """
    address = resolve_host(host)
    return f"/ip{address.version}/{address}/tcp/{port}"
