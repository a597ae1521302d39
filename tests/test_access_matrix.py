"""Who may call what: every call of the application, by everyone there is, on what is theirs, another's, and not there.

    no token, one that is not ours, revoked, expired      ──▶ 401, before anything else is looked at
    a token of another scope                              ──▶ 403
    another worker's things                               ──▶ 403 where the path names a worker, else 404: not there
    another submitter's job                               ──▶ 403 to change it, since it may be seen; what may not be
                                                              seen, such as another's token, is not there: 404

A call without a rule in RULES fails the test: whoever adds one says here whom it is for.
"""

import hashlib
import json
import secrets
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from tests.rounds_kit import registration
from tests.trust_kit import JSON, METHODS, Answer, Fleet, routes_of, weights

Route = tuple[str, str]
NOBODY = ("no token", "token of another coordinator", "revoked admin token", "revoked work token", "expired token")
KNOWN = ("join", "owner", "other", "read", "submitter", "stranger", "admin")
SHELL = {("GET", path) for path in ("/", "/submit", "/jobs/{job}", "/static/{file}")}  # the same for everyone
PUBLIC = {("GET", "/healthz"), ("GET", "/version"), *SHELL}


@dataclass(frozen=True)
class Rule:
    """What each caller is answered, on a thing that is there: the owner's, where it can be owned."""

    join: int = 403
    owner: int = 403  # the worker whose thing it is; where nobody owns it, any worker
    other: int = 403  # another worker
    read: int = 403
    submitter: int = 403  # who submitted the job, or whose token it is
    stranger: int = 403  # another submitter
    admin: int = 403
    missing: int | None = None  # to whoever's scope fits, of a thing that is not there; None: the path names none
    body: Callable[[Fleet], Any] | None = None  # bytes, or what becomes JSON
    query: str = ""

    def of(self, caller: str) -> int:
        return int(getattr(self, caller))

    def reaches(self, caller: str) -> bool:
        """Whether the caller's scope fits: then it is told of what is not there, else it is not."""
        return self.of(caller) != 403 or (caller == "stranger" and self.submitter != 403)


def everyone(status: int = 200, **more: Any) -> Rule:
    return Rule(**dict.fromkeys(KNOWN, status), **more)


def admins(status: int = 200, **more: Any) -> Rule:
    return Rule(admin=status, **more)


def readers(status: int = 200, **more: Any) -> Rule:
    return Rule(read=status, submitter=status, stranger=status, admin=status, **more)


def workers_and_readers(**more: Any) -> Rule:
    return readers(owner=200, other=200, **more)


def submitters(status: int = 200, **more: Any) -> Rule:
    """The one who submitted the job, and admins; another submitter is told that it is not theirs."""
    return Rule(submitter=status, admin=status, missing=404, **more)


def of_worker(owner: int, other: int, missing: int, **more: Any) -> Rule:
    return Rule(owner=owner, other=other, missing=missing, **more)


def attempt(fleet: Fleet, **fields: Any) -> dict[str, Any]:
    return {"attempt": fleet.work["attempt"], **fields}


def data(fleet: Fleet) -> bytes:
    return weights(fleet.folder.parent / "update.safetensors")


def submission(fleet: Fleet) -> dict[str, Any]:
    return attempt(fleet, digest=hashlib.sha256(data(fleet)).hexdigest(), samples=5, seconds=0.1)


def beat(fleet: Fleet) -> dict[str, Any]:
    return attempt(fleet, start_id="s1", assignment=fleet.work["id"], progress={"doing": "training"})


def keys(fleet: Fleet) -> dict[str, Any]:
    return attempt(fleet, cipher_key="a" * 64, mask_key="b" * 64, seed_check="c" * 64)


def job_request(fleet: Fleet) -> dict[str, Any]:
    return {"key": "another", "spec": {"task": "digits", "data": {"shards": 2}}}


def token_request(fleet: Fleet) -> dict[str, Any]:
    return {"scope": "join", "uses": 1, "ttl_s": 60}


