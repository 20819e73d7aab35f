"""The authority on its owner's disk: what it makes, remembers and refuses."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from swarm.errors import ConfigError, InvalidRequest
from swarm.private.authority import Authority
from swarm.private.certificates import Role, read_invitation, to_der
from tests.swarm.private.labs import NOW

DAY = timedelta(days=1)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """A new one."""
    return Authority.create(tmp_path / "lab", "my-lab", NOW, peers=("10.0.0.1:31337",))


def test_an_authority_comes_back_from_its_directory(authority: Authority):
    """Name, key and peers; nobody else may read any of it."""
    again = Authority.load(authority.directory)
    assert again.name == "my-lab" and again.peers == ("10.0.0.1:31337",)
    assert again.certificate == authority.certificate
    assert again.key.private_bytes_raw() == authority.key.private_bytes_raw()
    assert authority.directory.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in authority.directory.iterdir())


def test_an_authority_is_never_overwritten(authority: Authority):
    """Whoever made it would lose the swarm."""
    with pytest.raises(ConfigError, match="holds an authority already"):
        Authority.create(authority.directory, "other", NOW)


def test_invitations_are_remembered_without_their_keys(authority: Authority):
    """Name, role, id and expiry stay, the secret goes to the member only."""
    credentials = authority.invite("gpu7", Role.SERVER, lifetime=DAY, now=NOW)
    assert credentials.peers == ("10.0.0.1:31337",)
    assert read_invitation(to_der(credentials.invitation), to_der(authority.certificate)) == credentials.member
    assert [entry.member for entry in authority.invited()] == [credentials.member]
    secret = credentials.key.private_bytes_raw()
    assert all(secret not in path.read_bytes() for path in authority.directory.iterdir())


def test_a_name_is_given_once_while_it_is_good(authority: Authority):
    """A second one could not be told from the first; after expiry or revocation it is free again."""
    authority.invite("gpu7", Role.SERVER, lifetime=DAY, now=NOW)
    with pytest.raises(InvalidRequest, match="gpu7 is invited already"):
        authority.invite("gpu7", Role.CLIENT, lifetime=DAY, now=NOW)
    authority.invite("gpu7", Role.CLIENT, lifetime=DAY, now=NOW + 2 * DAY)
    authority.revoke("gpu7", NOW + 2 * DAY)
    authority.invite("gpu7", Role.SERVER, lifetime=DAY, now=NOW + 2 * DAY)


def test_invitations_made_at_the_same_time_are_all_remembered(authority: Authority):
    """Two commands write one file: neither forgets what the other has added."""
    names = [f"gpu{index}" for index in range(24)]
    with ThreadPoolExecutor(8) as pool:
        made = pool.map(
            lambda name: Authority.load(authority.directory).invite(name, Role.SERVER, lifetime=DAY, now=NOW), names
        )
        ids = {credentials.member.id for credentials in made}
    assert {entry.id for entry in authority.invited()} == ids and len(ids) == len(names)


def test_a_revocation_is_kept_and_said_again(authority: Authority):
    """By name or id; asking twice gives the same statement, so that it can be told again."""
    member = authority.invite("gpu7", Role.SERVER, lifetime=DAY, now=NOW).member
    authority.invite("gpu8", Role.SERVER, lifetime=DAY, now=NOW)
    (statement,) = authority.revoke("gpu7", NOW)
    assert statement.member == member.id
    assert authority.revoke(member.id, NOW + timedelta(hours=1)) == [statement]
    assert Authority.load(authority.directory).revocations(NOW).find(member) == statement
    with pytest.raises(InvalidRequest, match="nobody called 'gpu9' was invited; there are: gpu7, gpu8"):
        authority.revoke("gpu9", NOW)


def test_what_there_is_no_room_for_is_not_said_to_be_revoked(authority: Authority, monkeypatch: pytest.MonkeyPatch):
    """Nobody believes that a member is out who is not."""
    monkeypatch.setattr("swarm.private.revocations.MAX_BY_AUTHORITY", 1)
    for name in ("gpu7", "gpu8"):
        authority.invite(name, Role.SERVER, lifetime=DAY, now=NOW)
    authority.revoke("gpu7", NOW)
    with pytest.raises(InvalidRequest, match="no room to revoke gpu8: 1 statements are in force"):
        authority.revoke("gpu8", NOW)


def test_an_expired_admin_can_be_revoked_and_others_need_not(authority: Authority):
    """What an admin has said counts for longer than its invitation, until the authority takes that back."""
    root = authority.invite("root", Role.ADMIN, lifetime=DAY, now=NOW).member
    authority.invite("gpu7", Role.SERVER, lifetime=DAY, now=NOW)
    (statement,) = authority.revoke("root", NOW + 2 * DAY)
    assert statement.member == root.id and authority.revocations(NOW + 3 * DAY).find(root) == statement
    with pytest.raises(InvalidRequest, match="gpu7 need not be revoked: the invitation has expired"):
        authority.revoke("gpu7", NOW + 2 * DAY)


@pytest.mark.parametrize("name", ["authority.crt", "authority.key", "members.json", "revoked.bin"])
def test_a_damaged_directory_is_named(authority: Authority, name: str):
    """The file that is damaged, in one line."""
    (authority.directory / name).write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="damaged"):
        Authority.load(authority.directory).invite("gpu7", Role.SERVER, lifetime=DAY, now=NOW)


def test_the_key_of_another_authority_is_noticed(authority: Authority, tmp_path: Path):
    """Two halves that don't belong together sign nothing."""
    other = Authority.create(tmp_path / "other", "my-lab", NOW)
    (authority.directory / "authority.key").write_bytes((other.directory / "authority.key").read_bytes())
    with pytest.raises(ConfigError, match="its key is another one's"):
        Authority.load(authority.directory)


def test_where_there_is_none_it_is_said_how_to_make_one(tmp_path: Path):
    """The command is in the message."""
    with pytest.raises(ConfigError, match=r"python -m swarm\.keys new"):
        Authority.load(tmp_path)
