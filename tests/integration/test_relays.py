"""Servers and clients behind routers that let nobody in, as processes on an emulated network of their own.

In an open swarm and in a private one, where they are members and so are their relays.
"""

import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from swarm.checkpoint.source import resolve
from swarm.client.config import SessionConfig
from swarm.client.processes import PeerProcess, all_stopped
from swarm.client.runtime import SwarmService, connect
from swarm.errors import PeerDisconnected
from swarm.private.certificates import Role
from swarm.registry import ServerRecord
from tests.integration.conftest import HIDDEN, NUM_BLOCKS, closing
from tests.integration.test_swarm import embed, expected_logits, logits
from tests.swarm.private.labs import Lab, lab_now
from tests.wan import Wan, WanUnavailable

BOOTSTRAP, PUBLIC, HIDDEN_SERVER, FORWARDED, CLIENT = range(5)
START_S = 90


class Hosts:
    """A swarm on an emulated network, private with a lab: who is behind a closed router can only connect out."""

    def __init__(self, wan: Wan, model: Path, home: Path, lab: Lab | None):
        self.wan, self.model, self.processes = wan, model, list[PeerProcess]()
        self.home, self.lab = home, lab
        self.bootstrap = self._start(BOOTSTRAP, "swarm.bootstrap", [])
        self.address = self.bootstrap.wait_for(r"ONLINE .* --initial-peers (\S+)", START_S)[1]

    def start_server(self, host: int, blocks: str) -> PeerProcess:
        """A server process on a host, told nothing of how it can be reached."""
        options = [str(self.model), "--blocks", blocks, "--device", "cpu", "--threads", "1", "--kv-cache", "2048"]
        return self._start(host, "swarm.server", [*options, "--initial-peers", self.address])

    def connect(self) -> SwarmService:
        """A client behind a closed router."""
        with self.wan.inside(CLIENT):
            return connect(
                resolve(str(self.model)),
                num_blocks=NUM_BLOCKS,
                hidden_size=HIDDEN,
                initial_peers=[self.address],
                config=SessionConfig(max_wait_s=30.0),
                credentials=self.lab and self.lab.invite("ana", Role.CLIENT),
            )

    def _start(self, host: int, module: str, options: list[str]) -> PeerProcess:
        if self.lab is not None:
            invitation = self.home / f"gpu{len(self.processes)}.credentials"
            self.lab.invite(invitation.stem).save(invitation)
            options += ["--credentials", str(invitation)]
        with self.wan.inside(host):
            arguments = ["--host", self.wan.address(host), *options]
            self.processes.append(PeerProcess(module, arguments, env={"SWARM_CACHE": str(self.home)}))
        return self.processes[-1]


@pytest.fixture(scope="module")
def hosts(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Hosts]:
    """A bootstrap peer and two servers: anybody reaches the one of 0:3, nobody that of 3:6."""
    wan = Wan(5, nats={HIDDEN_SERVER: "closed", FORWARDED: "open", CLIENT: "closed"})
    try:
        entered = wan.__enter__()
    except WanUnavailable as error:
        pytest.skip(str(error))
    with ExitStack() as stack:
        stack.push(entered.__exit__)
        lab = lab_now() if request.param == "private" else None
        hosts = Hosts(entered, tiny_llama, tmp_path_factory.mktemp(request.param), lab)
        stack.enter_context(all_stopped(hosts.processes))
        public, hidden = hosts.start_server(PUBLIC, "0:3"), hosts.start_server(HIDDEN_SERVER, "3:6")
        public.wait_for("^ONLINE", START_S)
        hidden.wait_for("^ONLINE", START_S)
        yield hosts


in_both = pytest.mark.parametrize("hosts", ["open", "private"], indirect=True)


def carriers(service: SwarmService) -> dict[str, set[str]]:
    """How the client is connected, by peer."""
    return {peer_id: {it.carrier for it in found} for peer_id, found in service._transport._by_peer.items()}


