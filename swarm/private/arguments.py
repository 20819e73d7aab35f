"""`--credentials FILE`, as every command that joins a swarm takes it.

    add_credentials(parser) ─► args ─► load_credentials(args) ─► Credentials or None ─► NodeConfig(credentials=...)
                                                             └─► require_peers ─► NodeConfig(initial_peers=...)

A private swarm calls no host outside itself, so with credentials the libraries that would like to are told not to.
"""

import argparse
import os

from swarm.errors import InvalidRequest
from swarm.private.credentials import Credentials

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_OFFLINE": "1"}
"""Read by huggingface_hub and transformers when they are imported."""


def add_credentials(parser: argparse.ArgumentParser) -> None:
    """Add --credentials to a command."""
    parser.add_argument(
        "--credentials",
        metavar="FILE",
        help="invitation into a private swarm, see `python -m swarm.keys`; with it, nothing is downloaded: models are"
        " embedded ones, directories, or in the hub's cache already",
    )


def load_credentials(args: argparse.Namespace) -> Credentials | None:
    """The credentials that were named, or None; call it before anything of the hub's is imported.

    Raises:
        ConfigError: the file can't be read, or is none.
        InvitationExpired: it was good until some day.
    """
    if args.credentials is None:
        return None
    credentials = Credentials.load(args.credentials)
    os.environ.update(OFFLINE)
    return credentials


def require_peers(args: argparse.Namespace, credentials: Credentials | None) -> tuple[str, ...]:
    """Where a command joins its swarm: --initial-peers, or what the credentials say.

    Raises:
        InvalidRequest: neither names a peer.
    """
    if peers := tuple(args.initial_peers) or (credentials.peers if credentials is not None else ()):
        return peers
    missing = "--initial-peers is missing"
    if credentials is None:
        raise InvalidRequest(f"{missing}: give the address that a server or bootstrap peer printed")
    raise InvalidRequest(f"{missing}, and the credentials of {credentials.member} name no peer to join")
