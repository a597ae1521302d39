"""A coordinator that browsers can reach, on a thread of this process, and fleets and pasts to fill it with."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import uvicorn

from common.facts import (
    Absent,
    Accepted,
    Evaluated,
    Fact,
    Frozen,
    HandedBack,
    HandedOut,
    Initialised,
    Opened,
    RoundClosed,
    Shard,
    StateChanged,
    Submitted,
)
from common.messages import JobSpec, Link, ModelFacts, Progress, Registration
from server.app import create_app
from server.coordinator import Coordinator
from server.fleet import Lease
from server.rounds import Task
from server.settings import Settings
from tests.acceptance.kit import free_port
from tests.rounds_kit import digest, registration, spec

T = TypeVar("T")
HOST = "127.0.0.1"
T0 = "2026-01-01T00:00:00.000Z"
PATIENCE_S = 120.0
DAY_S = 86_400.0  # a lease that outlasts all tests of a file


class _Server(uvicorn.Server):
    """Says when it listens; leaves signals to the process."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.began = threading.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.began.set()


class House:
    """A coordinator at `url`, from `open` to `close`; it can be opened again on the same folder and port."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.settings = Settings(
            state_dir=folder, reserve_bytes=1 << 16, tailscaled=folder / "no-tailscaled", ttl_s=DAY_S, **settings
        )
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.folder = folder

    def open(self) -> "House":
        self.app = create_app(self.settings)
        config = uvicorn.Config(self.app, host=HOST, port=self.port, log_config=None, timeout_graceful_shutdown=5)
        self._server = _Server(config)

        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            await self._server.serve()
            self._server.began.set()  # should it not have started

        self._thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        self._thread.start()
        assert self._server.began.wait(PATIENCE_S)
        self.coordinator: Coordinator = self.app.state.coordinator
        # A past that is made up has no files: nothing is averaged of it, and no round closed but by `happen`.
        self.coordinator._settle = lambda job_id: None  # type: ignore[method-assign]
        self.token = (self.folder / "admin.token").read_text().strip()
        return self

    def close(self) -> None:
        """Stop, as a coordinator does that is told to."""
        self.do(self.coordinator.end_waits)
        self._server.should_exit = True
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    def do(self, act: Callable[[], T]) -> T:
        """Do something on the coordinator's own thread."""

        async def there() -> T:
            return act()

        return self.run(there())

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE_S)

    # ------------------------------------------------------------ fleets

    def add(self, *machines: Registration, link: Link | None = None) -> list[str]:
        """Workers that are there, without a journal entry each. Gives their ids."""

        def join() -> list[str]:
            fleet, now = self.coordinator.fleet, self.coordinator.clock()
            for machine in machines:
                worker = fleet.seen(self._register(machine), now)
                worker.link = link
            return [machine.name for machine in machines]

        return self.do(join)

    def _register(self, machine: Registration) -> str:
        self.coordinator.fleet.register(machine.name, machine, self.coordinator.clock())
        return machine.name

    def works(self, worker: str, job: str, task: Task, progress: Progress, said: str = "") -> None:
        """A worker holds a task of a job, is so far, and its task wrote that."""

        def hold() -> None:
            now = self.coordinator.clock()
            lease = Lease(job, task, 1, worker, expires_at=now + DAY_S, progress=progress, since=now, said=said)
            self.coordinator.fleet.put(lease)
            self.coordinator.hub.touch(job)

        self.do(hold)

    def long_past(self, job: str, rounds: int) -> None:
        """A job with so many rounds behind it, which are only in the journal, and one that is open."""
        self.happen(job, begun(spec(rounds=rounds + 1_000, name="long", round={"evaluate_every": 10})))
        rows = [(job, T0, kind, number, body) for kind, number, body in long_bodies(rounds)]
        statement = "INSERT INTO facts (job, at, type, round, body) VALUES (?, ?, ?, ?, ?)"

        def write() -> None:
            self.coordinator.journal._write(lambda: self.coordinator.journal._database.executemany(statement, rows))
            made = self.coordinator.jobs[job]
            self.coordinator.jobs[job] = replace(made, closed=rounds)

        self.do(write)
        self.happen(job, [opening(rounds + 1, 1)])

    def happen(self, job: str, facts: Sequence[Fact]) -> None:
        """Facts of a job are journalled and become its state; nothing else is done about them."""

        def become() -> None:
            coordinator, now = self.coordinator, self.coordinator.clock()
            for stored in coordinator.journal.append(job, facts):
                coordinator._replay(stored, now)
                coordinator.hub.publish(stored)
            coordinator.hub.touch(job)

        self.do(become)


