"""A lab from its first command to its last: real processes on a host from which every call to others would be seen."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from swarm import AutoDistributedModelForCausalLM, keys
from swarm.checkpoint.source import resolve
from swarm.client.runtime import LoopThread, connect
from swarm.errors import AccessDenied, InvitationRevoked
from swarm.network.node import Node, NodeConfig
from swarm.private.authority import Authority, utc_now
from swarm.private.certificates import Role
from swarm.private.credentials import Credentials
from swarm.private.revocations import revoke
from tests.integration.conftest import HIDDEN, NUM_BLOCKS, LocalSwarm, closing, save_tiny_llama
from tests.server.blocks.peft_adapters import save_adapter
from tests.swarm.private.labs import lab_now
from tests.wan.namespaces import WanUnavailable
from tests.wan.watched import Watched

PORT = 31337
AWAIT_CANARY = """
import json, sys, urllib.request
url = sys.argv[1]
with urllib.request.urlopen(url + "events", timeout=100) as news:
    for line in news:
        if line.startswith(b"data: "):
            state = json.load(urllib.request.urlopen(url + "api/v1/state", timeout=20))
            if any(model["canary"] and model["canary"]["ok"] for model in state["models"]):
                break
print(json.dumps(state))
"""
"""Prints the state of a page as soon as a canary has come back."""
COMPLETE = """
import json, sys, urllib.request
body = {"model": "tiny", "prompt": "w7 w8 w9", "max_tokens": 4, "ignore_eos": True}
headers = {"Content-Type": "application/json"}
request = urllib.request.Request(sys.argv[1] + "/completions", json.dumps(body).encode(), headers)
print(urllib.request.urlopen(request, timeout=100).read().decode())
"""
"""Prints what an API answers."""
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
        return self.python("-m", module, *args)

    def python(self, *args: str) -> "subprocess.Popen[str]":
        """`python ARGS` in the lab's home."""
        command = [sys.executable, *args]
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

    def visit(self, code: str, *args: str) -> str:
        """What a program prints that talks to others on the lab's host."""
        process = self.python("-c", code, *args)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        return output

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
        "--servers", "gpu1", "gpu2", "--clients", "ana", "bob", "eve",
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


def test_the_page_shows_the_swarm_and_its_canary(running: Lab):
    """The model is usable, and real tokens come back: told by the page's own news, one line for each new state."""
    page = running.start("swarm.health", "--credentials", "ana.credentials", "--port", "0", "--period", "1",
                         "--canary", "tiny", "--history", "history")  # fmt: skip
    url = re.search(r"ONLINE (\S+)", running.wait_for(page, "ONLINE"))
    assert url is not None
    (model,) = json.loads(running.visit(AWAIT_CANARY, url[1]))["models"]
    assert model["name"] == "tiny" and model["num_blocks"] == NUM_BLOCKS and len(model["servers"]) == 2
    assert model["canary"]["text"] is not None and len(model["canary"]["route"]) == 2
    page.terminate()
    assert page.wait(30) == 0


def test_the_api_answers_for_the_swarm(running: Lab):
    """An account of the gateway's own is a process of the same member."""
    gateway = running.start("swarm.api", "tiny", "--credentials", "ana.credentials", "--port", "0")
    url = re.search(r"API at (\S+)", running.wait_for(gateway, "API at"))
    assert url is not None
    answer = json.loads(running.visit(COMPLETE, url[1]))
    assert answer["choices"][0]["finish_reason"] == "length" and len(answer["swarm"]["route"]) == 2
    gateway.terminate()
    assert gateway.wait(30) == 0


def test_top_shows_the_swarm(running: Lab):
    """Once."""
    status, output = running.run("swarm.top", "--credentials", "ana.credentials", "--once")
    assert status == 0 and "tiny" in output and "0:3" in output, output


@pytest.mark.parametrize(
    "command",
    [
        ("swarm.server", "tiny", "--blocks", "0:3"),
        ("swarm.client", "w7", "--model", "tiny"),
        ("swarm.api", "tiny", "--port", "0"),
        ("swarm.health", "--port", "0", "--history", "of-a-stranger"),
        ("swarm.top", "--once"),
    ],
    ids=lambda command: command[0],
)
def test_no_command_does_anything_without_credentials(running: Lab, command: Sequence[str]):
    """It says what is missing, in one line, and ends with status 2."""
    address = f"/ip4/127.0.0.1/tcp/{PORT}/p2p/{peer_id_of_first(running)}"
    status, output = running.run(*command, "--initial-peers", address)
    assert status == 2 and "belongs to a private swarm: name the file of your invitation" in output, output
    assert "Traceback" not in output


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


def test_the_page_and_the_api_of_a_revoked_member_end(running: Lab):
    """As servers do: status 2, and one line that says why."""
    page = running.start("swarm.health", "--credentials", "eve.credentials", "--port", "0", "--no-canary",
                         "--history", "of-eve")  # fmt: skip
    gateway = running.start("swarm.api", "tiny", "--credentials", "eve.credentials", "--port", "0")
    running.wait_for(page, "ONLINE")
    running.wait_for(gateway, "API at")
    assert running.run("swarm.keys", "revoke", "eve")[0] == 0
    for process in (page, gateway):
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 2 and "your invitation eve (client) was revoked on" in output, output
        assert "Traceback" not in output


def test_a_revoked_member_is_out_and_a_revoked_server_stops(running: Lab):
    """Within a minute of the command, told to one peer; both say so in one line."""
    assert running.run("swarm.keys", "revoke", "bob")[0] == 0
    status, output = ask(running, "--credentials", "bob.credentials")
    assert status == 2 and "your invitation bob (client) was revoked on" in output, output
    started = time.monotonic()
    status, output = running.run("swarm.keys", "revoke", "gpu2")
    assert status == 0 and "confirmed it" in output
    second = next(process for process in running.processes if "gpu2.credentials" in process.args)
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
            self._serving = {}

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


def test_an_adapter_comes_from_a_member(private_swarm: tuple[LocalSwarm, Any], tiny_llama: Path, tmp_path: Path):
    """A client brings one, whose bytes its servers ask of the member that it is; the tokens are PEFT's."""
    swarm, lab = private_swarm
    for span in ("0:3", "3:6"):
        swarm.add_server(span, credentials=lab.invite(f"gpu{span[0]}"))
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    path = save_adapter(base, lora, tmp_path / "lora", seed=1)
    ids = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's
        plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        expected = peft.PeftModel.from_pretrained(plain, path).eval().generate(input_ids=ids, **options)
    ana = lab.invite("ana", Role.CLIENT, peers=(swarm.address,))
    with AutoDistributedModelForCausalLM.from_pretrained(tiny_llama, credentials=ana) as model:
        model.load_adapter(path)
        assert model.generate(ids, **options).tolist() == expected.tolist()
    assert all(server.serving.handler.adapters.loader.num_uploaded_bytes > 0 for server in swarm.servers)


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
