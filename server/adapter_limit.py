"""Which adapters a batch of decode rows has: those that cost more than their rows are worth sit it out.

    sessions that decode ─► by their adapters, most service per second first ─► as many as cost the batch no more than
                                                 a fifth of its service per second ─► the others sit out

Another adapter prolongs the batch for everybody in it, by what `server.step_cost` has learnt, and its rows add to what
the batch gets done. So the number of distinct adapters is limited by what they cost and not by a constant: where the
base is all that costs, nobody sits out; adapters of large rank that come with single rows into a large batch wait for
rows of their own, or for their time. A fifth is given away, since who sits out keeps others' rows waiting in the end:
simulated, a limit without it costs up to 4 % of all tokens, and this one none (docs/benchmarks, 2026-11-27).

Nobody sits out for long, nor at the cost of fairness: not who has waited GUARD_S, and not a client that would fall
more than `lead` behind any other, which is what the bound in `server.chooser` rests upon. Sessions without adapters
never sit out, and a batch of those alone asks nothing. Rows wait here for batches of others only, so that a server is
never idle for it. Pure: time enters as `now`.
"""

from collections.abc import Callable
from collections.abc import Set as AbstractSet

from swarm.server.fairness import W_DECODE, VirtualCounters
from swarm.server.sequences import CachedSession
from swarm.server.step_cost import NO_ADAPTERS, AdapterLoad, StepCost

_Group = frozenset[str]
"""The adapters of sessions that have the same ones."""

GUARD_S = 0.25
"""How long a decode row may sit out, in batches of others, before it is in the next one."""
LOSS = 0.2
"""Part of the service per second that a batch may lose by having more adapters."""


def adapters_of(session: CachedSession) -> _Group:
    """The distinct adapters of a session's rows."""
    return frozenset(adapter for adapter in session.adapters if adapter is not None)


class AdapterLimit:
    """Chooses who sits a batch out.

    Args:
        costs: what batches cost.
        num_ranks: rank rows of an adapter in the whole span.
        guard_s: see GUARD_S.
    """

    def __init__(self, costs: StepCost, num_ranks: Callable[[str], int], *, guard_s: float = GUARD_S):
        self.num_ranks = num_ranks
        self._costs, self._guard_s = costs, guard_s

    def load(self, adapters: AbstractSet[str]) -> AdapterLoad:
        """What these adapters are to a batch."""
        return NO_ADAPTERS.plus(map(self.num_ranks, adapters)) if adapters else NO_ADAPTERS

    def choose(
        self, sessions: list[CachedSession], counters: VirtualCounters, lead: float, now: float
    ) -> list[CachedSession]:
        """Those that may be in the next batch.

        Args:
            sessions: all that may run, in order of arrival.
            counters: who has been served how much.
            lead: how far a client may get ahead of one who sits out.
            now: the time.
        """
        if not self._costs.is_measured or not any(session.adapters for session in sessions):
            return sessions
        groups: dict[_Group, list[CachedSession]] = {}
        for session in sessions:
            if session.job.is_decode:
                groups.setdefault(adapters_of(session), []).append(session)
        if len(groups) < 2:
            return sessions
        most = _most_service(sessions, counters)
        bound = {
            key
            for key, members in groups.items()
            if any(self._is_due(it, now) or counters.of(it.client) + lead < most[it.client] for it in members)
        }
        let_in = self._let_in(groups, bound)
        return [session for session in sessions if not session.job.is_decode or adapters_of(session) in let_in]

    def _is_due(self, session: CachedSession, now: float) -> bool:
        return now - session.job.ready_since >= self._guard_s

    def _let_in(self, groups: dict[_Group, list[CachedSession]], bound: set[_Group]) -> set[_Group]:
        """Groups that run: those without adapters, those that must, and the best of the others."""
        rows = {key: sum(it.job.num_left for it in members) for key, members in groups.items()}
        service = {key: W_DECODE * sum(it.job.num_left * it.share for it in members) for key, members in groups.items()}
        per_row = self._costs.seconds(1, 0) - self._costs.seconds(0, 0)
        alone = {key: rows[key] * per_row + self._costs.adapter_seconds(self.load(key)) for key in groups}
        let_in = bound | {key for key in groups if not key}
        order = sorted(groups.keys() - let_in, key=lambda key: service[key] / max(alone[key], 1e-9), reverse=True)
        here: set[str] = set().union(*let_in)
        num_rows, served = sum(rows[key] for key in let_in), sum(service[key] for key in let_in)
        rates = [served / self._costs.seconds(num_rows, 0, self.load(here)) if let_in else 0.0]
        for key in order:
            here |= key
            num_rows, served = num_rows + rows[key], served + service[key]
            rates.append(served / self._costs.seconds(num_rows, 0, self.load(here)))
        enough = (1 - LOSS) * max(rates)
        return let_in.union(order[: max(count for count, rate in enumerate(rates) if rate >= enough)])


def _most_service(sessions: list[CachedSession], counters: VirtualCounters) -> dict[str, float]:
    """Of each client: the largest counter of any other, after a batch that has all their decode rows."""
    after: dict[str, float] = {}
    for session in sessions:
        counter = after.get(session.client)
        if counter is None:
            counter = counters.of(session.client)
        if session.job.is_decode:
            counter += counters.price(session.client, W_DECODE * session.job.num_left * session.share)
        after[session.client] = counter
    first, *rest = sorted(after, key=after.__getitem__, reverse=True)
    second = after[rest[0]] if rest else float("-inf")
    return {client: second if client == first else after[first] for client in after}
