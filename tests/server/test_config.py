"""Sizes on the command line."""

import pytest

from swarm.errors import ConfigError
from swarm.server.__main__ import _config, build_parser
from swarm.server.config import parse_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("0", 0), ("512M", 512 << 20), ("1.5GiB", 3 << 29), ("2 gb", 2 << 30), ("1000", 1000)]
)
def test_memory_is_read_in_bytes(text: str, num_bytes: int):
    """With or without a unit."""
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "-1", "much", "1T", "1GG"])
def test_other_texts_are_refused(text: str):
    """By name."""
    with pytest.raises(ConfigError, match="memory"):
        parse_bytes(text)


def test_history_memory_has_a_default_and_can_be_off():
    """A gibibyte, or nothing."""
    assert _config(build_parser().parse_args([])).history_bytes == 1 << 30
    assert _config(build_parser().parse_args(["--history-memory", "0"])).history_bytes == 0
