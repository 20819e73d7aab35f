"""Reads a server's metrics over HTTP.

URL ─fetch─► text ─parse─► Sample: numbers by name and label
"""

import asyncio
import urllib.error
import urllib.request
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from swarm.errors import InvalidRequest, PeerMisbehaved, PeerUnreachable

PREFIX = "swarm_server_"
TIMEOUT_S = 5.0
MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Sample:
    """A server's numbers at one moment."""

    values: dict[tuple[str, str], float]
    """By name without prefix, and the value of the one label it has, or "" (of histograms only _sum and _count)."""
    labels: dict[str, str]
    """What the server says it is."""

    def get(self, name: str, label: str = "") -> float:
        """A number; 0 where the server has none of this name."""
        return self.values.get((name, label), 0.0)

    def total(self, name: str) -> float:
        """The sum over all labels of a name."""
        return sum(value for (key, _), value in self.values.items() if key == name)


async def fetch(url: str) -> Sample:
    """Ask a server.

    Raises:
        InvalidRequest: the URL is none.
        PeerUnreachable: nobody answers there.
        PeerMisbehaved: the answer is not what a server of ours says.
    """
    return parse(await asyncio.to_thread(_get, url))


def parse(text: str) -> Sample:
    """Read metrics in Prometheus' text format.

    Raises:
        PeerMisbehaved: they are malformed, or not a server's.
    """
    values: dict[tuple[str, str], float] = {}
    labels: dict[str, str] = {}
    try:
        for family in text_string_to_metric_families(text):
            for name, given, value, *_ in family.samples:
                key = name.removeprefix(PREFIX)
                if key == "info":
                    labels = dict(given)
                elif not key.endswith("_bucket") and len(given) <= 1:
                    values[key, next(iter(given.values()), "")] = float(value)
    except (ValueError, KeyError, IndexError) as error:
        raise PeerMisbehaved(f"malformed metrics: {error}") from error
    if ("state", "") not in values:
        raise PeerMisbehaved("these are not the metrics of a swarm server")
    return Sample(values, labels)


def _get(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise InvalidRequest(f"{url!r} is no URL; servers print theirs, http://HOST:PORT/metrics")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            return str(answer.read(MAX_BYTES).decode(errors="replace"))
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise PeerUnreachable(f"{url} does not answer: {error}") from error
