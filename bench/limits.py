"""What this machine can do at best: the yardsticks that a round is held against, measured in the same run."""

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

MEGABYTE = 1_000_000

_SINK = """
import socket, sys
s = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
buffer = bytearray(1 << 20)
while s.recv_into(buffer):
    pass
"""


def best_of(times: int, measure: Callable[[], float]) -> float:
    """The median of several runs; one to warm up."""
    measure()
    return statistics.median(measure() for _ in range(times))


def copy_bandwidth() -> float:
    """Bytes a second that one core copies, memory to memory."""
    source = np.ones(200 * MEGABYTE, np.uint8)
    target = np.empty_like(source)

    def run() -> float:
        began = time.perf_counter()
        np.copyto(target, source)
        return time.perf_counter() - began

    return source.nbytes / best_of(5, run)


def loopback_bandwidth() -> float:
    """Bytes a second over TCP on loopback, from this Python process to another."""
    total, piece = 400 * MEGABYTE, bytes(1 << 20)

    def run() -> float:
        with socket.create_server(("127.0.0.1", 0)) as server:
            child = subprocess.Popen([sys.executable, "-c", _SINK, str(server.getsockname()[1])])
            connection, _ = server.accept()
            with connection:
                began, sent = time.perf_counter(), 0
                while sent < total:
                    connection.sendall(piece)
                    sent += len(piece)
            child.wait()
            return (time.perf_counter() - began) / sent

    return 1 / best_of(3, run)


def fsync_seconds() -> float:
    """Seconds to make one small write durable, in the folder for temporary files."""
    with tempfile.TemporaryDirectory() as folder:
        descriptor = os.open(Path(folder) / "probe", os.O_WRONLY | os.O_CREAT)
        try:

            def run() -> float:
                os.write(descriptor, b"x" * 4096)
                began = time.perf_counter()
                os.fsync(descriptor)
                return time.perf_counter() - began

            return best_of(20, run)
        finally:
            os.close(descriptor)
