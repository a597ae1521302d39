"""The real application on a folder, in a time that stands still until a test moves it."""

import asyncio
import os
import selectors
import sqlite3
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx2

import server.app
from common.messages import (
    Message,
)
from server.app import app
from server.coordinator import Coordinator

TTL_S = 8  # virtual seconds


class IdleSelector(selectors.DefaultSelector):
    """Tells when the loop has nothing to do but wait."""

    def __init__(self, on_idle: Callable[[], bool]) -> None:
        super().__init__()
        self._on_idle = on_idle

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        would_wait = timeout is None or timeout > 0
        return super().select(0 if would_wait and self._on_idle() else timeout)


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock stands still until `now` is moved."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self._waiting: list[asyncio.Future[None]] = []
        super().__init__(IdleSelector(self._wake))

    def time(self) -> float:
        return self.now

    def quiet(self) -> None:
        """Run until nothing is left that could go on without a message, a thread or time."""
        self.run_until_complete(self._idle())

    async def _idle(self) -> None:
        waiter = self.create_future()
        self._waiting.append(waiter)
        await waiter

    def _wake(self) -> bool:
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            waiter.set_result(None)
        return bool(waiting)


class HeldBack(ThreadPoolExecutor):
    """Where the loop sends what would block: each piece waits until it is let go."""

    def __init__(self) -> None:
        super().__init__(max_workers=1)
        self.waiting: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.append((future, partial(fn, *args, **kwargs)))
        return future

    def let_go(self, number: int) -> None:
        future, piece = self.waiting.pop(number % len(self.waiting))
        if future.set_running_or_notify_cancel():
            done = super().submit(piece)
            error = done.exception()
            if error is None:
                future.set_result(done.result())
            else:
                future.set_exception(error)


@dataclass
class Simulated(Coordinator):
    """The coordinator by the loop's clock."""

    clock: Callable[[], float] = field(default=lambda: asyncio.get_running_loop().time())


async def at_once(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """In place of a thread pool for functions that only look something up."""
    return function(*args, **kwargs)


class House:
    """The application on a folder, which can be closed and opened again."""

    def __init__(self, folder: Path) -> None:
        self.loop, self.threads, self.folder = SimulatedLoop(), HeldBack(), folder
        self.loop.set_default_executor(self.threads)
        self.open()

    def open(self) -> None:
        given = {"STATE_DIR": str(self.folder), "TTL_S": str(TTL_S), "HEARTBEAT_S": "1", "RESERVE_BYTES": str(1 << 16)}
        environment = {f"LYDIAN_{name}": value for name, value in given.items()}
        self._life = app.router.lifespan_context(app)
        with patch.object(server.app, "Coordinator", Simulated), patch.dict(os.environ, environment):
            self.run(self._life.__aenter__())
        self.coordinator: Coordinator = app.state.coordinator
        self.admin = (self.folder / "admin.token").read_text().strip()
        self.client = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://coordinator")

    def close(self) -> None:
        """End the application; what it had begun in threads never happens."""
        self.threads.waiting.clear()
        self.run(self.client.aclose())
        self.run(self._life.__aexit__(None, None, None))

    def demolish(self) -> None:
        self.close()
        self.threads.shutdown()
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run something to its end, letting go whatever it waits for."""
        task = self.loop.create_task(coroutine)
        self.loop.quiet()
        while not task.done() and self.threads.waiting:
            self.threads.let_go(0)
            self.loop.quiet()
        return self.loop.run_until_complete(task)

    def begin(
        self, method: str, path: str, token: str, body: Message | bytes | None = None, **headers: str
    ) -> asyncio.Task[httpx2.Response]:
        """Send a request, and let the coordinator go as far as it can with it."""
        headers = {"Authorization": f"Bearer {token}", **headers}
        if isinstance(body, Message):
            headers["Content-Type"], body = "application/json", body.model_dump_json().encode()
        with patch("fastapi.dependencies.utils.run_in_threadpool", at_once):
            task = self.loop.create_task(self.client.request(method, path, content=body, headers=headers))
            self.loop.quiet()
        return task

    def rows(self) -> tuple[int, ...]:
        """How much is in the journal, read beside the coordinator."""
        counts = (
            "SELECT count(*) FROM facts UNION ALL SELECT count(*) FROM tokens UNION ALL SELECT count(*) FROM workers"
        )
        path = self.folder / "journal.sqlite"
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            return tuple(
                number for (number,) in database.execute(f"{counts} UNION ALL SELECT sum(strikes) FROM workers")
            )

    def blob(self, digest: str) -> Path:
        return self.folder / "blobs" / digest[:2] / digest
