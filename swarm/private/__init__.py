"""Private swarms: who belongs to one, and how that is proved. No network here; `swarm.network.members` applies it."""

from swarm.private.certificates import Member, Role
from swarm.private.credentials import Credentials

__all__ = ["Credentials", "Member", "Role"]
