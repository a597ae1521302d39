"""`lydian work` with the child of tests/fake_child.py, and a disk that can be slow: what tests of the agent start.

A program that has loaded the agent already and forks a process for each one that is asked for, since loading it anew
costs half a second of a core each time. It reads a JSON object a line: {"arguments", "environment", "log"} starts an
agent and is answered with its process id; {"wait": pid} is answered with its exit code (negative: the signal).

While the file $SLOW_DISK exists, every fsync of the spool waits; $SLOW_DISK.log gets the name of each synced file.
With $FAKE_SENSES the agent sees what that file says (tests/fake_senses.py).
"""

import os
import threading
from pathlib import Path
from typing import Any

from tests import fake_senses, forking
from worker import child, spool
from worker.__main__ import app

real_sync = spool._sync


def slow_sync(path: Path) -> None:
    slow_disk, pause = Path(os.environ["SLOW_DISK"]), threading.Event()
    while slow_disk.exists():
        pause.wait(0.005)
    real_sync(path)
    with slow_disk.with_suffix(".log").open("a") as log:
        log.write(path.name + "\n")


def become(asked: dict[str, Any]) -> None:
    """Be the agent that was asked for, as if it had been started by itself. Ends the process."""
    log = os.open(asked["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update({"LYDIAN_CHILD_ENV": "FAKE_CHILD", **asked["environment"]})
    if "FAKE_SENSES" in os.environ:
        fake_senses.install(Path(os.environ["FAKE_SENSES"]))
    app(asked["arguments"], prog_name="lydian work")


def main() -> None:
    child.HOST = Path(__file__).with_name("fake_child.py")
    spool._sync = slow_sync
    forking.serve(become)


if __name__ == "__main__":
    main()
