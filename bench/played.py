"""Light workers: hundreds of them in one asyncio process, without torch, over real HTTP to a real coordinator.

    join ▶ poll, with the model in its answer ◀▶ … ▶ PUT the update, with what is submitted ▶ poll …

A light worker trains nothing and sends the same bytes every time, which are no other's. It makes the calls that an
agent makes, by hand and over one connection that it keeps open, so that what is measured is the coordinator and not the
player.
"""

import asyncio
import hashlib
import os
import platform
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import numpy as np

from common import PROTOCOL, __version__
from common.errors import LydianError
from common.messages import (
    TOGETHER,
    Assignment,
    Hardware,
    ModelFacts,
    PollAnswer,
    PollRequest,
    Registration,
    Submission,
    TorchBuild,
    Welcome,
)
from common.sharding import cut
from common.together import SUBMISSION, submission_header
from common.weights import Notes, file_digest, save

WAIT_S = 25.0  # of a poll, as an agent's
PATIENCE_S = 300.0  # for one answer
OWN = 4  # bytes at the end of an update that are its worker's own
JSON, BYTES = "application/json", "application/octet-stream"


def registration(name: str) -> Registration:
    """What a light worker says of itself."""
    build = TorchBuild(version="none", device="cpu", threads=1)
    hardware = Hardware(
        hostname=name, system=platform.system(), python=platform.python_version(), cpu="", cores=1, memory=0,
        torch=build,
    )  # fmt: skip
    return Registration(
        name=name, protocol=PROTOCOL, version=__version__, start_id="s1", hardware=hardware, trust="any"
    )


def facts(shards: int) -> ModelFacts:
    """Of a model that nobody has built: a sample a shard, and no test split, so that nothing is evaluated."""
    return ModelFacts(parameters=1, train_samples=shards, test_samples=0, bounds=cut(shards, [1.0] * shards))


@dataclass(frozen=True)
class Weights:
    """A file of weights that is sent again and again."""

    path: Path
    digest: str

    @classmethod
    def made(cls, path: Path, megabytes: int, value: float = 0.0) -> Self:
        """Write tensors of a megabyte each, all of one value."""
        save(path, {f"w{at:04d}": np.full(250_000, value, np.float32) for at in range(megabytes)}, Notes())
        return cls(path, file_digest(path))


# ---------------------------------------------------------------- HTTP by hand


class Line:
    """One connection that stays open. One call at a time."""

    def __init__(self, url: str) -> None:
        """Connect to nobody yet."""
        address = urlsplit(url)
        self._host, self._port = address.hostname or "", address.port or 80
        self._token = ""
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    def use_token(self, token: str) -> None:
        """From now on, call as the owner of this token."""
        self._token = token

    async def call(self, method: str, path: str, *body: bytes, kind: str = JSON, **more: str) -> bytes | None:
        """One call; `more` are headers. None: answered, with nothing to say (204).

        Raises:
            LydianError: no_answer, or refused.
        """
        try:
            async with asyncio.timeout(PATIENCE_S):
                status, answer = await self._exchange(method, path, body, {"Content-Type": kind, **more})
        except (OSError, EOFError) as error:  # a timeout is the one, a connection that ends the other
            raise LydianError(f"{method} {path}: no answer ({error!r})", code="no_answer") from error
        code = status.split()[1]
        if code[0] != "2":
            raise LydianError(f"{method} {path}: {status}: {answer[:500]!r}", code="refused")
        return None if code == "204" else answer

    async def _exchange(
        self, method: str, path: str, body: Sequence[bytes], more: Mapping[str, str]
    ) -> tuple[str, bytes]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port, limit=1 << 20)
        reader, writer = self._streams
        headers = {
            "Host": f"{self._host}:{self._port}", "Authorization": f"Bearer {self._token}",
            "Content-Length": str(sum(map(len, body))), **more,
        }  # fmt: skip
        head = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        writer.write("\r\n".join([*head, "", ""]).encode())
        for piece in body:
            writer.write(piece)
        await writer.drain()
        status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        told = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        return status, await reader.readexactly(int(told.get("content-length", "0")))

    async def close(self) -> None:
        """Close the connection."""
        if self._streams is not None:
            self._streams[1].close()
            with suppress(OSError):  # the other side was faster
                await self._streams[1].wait_closed()


# ---------------------------------------------------------------- the players


@dataclass
class Given:
    """When a task of a round reached somebody."""

    round: int
    worker: int
    at: float  # seconds since the epoch, the clock that the coordinator dates its facts with


