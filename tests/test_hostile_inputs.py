"""What a stranger, a worker or a submitter may send to do harm: each is refused by its own status and code, leaves
nothing behind, and the application answers the next call.

    CALLS ──the real application──▶ status, code; journal and files as they were; /healthz
    FILES ──server.inspection─────▶ code; never more memory than a header
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from common.errors import BadUpdateError
from common.link import LARGEST
from common.weights import HEADER_LIMIT
from server.bodies import MESSAGE_BYTES
from server.inspection import inspect
from tests.rounds_kit import registration
from tests.trust_kit import HOST, JSON, METHODS, Answer, Fleet, weights

MARKUP = "<img src=x onerror=alert(1)>"
PATHS = ("../../etc/passwd", "/etc/passwd", "a/b", "a\\b", "file:///etc/passwd", "http://169.254.169.254/", "a\0b", "")
HUGE = "1" + "0" * 400


@dataclass(frozen=True)
class Case:
    """One call, and how it is refused. {…} in its target is filled in; `by` names one of the fleet's tokens."""

    name: str
    status: int
    code: str
    method: str
    target: str
    by: str = "admin"
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    hosts: tuple[str, ...] = (HOST,)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    running = Fleet(tmp_path_factory.mktemp("hostile") / "state")
    yield running
    running.close()


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


# ---------------------------------------------------------------- tokens

TOKEN = f"lyd_admin_0123456789ab_{'x' * 43}"


def token_cases() -> Iterator[Case]:
    headers = {
        "another scheme": "Basic {admin}", "no scheme": "{admin}", "no token": "Bearer",
        "two tokens": "Bearer {admin} {join}",
        "unknown": f"Bearer {TOKEN}", "another scope": "Bearer lyd_root_0123456789ab_" + "x" * 43,
        "long": "Bearer " + "x" * 60_000, "NUL": "Bearer {admin}\0", "not ASCII": "Bearer {admin}\xe9",
        "a path behind it": "Bearer {admin}@../../x", "cut": "Bearer {cut}", "one more letter": "Bearer {admin}x",
        "join's secret as admin's": "Bearer {crossed}", "in capitals": "Bearer {capitals}",
        "markup": f"Bearer {MARKUP}",
    }  # fmt: skip
    for name, value in headers.items():
        yield Case(f"token: {name}", 401, "bad_token", "GET", "/v1/jobs", "", headers={"Authorization": value})
    elsewhere = {"Cookie": "token={admin}", "X-Forwarded-For": "127.0.0.1", "X-Api-Key": "{admin}"}
    for name, value in elsewhere.items():
        yield Case(f"token: in {name}", 401, "no_token", "GET", "/v1/jobs", "", headers={name: value})
    yield Case("token: in the query", 401, "no_token", "GET", "/v1/jobs?token={admin}&access_token={admin}", "")


# ---------------------------------------------------------------- names

REBOUND = (
    "rebound.example:8470", "127.0.0.1.rebound.example", "localhost.rebound.example:8470", "rebound-127-0-0-1.example",
    "0.0.0.0:8470", "[::]:8470", "169.254.169.254", "192.0.2.8:8470", "www.127.0.0.1.nip.io", "x" * 63 + ".example",
)  # fmt: skip
NO_HOST = (
    "", " ", "\0", f"{HOST}\0", f"{HOST} ", f"{HOST}\r\nX: y", f"{HOST}, {HOST}", f"user@{HOST}", f"http://{HOST}",
    "[::1", "127.0.0.1:99999", "127.0.0.1:8470:8470", "127.1", "2130706433", "loc\xe4lhost", "\xff", "%6c%6f", MARKUP,
    "x" * 60_000,
)  # fmt: skip
PAGES = (
    "http://rebound.example", "null", "", "*", "http://127.0.0.1", "https://127.0.0.1:8470", "http://localhost:8470",
    f"http://{HOST}/", f"http://{HOST}.evil.example", f"http://{HOST}@evil.example", f"http://{HOST}\0", "\xff", MARKUP,
)  # fmt: skip


