"""One adapter trained by several clients whose data stays with them: `FederatedRun(model, name=...)`.

    local steps ─► run.round(num_examples) ─► Stage.update ─► Exchange ~~► the others' updates, the same for all
         ▲                                                                      │
         └────────── the adapter, changed in place ◄── Stage.combine ◄──────────┘

Data, optimiser and loop are the caller's; blocks run on the swarm's servers as in any training. A run has a peer of its
own, which others can connect to. Nobody coordinates: `swarm.federated` says how clients agree.
"""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Self, cast

import msgspec
from torch import nn

from swarm.adapters.peft import LoadedAdapter
from swarm.adapters.peft_save import save_lora
from swarm.client.federated_stages import FederatedSettings, FixedRank, Stacking, Stage, Warmup, rank_of
from swarm.client.generation import DistributedModel
from swarm.client.lora_factors import LoraFactors
from swarm.client.peft_model import DistributedPeftModel
from swarm.client.runtime import LoopThread, SwarmService, leave
from swarm.errors import InvalidRequest, SwarmError
from swarm.federated.aggregate import Update
from swarm.federated.agreement import MAX_CLIENTS, Head
from swarm.federated.exchange import Behind, Exchange
from swarm.federated.roll import Roll
from swarm.federated.updates import pack_update
from swarm.identity import Identity, is_peer_id
from swarm.network.node import Node, NodeConfig
from swarm.private.credentials import Credentials
from swarm.transport import Transport

logger = logging.getLogger(__name__)

MAX_NAME_CHARS = 128
CLOSE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundResult:
    """What a round has come to."""

    round: int
    """From 0; the model has what the next one begins with."""
    clients: Mapping[str, int]
    """Those whose updates count, by peer id: how many examples they say that they have; empty where we came late."""
    took_part: bool
    """Whether ours counts. Where it does not, what was learnt since the last round is gone: most were further."""
    refused: Mapping[str, str]
    """Whose update did not count, and why."""
    rank: int
    """Of what all have learnt until now."""
    bytes_sent: int
    bytes_received: int
    """Of adapters in this round, by this client."""