@dataclass
class Stage:
    """What all players share."""

    url: str
    workers: int
    model: Weights
    update: Weights
    given: list[Given] = field(default_factory=list)
    everybody: asyncio.Event = field(default_factory=asyncio.Event)  # all of them have a task of the first round
    _first: int = 0  # tasks of the first round that have come

    def __post_init__(self) -> None:
        """Read the update once."""
        self.update_bytes = self.update.path.read_bytes()
        self.model_bytes = self.model.path.read_bytes()

    def note(self, work: Assignment, worker: int) -> None:
        """A task has come."""
        self.given.append(Given(work.round, worker, time.time()))
        self._first += work.round == 1
        if self._first >= self.workers:
            self.everybody.set()


class Player:
    """One light worker."""

    def __init__(self, stage: Stage, number: int) -> None:
        """Nobody is called yet."""
        self._stage, self._number, self._line = stage, number, Line(stage.url)
        self._own = struct.pack("<f", number)  # the last of the numbers in its update
        self._digest = hashlib.sha256(stage.update_bytes[:-OWN] + self._own).hexdigest()
        self._id = ""

    async def join(self, join_token: str) -> None:
        """Register as a new worker."""
        self._line.use_token(join_token)
        answer = await self._line.call("POST", "/v1/workers", _json(registration(f"p{self._number}")))
        welcome = Welcome.model_validate_json(answer or b"")
        assert welcome.credential is not None
        self._id = welcome.worker_id
        self._line.use_token(welcome.credential)

    async def work(self) -> None:
        """Ask for work and do it, until cancelled."""
        while True:
            request = PollRequest(start_id="s1", claim_key=os.urandom(4).hex(), wait_s=WAIT_S, together=TOGETHER)
            answer = await self._line.call("POST", f"/v1/workers/{self._id}/poll", _json(request))
            text, _, model = (answer or b"").partition(b"\n")  # as common.together lays it out
            work = PollAnswer.model_validate_json(text).assignment if text else None
            if work is not None:
                await self._do(work, has_model=bool(model))

    async def _do(self, work: Assignment, *, has_model: bool) -> None:
        """Build the model, or take it and hand in an update."""
        stage = self._stage
        if work.kind == "init":
            result = Submission(attempt=work.attempt, digest=stage.model.digest, samples=0, facts=facts(work.shards))
            await self._hand_in(work, result, stage.model_bytes)
            return
        stage.note(work, self._number)
        if work.round == 1:  # nobody takes a second shard before everybody has had a first one
            await stage.everybody.wait()
        if not has_model:
            assert work.base is not None
            await self._line.call("GET", f"/v1/models/{work.base.digest}")
        result = Submission(attempt=work.attempt, digest=self._digest, samples=1, steps=1)
        await self._hand_in(work, result, stage.update_bytes[:-OWN], self._own)

    async def _hand_in(self, work: Assignment, result: Submission, *data: bytes) -> None:
        """In one call where the coordinator takes so much in one, else in two."""
        path, size = f"/v1/updates/{work.id}", sum(map(len, data))
        header = submission_header(result) if size <= work.together else None
        if header is not None:
            more = {SUBMISSION: header, "Content-Range": f"bytes 0-{size - 1}/{size}"}
            await self._line.call("PUT", f"{path}?attempt={work.attempt}", *data, kind=BYTES, **more)
            return
        await self._line.call("PUT", f"{path}?attempt={work.attempt}", *data, kind=BYTES)
        await self._line.call("POST", f"{path}/submit", _json(result))

    async def close(self) -> None:
        """Close the connection."""
        await self._line.close()


class Players:
    """All of them, joined and at work; they end with the block."""

    def __init__(self, stage: Stage) -> None:
        """Nobody has joined yet."""
        self._players = [Player(stage, number) for number in range(stage.workers)]
        self._tasks: Sequence[asyncio.Task[None]] = ()

    async def join(self, join_token: str) -> None:
        """Register all of them at once."""
        await asyncio.gather(*(player.join(join_token) for player in self._players))

    async def __aenter__(self) -> Self:
        """Let them ask for work."""
        self._tasks = [asyncio.create_task(player.work()) for player in self._players]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        """End their polls, where they are."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for player in self._players:
            await player.close()

    async def during(self, call: Callable[[], None], abort: Callable[[], None]) -> None:
        """Run `call` in a thread while they work. The first fault of a player ends it all.

        Args:
            call: what to run.
            abort: makes `call` end early; a thread cannot be cancelled, and would be waited for.

        Raises:
            LydianError: what a player met.
        """
        watched = asyncio.create_task(asyncio.to_thread(call))
        try:
            done, _ = await asyncio.wait({watched, *self._tasks}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except BaseException:
            abort()
            raise


def _json(message: Registration | PollRequest | Submission) -> bytes:
    return message.model_dump_json().encode()
