"""Places where a test, or `lydian chaos --kinds kill-at-point`, lets the coordinator die: as by `kill -9`, at once.

    LYDIAN_FAILPOINT=model-named       dies the first time it gets there
    LYDIAN_FAILPOINT=model-named:3     the third time

Unset, a point costs one look into a dictionary. Nothing else may hang on this: what follows a point must be right
whether the process lives or dies there.
"""

import os
import signal

POINTS = (
    "accepted-before",  # an update was checked and has its name; no fact says so
    "accepted-after",
    "update-named",
    "frozen-before",  # the round's set of updates is decided; no fact says so
    "frozen-after",
    "model-written",  # the new model is on the disk, without its name
    "model-named",
    "closed-before",  # the new model is durable; no fact says so
    "closed-after",
)

_passed: dict[str, int] = {}


def reach(point: str) -> None:
    """Die here, if the environment says so.

    Args:
        point: one of POINTS.
    """
    wanted = os.environ.get("LYDIAN_FAILPOINT")
    if not wanted:
        return
    name, _, times = wanted.partition(":")
    if name == point:
        _passed[point] = _passed.get(point, 0) + 1
        if _passed[point] == int(times or 1):
            os.kill(os.getpid(), signal.SIGKILL)
