"""The loop of a program that forks processes for tests: what it has loaded, they need not load.

It reads a JSON object a line. {"wait": id} is answered with that process's exit code (negative: the signal); any other
starts a process and is answered with its id.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def serve(become: Callable[[dict[str, Any]], object]) -> None:
    """Answer until nobody asks.

    Args:
        become: in the new process: be what was asked for, and end.
    """
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            answer = os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1])
        elif (answer := os.fork()) == 0:
            become(asked)
        print(answer, flush=True)
