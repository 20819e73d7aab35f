"""The files for operators: units that systemd takes, commands and options that exist, a container that is not root."""

import argparse
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from swarm import bootstrap, cli
from swarm.server.__main__ import build_parser

ROOT = Path(__file__).parents[2]
UNITS = sorted((ROOT / "deploy").glob("*.service"))


def settings_of(unit: Path) -> dict[str, list[str]]:
    """Every setting of a unit."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, value = line.split("=", 1)
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_takes_the_unit(unit: Path, tmp_path: Path):
    """No unknown setting, no bad value; the program itself is another machine's."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not here")
    text = unit.read_text().replace("/opt/swarm/bin/python", "/bin/true")
    copy = tmp_path / unit.name.replace("@.", "@gpu1.")
    copy.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(copy)], capture_output=True, text=True
    )
    complaints = [line for line in done.stderr.splitlines() if copy.name in line]
    assert done.returncode == 0 and not complaints, done.stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_the_unit_runs_a_command_that_exists_with_its_own_options(unit: Path):
    """The example in its head, together with ExecStart, is a command line that the parser takes."""
    settings, text = settings_of(unit), unit.read_text()
    (command,) = settings["ExecStart"]
    example = re.search(r"SWARM_ARGS=(.*)", text)
    assert example is not None
    args = shlex.split(command.replace("$SWARM_ARGS", example[1]))[3:]
    if "swarm.server" in command:
        assert build_parser().parse_args(args).credentials == "%d/invitation"
    else:
        assert bootstrap.build_parser().parse_args(args).credentials == "%d/invitation"


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_has_no_more_rights_than_it_needs_and_does_not_retry_in_vain(unit: Path):
    """Not root, credentials from systemd, and no restart after an error that stays."""
    settings = settings_of(unit)
    assert settings["DynamicUser"] == ["yes"] and settings["NoNewPrivileges"] == ["yes"]
    assert settings["LoadCredential"][0].startswith("invitation:/etc/swarm/")
    assert settings["RestartPreventExitStatus"] == ["2"]


def test_the_container_copies_what_it_names_and_is_not_root():
    """What can be said of a Containerfile without building it."""
    lines = (ROOT / "deploy" / "Containerfile").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY "):
            assert (ROOT / line.split()[1]).exists(), line
    assert "USER swarm" in lines and any(line.startswith("ENTRYPOINT") for line in lines)
    assert "*.credentials" in (ROOT / ".dockerignore").read_text().splitlines()


def test_the_commands_of_the_documents_exist():
    """Each `python -m swarm.X` of docs/private-swarm.md is a module, each of its options one that the module knows."""
    text = (ROOT / "docs" / "private-swarm.md").read_text()
    [parsers] = [action.choices for action in cli.whole_parser()._actions if isinstance(action.choices, dict)]
    lines = re.findall(r"python -m swarm\.(\w+)([^\n`#]*)", text)
    assert {verb for verb, _ in lines} == {"server", "client", "health", "api", "top", "keys", "bootstrap"}
    for verb, rest in lines:
        assert set(re.findall(r"--[\w-]+", rest)) <= _options_of(parsers[verb]), rest


def _options_of(parser: argparse.ArgumentParser) -> set[str]:
    """All options, those of sub-commands as well."""
    commands = [it for action in parser._actions if isinstance(action.choices, dict) for it in action.choices.values()]
    own = {option for action in parser._actions for option in action.option_strings}
    return own.union(*map(_options_of, commands))
