"""Every HTTP call of the protocol, from the caller's side. Only this module, common.transfers and
common.answers know httpx2.

Calls return messages and raise the errors of common.errors: what the coordinator answered, as the class it was, or
UnavailableError with the code `unreachable` when no answer came. No call retries by itself, except `events`, which is a
stream that outlives the coordinator; whoever calls decides how long to insist.
"""

import contextlib
import json
import os
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote, urlsplit

import httpx2
from pydantic import TypeAdapter

from common import guarding
from common.answers import whole
from common.audit import AuditPage
from common.errors import BadRequestError, LydianError, TooManyError, UnavailableError
from common.link import measure
from common.messages import (
    OVER,
    Abandon,
    Group,
    Heartbeat,
    HeartbeatAnswer,
    JobRequest,
    JobView,
    Link,
    LogEntry,
    Message,
    Output,
    PollAnswer,
    PollRequest,
    Probed,
    Receipt,
    Registration,
    Reveal,
    RevokeAnswer,
    Roster,
    RotateAnswer,
    RotateRequest,
    SecureKeys,
    SecureShares,
    Submission,
    TokenAnswer,
    TokenRequest,
    TokenView,
    VersionView,
    Welcome,
    WorkerView,
)
from common.pins import split
from common.ranges import Ranges, content_range, parse_ranges
from common.together import SUBMISSION, WITH_MODEL, answer_and_model, submission_header
from common.transfers import CONNECT_S, IDLE_S, Download, OnBytes, Upload, raise_for, reaching

MOST_TASK_BYTES = 4 << 20  # of a task file: as many characters as a job may bring, each of four bytes
PROBE_BLOCK = 256 << 10  # bytes
PROBE_IDLE_S = 10.0  # without a byte, after which a measurement is given up
POLL_SLACK_S = 15.0  # a long poll may take this much longer than was asked for before the line counts as dead

M = TypeVar("M", bound=Message)
T = TypeVar("T")

_JOBS, _LOG, _WORKERS = TypeAdapter(list[JobView]), TypeAdapter(list[LogEntry]), TypeAdapter(list[WorkerView])
_OUTPUT = TypeAdapter(list[Output])
_TOKENS = TypeAdapter(list[TokenView])


