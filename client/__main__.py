"""`python -m swarm.client "question" --initial-peers ADDR`: a model of the swarm answers on the terminal.

    main ─► from_pretrained ─► Conversation.ask (once, or per line with --chat) ─► text on stdout, route on stderr
      └─ train ... ─► swarm.client.train

Exit status: 0 answered, 2 an error (one line on stderr), 130 interrupted.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from swarm import logs
from swarm.checkpoint.source import DEFAULT_MODEL
from swarm.command import exit_status, program
from swarm.errors import InvalidRequest
from swarm.options import MODEL, add_checkpoint, add_initial_peers, add_threads, require_at_least
from swarm.private.arguments import add_credentials, load_credentials, require_peers

if TYPE_CHECKING:
    from swarm.client.chat import Answer, Conversation
    from swarm.client.generation import DistributedModel

DEFAULT_NEW_TOKENS = 256
COMMANDS = {"train": "swarm.client.train"}
"""First words that are commands of their own, and their modules."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given and given[0] in COMMANDS:
        status: int = importlib.import_module(COMMANDS[given[0]]).main(given[1:])
        return status
    args = build_parser().parse_args(given)
    logs.configure(args)
    return exit_status(lambda: _run(args))


def build_parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        prog=program("client"),
        description="Ask a model whose transformer blocks run on the servers of a swarm.",
        epilog=f"e.g. {program('client')} 'Why is the sky blue?' --initial-peers /ip4/10.0.0.5/tcp/31337/p2p/12D3..."
        f"; to fine-tune: {program('client')} train --help",
    )
    add = parser.add_argument
    add("question", nargs="?", help="what to ask; may be left out with --chat")
    add("--model", default=DEFAULT_MODEL, help=MODEL)
    add_initial_peers(parser)
    add_credentials(parser)
    add(
        "--chat",
        action="store_true",
        help="keep a conversation: one question per line, an empty line or Ctrl-D ends it",
    )
    add("--system", metavar="TEXT", help="instructions that come before the first question (default: the model's own)")
    add(
        "--max-new-tokens",
        type=int,
        default=DEFAULT_NEW_TOKENS,
        metavar="N",
        help="longest answer, in tokens (default: %(default)s)",
    )
    add(
        "--do-sample",
        action="store_true",
        help="draw tokens at random instead of the likeliest (default: only if one of the next three is given)",
    )
    add("--temperature", type=float, metavar="T", help="how random, above 0 (default: the model's own, or 1)")
    add(
        "--top-p",
        type=float,
        metavar="P",
        help="draw from the likeliest tokens of this total probability, above 0 to 1",
    )
    add("--seed", type=int, metavar="N", help="makes random answers repeatable (default: different each time)")
    add(
        "--adapter",
        metavar="ADAPTER",
        help="adapter to use: directory, hub id or sha256:DIGEST (default: none)",
    )
    add("--show-route", action="store_true", help="print which peer ran which blocks, and how fast the answer came")
    add("--json", action="store_true", help="print one JSON object per answer instead of streaming the text")
    add_checkpoint(parser)
    add_threads(parser)
    logs.add_arguments(parser)
    return parser


def _check(args: argparse.Namespace) -> None:
    """Refuse what can be refused before anything is loaded."""
    if not args.question and not args.chat:
        raise InvalidRequest("nothing to ask: give a question, or --chat")
    require_at_least(args, 1, "max_new_tokens", "threads")
    if args.temperature is not None and not args.temperature > 0:
        raise InvalidRequest(f"--temperature is {args.temperature}, need more than 0")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise InvalidRequest(f"--top-p is {args.top_p}, need more than 0 and at most 1")


def _run(args: argparse.Namespace) -> int:
    _check(args)
    credentials = load_credentials(args)
    initial_peers = require_peers(args, credentials)

    import torch
    from transformers.utils import logging as transformers_logging

    from swarm.client.auto import AutoDistributedModelForCausalLM
    from swarm.client.chat import Conversation, load_tokenizer

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    model = AutoDistributedModelForCausalLM.from_pretrained(
        args.model,
        initial_peers=initial_peers,
        revision=args.revision,
        cache_dir=args.cache_dir,
        credentials=credentials,
    )
    if args.adapter is not None:
        try:
            model.load_adapter(args.adapter, cache_dir=args.cache_dir)
        except BaseException:
            model.close()
            raise
    with model, Conversation(model, load_tokenizer(model.checkpoint), system=args.system) as talk:
        for question in _questions(args):
            _answer(talk, model, question, args)
    return 0


def _questions(args: argparse.Namespace) -> Iterator[str]:
    """The question of the command line, then, with --chat, one per line of input."""
    if args.question:
        yield args.question
    while args.chat:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not question:
            return
        yield question


def _answer(talk: "Conversation", model: "DistributedModel", question: str, args: argparse.Namespace) -> None:
    answer = talk.ask(question, show=None if args.json else _show, **_options(args))
    if args.json:
        print(json.dumps(_report(answer, model)), flush=True)
        return
    print(flush=True)
    if args.show_route:
        route = " -> ".join(f"{name} [{hop.blocks}]" for name, hop in model.last_route)
        print(f"route: {route}", file=sys.stderr)
        print(
            f"time to first token {answer.first_token_s:.2f} s, then {answer.tokens_per_s:.1f} tokens/s"
            f" ({answer.num_sent_tokens} of {answer.num_prompt_tokens} tokens sent, {answer.num_tokens} generated)",
            file=sys.stderr,
        )


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    chosen = {"temperature": args.temperature, "top_p": args.top_p}
    options: dict[str, Any] = {key: value for key, value in chosen.items() if value is not None}
    do_sample = args.do_sample or bool(options) or args.seed is not None
    return options | {"do_sample": do_sample, "max_new_tokens": args.max_new_tokens}


def _report(answer: "Answer", model: "DistributedModel") -> dict[str, Any]:
    return {
        "text": answer.text,
        "num_prompt_tokens": answer.num_prompt_tokens,
        "num_sent_tokens": answer.num_sent_tokens,
        "num_tokens": answer.num_tokens,
        "first_token_s": round(answer.first_token_s, 4),
        "tokens_per_s": round(answer.tokens_per_s, 2),
        "route": [{"name": name, "peer_id": hop.peer_id, "blocks": str(hop.blocks)} for name, hop in model.last_route],
    }


if __name__ == "__main__":
    sys.exit(main())
