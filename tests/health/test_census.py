"""A look waits for nobody: servers that hang, refuse or lie cost their own time only."""

import asyncio
import time
from contextlib import asynccontextmanager
from typing import Any

import pytest

from swarm.catalog import ModelEntry
from swarm.errors import PeerTimeout, PeerUnreachable
from swarm.health import census as census_module
from swarm.health.census import MAX_ASKING, Census, ask
from swarm.health.state import Reach, Status
from swarm.protocol import InfoRequest, PushAccepted
from tests.health.fakes import DIGEST, make_entry, make_info, make_record, peer_ids


class FakeStream:
    """Answers as its server does."""

    carrier = "direct"

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    async def send(self, message: Any) -> None:
        assert isinstance(message, InfoRequest)

    async def receive(self) -> tuple[Any, bytes]:
        if isinstance(self._answer, Exception):
            raise self._answer
        if self._answer is None:
            await asyncio.Event().wait()
        return self._answer, b""


class FakeTransport:
    """Servers by id: an Info, an error, or None for one that never answers."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers, self.asked, self.num_open, self.most_open = answers, list[str](), 0, 0

    async def open(self, peer_id: str, service: str, *, timeout_s: float) -> Any:
        self.asked.append(peer_id)
        return self._stream(peer_id)

    @asynccontextmanager
    async def _stream(self, peer_id: str):
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            yield FakeStream(self.answers[peer_id])
        finally:
            self.num_open -= 1

    def rtt_s(self, peer_id: str) -> float | None:
        return 0.005


@pytest.fixture
def swarm(monkeypatch: pytest.MonkeyPatch):
    """Lets a census read these records from no DHT."""

    def make(records: list[Any], answers: dict[str, Any], **options: Any) -> tuple[Census, FakeTransport]:
        async def list_models(node: Any, limit: int) -> list[ModelEntry]:
            return [make_entry(6)]

        class FakeRegistry:
            def __init__(self, node: Any) -> None: ...

            async def lookup(self, digest: str) -> list[Any]:
                assert digest == DIGEST
                return records

        monkeypatch.setattr(census_module, "list_models", list_models)
        monkeypatch.setattr(census_module, "Registry", FakeRegistry)
        transport: Any = FakeTransport(answers)
        node: Any = None
        return Census(node, transport, **{"period_s": 0.0, **options}), transport

    return make


async def test_a_server_that_never_answers_delays_nobody(swarm, monkeypatch):
    """The others are there at once; it is unreachable when its own time is up."""
    monkeypatch.setattr(census_module.ask, "__kwdefaults__", {"timeout_s": 0.2})
    good, hanging = (make_record(peer, "0:6") for peer in peer_ids(2))
    census, _ = swarm([good, hanging], {good.peer_id: make_info(good), hanging.peer_id: None})
    [model] = await census.look({}, (), wait_s=0.05)
    by_peer = {server.peer_id: server for server in model.servers}
    assert by_peer[good.peer_id].rtt_ms == 5.0 and by_peer[hanging.peer_id].reach is Reach.UNKNOWN
    async with asyncio.timeout(10):
        while census._asking:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    [model] = await census.look({}, (model,), wait_s=0.0)
    late = next(server for server in model.servers if server.peer_id == hanging.peer_id)
    assert late.status is Status.UNREACHABLE and "no answer within" in late.trouble
    await census.close()


async def test_many_servers_are_asked_a_few_at_a_time_and_each_in_turn(swarm):
    """No more at once than the limit; those who waited longest first; nobody twice while it is being asked."""
    records = [make_record(peer, "0:6") for peer in peer_ids(MAX_ASKING + 20)]
    census, transport = swarm(records, {record.peer_id: make_info(record) for record in records})
    for _ in range(3):
        await census.look({}, (), wait_s=5.0)
    assert transport.most_open <= MAX_ASKING
    assert set(transport.asked) == {record.peer_id for record in records}
    await census.close()


async def test_a_server_is_not_asked_again_before_it_is_due(swarm):
    """Looks that come quickly one after the other, at news of a canary, ask nobody anew."""
    record = make_record(peer_ids(1)[0], "0:6")
    census, transport = swarm([record], {record.peer_id: make_info(record)}, period_s=60.0)
    for _ in range(3):
        await census.look({}, (), wait_s=1.0)
    assert transport.asked == [record.peer_id]
    await census.close()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (PeerUnreachable("connection refused"), "connection refused"),
        (PushAccepted(), "expected Info, got PushAccepted"),
    ],
)
async def test_whatever_a_server_does_is_an_answer(answer: Any, words: str):
    """Errors and wrong messages never raise."""
    transport: Any = FakeTransport({"x": answer})
    found = await ask(transport, "x")
    assert found.reach is Reach.NONE and words in (found.trouble or "")


async def test_a_dht_that_was_never_there_is_an_error_and_one_that_is_silent_is_not(swarm, monkeypatch):
    """What was read before stays, with the time at which it was read."""
    record = make_record(peer_ids(1)[0], "0:6")
    census, _ = swarm([record], {record.peer_id: make_info(record)})
    working = census_module.list_models

    async def silent(*_: Any) -> None:
        raise PeerTimeout("nobody answers")

    monkeypatch.setattr(census_module, "list_models", silent)
    with pytest.raises(PeerTimeout):
        await census.look({}, ())
    monkeypatch.setattr(census_module, "list_models", working)
    await census.look({}, (), wait_s=1.0)
    read_at = census.read_at
    assert read_at is not None and time.time() - read_at < 60
    monkeypatch.setattr(type(census._registry), "lookup", silent)
    [model] = await census.look({}, (), wait_s=1.0)
    assert model.servers and census.read_at == read_at and census.hidden_size(DIGEST) == 64
    await census.close()


async def test_a_look_does_not_wait_for_the_list_of_models(swarm, monkeypatch):
    """Known models are looked at while the list is read again; a new one is there when the list has come."""
    record = make_record(peer_ids(1)[0], "0:6")
    census, _ = swarm([record], {record.peer_id: make_info(record)})
    await census.look({}, (), wait_s=1.0)
    gate = asyncio.Event()
    other = ModelEntry(digest=DIGEST, name="renamed", num_blocks=6)

    async def slow(*_: Any) -> list[ModelEntry]:
        await gate.wait()
        return [other]

    monkeypatch.setattr(census_module, "list_models", slow)
    monkeypatch.setattr(census_module, "LIST_PERIOD_S", 0.0)
    [model] = await census.look({}, (), wait_s=1.0)
    assert model.name != "renamed"
    monkeypatch.setattr(census_module, "LIST_PERIOD_S", 60.0)
    gate.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    [model] = await census.look({}, (), wait_s=1.0)
    assert model.name == "renamed"
    await census.close()