def name_cases() -> Iterator[Case]:
    """Who was led here by another's name, or by another's page; with the best of tokens."""
    for host in REBOUND:
        yield Case(f"host {host[-40:]!r}", 403, "host_not_allowed", "GET", "/v1/jobs", hosts=(host,))
    for host in NO_HOST:
        yield Case(f"host {host[-40:]!r}", 400, "unclear_host", "GET", "/v1/jobs", hosts=(host,))
    yield Case("no host", 400, "unclear_host", "GET", "/v1/jobs", hosts=())
    yield Case("two hosts", 400, "unclear_host", "GET", "/v1/jobs", hosts=(HOST, REBOUND[0]))
    yield Case("the same host twice", 400, "unclear_host", "GET", "/v1/jobs", hosts=(HOST, HOST))
    for page in PAGES:
        headers = {"Origin": page}
        yield Case(f"origin {page[:40]!r}", 403, "origin_not_allowed", "POST", "/v1/tokens", headers=headers)
    for name in ("X-Forwarded-Host", "Forwarded", "X-Original-Host", "X-Host"):
        headers = {name: f"host={HOST}" if name == "Forwarded" else HOST}
        what = f"our host in {name}"
        yield Case(what, 403, "host_not_allowed", "GET", "/v1/jobs", headers=headers, hosts=REBOUND[:1])
    for method in METHODS:
        for path in ("/healthz", "/version", "/no/such", "/v1/jobs", "*", f"http://{HOST}/healthz"):
            what = f"{method} {path}"
            yield Case(f"host: {what}", 403, "host_not_allowed", method, path, "", hosts=REBOUND[:1])
            foreign = {"Origin": "http://evil.example"}
            yield Case(f"origin: {what}", 403, "origin_not_allowed", method, path, headers=foreign)


# ---------------------------------------------------------------- jobs

WRONG_IN_A_JOB: dict[str, Any] = {
    "a URL": {"url": "http://169.254.169.254/"},
    "a file": {"file": "/etc/passwd"},
    "a class": {"__class__": "os.system"},
    "a URL in a section": {"data": {"url": "file:///etc/passwd"}},
    "a command in a section": {"train": {"command": "rm -rf /"}},
    "a dunder attribute": {"data": {"partition": "natural", "by": "__class__"}},
    "a dotted attribute": {"data": {"partition": "natural", "by": "a.b"}},
    "no rounds": {"rounds": 0},
    "rounds below 0": {"rounds": -1},
    "rounds without end": {"rounds": 10**18},
    "rounds as a fraction": {"rounds": 1.5},
    "rounds as NaN": {"rounds": math.nan},
    "seed beyond 63 bits": {"seed": 2**63},
    "lr NaN": {"train": {"lr": math.nan}},
    "proximal infinite": {"train": {"proximal": math.inf}},
    "clip_norm infinite": {"aggregation": {"robust": "clip", "clip_norm": math.inf}},
    "batch below 1": {"train": {"batch_size": -(2**63)}},
    "too many shards": {"data": {"shards": 10**9}},
    "fraction above 1": {"data": {"fraction": 2}},
    "too many patterns": {"train": {"frozen": ["x"] * 1_001}},
    "a long pattern": {"train": {"frozen": ["x" * 201]}},
    "an object in config": {"config": {"a": {"b": 1}}},
    "a list of lists in config": {"config": {"a": [[1]]}},
    "a section as text": {"train": "x"},
    "half a surrogate pair": {"target_metric": "\ud800"},
    "half a surrogate pair as a key": {"config": {"\ud800": 1}},
    "a text beyond any bound": {"target_metric": "x" * (1 << 22) * 2},
}


