"""Hosts on a tailnet of their own: tailnet.sh as a context manager, and threads of this process on its hosts.

    with Hosts(2) as hosts:
        hosts.call("path", "relay")
        with hosts.on(1):      # what this thread, and threads and processes that it starts, call now comes from host 1
            ...

It must not be used where `why_no_hosts()` says why.
"""

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

SCRIPT = Path(__file__).with_name("tailnet.sh")
TOOLS = ("ip", "wg", "wireguard-go", "nft", "nsenter", "unshare")
PACKAGES = "iproute2 wireguard-tools wireguard-go nftables util-linux"
SEARCHED = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
TUN = Path("/dev/net/tun")

_CLONE_NEWNET = 0x40000000  # linux/sched.h


@functools.cache
def why_no_hosts() -> str:
    """Why no hosts can be made on this machine; empty: they can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    if missing := [tool for tool in TOOLS if shutil.which(tool, path=SEARCHED) is None]:
        return f"needs {', '.join(missing)} (Debian: apt install {PACKAGES})"
    try:
        TUN.open("rb+", buffering=0).close()
    except OSError as error:
        return f"needs {TUN}: {error.strerror}"
    tried = subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True, text=True, check=False)
    return "" if tried.returncode == 0 else f"root may not make namespaces here: {tried.stderr.strip()}"


class Hosts:
    """Hosts 0 … N-1, at 100.64.0.1 …; nothing of them is left afterwards, processes on them included."""

    def __init__(self, count: int, *, name: str = "") -> None:
        """Makes nothing yet.

        Args:
            count: 2 to 40.
            name: keeps several such nets apart; at most 8 letters.
        """
        self.count, self.name = count, name or f"ly{os.getpid() % 1_000_000}"

    def __enter__(self) -> Self:
        self.call("up", str(self.count))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.call("down")

    @staticmethod
    def address(number: int) -> str:
        """A host's address on the tailnet."""
        return f"100.64.0.{number + 1}"

    def call(self, *arguments: str) -> str:
        """One command of tailnet.sh; its stdout."""
        ended = subprocess.run(
            ["bash", str(SCRIPT), *arguments],
            env={**os.environ, "PATH": SEARCHED, "TAILNET": self.name},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert ended.returncode == 0, f"tailnet.sh {' '.join(arguments)}: {ended.stderr}"
        return ended.stdout

    @contextlib.contextmanager
    def on(self, number: int) -> Iterator[None]:
        """Inside, this thread is on a host: sockets that it makes are that host's, as are processes that it starts."""
        there = Path("/run/netns") / f"{self.name}-{number}"
        with Path("/proc/thread-self/ns/net").open() as home, there.open() as away:
            _enter(away.fileno())
            try:
                yield
            finally:
                _enter(home.fileno())


def _enter(namespace: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.setns(namespace, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")
