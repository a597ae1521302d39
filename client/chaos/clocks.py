"""Clocks that jump: libfaketime under a process, and a file that says by how much its clock is wrong.

Only the clock of the day is touched. Durations (the monotonic clock) stay true, as on a machine whose clock somebody
sets; so what waits goes on waiting for as long as it meant to.
"""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

LIBRARIES = (
    "/usr/lib/*/faketime/libfaketimeMT.so.1",
    "/usr/lib*/faketime/libfaketimeMT.so.1",
    "/usr/local/lib*/faketime/libfaketimeMT.so.1",
)
NOTICED_S = 1  # seconds; the library looks into the file that often
PROBED_S = 864_000.0  # seconds that the clock of a probe is ahead
PROBE = """
import resource, threading, time
def count():
    for _ in range(1_000_000): pass
threads = [threading.Thread(target=count) for _ in range(2)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
used = resource.getrusage(resource.RUSAGE_SELF)
print(time.time(), time.monotonic(), used.ru_nvcsw + used.ru_nivcsw)
"""
"""Prints both clocks, and how often two busy threads were switched."""
SWITCHES = 2_000  # that take the turns of some milliseconds as they should; a hundred times as many are seen else


@dataclass(frozen=True)
class Clock:
    """The clock of one machine: of all processes that were started with its environment."""

    library: Path
    file: Path

    def environment(self) -> dict[str, str]:
        """What a process must be started with."""
        return {
            "LD_PRELOAD": str(self.library),
            "FAKETIME_TIMESTAMP_FILE": str(self.file),
            "FAKETIME_CACHE_DURATION": str(NOTICED_S),
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_FORCE_MONOTONIC_FIX": "0",  # with it, waits by the monotonic clock end at once: threads spin
        }

    def set(self, seconds: float) -> None:
        """Be wrong by so many seconds from now on; noticed within NOTICED_S."""
        part = self.file.with_name(f"{self.file.name}.part")
        part.write_text(f"{seconds:+.0f}\n", encoding="ascii")
        part.replace(self.file)


def find_library() -> Path | None:
    """The library, where it is installed."""
    found = (path for pattern in LIBRARIES for path in sorted(Path("/").glob(pattern.removeprefix("/"))))
    return next(found, None)


def why_no_clock(folder: Path, environment: Mapping[str, str]) -> str:
    """Why no clock can be made to jump here, tried with one process; empty: it can.

    Args:
        folder: for a small file.
        environment: of the process that is tried.
    """
    if sys.platform != "linux":
        return "needs Linux"
    library = find_library()
    if library is None:
        return "needs libfaketime (Debian: apt install libfaketime)"
    clock = Clock(library, folder / "clock-probe")
    clock.set(PROBED_S)
    plain, faked = (_probe(with_it) for with_it in ({**environment}, {**environment, **clock.environment()}))
    clock.file.unlink()
    if plain is None or faked is None:
        return f"{library} cannot be loaded into {sys.executable}"
    ahead, passed = faked[0] - plain[0], faked[1] - plain[1]
    if abs(ahead - PROBED_S) > PROBED_S / 10 or abs(passed) > PROBED_S / 10:
        return f"{library} moves the clock by {ahead:.0f} s and durations by {passed:.0f} s, not {PROBED_S:.0f} and 0"
    if faked[2] > SWITCHES:
        return f"{library} makes threads spin: {faked[2]:.0f} switches where {plain[2]:.0f} are usual"
    return ""


def _probe(environment: Mapping[str, str]) -> tuple[float, ...] | None:
    """What a process with this environment prints of PROBE; None where it does not start."""
    command = [sys.executable, "-I", "-c", PROBE]
    ended = subprocess.run(command, env=dict(environment), capture_output=True, text=True, check=False, timeout=60)
    return tuple(map(float, ended.stdout.split())) if ended.returncode == 0 else None
