"""Every HTTP call of protocol v1, from the caller's side. The one module that knows httpx2.

Calls return messages and raise the errors of common.errors: what the coordinator answered, as the class it was, or
UnavailableError with the code `unreachable` when no answer came. No call retries by itself, except `events`, which is a
stream that outlives the coordinator; whoever calls decides how long to insist.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx2

from common.errors import (
    BadUpdateError,
    LydianError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
    from_answer,
)
from common.messages import (
    OVER,
    Abandon,
    Heartbeat,
    HeartbeatAnswer,
    JobRequest,
    JobView,
    LogEntry,
    Message,
    PollAnswer,
    PollRequest,
    Receipt,
    Registration,
    Submission,
    TokenAnswer,
    TokenRequest,
    VersionView,
    Welcome,
    WorkerView,
)
from common.ranges import content_range, gaps, parse_ranges

PIECE = 1 << 20  # bytes handed to the socket or the disk at a time
POLL_SLACK_S = 15.0  # a long poll may take this much longer than was asked for before the line counts as dead

M = TypeVar("M", bound=Message)


class CoordinatorApi:
    """One coordinator, as a worker or a person calls it. Threads may share it."""

    def __init__(self, url: str, token: str | None = None, *, timeout_s: float = 30.0) -> None:
        self.url = url.rstrip("/")
        self._client = httpx2.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx2.Timeout(timeout_s, connect=10.0),
            limits=httpx2.Limits(max_keepalive_connections=8, keepalive_expiry=60.0),
        )

    def use_token(self, token: str) -> None:
        """From now on, call as the owner of this token."""
        self._client.headers["Authorization"] = f"Bearer {token}"

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # ---------------------------------------------------------------- workers

    def register(self, registration: Registration) -> Welcome:
        """Introduce a worker, or the same worker after a restart."""
        return self._ask(Welcome, "POST", "/v1/workers", registration)

    def poll(self, worker: str, request: PollRequest) -> PollAnswer | None:
        """Wait for work, at most `wait_s`. None: nothing yet."""
        timeout = httpx2.Timeout(request.wait_s + POLL_SLACK_S, connect=10.0)
        answer = self._send("POST", f"/v1/workers/{worker}/poll", request, timeout=timeout)
        return None if answer.status_code == 204 else PollAnswer.model_validate_json(answer.content)

    def heartbeat(self, worker: str, beat: Heartbeat) -> HeartbeatAnswer:
        """Renew the lease of an assignment and learn whether to go on."""
        return self._ask(HeartbeatAnswer, "POST", f"/v1/workers/{worker}/heartbeat", beat)

    def download_model(self, digest: str, target: Path) -> int:
        """Fetch a model version to `target`, which appears only whole and verified. Returns the bytes received."""
        return self._download(f"/v1/models/{digest}", target, digest=digest)

    def download_task(self, digest: str, target: Path) -> int:
        """Fetch a user's task file to `target`, verified like a model."""
        return self._download(f"/v1/tasks/{digest}", target, digest=digest)

    def upload(self, assignment: str, attempt: int, source: Path, *, resume: bool = False) -> int:
        """Send the bytes of an update. With `resume`, only what the coordinator does not hold yet.

        Returns:
            The bytes sent.
        """
        size = source.stat().st_size
        path = f"/v1/updates/{assignment}?attempt={attempt}"
        held = parse_ranges(self._send("HEAD", path).headers.get("Lydian-Ranges", "")) if resume else ()
        sent = 0
        for start, stop in gaps(held, size):
            headers = {
                "Content-Range": content_range(start, stop, size),
                "Content-Length": str(stop - start),
                "Content-Type": "application/octet-stream",
            }
            self._send("PUT", path, content=_pieces(source, start, stop), headers=headers)
            sent += stop - start
        return sent

    def submit(self, assignment: str, submission: Submission) -> Receipt:
        """Hand in the result of an assignment; the bytes were uploaded before."""
        return self._ask(Receipt, "POST", f"/v1/updates/{assignment}/submit", submission, timeout=httpx2.Timeout(300.0))

    def abandon(self, assignment: str, reason: Abandon) -> None:
        """Give an assignment back, saying why."""
        self._send("POST", f"/v1/updates/{assignment}/abandon", reason)

    def leave(self, worker: str, start_id: str) -> None:
        """Say goodbye: nobody waits for this worker any more."""
        self._send("POST", f"/v1/workers/{worker}/leave?start_id={start_id}")

    # ---------------------------------------------------------------- people and scripts

    def version(self) -> VersionView:
        """The coordinator's version; needs no token."""
        return self._ask(VersionView, "GET", "/version")

    def submit_job(self, request: JobRequest) -> JobView:
        """Send a job. The same key again gives the same job."""
        return self._ask(JobView, "POST", "/v1/jobs", request)

    def jobs(self) -> list[JobView]:
        """All jobs, oldest first."""
        return [JobView.model_validate(item) for item in self._send("GET", "/v1/jobs").json()]

    def job(self, job: str) -> JobView:
        """One job."""
        return self._ask(JobView, "GET", f"/v1/jobs/{_part(job)}")

    def cancel(self, job: str) -> JobView:
        """End a job; what it has averaged so far stays."""
        return self._ask(JobView, "POST", f"/v1/jobs/{_part(job)}/cancel")

    def pause(self, job: str) -> JobView:
        """Hand out no more work of this job until it is resumed."""
        return self._ask(JobView, "POST", f"/v1/jobs/{_part(job)}/pause")

    def resume(self, job: str) -> JobView:
        """Go on with a paused job where it stood."""
        return self._ask(JobView, "POST", f"/v1/jobs/{_part(job)}/resume")

    def logs(self, job: str) -> list[LogEntry]:
        """Every trouble of a job, with its traceback."""
        return [LogEntry.model_validate(item) for item in self._send("GET", f"/v1/jobs/{_part(job)}/logs").json()]

    def workers(self) -> list[WorkerView]:
        """All workers that ever joined."""
        return [WorkerView.model_validate(item) for item in self._send("GET", "/v1/workers").json()]

    def drain(self, worker: str) -> WorkerView:
        """Let a worker finish what it does and give it nothing more."""
        return self._ask(WorkerView, "POST", f"/v1/workers/{_part(worker)}/drain")

    def new_token(self, request: TokenRequest) -> TokenAnswer:
        """A new token."""
        return self._ask(TokenAnswer, "POST", "/v1/tokens", request)

    def pull(self, job: str, target: Path, *, which: str = "newest") -> int:
        """Fetch a job's model: `newest`, `best` or a round's number. Returns the bytes received."""
        return self._download(f"/v1/jobs/{_part(job)}/model?which={quote(which)}", target)

    def events(
        self, job: str, *, after: int = 0, on_wait: Callable[[str], None] = lambda _: None, patience_s: float = 3600.0
    ) -> Iterator[dict[str, Any]]:
        """Everything that happens to a job, from the fact after `after` on, until the job is over.

        Outlives the coordinator: while it is away, says so through `on_wait`, and goes on after the last fact seen.

        Yields:
            Facts as dictionaries, with `id` and `at` (common.facts); between them `now` events, without an id.

        Raises:
            UnavailableError: the coordinator was away for `patience_s` seconds.
        """
        away_since: float | None = None
        while True:
            try:
                for event in self._stream(job, after):
                    away_since = None
                    after = event.get("id", after)
                    yield event
                    if event["type"] == "job" and event["state"] in OVER:
                        return
            except (UnavailableError, httpx2.TransportError) as error:
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > patience_s:
                    if isinstance(error, UnavailableError):
                        raise
                    raise _unreachable(self.url, error) from error
                on_wait(f"the coordinator at {self.url} does not answer ({error}); waiting for it to come back")
            time.sleep(0.5)  # between two connections, never between two events

    # ---------------------------------------------------------------- the wire

    def _stream(self, job: str, after: int) -> Iterator[dict[str, Any]]:
        """One connection's worth of events."""
        headers = {"Last-Event-ID": str(after), "Accept": "text/event-stream"}
        path = f"/v1/jobs/{_part(job)}/events"
        with self._client.stream("GET", path, headers=headers, timeout=httpx2.Timeout(60.0)) as answer:
            _raise_for(answer)
            for line in answer.iter_lines():
                if line.startswith("data:"):
                    yield json.loads(line[5:])

    def _ask(self, kind: type[M], method: str, path: str, body: Message | None = None, **options: Any) -> M:  # noqa: ANN401
        return kind.model_validate_json(self._send(method, path, body, **options).content)

    def _send(self, method: str, path: str, body: Message | None = None, **options: Any) -> httpx2.Response:  # noqa: ANN401
        if body is not None:
            options["content"] = body.model_dump_json()
            options["headers"] = {"Content-Type": "application/json"}
        try:
            answer = self._client.request(method, path, **options)
        except httpx2.TransportError as error:
            raise _unreachable(self.url, error) from error
        _raise_for(answer)
        return answer

    def _download(self, path: str, target: Path, *, digest: str | None = None) -> int:
        part = target.with_name(target.name + ".part")
        seen, received = hashlib.sha256(), 0
        try:
            with self._client.stream("GET", path) as answer, part.open("wb") as file:
                _raise_for(answer)
                expected = digest or answer.headers.get("ETag", "").strip('"')
                for piece in answer.iter_raw(PIECE):
                    seen.update(piece)
                    received += len(piece)
                    file.write(piece)
        except httpx2.TransportError as error:
            raise _unreachable(self.url, error) from error
        if seen.hexdigest() != expected:
            raise BadUpdateError(
                f"{received} bytes came for {expected[:12]}… and their SHA-256 is {seen.hexdigest()[:12]}…",
                code="digest_mismatch",
                advice="The bytes were damaged on the way; fetch them again.",
            )
        part.replace(target)
        return received


