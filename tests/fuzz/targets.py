"""One function a parser: any bytes in; nothing, or an error that is declared, out. Whatever else comes is a fault.

    hypothesis (tests/test_fuzz.py)  ──bytes──┐
    atheris (python -m tests.fuzz)   ──bytes──┼─▶ Target.try_one ─▶ the parser ─▶ declared error, or its promises hold
    corpus/NAME/ (what was found)    ──bytes──┘

A target says what its parser promises beside not to crash: what was read can be written and reads the same, pieces do
not overlap, a decoded number is finite. What is declared is named with each target, as its parser's docstring says it.
"""

import contextlib
import hashlib
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
import ml_dtypes
import numpy as np
from pydantic import ValidationError

from client.job_file import build_spec, builtin_layer, file_layer, merge, parse_value, set_layer
from common import messages, tailscale
from common.api import CoordinatorApi
from common.codecs import CODECS, codec
from common.deltas import apply_step, encode_update
from common.errors import LydianError
from common.facts import FACT
from common.fixed import LEAST_BITS, MOST_BITS, Fixed
from common.masked import CODE, NAME, length, mask_update
from common.messages import Message, Reveal, Roster, SecureMember, Unmask
from common.pins import split
from common.ranges import content_range, format_ranges, gaps, parse_ranges
from common.secure import Secrets, check_roster, masks_left
from common.shamir import PRIME, reconstruct, share
from common.staging import Staging
from common.streams import Streams
from common.together import answer_and_model, read_submission, submission_header
from common.transfers import raise_for
from common.weights import Notes, file_header, load, publish, read_layout, save
from server.auth import Tokens, redact
from server.blobs import parse_content_range
from server.inspection import inspect
from server.store import Journal
from server.unmasking import inspect_masked, unmask
from worker.child import parsed

CORPUS = Path(__file__).resolve().parent / "corpus"
SENTENCE = 20_000  # characters that an error may have at most: it goes into a log and an answer


@dataclass(frozen=True)
class Target:
    """One parser."""

    name: str
    run: Callable[[bytes], object]
    seeds: Callable[[], Iterable[bytes]]  # what it reads when all is well
    declared: tuple[type[Exception], ...] = (LydianError,)

    def try_one(self, data: bytes) -> None:
        """Give it these bytes. Whatever it raises that is not declared comes out, and so does a broken promise."""
        raised: Exception | None = None
        try:
            self.run(data)
        except self.declared as error:
            raised = error
        if raised is not None:
            said = raised.lines() if isinstance(raised, LydianError) else str(raised)
            assert said, f"{type(raised).__name__} says nothing"
            said.encode()  # half a surrogate pair could be neither logged nor answered
            assert len(said) <= SENTENCE or isinstance(raised, ValidationError), f"{len(said)} characters: {said[:80]}"

    def known(self) -> list[bytes]:
        """The seeds, and what was found earlier."""
        return [*self.seeds(), *(path.read_bytes() for path in sorted((CORPUS / self.name).glob("*")))]


TARGETS: dict[str, Target] = {}


def target(
    seeds: Callable[[], Iterable[bytes]], *declared: type[Exception]
) -> Callable[[Callable[[bytes], object]], Callable[[bytes], object]]:
    """Make a function a target of its name."""

    def enter(run: Callable[[bytes], object]) -> Callable[[bytes], object]:
        name = run.__name__
        TARGETS[name] = Target(name, run, seeds, declared or (LydianError,))
        return run

    return enter


@cache
def folder() -> Path:
    """A folder of this process."""
    held = tempfile.TemporaryDirectory(prefix="lydian-fuzz-")
    _FOLDERS.append(held)
    return Path(held.name)


_FOLDERS: list[Any] = []  # deleted with the process


def written(data: bytes, name: str = "given") -> Path:
    path = folder() / name
    path.write_bytes(data)
    return path


def text_of(data: bytes) -> str:
    """A text of any characters, as a header or a command line brings it."""
    return data.decode("utf-8", errors="surrogateescape")


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


# ---------------------------------------------------------------- weight files

MODEL = {
    "net.w": np.linspace(-1, 1, 90, dtype=np.float32).reshape(9, 10),
    "net.h": np.linspace(-1, 1, 70, dtype=np.float32).astype(ml_dtypes.bfloat16),
    "norm.mean": np.zeros(3, np.float32),
    "norm.var": np.ones(3, np.float32),
    "seen": np.array(7, np.int64),
}
NOTES = Notes(variances={"norm.var": "norm.mean"}, aliases={"tied": "net.w"})


