"""A real worker, as its owner started it, in the hands of a coordinator that wants its machine."""

import contextlib
import gzip
import hashlib
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.kit import Process, wait_for
from tests.hostile_coordinator import Answer, HostileCoordinator
from tests.scripted_coordinator import assignment

pytestmark = pytest.mark.acceptance

ROOT = Path(__file__).resolve().parents[2]
SECRETS = ("lyd_join_0a_secret", "lyd_work_secret")
HUGE = 1_000  # MiB


class Runs:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@contextlib.contextmanager
def started(folder: Path, url: str, *options: str) -> Iterator[Process]:
    """A worker whose home, temporary folder and working folder are seen."""
    around = {name: folder / name for name in ("home", "tmp", "cwd")}
    for place in around.values():
        place.mkdir()
    environment = {
        "HOME": str(around["home"]), "TMPDIR": str(around["tmp"]), "XDG_CACHE_HOME": str(around["home"] / "cache"),
        "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "LYDIAN_TOKEN": SECRETS[0],
    }  # fmt: skip
    arguments = ["-m", "worker", url, "--name", "w", "--state-dir", str(folder / "state"), "--device", "cpu"]
    process = Process(
        [*arguments, "--threads", "1", "--grace", "0", *options], folder / "w.log", environment, cwd=around["cwd"]
    )
    try:
        yield process
    finally:
        process.kill_all()


def work(number: int, **fields: Any) -> Answer:
    """An evaluation, which needs no more than a model."""
    given = assignment(number, kind="evaluate", samples=None).model_dump(mode="json")
    return Answer(body={"assignment": {**given, **fields}})


def model(plays: HostileCoordinator, number: int, content: bytes) -> Answer:
    """An evaluation of a file that is as it is named, and no model."""
    digest = hashlib.sha256(content).hexdigest()
    plays.files[f"/v1/models/{digest}"] = Answer(body=content, headers=(("ETag", f'"{digest}"'),))
    return work(number, base={"digest": digest, "size": len(content)})


def archive(content: bytes) -> bytes:
    """What torch.save makes of an object, as far as a reader of it gets before it unpickles."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as made:
        made.writestr("archive/data.pkl", content)
        made.writestr("archive/version", "3\n")
    return out.getvalue()


def test_a_worker_with_the_default_policy_runs_nothing_that_a_hostile_coordinator_sends(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    evil = f"open({str(mark)!r}, 'w')\ndef model(config): ...\ndef dataset(config, split): ...\n".encode()
    digest, pickled = hashlib.sha256(evil).hexdigest(), pickle.dumps(Runs(mark))
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    theirs = {"name": "digits", "digest": digest}
    with HostileCoordinator() as other, HostileCoordinator() as plays:
        plays.welcome = "\x1b[2Jwelcome <script>alert(1)</script>\n12:00:00 all is well"
        plays.files[f"/v1/tasks/{digest}"] = Answer(body=evil, headers=(("ETag", f'"{digest}"'),))
        elsewhere = [(("Location", "file:///etc/passwd"),), (("Location", f"{other.url}/v1/workers/w-1/poll"),)]
        plays.files[f"/v1/models/{0:064x}"] = Answer(302, headers=elsewhere[0])
        plays.files["/v1/models/" + "c" * 64] = Answer(body=b"other bytes", headers=(("ETag", '"' + "c" * 64 + '"'),))
        evils = {
            "a task file that nobody listed": work(1, task=theirs),
            "the same to be loaded beforehand": Answer(body={"prepare": {
                "job": "job-1", "task": theirs, "spec": {"task": "digits"}}}),
            "a module for a task": work(2, task={"name": "os", "digest": None}),
            "a path for a task": work(3, task={"name": "../../../tmp/evil", "digest": None}),
            "a path for an assignment": work(4, id="../../../x"),
            "a path for a digest": work(5, base={"digest": "../" * 21 + "x", "size": 10}),
            "a field of another making": work(6, run="id"),
            "a model that is a pickle": model(plays, 7, pickled),
            "a model that is an archive of one": model(plays, 8, archive(pickled)),
            "a model with a header of 2^60 bytes": model(plays, 9, struct.pack("<Q", 1 << 60) + b"{}"),
            "a model of 2^42 bytes that has none": model(plays, 10, struct.pack("<Q", len(header)) + header),
            "a model of other bytes": work(11, base={"digest": "c" * 64, "size": 11}),
            "a redirect of a poll": Answer(307, headers=elsewhere[1]),
            "an answer without end": Answer(pieces=HUGE),
            "an answer that unpacks to more": Answer(body=gzip.compress(b" " * (1 << 27)),
                                                     headers=(("Content-Encoding", "gzip"),)),
            "a model at file://, asked for again and again": work(12, base={"digest": f"{0:064x}", "size": 10}),
        }  # fmt: skip
        plays.answers.extend(evils.values())
        with started(tmp_path, plays.url) as worker:
            wait_for("the worker to join", lambda: plays.asked_for("/v1/workers"))
            wait_for("all of it to be answered", lambda: not plays.answers and len(plays.abandoned()) >= 6)
            wait_for("the last of it to be refused", lambda: "points to 'file:///etc" in worker.said())
            said = worker.said()
            assert worker.terminate() == 0
        # Nothing ran, nothing was written but into its own folders, and nobody else heard of it.
        assert not mark.exists()
        assert not plays.asked_for(f"/v1/tasks/{digest}")
        assert {path.name for path in tmp_path.iterdir()} == {"state", "home", "tmp", "cwd", "w.log"}
        for place in ("home", "tmp", "cwd"):
            assert [path for path in (tmp_path / place).rglob("*") if not path.is_dir()] == []
        assert not other.calls
        assert plays.sent < HUGE
        # Each is told in a sentence, which obeys nobody.
        reasons = {one["code"]: one["sentence"] for one in plays.abandoned()}
        assert "--trust none" in reasons["not_trusted"]
        assert "no built-in task os" in reasons["unknown_task"]
        assert "answered something that this version does not understand" in said
        assert "SHA-256 is" in said
        assert f"points to '{elsewhere[1][0][1]}' and is not followed" in said
        assert "points to 'file:///etc/passwd' and is not followed" in said
        assert f"answered more than {64 << 20} bytes" in said
        assert "packed as 'gzip', which was not asked for" in said
        assert "\x1b" not in said
        assert "\n12:00:00 all is well" not in said
        assert "Traceback" not in said
        assert not any(secret in said for secret in SECRETS)
