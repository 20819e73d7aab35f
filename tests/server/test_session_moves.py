"""How often a client is asked to have its session moved: until it has found somebody, and no more than it bears."""

from types import SimpleNamespace

from swarm.client.moves import ASKED_PER_S, MAX_ASKED
from swarm.protocol import HandOver
from swarm.rates import Rate, Rates
from swarm.server import session_moves as session_moves_module
from swarm.server.handler import LOOK_S
from swarm.server.limits import HandlerLimits
from swarm.server.relief import RETRY_S
from swarm.server.session_moves import FIRST_URGE_S, SessionMoves


class Client:
    """Counts how often it is asked, as a real one does, and knows nobody."""

    def __init__(self, monkeypatch):
        self.now, self.asked = 1000.0, []
        monkeypatch.setattr(session_moves_module, "time", SimpleNamespace(monotonic=lambda: self.now))
        self._allowed = Rates(Rate(burst=MAX_ASKED, per_s=ASKED_PER_S))
        self.moves = SessionMoves(
            session=None, desk=None, client="c", control=self, limits=HandlerLimits(), on_end=lambda: None
        )

    def tell(self, message):
        assert self._allowed.charge("server", self.now), f"asked too often: {self.asked}"
        self.asked.append(self.now)

    def say_nobody(self):
        self.moves.hand_over(HandOver(nonce=0, peer_id="", push_key=bytes(16)), group=None)


def test_a_client_that_finds_nobody_is_asked_less_and_less_often_for_an_hour(monkeypatch):
    """A server that was short of room before it drained, for as long as an operator can wish, is no nuisance."""
    client = Client(monkeypatch)
    for _ in range(20):
        client.moves.ask(60.0)
        client.say_nobody()
        client.now += RETRY_S
    client.asked.clear()
    started, until = client.now, client.now + 3600.0
    while client.now < until:
        client.moves.urge(until - client.now)
        client.say_nobody()
        client.now += LOOK_S
    pauses = [later - before for before, later in zip(client.asked, client.asked[1:], strict=False)]
    assert client.asked[0] == started and pauses[0] == FIRST_URGE_S
    assert pauses == sorted(pauses) and pauses[-1] == RETRY_S


def test_a_client_that_has_not_answered_is_not_asked_again(monkeypatch):
    """It may be on its way."""
    client = Client(monkeypatch)
    for _ in range(100):
        client.moves.urge(60.0)
        client.now += 1.0
    assert len(client.asked) == 1
    client.say_nobody()
    client.moves.urge(60.0)
    assert len(client.asked) == 2