# In this order: what ends something comes last.
RULES: dict[Route, Rule] = {
    ("GET", "/healthz"): everyone(),
    ("GET", "/version"): everyone(),
    **{route: everyone() for route in SHELL},
    ("GET", "/ui/fleet"): readers(),
    ("GET", "/ui/jobs"): readers(),
    ("GET", "/ui/live"): readers(query="job={job}", missing=404),
    ("GET", "/ui/jobs/{job}/series"): readers(missing=404),
    ("GET", "/ui/jobs/{job}/{part}"): readers(missing=404),
    ("GET", "/v1/probe"): everyone(query="bytes=8"),
    ("PUT", "/v1/probe"): everyone(body=lambda _: b"12345678"),
    ("GET", "/openapi.json"): workers_and_readers(),
    ("GET", "/v1/models/{digest}"): workers_and_readers(missing=404),
    ("HEAD", "/v1/models/{digest}"): Rule(submitter=200, stranger=200, admin=200),
    ("PUT", "/v1/models/{digest}"): Rule(submitter=204, stranger=204, admin=204, body=data),
    ("GET", "/v1/tasks/{digest}"): Rule(owner=200, other=200, admin=200, missing=404),
    ("GET", "/metrics"): readers(),
    ("GET", "/v1/jobs"): readers(),
    ("GET", "/v1/jobs/{job}"): readers(missing=404),
    ("GET", "/v1/jobs/{job}/logs"): readers(missing=404),
    ("GET", "/v1/jobs/{job}/output"): readers(missing=404),
    ("GET", "/v1/jobs/{job}/model"): readers(missing=404),
    ("GET", "/v1/jobs/{job}/events"): readers(missing=404),
    ("GET", "/v1/workers"): readers(),
    ("GET", "/v1/audit"): admins(),
    ("GET", "/v1/tokens"): admins(),
    ("POST", "/v1/tokens"): admins(201, body=token_request),
    # The token is the first submitter's: whoever is no admin sees none but its own.
    ("POST", "/v1/tokens/{token}/rotate"): Rule(
        read=404, submitter=200, stranger=404, admin=200, missing=404, body=lambda _: {"overlap_s": 3600}
    ),
    ("POST", "/v1/jobs"): Rule(submitter=201, stranger=409, admin=409, body=job_request),  # one key, one submitter
    # Workers. One that exists is told from one that does not by nobody but who may list them.
    ("POST", "/v1/workers/{worker}/heartbeat"): of_worker(200, 403, 403, body=beat),
    ("HEAD", "/v1/updates/{assignment}"): of_worker(200, 404, 404, query="attempt={attempt}"),
    ("PUT", "/v1/updates/{assignment}"): of_worker(204, 404, 404, query="attempt={attempt}", body=data),
    # The job sums nothing in secret: its own worker hears that there is no sum to join.
    ("POST", "/v1/updates/{assignment}/keys"): of_worker(410, 404, 404, body=keys),
    ("POST", "/v1/updates/{assignment}/shares"): of_worker(
        410, 404, 404, body=lambda fleet: attempt(fleet, roster="d" * 64, sealed={})
    ),
    ("POST", "/v1/updates/{assignment}/reveal"): of_worker(
        410, 404, 404, body=lambda fleet: attempt(fleet, roster="d" * 64, seeds={}, keys={})
    ),
    ("POST", "/v1/updates/{assignment}/submit"): of_worker(200, 404, 404, body=submission),
    ("POST", "/v1/workers/{worker}/poll"): of_worker(
        200, 403, 403, body=lambda _: {"start_id": "s1", "claim_key": "next", "wait_s": 0}
    ),
    ("POST", "/v1/updates/{assignment}/abandon"): of_worker(
        204, 404, 404, body=lambda fleet: attempt(fleet, code="released", sentence="not now")
    ),
    ("POST", "/v1/workers"): Rule(
        join=200, owner=200, other=200, body=lambda _: registration("again", trust="any").model_dump(mode="json")
    ),
    ("POST", "/v1/workers/{worker}/leave"): of_worker(204, 403, 403, query="start_id=s1"),
    ("POST", "/v1/workers/{worker}/drain"): admins(missing=404),
    ("POST", "/v1/workers/{worker}/pause"): admins(missing=404),
    ("POST", "/v1/workers/{worker}/resume"): admins(missing=404),
    ("POST", "/v1/workers/{worker}/readmit"): admins(missing=404),
    ("POST", "/v1/jobs/{job}/pause"): submitters(),
    ("POST", "/v1/jobs/{job}/resume"): submitters(),
    ("POST", "/v1/jobs/{job}/cancel"): submitters(),
    ("POST", "/v1/tokens/{token}/revoke"): admins(missing=404),
}


