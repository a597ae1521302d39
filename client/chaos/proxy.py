"""A TCP proxy in front of one service that makes its connections bad: cut, stalled, half closed, corrupted, slow, far.

    with Proxy("127.0.0.1", 8470) as net:            # clients connect to 127.0.0.1, net.port
        net.up.fault = Fault("reset", after=1_000_000)  # the next connection is reset after 1 MB of upload
        net.down.rate = 2_500_000                       # bytes a second, each connection for itself
        net.cut_all()

Runs in a thread of its own; everything may be changed while connections are open. A fault is taken by the first
connection that carries more than `after` bytes in its direction, `times` times in all.
"""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

CHUNK = 16 << 10  # bytes carried at a time
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
        self._ready = threading.Event()
        self._over = asyncio.Event()
        self._released = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._ready.wait(START_S):
            raise TimeoutError(f"the proxy did not listen on {self.listen} within {START_S:g} s")
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
        pairs = list(self._pairs)
        for pair in pairs:
            pair.cancel()
        await asyncio.gather(*pairs, return_exceptions=True)

    async def _release(self) -> None:
        self._released.set()
        self._released = asyncio.Event()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._accept, self.listen, self.port)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._over.wait()
        server.close()
        await self._cut()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine of the loop
        self._pairs.add(task)
        self.connections += 1
        try:
            await self._join(reader, writer)
        except asyncio.CancelledError:
            pass  # cut_all, or the end of the proxy: what was open is reset
        finally:
            self._pairs.discard(task)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry both directions of one connection until both have ended."""
        writers, reset = [writer], True
        try:
            if self.refusing:
                return
            there, to_there = await asyncio.open_connection(*self.target)
            writers.append(to_there)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._carry(self.up, reader, to_there))
                both.create_task(self._carry(self.down, there, writer))
            reset = False
        except* _Cut as cuts:
            reset = cuts.subgroup(lambda error: isinstance(error, _Cut) and error.reset) is not None
        except* OSError:
            reset = True  # one side is gone: so is the other
        finally:
            for each in writers:
                _end(each, reset=reset)

    async def _carry(self, way: Way, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one direction. Read ahead by as much as the latency holds, and no more than some MiB."""
        ahead: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(256)

        async def read() -> None:
            while True:
                data = await reader.read(CHUNK)
                await ahead.put((self._loop.time() + way.latency_s, data))
                if not data:
                    return

        async with asyncio.TaskGroup() as group:
            group.create_task(read())
            carried, dropping = 0, False
            while True:
                due, data = await ahead.get()
                await asyncio.sleep(max(due - self._loop.time(), 0.0))
                if not data:
                    break
                if way.rate:
                    await asyncio.sleep(len(data) / way.rate)
                fault = None if dropping else way.take(carried, len(data))
                if fault is not None:
                    data, dropping = await self._strike(way, fault, data, fault.after - carried, writer)
                carried += len(data)
                if not dropping:
                    await self._pass_on(way, data, writer)
            if not dropping and writer.can_write_eof():
                with contextlib.suppress(OSError):  # the other side is gone already
                    writer.write_eof()

    async def _pass_on(self, way: Way, data: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        way.bytes += len(data)
        await writer.drain()

    async def _strike(
        self, way: Way, fault: Fault, data: bytes, at: int, writer: asyncio.StreamWriter
    ) -> tuple[bytes, bool]:
        """Let a fault happen at byte `at` of the data. Returns what is to be passed on, and whether nothing more is."""
        at = max(at, 0)
        if fault.kind == "corrupt":
            return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :], False
        if fault.kind == "drop":
            return data, True
        await self._pass_on(way, data[:at], writer)
        if fault.kind in ("reset", "close"):
            raise _Cut(reset=fault.kind == "reset")
        if fault.kind == "half":
            writer.write_eof()
            return data, True
        await self._released.wait()
        return data[at:], False


def _end(writer: asyncio.StreamWriter, *, reset: bool) -> None:
    if not reset:
        writer.close()
        return
    with contextlib.suppress(OSError):  # closed already
        raw = writer.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
