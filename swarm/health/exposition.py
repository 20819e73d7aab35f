"""The page's numbers for Prometheus, at /metrics: what it knows of the swarm, and how it is itself.

    Monitor.state ─► HealthCollector ─► families of metrics ─► text

Names and alerts are in docs/health.md. Series carry model and digest, never a server's name: in a swarm of strangers
there is no bound on how many names come by.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from swarm.health.monitor import Monitor
from swarm.health.state import Model, Reach, Server, State, Status

MAX_KINDS = 16
"""Versions, or forms of weights, that are told apart: the most common ones."""
QUANTILES = (0.25, 0.5, 0.75, 0.95)
MODEL = ["model", "digest"]


def exposition(monitor: Monitor) -> bytes:
    """All metrics in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(HealthCollector(monitor))
    return generate_latest(registry)


class HealthCollector(Collector):
    """Reads a monitor.

    Args:
        monitor: of the swarm.
    """

    def __init__(self, monitor: Monitor):
        self._monitor = monitor

    def collect(self) -> Iterator[Metric]:
        """The metrics of now; to be called on the monitor's loop."""
        state = self._monitor.state
        yield from _page(self._monitor, state)
        yield from _models(state)
        yield from _servers(state)
        yield from _canaries(self._monitor, state)


def _page(monitor: Monitor, state: State) -> Iterator[Metric]:
    prefix = "swarm_health_"
    yield GaugeMetricFamily(prefix + "last_refresh_timestamp_seconds", "When the swarm was looked at.", value=state.at)
    yield GaugeMetricFamily(prefix + "refresh_seconds", "How long that took.", value=state.refresh_ms / 1e3)
    yield GaugeMetricFamily(prefix + "stale_seconds", "Age of the records if the DHT is silent.", value=state.stale_s)
    yield GaugeMetricFamily(prefix + "dht_peers", "Peers in this page's routing table.", value=state.dht_peers)
    yield GaugeMetricFamily(prefix + "watchers", "Browsers that look now.", value=monitor.num_watchers)
    yield GaugeMetricFamily(prefix + "models", "Models that servers announce.", value=len(state.models))
    yield CounterMetricFamily(prefix + "refreshes", "Looks at the swarm.", value=monitor.num_refreshes)
    yield CounterMetricFamily(prefix + "refresh_failures", "Those that failed.", value=monitor.num_failures)


def _models(state: State) -> Iterator[Metric]:
    def of_each(name: str, text: str, value: Callable[[Model], float]) -> Metric:
        family = GaugeMetricFamily(f"swarm_model_{name}", text, labels=MODEL)
        for model in state.models:
            family.add_metric(_labels(model), value(model))
        return family

    yield of_each("usable", "1 if a client gets an answer now.", lambda it: it.is_usable)
    yield of_each("blocks", "Blocks of the model.", lambda it: it.num_blocks)
    yield of_each("blocks_covered", "Blocks that somebody serves.", lambda it: it.num_covered)
    yield of_each("replicas_min", "Servers of the block that has fewest.", lambda it: min(it.replicas))
    yield of_each("replicas_mean", "Servers per block.", lambda it: fmean(it.replicas))
    yield of_each("tokens_per_second", "Tokens through the model lately.", lambda it: it.tokens_per_s)
    yield of_each("sessions", "Open sessions.", lambda it: it.num_sessions)
    yield of_each("sessions_waiting", "Sessions that wait for room.", lambda it: it.num_waiting)
    yield of_each("kv_room_tokens", "Free KV tokens of the block that has least.", lambda it: it.room_tokens)


def _servers(state: State) -> Iterator[Metric]:
    yield _counted("status", "Servers by how they stand.", state, lambda it: it.status, tuple(Status))
    yield _counted("reach", "Servers by how they are reached from here.", state, lambda it: it.reach, tuple(Reach))
    yield _counted("quantization", "Servers by the form of their weights.", state, lambda it: it.quantization)
    yield _counted("version", "Servers by version.", state, lambda it: it.version)
    yield _quantiles("load", "Share of capacity in use, over servers online.", state, lambda it: it.load)
    yield _quantiles("rtt_seconds", "Round trip from here, over servers online.", state, lambda it: _s(it.rtt_ms))
    yield _quantiles("queue_seconds", "Wait for a batch, over servers online.", state, lambda it: _s(it.queue_ms))
    yield _quantiles("step_seconds", "Time of a batch, over servers online.", state, lambda it: _s(it.step_ms))
    yield _quantiles("uptime_seconds", "Uptime, over servers online.", state, lambda it: it.uptime_s)
    yield _quantiles("decode_tokens_per_second", "Announced speed of one block.", state, lambda it: it.decode_tps)


def _canaries(monitor: Monitor, state: State) -> Iterator[Metric]:
    ok = GaugeMetricFamily("swarm_canary_success", "1 if the last canary came back.", labels=MODEL)
    at = GaugeMetricFamily("swarm_canary_timestamp_seconds", "When the last canary was sent.", labels=MODEL)
    first = GaugeMetricFamily("swarm_canary_first_token_seconds", "Time to its first token.", labels=MODEL)
    following = GaugeMetricFamily("swarm_canary_next_token_seconds", "Time of the token after that.", labels=MODEL)
    hops = GaugeMetricFamily("swarm_canary_hops", "Servers that it went through.", labels=MODEL)
    sent = CounterMetricFamily("swarm_canaries", "Canaries sent.", labels=MODEL)
    lost = CounterMetricFamily("swarm_canaries_lost", "Those that did not come back.", labels=MODEL)
    for model in state.models:
        labels, canary = _labels(model), model.canary
        sent.add_metric(labels, monitor.canaries.num_sent[model.digest])
        lost.add_metric(labels, monitor.canaries.num_lost[model.digest])
        if canary is None:
            continue
        ok.add_metric(labels, canary.ok)
        at.add_metric(labels, canary.at)
        if canary.first_ms is not None and canary.next_ms is not None:
            first.add_metric(labels, canary.first_ms / 1e3)
            following.add_metric(labels, canary.next_ms / 1e3)
            hops.add_metric(labels, len(canary.route))
    yield from (ok, at, first, following, hops, sent, lost)


def _counted(name: str, text: str, state: State, kind: Callable[[Server], str], kinds: Sequence[str] = ()) -> Metric:
    """Servers of each model by kind, with zeros where all kinds are known; those that are gone only by status."""
    family = GaugeMetricFamily(f"swarm_servers_by_{name}", text, labels=[*MODEL, name])
    for model in state.models:
        counts = Counter(dict.fromkeys(kinds, 0))
        counts.update(kind(it) for it in model.servers if name == "status" or it.status is not Status.GONE)
        for value, count in counts.most_common(MAX_KINDS):
            family.add_metric([*_labels(model), value], count)
    return family


def _quantiles(name: str, text: str, state: State, value: Callable[[Server], float | None]) -> Metric:
    family = GaugeMetricFamily(f"swarm_servers_{name}", text, labels=[*MODEL, "quantile"])
    for model in state.models:
        known = sorted(number for server in model.serving if (number := value(server)) is not None)
        for quantile in QUANTILES if known else ():
            number = known[min(len(known) - 1, int(quantile * len(known)))]
            family.add_metric([*_labels(model), f"{quantile:g}"], number)
    return family


def _labels(model: Model) -> list[str]:
    return [model.name, model.digest[:12]]


def _s(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3
