"""Who may call what: every call of the application, by everyone there is, on what is theirs, another's, and not there.

    no token, one that is not ours, one that was revoked ──▶ 401, before anything else is looked at
    a token of another scope                              ──▶ 403
    another worker's things                               ──▶ 403 where the path names a worker, else 404

A call without a rule in RULES fails the test: whoever adds one says here whom it is for.
"""

import hashlib
import json
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from tests.rounds_kit import registration
from tests.trust_kit import JSON, METHODS, Answer, Fleet, routes_of, weights

Route = tuple[str, str]
NOBODY = ("no token", "token of another coordinator", "revoked admin token", "revoked work token")
KNOWN = ("join", "owner", "other", "admin")
SHELL = {("GET", path) for path in ("/", "/submit", "/jobs/{job}", "/static/{file}")}  # the same for everyone
PUBLIC = {("GET", "/healthz"), ("GET", "/version"), *SHELL}


@dataclass(frozen=True)
class Rule:
    """What each caller is answered, on a thing that is there: the owner's, where it can be owned."""

    join: int
    owner: int  # the worker whose thing it is; where nobody owns it, any worker
    other: int  # another worker
    admin: int
    missing: int | None = None  # to whoever's scope fits, of a thing that is not there; None: the path names none
    body: Callable[[Fleet], Any] | None = None  # bytes, or what becomes JSON
    query: str = ""

    def of(self, caller: str) -> int:
        return int(getattr(self, caller))


def admin_only(status: int = 200, **more: Any) -> Rule:
    return Rule(join=403, owner=403, other=403, admin=status, **more)


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


