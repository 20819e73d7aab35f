"""Hashes are remembered as long as nobody touched the file; locks exclude; files appear whole."""

import hashlib
import logging
import os
import threading
from pathlib import Path

import pytest

from swarm.checkpoint import cache
from swarm.errors import ConfigError

BIG = bytes(5 << 20)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were really read."""
    seen: list[Path] = []
    real = cache._hash

    def spy(path: Path) -> str:
        seen.append(path)
        return real(path)

    monkeypatch.setattr(cache, "_hash", spy)
    return seen


def test_a_big_file_is_hashed_once_until_it_changes(tmp_path: Path, hashed: list[Path]) -> None:
    """The second call reads nothing; a changed file of the same size and time is read again."""
    path = tmp_path / "weights.safetensors"
    path.write_bytes(BIG)
    first = cache.file_sha256(path, cache_dir=tmp_path / "cache")
    assert first == hashlib.sha256(BIG).hexdigest() == cache.file_sha256(path, cache_dir=tmp_path / "cache")
    assert len(hashed) == 1
    times = path.stat()
    path.write_bytes(BIG[:-1] + b"x")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert cache.file_sha256(path, cache_dir=tmp_path / "cache") != first
    assert len(hashed) == 2


def test_small_files_leave_no_notes(tmp_path: Path) -> None:
    """Hashing a few kilobytes is quicker than remembering it."""
    path = tmp_path / "config.json"
    path.write_bytes(b"{}")
    assert cache.file_sha256(path, cache_dir=tmp_path / "cache") == hashlib.sha256(b"{}").hexdigest()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("note", [b"", b"[]", b'{"sha256": 3}', b"\xff"])
def test_a_broken_note_is_ignored(tmp_path: Path, hashed: list[Path], note: bytes) -> None:
    """Whatever lies in the cache directory, the file decides."""
    path = tmp_path / "weights.safetensors"
    path.write_bytes(BIG)
    cache.file_sha256(path, cache_dir=tmp_path / "cache")
    (remembered,) = (tmp_path / "cache" / "sha256").iterdir()
    remembered.write_bytes(note)
    assert cache.file_sha256(path, cache_dir=tmp_path / "cache") == hashlib.sha256(BIG).hexdigest()
    assert len(hashed) == 2


def test_an_unusable_cache_directory_costs_time_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without a place for notes the hash is still right, and the log says what to set."""
    path = tmp_path / "weights.safetensors"
    path.write_bytes(BIG)
    (tmp_path / "cache").write_text("a file in the way")
    with caplog.at_level(logging.WARNING):
        assert cache.file_sha256(path, cache_dir=tmp_path / "cache") == hashlib.sha256(BIG).hexdigest()
    assert "SWARM_CACHE" in caplog.text


def test_a_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    """The second holder comes in when the first has left, not before."""
    order = []
    inside, entered = threading.Event(), threading.Event()

    def second() -> None:
        inside.wait()
        with cache.locked(tmp_path / "locks" / "a.lock"):
            order.append("second")
        entered.set()

    thread = threading.Thread(target=second)
    thread.start()
    with cache.locked(tmp_path / "locks" / "a.lock"):
        inside.set()
        assert not entered.wait(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_a_lock_in_an_unusable_directory_names_the_variable_to_set(tmp_path: Path) -> None:
    """A cache directory that can't be made is the user's setting."""
    (tmp_path / "cache").write_text("a file in the way")
    with pytest.raises(ConfigError, match="SWARM_CACHE"), cache.locked(tmp_path / "cache" / "a.lock"):
        pass


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SWARM_CACHE": "/data/swarm"}, "/data/swarm"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/swarm"),
        ({"HOME": "/home/me"}, "/home/me/.cache/swarm"),
    ],
)
def test_the_environment_says_where_the_cache_is(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    """SWARM_CACHE first, then XDG_CACHE_HOME, then the home directory."""
    for name in ("SWARM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache.default_cache_dir() == Path(expected)
