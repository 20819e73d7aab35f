"""Hosts on one machine with a wide-area network between them: a network namespace each, and a pump for the packets.

    Wan ─ namespaces.create ─► hosts 0 .. N-1 at 10.77.0.1 .. 10.77.0.N
        ─ pump (a process)  ─► delay, jitter, loss, rate per pair of hosts; changeable while it runs
        ─ popen, inside     ─► what runs on a host

Leaving the `with` kills whatever still runs on the hosts; when this process dies, the pump does it.
"""

import json
import pathlib
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, ClassVar, Literal, Self

from tests.wan import namespaces
from tests.wan.namespaces import Namespace
from tests.wan.paths import Path
from tests.wan.pump import Settings, command_line

ROOT = pathlib.Path(__file__).parents[2]
MAX_HOSTS = 125
FIRST_OUTSIDE = 128
STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PumpReport:
    """What the pump did in all, and how late packets were against their delay, in seconds."""

    packets: int
    dropped: int
    late_median_s: float
    late_p99_s: float
    late_max_s: float


class Wan:
    """Emulated hosts; a context manager.

    Args:
        hosts: how many.
        delay_s, jitter_s, loss, rate_bps: of the way between any two of them, see `Path`.
        paths: of single pairs, in either order, in place of the above.
        nats: hosts behind a router that translates addresses: "closed" lets nobody in who was not written to, "open"
            everybody; others see such a host at `outside_address`.
        mtu: largest packet in bytes.
        seed: for jitter and loss.

    Raises (on entering):
        WanUnavailable: where network namespaces or TUN devices are not permitted.
    """

    kind: ClassVar[str] = "network namespaces"

    def __init__(
        self,
        hosts: int,
        *,
        delay_s: float = 0.0,
        jitter_s: float = 0.0,
        loss: float = 0.0,
        rate_bps: float = 0.0,
        paths: Mapping[tuple[int, int], Path] | None = None,
        nats: Mapping[int, Literal["closed", "open"]] | None = None,
        mtu: int = 1500,
        seed: int = 0,
    ):
        if not 1 <= hosts <= MAX_HOSTS:
            raise ValueError(f"hosts is {hosts}, need 1 to {MAX_HOSTS}")
        self.num_hosts = hosts
        self.report: PumpReport | None = None
        """After the end: what the pump did."""
        self._default = Path(delay_s=delay_s, jitter_s=jitter_s, loss=loss, rate_bps=rate_bps)
        self._paths, self._nats, self._mtu, self._seed = dict(paths or {}), dict(nats or {}), mtu, seed
        self._namespaces: list[Namespace] = []
        self._processes: list[subprocess.Popen[Any]] = []
        self._pump: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        with ExitStack() as on_failure:
            on_failure.callback(self._close)
            for host in range(self.num_hosts):
                self._namespaces.append(namespaces.create(self.address(host), mtu=self._mtu))
            self._start_pump()
            on_failure.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def address(self, host: int) -> str:
        """The IPv4 address of a host."""
        if not 0 <= host < self.num_hosts:
            raise ValueError(f"host {host} of {self.num_hosts}")
        return f"10.77.0.{host + 1}"

    def outside_address(self, host: int) -> str:
        """The address of a host behind a router as others see it."""
        return f"10.77.0.{FIRST_OUTSIDE + host}"

    def local_address(self, host: int) -> str:
        """The address to listen on for a host."""
        return self.address(host)

    def listen_args(self, host: int) -> list[str]:
        """Options that let a peer on this host be reached from the others."""
        return ["--host", self.address(host)]

    @contextmanager
    def inside(self, host: int) -> Iterator[None]:
        """Move this thread to a host for a while; threads and processes that it starts there stay there."""
        with namespaces.enter(self._namespaces[host]):
            yield

    def popen(self, host: int, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a process on a host; `options` are those of `subprocess.Popen`. It is killed at the end."""
        with self.inside(host):
            process: subprocess.Popen[Any] = subprocess.Popen(command, **options)
        self._processes.append(process)
        return process

    def set_path(self, a: int, b: int, path: Path) -> None:
        """Change the way between two hosts, for packets that are sent from now on."""
        self._command({"pair": [a, b], "path": asdict(path)})

    def set_delay(self, delay_s: float) -> None:
        """Change the ways between all hosts to this delay and nothing else."""
        self._command({"pair": None, "path": asdict(Path(delay_s=delay_s))})

    def set_nat(self, host: int, kind: Literal["closed", "open"]) -> None:
        """Change a router: once closed it lets in those who have begun before, and no others."""
        self._command({"nat": host, "is_open": kind == "open"})

    def _start_pump(self) -> None:
        settings = Settings(
            tun_fds=[namespace.tun_fd for namespace in self._namespaces],
            inodes=[namespace.inode for namespace in self._namespaces],
            addresses=[self.address(host) for host in range(self.num_hosts)],
            default=asdict(self._default),
            paths=[(a, b, asdict(path)) for (a, b), path in self._paths.items()],
            seed=self._seed,
            nats=[(host, self.outside_address(host), kind == "open") for host, kind in self._nats.items()],
        )
        self._pump = subprocess.Popen(
            command_line(settings),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=settings.tun_fds,
        )
        self._expect("ready")

    def _command(self, command: dict[str, Any]) -> None:
        if self._pump is None or self._pump.stdin is None:
            raise RuntimeError("the network is not running")
        self._pump.stdin.write(json.dumps(command) + "\n")
        self._pump.stdin.flush()
        self._expect("done")

    def _expect(self, answer: str) -> None:
        assert self._pump is not None and self._pump.stdout is not None
        line = self._pump.stdout.readline().strip()
        if line != answer:
            raise RuntimeError(f"the pump said {line!r} in place of {answer!r}")

    def _close(self) -> None:
        try:
            self._stop_pump()
        finally:
            namespaces.kill_all_in([namespace.inode for namespace in self._namespaces])
            for process in self._processes:
                process.wait(STOP_TIMEOUT_S)
            while self._namespaces:
                self._namespaces.pop().close()

    def _stop_pump(self) -> None:
        pump, self._pump = self._pump, None
        if pump is None:
            return
        try:
            output, _ = pump.communicate(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pump.kill()
            output, _ = pump.communicate()
        with suppress(ValueError, TypeError):
            self.report = PumpReport(**json.loads(output))