def job_cases() -> Iterator[Case]:
    def job(name: str, body: bytes, status: int = 400, code: str = "bad_request", **headers: str) -> Case:
        return Case(f"job: {name}", status, code, "POST", "/v1/jobs", body=body, headers=JSON | headers)

    for name, fields in WRONG_IN_A_JOB.items():
        too_large = name == "a text beyond any bound"
        body = as_json({"key": "hostile", "spec": {"task": "digits", **fields}})
        yield job(name, body, *((413, "too_large") if too_large else ()))
    for where in PATHS:
        yield job(f"task {where!r}", as_json({"key": "hostile", "spec": {"task": where}}))
        yield job(f"name {where!r}", as_json({"key": "hostile", "spec": {"task": "digits", "name": where}}))
        data = {"task": "digits", "data": {"name": where}}
        yield job(f"data {where!r}", as_json({"key": "hostile", "spec": data}))
    yield job("name with markup", as_json({"key": "hostile", "spec": {"task": "digits", "name": MARKUP}}))
    yield job("a task that is not built in", as_json({"key": "h", "spec": {"task": "os"}}), 422, "bad_task")
    long_file = {"key": "h", "spec": {"task": "t"}, "task_source": "#" * (1 << 21)}
    yield job("a task file that is too long", as_json(long_file))
    yield job("a key of 201 letters", as_json({"key": "k" * 201, "spec": {"task": "digits"}}))
    yield job("a field beside the spec", as_json({"key": "h", "spec": {"task": "digits"}, "admin": True}))
    yield job("a number of 400 digits", b'{"key": "h", "spec": {"task": "digits", "rounds": ' + HUGE.encode() + b"}}")
    yield job("a number of 5,000 digits", b'{"key": "h", "spec": {"task": "digits", "seed": ' + b"9" * 5_000 + b"}}")
    yield job("100,000 brackets", b"[" * 100_000)
    yield job("100,000 objects", b'{"a":' * 100_000)
    yield job("UTF-16", as_json({"key": "h", "spec": {"task": "digits"}}).decode().encode("utf-16-le")[1:])
    yield job("not UTF-8", b'{"key": "\xff\xfe"}')
    yield job("not JSON", b"\x80\x04\x95pickle")
    for value in (b"null", b"[]", b'"x"', b"1", b"true", b"{}"):
        yield job(f"only {value.decode()}", value)
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    yield job("a form", b'--x\r\nContent-Disposition: form-data; name="spec"\r\n\r\n{}\r\n--x--', **form)
    yield job("announced beyond any bound", b"{", 413, "too_large", **{"Content-Length": str(MESSAGE_BYTES + 1)})
    yield job("announced as 10^18", b"{", 413, "too_large", **{"Content-Length": str(10**18)})


# ---------------------------------------------------------------- workers


def worker_cases() -> Iterator[Case]:
    def joins(name: str, change: dict[str, Any], status: int = 400, code: str = "bad_request") -> Case:
        fields = registration("w").model_dump(mode="json")
        hardware = fields["hardware"] | change.pop("hardware", {})
        body = as_json(fields | change | {"hardware": hardware})
        return Case(f"worker: {name}", status, code, "POST", "/v1/workers", "join", body, JSON)

    odd = ("a b", "n\u00e4me", "w\n", "w\r\nSet-Cookie: x", "x" * 64, "{{7*7}}", "$(id)", "\u202ew")
    for name in (*PATHS, MARKUP, *odd):
        yield joins(f"name {name[:20]!r}", {"name": name})
    yield joins("a protocol of 10^30", {"protocol": 10**30}, 426, "version_skew")
    yield joins("a protocol below 0", {"protocol": -1}, 426, "version_skew")
    yield joins("no cores", {"hardware": {"cores": 0}})
    yield joins("memory below 0", {"hardware": {"memory": -1}})
    yield joins("memory of 2^53", {"hardware": {"memory": 2**53}})
    yield joins("a host name of a megabyte", {"hardware": {"hostname": "h" * 1_000_000}}, 413, "too_large")
    yield joins("half a surrogate pair", {"hardware": {"hostname": "\ud800"}})
    yield joins("a data folder by path", {"data": ["../x"]})
    yield joins("10,001 things held", {"holding": [{"assignment": "a", "attempt": 1}] * 10_001})
    yield joins("a digest that is a path", {"trusted": ["../" * 21 + "x"]})
    yield joins("an unknown trust", {"trust": "everything"})
    yield joins("a scope of its own choice", {"scope": "admin"})

    def beats(name: str, status: int, code: str, **fields: Any) -> Case:
        whole = {"start_id": "s1", "assignment": "a", "attempt": 1, "progress": {"doing": "training"}} | fields
        return Case(f"beat: {name}", status, code, "POST", "/v1/workers/{one}/heartbeat", "one", as_json(whole), JSON)

    yield beats("a path as assignment", 400, "bad_request", assignment="../x")
    yield beats("no assignment", 404, "unknown_assignment")
    yield beats("attempt 0", 400, "bad_request", attempt=0)
    yield beats("step 2^53", 400, "bad_request", progress={"doing": "training", "step": 2**53})
    yield beats("doing something else", 400, "bad_request", progress={"doing": MARKUP})
    yield beats("another process's start", 409, "superseded", start_id="s0")
    for name, wait_s in (("for ever", 1e9), ("for NaN", math.nan), ("before now", -1)):
        body = as_json({"start_id": "s1", "claim_key": "c", "wait_s": wait_s})
        yield Case(f"poll {name}", 400, "bad_request", "POST", "/v1/workers/{one}/poll", "one", body, JSON)


