"""A lab from its first command to its last: real processes on a host from which every call to others would be seen."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from swarm import keys
from swarm.checkpoint.source import resolve
from swarm.client.runtime import LoopThread, connect
from swarm.errors import AccessDenied, InvitationRevoked
from swarm.network.node import Node, NodeConfig
from swarm.private.authority import Authority, utc_now
from swarm.private.certificates import Role
from swarm.private.credentials import Credentials
from swarm.private.revocations import revoke
from tests.integration.conftest import HIDDEN, NUM_BLOCKS, LocalSwarm, closing, save_tiny_llama
from tests.swarm.private.labs import lab_now
from tests.wan.namespaces import WanUnavailable
from tests.wan.watched import Watched

PORT = 31337
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@dataclass
class Lab:
    """Where its processes run, and how."""

    home: Path
    model: Path
    host: Watched | None
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, module: str, *args: str) -> "subprocess.Popen[str]":
        """`python -m MODULE ARGS` in the lab's home."""
        command = [sys.executable, "-m", module, *args]
        options: dict[str, Any] = {
            "cwd": self.home,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
            "env": {
                **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
                "PYTHONUNBUFFERED": "1",
                "SWARM_CACHE": str(self.home / "cache"),
                "XDG_CONFIG_HOME": str(self.home / "config"),
            },
        }
        process = self.host.popen(command, **options) if self.host else subprocess.Popen(command, **options)
        self.processes.append(process)
        return process

    def run(self, module: str, *args: str) -> tuple[int, str]:
        """Exit status and output."""
        process = self.start(module, *args)
        output, _ = process.communicate(timeout=120)
        return process.returncode, output

    def wait_for(self, process: "subprocess.Popen[str]", word: str) -> str:
        """Everything that a process prints until a line with this word."""
        assert process.stdout is not None
        seen = ""
        for line in process.stdout:
            seen += line
            if word in line:
                return seen
        raise AssertionError(f"ended without {word!r}: {seen}")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A home, a model with a tokenizer, and, where that is permitted, a host that is watched."""
    home = tmp_path_factory.mktemp("lab")
    model = save_tiny_llama(home / "tiny")
    words = {f"w{index}": index for index in range(128)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w3", chat_template=TEMPLATE).save_pretrained(model)
    try:
        with Watched() as host:
            yield Lab(home, model, host)
    except WanUnavailable:
        with free_port():
            lab = Lab(home, model, None)
        yield lab
        for process in lab.processes:
            process.kill()
            process.communicate()


def free_port() -> socket.socket:
    """PORT, if nothing else has it."""
    try:
        return socket.create_server(("127.0.0.1", PORT))
    except OSError as error:
        pytest.skip(f"port {PORT}: {error}")


@pytest.fixture(scope="module")
def running(lab: Lab) -> Lab:
    """The lab of docs/private-swarm.md: one command makes it, one more starts each machine."""
    status, output = lab.run(
        "swarm.keys", "new", "my-lab", "--peers", f"127.0.0.1:{PORT}",
        "--servers", "gpu1", "gpu2", "--clients", "ana", "bob",
    )  # fmt: skip
    assert status == 0, output
    first = lab.start("swarm.server", "tiny", "--blocks", "0:3", "--credentials", "gpu1.credentials",
                      "--port", str(PORT), "--host", "127.0.0.1")  # fmt: skip
    output = lab.wait_for(first, "ONLINE")
    assert "private swarm my-lab, as gpu1 (server)" in output
    lab_now().invite("mallory").save(lab.home / "foreign.credentials")
    authority, past = Authority.load(lab.home / "config" / "swarm" / "my-lab"), utc_now() - timedelta(days=400)
    old = authority.credentials("old", Role.CLIENT, expires_at=past + timedelta(days=1), now=past)
    old.save(lab.home / "old.credentials")
    second = lab.start("swarm.server", "tiny", "--blocks", "3:6", "--credentials", "gpu2.credentials",
                       "--host", "127.0.0.1")  # fmt: skip
    lab.wait_for(second, "ONLINE")
    return lab


def ask(lab: Lab, *args: str) -> tuple[int, str]:
    """The command line client."""
    return lab.run("swarm.client", "w7 w8 w9", "--model", "tiny", "--max-new-tokens", "4", "--show-route", *args)


def test_a_member_is_answered_through_all_servers(running: Lab):
    """With nothing but the credentials file."""
    status, output = ask(running, "--credentials", "ana.credentials")
    assert status == 0 and "[0:3]" in output and "[3:6]" in output, output


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ("--initial-peers", "ADDRESS"),
            "belongs to a private swarm: name the file of your invitation with --credentials",
        ),
        (("--initial-peers", "ADDRESS", "--credentials", "foreign.credentials"), "no member of our swarm my-lab"),
        (("--credentials", "old.credentials"), "your invitation old (client) expired on 20"),
        (("--credentials", "nowhere"), "credentials file nowhere: No such file"),
    ],
)
def test_others_get_one_line(running: Lab, args: Sequence[str], words: str):
    """Without an invitation, with one into another lab of the same name, with one whose time is over: status 2."""
    address = f"/ip4/127.0.0.1/tcp/{PORT}/p2p/{peer_id_of_first(running)}"
    status, output = running.run("swarm.bootstrap", *(address if arg == "ADDRESS" else arg for arg in args))
    assert status == 2 and output.count("\n") == 1 and words in output, output


def peer_id_of_first(lab: Lab) -> str:
    """Any peer id will do for who can't get in anyway."""
    return Credentials.load(lab.home / "gpu1.credentials").member.id


