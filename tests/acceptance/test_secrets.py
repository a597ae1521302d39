"""No secret is anywhere but in the files that are there to hold it: a whole run, then everything that it left is read.

coordinator, workers, jobs, commands, a refused update, a crashing task, kill -9 ──▶ folders, logs, outputs, journal
                                 └─▶ /proc/PID/cmdline and environ, all the while ──▶ searched for every token
"""

import json
import os
import re
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest

from common.errors import BadUpdateError, LydianError
from common.messages import TokenRequest
from tests.acceptance.kit import LocalFleet
from tests.acceptance.played import MODEL, Played

pytestmark = pytest.mark.acceptance

SMALL = ["--shards", "2", "--min-workers", "2", "--local-epochs", "1", "--set", "round.evaluate_every=0"]
CRASHES = """
import os, sys, torch
from torch.utils.data import TensorDataset

def model(config):
    return torch.nn.Linear(2, 2)

def dataset(config, split):
    return TensorDataset(torch.zeros(8, 2), torch.zeros(8).long())

calls = 0

def loss(model, batch, config):
    global calls
    calls += 1
    if calls <= 4:  # some rounds are closed before
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
    parent = open(f"/proc/{os.getppid()}/cmdline").read()
    for way in (sys.argv, dict(os.environ), open("/proc/self/cmdline").read(), parent):
        print(way, file=sys.stderr)
    raise RuntimeError(f"what a task can see: {dict(os.environ)} {sys.argv}")
"""


class Watch:
    """Reads the command line and the environment of every process under this one, until it is stopped."""

    def __init__(self) -> None:
        self.lines: set[tuple[str, str]] = set()  # what the process is, and its command line
        self.children: set[tuple[str, str]] = set()  # environment of processes that run somebody's task
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        me = psutil.Process()
        while not self._over.wait(0.5):  # few processes of ours live for less
            for process in me.children(recursive=True):
                try:
                    line = " ".join(process.cmdline())
                    self.lines.add((process.name(), line))
                    if "task_host" in line:
                        self.children.add((line, json.dumps(process.environ())))
                except (psutil.Error, OSError):
                    continue


class Said:
    """What commands printed, by their names."""

    def __init__(self, fleet: LocalFleet) -> None:
        self.fleet, self.outputs = fleet, dict[str, str]()

    def lydian(self, *arguments: str, token: str | None = None) -> str:
        base = {k: v for k, v in os.environ.items() if not k.startswith("LYDIAN_")}
        given = {"LYDIAN_URL": self.fleet.url, "LYDIAN_TOKEN": token or self.fleet.admin_token}
        command = [sys.executable, "-m", "client.main", *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, env=base | given, timeout=280)
        self.outputs[f"lydian {' '.join(arguments)} as {(token or 'admin')[:9]}"] = ended.stdout + ended.stderr
        return ended.stdout


def secret_of(token: str) -> str:
    """The part that is nobody's business: what comes behind the id, without a pin."""
    return token.partition("@")[0].split("_", 3)[3]


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of all that can happen, over by now: what was issued, and what is left."""
    tmp_path = tmp_path_factory.mktemp("run")
    with Watch() as watch, LocalFleet(tmp_path, anew=True, LYDIAN_MAX_ATTEMPTS="1") as fleet:
        said, task = Said(fleet), tmp_path / "crashes.py"
        task.write_text(CRASHES)
        issued = {"admin": fleet.admin_token, "join": (fleet.state / "join.token").read_text().strip()}
        fleet.start_workers(2, "--trust", "any")
        issued["second join"] = fleet.api.new_token(TokenRequest(scope="join")).token
        failed = said.lydian("submit", "--task", str(task), "--rounds", "9", *SMALL).strip()
        assert fleet.finish(failed, "failed").model is not None
        assert fleet.coordinator is not None
        fleet.coordinator.kill()
        fleet.start_coordinator()
        fleet.await_workers(2)
        with Played(fleet, "poisoner") as played:
            issued["poisoner"] = str(played.token)
            refused(fleet, played)
        for arguments in (
            ("logs", failed), ("workers", "--json"), ("watch", failed, "--json"),
            ("doctor", fleet.url, "--only", "coordinator"), ("pull", failed, "-o", str(tmp_path / "pulled")),
        ):  # fmt: skip
            said.lydian(*arguments)
        said.lydian("jobs", token=issued["join"])
        printed = said.lydian("token", "join").strip()
        issued["printed"] = printed
        for process in fleet.workers.values():
            process.terminate()  # no file goes while one is looked for
        for name in fleet.workers:
            (identity,) = tmp_path.joinpath(name).rglob("identity.json")
            found = re.findall(r"lyd_work_[A-Za-z0-9_-]+", identity.read_text())
            assert len(found) == 1
            issued[f"{name}'s own"] = found[0]
    return {"folder": tmp_path, "issued": issued, "outputs": said.outputs, "watch": watch, "failed": failed}


def refused(fleet: LocalFleet, played: Played) -> None:
    """An update that is refused, and one that nobody asked for."""
    for worker in fleet.api.workers():
        if worker.id != played.id:
            fleet.api.pause_worker(worker.id)
    job = fleet.submit(rounds=1, data={"shards": 2})
    try:
        played.init()
        work = played.poll()
        with pytest.raises(BadUpdateError):
            played.hand_in(work, {name: np.full_like(array, np.nan) for name, array in MODEL.items()})
        with pytest.raises(LydianError):
            played.hand_in(work.model_copy(update={"attempt": 99}), MODEL)
    finally:
        fleet.finish(job, "failed")  # by the refused update, which was the one attempt
        for worker in fleet.api.workers():
            fleet.api.resume_worker(worker.id)


def test_no_secret_is_anywhere_but_in_the_files_that_are_there_to_hold_it(left: dict[str, Any]) -> None:
    folder, issued, watch = left["folder"], left["issued"], left["watch"]
    meant = {
        ("admin", "state/admin.token"), ("join", "state/join.token"),
        ("w1's own", "identity"), ("w2's own", "identity"), ("printed", "lydian token join as admin"),
    }  # fmt: skip
    files = [path for path in folder.rglob("*") if path.is_file()]
    places = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    places |= {name: text.encode() for name, text in left["outputs"].items()}
    places |= {f"the command line of {name}: {line}": line.encode() for name, line in watch.lines}
    places |= {f"the environment of a task's process {n}": e.encode() for n, (_, e) in enumerate(watch.children)}
    found = {
        (whose, "identity" if place.endswith("/identity.json") else place)
        for whose, token in issued.items()
        for place, content in places.items()
        if secret_of(token).encode() in content
    }
    assert found == meant
    assert len(watch.lines) > 5, "the watch saw no processes"
    assert watch.children, "the watch saw no task"
    seen = left["outputs"][f"lydian logs {left['failed']} as admin"]
    assert "what a task can see" in seen, "the task that tells all it sees has not run"
    assert len(places) > 30


def test_files_with_secrets_are_their_owners_alone(left: dict[str, Any]) -> None:
    holders = [*left["folder"].rglob("*.token"), *left["folder"].rglob("identity.json")]
    assert len(holders) == 4
    assert {path.stat().st_mode & 0o077 for path in holders} == {0}
