"""Is what comes out of training through a swarm what local training gives, with servers killed on the way, in int8?

    python tests/bench/bench_train_equal.py [--steps 200] [--rows 4] [--kill-every 20]

LoRA of rank 8 on q and v of the embedded model, from the same first values, with the same batches of film reviews and
their sentiment, in four runs: PEFT in one local process; two servers of 15 blocks in fp32; the same with a spare server
for each, where every so many steps a server of the route gets SIGKILL during the step, and another one takes its place
as a spare; and two servers in int8. Loss curves are compared step by step, as means over ten steps, which is what one
looks at; the worst is judged. Afterwards the int8 run's adapter is evaluated on reviews that nobody has trained on,
through the same int8 blocks: loss of all tokens, and how often the sentiment is right.
"""

import argparse
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from common import judged, print_report
from forked import ForkedServer, ServerFactory
from reviews import Review, encode, load_reviews
from swarms import MODEL, START_TIMEOUT_S
from training_jobs import Job, local_model, lora, remote_model, remote_of
from transformers import AutoTokenizer

from swarm.checkpoint.source import resolve
from swarm.client.processes import start_bootstrap

SPANS = ("0:15", "15:30")
NUM_HELD_OUT = 200
WINDOW = 10
TARGETS = {"fp32": 0.01, "int8": 0.03, "kills": 1e-3}

