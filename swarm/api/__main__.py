"""`python -m swarm.api MODEL --initial-peers ADDR`: an OpenAI-compatible API and a chat page in front of a swarm.

    main ─► listen ─► join the swarm, load the local part ─► Api.app ─► uvicorn, until SIGTERM or Ctrl-C

Exit status: 0 after a clean stop, 2 an error (one line on stderr), 130 interrupted before it served.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from swarm import logs
from swarm.api.config import ApiLimits
from swarm.api.keys import Keys
from swarm.api.serving import listen, make_server, url
from swarm.checkpoint.source import DEFAULT_MODEL, resolve
from swarm.command import exit_status, program
from swarm.errors import InvalidRequest
from swarm.identity import Identity
from swarm.options import MODEL, add_checkpoint, add_initial_peers, add_threads, require_at_least
from swarm.private.arguments import add_credentials, load_credentials, require_peers

if TYPE_CHECKING:
    from swarm.api.models import ServedModel

DEFAULT_PORT = 8000


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    logs.configure(args)
    return exit_status(lambda: _run(args))


def build_parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    limits = ApiLimits()
    parser = argparse.ArgumentParser(
        prog=program("api"),
        description="Serve an OpenAI-compatible API and a chat page from the models of a swarm.",
        epilog="e.g. python -m swarm.api --initial-peers /ip4/10.0.0.5/tcp/31337/p2p/12D3... --port 8000",
    )
    add = parser.add_argument
    add("model", nargs="?", default=DEFAULT_MODEL, help=MODEL)
    add_initial_peers(parser)
    add_credentials(parser)
    add(
        "--adapters",
        nargs="+",
        metavar="NAME=PATH",
        default=[],
        help="adapters, directories, hub ids or sha256:DIGEST; each is a model of its own, MODEL:NAME",
    )
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all (default: %(default)s)")
    add(
        "--port",
        type=int,
        default=DEFAULT_PORT,
        metavar="PORT",
        help="TCP port; 0 picks a free one (default: %(default)s)",
    )
    add(
        "--api-keys",
        nargs="+",
        metavar="FILE",
        default=[],
        help="files of keys made by `python -m swarm.api.keys`; each account then is a client of its own"
        " for the servers (default: no key needed, all users are one client)",
    )
    add(
        "--identity",
        metavar="FILE",
        help="key file that accounts' identities are derived from, created when missing (default: new ones each time)",
    )
    add(
        "--max-tokens",
        type=int,
        default=limits.max_tokens,
        metavar="N",
        help="longest answer, in tokens (default: %(default)s)",
    )
    add(
        "--max-answers",
        type=int,
        default=limits.max_rows,
        metavar="N",
        help="answers generated at once; more wait, then get 429 (default: %(default)s)",
    )
    add_checkpoint(parser)
    add_threads(parser)
    logs.add_arguments(parser)
    return parser


def _check(args: argparse.Namespace) -> None:
    """Refuse what can be refused before anything is loaded."""
    for text in args.adapters:
        name, _, path = text.partition("=")
        if not name or not path:
            raise InvalidRequest(f"--adapters: {text!r} is not NAME=PATH")
    require_at_least(args, 1, "max_tokens", "max_answers", "threads")


def _run(args: argparse.Namespace) -> None:
    _check(args)
    credentials = load_credentials(args)
    initial_peers = require_peers(args, credentials)

    import torch
    from transformers.utils import logging as transformers_logging

    from swarm.api.gateway import make_app
    from swarm.api.identities import Identities
    from swarm.api.models import Models, serve_model
    from swarm.client.auto import connect_to
    from swarm.client.model import distribute

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    keys = Keys(args.api_keys) if args.api_keys else None
    identity = Identity.load_or_create(args.identity) if args.identity else Identity.generate()
    limits = _limits(args)
    with listen(args.host, args.port) as sock:
        checkpoint = resolve(
            args.model, revision=args.revision, cache_dir=args.cache_dir, is_offline=credentials is not None
        )
        join = partial(connect_to, checkpoint, initial_peers, credentials=credentials)
        with closing(join(identity)) as service:
            base = serve_model(distribute(checkpoint, service))
            models = Models([base, *_adapters(base, args.adapters, args.cache_dir)])
            secret = identity.key.private_bytes_raw()
            identities = Identities(join, secret=secret, max_clients=limits.max_clients) if keys else None
            app = make_app(
                models,
                service,
                check_health=service.find_route,
                limits=limits,
                keys=keys,
                identities=identities,
                hosts=[args.host],
            )
            print(f"serving {checkpoint.name}: chat at {url(sock)}/, API at {url(sock)}/v1", flush=True)
            server = make_server(app)
            service.when_denied(lambda: setattr(server, "should_exit", True))
            with suppress(KeyboardInterrupt):  # it has stopped by then, and lets the signal do what it did before
                server.run(sockets=[sock])
            service.check_access()


def _adapters(base: "ServedModel", named: Sequence[str], cache_dir: Path | None) -> "list[ServedModel]":
    """The base model with each of the adapters."""
    found = []
    for text in named:
        name, _, path = text.partition("=")
        base.model.load_adapter(path, adapter_name=name, cache_dir=cache_dir)
        found.append(base.with_adapter(name))
    return found


def _limits(args: argparse.Namespace) -> ApiLimits:
    rows = ApiLimits().max_rows_per_request
    return ApiLimits(
        max_tokens=args.max_tokens, max_rows=args.max_answers, max_rows_per_request=min(rows, args.max_answers)
    )


if __name__ == "__main__":
    sys.exit(main())
