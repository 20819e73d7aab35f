"""Announcements of a server: in order, the newest last; a swarm that does not take them is no secret."""

import asyncio
import logging
from contextlib import asynccontextmanager

import pytest

from swarm.catalog import ModelEntry
from swarm.errors import PeerTimeout
from swarm.registry import Registry, ServerRecord
from swarm.server import announcer as announcer_module
from swarm.server.announcer import NAMES_S, Announcer
from swarm.types import BlockRange, ServerState

MODEL = "ab" * 32


class FakeTable:
    """A node whose DHT takes what it is told to take."""

    peer_id = "12D3KooWA1bysvV5nRqkEcKQPY1Z2oW7RjvqCJ4wJ4m6Xb6Yt4bA"

    def __init__(self):
        self.stored: list[tuple[str, bytes]] = []
        self.takes = True
        self.error = None
        self.may_store = asyncio.Event()
        self.may_store.set()

    async def dht_store(self, key, subkey, value, expires_at):
        await self.may_store.wait()
        if self.error is not None:
            raise self.error
        self.stored.append((key, value))
        return self.takes

    @property
    def records(self):
        return [value for key, value in self.stored if key.startswith("swarm/servers/")]

    @property
    def num_names(self):
        return len(self.stored) - len(self.records)


class Told:
    """What a server says of itself: how often it was asked."""

    def __init__(self):
        self.num_asked = 0
        self.state = ServerState.ONLINE

    def __call__(self, expires_at):
        self.num_asked += 1
        return ServerRecord(
            peer_id=FakeTable.peer_id,
            model=MODEL,
            blocks=BlockRange(0, self.num_asked),
            state=self.state,
            decode_tps=1.0,
            load=0.0,
            kv_free_tokens=0,
            quantization="none",
            dtype="float32",
            public_name="",
            version="",
            expires_at=expires_at,
        )


@asynccontextmanager
async def announcer_of(table, told, *, renew=None, period_s=20.0):
    entry = ModelEntry(digest=MODEL, name="fake", num_blocks=24)
    announcer = Announcer(table, Registry(table), entry, period_s=period_s, describe=told, renew=renew)
    yield announcer
    await announcer.close()


def states_of(table):
    return [ServerRecord.decode(it, peer_id=FakeTable.peer_id, model=MODEL).state for it in table.records]


async def test_a_record_is_made_when_its_turn_has_come():
    """One that waits for another tells what is then: nothing old comes after something new."""
    table, told = FakeTable(), Told()
    async with announcer_of(table, told) as announcer:
        table.may_store.clear()
        telling = [asyncio.create_task(announcer.tell()) for _ in range(2)]
        for _ in range(5):
            await asyncio.sleep(0)
        assert told.num_asked == 1
        told.state = ServerState.DRAINING
        table.may_store.set()
        await asyncio.gather(*telling)
    assert states_of(table) == [ServerState.ONLINE, ServerState.DRAINING]


async def test_names_are_told_before_they_expire_and_no_more_often(monkeypatch):
    """A renewal costs one value, not three; a name that nobody took is told with the next one."""
    now = 1000.0
    monkeypatch.setattr(announcer_module.time, "monotonic", lambda: now)
    table, told = FakeTable(), Told()
    async with announcer_of(table, told) as announcer:
        table.takes = False
        await announcer.tell()
        assert table.num_names == 2
        table.takes = True
        for _ in range(3):
            await announcer.tell()
        assert (len(table.records), table.num_names) == (4, 4)
        now += NAMES_S
        told.state = ServerState.OFFLINE
        await announcer.tell()
        assert table.num_names == 4, "one that leaves serves nothing"
        told.state = ServerState.ONLINE
        await announcer.tell()
        assert table.num_names == 6


async def test_a_server_that_nobody_sees_says_so_once(caplog):
    """Its shard is full of others: the owner must know, and also when it is over."""
    table, told = FakeTable(), Told()
    async with announcer_of(table, told) as announcer:
        table.takes = False
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                await announcer.tell()
            table.takes = True
            for _ in range(3):
                await announcer.tell()
        assert [record.message.partition("(")[0] for record in caplog.records] == [
            "nobody has taken our record ",
            "our record is taken again ",
        ]


@pytest.mark.parametrize("what", ["the table", "the server"])
async def test_what_cannot_be_announced_is_logged_and_tried_again(caplog, what):
    """An error of the DHT, or a record that breaks a rule, ends nothing."""
    table, told = FakeTable(), Told()
    async with announcer_of(table, told) as announcer:
        error = PeerTimeout("no answer")
        if what == "the table":
            table.error = error
        else:

            def fails(expires_at):
                raise error

            announcer._describe = fails
        with caplog.at_level(logging.WARNING):
            await announcer.tell()
        assert "could not announce this server: no answer" in caplog.text
        table.error, announcer._describe = None, told
        await announcer.tell()
        assert len(table.records) == 1


async def test_from_the_first_announcement_on_it_is_renewed_every_period(caplog):
    """Not before, since nothing is known then; and one renewal that fails is not the last."""
    table, told, renewals, enough = FakeTable(), Told(), [], asyncio.Event()

    async def renew():
        renewals.append(len(table.records))
        if len(renewals) == 1:
            raise ValueError("a defect")
        await announcer.tell()
        if len(renewals) == 3:
            enough.set()

    async with announcer_of(table, told, renew=renew, period_s=0.01) as announcer:
        assert not len(announcer._tasks)
        await announcer.tell()
        await asyncio.wait_for(enough.wait(), 10)
        assert renewals[:3] == [1, 1, 2] and "task renewal failed" in caplog.text


async def test_what_changes_while_a_change_is_told_is_told_as_well():
    """Once: however often it has changed meanwhile."""
    table, told = FakeTable(), Told()
    async with announcer_of(table, told) as announcer:
        table.may_store.clear()
        announcer.tell_beside()
        for _ in range(5):
            await asyncio.sleep(0)
        assert told.num_asked == 1
        told.state = ServerState.DRAINING
        for _ in range(3):
            announcer.tell_beside()
        table.may_store.set()
        await announcer._telling
    assert states_of(table) == [ServerState.ONLINE, ServerState.DRAINING]


async def test_nothing_comes_after_the_last_announcement():
    """Neither a renewal that is under way nor a change nor the next period."""
    table, told, is_renewing = FakeTable(), Told(), asyncio.Event()

    async def renew():
        is_renewing.set()
        await asyncio.Event().wait()

    async with announcer_of(table, told, renew=renew) as announcer:
        await announcer.tell()
        renewal = announcer.renew_beside()
        await is_renewing.wait()
        told.state = ServerState.OFFLINE
        await announcer.tell_last()
        assert renewal.cancelled() and not len(announcer._tasks)
        announcer.tell_beside()
        assert not len(announcer._tasks)
    assert states_of(table) == [ServerState.ONLINE, ServerState.OFFLINE]


async def test_a_table_that_does_not_answer_does_not_hold_up_the_end(monkeypatch, caplog):
    """The record will expire; an announcement that waits for the table is given up for the last one."""
    monkeypatch.setattr(announcer_module, "LAST_TIMEOUT_S", 0.01)
    table, told = FakeTable(), Told()
    async with announcer_of(table, told) as announcer:
        table.may_store.clear()
        announcer.tell_beside()
        with caplog.at_level(logging.INFO):
            await announcer.tell_last()
    assert "could not announce OFFLINE" in caplog.text and not table.records
