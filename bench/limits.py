"""What this machine can do at best: the yardsticks that a measurement is held against, taken in the same run."""

import hashlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MEGABYTE = 1_000_000
STREAMS = (2, 8)  # connections at once, beside a single one
BLOCK = 1 << 16  # elements: the size in which the coordinator averages (server.inspection.BLOCK_ELEMENTS)
PIECE = 1 << 20  # bytes of one call

_SINK = """
import socket, sys
s = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
buffer = bytearray(1 << 20)
while s.recv_into(buffer):
    pass
s.sendall(b"!")
"""


@dataclass(frozen=True)
class Limits:
    """One machine at its best, at one moment. Rates are bytes a second."""

    loopback: float  # one TCP stream between two Python processes
    loopback_streams: dict[int, float]  # number of streams -> all of them together
    copy: float  # memory to memory, one core; a byte that is read and written counts once
    copy_two_threads: float
    axpy: float  # weighted sum in float64 by numpy, block by block; bytes of float32 read
    sha256: float
    fsync_s: float  # seconds to make one small write durable
    write: float  # into a file, not made durable
    durable_write: float  # the same with the fsync at the end


def measure(megabytes: int = 400) -> Limits:
    """All limits, each over so many megabytes."""
    return Limits(
        loopback=loopback_bandwidth(megabytes),
        loopback_streams={streams: loopback_bandwidth(megabytes // streams, streams) for streams in STREAMS},
        copy=copy_bandwidth(megabytes // 2),
        copy_two_threads=copy_bandwidth(megabytes // 2, threads=2),
        axpy=axpy_bandwidth(megabytes // 4),
        sha256=sha256_bandwidth(megabytes // 2),
        fsync_s=fsync_seconds(),
        write=write_bandwidth(megabytes, durable=False),
        durable_write=write_bandwidth(megabytes, durable=True),
    )


def best_of(times: int, measure: Callable[[], float]) -> float:
    """The median of several runs; one to warm up."""
    measure()
    return statistics.median(measure() for _ in range(times))


def timed(call: Callable[..., object], *arguments: Any, **named: Any) -> float:  # noqa: ANN401 - the call's own
    """Seconds of one call."""
    began = time.perf_counter()
    call(*arguments, **named)
    return time.perf_counter() - began


# ---------------------------------------------------------------- memory and processor


def copy_bandwidth(megabytes: int = 200, threads: int = 1) -> float:
    """Bytes a second that are copied, memory to memory, by so many threads together."""
    source = np.ones(megabytes * MEGABYTE, np.uint8)
    target = np.empty_like(source)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:  # numpy copies without the lock of the interpreter

        def run() -> None:
            list(pool.map(lambda part: np.copyto(*part), parts))

        return source.nbytes / best_of(5, lambda: timed(run))


def axpy_bandwidth(megabytes: int = 100) -> float:
    """Bytes a second of float32 that one core weighs and adds up in float64, as averaging does at least."""
    source = np.ones(megabytes * MEGABYTE // 4, np.float32)
    total, scratch = np.zeros(BLOCK), np.empty(BLOCK)

    def run() -> None:
        for first in range(0, len(source), BLOCK):
            block = source[first : first + BLOCK]
            np.multiply(block, 0.3, out=scratch[: len(block)])
            np.add(total[: len(block)], scratch[: len(block)], out=total[: len(block)])

    return source.nbytes / best_of(5, lambda: timed(run))


def sha256_bandwidth(megabytes: int = 200) -> float:
    """Bytes a second that one core hashes."""
    source = bytes(megabytes * MEGABYTE)
    return len(source) / best_of(3, lambda: timed(hashlib.sha256, source))


# ---------------------------------------------------------------- the network


def loopback_bandwidth(megabytes: int = 400, streams: int = 1) -> float:
    """Bytes a second over TCP on loopback, from this Python process to as many others as there are streams.

    The clock runs from the first byte until every receiver has said that it has all.

    Args:
        megabytes: of each stream.
        streams: connections at once, a thread here and a process there for each.
    """
    total, piece = max(megabytes, 1) * MEGABYTE, bytes(PIECE)

    def send(connection: socket.socket) -> None:
        for sent in range(0, total, len(piece)):
            connection.sendall(piece[: total - sent])
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)

    def run() -> float:
        with ExitStack() as stack:
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            command = [sys.executable, "-c", _SINK, str(server.getsockname()[1])]
            sinks = [stack.enter_context(subprocess.Popen(command)) for _ in range(streams)]
            connections = [stack.enter_context(server.accept()[0]) for _ in sinks]
            return timed(together, send, connections) / (total * streams)

    return 1 / best_of(3, run)


def together(call: Callable[[socket.socket], None], connections: Sequence[socket.socket]) -> None:
    """Call with each of them at once, and wait for all."""
    threads = [threading.Thread(target=call, args=(connection,)) for connection in connections]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# ---------------------------------------------------------------- the disk


def fsync_seconds() -> float:
    """Seconds to make one small write durable, in the folder for temporary files."""
    with tempfile.TemporaryDirectory() as folder:
        descriptor = os.open(Path(folder) / "probe", os.O_WRONLY | os.O_CREAT)
        try:

            def run() -> float:
                os.write(descriptor, b"x" * 4096)
                return timed(os.fsync, descriptor)

            return best_of(20, run)
        finally:
            os.close(descriptor)


def write_bandwidth(megabytes: int = 400, *, durable: bool) -> float:
    """Bytes a second into a new file in the folder for temporary files; durable: with an fsync at its end."""
    total, piece = megabytes * MEGABYTE, bytes(PIECE)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe"

        def write() -> None:
            with path.open("wb", buffering=0) as file:
                for sent in range(0, total, len(piece)):
                    file.write(piece[: total - sent])
                if durable:
                    os.fsync(file.fileno())

        def run() -> float:
            path.unlink(missing_ok=True)
            return timed(write)

        return total / best_of(3, run)
