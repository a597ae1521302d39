"""Places to die at: only where the environment says so, and at the count that it says."""

import signal
import subprocess
import sys

import pytest

from server.failpoints import POINTS

REACH_THREE = (
    "from server.failpoints import reach\nfor n in range(3):\n    print(n, flush=True)\n    reach('model-named')"
)


def reach(value: str | None) -> tuple[int, list[str]]:
    environment = {} if value is None else {"LYDIAN_FAILPOINT": value}
    done = subprocess.run(
        [sys.executable, "-c", REACH_THREE], env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout.split()


@pytest.mark.parametrize("value", [None, "", "frozen-before", "model-named:4"])
def test_nobody_dies_at_a_point_that_was_not_named(value: str | None) -> None:
    assert reach(value) == (0, ["0", "1", "2"])


@pytest.mark.parametrize(("value", "seen"), [("model-named", ["0"]), ("model-named:2", ["0", "1"])])
def test_the_process_is_killed_at_the_named_point_and_count(value: str, seen: list[str]) -> None:
    assert reach(value) == (-signal.SIGKILL, seen)


def test_every_point_has_a_name_of_its_own() -> None:
    assert len(set(POINTS)) == len(POINTS)