class CoordinatorApi:
    """One coordinator, as a worker or a person calls it. Threads may share it."""

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        pin: str | None = None,
        insecure: bool = False,
        timeout_s: float = 30.0,
        idle_s: float = IDLE_S,
        connect_s: float = CONNECT_S,
    ) -> None:
        """Connect to nobody yet.

        Args:
            url: the coordinator's.
            token: whose calls these are; see `use_token`. It may have the coordinator's pins behind it (common.pins).
            pin: of the certificate that the coordinator must show; None: the token's, if that has one.
            insecure: send in plain words to any address what is called by http:// (common.guarding).
            timeout_s: seconds that an answer may take.
            idle_s: seconds without a byte after which a transfer breaks, to be resumed.
            connect_s: seconds that a connection may take to come about.

        Raises:
            LydianError: the token's pins are damaged (`bad_pin`), or the URL has no certificate to compare one with
                (`pin_without_tls`).
        """
        bare, pins = split(token)
        self.pin = pin or pins.certificate
        self.url, self._idle_s, self._insecure = url.rstrip("/"), idle_s, insecure
        guarding.check_scheme(self.url, self.pin)
        self._look = guarding.plain_trace(self.url)
        self._client = httpx2.Client(
            base_url=self.url,
            headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {bare}"} if bare else {}),
            follow_redirects=False,  # they would take the token along
            timeout=httpx2.Timeout(timeout_s, connect=connect_s),
            limits=httpx2.Limits(max_keepalive_connections=20, keepalive_expiry=60.0),
            verify=self._trusted(),
            event_hooks={"request": [self._guard]},
        )

    def _trusted(self) -> ssl.SSLContext:
        """What a certificate must be; of a plain line nothing, which saves the 40 ms that authorities take to load."""
        if self.pin is not None:
            return guarding.pinned_context(self.pin)
        if urlsplit(self.url).scheme != "https":
            return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context = httpx2.create_ssl_context()
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        return context

    def _guard(self, request: httpx2.Request) -> None:
        """Have the connections that a call makes looked at before the call is sent."""
        if request.url.scheme == "http" and not self._insecure:
            request.extensions = {**request.extensions, "trace": self._look}

    def check_line(self) -> None:
        """Make sure that who is there may be spoken to; who is away is no matter.

        Raises:
            UnavailableError: it shows another certificate than it must, or none (codes: guarding.REFUSALS).
        """
        if guarding.is_plainly_sheltered(self.url):
            return  # there is nothing to look at
        try:
            self.version()
        except UnavailableError as error:
            if error.code in guarding.REFUSALS:
                raise
        except LydianError:  # it answers, and says in the calls that count what is wrong
            return

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

    def poll(
        self, worker: str, request: PollRequest, *, keep: Callable[[str, memoryview], None] = lambda _, __: None
    ) -> PollAnswer | None:
        """Wait for work, at most `wait_s`. None: nothing yet.

        Args:
            worker: its id.
            request: what it says; with `together`, a small model may come along.
            keep: takes that model, by its digest, which was verified.
        """
        timeout = httpx2.Timeout(request.wait_s + POLL_SLACK_S, connect=CONNECT_S)
        answer = self._send("POST", f"/v1/workers/{worker}/poll", request, timeout=timeout)
        if answer.status_code == 204:
            return None
        if answer.headers.get("Content-Type") != WITH_MODEL:
            return _understood(answer, PollAnswer.model_validate_json)
        said, digest, model = _understood(answer, answer_and_model)
        keep(digest, model)
        return said

    def heartbeat(self, worker: str, beat: Heartbeat) -> HeartbeatAnswer:
        """Renew the lease of an assignment and learn whether to go on."""
        return self._ask(HeartbeatAnswer, "POST", f"/v1/workers/{worker}/heartbeat", beat)

    def download_model(
        self,
        digest: str,
        target: Path,
        *,
        size: int | None = None,
        stop: threading.Event | None = None,
        on_bytes: OnBytes | None = None,
    ) -> int:
        """Fetch a model version to `target`, which appears only whole and verified. Returns the bytes received.

        What a broken call has brought is kept beside the target; the next one, of any process, fetches the rest. Who
        knows the `size`, in bytes, saves the question for it.

        Raises:
            TransferStopped: `stop` was set.
        """
        return self._download(f"/v1/models/{digest}", target, digest=digest, size=size, stop=stop, on_bytes=on_bytes)

    def download_task(self, digest: str, target: Path, *, stop: threading.Event | None = None) -> int:
        """Fetch a user's task file to `target`, verified like a model."""
        return self._download(f"/v1/tasks/{digest}", target, digest=digest, most=MOST_TASK_BYTES, stop=stop)

    def upload(
        self,
        assignment: str,
        attempt: int,
        source: Path,
        *,
        resume: bool = False,
        stop: threading.Event | None = None,
        on_bytes: OnBytes | None = None,
    ) -> int:
        """Send the bytes of an update. With `resume`, only what the coordinator does not hold yet.

        Returns:
            The bytes sent.

        Raises:
            TransferStopped: `stop` was set.
        """
        return self._upload(f"/v1/updates/{assignment}?attempt={attempt}", source, resume, stop, on_bytes)

    def send_model(
        self, digest: str, source: Path, *, stop: threading.Event | None = None, on_bytes: OnBytes | None = None
    ) -> int:
        """Send a file of weights for a job to begin with: what of it the coordinator does not hold yet.

        Returns:
            The bytes sent.

        Raises:
            TransferStopped: `stop` was set.
        """
        return self._upload(f"/v1/models/{digest}", source, True, stop, on_bytes)

    def submit(self, assignment: str, submission: Submission) -> Receipt:
        """Hand in the result of an assignment; the bytes were uploaded before."""
        return self._ask(Receipt, "POST", f"/v1/updates/{assignment}/submit", submission, timeout=httpx2.Timeout(300.0))

    def hand_in(self, assignment: str, source: Path, submission: Submission) -> Receipt | None:
        """Upload and submit a small update in one call; None: its submission is too long for that."""
        header = submission_header(submission)
        if header is None:
            return None
        data = source.read_bytes()
        headers = {
            SUBMISSION: header,
            "Content-Range": content_range(0, len(data), len(data)),
            "Content-Type": "application/octet-stream",
        }
        path = f"/v1/updates/{assignment}?attempt={submission.attempt}"
        timeout = httpx2.Timeout(300.0)
        with (
            reaching(self.url),
            self._client.stream("PUT", path, content=data, headers=headers, timeout=timeout) as stream,
        ):
            answer = whole(stream)
        raise_for(answer)
        return _understood(answer, Receipt.model_validate_json)

    def abandon(self, assignment: str, reason: Abandon) -> None:
        """Give an assignment back, saying why."""
        self._send("POST", f"/v1/updates/{assignment}/abandon", reason)

    def announce(self, assignment: str, keys: SecureKeys) -> Roster | None:
        """Take part in a secure sum, and wait for who sums together; None: that is not decided yet."""
        return self._ask_if_any(Roster, f"/v1/updates/{assignment}/keys", keys)

    def cut(self, assignment: str, shares: SecureShares) -> Group | None:
        """Hand shares to one's peers, and wait for whose masks go into the updates; None: not decided yet."""
        return self._ask_if_any(Group, f"/v1/updates/{assignment}/shares", shares)

    def reveal(self, assignment: str, reveal: Reveal) -> None:
        """Open one share of each member of a secure sum."""
        self._send("POST", f"/v1/updates/{assignment}/reveal", reveal)

    def leave(self, worker: str, start_id: str) -> None:
        """Say goodbye: nobody waits for this worker any more."""
        self._send("POST", f"/v1/workers/{worker}/leave?start_id={start_id}")

    # ---------------------------------------------------------------- anyone with a token

    def measure_link(self) -> Link:
        """Use the line for about two seconds to see what it carries; less where it is fast.

        Raises:
            UnavailableError: others measure just now (`probe_busy`), or bytes got lost.
        """
        return measure(self._probe_down, self._probe_up, time.monotonic)

    def _probe_down(self, size: int) -> None:
        timeout = httpx2.Timeout(PROBE_IDLE_S, connect=CONNECT_S)
        path = f"/v1/probe?bytes={size}"
        with reaching(self.url), self._client.stream("GET", path, timeout=timeout) as answer:
            raise_for(answer)
            _check_probe(sum(len(piece) for piece in answer.iter_raw()), size)

    def _probe_up(self, size: int) -> None:
        block = memoryview(os.urandom(min(size, PROBE_BLOCK)))  # repeated: no help to a compressor all the same
        body = (bytes(block[: size - at]) for at in range(0, size, PROBE_BLOCK))
        timeout = httpx2.Timeout(PROBE_IDLE_S, connect=CONNECT_S)
        headers = {"Content-Length": str(size)}
        with (
            reaching(self.url),
            self._client.stream("PUT", "/v1/probe", content=body, headers=headers, timeout=timeout) as stream,
        ):
            answer = whole(stream)
        raise_for(answer)
        _check_probe(_understood(answer, Probed.model_validate_json).bytes, size)

    # ---------------------------------------------------------------- people and scripts

    def version(self) -> VersionView:
        """The coordinator's version; needs no token."""
        return self._ask(VersionView, "GET", "/version")

    def wall_clock(self) -> datetime | None:
        """The coordinator's clock, to the second, as it dates its answers; None where it does not. Decides nothing."""
        told = self._send("GET", "/version").headers.get("Date", "")
        with contextlib.suppress(ValueError):
            return parsedate_to_datetime(told)
        return None

    def submit_job(self, request: JobRequest) -> JobView:
        """Send a job. The same key again gives the same job."""
        # A private job's cost is found before it is taken, which takes seconds, more on a busy machine.
        return self._ask(JobView, "POST", "/v1/jobs", request, timeout=httpx2.Timeout(300.0))

    def jobs(self) -> list[JobView]:
        """All jobs, oldest first."""
        return _understood(self._send("GET", "/v1/jobs"), _JOBS.validate_json)

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

    def logs(self, job: str, after: int = 0) -> list[LogEntry]:
        """Every trouble of a job after the entry of this id, with its traceback."""
        wanted = {"after": after} if after else {}
        return _understood(self._send("GET", f"/v1/jobs/{_part(job)}/logs", params=wanted), _LOG.validate_json)

    def output(self, job: str) -> list[Output]:
        """What the task wrote last, on each worker that is at work for a job."""
        return _understood(self._send("GET", f"/v1/jobs/{_part(job)}/output"), _OUTPUT.validate_json)

    def workers(self) -> list[WorkerView]:
        """All workers that ever joined."""
        return _understood(self._send("GET", "/v1/workers"), _WORKERS.validate_json)

    def drain(self, worker: str) -> WorkerView:
        """Let a worker finish what it does and give it nothing more until it is resumed. By id or name."""
        return self._ask(WorkerView, "POST", f"/v1/workers/{_part(worker)}/drain")

    def pause_worker(self, worker: str) -> WorkerView:
        """Have a worker out of the way at once, until it is resumed."""
        return self._ask(WorkerView, "POST", f"/v1/workers/{_part(worker)}/pause")

    def resume_worker(self, worker: str) -> WorkerView:
        """Give a worker work again that was drained or paused."""
        return self._ask(WorkerView, "POST", f"/v1/workers/{_part(worker)}/resume")

    def readmit(self, worker: str) -> WorkerView:
        """Give a worker work again that was set aside, drained or paused."""
        return self._ask(WorkerView, "POST", f"/v1/workers/{_part(worker)}/readmit")

    def new_token(self, request: TokenRequest) -> TokenAnswer:
        """A new token."""
        return self._ask(TokenAnswer, "POST", "/v1/tokens", request)

    def audit(self, after: int = 0, **wanted: str | int) -> AuditPage:
        """Rows of the audit record after row `after`. `wanted`: limit, job, worker, action."""
        return self._ask(AuditPage, "GET", "/v1/audit", params={"after": after, **wanted})

    def tokens(self) -> list[TokenView]:
        """All tokens that were ever made, without their secrets."""
        return _understood(self._send("GET", "/v1/tokens"), _TOKENS.validate_json)

    def rotate_token(self, token: str, request: RotateRequest) -> RotateAnswer:
        """Give a token a second secret. By id or name, or a worker's; `own`: the one that this is called with."""
        return self._ask(RotateAnswer, "POST", f"/v1/tokens/{_part(token)}/rotate", request)

    def revoke_token(self, token: str, *, cancel_jobs: bool = False) -> RevokeAnswer:
        """Let a token count no more. By id or name, or a worker's. Its jobs go on, unless they are cancelled too."""
        params = {"cancel_jobs": "true"} if cancel_jobs else None
        return self._ask(RevokeAnswer, "POST", f"/v1/tokens/{_part(token)}/revoke", params=params)

    def pull(self, job: str, target: Path, *, which: str = "newest", on_bytes: OnBytes | None = None) -> int:
        """Fetch a job's model: `newest`, `best` or a round's number. Returns bytes received; resumes what broke."""
        return self._download(f"/v1/jobs/{_part(job)}/model?which={quote(which)}", target, on_bytes=on_bytes)

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
            pause_s = 0.5
            try:
                for event in self._stream(job, after):
                    away_since = None
                    after = event.get("id", after)
                    yield event
                    if event["type"] == "job" and event["state"] in OVER:
                        return
            except UnavailableError as error:
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > patience_s or error.code in guarding.REFUSALS:
                    raise
                pause_s = max(pause_s, error.retry_after_s if isinstance(error, TooManyError) else 0.0)
                on_wait(f"{error}; waiting for it to come back")
            time.sleep(pause_s)  # between two connections, never between two events

    # ---------------------------------------------------------------- the wire

    def _stream(self, job: str, after: int) -> Iterator[dict[str, Any]]:
        """One connection's worth of events."""
        headers = {"Last-Event-ID": str(after), "Accept": "text/event-stream"}
        path = f"/v1/jobs/{_part(job)}/events"
        asked = self._client.stream("GET", path, headers=headers, timeout=httpx2.Timeout(60.0))
        with reaching(self.url), asked as answer:
            raise_for(answer)
            for line in answer.iter_lines():
                if line.startswith("data:"):
                    yield _event(line[5:])

    def _upload(
        self, path: str, source: Path, resume: bool, stop: threading.Event | None, on_bytes: OnBytes | None
    ) -> int:
        held = _ranges(self._send("HEAD", path)) if resume else ()
        return Upload(self._client, self.url, path, source, held, stop, on_bytes=on_bytes, idle_s=self._idle_s).run()

    def _download(self, path: str, target: Path, **options: Any) -> int:  # noqa: ANN401
        return Download(self._client, self.url, path, target, idle_s=self._idle_s, **options).run()

    def _ask(self, kind: type[M], method: str, path: str, body: Message | None = None, **options: Any) -> M:  # noqa: ANN401
        return _understood(self._send(method, path, body, **options), kind.model_validate_json)

    def _ask_if_any(self, kind: type[M], path: str, body: Message) -> M | None:
        """Ask for what may not be there when the call has waited for it."""
        answer = self._send("POST", path, body, timeout=httpx2.Timeout(60.0))
        return None if answer.status_code == 204 else _understood(answer, kind.model_validate_json)

    def _send(self, method: str, path: str, body: Message | None = None, **options: Any) -> httpx2.Response:  # noqa: ANN401
        if body is not None:
            options["content"] = body.model_dump_json()
            options["headers"] = {"Content-Type": "application/json"}
        with reaching(self.url), self._client.stream(method, path, **options) as stream:
            answer = whole(stream)
        raise_for(answer)
        return answer


