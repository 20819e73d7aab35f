"""Factors and offsets that adapters have for the columns of a product: a row of a table for each adapter.

    put(handle, factor, offset) --> a slot          rows_of(batch) --> RowVectors: row t becomes factor * row t + offset

What a step keeps are numbers of slots, so that many compositions of rows may be kept. It does not know what the columns
are. Legend: T rows of a step, n those that are changed, W columns, S slots.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from swarm.kernels.lora import LoraBatch

_FIRST_SLOTS = 4


class VectorPool:
    """See the module docstring.

    Args:
        width: columns.
        device: of the tables, which are in fp32.
    """

    def __init__(self, width: int, device: torch.device):
        self._width = width
        self._device = device
        self._slots: dict[int, int] = {}
        self._free: list[int] = []
        self._factors_SW: Tensor | None = None
        """None while no adapter has one; 1 in slots of those that have none."""
        self._offsets_SW: Tensor | None = None

    def __bool__(self) -> bool:
        return bool(self._slots)

    def put(self, handle: int, factor_W: Tensor | None, offset_W: Tensor | None) -> None:
        """Give an adapter a slot."""
        if not self._free:
            self._grow()
        slot = self._slots[handle] = self._free.pop()
        if factor_W is not None and self._factors_SW is None:
            self._factors_SW = torch.ones(self._num_slots, self._width, device=self._device)
        if offset_W is not None and self._offsets_SW is None:
            self._offsets_SW = torch.zeros(self._num_slots, self._width, device=self._device)
        if self._factors_SW is not None:
            self._factors_SW[slot] = 1.0 if factor_W is None else factor_W
        if self._offsets_SW is not None:
            self._offsets_SW[slot] = 0.0 if offset_W is None else offset_W

    def remove(self, handle: int) -> None:
        """Take its slot back, if it has one."""
        if (slot := self._slots.pop(handle, None)) is not None:
            self._free.append(slot)
        if not self._slots:
            self._free, self._factors_SW, self._offsets_SW = [], None, None

    def rows_of(self, batch: LoraBatch) -> "RowVectors | None":
        """What adapters of a step do to its rows; None if none of them has a slot."""
        mine = sorted((row, self._slots[it]) for it in batch.adapters if it in self._slots for row in batch.rows_of[it])
        if not mine:
            return None
        every = len(mine) == batch.num_rows
        slots = {slot for _, slot in mine}
        return RowVectors(
            pool=self,
            rows=None if every else torch.tensor([row for row, _ in mine]).to(self._device),
            slots=None if len(slots) == 1 else torch.tensor([slot for _, slot in mine]).to(self._device),
            first_slot=mine[0][1],
        )

    def change(self, part_nW: Tensor, slots: Tensor | None, first_slot: int) -> Tensor:
        """factor * row + offset, each row by its slot."""
        factor, offset = (
            None if table is None else table[first_slot] if slots is None else table.index_select(0, slots)
            for table in (self._factors_SW, self._offsets_SW)
        )
        if factor is None:
            return part_nW if offset is None else part_nW + offset
        return part_nW * factor if offset is None else torch.addcmul(offset, part_nW, factor)

    @property
    def _num_slots(self) -> int:
        return len(self._slots) + len(self._free)

    def _grow(self) -> None:
        old = self._num_slots
        self._free = list(range(max(_FIRST_SLOTS, 2 * old) - 1, old - 1, -1))
        for name in ("_factors_SW", "_offsets_SW"):
            if (table := getattr(self, name)) is not None:
                setattr(self, name, torch.cat([table, table.new_empty(len(self._free), self._width)]))


@dataclass(frozen=True, slots=True, kw_only=True)
class RowVectors:
    """What becomes of the rows of a step."""

    pool: VectorPool
    rows: Tensor | None
    """Those that are changed; None for all."""
    slots: Tensor | None
    """Of each of these rows; None if all have `first_slot`."""
    first_slot: int

    def part(self, source_TW: Tensor) -> Tensor:
        """The changed rows alone, in a new tensor."""
        part_nW = source_TW if self.rows is None else source_TW.index_select(0, self.rows)
        return self.pool.change(part_nW, self.slots, self.first_slot).to(source_TW.dtype)

    def apply(self, source_TW: Tensor) -> Tensor:
        """All rows, in a new tensor."""
        return self.part(source_TW) if self.rows is None else source_TW.index_copy(0, self.rows, self.part(source_TW))

    def apply_(self, source_TW: Tensor) -> Tensor:
        """All rows, in place unless gradients are recorded."""
        if self.rows is None or torch.is_grad_enabled():
            return self.apply(source_TW)
        return source_TW.index_copy_(0, self.rows, self.part(source_TW))
