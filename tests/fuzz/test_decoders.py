"""Every reader of hostile bytes, on its corpus, mutations of it, and noise: an expected refusal or a right result."""

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.mutations import mutations_of
from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
by_target = pytest.mark.parametrize("name", TARGETS)


def corpus_of(name: str) -> list[bytes]:
    """Valid inputs, and what campaigns have found."""
    return [*TARGETS[name].seeds(), *(path.read_bytes() for path in sorted((CORPUS / name).glob("*")))]


@by_target
def test_valid_inputs_are_read(name: str):
    """The seeds of a target are no noise: they get through; a TLS handshake only as far as one flight goes."""
    target = TARGETS[name]
    for seed in target.seeds():
        with suppress(*target.expected):
            target.run(seed)
    if name not in ("handshake", "daemon_wire"):
        target.run(target.seeds()[0])


@by_target
def test_what_was_found_before_is_refused_or_read(name: str):
    """The corpus is kept, so nothing that was repaired breaks again."""
    for data in corpus_of(name):
        with suppress(*TARGETS[name].expected):
            TARGETS[name].run(data)


@by_target
def test_mutations_and_noise_do_no_harm(name: str):
    """Bytes changed, cut, doubled, spliced; and bytes that were never anything."""
    target = TARGETS[name]

    @settings(max_examples=150, suppress_health_check=list(HealthCheck), database=None)
    @given(st.one_of(mutations_of(corpus_of(name)), st.binary(max_size=300)))
    def check(data: bytes) -> None:
        with suppress(*target.expected):
            target.run(data)

    check()


def test_every_target_has_a_corpus():
    """A new reader comes with inputs that a campaign has tried."""
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)