# ---------------------------------------------------------------- updates


def update_cases() -> Iterator[Case]:
    here, there = "/v1/updates/{work}?attempt={attempt}", "/v1/updates/%s?attempt=1"

    def puts(name: str, span: str | None, status: int = 400, code: str = "bad_request", **headers: str) -> Case:
        given = headers | ({} if span is None else {"Content-Range": span})
        return Case(f"upload: {name}", status, code, "PUT", here, "one", b"0123456789", given)

    for span in (
        "bytes 0-9/*", "bytes */10", "bytes 9-0/10", "bytes 0-9/9", "bytes 0-99/10", "bytes 0-3/10", "items 0-9/10",
        "bytes -1-8/10", "bytes 0-9", "bytes 0x0-0x9/10", f"bytes 0-9/{'9' * 19}", "bytes 0-9/10, 0-9/10", MARKUP,
        "bytes 0-9/10\r\nX: y", "bytes=0-9", "bytes 1e0-9/10", f"bytes {HUGE}-9/10", "bytes \xb2-9/10",
    ):  # fmt: skip
        yield puts(f"range {span[:24]!r}", span)
    yield puts("a petabyte", f"bytes 0-9/{10**15}", 422, "wrong_length")
    yield puts("2^53 bytes at its end", f"bytes {2**53 - 10}-{2**53 - 1}/{2**53}", 422, "wrong_length")
    headers = {"none": "x", "no base64": MARKUP, "long": "e" * 8_193, "null": "bnVsbA==", "list": "W10="}
    for name, header in headers.items():
        yield puts(f"submission {name}", "bytes 0-9/10", **{"Lydian-Submission": header})
    names = (
        "..", "x.train.1", "x.train.1.0.0", "x.delete.1.0", "X.train.1.0", "x.train.-1.0", f"x.train.{HUGE}.0",
        "x.train.1.0\0", MARKUP.replace("/", ""), "x.train.\u0663.0",
    )  # fmt: skip
    for name in names:
        target = there % quote(name, safe="")
        yield Case(f"upload as {name[:20]!r}", 404, "unknown_assignment", "PUT", target, "one", b"0123456789")
    for name in ("{job}.train.01.0", "{job}.train.1.00", "{job}.train.\u0661.0"):
        what = f"upload by another spelling {name}"
        yield Case(what, 404, "unknown_assignment", "PUT", there % name, "one", b"0123456789")
    for path in ("/v1/updates/..%2f..%2fadmin.token?attempt=1", "/v1/updates/../../admin.token?attempt=1"):
        yield Case(f"upload to {path}", 404, "no_such_call", "PUT", path, "one", b"0123456789")
    for attempt in ("0", "-1", str(2**31), HUGE, "x", "1.5", "NaN", ""):
        target = "/v1/updates/{work}?attempt=" + attempt
        yield Case(f"upload of attempt {attempt[:9]!r}", 400, "bad_request", "PUT", target, "one", b"0123456789")
    wrong: dict[str, dict[str, Any]] = {
        "a path as digest": {"digest": "../" * 21 + "x"}, "a digest in capitals": {"digest": "A" * 64},
        "samples below 0": {"samples": -199}, "2^53 samples": {"samples": 2**53}, "NaN samples": {"samples": math.nan},
        "seconds below 0": {"seconds": -1}, "an infinite rate": {"rate_sum": math.inf},
        "101 metrics": {"metrics": {str(n): [0, 1] for n in range(101)}},
        "a metric that is a text": {"metrics": {"a": "x"}},
        "facts below 0": {"facts": {"parameters": -1, "train_samples": 1, "test_samples": 0}},
        "a field more": {"admin": True},
    }  # fmt: skip
    for name, fields in wrong.items():
        body = as_json({"attempt": 1, **fields})
        yield Case(f"result: {name}", 400, "bad_request", "POST", "/v1/updates/{work}/submit", "one", body, JSON)
    for name, attempt, by in (("of 10^30", 10**30, "one"), ("of another", 1, "two")):
        body = as_json({"attempt": attempt, "digest": "0" * 64, "samples": 5})
        yield Case(f"result {name}", 404, "unknown_attempt", "POST", "/v1/updates/{work}/submit", by, body, JSON)
    for name, value in (("code", "rm"), ("sentence", "x" * 2_001), ("detail", "x" * 200_001)):
        body = as_json({"attempt": 1, "code": "released", "sentence": "", name: value})
        yield Case(f"abandon: {name}", 400, "bad_request", "POST", "/v1/updates/{work}/abandon", "one", body, JSON)
    for name, fields in (("a short key", {"mask_key": "a"}), ("a key that is no hex", {"cipher_key": "g" * 64})):
        body = as_json({"attempt": 1, "cipher_key": "a" * 64, "mask_key": "b" * 64, "seed_check": "c" * 64, **fields})
        yield Case(f"keys: {name}", 400, "bad_request", "POST", "/v1/updates/{work}/keys", "one", body, JSON)


