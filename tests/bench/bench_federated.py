"""Federated training on uneven shares of real reviews, by each way of aggregating, against one who has all the data.

    no training | central | SVD | stacking | means of A and B | the first three with the warm-up of SLoRA

SmolLM2-135M-Instruct (fp32) learns to tell the sentiment of film reviews; held-out loss and accuracy of the label's
token. Blocks run on a real local swarm: one server process; the clients are threads of this process, each with a model,
a peer and a share of its own. Central training takes the same examples per step as all clients together.

    python tests/bench/bench_federated.py [--rounds 4] [--local-steps 3] [--alpha 0.3]
"""

import argparse
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from common import judged, print_report
from peft import LoraConfig
from reviews import Review, batches, deal, encode, load_reviews
from swarms import MODEL, Loopback, start_swarm
from transformers import AutoTokenizer, set_seed

from swarm import AutoDistributedModelForCausalLM, FederatedRun, FederatedSettings, get_peft_model
from swarm.client.processes import PeerProcess

NUM_CLIENTS = 3
NUM_HELD_OUT = 96
EVAL_BATCH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one way has come to."""

    way: str
    loss: float
    accuracy: float
    seconds: float
    rank: int = 0
    bytes_per_round: float = 0.0
    """Sent and received, by each client."""


class Bench:
    """A swarm, the data, and one way after another.

    Args:
        args: of the command line.
        address: of the swarm.
    """

    def __init__(self, args: argparse.Namespace, address: str):
        self.args, self.address = args, address
        reviews = load_reviews(args.seed)
        self.held_out, self.train = reviews[:NUM_HELD_OUT], reviews[NUM_HELD_OUT:]
        self.shares = deal(self.train, NUM_CLIENTS, args.alpha, args.seed)

    def model(self, stack: ExitStack) -> tuple[Any, Any]:
        """A PEFT model over the swarm's blocks, and its tokenizer."""
        base = AutoDistributedModelForCausalLM.from_pretrained(MODEL, initial_peers=[self.address], dtype=torch.float32)
        set_seed(self.args.seed)
        config = LoraConfig(r=self.args.rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        return stack.enter_context(get_peft_model(base, config)), AutoTokenizer.from_pretrained(base.checkpoint.path)

    def untrained(self) -> Measured:
        """The model as it is."""
        with ExitStack() as stack:
            return Measured(way="no training", seconds=0.0, **self.evaluate(*self.model(stack)))

    def central(self) -> Measured:
        """All data in one place."""
        started = time.perf_counter()
        with ExitStack() as stack:
            model, tokenizer = self.model(stack)
            feed = batches(self.train, tokenizer, NUM_CLIENTS * self.args.batch_size)
            learn(model, model.parameters(), feed, self.args.rounds * self.args.local_steps, self.args.learning_rate)
            seconds = time.perf_counter() - started
            return Measured(way="central", seconds=seconds, rank=self.args.rank, **self.evaluate(model, tokenizer))

    def federated(self, way: str, settings: FederatedSettings) -> Measured:
        """Three clients in threads."""
        started = time.perf_counter()
        with ExitStack() as stack, ThreadPoolExecutor(NUM_CLIENTS) as pool:
            clients = [self._join(stack, way, settings, share) for share in self.shares]
            results = [future.result() for future in [pool.submit(client) for client in clients]]
            seconds = time.perf_counter() - started
            model, tokenizer, last, num_bytes, _ = results[0]
            assert len({digest for *_, digest in results}) == 1, "clients have different adapters"
            return Measured(
                way=way, seconds=seconds, rank=last.rank, bytes_per_round=num_bytes / self.args.rounds,
                **self.evaluate(model, tokenizer),
            )  # fmt: skip

    def _join(
        self, stack: ExitStack, way: str, settings: FederatedSettings, share: Sequence[Review]
    ) -> Callable[[], Any]:
        args = self.args
        model, tokenizer = self.model(stack)
        run = stack.enter_context(
            FederatedRun(model, name=way, settings=settings, min_clients=NUM_CLIENTS, host="127.0.0.1")
        )
        feed = batches(share, tokenizer, args.batch_size)

        def work() -> Any:
            num_bytes = 0
            for _ in range(args.rounds):
                learn(model, run.parameters(), feed, args.local_steps, args.learning_rate)
                result = run.round(len(share))
                assert result.took_part and len(result.clients) == NUM_CLIENTS
                num_bytes += result.bytes_sent + result.bytes_received
            return model, tokenizer, result, num_bytes, run.digest

        return work

    @torch.no_grad()
    def evaluate(self, model: Any, tokenizer: Any) -> dict[str, float]:
        """Loss and accuracy of the label's first token on reviews that nobody has trained on."""
        model.eval()
        total, correct = 0.0, 0
        negative, positive = (tokenizer(text)["input_ids"][0] for text in (" negative", " positive"))
        for start in range(0, NUM_HELD_OUT, EVAL_BATCH):
            given = encode(self.held_out[start : start + EVAL_BATCH], tokenizer)
            labels = given.pop("labels")
            logits = model(**given).logits[:, :-1].float()
            counts = labels[:, 1:] != -100
            total += float(torch.nn.functional.cross_entropy(logits[counts], labels[:, 1:][counts], reduction="sum"))
            found = logits[counts]
            correct += int(((found[:, positive] > found[:, negative]) == (labels[:, 1:][counts] == positive)).sum())
        return {"loss": total / NUM_HELD_OUT, "accuracy": correct / NUM_HELD_OUT}


def learn(model: Any, parameters: Any, feed: Any, num_steps: int, learning_rate: float) -> None:
    """Some steps of AdamW, whose state begins anew."""
    model.train()
    optimizer = torch.optim.AdamW([it for it in parameters if it.requires_grad], lr=learning_rate, weight_decay=0.0)
    for _ in range(num_steps):
        model(**next(feed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description="federated training against central training")
    add = parser.add_argument
    add("--rounds", type=int, default=4)
    add("--local-steps", type=int, default=3)
    add("--batch-size", type=int, default=8)
    add("--rank", type=int, default=8)
    add("--columns", type=int, default=16, help="of the warm-up")
    add("--alpha", type=float, default=0.3, help="of the Dirichlet distribution of sentiments")
    add("--learning-rate", type=float, default=5e-4)
    add("--seed", type=int, default=0)
    add("--ways", nargs="+", default=["central", "svd", "stack", "average", "svd+warm-up", "stack+warm-up"])
    args = parser.parse_args()
    processes: list[PeerProcess] = []
    try:
        swarm = start_swarm(Loopback(), ["0:30"], processes, "--dtype", "float32", env={"OMP_NUM_THREADS": "2"})
        torch.set_num_threads(2)
        report(args, Bench(args, swarm.address))
    finally:
        for process in reversed(processes):
            process.stop()


def report(args: argparse.Namespace, bench: Bench) -> None:
    """Run all, and print what they came to."""
    for index, share in enumerate(bench.shares):
        praise = sum(review.label for review in share) / len(share)
        print(f"client {index}: {len(share)} reviews, {praise:.0%} positive")
    print(f"{'way':<16}{'loss':>8}{'accuracy':>10}{'rank':>6}{'MB/round':>10}{'seconds':>9}")
    found: dict[str, Measured] = {}
    for way in ["no training", *args.ways]:
        if way == "no training":
            measured = bench.untrained()
        elif way == "central":
            measured = bench.central()
        else:
            aggregate, _, warmup = way.partition("+")
            settings = FederatedSettings(
                aggregate=aggregate, warmup_rounds=int(bool(warmup)), warmup_columns=args.columns
            )
            measured = bench.federated(way, settings)
        found[way] = measured
        print(
            f"{way:<16}{measured.loss:>8.4f}{measured.accuracy:>10.1%}{measured.rank:>6}"
            f"{measured.bytes_per_round / 1e6:>10.2f}{measured.seconds:>9.1f}",
            flush=True,
        )
    targets = {
        f"{way}: loss below no training's": judged(it.loss, "<=", round(found["no training"].loss, 4))
        for way, it in found.items()
        if way != "no training"
    }
    details = {
        way: {"loss": round(it.loss, 4), "accuracy": round(it.accuracy, 4), "rank": it.rank,
              "bytes_per_round": round(it.bytes_per_round), "seconds": round(it.seconds, 1)}
        for way, it in found.items()
    }  # fmt: skip
    print_report("federated", targets, settings=vars(args), ways=details)


if __name__ == "__main__":
    main()
