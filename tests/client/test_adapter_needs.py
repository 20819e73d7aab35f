"""What is known of where adapters are: from records, from sessions, and what follows for routes and for servers."""

from types import SimpleNamespace

from swarm.adapters.notes import AdapterNote
from swarm.client.adapter_needs import MAX_SEEN, MAX_SERVERS, AdapterNeeds, WhoHas
from swarm.client.row_adapters import RowAdapters
from swarm.protocol import MAX_HOLDERS
from swarm.types import BlockRange, Hop
from tests.adapters import MadeAdapter, make_adapter

A, B = make_adapter(1, blocks=range(8)), make_adapter(2, blocks=(0, 1))


def record(peer_id: str, blocks: str, *adapters: MadeAdapter):
    """What a server announces, as far as anybody looks at it here."""
    notes = tuple(AdapterNote.of(adapter.digest, 8, on_device=True) for adapter in adapters)
    return SimpleNamespace(peer_id=peer_id, blocks=BlockRange.parse(blocks), adapters=notes)


def hop(peer_id: str, blocks: str) -> Hop:
    return Hop(peer_id=peer_id, blocks=BlockRange.parse(blocks))


def needs(who_has: WhoHas, *adapters: MadeAdapter) -> AdapterNeeds:
    rows = RowAdapters.of(adapters)
    assert rows is not None
    return AdapterNeeds(rows, who_has)


def test_a_server_that_must_get_an_adapter_costs_a_little_more_and_is_left_out_by_nothing():
    """By the bytes that its own blocks lack; nothing where it has them, as it says or as a session has shown."""
    who_has, servers = WhoHas(), [record("has", "0:8", A, B), record("half", "0:8", A), record("far", "4:8")]
    who_has.announced(servers)
    both = needs(who_has, A, B)
    costs = {server.peer_id: both.load_s(server) for server in servers}
    assert costs["has"] == 0 < costs["half"] and 0 < costs["far"] < 1
    small, large = (needs(WhoHas(), adapter).load_s(servers[0]) for adapter in (B, A))
    assert 0 < small < large and needs(WhoHas(), B).load_s(servers[2]) == 0
    who_has.seen([hop("far", "4:8")], [A.digest])
    assert needs(who_has, A).load_s(servers[2]) == 0


def test_servers_are_told_who_has_what_their_blocks_lack():
    """Those with some of the same blocks, but for themselves; each once, and no more than a message may name."""
    who_has = WhoHas()
    who_has.announced([record("a", "0:4", A), record("b", "4:8", A), record("me", "2:6", A), record("c", "0:8")])
    who_has.seen([hop("d", "5:7"), hop("a", "0:4")], [A.digest, B.digest])
    assert set(needs(who_has, A, B).holders(hop("me", "2:6"))) == {"a", "b", "d"}
    assert set(needs(who_has, A).holders(hop("me", "0:2"))) == {"a"}
    who_has.announced([record(str(number), "0:8", A) for number in range(MAX_HOLDERS + 5)])
    assert len(needs(who_has, A).holders(hop("me", "0:8"))) == MAX_HOLDERS


def test_what_was_seen_is_bounded():
    """The latest adapters, and the latest servers of each."""
    who_has = WhoHas()
    digests = [f"{number:064x}" for number in range(MAX_SEEN + 10)]
    for digest in digests:
        who_has.seen([hop("a", "0:8")], [digest])
    assert not who_has.has("a", digests[0]) and who_has.has("a", digests[-1])
    for number in range(MAX_SERVERS + 3):
        who_has.seen([hop(str(number), "0:8")], [digests[-1]])
    assert not who_has.has("0", digests[-1]) and who_has.has(str(MAX_SERVERS + 2), digests[-1])