def machine(name: str, *, gpu: str = "", memory: int = 0, torch: str = "2.14.1", **keys: Any) -> Registration:
    """A registration of a machine with or without a GPU."""
    plain = registration(name, **keys)
    build = plain.hardware.torch.model_copy(
        update={"version": torch, "device": "cuda" if gpu else "cpu", "name": gpu, "memory": memory,
                "cuda": ("12.6" if torch.startswith("2.7") else "13.0") if gpu else None}
    )  # fmt: skip
    changed = {"torch": build, "memory": 34 << 30, "cpu": "AMD Ryzen 7 5700X", "cores": 8}
    return plain.model_copy(update={"hardware": plain.hardware.model_copy(update=changed)})


# ---------------------------------------------------------------- pasts


def begun(job: JobSpec, *, size: int = 6_700_000, parameters: int = 1_663_370) -> list[Fact]:
    """A job that is taken, started and has its first model."""
    facts = ModelFacts(parameters=parameters, train_samples=60_000, test_samples=10_000, bounds=tuple(range(4)))
    return [
        Submitted(spec=job, key="k"),
        StateChanged(state="initialising", reason="workers are there"),
        Initialised(attempt=1, worker="a", digest=digest(0), size=size, facts=facts),
    ]


def long_bodies(rounds: int) -> Iterator[tuple[str, int, str]]:
    """(type, round, body) of each round of a long past; every tenth was measured."""
    for number in range(1, rounds + 1):
        part = number / rounds
        loss = 2.3 * (1 - part) ** 2 + 0.05 + 0.02 * (number % 7)
        closed = {
            "type": "round", "round": number, "seconds": 1.0, "workers": 1, "shards": 1, "samples": 10, "bytes_down": 7,
            "bytes_up": 9, "digest": digest(number), "size": 100, "metrics": {"train_loss": loss},
        }  # fmt: skip
        yield "round", number, json.dumps(closed)
        if number % 10 == 0:
            measured = {
                "type": "evaluation", "round": number, "attempt": 1, "worker": "a", "samples": 10, "seconds": 0.1,
                "metrics": {"accuracy": 0.1 + 0.85 * part, "loss": 1.1 * loss}, "best": True,
            }  # fmt: skip
            yield "evaluation", number, json.dumps(measured)


def opening(number: int, shards: int) -> Opened:
    cut = tuple(Shard(shard=at, start=100 * at, stop=100 * at + 100) for at in range(shards))
    return Opened(round=number, base=digest(number - 1), shards=cut, reason="the next")


def whole_round(number: int, workers: Sequence[str], loss: float, accuracy: float, **keys: Any) -> list[Fact]:
    """A round in which each worker trains one shard."""
    facts: list[Fact] = [opening(number, len(workers))]
    for at, worker in enumerate(workers):
        facts.append(HandedOut(kind="train", round=number, shard=at, attempt=1, worker=worker))
    facts += [accepted(number, at, worker, loss) for at, worker in enumerate(workers)]
    facts += closing(number, len(workers), loss, accuracy, **keys)
    return facts


def accepted(number: int, shard: int, worker: str, loss: float, *, seconds: float = 1.0, **keys: Any) -> Accepted:
    fields = {
        "round": number, "shard": shard, "attempt": 1, "worker": worker, "worker_name": worker,
        "digest": digest(1000 * number + shard), "samples": 100, "steps": 10, "seconds": seconds,
        "metrics": {"train_loss": (loss * 100, 100.0)}, "bytes_down": 6_700_000, "bytes_up": 6_700_000,
        "took_s": seconds + 0.4, **keys,
    }  # fmt: skip
    return Accepted.model_validate(fields)


def closing(
    number: int, shards: int, loss: float, accuracy: float, absent: tuple[Absent, ...] = (), **keys: Any
) -> list[Fact]:
    """The end of a round, with its evaluation."""
    return [
        Frozen(round=number, shards=tuple(range(shards)), reason="all are in", absent=absent),
        RoundClosed(
            round=number, seconds=4.2, workers=shards, shards=shards, samples=100 * shards, left_out=len(absent),
            absent=absent, bytes_down=6_700_000 * shards, bytes_up=6_700_000 * shards, digest=digest(number),
            size=6_700_000, metrics={"train_loss": loss}, **keys,
        ),
        Evaluated(
            round=number, attempt=1, worker="a", metrics={"accuracy": accuracy, "loss": loss * 1.1}, samples=10_000,
            seconds=0.5, best=True,
        ),
    ]  # fmt: skip


def trouble(number: int, worker: str, sentence: str, detail: str = "", code: str = "task_failed") -> HandedBack:
    return HandedBack(
        kind="train", round=number, shard=0, attempt=1, worker=worker, worker_name=worker, code=code,
        sentence=sentence, detail=detail,
    )  # fmt: skip
