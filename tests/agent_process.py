"""`lydian work` with the child of tests/fake_child.py, and a disk that can be slow: what tests of the agent start.

While the file $SLOW_DISK exists, every fsync waits; $SLOW_DISK.log gets the name of each file that was synced.
"""

import os
import threading
from pathlib import Path

from worker import child, spool
from worker.__main__ import app

SLOW_DISK = Path(os.environ["SLOW_DISK"])


def slow_sync(path: Path) -> None:
    pause = threading.Event()
    while SLOW_DISK.exists():
        pause.wait(0.005)
    real_sync(path)
    with SLOW_DISK.with_suffix(".log").open("a") as log:
        log.write(path.name + "\n")


if __name__ == "__main__":
    child.HOST = Path(__file__).with_name("fake_child.py")
    real_sync, spool._sync = spool._sync, slow_sync
    app(prog_name="lydian work")