def test_a_revoked_member_is_out_and_a_revoked_server_stops(running: Lab):
    """Within a minute of the command, told to one peer; both say so in one line."""
    assert running.run("swarm.keys", "revoke", "bob")[0] == 0
    status, output = ask(running, "--credentials", "bob.credentials")
    assert status == 2 and "your invitation bob (client) was revoked on" in output, output
    started = time.monotonic()
    status, output = running.run("swarm.keys", "revoke", "gpu2")
    assert status == 0 and "confirmed it" in output
    second = running.processes[2]
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 2 and "your invitation gpu2 (server) was revoked on" in output
    assert time.monotonic() - started < 60
    status, output = running.run("swarm.bootstrap", "--credentials", "gpu2.credentials")
    assert status == 2 and "was revoked on" in output, output


def test_nobody_outside_was_ever_called(running: Lab):
    """All the processes of this file together: not one packet, no name looked up; and no daemon besides them."""
    if running.host is None:
        pytest.skip("needs a network namespace")
    assert running.host.calls == []
    code = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'', ('192.0.2.1', 53))"
    assert running.host.popen([sys.executable, "-c", code]).wait() == 0
    assert running.host.wait_for_call(10), "the watch itself does not work"


# --- sessions, in one process ---


@pytest.fixture
def private_swarm(tiny_llama: Path, tmp_path: Path) -> Iterator[tuple[LocalSwarm, Any]]:
    """Servers of all blocks in a private swarm, and who invites into it."""
    lab = lab_now()

    class PrivateSwarm(LocalSwarm):
        def __init__(self) -> None:
            self.model = tiny_llama
            self.loop = LoopThread("private-swarm-test")
            config = NodeConfig(host="127.0.0.1", credentials=lab.invite("head"), state_dir=tmp_path / "head")
            self.bootstrap = self.loop.run(Node.start(config))
            self.servers = []

    swarm = PrivateSwarm()
    try:
        yield swarm, lab
    finally:
        swarm.close()


def test_a_session_in_the_middle_ends_with_the_reason(
    private_swarm: tuple[LocalSwarm, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """A client that is revoked between two tokens gets InvitationRevoked, soon, and its pages are free again."""
    monkeypatch.setenv("SWARM_CACHE", str(tmp_path / "cache"))
    swarm, lab = private_swarm
    for span in ("0:3", "3:6"):
        swarm.add_server(span, credentials=lab.invite(f"gpu{span[0]}"))
    ana = lab.invite("ana", Role.CLIENT)
    service = connect(
        resolve(str(swarm.model)),
        num_blocks=NUM_BLOCKS,
        hidden_size=HIDDEN,
        initial_peers=[swarm.address],
        credentials=ana,
    )
    with closing(service), service.open_session(batch_size=1, max_length=8) as session:
        session.step(torch.zeros(2, HIDDEN), positions=[0], num_tokens=[2])
        assert swarm.pages_in_use() > 0
        statement = revoke(ana.member, lab.der, lab.key, time.time())
        assert swarm.loop.run(swarm.bootstrap.revoke([statement])) >= 2
        with pytest.raises(InvitationRevoked, match=r"your invitation ana \(client\) was revoked"):
            session.step(torch.zeros(1, HIDDEN), positions=[2], num_tokens=[1])
        deadline = time.monotonic() + 10
        while swarm.pages_in_use():
            assert time.monotonic() < deadline, "pages are still in use"


def test_a_client_can_not_serve(private_swarm: tuple[LocalSwarm, Any]):
    """The server does not start."""
    swarm, lab = private_swarm
    with pytest.raises(AccessDenied, match="--role server"):
        swarm.add_server("0:6", credentials=lab.invite("ana", Role.CLIENT))


def test_keys_is_light():
    """The command that revokes is there at once: no torch."""
    code = "import sys, swarm.keys; print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output == "False\n" and keys.build_parser().prog
