"""`--credentials FILE`: what commands make of it."""

import argparse
import os
from pathlib import Path

import pytest

from swarm.errors import ConfigError, InvalidRequest
from swarm.private.arguments import OFFLINE, add_credentials, load_credentials, require_peers
from tests.swarm.private.labs import lab_now

GIVEN = "/ip4/10.0.0.9/tcp/1/p2p/12D3KooWSTo9HLMm1hcZG7MTKnXAbRYwVnJZ5URUvXrBkyGbjPQX"


def parse(*args: str) -> argparse.Namespace:
    """A command line of any command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--initial-peers", nargs="+", default=[])
    add_credentials(parser)
    return parser.parse_args(args)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch):
    """As it was, afterwards."""
    for name in OFFLINE:
        monkeypatch.setenv(name, "unset by the test")


def test_with_credentials_nothing_is_downloaded(tmp_path: Path):
    """Libraries that would like to call the hub are told not to; without credentials they are left alone."""
    path = tmp_path / "ana.credentials"
    lab_now().invite("ana").save(path)
    assert load_credentials(parse()) is None
    assert all(os.environ[name] == "unset by the test" for name in OFFLINE)
    found = load_credentials(parse("--credentials", str(path)))
    assert found is not None and found.member.name == "ana"
    assert {name: os.environ[name] for name in OFFLINE} == OFFLINE
    with pytest.raises(ConfigError, match="No such file"):
        load_credentials(parse("--credentials", str(tmp_path / "nowhere")))


def test_peers_that_are_named_come_before_those_of_the_file():
    """And somebody has to name one."""
    invited = lab_now().invite("ana", peers=("10.0.0.1:31337",))
    assert require_peers(parse("--initial-peers", GIVEN), invited) == (GIVEN,)
    assert require_peers(parse(), invited) == ("10.0.0.1:31337",)
    with pytest.raises(InvalidRequest, match=r"credentials of ana \(server\) name no peer"):
        require_peers(parse(), lab_now().invite("ana"))
    with pytest.raises(InvalidRequest, match="give the address that a server or bootstrap peer printed"):
        require_peers(parse(), None)
