"""`python -m swarm.keys`: from nothing to a lab, and everything that it refuses in one line."""

import asyncio
from pathlib import Path

import pytest

from swarm import keys
from swarm.network import Node, NodeConfig
from swarm.private.certificates import Role
from swarm.private.credentials import Credentials


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without swarms, and a folder to work in."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("SWARM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args: str) -> None:
    """A command that works."""
    assert keys.main(args) == 0


def refusal(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What a command says that doesn't."""
    capsys.readouterr()
    assert keys.main(args) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def test_a_lab_is_made_with_one_command(home: Path, capsys: pytest.CaptureFixture[str]):
    """The authority, and a file for each machine and person that says where to join."""
    run(
        "new",
        "my-lab",
        "--peers",
        "10.0.0.1:31337",
        "--servers",
        "gpu1",
        "gpu2",
        "--clients",
        "ana",
        "--admins",
        "root",
    )
    roles = {"gpu1": Role.SERVER, "gpu2": Role.SERVER, "ana": Role.CLIENT, "root": Role.ADMIN}
    for name, role in roles.items():
        credentials = Credentials.load(home / f"{name}.credentials")
        assert (credentials.member.name, credentials.member.role) == (name, role)
        assert credentials.peers == ("10.0.0.1:31337",) and credentials.swarm == "my-lab"
    out = capsys.readouterr().out
    assert "keep that safe" in out and "--credentials gpu2.credentials" in out
    assert (home / "config" / "swarm" / "my-lab" / "authority.key").exists()


def test_invitations_come_one_by_one_and_are_listed(home: Path, capsys: pytest.CaptureFixture[str]):
    """With role, lifetime and file as asked for."""
    run("new", "my-lab")
    run("invite", "--role", "server", "--expires", "30d", "--name", "gpu7")
    run("invite", "--role", "client", "--name", "ana", "--out", "ana.file", "--peers", "10.0.0.9:1")
    assert Credentials.load(home / "ana.file").peers == ("10.0.0.9:1",)
    capsys.readouterr()
    run("list")
    first, gpu7, ana = capsys.readouterr().out.splitlines()
    assert first.startswith("my-lab, kept in ") and "no fixed address" in first
    assert gpu7.split()[:3] == ["gpu7", "server", "good"] and ana.split()[:3] == ["ana", "client", "good"]
    assert gpu7.split()[-1] == Credentials.load(home / "gpu7.credentials").member.id


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("invite", "--role", "server", "--name", "gpu7"), "is invited already"),
        (("invite", "--role", "server", "--name", "gpu8", "--out", "gpu7.credentials"), "not overwritten"),
        (("invite", "--role", "server", "--name", "a b"), "name 'a b'"),
        (("invite", "--role", "server", "--name", "x", "--expires", "9999d"), "can't expire at"),
        (("new", "my-lab"), "holds an authority already"),
        (("new", "a/b"), "name 'a/b'"),
        (("new", "other", "--servers", "x", "--clients", "x"), "one name stands for several"),
        (("invite", "--swarm", "other", "--role", "server", "--name", "x"), "holds no authority"),
        (("list", "--directory", "nowhere"), "holds no authority"),
        (("revoke", "gpu9"), "nobody called 'gpu9' was invited; there are: gpu7"),
        (("revoke", "gpu7", "--credentials", "gpu7.credentials"), "gpu7 (server) may not revoke"),
    ],
)
def test_what_can_not_be_is_said_in_one_line(capsys: pytest.CaptureFixture[str], args: tuple[str, ...], words: str):
    """Status 2, the reason, and nothing is half done."""
    run("new", "my-lab", "--servers", "gpu7")
    if args[:2] == ("invite", "--role") and "already" in words:
        Path("gpu7.credentials").unlink()
    assert words in refusal(capsys, *args)


def test_with_several_swarms_one_must_be_named(capsys: pytest.CaptureFixture[str]):
    """The message lists them."""
    run("new", "one")
    run("new", "two")
    assert "which swarm, one, two? say --swarm NAME" in refusal(capsys, "list")
    run("list", "--swarm", "two")


@pytest.mark.parametrize("text", ["30", "0d", "d", "-3d", "1y", "999999d"])
def test_a_lifetime_has_a_number_and_a_unit(text: str):
    """argparse names the option."""
    with pytest.raises(SystemExit):
        keys.main(["invite", "--role", "server", "--name", "x", "--expires", text])


def test_a_revocation_without_anybody_to_tell_says_so(capsys: pytest.CaptureFixture[str]):
    """It is recorded, but the swarm doesn't know: status 1."""
    run("new", "my-lab", "--servers", "gpu7")
    assert keys.main(["revoke", "gpu7"]) == 1
    assert "the swarm does not know it yet" in capsys.readouterr().err
    run("invite", "--role", "server", "--name", "gpu7", "--out", "again")
    run("list")
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()[-2:]] == ["revoked", "good"]


def test_the_authority_and_admins_tell_the_swarm(capsys: pytest.CaptureFixture[str]):
    """A running peer confirms it, and refuses the member from then on; an admin needs no list, only the name."""
    run("new", "my-lab", "--servers", "gpu1", "gpu2", "gpu3", "--admins", "root", "boss")

    def credentials(name: str) -> Credentials:
        return Credentials.load(f"{name}.credentials")

    async def main() -> None:
        async with await Node.start(NodeConfig(host="127.0.0.1", credentials=credentials("gpu1"))) as node:
            peers = ("--initial-peers", f"127.0.0.1:{node.addresses[0].split('/')[4]}")
            async with await Node.start(
                NodeConfig(host="127.0.0.1", credentials=credentials("gpu3"), initial_peers=node.addresses)
            ):
                pass  # met once, gone since
            assert await asyncio.to_thread(keys.main, ["revoke", "gpu2", *peers]) == 0
            admin = ("--credentials", "root.credentials", *peers)
            assert await asyncio.to_thread(keys.main, ["revoke", "gpu3", *admin]) == 0
            assert await asyncio.to_thread(keys.main, ["revoke", "gpu2000", *admin]) == 2
            assert await asyncio.to_thread(keys.main, ["revoke", "root", *admin]) == 2
            known = node._underlay.gate.revocations  # type: ignore[union-attr]
            assert [known.find(credentials(name).member) is not None for name in ("gpu1", "gpu2", "gpu3", "root")] == [
                False,
                True,
                True,
                False,
            ]

    asyncio.run(main())
    out, err = capsys.readouterr()
    assert out.count("1 peer has confirmed it") == 2
    assert "no peer has met a member called 'gpu2000'" in err and "can be revoked by the authority only" in err
