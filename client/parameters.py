"""Versions of what is trained in the blocks, as servers are sent them: whole, or as what is different from one before.

client.autograd ─► Parameters ─ message: those of a server's blocks ─► TrainParameters ~~► server
"""

from collections.abc import Mapping
from dataclasses import dataclass

from swarm.adapters.difference import encode_difference
from swarm.adapters.format import Manifest
from swarm.protocol import TrainParameters
from swarm.types import BlockRange


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Parameters:
    """A version of what is trained in the blocks."""

    version: int
    manifest: Manifest
    shards: Mapping[int, bytes]
    """By block."""
    num_elements: Mapping[int, int]
    """Numbers of all tensors, by block."""

    def message(
        self, blocks: BlockRange, number: int, base: "Parameters | None" = None, base_number: int = -1
    ) -> tuple[TrainParameters, bytes]:
        """What a server of these blocks is sent.

        Args:
            blocks: of the server.
            number: under which it is to know this version.
            base: an earlier version that it has; then what is different will do, if that is smaller.
            base_number: under which it knows that.
        """
        data, shards = self.manifest.encode(), self._shards_of(blocks)
        difference = None if base is None else encode_difference(base._shards_of(blocks), shards)
        message = TrainParameters(
            base=-1 if difference is None else base_number,
            version=number,
            digest=self.manifest.digest,
            manifest_bytes=len(data),
        )
        return message, b"".join([data, shards if difference is None else difference])

    def _shards_of(self, blocks: BlockRange) -> bytes:
        return b"".join(self.shards[info.block] for info in self.manifest.within(blocks.start, blocks.end))
