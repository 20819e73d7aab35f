"""The credentials file: what comes back from it, and how it is refused."""

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import ConfigError, InvitationExpired
from swarm.private.certificates import Role
from swarm.private.credentials import MAX_FILE_BYTES, Credentials
from tests.swarm.private.labs import Lab, lab_now

LAB = Lab()
CREDENTIALS = LAB.invite("gpu7", Role.SERVER, peers=("10.0.0.1:31337", "/ip4/10.0.0.2/tcp/31337"))
DATA = CREDENTIALS.to_bytes()


def test_a_file_comes_back_as_it_was_written(tmp_path: Path):
    """Member, swarm, authority and peers; only its owner may read it, and it is not overwritten."""
    credentials = lab_now().invite("gpu7", peers=("10.0.0.1:1",))
    path = tmp_path / "gpu7.credentials"
    credentials.save(path)
    assert path.stat().st_mode & 0o777 == 0o600 and path.stat().st_size < 1200
    again = Credentials.load(path)
    assert again.member == credentials.member and again.peers == credentials.peers and again.swarm == "my-lab"
    assert again.authority_der == credentials.authority_der and again.to_bytes() == credentials.to_bytes()
    with pytest.raises(FileExistsError):
        credentials.save(path)


def test_it_says_to_people_what_it_is():
    """Swarm, member, role and expiry stand in its first line; the repr has no secret."""
    assert DATA.decode().splitlines()[0] == (
        "# Invitation into the private swarm my-lab: gpu7 (server), until 2026-12-27 12:00 UTC."
    )
    assert repr(CREDENTIALS) == "<Credentials my-lab | gpu7 (server)>"


def test_an_expired_file_says_since_when(tmp_path: Path):
    """Before anything is started."""
    lab = Lab()
    lab.now = lab.now.replace(year=2020)
    lab.__post_init__()
    lab.invite(days=1).save(tmp_path / "old")
    with pytest.raises(InvitationExpired, match=r"your invitation gpu1 \(server\) expired on 2020-11-28"):
        Credentials.load(tmp_path / "old")


def test_a_file_that_others_can_read_is_used_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Containers mount secrets so; on a shared machine it is a mistake."""
    path = tmp_path / "open"
    lab_now().invite().save(path)
    path.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        Credentials.load(path)
    assert f"credentials file {path} can be read by others" in caplog.text


def test_a_missing_file_and_a_directory_are_named(tmp_path: Path):
    """One line with the path."""
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match=str(path)):
            Credentials.load(path)


def without(label: str) -> bytes:
    """The file without its blocks of a kind."""
    lines, keep = [], True
    for line in DATA.splitlines(keepends=True):
        keep = keep and not line.startswith(f"-----BEGIN {label}".encode())
        if keep:
            lines.append(line)
        keep = keep or line.startswith(f"-----END {label}".encode())
    return b"".join(lines)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nonsense",
        without("CERTIFICATE"),
        without("PRIVATE KEY"),
        DATA.replace(b"MC4", b"MC5"),
        DATA + DATA,
        b"\xff" + DATA,
        DATA[:900],
    ],
)
def test_a_damaged_file_is_refused(data: bytes):
    """Parts missing, doubled or changed."""
    with pytest.raises(ConfigError, match="credentials"):
        Credentials.from_bytes(data)


def test_parts_of_different_members_and_swarms_do_not_mix():
    """The key must be the invitation's, the invitation the authority's."""
    other, stranger = LAB.invite("gpu8"), Lab().invite("gpu7")
    with pytest.raises(ConfigError, match="its key does not belong to its invitation"):
        Credentials.from_bytes(Credentials(LAB.certificate, CREDENTIALS.invitation, other.key).to_bytes())
    mixed = DATA.replace(CREDENTIALS.to_bytes().split(b"-----BEGIN CERTIFICATE-----")[2].split(b"-----END")[0], b"\n")
    with pytest.raises(ConfigError):
        Credentials.from_bytes(mixed)
    blocks = DATA.split(b"-----BEGIN CERTIFICATE-----")
    blocks[2] = stranger.to_bytes().split(b"-----BEGIN CERTIFICATE-----")[2]
    with pytest.raises(ConfigError):
        Credentials.from_bytes(b"-----BEGIN CERTIFICATE-----".join(blocks))


def test_an_oversized_file_is_not_parsed():
    """No credentials are that large."""
    with pytest.raises(ConfigError, match=f"over {MAX_FILE_BYTES} bytes"):
        Credentials.from_bytes(DATA + b" " * MAX_FILE_BYTES)


@given(st.integers(0, len(DATA) - 1), st.binary(max_size=6))
def test_a_changed_file_is_read_or_refused_and_nothing_else(offset: int, noise: bytes):
    """Whatever an editor did to it."""
    try:
        credentials = Credentials.from_bytes(DATA[:offset] + noise + DATA[offset + len(noise) :])
    except ConfigError:
        return
    assert credentials.member == CREDENTIALS.member
