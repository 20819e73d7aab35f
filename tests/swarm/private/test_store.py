"""Revocations on disk: kept over a restart, and no trouble where that is impossible."""

import logging
from pathlib import Path

import pytest

from swarm.private.revocations import revoke
from swarm.private.store import RevocationStore
from tests.swarm.private.labs import NOW, Lab

LAB = Lab()
STATEMENT = revoke(LAB.invite().member, LAB.der, LAB.key, NOW.timestamp())


def test_what_was_saved_is_loaded_and_each_swarm_has_its_own(tmp_path: Path):
    """Another authority's peers see nothing of it."""
    RevocationStore(tmp_path, LAB.der).save([STATEMENT])
    assert RevocationStore(tmp_path, LAB.der).load() == (STATEMENT,)
    assert RevocationStore(tmp_path, Lab().der).load() == ()


def test_a_damaged_file_and_a_full_disk_are_warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """The swarm tells again what was forgotten."""
    store = RevocationStore(tmp_path, LAB.der)
    store.save([STATEMENT])
    (path,) = (tmp_path / "revocations").iterdir()
    path.write_bytes(b"nonsense")
    with caplog.at_level(logging.WARNING):
        assert store.load() == ()
        blocked = tmp_path / "file"
        blocked.touch()
        RevocationStore(blocked, LAB.der).save([STATEMENT])
    assert "can't read the revocations" in caplog.text and "can't keep revocations" in caplog.text