# ---------------------------------------------------------------- the calls


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    running = Fleet(tmp_path / "state")
    yield running
    running.close()


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """For tests that change nothing."""
    running = Fleet(tmp_path_factory.mktemp("lasting") / "state")
    yield running
    running.close()


def target(fleet: Fleet, route: Route, *, there: bool) -> str:
    """The path of a call, with a thing in it that is there, the first worker's where it has an owner, or with none."""
    _, path = route
    digest = fleet.task if "/tasks/" in path else fleet.model
    present = {"job": fleet.job, "worker": fleet.one.id, "assignment": fleet.work["id"], "digest": digest}
    present["token"] = fleet.submitter.split("_")[2]
    shell = {"file": "app.js", "part": "log"}
    absent = {"job": "no-such", "worker": "nobody-0", "assignment": "no-such.train.1.0", "digest": "0" * 64}
    absent["token"] = "0" * 12
    names = {**(present if there else absent), **shell}
    filled = path.format(**names)
    query = RULES[route].query.format(attempt=fleet.work["attempt"], job=names["job"])
    return f"{filled}?{query}" if query else filled


def send(fleet: Fleet, route: Route, token: str | None, *, there: bool = True) -> Answer:
    make = RULES[route].body
    body = make(fleet) if make is not None else b""
    headers = {} if isinstance(body, bytes) else JSON
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    return fleet.call(route[0], target(fleet, route, there=there), token, sent, headers)


def tokens(fleet: Fleet) -> dict[str, str | None]:
    """Caller -> token."""
    issued = fleet.coordinator.tokens
    revoked = {"admin": issued.issue("admin"), "work": issued.issue("work", worker=fleet.one.id)}
    for token in revoked.values():
        issued.revoke(token.split("_")[2])
    issued.issue("work", worker=fleet.one.id)  # so that the revoked one is not the worker's newest
    return {
        "no token": None,
        "token of another coordinator": f"lyd_admin_{secrets.token_hex(6)}_{secrets.token_urlsafe(32)}",
        "revoked admin token": revoked["admin"],
        "revoked work token": revoked["work"],
        "expired token": issued.issue("admin", ttl_s=1e-9),
        "join": fleet.join,
        "owner": fleet.one.token,
        "other": fleet.two.token,
        "read": fleet.reader,
        "submitter": fleet.submitter,
        "stranger": fleet.other_submitter,
        "admin": fleet.admin,
    }


