"""Identities: the file format that libp2p reads, peer ids, signatures, and bad files."""

import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import ConfigError
from swarm.identity import Identity, is_peer_id, verify

# From the libp2p specification's test vectors (peer-ids.md, Ed25519 private key).
VECTOR_KEY = bytes.fromhex(
    "080112407e0830617c4a7de83925dfb2694556b12936c477a0e1feb2e148ec9da60fee7d"
    "1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e"
)
VECTOR_PUBLIC = bytes.fromhex("1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")


def test_a_key_of_the_libp2p_specification_is_read():
    """The specification's own bytes give its public key, and are written back unchanged."""
    identity = Identity.from_bytes(VECTOR_KEY)
    assert identity.public_bytes == VECTOR_PUBLIC
    assert identity.to_bytes() == VECTOR_KEY
    assert identity.peer_id.startswith("12D3KooW") and is_peer_id(identity.peer_id)


def test_a_missing_file_is_created_for_its_owner_only(tmp_path: Path):
    """The first start writes a new key with mode 0600; the second reads the same identity."""
    path = tmp_path / "identity.key"
    created = Identity.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Identity.load_or_create(path).peer_id == created.peer_id


def test_the_daemon_derives_the_same_peer_id(tmp_path: Path):
    """p2pd reads our file and prints the peer id that we computed."""
    from swarm.network.hive import P2PD_PATH

    identity = Identity.load_or_create(tmp_path / "identity.key")
    command = [P2PD_PATH, f"-id={tmp_path}/identity.key", f"-listen=/unix{tmp_path}/p2pd.sock", "-noListenAddrs"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as daemon:
        assert daemon.stdout is not None
        try:
            words = next(line.split() for line in daemon.stdout if line.startswith("Peer ID:"))
        finally:
            daemon.terminate()
            daemon.stdout.read()
    assert words[-1] == identity.peer_id


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an Ed25519 key"),
        (b"hello", "not an Ed25519 key"),
        (b"\x08\x00\x12\x80" + bytes(1200), "RSA"),
        (VECTOR_KEY[:-1] + b"\x00", "damaged"),
        (VECTOR_KEY + b"\x00", "69 bytes, expected 68"),
    ],
)
def test_a_bad_file_is_refused_with_its_reason(tmp_path: Path, data: bytes, reason: str):
    """Empty, foreign and damaged files give a ConfigError that names the file and what is wrong."""
    path = tmp_path / "identity.key"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=reason) as caught:
        Identity.load_or_create(path)
    assert str(path) in str(caught.value)


def test_an_unusable_path_is_refused(tmp_path: Path):
    """A directory, and a file in a directory that does not exist, are configuration errors."""
    with pytest.raises(ConfigError, match="directory"):
        Identity.load_or_create(tmp_path)
    with pytest.raises(ConfigError, match="No such file"):
        Identity.load_or_create(tmp_path / "missing" / "identity.key")


@given(st.binary(max_size=200), st.binary(min_size=1, max_size=64))
def test_a_signature_holds_for_its_data_and_signer_only(data: bytes, change: bytes):
    """verify is true for what was signed, and false for other data, another signer or a damaged signature."""
    identity, other = Identity.from_bytes(VECTOR_KEY), Identity.generate()
    signature = identity.sign(data)
    assert verify(identity.peer_id, data, signature)
    assert not verify(identity.peer_id, data + change, signature)
    assert not verify(other.peer_id, data, signature)
    assert not verify(identity.peer_id, data, signature[:-1])


@given(st.text(max_size=80))
def test_no_text_breaks_verification(text: str):
    """Whatever a peer calls itself, verification says no and raises nothing."""
    assert not verify(text, b"data", bytes(64))
    assert not is_peer_id(text)


def test_an_rsa_peer_id_has_no_key_to_verify_with():
    """A hashed (RSA) peer id is well-formed, but signatures of it can't be checked."""
    assert not is_peer_id("QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N")


@pytest.mark.parametrize("change", ["{} ", "{}\n", "{}\t", " {}", "{}\x00"])
def test_a_peer_has_one_id(change: str):
    """Another spelling of it would be another peer to whoever compares, and the same one to whoever checks."""
    identity = Identity.generate()
    assert is_peer_id(identity.peer_id)
    assert not is_peer_id(change.format(identity.peer_id))
    assert not verify(change.format(identity.peer_id), b"x", identity.sign(b"x"))