@in_both
def test_a_server_that_nobody_can_connect_to_is_reached_through_others(hosts: Hosts, local_model):
    """It finds that out, says so, and serves a client that nobody can connect to either; servers push as ever."""
    assert hosts.processes[2].wait_for("nobody can connect to this machine", 1)
    assert hosts.processes[1].wait_for("listening on", 1)
    with closing(hosts.connect()) as service, service.open_session(batch_size=1, max_length=8) as session:
        inputs = embed(local_model, [1, 2, 3, 4])
        session.step(inputs[:3], positions=[0], num_tokens=[3])
        outputs = session.step(inputs[3:], positions=[3], num_tokens=[1])
        public, hidden = (hop.peer_id for hop in session.route)
        assert session.num_pushes == 1 and session.num_replays == 0
        assert carriers(service)[hidden] == {"relay"} and "direct" in carriers(service)[public]
        records = {record.peer_id: record for record in service.peers.records}
        assert records[hidden].is_relayed and records[hidden].relays and not records[public].is_relayed
    assert_right(local_model, outputs)


@in_both
def test_a_session_goes_on_when_the_relay_that_carries_it_is_killed(hosts: Hosts, local_model):
    """Through the other one: the bootstrap peer, which carries it, is stopped between two steps."""
    with closing(hosts.connect()) as service:
        bootstrap = hosts.address.split("/")[-1]
        hidden = next(it for it in wait_for_records(service) if it.is_relayed)
        assert bootstrap in hidden.relays
        service._loop.run(only_through(service, hidden.peer_id, bootstrap))
        with service.open_session(batch_size=1, max_length=8) as session:
            inputs = embed(local_model, [1, 2, 3, 4])
            session.step(inputs[:3], positions=[0], num_tokens=[3])
            hosts.bootstrap.signal(signal.SIGSTOP)
            try:
                service._node.relays.learn(hidden.peer_id, hidden.relays)
                outputs = session.step(inputs[3:], positions=[3], num_tokens=[1])
            finally:
                hosts.bootstrap.signal(signal.SIGCONT)
            assert session.num_replays >= 1 and carriers(service)[hidden.peer_id] == {"relay"}
    assert_right(local_model, outputs)


def wait_for_records(service: SwarmService) -> Sequence[ServerRecord]:
    """Records of both servers, the hidden one with two relays."""
    while len(records := service.peers.records) < 2 or max(len(it.relays) for it in records) < 2:
        service._loop.run(service.peers.refresh(max_age_s=0.2))
    return records


async def only_through(service: SwarmService, peer_id: str, relay: str) -> None:
    """Have a client reach a peer through this relay alone, whatever it reads or has begun meanwhile."""
    while {it.via for it in service._transport._by_peer.get(peer_id, ())} != {relay}:
        for connection in list(service._transport._by_peer.get(peer_id, ())):
            connection.close(PeerDisconnected("another way is tried"))
        service._node.relays.learn(peer_id, [relay])
        await service._transport._ways.connect(peer_id, "relay", 10)


@pytest.mark.parametrize("hosts", ["open"], indirect=True)
def test_a_server_whose_ports_are_forwarded_announces_the_address_that_others_see(hosts: Hosts, local_model):
    """It knows only its inside address; whom it asked told it the other one. Clients connect to it directly."""
    server = hosts.start_server(FORWARDED, "3:6")
    try:
        server.wait_for("^ONLINE", START_S)
        outside = hosts.wan.outside_address(FORWARDED)
        assert server.wait_for(rf"/ip4/{outside}/tcp/\d+/p2p/", 1)
        hosts.processes[2].signal(signal.SIGSTOP)  # the only other one of these blocks
        with closing(hosts.connect()) as service, service.open_session(batch_size=1, max_length=8) as session:
            outputs = session.step(embed(local_model, [1, 2, 3, 4]), positions=[0], num_tokens=[4])
            assert carriers(service)[session.route[1].peer_id] == {"direct"}
        assert_right(local_model, outputs)
    finally:
        hosts.processes[2].signal(signal.SIGCONT)
        server.stop()


def assert_right(model, outputs: torch.Tensor) -> None:
    """The last of four tokens has the logits that transformers computes."""
    expected = expected_logits(model, [1, 2, 3, 4])
    torch.testing.assert_close(logits(model, outputs)[-1], expected[-1], atol=1e-4, rtol=0)
