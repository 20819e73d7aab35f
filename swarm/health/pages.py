"""Turns a state into what a browser shows: the page, and the badge.

    State, Trends ─► views (pictures, a page of servers, charts) ─► templates/ ─► HTML

Everything from the swarm is a stranger's text: the templates escape all of it, and the page may neither run scripts
nor take styles from anywhere but static/ (see `app`). Pure but for reading the templates once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from swarm.health import words
from swarm.health.history import WINDOWS, Point
from swarm.health.monitor import Trends
from swarm.health.pictures import Chart, Coverage, LatencyMap, chart, coverage, latency_map
from swarm.health.state import Model, Server, State, Status, Verdict

FOLDER = Path(__file__).parent
MAX_SHOWN = 3
"""Models that are shown whole on the first page, as long as all their servers fit into one table's page; the others
have a line, and a page of their own."""
PAGE_ROWS = 64
"""Servers in one page of the table."""

_ORDER = (Status.UNREACHABLE, Status.ONLINE, Status.DRAINING, Status.JOINING, Status.GONE)
_COLOURS = {
    Verdict.USABLE: "#23713f",
    Verdict.AT_RISK: "#8a5a00",
    Verdict.FAILING: "#ab2e26",
    Verdict.INCOMPLETE: "#ab2e26",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One model, ready to be drawn."""

    model: Model
    coverage: Coverage
    map: LatencyMap
    charts: dict[str, dict[str, Chart]]
    """By name of the window and of the quantity."""
    page: Sequence[Server]
    """The servers on this page of the table: those with trouble first, then by blocks."""
    number: int
    num_pages: int

    @property
    def near_pages(self) -> list[int]:
        """Pages to offer: the first, the last, and those around this one."""
        near = range(self.number - 2, self.number + 3)
        return sorted({1, self.num_pages, *(page for page in near if 1 <= page <= self.num_pages)})


def render_page(state: State, trends: Trends, *, revision: int, digest: str = "", number: int = 1) -> str:
    """The page as HTML.

    Args:
        state: of the swarm.
        trends: its past.
        revision: of the state, for scripts to know what they have.
        digest: show only the model whose digest begins so.
        number: of the page of its servers.
    """
    chosen = state.model(digest) if digest else None
    shown = [chosen] if chosen is not None else _shown_first(state.models)
    views = [_view(model, trends, number if chosen is not None else 1) for model in shown]
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=_title(state, chosen),
            state=state,
            trends=trends,
            revision=revision,
            assets=assets_version(),
            shown=shown,
            others=[model for model in state.models if model not in shown],
            views=views,
            windows=WINDOWS,
        )
    )


def render_badge(model: Model | None) -> str:
    """A small SVG that says how a model is, to be shown elsewhere."""
    label, value = (model.name[:40], str(model.verdict)) if model is not None else ("swarm", "no model")
    colour = _COLOURS[model.verdict] if model is not None else "#66655f"
    left, right = (round(6.6 * len(text)) + 12 for text in (label, value))
    return (
        _environment().get_template("badge.svg").render(label=label, value=value, colour=colour, left=left, right=right)
    )


@cache
def assets_version() -> str:
    """Changes with the content of static/, so that browsers may keep it for long."""
    digest = blake2b(digest_size=4)
    for path in sorted((FOLDER / "static").iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _shown_first(models: Sequence[Model]) -> list[Model]:
    """The models of the first page: the largest, and others while there is room."""
    sizes = accumulate(len(model.servers) for model in models[:MAX_SHOWN])
    num_fitting = sum(size <= PAGE_ROWS for size in sizes)
    return list(models[: max(1, num_fitting)])


def _view(model: Model, trends: Trends, number: int) -> View:
    ordered = sorted(model.servers, key=lambda it: (_ORDER.index(it.status), it.start, it.end, it.peer_id))
    num_pages = max(1, -(-len(ordered) // PAGE_ROWS))
    number = min(max(number, 1), num_pages)
    return View(
        model=model,
        coverage=coverage(model),
        map=latency_map(model),
        charts={window.name: _charts(trends.points.get((model.digest, window.name), ())) for window in WINDOWS},
        page=ordered[(number - 1) * PAGE_ROWS : number * PAGE_ROWS],
        number=number,
        num_pages=num_pages,
    )


def _charts(points: Sequence[Point | None]) -> dict[str, Chart]:
    return {
        "tokens": chart(points, lambda point: point.tokens_per_s),
        "coverage": chart(points, lambda point: point.coverage, top=1.0),
        "requests": chart(points, lambda point: point.opened),
        "failures": chart(points, lambda point: point.failed),
        "first": chart(points, lambda point: point.first_ms),
    }


def _title(state: State, chosen: Model | None) -> str:
    models = [chosen] if chosen is not None else state.models
    broken = [model for model in models if not model.is_usable]
    if not models:
        return "Swarm"
    if broken:
        return f"{broken[0].name}: {broken[0].verdict} – Swarm"
    return f"{models[0].name}: {models[0].verdict} – Swarm"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": words.count,
        "ms": words.ms,
        "span": words.span,
        "percent": words.percent,
        "iso": lambda at: datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds"),
        "clock": lambda at: f"{datetime.fromtimestamp(at, UTC):%H:%M:%S} UTC",
        "capitalize_first": lambda text: text[:1].upper() + text[1:],
    }
    return environment
