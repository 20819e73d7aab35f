"""`python -m swarm.keys`: makes a private swarm, invites into it, and throws out of it.

    new NAME       ─► Authority.create ─► DIRECTORY, and a credentials file for everybody who is named
    invite         ─► Authority.invite ─► one more
    list           ─► who is invited, until when
    revoke NAME    ─► Authority.revoke, or an admin's own signature ─► told to the swarm's peers, who pass it on

Only `revoke` uses the network. The authority's directory is the swarm: keep it safe, and off the servers.
"""

import argparse
import asyncio
import logging
import os
import re
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swarm.command import HelpFormatter, exit_status, program
from swarm.errors import AccessDenied, ConfigError, InvalidRequest
from swarm.private.authority import Authority, utc_now
from swarm.private.certificates import NAME, Member, Role, to_der
from swarm.private.credentials import Credentials
from swarm.private.revocations import Revocation, revoke

if TYPE_CHECKING:
    from swarm.network import Node

VISIT = timedelta(hours=1)
"""How long the authority's own visit to its swarm may take."""
_UNITS = {"m": 60.0, "h": 3600.0, "d": 86400.0}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 nobody was told, 2 an error, 130 interrupted."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    return exit_status(lambda: _COMMANDS[args.command](args))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program("keys"),
        description="Make a swarm private: who is not invited can neither see nor use it.",
        formatter_class=HelpFormatter,
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", help="what to do; COMMAND --help says what it takes"
    )
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument(
        "--directory",
        type=Path,
        metavar="DIR",
        help="where the authority is kept (default: ~/.config/swarm/NAME)",
    )

    new = _add_command(commands, "new", where, "make the authority of a new private swarm")
    new.add_argument("swarm", metavar="NAME", help="of the swarm")
    new.add_argument("--peers", nargs="+", default=[], metavar="HOST:PORT", help="where members will join it")
    for role in Role:
        new.add_argument(f"--{role}s", nargs="+", default=[], metavar="NAME", help=f"invite these as {role}s at once")
    _add_invitation(new)
    new.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="where the credentials go")

    invite = _add_command(commands, "invite", where, "make a credentials file for one machine or person")
    invite.add_argument("--swarm", metavar="NAME", help="which swarm, if there are several")
    invite.add_argument("--name", required=True, help="of the machine or person")
    invite.add_argument("--role", required=True, choices=list(Role), help="what it may do")
    invite.add_argument("--peers", nargs="+", metavar="HOST:PORT", help="where to join (default: as `new` was told)")
    _add_invitation(invite)
    invite.add_argument("--out", type=Path, metavar="FILE", help="the credentials file (default: NAME.credentials)")

    show = _add_command(commands, "list", where, "who is invited, as what, until when")
    show.add_argument("--swarm", metavar="NAME", help="which swarm, if there are several")

    out = _add_command(commands, "revoke", where, "take an invitation back, within seconds")
    out.add_argument("name", metavar="NAME", help="name or id of the member")
    out.add_argument("--swarm", metavar="NAME", help="which swarm, if there are several")
    out.add_argument("--credentials", type=Path, metavar="FILE", help="revoke as this admin, without the authority")
    out.add_argument("--initial-peers", nargs="+", metavar="ADDR", help="whom to tell (default: as `new` was told)")
    return parser


def _add_command(commands: Any, name: str, where: argparse.ArgumentParser, purpose: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        parents=[where],
        help=purpose,
        description=f"{purpose[0].upper()}{purpose[1:]}.",
        formatter_class=HelpFormatter,
    )
    return parser


def _add_invitation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--expires", type=_lifetime, default="365d", metavar="TIME", help="good for so long, e.g. 30d, 12h or 90m"
    )


def _new(args: argparse.Namespace) -> int:
    if not NAME.fullmatch(args.swarm):
        raise InvalidRequest(f"name {args.swarm!r}: need 1 to 48 letters, digits, '.', '_' or '-'")
    wanted = [(name, role) for role in Role for name in getattr(args, f"{role}s")]
    files = {name: args.out / f"{name}.credentials" for name, _ in wanted}
    if len(files) < len(wanted):
        raise InvalidRequest("one name stands for several members: every machine and person needs its own")
    _refuse_existing(*files.values())
    authority = Authority.create(args.directory or _home() / args.swarm, args.swarm, utc_now(), peers=args.peers)
    print(f"private swarm {args.swarm}: its authority is {authority.directory}; keep that safe, and off the servers")
    for name, role in wanted:
        _invite_one(authority, name, role, args.expires, None, files[name])
    return 0