Batch = dict[str, torch.Tensor]


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of each run (default: 200)")
    parser.add_argument("--rows", type=int, default=4, help="reviews of a batch (default: 4)")
    parser.add_argument("--kill-every", type=int, default=20, help="steps between two lost servers (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of data and victims (default: 0)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = Data(args)
    local = Job(local_model(lora()))
    train(local, data, "local")
    with ServerFactory() as factory:
        remote = Remote(factory, "none")
        train(remote.job, data, "fp32")
        kills = Remote(factory, "none", num_each=2)
        train(kills.job, data, "kills", before=lambda step: kills.kill_one(step, args))
        int8 = Remote(factory, "int8")
        before = data.evaluate(int8.job)
        train(int8.job, data, "int8")
        after = data.evaluate(int8.job)
        runs = {"local": local, "fp32": remote.job, "kills": kills.job, "int8": int8.job}
        report(runs, before, after, kills, args)
        for made in (remote, kills, int8):
            made.close()


class Data:
    """Batches by step, and what is held out."""

    def __init__(self, args: argparse.Namespace):
        self.tokenizer: Any = AutoTokenizer.from_pretrained(resolve(MODEL).path)
        reviews = load_reviews(args.seed)
        self.num_steps, self._rows = args.steps, args.rows
        self._held_out, self._train = reviews[:NUM_HELD_OUT], reviews[NUM_HELD_OUT:]

    def batch(self, step: int) -> Batch:
        """Of one step: all tokens count."""
        return self._encode(self._train[step * self._rows : (step + 1) * self._rows])

    @torch.no_grad()
    def evaluate(self, job: Job) -> dict[str, float]:
        """Mean loss over batches, and the share of sentiments that are right, on what is held out."""
        loss, right, size = 0.0, 0, 20
        for start in range(0, NUM_HELD_OUT, size):
            rows = self._held_out[start : start + size]
            loss += float(job.model(**self._encode(rows)).loss) * size / NUM_HELD_OUT
            right += self._num_right(job, rows)
        return {"loss": loss, "accuracy": right / NUM_HELD_OUT}

    def _num_right(self, job: Job, rows: list[Review]) -> int:
        batch = encode(rows, self.tokenizer)
        logits = job.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        places = (batch["labels"] != -100).int().argmax(1)  # of the label's first token
        answers = [self.tokenizer(answer)["input_ids"][0] for answer in (" negative", " positive")]
        chosen = logits[torch.arange(len(rows)), places - 1][:, answers].argmax(1)
        return sum(int(choice) == row.label for choice, row in zip(chosen, rows, strict=True))

    def _encode(self, rows: list[Review]) -> Batch:
        batch = encode(rows, self.tokenizer)
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


class Remote:
    """A swarm of its own, and a job that goes through it."""

    def __init__(self, factory: ServerFactory, quantization: str, num_each: int = 1):
        self._factory, self._quantization = factory, quantization
        self._bootstrap = start_bootstrap()
        self.address = self._bootstrap.wait_for(r"--initial-peers (\S+)", START_TIMEOUT_S)[1]
        self.servers = {span: [self._start(span) for _ in range(num_each)] for span in SPANS}
        for own in self.servers.values():
            for server in own:
                server.wait_for("^ONLINE")
        self.job = Job(remote_model(lora(), self.address))
        self.killed = 0

    def kill_one(self, step: int, args: argparse.Namespace) -> None:
        """Every so many steps, kill a server of the route at a random moment of this step."""
        if not step or step % args.kill_every:
            return
        dice = random.Random(args.seed + step)
        used = {hop.peer_id for hop in remote_of(self.job.model).route}
        span = dice.choice(SPANS)
        victim = next(server for server in self.servers[span] if server.peer_id in used)
        self.servers[span].remove(victim)
        self.servers[span].append(self._start(span))
        self.servers[span][-1].wait_for("^ONLINE")
        threading.Timer(dice.uniform(0.0, 0.5), victim.kill).start()
        self.killed += 1

    def close(self) -> None:
        """End the job and its swarm."""
        self.job.model.close()
        for server in [server for own in self.servers.values() for server in own]:
            server.kill()
        self._bootstrap.stop()

    def _start(self, span: str) -> ForkedServer:
        options = [MODEL, "--blocks", span, "--initial-peers", self.address, "--host", "127.0.0.1", "--threads", "1"]
        return self._factory.start([*options, "--quantization", self._quantization])


def train(job: Job, data: Data, name: str, before: Callable[[int], None] = lambda step: None) -> None:
    """All steps of a run."""
    started = time.perf_counter()
    for step in range(data.num_steps):
        before(step)
        job.step(data.batch(step))
    first, last = windows(job.losses)[0], windows(job.losses)[-1]
    print(f"{name:6} loss {first:.4f} -> {last:.4f} in {time.perf_counter() - started:.0f} s", flush=True)


def windows(losses: list[float]) -> list[float]:
    """Means over so many steps."""
    parts = [losses[start : start + WINDOW] for start in range(0, len(losses), WINDOW)]
    return [sum(part) / len(part) for part in parts]


def report(
    runs: dict[str, Job], before: dict[str, float], after: dict[str, float], kills: Remote, args: argparse.Namespace
) -> None:
    """Print all."""
    curves = {name: windows(job.losses) for name, job in runs.items()}
    print(f"\n{'steps':>8}" + "".join(f"{name:>12}" for name in curves))
    for index in range(len(curves["local"])):
        print(f"{(index + 1) * WINDOW:8}" + "".join(f"{curve[index]:12.6f}" for curve in curves.values()))
    worst = {
        name: max(abs(a / b - 1) for a, b in zip(curves[name], curves["local"], strict=True))
        for name in ("fp32", "int8")
    }
    final = abs(runs["kills"].losses[-1] - runs["fp32"].losses[-1])
    print(f"\n{kills.killed} servers killed, {remote_of(kills.job.model).num_chains} chains")
    for name in ("loss", "accuracy"):
        print(f"held out, int8: {name} {before[name]:.4f} -> {after[name]:.4f}")
    targets = {
        "fp32: curve against local": judged(worst["fp32"], "<=", TARGETS["fp32"]),
        "int8: curve against local": judged(worst["int8"], "<=", TARGETS["int8"]),
        "kills: final loss against none": judged(final, "<=", TARGETS["kills"]),
    }
    details = {"steps": args.steps, "killed": kills.killed, "held_out_before": before, "held_out_after": after}
    print_report("train_equal", targets, **details, worst=worst, final_difference=final)


if __name__ == "__main__":
    main()
