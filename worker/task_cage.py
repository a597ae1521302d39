"""What the child takes from itself before it runs a task file: new rights, core dumps, more than its limits.

Part of the child (worker/task_host.py): standard library alone. Called once the device works, since a driver may have
to be loaded by a program that needs rights of its own.
"""

import ctypes
import json
import sys

PR_SET_NO_NEW_PRIVS = 38  # prctl(2)


def enter(limits: str) -> None:
    """Give up what the task has no use for. There is no way back, for this process and all that it starts.

    Args:
        limits: a JSON object, limit of setrlimit -> the most that it is from now on; empty: none but no new rights. A
            limit that is lower already stays.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for name, most in (json.loads(limits) if limits else {}).items():
        lower(name, most)


def lower(name: str, most: int) -> None:
    """Set one limit for good, where this system has it."""
    try:
        import resource
    except ImportError:  # Windows
        return
    number = getattr(resource, name, None)
    if number is None:
        return
    soft, hard = (most if value == resource.RLIM_INFINITY else min(value, most) for value in resource.getrlimit(number))
    resource.setrlimit(number, (soft, hard))