class Kept:
    """All that a call could change, but when a token was used last. Read anew only when something was committed."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet, self._version, self._rows = fleet, -1, dict[str, list[Any]]()
        path = fleet.folder / "journal.sqlite"
        self._database = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)

    def look(self) -> tuple[dict[str, list[Any]], dict[str, int]]:
        (version,) = self._database.execute("PRAGMA data_version").fetchone()
        if version != self._version:
            rows = {name: rows for name, rows in self._fleet.rows().items() if name not in ("token_seen", "calendar")}
            self._version, self._rows = version, rows
        return self._rows, self._fleet.files()

    def close(self) -> None:
        self._database.close()


def without_rule(app: FastAPI) -> set[Route]:
    return routes_of(app) - RULES.keys()


# ---------------------------------------------------------------- the matrix


def test_every_call_has_a_rule_and_every_rule_a_call(fleet: Fleet) -> None:
    assert without_rule(fleet.app) == set(), "a new call: say in RULES whom it is for"
    assert RULES.keys() - routes_of(fleet.app) == set(), "a rule of a call that is gone"


def test_a_call_that_was_forgotten_is_named(fleet: Fleet) -> None:
    fleet.app.add_api_route("/v1/forgotten", lambda: None, methods=["DELETE"])
    assert without_rule(fleet.app) == {("DELETE", "/v1/forgotten")}


def test_everyone_is_answered_by_the_rule_of_the_call_and_a_refusal_changes_nothing(fleet: Fleet) -> None:
    held, wrong, cases = tokens(fleet), list[str](), 0
    kept = Kept(fleet)
    state = kept.look()

    def check(route: Route, caller: str, wanted: int, *, there: bool) -> None:
        nonlocal cases, state
        cases += 1
        answer = send(fleet, route, held[caller], there=there)
        what = f"{' '.join(route)} by {caller}, {'there' if there else 'not there'}"
        if answer.status != wanted:
            wrong.append(f"{what}: {answer.status} {answer.code}, and not {wanted}")
        if wanted == 401 and answer.headers.get("www-authenticate") != "Bearer":
            wrong.append(f"{what}: does not say that a token is wanted")
        before, state = state, kept.look()
        if wanted >= 400 and state != before:
            wrong.append(f"{what}: refused with {answer.status}, and changed something")

    for route, rule in RULES.items():
        if route[1].endswith("/abandon"):
            fleet.work = fleet.assignment(fleet.one)  # what it had was handed in
            state = kept.look()
        public = route in PUBLIC
        for there in [True] if rule.missing is None else [False, True]:
            for caller in NOBODY:
                check(route, caller, 200 if public else 401, there=there)
        for there in [True] if rule.missing is None else [False, True]:  # refusals first: the last may end the thing
            for caller in sorted(KNOWN, key=rule.of, reverse=route != ("POST", "/v1/jobs")):
                missing = rule.missing if rule.reaches(caller) and rule.missing is not None else 403
                check(route, caller, rule.of(caller) if there else missing, there=there)
    kept.close()
    assert wrong == []
    objects = sum(1 if rule.missing is None else 2 for rule in RULES.values())
    print(f"{cases} cases: {len(RULES)} calls, {len(NOBODY) + len(KNOWN)} callers, things there and not there")
    assert (len(RULES), cases) == (len(routes_of(fleet.app)), objects * (len(NOBODY) + len(KNOWN)))
    assert cases >= 744
    assert fleet.call("GET", "/healthz").status == 200


def test_a_method_that_a_path_has_not_is_no_call_for_anyone(lasting: Fleet) -> None:
    known, wrong, cases = routes_of(lasting.app), list[str](), 0
    for _, path in sorted(known):
        for method in METHODS:
            if (method, path) in known:
                continue
            filled = path.format(
                job=lasting.job, worker=lasting.one.id, assignment=lasting.work["id"], digest=lasting.model, part="log",
                file="app.js", token="0" * 12,
            )  # fmt: skip
            for caller, token in (("nobody", None), ("owner", lasting.one.token), ("admin", lasting.admin)):
                cases += 1
                answer = lasting.call(method, filled, token)
                if (answer.status, answer.code) != (405, "no_such_call"):
                    wrong.append(f"{method} {path} by {caller}: {answer.status} {answer.code}")
    assert wrong == []
    assert cases >= 300


@pytest.mark.parametrize(
    "path",
    [
        "/ui",
        "/static/",
        "/static/..%2fmarkup.py",
        "/docs",
        "/redoc",
        "/v1",
        "/v1/",
        "/v1/jobs/",
        "/admin.token",
        "/v1/tokens/x",
        "/v1/tokens/x/y",
    ],
)
def test_what_is_no_call_tells_nobody_anything(lasting: Fleet, path: str) -> None:
    for token in (None, lasting.admin):
        answer = lasting.call("GET", path, token)
        assert (answer.status in (404, 307), lasting.admin.encode() in answer.body) == (True, False)


def test_a_stranger_is_refused_before_a_byte_of_the_body_is_read(lasting: Fleet) -> None:
    for method, path in RULES:
        if method not in ("POST", "PUT"):
            continue
        filled = target(lasting, (method, path), there=True)
        answer = lasting.call(method, filled, None, b"{ this is not JSON", JSON)
        assert (answer.status, answer.code, answer.headers.get("connection")) == (401, "no_token", "close")
