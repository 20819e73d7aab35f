"""A small emulator of wide-area networks for tests and benchmarks: hosts on one machine, with delay between them.

with Wan(hosts=4, delay_s=0.025) as wan:            network namespaces and a pump; needs CAP_NET_ADMIN
    wan.popen(1, ["some", "server", "--host", wan.address(1)])
    with wan.inside(0):                             this thread, and what it starts, is on host 0
        ...

open_network(hosts, delay_s=...)                    the same, or delaying TCP proxies where that isn't permitted
"""

from tests.wan.namespaces import WanUnavailable
from tests.wan.paths import Path
from tests.wan.proxy import DelayProxies, open_network
from tests.wan.wan import PumpReport, Wan

__all__ = ["DelayProxies", "Path", "PumpReport", "Wan", "WanUnavailable", "open_network"]