# ---------------------------------------------------------------- what is asked for


def question_cases() -> Iterator[Case]:
    for digest in ("A" * 64, "0" * 63, "0" * 65, "g" * 64, "..", "0" * 62 + "%00", "0" * 64 + "%0a"):
        for kind in ("models", "tasks"):
            yield Case(f"{kind}: {len(digest)} {digest[-5:]!r}", 400, "bad_request", "GET", f"/v1/{kind}/{digest}")
    for path in ("/v1/models/..%2f..%2fadmin.token", "/v1/jobs/{job}/../../../admin.token", "//admin.token"):
        yield Case(f"path {path}", 404, "no_such_call", "GET", path)
    for span in ("bytes=999999999-", "bytes=5-1", "items=0-1", "bytes=", f"bytes={'9' * 18}-{'9' * 18}"):
        status = 416 if span.startswith("bytes=9") else 400
        yield Case(f"range {span[:16]}", status, "bad_request", "GET", "/v1/models/{model}", headers={"Range": span})
    for which in ("-1", "..%2f..%2fx", "9" * 20, "%C2%B2", "%D9%A3", "newest%00", MARKUP[:20].replace("<", "%3C")):
        yield Case(f"model {which}", 404, "unknown_model", "GET", "/v1/jobs/{job}/model?which=" + which)
    yield Case("model of 21 digits", 400, "bad_request", "GET", "/v1/jobs/{job}/model?which=" + "9" * 21)
    for last in ("-1", "x", str(2**63), HUGE, "9" * 5_000, "NaN"):
        target = "/v1/jobs/{job}/events"
        yield Case(f"events after {last[:9]}", 400, "bad_request", "GET", target, headers={"Last-Event-ID": last})
    for name in (*PATHS[:1], MARKUP, "x" * 5_000, "a\0b"):
        found = 404, "no_such_call" if "/" in name else "unknown_job"
        yield Case(f"job {name[:16]!r}", *found, "GET", "/v1/jobs/" + quote(name, safe=""))
    for size in ("-1", str(LARGEST + 1), HUGE, "NaN", "1e3"):
        yield Case(f"probe of {size[:9]}", 400, "bad_request", "GET", f"/v1/probe?bytes={size}")
    for target in ("/v1/probe?bytes=0&", "/v1/jobs?", "/v1/audit?after=0&", "/v1/jobs/{job}/model?which=newest&"):
        for name in ("afer=5", MARKUP.replace("=", "%3D") + "=1", "a" * 300 + "=1", "%00=null", "=null"):
            yield Case(f"{target} and {name[:9]}", 400, "bad_request", "GET", target + name)
    announced = {"Content-Length": str(LARGEST + 1)}
    yield Case("probe that brings too much", 413, "too_large", "PUT", "/v1/probe", body=b"x", headers=announced)
    wrong: dict[str, dict[str, Any]] = {
        "of a worker": {"scope": "work"}, "of no scope": {"scope": "root"}, "for no time": {"ttl_s": 0},
        "for ever": {"ttl_s": math.inf}, "of NaN seconds": {"ttl_s": math.nan}, "for nobody": {"uses": 0},
        "with uses for no join": {"scope": "read", "uses": 1}, "with a path for a label": {"labels": ["../x"]},
        "with markup for a name": {"name": MARKUP[:20]}, "with 17 labels": {"labels": ["a"] * 17},
    }  # fmt: skip
    for name, fields in wrong.items():
        yield Case(f"a token {name}", 400, "bad_request", "POST", "/v1/tokens", body=as_json(fields), headers=JSON)
    for name, overlap in (("below 0", -1), ("for ever", math.inf), ("NaN", math.nan), ("a text", "x")):
        body = as_json({"overlap_s": overlap})
        yield Case(f"overlap {name}", 400, "bad_request", "POST", "/v1/tokens/own/rotate", body=body, headers=JSON)
    for token in ("x" * 200, "%00", "lyd_admin_" + "0" * 12):
        yield Case(f"token {token[:12]}", 404, "unknown_token", "POST", f"/v1/tokens/{token}/revoke")


