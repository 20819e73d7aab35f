"""The part of hivemind that swarm uses: bindings to the libp2p daemon and the DHT node, and nothing else of it.

`import hivemind` would also load its optimisers, averaging, experts and torch (3 s, 200 MB). Here its packages
`hivemind`, `hivemind.utils` and `hivemind.dht` are replaced by empty ones while the modules that we need are loaded;
then the empty ones are removed again, so a program that imports hivemind itself, before or after us, gets the real
thing and the same classes.

    hivemind.p2p (P2P, PeerID, protobuf messages) + hivemind.dht.node (DHTNode)  -->  swarm.network
"""

import importlib
import importlib.util
import logging
import sys
import types
import warnings
from pathlib import Path
from typing import Any

_STUBBED = {
    "hivemind": (),
    "hivemind.utils": (
        ("hivemind.utils.logging", ("get_logger",)),
        ("hivemind.utils.serializer", ("MSGPackSerializer", "SerializerBase")),
        (
            "hivemind.utils.timed_storage",
            (
                "DHTExpiration",
                "ValueWithExpiration",
                "get_dht_time",
                "MAX_DHT_TIME_DISCREPANCY_SECONDS",
                "TimedStorage",
            ),
        ),
    ),
    "hivemind.dht": (),
}
"""Package -> the names that our modules import from the package itself, by the module that defines them."""


def _load() -> types.ModuleType:
    """Import hivemind.dht.node, and through it hivemind.p2p, without running the `__init__` of the heavy packages."""
    if "hivemind" in sys.modules:
        return importlib.import_module("hivemind.dht.node")
    spec = importlib.util.find_spec("hivemind")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("hivemind is not installed", name="hivemind")
    root = Path(spec.origin).parent
    try:
        for name, exports in _STUBBED.items():
            package = types.ModuleType(name)
            package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
            sys.modules[name] = package
            for module_name, names in exports:
                module = importlib.import_module(module_name)
                for attribute in names:
                    setattr(package, attribute, getattr(module, attribute))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return importlib.import_module("hivemind.dht.node")
    finally:
        for name in _STUBBED:
            sys.modules.pop(name, None)


def _leave_logging_alone() -> None:
    """Undo what hivemind does to logging on import: its own handler, and WARNING renamed to WARN."""
    sys.modules["hivemind.utils.logging"].use_hivemind_log_handler("nowhere")
    logging.addLevelName(logging.WARNING, "WARNING")
    if not logging.getLogger("hivemind").level:
        logging.getLogger("hivemind").setLevel(logging.WARNING)


_node = _load()
_leave_logging_alone()

# An import statement would import the parent packages too, so the classes are taken from the loaded modules.
P2P: Any = sys.modules["hivemind.p2p.p2p_daemon"].P2P
P2PDaemonError: Any = sys.modules["hivemind.p2p.p2p_daemon_bindings.utils"].P2PDaemonError
P2PHandlerError: Any = sys.modules["hivemind.p2p.p2p_daemon_bindings.utils"].P2PHandlerError
PeerID: Any = sys.modules["hivemind.p2p.p2p_daemon_bindings.datastructures"].PeerID
Multiaddr: Any = sys.modules["hivemind.utils.multiaddr"].Multiaddr
MultiaddrError: Any = sys.modules["hivemind.utils.multiaddr.exceptions"].Error
p2pd_pb2: Any = sys.modules["hivemind.proto.p2pd_pb2"]
dht_pb2: Any = sys.modules["hivemind.proto.dht_pb2"]
DHTNode: Any = _node.DHTNode
DHTProtocol: Any = sys.modules["hivemind.dht.protocol"].DHTProtocol
DHTID: Any = sys.modules["hivemind.dht.routing"].DHTID
DHTRecord: Any = sys.modules["hivemind.dht.validation"].DHTRecord
RecordValidatorBase: Any = sys.modules["hivemind.dht.validation"].RecordValidatorBase
DHTLocalStorage: Any = sys.modules["hivemind.dht.storage"].DHTLocalStorage
DictionaryDHTValue: Any = sys.modules["hivemind.dht.storage"].DictionaryDHTValue
MSGPackSerializer: Any = sys.modules["hivemind.utils.serializer"].MSGPackSerializer
DHTValidationError: Any = sys.modules["hivemind.dht.protocol"].ValidationError
P2PD_PATH = Path(str(_node.__file__)).parent.parent / "hivemind_cli" / "p2pd"
"""The libp2p daemon (go-libp2p 0.32) that hivemind's wheel ships."""
