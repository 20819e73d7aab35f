"""Keys are made once, kept as hashes, and locked out by deleting a line."""

import os
import stat
from pathlib import Path

import pytest

from swarm.api.keys import PREFIX, Keys, add_key, fingerprint, main
from swarm.errors import ConfigError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.txt"


def rewrite(path: Path, text: str) -> None:
    """Write the file so that its time differs, whatever the clock's grain is."""
    stamp = path.stat().st_mtime_ns
    path.write_text(text)
    os.utime(path, ns=(stamp + 1, stamp + 1))


def test_a_new_key_belongs_to_its_account(path: Path) -> None:
    """Several keys may have one account, and the file holds none of them."""
    keys = [add_key(path, "ann"), add_key(path, "ann"), add_key(path, "bob")]
    found = Keys([path])
    assert [found.account(key) for key in keys] == ["ann", "ann", "bob"]
    assert all(key.startswith(PREFIX) and key not in path.read_text() for key in keys)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("key", ["", "sk-swarm-wrong", "x" * 10_000, "\ud800", fingerprint("x")])
def test_other_keys_belong_to_nobody(path: Path, key: str) -> None:
    """The hash itself is no key."""
    path.write_text(f"ann {fingerprint('x')}\n")
    assert Keys([path]).account(key) is None


def test_deleted_keys_are_locked_out_at_once(path: Path) -> None:
    """The file is read again when it changes; the keys of several files count."""
    other = path.with_name("more.txt")
    ann, bob, eve = add_key(path, "ann"), add_key(path, "bob"), add_key(other, "eve")
    keys = Keys([path, other])
    assert keys.account(bob) == "bob"
    rewrite(path, "".join(line for line in path.read_text().splitlines(keepends=True) if "bob" not in line))
    assert [keys.account(key) for key in (ann, bob, eve)] == ["ann", None, "eve"]


def test_a_file_that_is_broken_for_a_moment_changes_nothing(path: Path) -> None:
    """As while somebody edits it."""
    ann = add_key(path, "ann")
    keys = Keys([path])
    rewrite(path, "half a line")
    assert keys.account(ann) == "ann"


def test_a_file_that_is_deleted_locks_its_keys_out(path: Path) -> None:
    """Those of other files stay; it may come back."""
    other = path.with_name("more.txt")
    ann, eve = add_key(path, "ann"), add_key(other, "eve")
    keys, text = Keys([path, other]), path.read_text()
    path.unlink()
    assert [keys.account(key) for key in (ann, eve)] == [None, "eve"]
    path.write_text(text)
    assert keys.account(ann) == "ann"


def test_comments_and_empty_lines_are_skipped(path: Path) -> None:
    """So that people can take notes."""
    path.write_text(f"# everybody\n\n ann {fingerprint('x')}  # since May\n")
    assert Keys([path]).account("x") == "ann"


@pytest.mark.parametrize("line", ["ann", "ann xyz", f"a/b {'0' * 64}", f"ann {'0' * 64} more", "\x00"])
def test_broken_lines_are_named(path: Path, line: str) -> None:
    """With file and number."""
    path.write_text(f"# fine\n{line}\n")
    with pytest.raises(ConfigError, match="line 2"):
        Keys([path])


def test_a_missing_file_is_an_error(path: Path) -> None:
    """At the start, where somebody looks."""
    with pytest.raises(ConfigError, match=r"keys\.txt"):
        Keys([path])


def test_the_command_prints_the_key_once(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And says in one line what is wrong."""
    assert main([str(path), "ann"]) == 0
    key = capsys.readouterr().out.strip()
    assert Keys([path]).account(key) == "ann"
    assert main([str(path), "no spaces"]) == 2
    assert main([str(path / "nowhere"), "ann"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("error: ") == captured.err.count("\n") == 2
