"""Every error that a user, a worker or a script can meet.

    LydianError                      500  something that should not happen
    ├── BadRequestError              400  the call itself is malformed
    ├── UnauthenticatedError         401  no token, or one that is not known
    ├── ForbiddenError               403  a known token that may not do this
    ├── NotFoundError                404  no such job, worker, model, round, assignment
    ├── TooSlowError                 408  a body stood still, or came below the least rate
    ├── TooLargeError                413  a body beyond what this call may have
    ├── ConflictError                409  true once, not any more
    │   ├── SupersededError               another attempt of this task counts
    │   └── JobOverError                  the job has ended
    ├── LateError                    410  the round closed before this update came
    ├── RefusedError                 422  understood, and not acceptable
    │   ├── BadJobError                   a job file or option is wrong
    │   ├── BadTaskError                  a task file is wrong
    │   └── BadUpdateError                an update does not fit the model, or is not finite
    ├── VersionSkewError             426  one side must be upgraded
    ├── UnavailableError             503  not now: shutting down, or out of reach
    │   └── TooManyError             429  this caller has, or does, too much just now
    └── DiskFullError                507  no room for what was announced

The class carries the HTTP status and a stable code; the message says in one sentence what happened, with the values;
`advice` says what to do. Over HTTP it is `{"code", "sentence", "advice"}`; `from_answer` makes it the same class again.
"""

from typing import Any, ClassVar


class LydianError(Exception):
    """Something went wrong that a person should hear about: `str(error)` is the sentence, `advice` the way out."""

    status: ClassVar[int] = 500
    code: str = "internal"
    advice: str = "Look into the log of the coordinator for the traceback."

    def __init__(self, sentence: str, *, advice: str | None = None, code: str | None = None) -> None:
        super().__init__(sentence)
        if advice is not None:
            self.advice = advice
        if code is not None:
            self.code = code

    def answer(self) -> dict[str, str]:
        """The JSON body of this error."""
        return {"code": self.code, "sentence": str(self), "advice": self.advice}

    def lines(self) -> str:
        """The sentence and the advice, as a command prints them."""
        return f"{self}\n{self.advice}" if self.advice else str(self)


class BadRequestError(LydianError):
    """The call is malformed: not JSON, an unknown field, a header that does not parse."""

    status = 400
    code = "bad_request"
    advice = "See docs/protocol.md for the shape of this call; are both sides of the same version?"


class UnauthenticatedError(LydianError):
    """No token came with the call, or one that this coordinator does not know."""

    status = 401
    code = "bad_token"
    advice = "Set LYDIAN_TOKEN; `lydian token create` and `lydian token join` on the coordinator's machine make tokens."


class ForbiddenError(LydianError):
    """The token is known and may not do this."""

    status = 403
    code = "forbidden"
    advice = "Use a token that may: of scope submit or admin for jobs, a join token for a new worker (`lydian token`)."


class NotFoundError(LydianError):
    """No such thing here. The code says which: unknown_job, unknown_worker, unknown_model, …"""

    status = 404
    code = "not_found"
    advice = "`lydian jobs` and `lydian workers` list what there is."


class TooSlowError(LydianError):
    """A body stood still for too long, or came too slowly; what came of an upload is kept."""

    status = 408
    code = "too_slow"
    advice = "Send the rest: HEAD on an upload says which bytes are here."


class TooLargeError(LydianError):
    """A body has more bytes than its call may have; nothing of it was kept."""

    status = 413
    code = "too_large"
    advice = "See docs/protocol.md for the size of this call's body."


class ConflictError(LydianError):
    """The call was right once and is not any more."""

    status = 409
    code = "conflict"
    advice = "Ask again for the present state."


class SupersededError(ConflictError):
    """Another attempt of this task counts. The worker drops its work and asks for new."""

    code = "superseded"
    advice = "Drop this work and poll for new."


class JobOverError(ConflictError):
    """The job has finished, failed or been cancelled, and takes nothing more."""

    code = "job_over"
    advice = "Submit a new job; `lydian pull` still fetches the models of this one."


