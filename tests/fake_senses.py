"""`lydian work` whose senses are a file: what tests start where a GPU and its users are to be played.

    python -m tests.fake_senses FILE URL …

FILE holds a JSON object with fields of manners.Measured; no file: nothing is measured that would disturb. It is looked
at every $FAKE_LOOK_S, which is much more often than a machine, so that tests do not wait.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from worker import agent, lookout, manners
from worker.__main__ import app
from worker.manners import Measured, Rules


def install(file: Path) -> None:
    """Have agents of this process see what the file says."""

    def measure() -> Measured:
        seen = json.loads(file.read_text()) if file.exists() else {}
        return Measured(**{**seen, "others_on_gpu": tuple(seen.get("others_on_gpu", ()))})

    def watching(device: str, rules: Rules) -> Callable[[], Measured]:
        return measure

    agent.watching = watching
    agent.POLITE_WAIT_S = 0.3
    lookout.LOOK_S = float(os.environ.get("FAKE_LOOK_S", "0.05"))
    manners.HOLD_LEAST_S = 0.2


def see(file: Path, **seen: object) -> None:
    """Let an agent see this from now on."""
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(seen))
    part.replace(file)


if __name__ == "__main__":
    install(Path(sys.argv[1]))
    app(sys.argv[2:], prog_name="lydian work")
