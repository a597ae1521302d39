"""A worker that floods with its own token, and a stranger with none, beside an honest fleet: its job is as without."""

import http.client
import socket
import threading
from collections import Counter
from pathlib import Path

import pytest

from tests.acceptance.kit import LocalFleet, wait_for
from tests.acceptance.played import Played

pytestmark = pytest.mark.acceptance

TASK = Path(__file__).with_name("drill_task.py")
SPEC = {"rounds": 3, "round": {"min_workers": 2}, "data": {"shards": 4}, "train": {"local_epochs": 1, "batch_size": 32}}
LIMITS = {"LYDIAN_CALLS_PER_S": "100", "LYDIAN_CALLS_BURST": "300", "LYDIAN_STRANGER_CALLS_BURST": "20"}


class Flood(threading.Thread):
    """Calls without a pause, over one connection after the other, until told to stop."""

    def __init__(self, fleet: LocalFleet, path: str, token: str) -> None:
        super().__init__()
        self.fleet, self.path, self.token = fleet, path, token
        self.answers = Counter[int]()
        self.stopping = threading.Event()

    def run(self) -> None:
        while not self.stopping.is_set():
            line = http.client.HTTPConnection(self.fleet.host, self.fleet.port, timeout=60)
            try:
                for _ in range(50):
                    line.request("GET", self.path, headers={"Authorization": f"Bearer {self.token}"})
                    answer = line.getresponse()
                    answer.read()
                    self.answers[answer.status] += 1
            finally:
                line.close()

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


def test_a_flooding_worker_and_a_flooding_stranger_change_nothing_about_an_honest_job(tmp_path: Path) -> None:
    with LocalFleet(tmp_path, **LIMITS) as fleet:
        fleet.start_workers(2, "--trust", "any")
        truth = fleet.truth(TASK, **SPEC)
        with Played(fleet, "mallory") as mallory:
            assert mallory.token is not None
            unknown = f"lyd_admin_0123456789ab_{'x' * 43}"
            with Flood(fleet, "/openapi.json", mallory.token) as worker, Flood(fleet, "/v1/jobs", unknown) as stranger:
                wait_for("both floods to be refused", lambda: worker.answers[429] > 50 and stranger.answers[429] > 50)
                view = fleet.finish(fleet.submit(TASK, **SPEC))
        assert view.model is not None
        assert view.model.digest == truth
        assert set(worker.answers) == {200, 429}
        assert set(stranger.answers) == {401, 429}
        for name, process in fleet.workers.items():
            assert "too many calls" not in process.said(), name
        assert fleet.coordinator is not None
        told = [line for line in fleet.coordinator.said().splitlines() if f"{mallory.id} makes too many calls" in line]
        assert 1 <= len(told) <= 5  # the first, and one a minute

        # What only a real connection can say: a target that names a host, no Host, and an upgrade.
        named = raw(fleet, b"GET http://evil.example/healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        assert named.startswith(b"HTTP/1.1 400 ")
        assert b"2 hosts" in named
        none = raw(fleet, b"GET /healthz HTTP/1.0\r\n\r\n")
        assert none.startswith(b"HTTP/1.1 400 ")
        assert b"0 hosts" in none
        assert raw(fleet, b"CONNECT evil.example:80 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").startswith(b"HTTP/1.1 4")
        upgrade = b"Connection: Upgrade, close\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        assert b" 200 OK" in raw(fleet, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + upgrade + b"\r\n")
        assert b"\r\nserver:" not in raw(
            fleet, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )
