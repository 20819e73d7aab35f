"""What an operator sees of a server on the terminal, from the first start to the end.

plan, addresses ─► how others join, how to ask        a terminal: rich, with a bar while blocks load
progress        ─► loaded n/m blocks                  a file or a pipe: plain lines, always the same,
online          ─► ONLINE: ...                        for programs that wait for them
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from swarm.command import program
from swarm.server.config import ServerConfig

if TYPE_CHECKING:
    from swarm.server.plan import Plan
    from swarm.server.server import Server

NOBODY_CONNECTS = "nobody can connect to this machine; these peers carry connections to it, which they can't read:"


class Screen:
    """Tells how a server's start goes.

    Args:
        config: what the server was told.
        plan: what it makes of it.
        console: where to write; by default stdout.
    """

    def __init__(self, config: ServerConfig, plan: "Plan", console: Console | None = None):
        self._config, self._plan = config, plan
        self._console = console or Console(highlight=False)
        self._progress: Progress | None = None

    def joined(
        self, addresses: Sequence[str], plan: "Plan", reason: str = "", *, relays: Sequence[str] | None = None
    ) -> None:
        """The network is up: where the server can be reached, what it will serve and why, what to type elsewhere.

        Args:
            addresses: its own; none where nobody can connect to it.
            plan: what it will serve.
            reason: why.
            relays: who carries connections to it then.
        """
        self._plan = plan
        if self._console.is_terminal:
            self._greet(addresses, relays)
        else:
            checkpoint, plan = self._plan.checkpoint, self._plan
            self._line(f"{checkpoint.name} {checkpoint.digest[:12]}, blocks {plan.blocks} of 0:{plan.num_blocks}")
            if reason:
                self._line(reason)
            heading = "listening on" if relays is None else NOBODY_CONNECTS
            self._line("\n  ".join([heading, *(addresses if relays is None else relays)]))
            if (credentials := self._config.credentials) is not None:
                self._line(f"private swarm {credentials.swarm}, as {credentials.member}")
            elif not self._config.initial_peers:
                self._line(f"new swarm; other machines join with\n  {self._join_command(addresses[0])}")
                self._line(f"and ask it with\n  {self._ask_command(addresses[0])}")
        sys.stdout.flush()

    def loaded(self, done: int, total: int) -> None:
        """So many blocks are loaded; called in any thread."""
        if not self._console.is_terminal:
            if done == total:
                self._line(f"loaded {done}/{total} blocks")
            return
        if self._progress is None:
            columns = (TextColumn("loading blocks"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._progress.add_task("blocks", total=total)
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=done)
        if done == total:
            self.close()

    def online(self, server: "Server") -> None:
        """It serves."""
        plan, serving = server.plan, server.serving
        assert serving is not None, "called when it serves"
        self._plan = plan
        weights = f"{plan.quantization if plan.quantization != 'none' else 'unquantised'} {_name(plan.dtype)}"
        num_tokens = serving.executor.total_tokens
        text = f": blocks {plan.blocks}, {weights} on {plan.device}, KV cache for {num_tokens} tokens"
        line = Text("ONLINE", style="bold green").append(text, style="not bold default")
        self._console.print(line, soft_wrap=True)
        for name, digest in serving.adapters.items():
            self._line(f"adapter {name}: {digest}")
        if server.metrics_url is not None:
            self._line(f"metrics on {server.metrics_url}")
        if self._console.is_terminal:
            self._console.print("Ctrl-C stops it; a second one at once.", style="dim")

    def draining(self, num_sessions: int) -> None:
        """It takes nobody any more, and waits until its sessions are elsewhere."""
        limit = f"{self._config.drain_timeout_s:g} s at most; a second signal ends it at once"
        self._line(f"DRAINING: {num_sessions} sessions move to other servers, {limit}")
        sys.stdout.flush()

    def stopped(self) -> None:
        """It serves no more."""
        self.close()
        self._line("stopped")

    def close(self) -> None:
        """Take the bar away, if there is one."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _greet(self, addresses: Sequence[str], relays: Sequence[str] | None) -> None:
        checkpoint, plan = self._plan.checkpoint, self._plan
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column(overflow="fold")
        table.add_row("model", Text(checkpoint.name).append(f" {checkpoint.digest[:12]}", style="dim"))
        table.add_row("blocks", f"{plan.blocks} of 0:{plan.num_blocks}")
        table.add_row("weights", f"{plan.quantization}, {_name(plan.dtype)}, on {plan.device}")
        table.add_row("swarm", "joined" if self._config.initial_peers else "new: this server is its first peer")
        if (credentials := self._config.credentials) is not None:
            table.add_row("private", f"{credentials.swarm}, as {credentials.member}")
        self._console.print(Panel.fit(table, title="swarm server", title_align="left", border_style="dim"))
        if relays is None:
            self._say("It can be reached at", *addresses)
        else:
            self._say(f"{NOBODY_CONNECTS[0].upper()}{NOBODY_CONNECTS[1:]}", *relays)
        peer = addresses[0] if relays is None else self._joined[0]
        self._say("Another machine joins with", self._join_command(peer))
        self._say("Ask it with", self._ask_command(peer))
        self._say("See how the swarm is", f"{program('health')} --initial-peers {peer}")

    @property
    def _joined(self) -> tuple[str, ...]:
        """The peers that we were told to join, by the command line or by our invitation."""
        credentials = self._config.credentials
        return self._config.initial_peers or (credentials.peers if credentials is not None else ())

    def _say(self, heading: str, *lines: str) -> None:
        """A heading, and lines that can be copied whole: the terminal may wrap them, we don't."""
        self._console.print(heading, style="dim")
        for line in lines:
            self._console.print(f"  {line}", soft_wrap=True, markup=False)
        self._console.print()

    def _join_command(self, address: str) -> str:
        return f"{program('server')} {self._config.model} --blocks {self._missing_blocks()} --initial-peers {address}"

    def _ask_command(self, address: str) -> str:
        return f'{program("client")} "Your question" --model {self._config.model} --initial-peers {address}'

    def _missing_blocks(self) -> str:
        """The larger part of the model that this server doesn't hold; all of it where it holds all."""
        blocks, end = self._plan.blocks, self._plan.num_blocks
        before, after = blocks.start, end - blocks.end
        if not before and not after:
            return f"0:{end}"
        return f"{blocks.end}:{end}" if after >= before else f"0:{blocks.start}"

    def _line(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, markup=False)


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