@cache
def base() -> Path:
    """The model that updates change."""
    path = folder() / "base"
    save(path, MODEL, NOTES)
    return path


@cache
def trained() -> Path:
    path = folder() / "trained"
    moved = {name: array + array.dtype.type(1) if array.dtype.kind != "i" else array for name, array in MODEL.items()}
    save(path, moved, NOTES)
    return path


def file_of(write: Callable[[Path], object]) -> bytes:
    path = folder() / "seed"
    write(path)
    return path.read_bytes()


def plain_seeds() -> list[bytes]:
    small = {"__metadata__": {"format": "pt"}, "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    header = as_json(small)
    return [
        base().read_bytes(),
        trained().read_bytes(),
        file_header([], Notes()),
        len(header).to_bytes(8, "little") + header + bytes(8),
    ]


@target(plain_seeds)
def layout(data: bytes) -> None:
    path = written(data)
    found = read_layout(path)
    assert found.size == len(data)
    at = len(found.header)
    for tensor in found.tensors:
        assert tensor.start == at, "a hole or an overlap"
        assert tensor.stop - tensor.start == tensor.elements * tensor.numpy_dtype.itemsize
        at = tensor.stop
    assert at == len(data)
    assert sum(array.nbytes for array in load(path).values()) == at - len(found.header)
    if not set(found.notes.aliases) & {"__metadata__"}:
        publish(path, folder() / "published")
        again = read_layout(folder() / "published")
        assert {each.name for each in again.tensors} == {each.name for each in found.tensors} | set(found.notes.aliases)


def encoded_seeds() -> list[bytes]:
    whole = [bytes([index]) + each for index in range(1 + len(CODECS)) for each in plain_seeds()[:2]]
    encoded = [
        bytes([index + 1]) + file_of(lambda path, name=name: encode_update(base(), trained(), path, codec(name)))
        for index, name in enumerate(CODECS)
    ]
    return whole + encoded


@target(encoded_seeds)
def update(data: bytes) -> None:
    """What a worker sends: looked at whole, or encoded by the codec that the first byte chooses."""
    chosen = data[0] % (1 + len(CODECS)) if data else 0
    path = written(data[1:])
    digest = hashlib.sha256(data[1:]).hexdigest()
    with_codec = codec(CODECS[chosen - 1]) if chosen else None
    found = inspect(
        path, base(), digest=digest, norm_bound=None, measured=True, codec=with_codec, block_elements=1 << 12
    )
    assert found.size == len(data) - 1
    assert found.norm is not None
    assert found.norm >= 0


@target(encoded_seeds)
def step(data: bytes) -> None:
    """What the coordinator sends instead of a model."""
    chosen = codec(CODECS[data[0] % len(CODECS)]) if data else codec("int8")
    made = folder() / "stepped"
    digest = apply_step(base(), written(data[1:]), made, chosen, block_elements=1 << 12)
    assert digest == hashlib.sha256(made.read_bytes()).hexdigest()
    arrays = load(made)
    assert all(np.isfinite(arrays[name].astype(np.float64)).all() for name in ("net.w", "net.h"))


def decoded_seeds() -> Iterable[bytes]:
    for (index, name), count in itertools.product(enumerate(CODECS), (1, 63, 64, 65, 130, 4097)):
        values = np.linspace(-3, 3, count, dtype=np.float32)
        yield bytes([index]) + count.to_bytes(2, "little") + codec(name).encode(values).tobytes()


@target(decoded_seeds)
def decode(data: bytes) -> None:
    """A codec's own bytes. The length is right, as whoever calls has made sure, or it is refused."""
    chosen = codec(CODECS[(data[0] if data else 0) % len(CODECS)])
    count = max(int.from_bytes(data[1:3], "little"), 1)
    values = chosen.decode(np.frombuffer(data[3:], np.uint8), count)
    assert values.shape == (count,)
    assert np.isfinite(values).all()


# ---------------------------------------------------------------- masked sums


def masked_seeds() -> list[bytes]:
    fixed = Fixed(clip=4.0, bits=32)
    masked = file_of(lambda path: mask_update(base(), trained(), path, fixed, 5, []))
    count = length(read_layout(base()))
    return [masked, file_header([(NAME, CODE, (count,))], Notes()) + bytes(8 * count)]


@target(masked_seeds)
def masked(data: bytes) -> None:
    path, made = written(data), folder() / "unmasked"
    inspect_masked(path, base(), digest=hashlib.sha256(data).hexdigest())
    fixed = Fixed(clip=4.0, bits=32)
    samples = unmask(base(), [path], made, fixed=fixed, masks=[], block_elements=64)
    assert 1 <= samples <= fixed.heaviest
    assert all(np.isfinite(array.astype(np.float64)).all() for array in load(made).values())


def fixed_seeds() -> list[bytes]:
    return [bytes([bits, 1]) + np.linspace(-5, 5, 8).tobytes() for bits in (0, 24, 40)]


@target(fixed_seeds, ValueError)
def fixed(data: bytes) -> None:
    """Numbers of any kind, there and back: as near as the width lets them be, or refused."""
    width = MOST_BITS - LEAST_BITS + 1
    chosen = Fixed(clip=2.0, bits=LEAST_BITS + (data[0] % width if data else 0))
    samples = data[1] if len(data) > 1 else 0
    numbers = np.frombuffer(data[2 : 2 + (len(data) - 2) // 8 * 8], np.float64) if len(data) > 2 else np.zeros(0)
    sent, cut = chosen.encode(numbers.copy(), samples)
    back = chosen.decode(sent, samples)
    assert cut == int((np.abs(numbers) > chosen.levels * 2.0**-chosen.fraction).sum())
    assert np.abs(back - np.clip(numbers, -2, 2)).max(initial=0.0) <= 2.0 ** (1 - chosen.fraction)


def shamir_seeds() -> list[bytes]:
    return [bytes([2, 3]) + bytes([point]) * 70 for point in (1, 2, 200)]


@target(shamir_seeds, ValueError)
def shamir(data: bytes) -> None:
    """Shares of a secret that the bytes are, and wrong ones."""
    threshold = 1 + (data[0] % 8 if data else 0)
    count = data[1] % 12 if len(data) > 1 else 0
    secret = int.from_bytes(data[2:66], "big")
    points = [1 + number for number in range(count)]
    coefficients = [int.from_bytes(hashlib.sha512(data + bytes([n])).digest(), "big") for n in range(threshold - 1)]
    shares = share(secret, points, coefficients)
    assert reconstruct(shares, threshold) == secret
    shares[1] = int.from_bytes(data[:70], "big")
    assert 0 <= reconstruct(shares, threshold) < PRIME


@cache
def members() -> tuple[Roster, tuple[Secrets, ...]]:
    """Three who sum together."""
    secrets = tuple(Secrets(bytes([number]) * 32) for number in (1, 2, 3))
    of = [
        SecureMember(shard=shard, worker=f"w-{shard}", **each.keys(1).model_dump())
        for shard, each in enumerate(secrets)
    ]
    return Roster(job="job-1", round=1, seal=0, threshold=3, members=tuple(of)), secrets


@cache
def reveals() -> tuple[Reveal, ...]:
    roster, secrets = members()
    sealed = [each.shares(roster, shard) for shard, each in enumerate(secrets)]
    return tuple(
        each.reveal(1, roster, own, (0, 1, 2), (0, 1, 2), {at: sealed[at][own] for at in range(3) if at != own})
        for own, each in enumerate(secrets)
    )


def secure_seeds() -> list[bytes]:
    roster, secrets = members()
    digest = reveals()[0].roster
    sealed = {at: secrets[at].shares(roster, at)[0] for at in (1, 2)}
    asked = Unmask(assignment="a", attempt=1, roster=digest, survivors=(0, 1, 2), sealed=sealed)
    opened = reveals()[1].model_dump_json().encode()
    return [b"\0" + roster.model_dump_json().encode(), b"\1" + asked.model_dump_json().encode(), b"\2" + opened]


@target(secure_seeds, LydianError, ValidationError)
def secure(data: bytes) -> None:
    """What members of a secure sum are told, and what they tell: rosters, sealed shares, opened shares."""
    kind, body = (data[0] % 3, data[1:]) if data else (0, b"")
    roster, secrets = members()
    if kind == 0:
        found = Roster.model_validate_json(body)
        check_roster(found, roster.members[0])
        secrets[0].shares(found, roster.members[0].shard)
    elif kind == 1:
        asked = Unmask.model_validate_json(body)
        secrets[0].reveal(1, roster, 0, (0, 1, 2), asked.survivors, asked.sealed)
    else:
        opened = dict(enumerate(reveals())) | {1: Reveal.model_validate_json(body)}
        masks_left(roster, (0, 1, 2), (0, 1, 2), opened)


# ---------------------------------------------------------------- headers


def range_seeds() -> list[bytes]:
    return [b"", b"0-9", b"0-4194303,8388608-12582911", b"bytes 0-9/10", b"bytes 5-9/100"]


@target(range_seeds)
def ranges(data: bytes) -> None:
    held = parse_ranges(text_of(data))
    assert parse_ranges(format_ranges(held)) == held
    last = held[-1][1] if held else 0
    assert sum(stop - start for start, stop in (*held, *gaps(held, last))) == last


@target(range_seeds)
def content_ranges(data: bytes) -> None:
    start, stop, total = parse_content_range(text_of(data), None)
    assert 0 <= start < stop <= total
    assert parse_content_range(content_range(start, stop, total), stop - start) == (start, stop, total)


@target(lambda: [bytes(range(40)), b"\xff\x01" * 30])
def streams(data: bytes) -> None:
    """Gaps, and what becomes of their pieces: each byte is handed out once, whatever the line is like."""
    sizes = [1 + (byte << 16) for byte in data[:4]]
    starts = list(itertools.accumulate((size + 1 for size in sizes), initial=0))
    wanted = tuple((start, start + size) for start, size in zip(starts, sizes, strict=False))
    plan, now, out, given = Streams(wanted), 0.0, [], []
    for byte in itertools.chain(data[4:200], itertools.repeat(255, 5_000)):
        now += byte % 16 / 4
        if byte % 2 and (piece := plan.take(now)) is not None:
            out.append(piece)
            given.append(piece)
        elif out:
            plan.done(out.pop(byte % len(out)), now)
        if plan.left == 0 and not out:
            break
    ends = sorted(given)
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(ends)), "a byte was handed out twice"
    assert sum(stop - start for start, stop in given) == sum(sizes) - plan.left


def record_seeds() -> list[bytes]:
    return [b"10\n0 5\n5 10\n", b"10\n0 5\n?\n7 9\n", b"100\n"]


@target(record_seeds)
def staging(data: bytes) -> None:
    """The record beside an upload, as a power cut may have left it."""
    path = written(b"0123456789", "upload.part")
    path.with_suffix(".ranges").write_bytes(data)
    held = Staging.reopen(path)
    if held is not None:
        with contextlib.closing(held):
            assert held.size == 10
            assert all(0 <= start < stop <= 10 for start, stop in held.ranges)


@cache
def tokens() -> tuple[Tokens, str]:
    known = Tokens(Journal.open(folder() / "journal.sqlite"))
    return known, known.issue("admin")


def token_seeds() -> list[bytes]:
    made_up = b"lyd_admin_0123456789ab_" + b"x" * 43
    return [
        b"Bearer " + made_up,
        b"Bearer " + made_up + b"@nXYZ",
        b"bearer lyd_join_0123456789ab_" + b"y" * 43,
        b"Basic x",
    ]


@target(token_seeds)
def token(data: bytes) -> None:
    """An Authorization header, which starlette decodes as Latin-1. None but the issued one passes."""
    known, issued = tokens()
    header = data.decode("latin-1")
    secret = issued.split("_", 3)[3]  # itself of letters among which there is a "_"
    assert secret not in redact(f"{header} {issued}")
    split(header)
    principal = known.check(header)
    assert issued in header, f"{principal} by a token that nobody issued"


# ---------------------------------------------------------------- messages

INCOMING = (
    "JobRequest", "Registration", "PollRequest", "Heartbeat", "Submission", "Abandon", "SecureKeys", "SecureShares",
    "Reveal", "TokenRequest",
)  # fmt: skip
ANSWERS = (
    "Welcome", "PollAnswer", "HeartbeatAnswer", "Receipt", "Roster", "Group", "JobView", "LogEntry", "WorkerView",
    "Probed", "TokenAnswer", "VersionView", "TailnetNode",
)  # fmt: skip
KINDS: tuple[type[Message], ...] = tuple(getattr(messages, name) for name in (*INCOMING, *ANSWERS))


def bodies() -> dict[str, Any]:
    job = messages.JobSpec(task="digits", rounds=9, config={"width": 64}).model_dump(mode="json")
    build = {"version": "2.14.1", "device": "cpu", "threads": 1}
    machine = {
        "hostname": "w",
        "system": "Linux",
        "python": "3.11",
        "cpu": "x",
        "cores": 1,
        "memory": 1,
        "torch": build,
    }
    digest = "ab" * 32
    model = {"digest": digest, "size": 10}
    work = {
        "id": "job-1.train.1.0", "attempt": 1, "job": "job-1", "kind": "train", "round": 1, "shards": 2,
        "samples": {"start": 0, "stop": 5}, "task": {"name": "digits"}, "spec": job, "base": model, "ttl_s": 40.0,
        "max_bytes": 100,
    }  # fmt: skip
    share_of, sealed = "0" * 132, "0" * 296
    return {
        "JobRequest": {"spec": job, "task_source": "def model(config): ...", "key": "k"},
        "Registration": {
            "name": "w", "protocol": 2, "version": "0.1.0", "start_id": "s", "hardware": machine, "data": ["shop"],
            "trust": "listed", "holding": [{"assignment": "a", "attempt": 1}],
        },
        "PollRequest": {"start_id": "s", "claim_key": "c", "wait_s": 0, "models": [digest]},
        "Heartbeat": {
            "start_id": "s", "assignment": "job-1.train.1.0", "attempt": 1,
            "progress": {"doing": "training", "step": 4, "loss": 0.5, "samples_per_s": 1e3},
        },
        "Submission": {
            "attempt": 1, "digest": digest, "samples": 5, "steps": 4, "seconds": 0.5, "metrics": {"loss": [1.0, 2.0]},
        },
        "Abandon": {"attempt": 1, "code": "task_failed", "sentence": "it broke", "detail": "Traceback"},
        "SecureKeys": {"attempt": 1, "cipher_key": digest, "mask_key": digest, "seed_check": digest},
        "SecureShares": {"attempt": 1, "roster": digest, "sealed": {"1": sealed}},
        "Reveal": {"attempt": 1, "roster": digest, "seeds": {"1": share_of}, "keys": {"2": share_of}},
        "TokenRequest": {"scope": "join"},
        "PollAnswer": {"assignment": work, "forget": ["job-0"], "order": "work"},
        "Roster": members()[0].model_dump(mode="json"),
        "Group": {"roster": digest, "shards": [0, 1]},
        "TokenAnswer": {"token": "lyd_join_x"},
        "Receipt": {"repeat": False, "reason": "1 of 2"},
    }  # fmt: skip


def message_seeds() -> Iterable[bytes]:
    known = bodies()
    for index, kind in enumerate(KINDS):
        yield bytes([index]) + as_json(known.get(kind.__name__, {}))


@target(message_seeds, ValidationError)
def message(data: bytes) -> None:
    """A body of a call or of an answer: what reads can be written, and reads the same."""
    kind = KINDS[(data[0] if data else 0) % len(KINDS)]
    text = kind.model_validate_json(data[1:]).model_dump_json()
    assert kind.model_validate_json(text).model_dump_json() == text


@target(lambda: [as_json({"type": "job", "state": "paused", "reason": "x"}), as_json({"type": "now"})], ValidationError)
def fact(data: bytes) -> None:
    """A line of the journal."""
    text = FACT.dump_json(FACT.validate_json(data))
    assert FACT.dump_json(FACT.validate_json(text)) == text


def together_seeds() -> list[bytes]:
    model = b"0123456789"
    answer = bodies()["PollAnswer"]
    answer["assignment"]["base"] = {"digest": hashlib.sha256(model).hexdigest(), "size": 10}
    return [as_json(answer) + b"\n" + model, as_json({}) + b"\n", b"\n"]


@target(together_seeds, LydianError, ValidationError)
def together(data: bytes) -> None:
    answer, digest, model = answer_and_model(data)
    assert answer.assignment is not None
    assert answer.assignment.base is not None
    assert answer.assignment.base.digest == digest == hashlib.sha256(model).hexdigest()


def header_seeds() -> list[bytes]:
    made = submission_header(messages.Submission.model_validate(bodies()["Submission"]))
    return [(made or "").encode(), b"e30=", b"bnVsbA=="]


@target(header_seeds)
def submission(data: bytes) -> None:
    """The header of an update that comes with its submission."""
    found = read_submission(data.decode("latin-1"))
    assert found == found.model_copy()


# ---------------------------------------------------------------- what people and other programs write

JOB = (Path(__file__).resolve().parents[2] / "examples" / "job.toml").read_bytes()


@target(lambda: [JOB, b'task = "digits"\nrounds = 3\n[train]\nlr = 0.1\n[data]\nshards = 4\n'])
def job_file(data: bytes) -> None:
    """A job file, as `lydian submit` reads it."""
    given = file_layer(data.decode("utf-8", errors="replace"), "job.toml")
    found = build_spec(merge(builtin_layer("digits"), given))
    assert messages.JobSpec.model_validate_json(found.model_dump_json()) == found


@target(lambda: [b"train.lr=0.05", b"config.width=[1, 2]", b"name=auto", b"data.shards=auto"])
def option(data: bytes) -> None:
    """A --set of the command line."""
    item = data.decode("utf-8", errors="replace")
    parse_value(item)
    build_spec(merge(builtin_layer("digits"), set_layer([item])))


def event_seeds() -> list[bytes]:
    fact = as_json(
        {"id": 1, "at": "2026-01-01T00:00:00Z", "job": "j", "type": "job", "state": "finished", "reason": "x"}
    )
    now = as_json({"type": "now", "state": "training", "reason": "x", "round": 1})
    return [
        b": hello\n\nid: 1\ndata: " + fact + b"\n\n",
        b"data: " + now + b"\n\ndata:" + fact + b"\n\n",
        b"data: [1]\n\n",
    ]


@target(event_seeds)
def events(data: bytes) -> None:
    """A stream of events, as `lydian watch` hears it: one connection's worth."""
    for event in api_of(data)._stream("job", 0):
        assert isinstance(event["type"], str)
        assert isinstance(event.get("id", 0), int)


_SAID = [b""]  # what `api_of` answers with: a client of its own for each input would take most of the time


def api_of(said: bytes) -> CoordinatorApi:
    """A client whose every call is answered with this."""
    _SAID[:] = [said]
    return _api()


@cache
def _api() -> CoordinatorApi:
    api = CoordinatorApi("http://coordinator")
    api._client.close()
    transport = httpx2.MockTransport(lambda _: httpx2.Response(200, content=_SAID[0]))
    api._client = httpx2.Client(transport=transport, base_url="http://coordinator")
    return api


def error_seeds() -> list[bytes]:
    said = {"code": "late", "sentence": "the round closed", "advice": "poll"}
    return [b"\0" + as_json(said), b"\5" + as_json([said]), b"\7<html>"]


@target(error_seeds)
def error(data: bytes) -> None:
    """An error answer, of whatever is at the address."""
    statuses = (400, 401, 404, 409, 410, 422, 426, 500, 502, 503, 507, 599)
    status = statuses[(data[0] if data else 0) % len(statuses)]
    answer = httpx2.Response(status, content=data[1:], request=httpx2.Request("GET", "http://coordinator/x"))
    raise_for(answer)
    raise AssertionError(f"{status} counts as no error")


def tailnet_seeds() -> list[bytes]:
    me = {"ID": "n1", "DNSName": "a.b.", "TailscaleIPs": ["100.64.0.1"], "KeyExpiry": "2027-01-01T00:00:00Z"}
    peer = {"ID": "n2", "TailscaleIPs": ["100.64.0.2"], "CurAddr": "1.2.3.4:5", "Relay": "fra", "Active": True}
    status = {"BackendState": "Running", "Self": me, "Peer": {"k": peer}, "CurrentTailnet": {"MagicDNSEnabled": True}}
    whois = {
        "Node": {"StableID": "n2", "Name": "b.", "Tags": ["tag:x"], "KeyExpiry": "0001-01-01T00:00:00Z"},
        "UserProfile": {"LoginName": "a@b"},
    }
    return [as_json(status), as_json(whois), b"{}", b"nonsense"]


@target(tailnet_seeds)
def tailnet(data: bytes) -> None:
    """What is on the socket of tailscaled: read as far as it makes sense, and never an error."""
    answer = httpx2.Response(200, content=data)
    found = tailscale._parsed(answer, tailscale.parse_status)
    node = tailscale._parsed(answer, tailscale.parse_node)
    if found is not None:
        tailscale.expiry_warning(found, now=tailscale.datetime(2026, 1, 1, tzinfo=tailscale.UTC))
    if node is not None:
        text = node.model_dump_json()
        assert messages.TailnetNode.model_validate_json(text).model_dump_json() == text


@target(lambda: [as_json({"event": "progress", "step": 1}), b"[1]", b"x"])
def child_line(data: bytes) -> None:
    """A line of the child in which somebody's task runs."""
    event = parsed(data)
    assert event is None or "event" in event
