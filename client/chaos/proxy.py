"""A TCP proxy in front of one service that makes its connections bad: cut, stalled, half closed, corrupted, slow, far.

    with Proxy("127.0.0.1", 8470) as net:            # clients connect to 127.0.0.1, net.port
        net.up.fault = Fault("reset", after=1_000_000)  # the next connection is reset after 1 MB of upload
        net.down.rate = 2_500_000                       # bytes a second, each connection for itself
        net.cut_all()

Runs in a thread of its own; everything may be changed while connections are open. A fault is taken by the first
connection that carries more than `after` bytes in its direction, `times` times in all.
"""

import asyncio
import socket
import struct
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

CHUNK = 16 << 10  # bytes carried at a time
AHEAD = 256  # chunks of one direction that are held at most: 4 MiB
TICK_S = 0.05  # after which a changed rate is noticed
START_S = 10.0

Kind = Literal["reset", "close", "stall", "half", "drop", "corrupt"]


@dataclass
class Fault:
    """What happens to a connection after so many bytes.

    reset: both sides get a RST. close: both are closed in order. stall: nothing moves until `release`. half: this
    direction ends, the other goes on. drop: the bytes are thrown away, the sender sees success. corrupt: the bits of
    one byte are turned over.
    """

    kind: Kind
    after: int = 0
    times: int = 1


@dataclass
class Way:
    """One direction: its settings, and the bytes that went through in all."""

    latency_s: float = 0.0
    rate: float | None = None  # bytes a second of one connection; None: as fast as it goes
    fault: Fault | None = None
    bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def take(self, carried: int, coming: int) -> Fault | None:
        """The fault that strikes within the next bytes of a connection that carried so many; it is used up by this."""
        with self._lock:
            fault = self.fault
            if fault is None or carried + coming <= fault.after:
                return None
            fault.times -= 1
            if fault.times <= 0:
                self.fault = None
            return Fault(fault.kind, fault.after)


class _Cut(Exception):  # noqa: N818 - a wish, not an error
    """End both sides of a connection, with a reset or in order."""

    def __init__(self, *, reset: bool) -> None:
        super().__init__()
        self.reset = reset


class Proxy:
    """The proxy, as a context manager."""

    def __init__(self, host: str, port: int, *, listen: str = "127.0.0.1", listen_port: int = 0) -> None:
        self.target, self.listen, self.port = (host, port), listen, listen_port
        self.up, self.down = Way(), Way()
        self.connections = 0  # accepted so far
        self.refusing = False  # whether new connections are reset at once
        self._pairs: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._listening: Future[None] = Future()
        self._over = asyncio.Event()
        self._released = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        """Listen.

        Raises:
            OSError: the address cannot be had.
        """
        self._thread.start()
        try:
            self._listening.result(START_S)
        except OSError:
            self._thread.join()
            self._loop.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()
        self._loop.close()

    def cut_all(self) -> None:
        """Reset every open connection."""
        self._call(self._cut())

    def release(self) -> None:
        """Let stalled connections go on."""
        self._call(self._release())

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(START_S)

    async def _cut(self) -> None:
        await _end_tasks(list(self._pairs))

    async def _release(self) -> None:
        self._released.set()
        self._released = asyncio.Event()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        try:
            listener = socket.create_server((self.listen, self.port), family=_family(self.listen), backlog=100)
        except OSError as error:
            self._listening.set_exception(error)
            return
        with listener:
            listener.setblocking(False)
            self.port = listener.getsockname()[1]
            accepting = asyncio.create_task(self._accept(listener))
            self._listening.set_result(None)
            await self._over.wait()
            await _end_tasks([accepting])
        await self._cut()

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            near, _ = await self._loop.sock_accept(listener)
            self.connections += 1
            pair = asyncio.create_task(self._join(near))
            self._pairs.add(pair)
            pair.add_done_callback(self._pairs.discard)
            pair.add_done_callback(partial(_close, near))  # should it be cut before it began

    async def _join(self, near: socket.socket) -> None:
        """Carry both directions of one connection until both have ended. Cancelled, or broken, it resets both sides."""
        far = socket.socket(_family(self.target[0]))
        reset = True
        try:
            for side in (near, far):
                side.setblocking(False)
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.refusing:
                return
            await self._loop.sock_connect(far, self.target)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._carry(self.up, near, far))
                both.create_task(self._carry(self.down, far, near))
            reset = False
        except* _Cut as cuts:
            reset = cuts.subgroup(lambda error: isinstance(error, _Cut) and error.reset) is not None
        except* OSError:
            reset = True  # nobody listens there
        finally:
            for side in (near, far):
                _end(side, reset=reset)

    async def _carry(self, way: Way, source: socket.socket, sink: socket.socket) -> None:
        """Carry one direction. Read ahead by as much as the latency holds, and no more than some MiB."""
        ahead: asyncio.Queue[tuple[float, bytes | None]] = asyncio.Queue(AHEAD)
        reading = asyncio.create_task(self._read(way, source, ahead))
        try:
            await self._deliver(way, ahead, sink)
        except OSError:
            return  # nobody takes it any more; what they answered before is still carried back
        finally:
            await _end_tasks([reading])

    async def _read(self, way: Way, source: socket.socket, ahead: asyncio.Queue[tuple[float, bytes | None]]) -> None:
        data: bytes | None = b"-"
        while data:
            try:
                data = await self._loop.sock_recv(source, CHUNK)
            except OSError:
                data = None  # reset; said after what came before
            await ahead.put((self._loop.time() + way.latency_s, data))

    async def _deliver(self, way: Way, ahead: asyncio.Queue[tuple[float, bytes | None]], sink: socket.socket) -> None:
        carried, dropping = 0, False
        while True:
            due, data = await ahead.get()
            await asyncio.sleep(max(due - self._loop.time(), 0.0))
            if data is None:
                raise _Cut(reset=True)
            if not data:
                break
            await self._pace(way, len(data))
            fault = None if dropping else way.take(carried, len(data))
            if fault is not None:
                data, dropping = await self._strike(way, fault, data, fault.after - carried, sink)
            carried += len(data)
            if not dropping:
                await self._pass_on(way, data, sink)
        if not dropping:
            sink.shutdown(socket.SHUT_WR)

    async def _pace(self, way: Way, size: float) -> None:
        """Wait as long as so many bytes take."""
        while (rate := way.rate) and size > 0:
            some = min(size, rate * TICK_S)
            await asyncio.sleep(some / rate)
            size -= some

    async def _pass_on(self, way: Way, data: bytes, sink: socket.socket) -> None:
        await self._loop.sock_sendall(sink, data)
        way.bytes += len(data)

    async def _strike(self, way: Way, fault: Fault, data: bytes, at: int, sink: socket.socket) -> tuple[bytes, bool]:
        """Let a fault happen at byte `at` of the data. Returns what is to be passed on, and whether nothing more is."""
        at = max(at, 0)
        if fault.kind == "corrupt":
            return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :], False
        await self._pass_on(way, data[:at], sink)
        match fault.kind:
            case "reset" | "close":
                raise _Cut(reset=fault.kind == "reset")
            case "half":
                sink.shutdown(socket.SHUT_WR)
            case "stall":
                await self._released.wait()
        return data[at:], fault.kind != "stall"


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


async def _end_tasks(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _close(side: socket.socket, _: asyncio.Task[None]) -> None:
    side.close()


def _end(side: socket.socket, *, reset: bool) -> None:
    if reset:
        side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    side.close()
