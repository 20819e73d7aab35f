"""Who may call how often: limits per account, counted right whatever becomes of a call."""

import asyncio
from typing import Any

import pytest

from swarm.network import unary
from swarm.network.unary import UnaryDesk
from swarm.rates import Rate


class Caller:
    """Calls a desk and keeps what it answers."""

    def __init__(self, desk: UnaryDesk) -> None:
        self.desk, self.answers = desk, list[tuple[bytes, str]]()

    def call(self, name: str, data: bytes = b"", account: str = "a") -> asyncio.Task[None] | None:
        """One call."""
        return self.desk.handle(name, data, peer_id=None, account=account, reply=self.reply)

    def reply(self, answer: bytes, error: str) -> None:
        self.answers.append((answer, error))


async def echo(data: bytes, peer_id: Any) -> bytes:
    return data


async def hang(data: bytes, peer_id: Any) -> bytes:
    await asyncio.Event().wait()
    return b""


async def fail(data: bytes, peer_id: Any) -> bytes:
    raise KeyError("x" * 5000)


def make(**options: Any) -> Caller:
    """A desk with three handlers."""
    desk = UnaryDesk(**options)
    desk.handlers |= {"echo": echo, "hang": hang, "fail": fail}
    return Caller(desk)


async def test_an_answer_a_failure_and_nothing_served():
    """Each is an answer of that call; a failure's text is cut."""
    caller = make()
    for task in (caller.call("echo", b"x"), caller.call("fail"), caller.call("none")):
        if task is not None:
            await task
    assert caller.answers[0] == (b"", "not served here") and caller.answers[1] == (b"x", "")
    assert caller.answers[2][1].startswith("KeyError") and len(caller.answers[2][1]) == unary.MAX_ERROR_CHARS


async def test_one_account_can_not_take_all_the_places(monkeypatch: pytest.MonkeyPatch):
    """Beyond its own limit it is refused while others are served; cancelled calls, begun or not, free their places."""
    monkeypatch.setattr(unary, "MAX_CALLS_PER_ACCOUNT", 2)
    caller = make()
    first, second = caller.call("hang"), caller.call("hang")
    assert caller.call("hang") is None and "too many requests: 2 of yours" in caller.answers[-1][1]
    task = caller.call("echo", b"x", account="b")
    assert task is not None
    await task
    assert caller.answers[-1] == (b"x", "")
    assert first is not None and second is not None
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    third = caller.call("hang")
    assert third is not None
    third.cancel()  # before it has begun
    await asyncio.gather(third, return_exceptions=True)
    assert caller.call("hang") is not None
    await caller.desk.close()
    assert caller.desk.num_calls == 0


async def test_calls_and_bytes_have_a_rate_for_each_account():
    """The text says which."""
    caller = make(rate=Rate(burst=3, per_s=1e-9), bytes_rate=Rate(burst=100, per_s=1e-9))
    assert caller.call("echo", bytes(90)) is not None
    assert caller.call("echo", bytes(90)) is None and "too many bytes" in caller.answers[-1][1]
    assert caller.call("echo") is not None
    assert caller.call("echo") is None and "per second" in caller.answers[-1][1]
    assert caller.call("echo", account="b") is not None
    await caller.desk.close()