CALLS = [*name_cases(), *token_cases(), *job_cases(), *worker_cases(), *update_cases(), *question_cases()]


def send(fleet: Fleet, case: Case) -> Answer:
    known = {
        "admin": fleet.admin, "join": fleet.join, "cut": fleet.admin[:-1], "capitals": fleet.admin.upper(),
        "crossed": "_".join([*fleet.admin.split("_", 3)[:3], fleet.join.split("_", 3)[3]]), "one": fleet.one.id,
        "work": fleet.work["id"], "attempt": str(fleet.work["attempt"]), "job": fleet.job, "model": fleet.model,
    }  # fmt: skip

    def filled(text: str) -> str:
        for name, value in known.items():
            text = text.replace("{" + name + "}", value)
        return text

    tokens = {"admin": fleet.admin, "join": fleet.join, "one": fleet.one.token, "two": fleet.two.token, "": None}
    headers = {name: filled(value) for name, value in case.headers.items()}
    return fleet.call(case.method, filled(case.target), tokens[case.by], case.body, headers, case.hosts)


def test_every_call_that_is_meant_to_do_harm_is_refused_and_leaves_nothing(fleet: Fleet) -> None:
    wrong, secrets = list[str](), [token.split("_", 3)[3].encode() for token in (fleet.admin, fleet.join)]
    before = fleet.rows(), fleet.files()
    for case in CALLS:
        answer = send(fleet, case)
        if (answer.status, answer.code) != (case.status, case.code):
            wrong.append(f"{case.name}: {answer.status} {answer.code}, and not {case.status} {case.code}")
        if (fleet.rows(), fleet.files()) != before:
            wrong.append(f"{case.name}: it left something behind")
            before = fleet.rows(), fleet.files()
        if any(secret in answer.body for secret in secrets):
            wrong.append(f"{case.name}: the answer says a secret")
        if fleet.call("GET", "/healthz").status != 200:
            wrong.append(f"{case.name}: the application answers no more")
    assert wrong == []


def test_the_corpus_is_large_and_every_case_in_it_is_another() -> None:
    names = [case.name for case in CALLS]
    assert [name for name in names if names.count(name) > 1] == []
    assert len(names) >= 200
    assert len(FILES) >= 40


