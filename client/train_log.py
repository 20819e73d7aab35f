"""What a training run tells while it goes on: a progress bar, log.csv, loss.png; and how Ctrl-C ends it.

    transformers.Trainer ─on_log, on_step_end─► RunLog ─► bar: loss, tokens/s, route
                                                     └─► log.csv ─ at the end ─► loss.png
    Ctrl-C ─► after the step: save a checkpoint, stop        again ─► stop at once

A run that is resumed goes on in the same log.csv, from the step of its checkpoint.
"""

import csv
import signal
import sys
import time
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm
from transformers import TrainerCallback

from swarm.client.peft_model import DistributedPeftModel

COLUMNS = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm", "num_tokens", "tokens_per_s", "seconds")


class RunLog(TrainerCallback):
    """See the module.

    Args:
        output: directory of the run.
        model: whose route is shown.
        is_resumed: whether there is a log.csv to go on with.
    """

    def __init__(self, output: Path, model: DistributedPeftModel, *, is_resumed: bool = False):
        self.is_interrupted = False
        self._output, self._model = output, model
        self._rows: list[dict[str, str]] = _read(output / "log.csv") if is_resumed else []
        self._bar: Any = None
        self._started = self._last_s = time.monotonic()
        self._last_tokens = 0.0
        self._before: Any = None

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)
        if self._bar is not None:
            self._bar.close()
        plot(self._rows, self._output / "loss.png")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin with what is done already."""
        self._rows = [row for row in self._rows if int(row["step"]) <= state.global_step]
        self._output.mkdir(parents=True, exist_ok=True)
        with (self._output / "log.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self._rows)
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", file=sys.stderr)
        self._started = self._last_s = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A step is done; where somebody has pressed Ctrl-C, it was the last one."""
        self._bar.update(state.global_step - self._bar.n)
        if self.is_interrupted:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The trainer has numbers."""
        logs: dict[str, Any] = given["logs"]
        if "loss" not in logs and "eval_loss" not in logs:
            return
        now = time.monotonic()
        row: dict[str, Any] = {name: logs[name] for name in COLUMNS if name in logs}
        row |= {"step": state.global_step, "seconds": f"{now - self._started:.2f}"}
        if "loss" in logs and "num_tokens" in logs:
            row["tokens_per_s"] = f"{(logs['num_tokens'] - self._last_tokens) / max(now - self._last_s, 1e-9):.1f}"
            self._last_s, self._last_tokens = now, logs["num_tokens"]
        self._rows.append({name: str(value) for name, value in row.items()})
        with (self._output / "log.csv").open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)
        if "loss" in logs:
            self._bar.set_postfix_str(
                f"loss {float(logs['loss']):.4f}, {row.get('tokens_per_s', '?')} tokens/s, {route_of(self._model)}"
            )

    def _interrupt(self, number: int, frame: Any) -> None:
        if self.is_interrupted:
            raise KeyboardInterrupt
        self.is_interrupted = True
        print("\nfinishing this step, then saving; Ctrl-C again stops at once", file=sys.stderr)


def route_of(model: Any) -> str:
    """The servers that the latest step went through, by name."""
    route = model.get_base_model().training_route
    return " > ".join(f"{name} {hop.blocks}" for name, hop in route) or "?"


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Draw the losses over the steps, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(8, 4.5))
    axes = figure.subplots()
    for name, style in (("loss", "-"), ("eval_loss", "o-")):
        found = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
        if found:
            axes.plot(*zip(*found, strict=True), style, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    if axes.lines:
        axes.legend()
    figure.savefig(path)


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
