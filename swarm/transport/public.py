"""What a peer that can be reached does for others: it relays, and tells whether it can reach them.

transport ◄─ help_others ─ RelayDesk, DialBackDesk
"""

from swarm.protocol import DIAL_BACK_SERVICE, RELAY_SERVICE
from swarm.transport.dial_back import DialBackDesk
from swarm.transport.relay import RelayDesk, RelayLimits
from swarm.transport.transport import Transport


def help_others(transport: Transport, *, relayed_bytes_per_s: float) -> RelayDesk | None:
    """Serve both; None, and no relay, at a rate of 0."""
    transport.serve(DIAL_BACK_SERVICE, DialBackDesk().serve)
    if relayed_bytes_per_s <= 0:
        return None
    desk = RelayDesk(RelayLimits(bytes_per_s=relayed_bytes_per_s))
    transport.serve(RELAY_SERVICE, desk.serve)
    return desk
