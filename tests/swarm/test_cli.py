"""`swarm VERB`: the right module gets the right arguments, nothing else is imported, and help says it all."""

import argparse
import subprocess
import sys
from types import SimpleNamespace

import pytest

from swarm import cli

THERE = {"server", "client", "health", "top", "bootstrap", "demo"}
"""Verbs that must exist; others come and go with their modules."""


def test_the_verbs_are_those_whose_module_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verb without a module, or with a package that is no command, is not offered."""
    assert set(cli.available()) >= THERE
    more = {**cli.VERBS, "nothing": ("swarm.nothing", "is not there"), "checkpoint": ("swarm.checkpoint", "no command")}
    monkeypatch.setattr(cli, "VERBS", more)
    assert not {"nothing", "checkpoint"} & set(cli.available())


@pytest.mark.parametrize("verb", cli.available())
def test_a_verb_gets_its_arguments_and_its_status_is_returned(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands behind the verb goes to its main, untouched."""
    seen: list[list[str]] = []
    monkeypatch.setattr(cli, "_load", lambda name: SimpleNamespace(main=lambda argv: seen.append([name, *argv]) or 7))
    assert cli.main([verb, "--one", "two"]) == 7
    assert seen == [[verb, "--one", "two"]]


@pytest.mark.parametrize("verb", cli.available())
def test_every_verb_is_a_command_with_a_parser(verb: str) -> None:
    """Each has main and build_parser, and every option says what it is; a default is shown unless it is nothing."""
    module = cli._load(verb)
    assert callable(module.main)
    parser: argparse.ArgumentParser = module.build_parser()
    text = " ".join(parser.format_help().split())
    for action in parser._actions:
        assert action.help, f"{verb} {action.dest} has no help"
        if action.option_strings and action.default not in (None, False, "", (), [], argparse.SUPPRESS):
            shown = action.default if isinstance(action.default, str | int | float) else None
            assert shown is None or f"(default: {shown})" in text, f"{verb} {action.dest} hides its default"
        if action.type in (int, float):
            assert action.metavar, f"{verb} {action.dest} does not say what its number is"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_what_there_is(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """All verbs with what they are for."""
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {verb} " in printed for verb in (*cli.available(), "completion"))


def test_help_is_instant() -> None:
    """Nothing heavy is imported: neither torch nor a network, nor any verb."""
    code = (
        "import sys; from swarm.cli import main; main(['--help']);"
        "print(sorted(n for n in sys.modules if n.split('.')[0] in ('torch', 'transformers', 'hivemind', 'rich')"
        " or n.startswith('swarm.') and n not in ('swarm.cli', 'swarm.command', 'swarm.client')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_unknown_verb_is_one_line_with_a_guess(capsys: pytest.CaptureFixture[str]) -> None:
    """Status 2, the word, and what was perhaps meant."""
    assert cli.main(["sevrer"]) == 2
    assert capsys.readouterr().err == "error: no verb 'sevrer'; did you mean 'server'?\n"
    assert cli.main(["xyzzy"]) == 2
    assert "swarm --help" in capsys.readouterr().err


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """With --version."""
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("swarm ")


@pytest.mark.parametrize("shell", cli.SHELLS)
def test_completion_knows_verbs_and_options(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A script per shell, of all verbs that are there."""
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "initial-peers" in script and all(verb in script for verb in cli.available())


def test_bash_completes_a_verb_and_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    """The script in a real bash."""
    cli.main(["completion", "bash"])
    script = capsys.readouterr().out
    ask = "\n".join(
        [
            script,
            'complete_for() { COMP_WORDS=(swarm "$@"); COMP_CWORD=$#; COMPREPLY=(); _shtab_swarm; }',
            'complete_for boot; echo "${COMPREPLY[@]}"',
            'complete_for server --quant; echo "${COMPREPLY[@]}"',
            'complete_for client --top; echo "${COMPREPLY[@]}"',
            'complete_for client tr; echo "${COMPREPLY[@]}"',
            'complete_for client train --pack; echo "${COMPREPLY[@]}"',
        ]
    )
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["bootstrap", "--quantization", "--top-p", "train", "--packing"]


def test_completion_wants_a_shell(capsys: pytest.CaptureFixture[str]) -> None:
    """One that it knows."""
    assert cli.main(["completion"]) == 2
    assert cli.main(["completion", "fish"]) == 2
    assert "bash, zsh, tcsh" in capsys.readouterr().err