def _invite(args: argparse.Namespace) -> int:
    path = args.out or Path(f"{args.name}.credentials")
    _refuse_existing(path)
    _invite_one(_authority(args), args.name, Role(args.role), args.expires, args.peers, path)
    return 0


def _invite_one(
    authority: Authority, name: str, role: Role, lifetime: timedelta, peers: Sequence[str] | None, path: Path
) -> None:
    credentials = authority.invite(name, role, lifetime=lifetime, now=utc_now(), peers=peers)
    credentials.save(path)
    until = credentials.invitation.not_valid_after_utc
    print(f"{path}: {credentials.member}, until {until:%Y-%m-%d}; use it with --credentials {path}")


def _list(args: argparse.Namespace) -> int:
    authority, now = _authority(args), utc_now()
    revoked = authority.revocations(now)
    print(
        f"{authority.name}, kept in {authority.directory}; joined at {', '.join(authority.peers) or 'no fixed address'}"
    )
    for entry in authority.invited():
        until = datetime.fromtimestamp(entry.expires_at, UTC)
        state = "revoked" if revoked.find(entry.member) else "expired" if until <= now else "good"
        print(f"  {entry.name:20} {entry.role:7} {state:8} until {until:%Y-%m-%d %H:%M}  {entry.id}")
    return 0


def _revoke(args: argparse.Namespace) -> int:
    if args.credentials is not None:
        return asyncio.run(_revoke_as_admin(Credentials.load(args.credentials), args.name, args.initial_peers))
    authority, now = _authority(args), utc_now()
    statements = authority.revoke(args.name, now)
    print(f"{args.name} is revoked in {authority.directory}")
    peers = tuple(args.initial_peers or authority.peers)
    if not peers:
        print("the swarm does not know it yet: tell it with --initial-peers ADDRESS", file=sys.stderr)
        return 1
    visitor = authority.credentials("authority", Role.ADMIN, expires_at=now + VISIT, now=now)
    return asyncio.run(_tell(visitor, peers, statements))


async def _tell(visitor: Credentials, peers: Sequence[str], statements: Sequence[Revocation]) -> int:
    async with await _visit(visitor, peers) as node:
        return _report(await node.revoke(statements))


async def _revoke_as_admin(credentials: Credentials, name: str, peers: Sequence[str] | None) -> int:
    if not credentials.member.role.may_revoke:
        raise AccessDenied(f"{credentials.member} may not revoke: that takes an admin, or the authority itself")
    async with await _visit(credentials, peers or credentials.peers) as node:
        members = [member for member in await node.members() if name in (member.name, member.id)]
        statements = [_signed(credentials, member) for member in members]
        if not statements:
            raise InvalidRequest(f"no peer has met a member called {name!r}; the authority can revoke it, too")
        return _report(await node.revoke(statements))


def _signed(credentials: Credentials, member: Member) -> Revocation:
    if member.role.may_revoke:
        raise AccessDenied(f"{member} can be revoked by the authority only")
    invitation = to_der(credentials.invitation)
    return revoke(member, credentials.authority_der, credentials.key, time.time(), signer=invitation)


async def _visit(credentials: Credentials, peers: Sequence[str]) -> "Node":
    from swarm.network import Node, NodeConfig

    return await Node.start(NodeConfig(credentials=credentials, initial_peers=tuple(peers), client_mode=True))


def _report(num_told: int) -> int:
    if not num_told:
        print("nobody has confirmed it; try again", file=sys.stderr)
        return 1
    peers = "1 peer has" if num_told == 1 else f"{num_told} peers have"
    print(f"{peers} confirmed it; others hear of it from there")
    return 0


def _authority(args: argparse.Namespace) -> Authority:
    """The one that is meant.

    Raises:
        ConfigError: none, or several.
    """
    if args.directory is not None:
        return Authority.load(args.directory)
    if args.swarm is not None:
        return Authority.load(_home() / args.swarm)
    found = sorted(path.parent for path in _home().glob("*/authority.key"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ConfigError(f"which swarm, {names}? say --swarm NAME")
    return Authority.load(found[0] if found else _home())


def _home() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "swarm"


def _refuse_existing(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            raise ConfigError(f"{path} exists already; it is not overwritten")


def _lifetime(text: str) -> timedelta:
    match = re.fullmatch(r"(\d{1,5})([mhd])", text)
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time; write 30d, 12h or 90m")
    return timedelta(seconds=int(match[1]) * _UNITS[match[2]])


_COMMANDS = {"new": _new, "invite": _invite, "list": _list, "revoke": _revoke}


if __name__ == "__main__":
    sys.exit(main())
