"""A worker that floods with its own token, and a stranger with none, beside an honest fleet: its job is as without."""

import http.client
import socket
import threading
from collections import Counter
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest

from common.errors import TooManyError, UnavailableError
from common.messages import Assignment, ModelFacts
from tests.acceptance.kit import LocalFleet, wait_for
from tests.acceptance.played import MODEL, Played, update

pytestmark = pytest.mark.acceptance

SPEC: dict[str, Any] = {"rounds": 5, "round": {"min_workers": 2, "evaluate_every": 0}, "data": {"shards": 2}}
LIMITS = {  # so low that a machine with little to spare floods too
    "LYDIAN_CALLS_PER_S": "2", "LYDIAN_CALLS_BURST": "150", "LYDIAN_STRANGER_CALLS_PER_S": "1",
    "LYDIAN_STRANGER_CALLS_BURST": "5",
}  # fmt: skip


class Honest(threading.Thread):
    """A worker that does what it is asked, with what a real one calls, and without torch: until told to stop."""

    def __init__(self, fleet: LocalFleet, name: str) -> None:
        super().__init__()
        self.worker = Played(fleet, name)
        self.stopping = threading.Event()

    def run(self) -> None:
        while not self.stopping.is_set():
            try:
                answer = self.worker.ask(wait_s=1.0)
                if answer is not None and answer.assignment is not None:
                    self.do(answer.assignment)
            except UnavailableError as error:  # an answer that does not come in time is asked for again
                if isinstance(error, TooManyError):
                    raise

    def do(self, work: Assignment) -> None:
        if work.kind == "init":
            facts = ModelFacts(parameters=8, train_samples=10, test_samples=0, bounds=(0, 5, 10))
            self.worker.hand_in(work, MODEL, facts=facts)
        else:
            self.worker.hand_in(work, update(work.round + work.shard / 4))

    def __enter__(self) -> "Honest":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.join()
        self.worker.api.close()


class Flood(threading.Thread):
    """Calls without a pause until told to stop."""

    def __init__(self, fleet: LocalFleet, path: str, token: str) -> None:
        super().__init__()
        self.fleet, self.path, self.token = fleet, path, token
        self.answers = Counter[int]()
        self.stopping = threading.Event()

    def run(self) -> None:
        with closing(http.client.HTTPConnection(self.fleet.host, self.fleet.port, timeout=60)) as line:
            while not self.stopping.is_set():
                line.request("GET", self.path, headers={"Authorization": f"Bearer {self.token}"})
                answer = line.getresponse()
                answer.read()
                self.answers[answer.status] += 1

    def __enter__(self) -> "Flood":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.join()


def raw(fleet: LocalFleet, sent: bytes) -> bytes:
    """What a connection answers to these bytes, until it is closed."""
    with socket.create_connection((fleet.host, fleet.port), timeout=60) as line:
        line.sendall(sent)
        line.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: line.recv(1 << 16), b""))


def finished(fleet: LocalFleet) -> str:
    """The digest of a job's last model. The test looks often enough to be told to look less itself."""

    def submit() -> str | None:
        with suppress(TooManyError):
            return fleet.submit(**SPEC)
        return None

    model = fleet.finish(wait_for("the job to be taken", submit)).model
    assert model is not None
    return model.digest


def test_a_flooding_worker_and_a_flooding_stranger_change_nothing_about_an_honest_job(tmp_path: Path) -> None:
    with LocalFleet(tmp_path, **LIMITS) as fleet, ExitStack() as stack:
        for name in ("w1", "w2"):  # one that is told to call less raises, and ends with its thread
            stack.enter_context(Honest(fleet, name))
        truth = finished(fleet)
        with Played(fleet, "mallory") as mallory:
            assert mallory.token is not None
            unknown = f"lyd_admin_0123456789ab_{'x' * 43}"
            with Flood(fleet, "/openapi.json", mallory.token) as worker, Flood(fleet, "/v1/jobs", unknown) as stranger:
                wait_for("both floods to be refused", lambda: worker.answers[429] > 20 and stranger.answers[429] > 20)
                assert finished(fleet) == truth
        assert set(worker.answers) == {200, 429}
        assert set(stranger.answers) == {401, 429}
        assert fleet.coordinator is not None
        told = [line for line in fleet.coordinator.said().splitlines() if f"{mallory.id} makes too many calls" in line]
        assert 1 <= len(told) <= 5  # the first, and one a minute

        # What only a real connection can say: a target that names a host, and no Host; what it runs is not told.
        named = raw(fleet, b"GET http://evil.example/healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        assert named.startswith(b"HTTP/1.1 400 ")
        assert b"2 hosts" in named
        none = raw(fleet, b"GET /healthz HTTP/1.0\r\n\r\n")
        assert none.startswith(b"HTTP/1.1 400 ")
        assert b"0 hosts" in none
        assert raw(fleet, b"CONNECT evil.example:80 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").startswith(b"HTTP/1.1 4")
        assert b"\r\nserver:" not in raw(
            fleet, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )
