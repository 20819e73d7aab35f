"""`swarm VERB ...`: one command for everything that `python -m swarm.VERB` does.

    swarm server ... ─► VERBS ─► import swarm.server.__main__ ─► main(arguments) ─► exit status

A verb is a module with `main(argv) -> int` and `build_parser()`; only the one that is asked for is imported, so that
`swarm --help` is there at once. Knows nothing of what a command does. `swarm completion SHELL` prints a script that
lets the shell complete verbs and options.
"""

import argparse
import difflib
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from swarm import __version__
from swarm.command import SCRIPT

VERBS = {
    "server": ("swarm.server", "serve a range of a model's transformer blocks"),
    "client": ("swarm.client", "ask a model, once or as a conversation"),
    "api": ("swarm.api", "let OpenAI's clients talk to the swarm, and chat in a browser"),
    "health": ("swarm.health", "a page that shows how the swarm is"),
    "top": ("swarm.top", "watch a swarm or a server in this terminal"),
    "keys": ("swarm.keys", "make a swarm private: its authority, and invitations"),
    "bootstrap": ("swarm.bootstrap", "a peer without blocks, to be joined by"),
    "demo": ("swarm.client.demo", "three servers and a client on this machine"),
}
"""Of each verb: its module or package, and what it is for. Those whose module is not there are left out."""
SHELLS = ("bash", "zsh", "tcsh")
COMPLETION = ("completion", f"print a completion script for {', '.join(SHELLS)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns its exit status, 2 where there is no such verb."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    verb, *rest = arguments
    if verb == "--version":
        print(f"swarm {__version__}")
        return 0
    if verb == "completion":
        return _print_completion(rest)
    if verb not in available():
        print(f"error: {_unknown(verb)}", file=sys.stderr)
        return 2
    status: int = _load(verb).main(rest)
    return status


def available() -> tuple[str, ...]:
    """The verbs whose module is there."""
    return tuple(verb for verb in VERBS if _module(verb) is not None)


def usage() -> str:
    """What `swarm --help` prints."""
    rows = [*((verb, VERBS[verb][1]) for verb in available()), COMPLETION]
    return "\n".join(
        [
            f"usage: {SCRIPT} VERB [options]",
            "",
            "Run large language models on machines that belong to many people.",
            "",
            *(f"  {verb:12}{purpose}" for verb, purpose in rows),
            "",
            f"{SCRIPT} VERB --help says what a verb takes. First steps, on one machine and then on others:",
            f"  {SCRIPT} server",
            f'  {SCRIPT} client "Why is the sky blue?" --initial-peers ADDRESS-THAT-THE-SERVER-PRINTED',
        ]
    )


def whole_parser() -> argparse.ArgumentParser:
    """All verbs with all their options in one parser, for completion."""
    import shtab

    whole = argparse.ArgumentParser(prog=SCRIPT)
    verbs = whole.add_subparsers(dest="verb", metavar="VERB")
    for verb in available():
        module = _load(verb)
        commands, alone = getattr(module, "COMMANDS", {}), module.build_parser()
        if commands:  # stand where free words stand, which nobody can complete
            alone._actions[:] = [action for action in alone._actions if action.option_strings]
        parser = verbs.add_parser(verb, parents=[alone], add_help=False, help=VERBS[verb][1])
        _add_commands(parser, commands)
    completion = verbs.add_parser(COMPLETION[0], help=COMPLETION[1])
    completion.add_argument("shell", choices=SHELLS)
    kinds = {"FILE": shtab.FILE, "DIR": shtab.DIRECTORY}
    for parser in _all_parsers(whole):
        for action in parser._actions:
            if action.metavar in kinds:
                action.complete = kinds[action.metavar]  # type: ignore[attr-defined]
    return whole


def _add_commands(parser: argparse.ArgumentParser, modules: Mapping[str, str]) -> None:
    """The first words that a verb takes for commands of their own."""
    if modules:
        commands = parser.add_subparsers(metavar="COMMAND")
        for name, module in modules.items():
            alone = importlib.import_module(module).build_parser()
            commands.add_parser(name, parents=[alone], add_help=False, help=alone.description)


def _all_parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _all_parsers(below)


def _module(verb: str) -> str | None:
    """Name of the module to run, found without importing it; None where there is none."""
    name = VERBS[verb][0]
    spec = find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        return name if spec is not None else None
    is_command = any((Path(place) / "__main__.py").is_file() for place in spec.submodule_search_locations)
    return f"{name}.__main__" if is_command else None


def _load(verb: str) -> ModuleType:
    name = _module(verb)
    assert name is not None
    return importlib.import_module(name)


def _print_completion(arguments: Sequence[str]) -> int:
    import shtab

    if len(arguments) != 1 or arguments[0] not in SHELLS:
        print(f"error: {SCRIPT} completion needs one of {', '.join(SHELLS)}", file=sys.stderr)
        return 2
    print(shtab.complete(whole_parser(), shell=arguments[0]))
    return 0


def _unknown(verb: str) -> str:
    close = difflib.get_close_matches(verb, available(), n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"{SCRIPT} --help lists them"
    return f"no verb {verb!r}; {hint}"


if __name__ == "__main__":
    sys.exit(main())
