"""No bytes make a parser of ours fail in a way that it does not declare, or take much memory: tests/fuzz/targets.py.

Known inputs as they are, what was found earlier, and what hypothesis makes of them: cut, joined, changed and drawn
anew. `make fuzz` goes on where this ends, led by what an input reaches in the code.
"""

import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import CORPUS, TARGETS

EXAMPLES = 250  # of each target, half a minute in all where nothing else runs; HYPOTHESIS_PROFILE=long tries far more
MEMORY = 48 << 20  # bytes that a target may take for an input of some kilobytes, beside what it keeps


@pytest.fixture
def measured() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_known_of_a_parser_holds_and_takes_little_memory(name: str, measured: None) -> None:
    target = TARGETS[name]
    known = target.known()
    assert known
    target.try_one(known[0])  # what it builds once
    for data in known:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        target.try_one(data)
        _, most = tracemalloc.get_traced_memory()
        assert most - before <= MEMORY + 64 * len(data), f"{most - before} bytes for {len(data)}: {data[:80]!r}"


def changed(known: list[bytes]) -> st.SearchStrategy[bytes]:
    """Bytes of any kind, or known ones with a few changes."""
    place = st.integers(0, max(map(len, known)))
    piece = st.one_of(
        st.binary(max_size=8),
        st.sampled_from(
            [b"\xff" * 8, b"\0" * 8, b"NaN", b"-1", b"1e999", b"9" * 30, b"[" * 2_000, b'"', b"{}", b"\\ud800"]
        ),
        st.sampled_from(known),
    )
    change = st.tuples(place, st.integers(0, 12), piece)

    @st.composite
    def drawn(draw: st.DrawFn) -> bytes:
        data = draw(st.sampled_from(known))
        for at, gone, put in draw(st.lists(change, max_size=4)):
            data = data[:at] + put + data[at + gone :]
        return data

    return st.one_of(drawn(), st.binary(max_size=200))


@pytest.mark.parametrize("name", TARGETS)
def test_no_bytes_make_a_parser_fail_otherwise_than_it_declares(name: str) -> None:
    target = TARGETS[name]
    tried = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example])
    if settings().max_examples < 1_000:
        tried = settings(tried, max_examples=EXAMPLES)

    @tried
    @given(changed(target.known()))
    def never_fails(data: bytes) -> None:
        target.try_one(data)

    never_fails()


def test_every_folder_of_the_corpus_is_a_targets() -> None:
    assert {path.name for path in CORPUS.iterdir() if path.is_dir()} <= TARGETS.keys()
