"""Which adapter each row of a session uses, and what of it concerns the client: bytes to upload, virtual positions.

    client.adapters ─names─► RowAdapters ─► OpenSession: adapters, adapter_of         (client.hops)
                                         ─► uploads when a server asks                (client.uploads)
                                         ─► rows before the tokens                    (client.virtual)

Plain values; knows neither names nor networks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from swarm.adapters.format import Manifest
from swarm.errors import InvalidRequest
from swarm.protocol import MAX_ADAPTERS


class ClientAdapter(Protocol):
    """An adapter as the client has it: `swarm.adapters.peft.LoadedAdapter`."""

    @property
    def digest(self) -> str:
        """Its name in the swarm."""

    @property
    def manifest(self) -> Manifest:
        """What it consists of."""

    @property
    def shards(self) -> Mapping[int, bytes]:
        """By block; empty where only its name is known here."""

    @property
    def embeddings_PH(self) -> Tensor | None:
        """Prompt tuning: what its virtual positions look like."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowAdapters:
    """The adapters of a session's rows; made by `of`."""

    adapters: tuple[ClientAdapter, ...]
    """The different ones."""
    of_row: tuple[int, ...]
    """Which of them each row uses, -1 for none."""

    @classmethod
    def of(cls, rows: Sequence[ClientAdapter | None]) -> "RowAdapters | None":
        """From the adapter of each row; None where no row has one.

        Raises:
            InvalidRequest: more different ones than a session may have.
        """
        adapters = {adapter.digest: adapter for adapter in rows if adapter is not None}
        if not adapters:
            return None
        if len(adapters) > MAX_ADAPTERS:
            raise InvalidRequest(f"{len(adapters)} different adapters in one batch, limit {MAX_ADAPTERS}")
        index = {digest: number for number, digest in enumerate(adapters)}
        return cls(
            adapters=tuple(adapters.values()),
            of_row=tuple(-1 if adapter is None else index[adapter.digest] for adapter in rows),
        )

    def __len__(self) -> int:
        return len(self.of_row)

    def row(self, index: int) -> ClientAdapter | None:
        """The adapter of one row."""
        number = self.of_row[index]
        return None if number < 0 else self.adapters[number]

    def expanded(self, copies: int) -> "RowAdapters":
        """For a batch in which each row is there so many times, one behind the other."""
        return RowAdapters(adapters=self.adapters, of_row=tuple(it for it in self.of_row for _ in range(copies)))

    def is_same(self, other: "RowAdapters | None") -> bool:
        """Whether every row uses the same adapter there."""
        return other is not None and len(self) == len(other) and self._digests() == other._digests()

    # -- for servers --------------------------------------------------------------------------------------------

    @property
    def remote(self) -> tuple[ClientAdapter, ...]:
        """Those that change blocks, so that servers must have them."""
        return tuple(adapter for adapter in self.adapters if adapter.manifest.shards)

    @property
    def adapter_of(self) -> tuple[int, ...]:
        """For each row, which of the `remote` ones it uses; empty where there are none."""
        remote = [adapter.digest for adapter in self.remote]
        if not remote:
            return ()
        numbers = [remote.index(it.digest) if it.manifest.shards else -1 for it in self.adapters]
        return tuple(-1 if number < 0 else numbers[number] for number in self.of_row)

    # -- virtual positions --------------------------------------------------------------------------------------

    @property
    def num_virtual(self) -> tuple[int, ...]:
        """Positions before the tokens of each row."""
        counts = [adapter.manifest.num_virtual for adapter in self.adapters]
        return tuple(0 if number < 0 else counts[number] for number in self.of_row)

    @property
    def num_columns(self) -> int:
        """Columns of a padded batch that they take."""
        return max(self.num_virtual)

    def _digests(self) -> list[str | None]:
        return [None if number < 0 else self.adapters[number].digest for number in self.of_row]