def _unreachable(url: str, error: httpx2.TransportError) -> UnavailableError:
    why = str(error) or type(error).__name__
    return UnavailableError(
        f"the coordinator at {url} does not answer: {why}",
        code="unreachable",
        advice="Is it running (`lydian serve`), and is this the right address (--url or LYDIAN_URL)?",
    )


def _raise_for(answer: httpx2.Response) -> None:
    """Turn an error answer into the error it carries."""
    if answer.status_code < 400:
        return
    answer.read()
    try:
        body = json.loads(answer.content)
    except ValueError:
        if answer.request.method == "HEAD":  # a HEAD has no body to say more
            raise _bare(answer) from None
        body = answer.text
    raise from_answer(answer.status_code, body)


def _bare(answer: httpx2.Response) -> LydianError:
    kind = {401: UnauthenticatedError, 404: NotFoundError}.get(answer.status_code, LydianError)
    return kind(f"{answer.request.url.path} answered HTTP {answer.status_code}")


def _part(name: str) -> str:
    """A name as one piece of a path, whatever was typed."""
    return quote(name, safe="")


def _pieces(source: Path, start: int, stop: int) -> Iterator[bytes]:
    with source.open("rb") as file:
        file.seek(start)
        while start < stop:
            piece = file.read(min(PIECE, stop - start))
            if not piece:
                raise LydianError(
                    f"{source} became shorter while it was sent", advice="Did something else write to it?"
                )
            start += len(piece)
            yield piece