class FederatedRun:
    """See the module docstring.

    Args:
        model: with one LoRA adapter, as from `swarm.get_peft_model`; the run changes it in place from now on.
        name: of the run; all its clients use the same.
        peers: full addresses of any peers of the swarm, or of other clients of the run; those of the model's swarm by
            default. With none at all, this client is the first, and `address` is what the others need.
        settings: which all clients must have alike.
        min_clients: a round with fewer fails.
        timeout_s: longest that a round may take; clients that haven't come after three quarters of it are left out.
        members: peer ids of those who may take part, ourselves included, alike for all; None for anybody who knows the
            name.
        identity: who we are: an identity or its file; somebody new by default.
        credentials: our invitation into a private swarm, as a server: clients' invitations can't announce anything.
        host, port: to listen on; port 0 is any.
        announce: addresses to announce in place of those found.

    Raises:
        InvalidRequest: the model or an argument can't be used; names it.
        PeerUnreachable, AccessDenied, ConfigError: as for any peer that joins.
    """

    def __init__(
        self,
        model: DistributedPeftModel,
        *,
        name: str,
        peers: Sequence[str] | None = None,
        settings: FederatedSettings | None = None,
        min_clients: int = 2,
        timeout_s: float = 600.0,
        members: Collection[str] | None = None,
        identity: Identity | str | Path | None = None,
        credentials: Credentials | None = None,
        host: str = "0.0.0.0",
        port: int = 0,
        announce: Sequence[str] = (),
    ):
        self.settings = settings or FederatedSettings()
        self._min_clients, self._timeout_s = min_clients, timeout_s
        self._members = None if members is None else frozenset(members)
        _check(name, min_clients, timeout_s, self._members)
        self._factors = LoraFactors(model)
        base_model = cast(DistributedModel, model.get_base_model())
        checkpoint = base_model.checkpoint
        self._warmup = Warmup(self._factors, self.settings, name) if self.settings.warmup_rounds else None
        self._main: FixedRank | Stacking = (
            Stacking(self._factors, self.settings, name)
            if self.settings.aggregate == "stack"
            else FixedRank(self._factors, self.settings, name)
        )
        start = self._stage(0).start()
        packed = pack_update(start, self._factors.layout)
        run = self._run_digest(name, checkpoint.digest, packed.digest)
        peers, credentials = _swarm_of(base_model, peers, credentials)
        config = NodeConfig(
            identity=identity if isinstance(identity, Identity) else None,
            identity_path=identity if isinstance(identity, str | Path) else None,
            initial_peers=tuple(peers), host=host, port=port, announce=tuple(announce), credentials=credentials,
        )  # fmt: skip
        self._loop = LoopThread("swarm-federated")
        try:
            self._node, self._transport = self._loop.run(_join(config))
            roll = Roll(self._node, name=name, model=checkpoint.digest, run=run, members=self._members)
            self._exchange = Exchange(
                self._transport, self._node.identity, roll, run=run, head=Head(0, packed.digest), base=packed,
                members=self._members,
            )  # fmt: skip
            self._enter(start)
        except BaseException:
            self.close()
            raise

    @property
    def peer_id(self) -> str:
        """Who we are to the others."""
        return self._node.peer_id

    @property
    def address(self) -> str:
        """A full address under which others may find us, and so the run."""
        return self._node.addresses[0]

    @property
    def number(self) -> int:
        """The round that comes next."""
        return self._exchange.head.round

    @property
    def digest(self) -> str:
        """Of the adapter with which this round began: the same for all clients."""
        return self._exchange.head.base

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is to be trained in this round: other parameters after the warm-up, the same ones otherwise."""
        return (parameter for parameter in self._factors.model.parameters() if parameter.requires_grad)

    def round(self, num_examples: int, *, timeout_s: float | None = None) -> RoundResult:
        """Give the others what was learnt since the last round, and change the model to what all have learnt.

        Whoever comes too late for a round gets its result all the same. Who tries again after a failed round that
        others were in gives the same update again, and what was learnt since is gone. Begin with a new optimiser
        afterwards: its moments are of another adapter.

        Args:
            num_examples: (or tokens) that the update was trained on: its weight in the mean.
            timeout_s: in place of the run's.

        Raises:
            InvalidRequest: num_examples is not positive. RoundFailed: too few clients came; the model is unchanged.
            PeerError: the others are further, and nobody sends what they have; the model is unchanged.
        """
        if not 1 <= num_examples <= 1 << 40:
            raise InvalidRequest(f"num_examples is {num_examples}, range 1..{1 << 40}")
        before, number = (self._exchange.bytes.sent, self._exchange.bytes.received), self.number
        stage = self._stage(number)
        head = self._loop.run(self._exchange.find_head())
        if head != self._exchange.head:
            return self._late(head, before)
        update = stage.update()
        own = pack_update(update, self._factors.layout)
        exchanged = self._exchange.round(
            own, update, num_examples, stage.rules(), min_clients=self._min_clients,
            timeout_s=timeout_s or self._timeout_s,
        )  # fmt: skip
        try:
            outcome = self._loop.run(exchanged)
        except Behind as behind:
            return self._late(behind.head, before)
        base = stage.combine(outcome.taken)
        if isinstance(stage, Warmup) and number + 1 == self.settings.warmup_rounds:
            base = self._main.after_warmup(base)
        self._advance(number + 1, base, pack_update(base, self._factors.layout))
        clients = {it.peer_id: it.num_examples for it in outcome.taken}
        return self._result(number, clients, outcome.refused, before)

    def current(self) -> Update:
        """All that was learnt, as one adapter by block; with "stack", its rank is the sum of the parts'."""
        return self._stage(self.number).current()

    def save_pretrained(self, directory: Path | str) -> None:
        """Write all that was learnt as one LoRA adapter: PEFT's files, for PEFT and for the swarm alike."""
        save_lora(directory, self.current(), layout=self._factors.layout, base=self._factors.base_name)

    def close(self) -> None:
        """Leave the run; the model stays as it is. May be called twice."""
        if not self._loop.is_running:
            return
        for closing in (self._leave_run, self._leave_swarm):
            with suppress(TimeoutError, SwarmError):
                closing()
        self._loop.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<FederatedRun {self.peer_id[-8:]} | round {self.number} | {self.settings.aggregate}>"

    # -- details --------------------------------------------------------------------------------------------------

    def _stage(self, number: int) -> Stage:
        return self._warmup if self._warmup is not None and number < self.settings.warmup_rounds else self._main

    def _enter(self, start: Update) -> None:
        """Begin where the others are, and only then let them wait for us."""
        self._stage(0).begin(start, 0)
        self._loop.run(self._exchange.start())
        head = self._loop.run(self._exchange.find_head())
        if head != self._exchange.head:
            self._catch_up(head)
        self._loop.run(self._exchange.announce())

    def _advance(self, number: int, base: Update, packed: LoadedAdapter) -> None:
        self._stage(number).begin(base, number)
        if self._warmup is not None and number >= self.settings.warmup_rounds:
            self._warmup.end()
        head = Head(number, packed.digest)

        async def advance() -> None:
            self._exchange.advance(head, packed)

        self._loop.run(advance())

    def _catch_up(self, head: Head) -> None:
        """Take over what the others have learnt.

        Raises:
            PeerError: nobody sends it.
        """
        stage = self._stage(head.round)
        packed, base = self._loop.run(self._exchange.fetch_base(head, stage.base_rules))
        logger.info("went on to round %d with the adapter of the others", head.round)
        self._advance(head.round, base, packed)

    def _late(self, head: Head, before: tuple[int, int]) -> RoundResult:
        number = self.number
        if head != self._exchange.head:
            self._catch_up(head)
        return self._result(number, {}, {}, before)

    def _result(
        self, number: int, clients: Mapping[str, int], refused: Mapping[str, str], before: tuple[int, int]
    ) -> RoundResult:
        counted = self._exchange.bytes
        return RoundResult(
            round=number, clients=clients, took_part=self.peer_id in clients, refused=refused,
            rank=rank_of(self._stage(self.number).base), bytes_sent=counted.sent - before[0],
            bytes_received=counted.received - before[1],
        )  # fmt: skip

    def _run_digest(self, name: str, model: str, start: str) -> str:
        """Of all that clients must have alike: with anything else, they would come to other results."""
        factors, is_stack = self._factors, self.settings.aggregate == "stack"
        told = {
            "version": 1, "name": name, "model": model, "start": start, "settings": asdict(self.settings),
            "linears": {str(block): list(paths) for block, paths in factors.linears.items()},
            "rank": None if is_stack else factors.rank, "scale": None if is_stack else factors.scale,
            "members": None if self._members is None else sorted(self._members),
        }  # fmt: skip
        return sha256(msgspec.json.encode(told, order="sorted")).hexdigest()

    def _leave_run(self) -> None:
        if hasattr(self, "_exchange"):
            self._loop.run(self._exchange.close(), CLOSE_TIMEOUT_S)

    def _leave_swarm(self) -> None:
        if hasattr(self, "_transport"):
            self._loop.run(leave(self._transport, self._node), CLOSE_TIMEOUT_S)


