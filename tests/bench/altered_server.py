"""A server for benchmarks: `python -m altered_server ...` as `python -m swarm.server ...`, changed by its environment.

SWARM_BENCH_TOKEN_S       Its blocks compute nothing: each token takes so many seconds of sleep, and comes out as it
                          went in. So several servers work at the same time, however few cores there are.
SWARM_BENCH_WHOLE_TOKENS  It takes up to so many tokens in one message and in one batch, so that a prompt leaves it
                          only when it is done: hop after hop, with nothing overlapping.

SWARM_BENCH_SLOW_S        Each of its batches takes so many seconds longer, with the same results.

SWARM_BENCH_NO_GRAPHS     It keeps no graphs between forward and backward of training, only what enters each block.

The changes are made here, from outside; the server itself knows nothing of them.
"""

import os
import sys
import time
from typing import Any


def main() -> int:
    """Change what the environment says, then be a server."""
    from swarm.server.lean import import_transformers_lean

    import_transformers_lean()
    from swarm.server.__main__ import main as serve

    if token_s := float(os.environ.get("SWARM_BENCH_TOKEN_S", "0")):
        sleep_for_tokens(token_s)
    if slow_s := float(os.environ.get("SWARM_BENCH_SLOW_S", "0")):
        slow_down(slow_s)
    if num_tokens := int(os.environ.get("SWARM_BENCH_WHOLE_TOKENS", "0")):
        take_whole_prompts(num_tokens)
    if os.environ.get("SWARM_BENCH_NO_GRAPHS"):
        keep_no_graphs()
    return serve()


def keep_no_graphs() -> None:
    """Let a training pass forget each block's graph on the way forth."""
    from swarm.server.blocks.training_pass import TrainingPass

    forward = TrainingPass.forward

    def run(self: TrainingPass, *, keep: bool) -> Any:
        for _ in forward(self, keep=keep):
            for kept in self._kept.values():
                if kept.graph is not None:
                    self._budget.give_back(kept.graph.num_bytes)
                    kept.num_bytes -= kept.graph.num_bytes
                    kept.graph = None
            yield

    TrainingPass.forward = run  # type: ignore[method-assign]


def sleep_for_tokens(token_s: float) -> None:
    """Let blocks sleep in place of computing."""
    from swarm.server.blocks.span import BlockSpan

    def run(self: BlockSpan, batch: Any) -> list[Any]:
        time.sleep(token_s * sum(chunk.num_tokens for chunk in batch))
        return [chunk.hidden_states for chunk in batch]

    BlockSpan.run = run  # type: ignore[method-assign]


def slow_down(batch_s: float) -> None:
    """Let each batch take longer."""
    from swarm.server.blocks.span import BlockSpan

    run = BlockSpan.run

    def run_slowly(self: BlockSpan, batch: Any) -> list[Any]:
        time.sleep(batch_s)
        return run(self, batch)

    BlockSpan.run = run_slowly  # type: ignore[method-assign]


def take_whole_prompts(num_tokens: int) -> None:
    """Let a prompt of so many tokens be one message and one batch."""
    from swarm.server.executor import Executor
    from swarm.server.limits import HandlerLimits

    set_default(Executor, "token_budget", num_tokens)
    set_default(HandlerLimits, "max_step_tokens", num_tokens)


def set_default(kind: type, name: str, value: int) -> None:
    """Change the default of a class's keyword argument; KeyError if there is none, so that a rename is noticed."""
    defaults: dict[str, Any] = vars(kind)["__init__"].__kwdefaults__
    if name not in defaults:
        raise KeyError(f"{kind.__name__} has no argument {name!r} with a default")
    defaults[name] = value


if __name__ == "__main__":
    sys.exit(main())
