"""What `swarm.top` shows: rich renderables from models or samples. Pure.

draw_swarm(models) ─► per model: verdict, a line of blocks, a table of servers
draw_server(before, now) ─► one table: what it is, and what it did in between
"""

from collections.abc import Iterable, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from swarm.health import words
from swarm.health.state import Model, Server, Status, Verdict
from swarm.top.scrape import Sample
from swarm.types import ServerState

MAX_ROWS = 40
"""Servers of a model that are listed."""
BAR = 10
SPAN = 24
WIDE = 108
"""Columns from which on servers are drawn, too."""

_COLOURS = {
    Status.ONLINE: "green",
    Status.JOINING: "blue",
    Status.DRAINING: "yellow",
    Status.UNREACHABLE: "red",
    Status.GONE: "dim",
    Verdict.USABLE: "green",
    Verdict.AT_RISK: "yellow",
    Verdict.FAILING: "red",
    Verdict.INCOMPLETE: "red",
}


def draw_swarm(models: Sequence[Model], *, num_peers: int) -> RenderableType:
    """All models with their servers."""
    if not models:
        return Text(f"nobody announces a model yet; {num_peers} peers in the DHT", style="dim")
    parts: list[RenderableType] = []
    for model in models:
        parts += [_headline(model), draw_blocks(model.replicas), _Servers(model), Text()]
    return Group(*parts[:-1])


def draw_server(before: Sample, now: Sample, *, seconds: float) -> RenderableType:
    """One server: what it is, and what it did between two looks.

    Args:
        before: its numbers then.
        now: its numbers now.
        seconds: time between the two.
    """

    def rate(name: str, label: str = "") -> float:
        return max(0.0, now.get(name, label) - before.get(name, label)) / seconds

    def mean(name: str) -> float | None:
        count = now.get(f"{name}_count") - before.get(f"{name}_count")
        return (now.get(f"{name}_sum") - before.get(f"{name}_sum")) / count if count > 0 else None

    used = now.get("kv_tokens_total") - now.get("kv_tokens_free")
    share = used / max(1.0, now.get("kv_tokens_total"))
    traffic = [_bytes(rate("network_bytes_total", direction)) for direction in ("received", "sent")]
    labels = {name: now.labels.get(name, "–") for name in ("model", "peer_id", "blocks", "quantization", "dtype")}
    rows: list[tuple[str, Text | str]] = [
        ("state", ServerState(int(now.get("state"))).name.lower()),
        ("blocks", f"{labels['blocks']}, {labels['quantization']}, {labels['dtype']}"),
        ("uptime", words.span(now.get("uptime_seconds"))),
        ("load", _bar(now.get("load")).append(f" {words.percent(now.get('load'))}")),
        ("sessions", _sessions(now)),
        ("tokens/s", f"{rate('tokens_total'):.1f}, prompts {rate('tokens_run_total', 'prompt'):.1f}"),
        ("batches/s", f"{rate('batch_seconds_count'):.1f}"),
        ("batch", f"{_number(mean('batch_rows'))} rows, {_number(mean('batch_tokens'))} tokens"),
        ("step", words.ms(_times(mean("batch_seconds"), 1e3))),
        ("queue", words.ms(_times(mean("queue_seconds"), 1e3))),
        ("KV cache", _bar(share).append(f" {words.count(used)} of {words.count(now.get('kv_tokens_total'))} tokens")),
        ("history", f"{now.get('history_bytes') / 2**20:.1f} of {now.get('history_limit_bytes') / 2**20:.0f} MiB"),
        ("network", f"in {traffic[0]}, out {traffic[1]}"),
        ("replays", f"{now.get('replays_total'):.0f}"),
        ("failures", f"{now.get('batches_failed_total'):.0f} batches, {now.total('links_down_total'):.0f} links"),
    ]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    for name, value in rows:
        table.add_row(name, value)
    return Group(Text(labels["model"], style="bold").append(f"  …{labels['peer_id'][-8:]}", "dim"), table)


def draw_blocks(replicas: Sequence[int], width: int = 96) -> Text:
    """A line of blocks: how many servers each has, at most `width` signs; of several blocks in one sign, the worst."""
    text = Text()
    per_sign = -(-len(replicas) // width)
    for start in range(0, len(replicas), per_sign):
        fewest = min(replicas[start : start + per_sign])
        text.append(*(("·", "bold red"), ("▁", "yellow"), ("▄", "green"), ("█", "green"))[min(fewest, 3)])
    return text


def _headline(model: Model) -> Text:
    text = Text(model.name, style="bold").append("  ").append(model.verdict, _COLOURS[model.verdict])
    text.append(f"  {model.reason}", "dim")
    return text.append(
        f"\n{words.count(model.tokens_per_s)} tokens/s, {model.num_sessions} sessions,"
        f" room for {words.count(model.room_tokens)} tokens, {len(model.serving)} servers online"
    )


class _Servers:
    """The table of a model's servers, with pictures where the terminal is wide enough for them."""

    def __init__(self, model: Model):
        self._model = model

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        model, is_wide = self._model, options.max_width >= WIDE
        table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", pad_edge=False)
        table.add_column("server", no_wrap=True, min_width=8)
        for name in ("blocks", *([""] if is_wide else []), "status"):
            table.add_column(name, no_wrap=True)
        for name in ("load", "tok/s", "queue", "free KV", "RTT", "up"):
            table.add_column(name, justify="right", no_wrap=True)
        for server in model.servers[:MAX_ROWS]:
            table.add_row(*_row(server, model.num_blocks, is_wide=is_wide))
        if len(model.servers) > MAX_ROWS:
            table.add_row(Text(f"{len(model.servers) - MAX_ROWS} more", style="dim"))
        yield table


def _row(server: Server, num_blocks: int, *, is_wide: bool) -> Iterable[Text]:
    colour = _COLOURS[server.status]
    yield Text(server.label)
    yield Text(str(server.blocks))
    if is_wide:
        yield _span(server, num_blocks, colour)
    yield Text(server.status, style=colour)
    yield _bar(server.load) if is_wide else Text(words.percent(server.load))
    yield Text(words.count(server.tokens_per_s))
    yield Text(words.ms(server.queue_ms))
    yield Text(words.count(server.kv_free_tokens))
    yield Text(words.ms(server.rtt_ms))
    yield Text(words.span(server.uptime_s))


def _span(server: Server, num_blocks: int, colour: str) -> Text:
    """Where the server's blocks lie in the model."""
    start = server.start * SPAN // num_blocks
    end = max(start + 1, -(-server.end * SPAN // num_blocks))
    return Text("─" * start, "dim").append("━" * (end - start), colour).append("─" * (SPAN - end), "dim")


def _bar(share: float) -> Text:
    full = round(min(max(share, 0.0), 1.0) * BAR)
    return Text("█" * full, "green" if share < 0.8 else "yellow").append("░" * (BAR - full), "dim")


def _sessions(now: Sample) -> str:
    waiting = f", {now.get('sessions_waiting'):.0f} wait for room" if now.get("sessions_waiting") else ""
    return f"{now.get('sessions'):.0f} with {now.get('rows'):.0f} rows{waiting}"


def _bytes(per_s: float) -> str:
    return f"{per_s / 2**20:.2f} MiB/s" if per_s >= 2**18 else f"{per_s / 2**10:.1f} KiB/s"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
