"""Loading hivemind's two good layers without the rest of it."""

import subprocess
import sys


def run(program: str) -> None:
    """Run a program in a fresh interpreter; it must succeed."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_the_network_loads_without_torch():
    """Neither torch nor numpy nor hivemind's training code is loaded, and logging is left as it was."""
    run(
        "import logging, sys, swarm.network.node, swarm.network.hive as hive\n"
        "assert not {'torch', 'numpy', 'transformers', 'hivemind', 'hivemind.optim'} & set(sys.modules)\n"
        "assert logging.getLevelName(logging.WARNING) == 'WARNING'\n"
        "assert not logging.getLogger('hivemind').handlers and not logging.getLogger().handlers\n"
        "assert hive.P2PD_PATH.is_file()"
    )


def test_hivemind_itself_can_still_be_imported():
    """A program that imports hivemind after us gets all of it, with the classes that we use."""
    run(
        "import warnings; warnings.simplefilter('ignore')\n"
        "import swarm.network.hive as hive\n"
        "import hivemind\n"
        "from hivemind.p2p import P2P\n"
        "from hivemind.dht import DHT, DHTNode\n"
        "assert DHTNode is hive.DHTNode and P2P is hive.P2P and hivemind.Optimizer"
    )


def test_hivemind_may_have_been_imported_before():
    """A program that imported hivemind first shares its classes with us."""
    run(
        "import warnings; warnings.simplefilter('ignore')\n"
        "import hivemind, hivemind.dht.node, hivemind.p2p\n"
        "import swarm.network.hive as hive\n"
        "assert hivemind.dht.node.DHTNode is hive.DHTNode and hivemind.p2p.P2P is hive.P2P"
    )
