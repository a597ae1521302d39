"""What all tests share: the async backend, hypothesis profiles, and data that Debian packages bring.

HYPOTHESIS_PROFILE chooses how hard the properties are tried: `default` (quick), `ci` (quick, and the same examples
every time: one commit, one verdict) or `long` (run it with --timeout=0, on one file at a time).
"""

import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.order import spread

# Of the hundreds of processes that tests start, each would compile all our modules: half a second for a coordinator.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def in_ci() -> bool:
    """Whether the whole check runs: then nothing that it should have installed may be missing."""
    return os.environ.get("CI") == "true"


# No deadlines: on a machine that is busy with something else, the time of one example says nothing.
TIMELESS: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=60, **TIMELESS)
settings.register_profile("ci", parent=settings.get_profile("default"), derandomize=True, print_blob=True)
settings.register_profile("long", max_examples=100_000, print_blob=True, **TIMELESS)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if in_ci() else "default"))


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Generator[None]:
    """Marks what `make chaos` runs again: files that ask for the full numbers, so that none is forgotten.

    Of what was selected then, the slow tests are spread over the processes that run them.
    """
    for item in items:
        asks = getattr(item, "module", None)
        if hasattr(asks, "size") or hasattr(asks, "FULL"):
            item.add_marker("grows")
    yield
    if at_once := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
        items[:] = spread(items, at_once, lambda item: str(item.path), lambda item: "acceptance" in item.path.parts)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Async tests run on asyncio, as the coordinator does."""
    return "asyncio"


@pytest.fixture(scope="session")
def needs_debian_package() -> Callable[[str | Path, str], Path]:
    """Asks for a file that a Debian package brings: without it the test is skipped, with the reason; in CI it fails.

    needs_debian_package("/usr/share/datasets/fashion-mnist", "dataset-fashion-mnist") gives the path.
    """

    def path_of(path: str | Path, package: str) -> Path:
        found = Path(path)
        if not found.exists() and in_ci():
            pytest.fail(f"{found} is not there: .ci/run must install {package}", pytrace=False)
        if not found.exists():
            pytest.skip(f"{found} is not there: apt install {package}")
        return found

    return path_of


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch on one thread: nets as small as those of tests only lose by a second, above all on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
