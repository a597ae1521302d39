"""What some tests need of the machine, and why they are skipped where it is missing."""

import os
import shutil
import signal
import subprocess
import tempfile
from functools import cache

import pytest


@cache
def why_no_mounts() -> str:
    """Why this process cannot mount a file system; empty where it can."""
    if os.geteuid() != 0:
        return "needs root, to mount a small file system"
    with tempfile.TemporaryDirectory() as folder:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True, check=False
        )
        if mounted.returncode != 0:
            return f"root may not mount here: {mounted.stderr.strip()}"
        subprocess.run(["umount", folder], check=True)
    return ""


needs_mounts = pytest.mark.skipif(why_no_mounts() != "", reason=why_no_mounts())


def interruptible() -> None:
    """For a process that is started: Ctrl-C ends it, even where the tests themselves were started to ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@cache
def why_no_bubbles() -> str:
    """Why bubblewrap cannot make a sandbox here; empty where it can."""
    if shutil.which("bwrap") is None:
        return "needs bubblewrap"
    own = [] if os.geteuid() == 0 else ["--unshare-user"]
    line = ["bwrap", *own, "--unshare-pid", "--unshare-net", "--ro-bind", "/", "/", "--proc", "/proc", "true"]
    made = subprocess.run(line, capture_output=True, text=True, check=False)
    return "" if made.returncode == 0 else f"bubblewrap may make no sandbox here: {made.stderr.strip()}"


needs_bubbles = pytest.mark.skipif(why_no_bubbles() != "", reason=why_no_bubbles())
