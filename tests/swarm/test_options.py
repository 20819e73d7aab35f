"""Options that several commands take: the same words, defaults and refusals everywhere."""

import argparse
import importlib
from pathlib import Path

import pytest

from swarm import cli
from swarm.errors import InvalidRequest
from swarm.options import add_checkpoint, add_initial_peers, add_threads, require_at_least

PARSERS = {verb: cli._load(verb).build_parser() for verb in cli.available()}
PARSERS["client train"] = importlib.import_module("swarm.client.train").build_parser()


def parser_of_all() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_initial_peers(parser)
    add_checkpoint(parser)
    add_threads(parser)
    return parser


def test_nothing_given_is_nothing() -> None:
    """No peers, main, the usual cache, torch's choice."""
    found = vars(parser_of_all().parse_args([]))
    assert found == {"initial_peers": [], "revision": None, "cache_dir": None, "threads": None}
    given = parser_of_all().parse_args(["--initial-peers", "a", "b", "--cache-dir", "x", "--threads", "2"])
    assert (given.initial_peers, given.cache_dir, given.threads) == (["a", "b"], Path("x"), 2)


@pytest.mark.parametrize("verb", sorted(PARSERS))
def test_every_command_has_the_same_words_for_the_same_option(verb: str) -> None:
    """Its defaults and its help, but for what it means to leave it out."""
    expected = {action.dest: action for action in parser_of_all()._actions if action.dest != "help"}
    for action in PARSERS[verb]._actions:
        if (same := expected.get(action.dest)) is not None:
            assert (action.default, action.metavar, action.type) == (same.default, same.metavar, same.type)
            assert str(action.help).split(" (")[0].split(" for ")[0] == str(same.help).split(" (")[0].split(" for ")[0]


def test_numbers_that_are_too_small_are_refused_by_name() -> None:
    """What was not given is fine."""
    args = argparse.Namespace(threads=None, batch_size=0, rank=1)
    require_at_least(args, 1, "threads", "rank")
    with pytest.raises(InvalidRequest, match="--batch-size is 0, need at least 1"):
        require_at_least(args, 1, "rank", "batch_size")


@pytest.mark.parametrize("verb", sorted(set(PARSERS) - {"keys", "demo"}))
def test_every_command_that_goes_on_for_long_lets_its_log_be_chosen(verb: str, monkeypatch) -> None:
    """--log-format json reaches the log, before anything can go wrong."""
    configured = []
    monkeypatch.setattr("swarm.logs.configure", configured.append)
    command, needed = verb, []
    if verb == "client train":
        command, needed = "client", ["--data", "x", "--output", "y"]
    module = importlib.import_module("swarm.client.train") if needed else cli._load(command)
    monkeypatch.setattr(module, "exit_status", lambda work: 0)
    assert module.main([*needed, "--log-format", "json", "--log-level", "info"]) == 0
    assert [(args.log_format, args.log_level) for args in configured] == [("json", "info")]
