"""Rounds with other clients inside a trainer: what `python -m swarm.client train --federated NAME` adds to it.

    trainer ─ every K steps ─► FederatedRounds.on_step_end ─► FederatedRun.round ─► the adapter changes in place

A round that too few come to, or in which peers or the DHT have trouble, is told of, and training goes on alone until
the next one.
"""

import argparse
import sys
from typing import Any

from transformers.trainer_callback import TrainerCallback

from swarm.client.federated import FederatedRun, RoundResult
from swarm.client.peft_model import DistributedPeftModel
from swarm.errors import PeerError, RoundFailed


def open_run(args: argparse.Namespace, model: DistributedPeftModel) -> FederatedRun:
    """The run that the command line names; the same name, model, rank and targets at all clients."""
    return FederatedRun(
        model, name=args.federated, min_clients=args.min_clients, timeout_s=args.round_timeout, host=args.host,
        port=args.port,
    )  # fmt: skip


class FederatedRounds(TrainerCallback):
    """Gives the others what was learnt, every so many steps, and begins anew with the mean.

    Args:
        run: of this model.
        local_steps: between rounds.
        num_examples: that this client has: its weight.
    """

    def __init__(self, run: FederatedRun, *, local_steps: int, num_examples: int):
        self._run, self._local_steps, self._num_examples = run, local_steps, num_examples

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainers call this when the parameters have changed."""
        if state.global_step % self._local_steps:
            return
        try:
            told = describe(self._run.round(self._num_examples))
        except (RoundFailed, PeerError) as error:
            told = f"{error}; going on alone"
        else:
            kwargs["optimizer"].state.clear()  # its moments belong to another adapter
        print(told, file=sys.stderr)


def describe(result: RoundResult) -> str:
    """A round in a line."""
    refused = f", {len(result.refused)} refused" if result.refused else ""
    if not result.took_part:
        return f"round {result.round}: too late, took over what the others have{refused}"
    num_bytes = result.bytes_sent + result.bytes_received
    return f"round {result.round}: {len(result.clients)} clients, {num_bytes / 1e6:.1f} MB{refused}"