def _understood(answer: httpx2.Response, read: Callable[[bytes], T]) -> T:
    """What an answer says. One that cannot be read was damaged on the way, so the call is worth another try.

    Raises:
        UnavailableError: it cannot be read (`unreadable`).
    """
    try:
        return read(answer.content)
    except ValueError as error:  # ValidationError is one
        raise UnavailableError(
            f"{answer.request.url} answered something that this version does not understand: "
            + str(error).splitlines()[0],
            code="unreadable",
            advice="Is this the address of a coordinator, and is `lydian --version` the same on both sides?",
        ) from error


def _check_probe(came: int, sent: int) -> None:
    if came != sent:
        raise UnavailableError(f"of {sent} bytes to measure the line with, {came} came over", code="unreadable")


def _ranges(answer: httpx2.Response) -> Ranges:
    """The bytes of an upload that the coordinator holds; none where it does not say so in words that can be read."""
    try:
        return parse_ranges(answer.headers.get("Lydian-Ranges", ""))
    except BadRequestError:
        return ()


def _event(line: str) -> dict[str, Any]:
    """One event of a stream. A damaged one breaks the stream, which goes on after the last that was whole."""
    damaged = UnavailableError(f"an event cannot be read: {line[:80]!r}", code="unreadable")
    try:
        event: dict[str, Any] = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise damaged from error
    if not isinstance(event, dict) or not isinstance(event.get("type"), str):
        raise damaged
    if type(event.get("id", 0)) is not int:  # to go on after; JSON's true is an int to isinstance
        raise damaged
    return event


def _part(name: str) -> str:
    """A name as one piece of a path, whatever was typed."""
    return quote(name, safe="")
