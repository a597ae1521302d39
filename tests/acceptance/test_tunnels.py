"""Uploads through real WireGuard tunnels: over a bad line in several streams, over a good one in one, and over a path
that changes under them.

The coordinator is on one host of a tailnet and the worker, played by the test, on another. No training: bytes are the
subject.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from common.messages import Assignment, ModelFacts, Submission
from common.transfers import PIECE, Upload
from common.weights import Notes, file_digest, save
from tests.acceptance.kit import LocalFleet, of_type, size
from tests.acceptance.played import Played
from tests.net.hosts import Hosts, why_no_hosts

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(why_no_hosts() != "", reason=why_no_hosts()),
]

T = TypeVar("T")

MIB = 1 << 20
BAD_LINE = ("loss_pct=1", "up_mbit=20", "down_mbit=20")  # of the worker's host; each end adds 20 ms each way: 80 ms
ROUND_TRIP_S = 0.078


class Road:
    """A coordinator on host 0, a worker on host 1. The test's thread is on host 0."""

    def __init__(self, hosts: Hosts, fleet: LocalFleet, stack: ExitStack) -> None:
        self.hosts, self.fleet = hosts, fleet
        with hosts.on(1):
            self.worker = stack.enter_context(Played(fleet, f"w{os.urandom(3).hex()}"))

    def begin(self, mebibytes: int) -> tuple[str, Assignment, Path]:
        """A job whose model is to be uploaded: (its id, the assignment, the file)."""
        job = self.fleet.submit(rounds=1, data={"shards": 1})
        with self.hosts.on(1):
            work = self.worker.poll()
        file = self.fleet.folder / job
        numbers = np.random.default_rng(5).standard_normal(mebibytes * MIB // 4, dtype=np.float32)
        save(file, {"w": numbers}, Notes())
        return job, work, file

    def sender(self, work: Assignment, file: Path) -> Upload:
        """An upload of a file, still to be run."""
        api = self.worker.api
        return Upload(api._client, api.url, f"/v1/updates/{work.id}?attempt={work.attempt}", file, (), None)

    def send(self, file: Path, upload: Upload, call: Callable[[], T]) -> T:
        """Make a call that uploads a file from host 1, and say how fast that was."""
        began = time.monotonic()
        with self.hosts.on(1):
            made = call()
        mbit = file.stat().st_size * 8e-6 / (time.monotonic() - began)
        print(f"\n{file.stat().st_size} bytes over {upload.streams_used} streams: {mbit:.1f} Mbit/s")
        return made

    def hand_in(self, job: str, work: Assignment, file: Path) -> None:
        """Let the upload count: its digest is compared, its numbers are looked at."""
        facts = ModelFacts(parameters=1, train_samples=1, test_samples=0, bounds=(0, 1))
        submission = Submission(attempt=work.attempt, digest=file_digest(file), facts=facts)
        with self.hosts.on(1):
            self.worker.api.submit(work.id, submission)
        assert self.fleet.api.job(job).model is not None
        assert not self.fleet.api.logs(job)
        self.fleet.api.cancel(job)
        assert not list(of_type(self.fleet.facts(job), "handed_back", "late", "lost"))

    def round_trip_s(self) -> float:
        """What one packet to the coordinator and one back take."""
        with self.hosts.on(1):
            began = time.monotonic()
            socket.create_connection((self.fleet.host, self.fleet.port), timeout=20).close()
            return time.monotonic() - began


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Road]:
    with ExitStack() as stack:
        hosts = stack.enter_context(Hosts(2))
        stack.enter_context(hosts.on(0))
        folder = tmp_path_factory.mktemp("road")
        fleet = stack.enter_context(LocalFleet(folder, host=hosts.address(0), ttl_s=600))
        yield Road(hosts, fleet, stack)


@pytest.fixture
def bad_line(road: Road) -> Iterator[None]:
    road.hosts.call("path", "relay")
    road.hosts.call("wan", "all", "delay_ms=20")
    road.hosts.call("wan", "1", *BAD_LINE)
    yield
    road.hosts.call("wan", "all", "delay_ms=0", "loss_pct=0", "up_mbit=0", "down_mbit=0")
    road.hosts.call("path", "direct")


@pytest.mark.usefixtures("bad_line")
def test_an_upload_over_a_bad_line_takes_several_streams_and_sends_each_byte_once(road: Road) -> None:
    assert road.round_trip_s() > ROUND_TRIP_S
    job, work, file = road.begin(size(2, 8))  # at one stream's rate
    alone = road.sender(work, file)
    road.send(file, alone, lambda: alone.carry((0, file.stat().st_size)))  # in one request, for comparison
    assert alone.streams_used == 1
    road.hand_in(job, work, file)

    job, work, file = road.begin(size(8, 100))
    several = road.sender(work, file)
    assert road.send(file, several, several.run) == file.stat().st_size
    assert several.streams_used > 1
    road.hand_in(job, work, file)


def test_an_upload_over_a_good_line_takes_one_stream(road: Road) -> None:
    job, work, file = road.begin(2)
    upload = road.sender(work, file)
    assert road.send(file, upload, upload.run) == file.stat().st_size
    assert upload.streams_used == 1
    road.hand_in(job, work, file)


def test_an_upload_whose_path_changes_between_direct_and_relayed_sees_no_error(road: Road) -> None:
    switches = 10
    job, work, file = road.begin(2 * (switches + 1))
    upload = Switched(road, work, file)
    road.send(file, upload, lambda: upload.carry((0, file.stat().st_size)))  # one request, one connection
    assert upload.switches == switches
    road.hand_in(job, work, file)


class Switched(Upload):
    """An upload whose path changes after every two MiB of it, while its bytes are under way."""

    def __init__(self, road: Road, work: Assignment, file: Path) -> None:
        api = road.worker.api
        super().__init__(api._client, api.url, f"/v1/updates/{work.id}?attempt={work.attempt}", file, (), None)
        self.hosts, self.switches = road.hosts, 0

    def _read(self, start: int, stop: int) -> Iterator[bytes]:
        for number, piece in enumerate(super()._read(start, stop)):
            if number > 0 and number % (2 * MIB // PIECE) == 0 and start + number * PIECE < stop - MIB:
                self.hosts.call("path", "direct" if self.switches % 2 else "relay")
                self.switches += 1
            yield piece