class LateError(LydianError):
    """The round closed without this update."""

    status = 410
    code = "late"
    advice = "Drop this work and poll for new."


class RefusedError(LydianError):
    """Understood, and not acceptable."""

    status = 422
    code = "refused"
    advice = "Mend what the sentence names and send it again."


class BadJobError(RefusedError):
    """A job file, a flag or a setting is wrong."""

    code = "bad_job"
    advice = "See `lydian submit --help` for every key."


class BadTaskError(RefusedError):
    """A task file cannot be used: syntax, missing functions, not on this machine."""

    code = "bad_task"
    advice = "A task file defines model(config) and dataset(config, split); see examples/."


class BadUpdateError(RefusedError):
    """An update that must not count. The code says why: not_finite, wrong_shape, missing_tensor, digest_mismatch, …"""

    code = "bad_update"
    advice = "The update was not used; the shard is handed out again."


class VersionSkewError(LydianError):
    """The two sides speak protocols too far apart."""

    status = 426
    code = "version_skew"
    advice = "Upgrade the older side."


class UnavailableError(LydianError):
    """Not now: the coordinator is stopping, or cannot be reached."""

    status = 503
    code = "unavailable"
    advice = "Try again in a moment."


class TooManyError(UnavailableError):
    """The caller makes too many calls, or has too much at once. `retry_after_s`: when it may help to try again."""

    status = 429
    code = "too_many_calls"
    advice = "Wait a moment between two calls; docs/security.md lists the limits and how to raise them."

    def __init__(
        self, sentence: str, *, advice: str | None = None, code: str | None = None, retry_after_s: float = 0.0
    ) -> None:
        super().__init__(sentence, advice=advice, code=code)
        self.retry_after_s = retry_after_s  # 0: time alone does not help


class DiskFullError(LydianError):
    """There is no room for what was announced; nothing was written."""

    status = 507
    code = "disk_full"
    advice = "Free space in the state folder, or start with another --state-dir."


SAID = 8_000  # characters of a sentence that are believed: ours have 2,000 at most

_FAMILY: tuple[type[LydianError], ...] = (
    SupersededError, JobOverError, BadJobError, BadTaskError, BadUpdateError,  # told apart by code, first
    BadRequestError, UnauthenticatedError, ForbiddenError, NotFoundError, TooSlowError, TooLargeError, ConflictError,
    LateError, RefusedError, VersionSkewError, UnavailableError, TooManyError, DiskFullError,
)  # fmt: skip


def from_answer(status: int, body: Any) -> LydianError:  # noqa: ANN401 - whatever the other side sent
    """The error that the other side answered with, as the class it was.

    Args:
        status: the HTTP status.
        body: the decoded JSON body; anything that is not ours becomes a plain sentence with the status.
    """
    if not isinstance(body, dict) or not (body.get("code") is not None and body.get("sentence")):
        sentence = f"the other side answered HTTP {status}: {_shown(body, 300)}"
        return LydianError(sentence, advice="Is this URL a coordinator?")
    code, sentence, advice = (_shown(body.get(name, ""), SAID) for name in ("code", "sentence", "advice"))
    by_code = [kind for kind in _FAMILY if kind.code == code]
    by_status = [kind for kind in reversed(_FAMILY) if kind.status == status]
    kind = (by_code + by_status + [LydianError])[0]
    if not by_code and status == BadUpdateError.status and code in BAD_UPDATE_CODES:
        kind = BadUpdateError
    return kind(sentence, advice=advice, code=code)


def _shown(said: object, most: int) -> str:
    """What the other side said as it can be printed and logged: cut, and without half a surrogate pair."""
    return str(said)[:most].encode(errors="replace").decode()


BAD_UPDATE_CODES = frozenset({
    "digest_mismatch", "wrong_length", "bad_header", "missing_tensor", "extra_tensor", "wrong_shape", "wrong_dtype",
    "not_finite", "norm_bound", "bad_samples", "bad_encoding",
})  # fmt: skip
