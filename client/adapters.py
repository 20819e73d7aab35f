"""A model's adapters by name, in PEFT's own words: loaded, active, and which row of a batch uses which.

    load_adapter(path) ─► read (swarm.adapters.peft) ─► AdapterBook.add ─┐
    set_adapter, disable_adapters ─► active ones, combined ──────────────┴► rows(choice) ─► RowAdapters
    generate(adapter_name="a" | ["a", None, "b"]) ─► choice

Nothing is sent before a session needs it. Names are this model's own; the swarm knows adapters by content.
"""

from collections.abc import Callable, Sequence

from swarm.client.row_adapters import ClientAdapter, RowAdapters
from swarm.errors import InvalidRequest

BASE = "__base__"
"""PEFT's name for no adapter."""

Choice = str | Sequence[str | None] | None
"""What a caller names: one adapter for all rows, one per row, or (None) those that are active."""


class AdapterBook:
    """The adapters of one model.

    Args:
        combine: makes one of several that are active at once.
    """

    def __init__(self, combine: Callable[[Sequence[ClientAdapter]], ClientAdapter]):
        self._combine = combine
        self._adapters: dict[str, ClientAdapter] = {}
        self._active: tuple[str, ...] = ()
        self._combined: ClientAdapter | None = None
        self.is_enabled = True

    @property
    def names(self) -> tuple[str, ...]:
        """All that are loaded."""
        return tuple(self._adapters)

    @property
    def active(self) -> tuple[str, ...]:
        """Those that rows use unless the caller names others."""
        return self._active if self.is_enabled else ()

    def __getitem__(self, name: str) -> ClientAdapter:
        """The adapter of this name.

        Raises:
            InvalidRequest: there is none; says which there are.
        """
        found = self._adapters.get(name)
        if found is None:
            raise InvalidRequest(f"no adapter {name!r} is loaded; there are {', '.join(self._adapters) or 'none'}")
        return found

    def add(self, name: str, adapter: ClientAdapter) -> None:
        """Know an adapter by this name.

        Raises:
            InvalidRequest: another one has it.
        """
        if name in self._adapters or name == BASE or not name:
            raise InvalidRequest(f"adapter name {name!r} is taken; delete_adapter({name!r}) first, or choose another")
        self._adapters[name] = adapter

    def remove(self, names: Sequence[str]) -> None:
        """Forget these; sessions that use them go on."""
        for name in names:
            self[name]
        for name in names:
            self._adapters.pop(name, None)
        self.activate([name for name in self._active if name in self._adapters])

    def activate(self, names: Sequence[str]) -> None:
        """Let rows use all of these at once unless the caller names others.

        Raises:
            InvalidRequest: one of them is not there, or they can't be combined.
        """
        adapters = [self[name] for name in dict.fromkeys(names)]
        self._combined = adapters[0] if len(adapters) == 1 else self._combine(adapters) if adapters else None
        self._active = tuple(dict.fromkeys(names))

    def rows(self, choice: Choice, num_rows: int) -> RowAdapters | None:
        """The adapters of a batch; None where no row uses one.

        Args:
            choice: what the caller named.
            num_rows: of the batch; names may be fewer, if each row is there equally often, one behind the other.

        Raises:
            InvalidRequest: an unknown name, or as many names as don't fit the rows.
        """
        if choice is None:
            return RowAdapters.of([self._combined if self.is_enabled else None] * num_rows)
        if isinstance(choice, str):
            return RowAdapters.of([self._named(choice)] * num_rows)
        if not choice or num_rows % len(choice):
            raise InvalidRequest(f"adapter_name has {len(choice)} names for {num_rows} rows")
        copies = num_rows // len(choice)
        return RowAdapters.of([adapter for adapter in map(self._named, choice) for _ in range(copies)])

    def check(self, choice: Choice) -> None:
        """Whether all that is named is there.

        Raises:
            InvalidRequest: something is not.
        """
        for name in [choice] if isinstance(choice, str) else choice or ():
            self._named(name)

    def _named(self, name: str | None) -> ClientAdapter | None:
        return None if name is None or name == BASE else self[name]
