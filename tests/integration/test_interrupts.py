"""The caller wants out: Ctrl-C in the middle of a step, and the end of a session whose servers are stopped."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from swarm.checkpoint.source import resolve
from swarm.client.config import SessionConfig
from swarm.client.processes import PeerProcess, all_stopped, start_bootstrap, start_server
from swarm.client.runtime import SwarmService, connect

from .conftest import HIDDEN, NUM_BLOCKS, LocalSwarm, closing
from .test_swarm import embed, expected_logits, logits, wait_for_free_pages


@contextmanager
def held(swarm: LocalSwarm, index: int) -> Iterator[threading.Event]:
    """One server's device thread stands still until the end; yields what tells that it does."""
    span = swarm.servers[index].serving.executor.span
    run, reached, go = span.run, threading.Event(), threading.Event()

    def waiting(chunks):
        reached.set()
        assert go.wait(60)
        return run(chunks)

    span.run = waiting
    try:
        yield reached
    finally:
        span.run = run
        go.set()


def interrupt_when(reached: threading.Event) -> None:
    """Send Ctrl-C to the main thread once `reached` is set."""
    main = threading.main_thread().ident
    assert main is not None

    def send() -> None:
        assert reached.wait(60)
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=send, daemon=True).start()


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("num_before", [0, 4])
def test_ctrl_c_in_a_step_returns_at_once_and_the_session_can_go_on(make_swarm, local_model, index, num_before):
    """The interrupted step counts as never begun; after the session's end nothing is held."""
    swarm = make_swarm("0:3", "3:6")
    tokens = [5, 9, 44, 12, 7, 61]
    with closing(swarm.connect()) as service, service.open_session(batch_size=1, max_length=16) as session:
        if num_before:
            session.step(embed(local_model, tokens[:num_before]), positions=[0], num_tokens=[num_before])
        with held(swarm, index) as reached:
            interrupt_when(reached)
            wrong = embed(local_model, [1, 2])
            with pytest.raises(KeyboardInterrupt):
                session.step(wrong, positions=[num_before], num_tokens=[2])
        rest = tokens[num_before:]
        outputs = session.step(embed(local_model, rest), positions=[num_before], num_tokens=[len(rest)])
        expected = expected_logits(local_model, tokens)[num_before:]
        torch.testing.assert_close(logits(local_model, outputs), expected, atol=1e-4, rtol=0)
        assert session.num_replays == 0
    wait_for_free_pages(swarm)


def test_ctrl_c_and_the_end_of_the_session_free_everything_though_the_work_still_runs(make_swarm, local_model):
    """What generation does when it is interrupted."""
    swarm = make_swarm("0:3", "3:6")
    with closing(swarm.connect()) as service:
        with held(swarm, 1) as reached:
            interrupt_when(reached)
            with pytest.raises(KeyboardInterrupt), service.open_session(batch_size=1, max_length=16) as session:
                session.step(embed(local_model, [5, 9, 44]), positions=[0], num_tokens=[3])
        wait_for_free_pages(swarm)


@pytest.fixture
def processes(tiny_llama) -> Iterator[tuple[list[PeerProcess], SwarmService]]:
    """Two server processes, stopped or not at the end, and a client of theirs."""
    running: list[PeerProcess] = []
    with all_stopped(running):
        running.append(start_bootstrap())
        address = running[0].address()
        args = ("--threads", "1", "--kv-cache", "1024", "--device", "cpu")
        servers = [start_server(blocks, [address], *args, model=str(tiny_llama)) for blocks in ("0:3", "3:6")]
        running += servers
        for server in servers:
            server.wait_for("^ONLINE", 180)
        service = connect(
            resolve(str(tiny_llama)),
            num_blocks=NUM_BLOCKS,
            hidden_size=HIDDEN,
            initial_peers=[address],
            config=SessionConfig(max_wait_s=60.0),
        )
        yield servers, service


@pytest.mark.parametrize("indices", [(0,), (1,), (0, 1)], ids=str)
def test_everything_closes_in_time_while_servers_are_stopped(processes, local_model, indices):
    """SIGSTOP leaves connections open and silent: neither Ctrl-C nor close waits for an answer."""
    servers, service = processes
    sessions = [service.open_session(batch_size=1, max_length=64) for _ in range(4)]
    for session in sessions:
        session.step(embed(local_model, [5, 9, 44]), positions=[0], num_tokens=[3])
    for index in indices:
        servers[index].signal(signal.SIGSTOP)
    reached = threading.Event()
    interrupt_when(reached)
    threading.Timer(0.3, reached.set).start()
    with pytest.raises(KeyboardInterrupt):
        sessions[0].step(embed(local_model, [7]), positions=[3], num_tokens=[1])
    started = time.monotonic()
    for session in sessions:
        session.close()
    assert time.monotonic() - started < 4.0
    service.close()
    assert time.monotonic() - started < 15.0
