"""Memory for histories: who loses theirs, and that the count is right."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.link import Link
from swarm.server.history import HistoryBudget

TOKEN_BYTES = 16


def sent_link(num_tokens: int, *, num_unsent: int = 0) -> Link:
    """A link that has sent some tokens of 16 bytes and owes others."""
    link = Link(1, to_client=False)
    link.begin(0, order=None, base=(0,), outputs_from=(0,))
    link.connect(held=(0,), as_of=-1)
    if num_tokens:
        link.append(0, 0, torch.zeros(num_tokens, 4))
        link.next_chunk()
    if num_unsent:
        link.append(0, num_tokens, torch.zeros(num_unsent, 4))
    return link


def test_the_biggest_client_loses_its_least_recently_used_history():
    """Not the session that filled the memory, and not a smaller client's older one."""
    budget = HistoryBudget(100 * TOKEN_BYTES)
    small, old, new = sent_link(20), sent_link(40), sent_link(35)
    budget.use("small", "a", small)
    budget.use("old", "b", old)
    budget.use("new", "b", new)
    assert budget.num_dropped == 0
    more = sent_link(30)
    budget.use("more", "b", more)
    assert [link.history_bytes // TOKEN_BYTES for link in (small, old, new, more)] == [20, 0, 35, 30]
    assert budget.num_dropped == 1 and budget.used_bytes == 85 * TOKEN_BYTES
    assert repr(budget) == "<HistoryBudget 1360/1600 bytes | 1 dropped>"


def test_what_is_still_to_be_sent_is_never_dropped():
    """Unsent outputs stay, even over the limit; the budget says that it is full."""
    budget = HistoryBudget(10 * TOKEN_BYTES)
    link = sent_link(5, num_unsent=12)
    budget.use("a", "a", link)
    assert budget.is_full and link.num_unsent == 12 and link.history_bytes == 12 * TOKEN_BYTES
    budget.forget("a", "a")
    assert not budget.is_full and budget.used_bytes == 0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2), st.integers(0, 30), st.booleans()), max_size=30))
def test_the_count_is_the_sum_of_what_the_links_hold(uses):
    """Whatever is used and forgotten in any order; and sent history alone never exceeds the limit."""
    budget, links = HistoryBudget(50 * TOKEN_BYTES), {}
    for key, client, size, is_over in uses:
        name = (client, key)
        if is_over:
            budget.forget(name, str(client))
            links.pop(name, None)
        else:
            links[name] = sent_link(size)
            budget.use(name, str(client), links[name])
        assert budget.used_bytes == sum(link.history_bytes for link in links.values()) <= budget.limit_bytes
