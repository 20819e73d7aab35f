"""Discovery and raw streams between peers: libp2p's daemon and hivemind's DHT behind one supervised `Node`."""

from swarm.network.config import NodeConfig
from swarm.network.node import Node

__all__ = ["Node", "NodeConfig"]
