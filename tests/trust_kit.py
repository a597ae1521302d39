"""The real application on a folder of its own, called without a socket: by any header, path and body there can be."""

import asyncio
import hashlib
import json
import sqlite3
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from fastapi import FastAPI

from common.weights import Notes, save
from server.app import create_app
from server.coordinator import Coordinator
from server.settings import Settings
from tests.rounds_kit import registration, spec

ROOMY = {"stranger_calls_per_s": 100_000.0, "stranger_calls_burst": 100_000.0}  # a corpus is a flood of refused calls
CLIENT = "127.0.0.1"
HOST = "127.0.0.1:8470"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


@dataclass
class Answer:
    """What a call came to."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The code of an error; empty where there is no body, as after HEAD."""
        return str(self.json()["code"]) if self.status >= 400 and self.body else ""


class Served:
    """An application that runs, from the first line of this to `close`."""

    def __init__(self, folder: Path, **given: Any) -> None:
        quiet = {"poll_s": 0.01, "ttl_s": 3600.0, "reserve_bytes": 1 << 16}  # a busy machine ends no lease
        settings = Settings(**{"state_dir": folder, "tailscaled": folder / "no-tailscaled", **quiet, **ROOMY, **given})
        self.folder, self.app, self._runner = folder, create_app(settings), asyncio.Runner()
        self._life = self.app.router.lifespan_context(self.app)
        self.run(self._life.__aenter__())
        self.coordinator: Coordinator = self.app.state.coordinator
        self.admin = (folder / "admin.token").read_text().strip()
        self.join = (folder / "join.token").read_text().strip()

    def close(self) -> None:
        self.run(self._life.__aexit__(None, None, None))
        self._runner.close()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self._runner.run(coroutine)

    def call(
        self,
        method: str,
        target: str,
        token: str | None = None,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        hosts: tuple[str, ...] = (HOST,),
        client: str = CLIENT,
        said: list[Answer] | None = None,
    ) -> Answer:
        """One call. An event stream is broken off at its first byte, as a client does that leaves.

        `said` takes the answer where the call raises as well, as one does that is answered 500.
        """
        given = {"Content-Length": str(len(body))} if body else {}
        given |= {"Authorization": f"Bearer {token}"} if token is not None else {}
        pairs = [*(("Host", host) for host in hosts), *(given | (headers or {})).items()]
        return self.run(self._call(method, target, body, pairs, client, said))

    async def _call(
        self,
        method: str,
        target: str,
        body: bytes,
        headers: list[tuple[str, str]],
        client: str = CLIENT,
        said: Any = None,
    ) -> Answer:
        answer, ended = Answer(), asyncio.Event()
        if said is not None:
            said.append(answer)
        path, _, query = target.partition("?")
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "root_path": "",
            "method": method, "path": unquote(path), "raw_path": path.encode(), "query_string": query.encode(),
            "client": (client, 50_000), "server": ("192.0.2.7", 8470),
            "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers],
        }  # fmt: skip
        coming = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if coming:
                return coming.pop()
            await ended.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = {name.decode(): value.decode("latin-1") for name, value in message["headers"]}
                return
            answer.body += message.get("body", b"")
            if not message.get("more_body", False) or "event-stream" in answer.headers.get("content-type", ""):
                ended.set()

        await self.app(scope, receive, send)
        return answer

    def rows(self) -> dict[str, list[Any]]:
        """All that the journal holds, read beside the coordinator; without the record of who called, refused or not."""
        path = self.folder / "journal.sqlite"
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            return {name: list(database.execute(f"SELECT * FROM {name}")) for name in tables if name != "audit"}

    def files(self) -> dict[str, int]:
        """Name and size of every file but the journal's own."""
        return {
            str(path.relative_to(self.folder)): path.stat().st_size
            for path in self.folder.rglob("*")
            if path.is_file() and not path.name.startswith("journal.sqlite")
        }


def routes_of(app: FastAPI) -> set[tuple[str, str]]:
    """(method, path) of every call that the application takes."""
    return set(_routes(app.routes))


def _routes(routes: Iterable[Any]) -> Iterator[tuple[str, str]]:
    for route in routes:
        inner = getattr(route, "original_router", None)  # routers that were included are kept whole
        if inner is not None:
            yield from _routes(inner.routes)
        elif hasattr(route, "methods"):
            yield from ((method, route.path) for method in route.methods or ())
        else:
            raise AssertionError(f"{route!r} is no route that these tests know how to walk")


# ---------------------------------------------------------------- a small fleet, in the middle of a round

JSON = {"Content-Type": "application/json"}
MODEL = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(2, dtype=np.float32)}
TASK_FILE = "def model(config): ...\n"


@dataclass(frozen=True)
class Member:
    """A registered worker."""

    id: str
    token: str


class Fleet(Served):
    """Two workers and a submitter's job whose first round is open; each worker has a shard of it under way."""

    def __init__(self, folder: Path, **limits: Any) -> None:
        super().__init__(folder, **limits)
        self._claims = 0
        self.one, self.two = self.member("one"), self.member("two")
        issue = self.coordinator.tokens.issue
        self.submitter, self.other_submitter = (issue("submit", name=name) for name in ("ada", "bob"))
        self.reader = issue("read", name="screen")
        given = spec(task="mine", rounds=9, data={"shards": 12}).model_dump(mode="json")
        request = {"spec": given, "task_source": TASK_FILE, "key": "k"}
        self.job = str(self.must("POST", "/v1/jobs", self.submitter, request).json()["id"])
        self.task = hashlib.sha256(TASK_FILE.encode()).hexdigest()
        self._build()
        self.model = self.coordinator.model(self.job, "newest").digest
        self.work = self.assignment(self.one)
        self.assignment(self.two)

    def must(self, method: str, target: str, token: str, fields: Any) -> Answer:
        answer = self.call(method, target, token, json.dumps(fields).encode(), JSON)
        assert answer.status < 300, answer
        return answer

    def member(self, name: str) -> Member:
        given = registration(name, trust="any").model_dump(mode="json")
        welcome = self.must("POST", "/v1/workers", self.join, given).json()
        return Member(welcome["worker_id"], welcome["credential"])

    def assignment(self, member: Member) -> dict[str, Any]:
        """New work for a worker, which is given what it holds already once more, as another attempt."""
        for _ in range(5):  # before its work it may be asked to load the job
            self._claims += 1
            request = {"start_id": "s1", "claim_key": f"c{self._claims}", "wait_s": 0}
            answer = self.must("POST", f"/v1/workers/{member.id}/poll", member.token, request)
            work = answer.json()["assignment"] if answer.body else None
            if work is not None:
                return dict(work)
        raise AssertionError("there is no work")

    def upload(self, work: dict[str, Any], token: str, data: bytes) -> Answer:
        return self.call("PUT", f"/v1/updates/{work['id']}?attempt={work['attempt']}", token, data)

    def _build(self) -> None:
        work, data = self.assignment(self.one), weights(self.folder.parent / "first.safetensors")
        assert self.upload(work, self.one.token, data).status == 204
        bounds = [5 * shard for shard in range(13)]
        facts = {"parameters": 8, "train_samples": 60, "test_samples": 0, "bounds": bounds}
        result = {"attempt": work["attempt"], "digest": hashlib.sha256(data).hexdigest(), "facts": facts}
        self.must("POST", f"/v1/updates/{work['id']}/submit", self.one.token, result)


def weights(path: Path) -> bytes:
    """The file of the model that the fleet trains."""
    save(path, MODEL, Notes())
    return path.read_bytes()
