"""Transformer blocks of any supported model on one device: load, self-check, and run ragged batches over paged KV."""

from swarm.server.blocks.span import BlockSpan
from swarm.server.blocks.step import Chunk

__all__ = ["BlockSpan", "Chunk"]