# ---------------------------------------------------------------- weight files


def file_of(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file with this header, as JSON or as it is."""
    text = header if isinstance(header, bytes) else as_json(header)
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(shape: Any = (2,), dtype: Any = "F32", offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


EIGHT = b"\0" * 8
NOTED = {"__metadata__": {"lydian": json.dumps({"buffers": ["none"]})}}
FILES: dict[str, bytes] = {
    "nothing": b"",
    "seven bytes": b"\0" * 7,
    "a header of 2^60 bytes": file_of(b"{}", length=2**60),
    "a header of 2^64 - 1 bytes": file_of(b"{}", length=2**64 - 1),
    "a header beyond the file": file_of(b"{}", length=100),
    "a header beyond the limit": file_of(b"{}", length=HEADER_LIMIT + 1),
    "no header": file_of(b"", EIGHT),
    "a pickle": b"\x80\x04\x95" + EIGHT * 4,
    "a zip": b"PK\x03\x04" + EIGHT * 4,
    "spaces first": file_of(b"  {}"),
    "a list": file_of([]),
    "a number": file_of(b"1"),
    "cut JSON": file_of(b'{"w": {'),
    "100,000 brackets": file_of(b'{"w":' * 100_000),
    "UTF-16": file_of("{}".encode("utf-16-le")),
    "not UTF-8": file_of(b'{"\xff": 1}'),
    "half a surrogate pair": file_of(b'{"\\ud800": ' + as_json(tensor()) + b"}", EIGHT),
    "a key twice": file_of(b'{"w": %b, "w": %b}' % (as_json(tensor()), as_json(tensor())), EIGHT),
    "NaN in the header": file_of({"w": tensor(shape=[math.nan])}, EIGHT),
    "a number of 5,000 digits": file_of(b'{"w": {"dtype": "F32", "shape": [' + b"9" * 5_000 + b"]}}", EIGHT),
    "an unknown dtype": file_of({"w": tensor(dtype="F31")}, EIGHT),
    "a dtype that is a class": file_of({"w": tensor(dtype="os.system")}, EIGHT),
    "a dtype that is a list": file_of({"w": tensor(dtype=[])}, EIGHT),
    "a field more": file_of({"w": tensor(reduce="x")}, EIGHT),
    "a field less": file_of({"w": {"dtype": "F32", "shape": [2]}}, EIGHT),
    "no object": file_of({"w": 1}, EIGHT),
    "a shape below 0": file_of({"w": tensor(shape=[-2])}, EIGHT),
    "two sides below 0": file_of({"w": tensor(shape=[-1, -2])}, EIGHT),
    "a shape of fractions": file_of({"w": tensor(shape=[2.0])}, EIGHT),
    "a shape of truths": file_of({"w": tensor(shape=[True, 2])}, EIGHT),
    "a shape that is a text": file_of({"w": tensor(shape="2")}, EIGHT),
    "33 sides": file_of({"w": tensor(shape=[1] * 32 + [2])}, EIGHT),
    "a side of 2^40": file_of({"w": tensor(shape=[2**40])}, EIGHT),
    "a shape that overflows to 2": file_of({"w": tensor(shape=[2**63, 2, 2])}, EIGHT),
    "an empty shape beyond memory": file_of({"w": tensor(shape=[0, 2**62, 2**62], offsets=[0, 0])}),
    "offsets below 0": file_of({"w": tensor(offsets=[-8, 0])}, EIGHT),
    "offsets backwards": file_of({"w": tensor(offsets=[8, 0])}, EIGHT),
    "three offsets": file_of({"w": tensor(offsets=[0, 8, 16])}, EIGHT),
    "offsets beyond the file": file_of({"w": tensor(offsets=[2**60, 2**60 + 8])}, EIGHT),
    "a hole": file_of({"w": tensor(), "v": tensor(offsets=[16, 24])}, EIGHT * 3),
    "an overlap": file_of({"w": tensor(), "v": tensor(offsets=[4, 12])}, EIGHT * 2),
    "the same bytes twice": file_of({"w": tensor(), "v": tensor()}, EIGHT),
    "bytes behind the end": file_of({"w": tensor()}, EIGHT + b"more"),
    "cut in the middle": file_of({"w": tensor()}, EIGHT[:4]),
    "metadata that is a list": file_of({"__metadata__": [], "w": tensor()}, EIGHT),
    "metadata of numbers": file_of({"__metadata__": {"lydian": 1}, "w": tensor()}, EIGHT),
    "notes that are no JSON": file_of({"__metadata__": {"lydian": "x"}, "w": tensor()}, EIGHT),
    "notes of a tensor that is not there": file_of({**NOTED, "w": tensor()}, EIGHT),
    "notes with a field more": file_of({"__metadata__": {"lydian": '{"run": "x"}'}, "w": tensor()}, EIGHT),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_lies_is_refused_by_its_header_and_nothing_is_made_of_it(name: str, tmp_path: Path) -> None:
    path = tmp_path / "update"
    path.write_bytes(FILES[name])
    digest = hashlib.sha256(FILES[name]).hexdigest()
    with pytest.raises(BadUpdateError) as refused:
        inspect(path, None, digest=digest, norm_bound=None)
    assert refused.value.code == "bad_header"
    assert len(str(refused.value)) < 1_000
    assert [each.name for each in tmp_path.iterdir()] == ["update"]


SPOILT: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "NaN": ("not_finite", lambda data: data[:-4] + b"\0\0\xc0\x7f"),
    "infinity": ("not_finite", lambda data: data[:-4] + b"\0\0\x80\xff"),
    "another name": ("missing_tensor", lambda data: data.replace(b'"w":', b'"x":')),
    "a path as a name": ("missing_tensor", lambda data: data.replace(b'"w":', b'"/":')),
    "another shape": ("wrong_shape", lambda data: data.replace(b"[2,3]", b"[3,2]")),
    "another dtype": ("wrong_dtype", lambda data: data.replace(b'"F32"', b'"I32"')),
    "a truncated end": ("bad_header", lambda data: data[:-1]),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_update_is_refused_and_its_work_is_given_out_again(tmp_path: Path, name: str) -> None:
    fleet = Fleet(tmp_path / "state")
    try:
        code, spoil = SPOILT[name]
        data = spoil(weights(tmp_path / "update"))
        assert fleet.upload(fleet.work, fleet.one.token, data).status == 204
        result = {"attempt": fleet.work["attempt"], "digest": hashlib.sha256(data).hexdigest(), "samples": 5}
        target = f"/v1/updates/{fleet.work['id']}/submit"
        answer = fleet.call("POST", target, fleet.one.token, as_json(result), JSON)
        assert (answer.status, answer.code) == (422, code)
        assert [file for file in fleet.files() if file.startswith("parts/")] == []
        again = fleet.assignment(fleet.one)
        assert (again["id"], again["attempt"]) == (fleet.work["id"], fleet.work["attempt"] + 1)
    finally:
        fleet.close()


@pytest.mark.parametrize("call", ["submit", "abandon"])
def test_one_wrong_thing_said_many_times_is_one_strike_and_ends_no_job(tmp_path: Path, call: str) -> None:
    fleet = Fleet(tmp_path / "state")
    try:
        attempt = fleet.work["attempt"]
        lie = {"attempt": attempt, "digest": "0" * 64, "samples": 10**12}
        failed = {"attempt": attempt, "code": "task_failed", "sentence": "no luck"}
        for _ in range(20):
            target = f"/v1/updates/{fleet.work['id']}/{call}"
            fleet.call("POST", target, fleet.one.token, as_json(lie if call == "submit" else failed), JSON)
        job = fleet.call("GET", f"/v1/jobs/{fleet.job}", fleet.admin).json()
        assert job["state"] == "training", job["reason"]
        worker = fleet.coordinator.worker(fleet.one.id)
        assert (worker.strikes, worker.set_aside) == (1 if call == "submit" else 0, None)
        said = [fact for fact in fleet.rows()["facts"] if "handed_back" in fact]
        assert len(said) == 1
    finally:
        fleet.close()
