"""A fleet that stands for the whole session, for tests that need one and not one of their own.

A worker takes seconds to load torch, and most tests ask for the same two. Whatever one of them breaks is whole again
for the next: processes that were killed are started, jobs that are open are cancelled. Tests with other settings,
other machines or a damaged disk start a LocalFleet themselves.
"""

from collections.abc import Iterator

import pytest

from tests.acceptance.kit import LocalFleet

CREW = ("w1", "w2")


@pytest.fixture(scope="session")
def _standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    with LocalFleet(tmp_path_factory.mktemp("crew")) as fleet:
        yield fleet


@pytest.fixture
def crew(_standing: LocalFleet) -> Iterator[LocalFleet]:
    """A coordinator and two workers, w1 and w2, that wait for work; they take task files, and keep checkpoints."""
    with _standing.mended(CREW, "--trust", "any", "--checkpoint-every", "0.1") as fleet:
        yield fleet


@pytest.fixture(scope="module")
def _lone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    with LocalFleet(tmp_path_factory.mktemp("alone")) as fleet:
        yield fleet


@pytest.fixture
def alone(_lone: LocalFleet) -> Iterator[LocalFleet]:
    """A fleet of one worker, w1, that takes task files: the same for all tests of a file."""
    with _lone.mended(("w1",), "--trust", "any") as fleet:
        yield fleet