# In this order: what ends something comes last.
RULES: dict[Route, Rule] = {
    ("GET", "/healthz"): Rule(200, 200, 200, 200),
    ("GET", "/version"): Rule(200, 200, 200, 200),
    **{route: Rule(200, 200, 200, 200) for route in SHELL},
    ("GET", "/ui/fleet"): admin_only(),
    ("GET", "/ui/jobs"): admin_only(),
    ("GET", "/ui/live"): admin_only(query="job={job}", missing=404),
    ("GET", "/ui/jobs/{job}/series"): admin_only(missing=404),
    ("GET", "/ui/jobs/{job}/{part}"): admin_only(missing=404),
    ("GET", "/metrics"): admin_only(),
    ("GET", "/openapi.json"): Rule(403, 200, 200, 200),
    ("GET", "/v1/probe"): Rule(200, 200, 200, 200, query="bytes=8"),
    ("PUT", "/v1/probe"): Rule(200, 200, 200, 200, body=lambda _: b"12345678"),
    ("GET", "/v1/models/{digest}"): Rule(403, 200, 200, 200, missing=404),
    ("GET", "/v1/tasks/{digest}"): Rule(403, 200, 200, 200, missing=404),
    ("GET", "/v1/jobs"): admin_only(),
    ("GET", "/v1/jobs/{job}"): admin_only(missing=404),
    ("GET", "/v1/jobs/{job}/logs"): admin_only(missing=404),
    ("GET", "/v1/jobs/{job}/model"): admin_only(missing=404),
    ("GET", "/v1/jobs/{job}/events"): admin_only(missing=404),
    ("GET", "/v1/workers"): admin_only(),
    ("POST", "/v1/tokens"): admin_only(201, body=lambda _: {"scope": "join"}),
    ("POST", "/v1/jobs"): admin_only(201, body=job_request),
    # Workers. One that exists is told from one that does not by nobody but the admin.
    ("POST", "/v1/workers/{worker}/heartbeat"): Rule(403, 200, 403, 403, missing=403, body=beat),
    ("HEAD", "/v1/updates/{assignment}"): Rule(403, 200, 404, 403, missing=404, query="attempt={attempt}"),
    ("PUT", "/v1/updates/{assignment}"): Rule(403, 204, 404, 403, missing=404, query="attempt={attempt}", body=data),
    # The job sums nothing in secret: its own worker hears that there is no sum to join, and anybody that none is open.
    ("POST", "/v1/updates/{assignment}/keys"): Rule(403, 410, 404, 403, missing=404, body=keys),
    ("POST", "/v1/updates/{assignment}/shares"): Rule(
        403, 410, 404, 403, missing=404, body=lambda fleet: attempt(fleet, roster="d" * 64, sealed={})
    ),
    ("POST", "/v1/updates/{assignment}/reveal"): Rule(
        403, 410, 410, 403, missing=404, body=lambda fleet: attempt(fleet, roster="d" * 64, seeds={}, keys={})
    ),
    ("POST", "/v1/updates/{assignment}/submit"): Rule(403, 200, 404, 403, missing=404, body=submission),
    ("POST", "/v1/workers/{worker}/poll"): Rule(
        403, 200, 403, 403, missing=403, body=lambda _: {"start_id": "s1", "claim_key": "next", "wait_s": 0}
    ),
    ("POST", "/v1/updates/{assignment}/abandon"): Rule(
        403, 204, 404, 403, missing=404, body=lambda fleet: attempt(fleet, code="released", sentence="not now")
    ),
    ("POST", "/v1/workers"): Rule(
        200, 200, 200, 403, body=lambda _: registration("again", trust="any").model_dump(mode="json")
    ),
    ("POST", "/v1/workers/{worker}/leave"): Rule(403, 204, 403, 403, missing=403, query="start_id=s1"),
    ("POST", "/v1/workers/{worker}/drain"): admin_only(missing=404),
    ("POST", "/v1/workers/{worker}/pause"): admin_only(missing=404),
    ("POST", "/v1/workers/{worker}/resume"): admin_only(missing=404),
    ("POST", "/v1/workers/{worker}/readmit"): admin_only(missing=404),
    ("POST", "/v1/jobs/{job}/pause"): admin_only(missing=404),
    ("POST", "/v1/jobs/{job}/resume"): admin_only(missing=404),
    ("POST", "/v1/jobs/{job}/cancel"): admin_only(missing=404),
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
    shell = {"file": "app.js", "part": "log"}
    absent = {"job": "no-such", "worker": "nobody-0", "assignment": "no-such.train.1.0", "digest": "0" * 64}
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
    return {
        "no token": None,
        "token of another coordinator": f"lyd_admin_{secrets.token_hex(6)}_{secrets.token_urlsafe(32)}",
        "revoked admin token": revoked["admin"],
        "revoked work token": revoked["work"],
        "join": fleet.join,
        "owner": fleet.one.token,
        "other": fleet.two.token,
        "admin": fleet.admin,
    }


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
    state = fleet.rows(), fleet.files()

    def check(route: Route, caller: str, wanted: int, *, there: bool) -> None:
        nonlocal cases, state
        cases += 1
        answer = send(fleet, route, held[caller], there=there)
        what = f"{' '.join(route)} by {caller}, {'there' if there else 'not there'}"
        if answer.status != wanted:
            wrong.append(f"{what}: {answer.status} {answer.code}, and not {wanted}")
        before, state = state, (fleet.rows(), fleet.files())
        if wanted >= 400 and state != before:
            wrong.append(f"{what}: refused with {answer.status}, and changed something")
        if wanted == 401 and answer.headers.get("www-authenticate") != "Bearer":
            wrong.append(f"{what}: does not say that a token is wanted")

    for route, rule in RULES.items():
        if route[1].endswith("/abandon"):
            fleet.work = fleet.assignment(fleet.one)  # what it had was handed in
            state = fleet.rows(), fleet.files()
        public = route in PUBLIC
        for there in [True] if rule.missing is None else [False, True]:
            for caller in NOBODY:
                check(route, caller, 200 if public else 401, there=there)
        for there in [True] if rule.missing is None else [False, True]:  # refusals first: the last may end the thing
            for caller in sorted(KNOWN, key=rule.of, reverse=True):
                scope_fits = rule.of(caller) != 403
                missing = rule.missing if scope_fits and rule.missing is not None else 403
                check(route, caller, rule.of(caller) if there else missing, there=there)
    assert wrong == []
    assert cases == sum(8 * (1 if rule.missing is None else 2) for rule in RULES.values())
    assert cases >= 400
    assert fleet.call("GET", "/healthz").status == 200


def test_a_method_that_a_path_has_not_is_no_call_for_anyone(lasting: Fleet) -> None:
    known, wrong, cases = routes_of(lasting.app), list[str](), 0
    for _, path in sorted(known):
        for method in METHODS:
            if (method, path) in known:
                continue
            filled = path.format(
                job=lasting.job, worker=lasting.one.id, assignment=lasting.work["id"], digest=lasting.model, part="log",
                file="app.js",
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