async def _join(config: NodeConfig) -> tuple[Node, Transport]:
    """A peer that others can connect to."""
    node = await Node.start(config)
    transport = Transport(node, listen=(config.host, 0))
    try:
        await transport.start()
    except BaseException:
        await node.close()
        raise
    return node, transport


def _swarm_of(
    model: DistributedModel, peers: Sequence[str] | None, credentials: Credentials | None
) -> tuple[Sequence[str], Credentials | None]:
    """Where to meet the others: what the caller names, else where the model's blocks are."""
    service = model.block_service
    if isinstance(peers, str):
        raise InvalidRequest(f"peers must be a list of addresses, got the string {peers!r}")
    if isinstance(service, SwarmService):
        return (service.initial_peers if peers is None else peers), credentials or service.credentials
    if peers is None:
        raise InvalidRequest("peers is missing: the model's blocks are not those of a swarm")
    return peers, credentials


def _check(name: str, min_clients: int, timeout_s: float, members: frozenset[str] | None) -> None:
    if not 1 <= len(name) <= MAX_NAME_CHARS or not name.isprintable():
        raise InvalidRequest(f"name {name[:64]!r} of {len(name)} characters, need 1..{MAX_NAME_CHARS} printable ones")
    if not 1 <= min_clients <= MAX_CLIENTS:
        raise InvalidRequest(f"min_clients is {min_clients}, range 1..{MAX_CLIENTS}")
    if not 0 < timeout_s <= 86400:
        raise InvalidRequest(f"timeout_s is {timeout_s}, range 0..86400")
    if members is not None:
        wrong = sorted(it for it in members if not is_peer_id(it))
        if wrong or len(members) > MAX_CLIENTS:
            raise InvalidRequest(f"members: {wrong[:3] or len(members)}, need at most {MAX_CLIENTS} peer ids")
