"""Bytes on bad lines: what arrived is not sent again, what is damaged is not used, what stands still is ended.

A real coordinator; the worker is played by the test, and reaches it through a proxy that breaks its connections.
"""

import os
import random
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil
import pytest

from client.chaos.proxy import Fault, Proxy
from common.api import CoordinatorApi
from common.errors import BadUpdateError, TooSlowError, UnavailableError
from common.messages import Assignment, ModelFacts, Submission
from common.ranges import parse_ranges
from common.transfers import Upload
from common.weights import Notes, file_digest, save
from tests.acceptance.kit import PATIENCE_S, LocalFleet, size, wait_for
from tests.acceptance.played import Played

pytestmark = pytest.mark.acceptance

MIB = 1 << 20
BLOCK = MIB  # bytes that may be sent again after a cut: what the kernel and the server had not passed on
CUTS = size(20, 50)
MODEL_BYTES = size(20, 200) * MIB
TTL_S = 600.0  # nobody beats for a played worker
FURTHEST = MODEL_BYTES // CUTS // 2  # one stream gets before it is cut; several must not be done before
IDLE_S = 3.0  # of `impatient`


class Line:
    """A worker with one big model, behind a proxy."""

    def __init__(self, fleet: LocalFleet, net: Proxy, stack: ExitStack) -> None:
        self.fleet, self.net = fleet, net
        self.worker = stack.enter_context(Played(fleet, f"w{os.urandom(3).hex()}"))
        self.api = stack.enter_context(CoordinatorApi(f"http://127.0.0.1:{net.port}", self.worker.token))
        self.job = fleet.submit(rounds=1, data={"shards": 1})
        work = self.worker.poll()
        self.file = fleet.folder / "model"
        numbers = np.random.default_rng(5).standard_normal(MODEL_BYTES // 4, dtype=np.float32)
        save(self.file, {"w": numbers}, Notes())
        self.digest = file_digest(self.file)
        facts = ModelFacts(parameters=numbers.size, train_samples=10, test_samples=0, bounds=(0, 10))
        self.worker.api.upload(work.id, work.attempt, self.file)
        self.worker.api.submit(work.id, Submission(attempt=1, digest=self.digest, facts=facts))
        self.work: Assignment = self.worker.poll()
        self.bytes = self.file.stat().st_size

    def insist(self, call: Callable[[bool], object]) -> int:
        """Make a call until it succeeds; returns how often it broke."""
        for failures in range(1000):
            try:
                call(failures > 0)
            except UnavailableError:
                continue
            return failures
        raise AssertionError("it never succeeded")

    def upload(self, again: bool) -> None:
        self.api.upload(self.work.id, self.work.attempt, self.file, resume=again)

    def submit(self) -> None:
        self.api.submit(self.work.id, Submission(attempt=self.work.attempt, digest=self.digest, samples=10))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    with LocalFleet(tmp_path_factory.mktemp("fleet"), ttl_s=TTL_S) as running:
        yield running


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """One that soon gives up who stands still: on a busy machine, those who only are slow as well."""
    settings = {"LYDIAN_BODY_IDLE_S": str(IDLE_S)}
    with LocalFleet(tmp_path_factory.mktemp("impatient"), ttl_s=TTL_S, **settings) as running:
        yield running


@pytest.fixture
def line(request: pytest.FixtureRequest) -> Iterator[Line]:
    """To `fleet`, or the one that a test names."""
    fleet: LocalFleet = request.getfixturevalue(getattr(request, "param", "fleet"))
    with ExitStack() as stack:
        net = stack.enter_context(Proxy("127.0.0.1", fleet.port))
        made = Line(fleet, net, stack)
        yield made
        if fleet.api.job(made.job).state != "finished":
            fleet.api.cancel(made.job)
        made.worker.api.leave(made.worker.id, "s1")


def test_an_upload_cut_again_and_again_sends_at_most_a_block_twice_for_each_cut(line: Line) -> None:
    chance = random.Random(1)
    before, cuts = line.net.up.bytes, 0

    def upload(again: bool) -> None:
        nonlocal cuts
        if cuts < CUTS:
            kind = chance.choice(["reset", "close"])
            line.net.up.fault = Fault(kind, after=chance.randrange(FURTHEST))
        cuts += 1
        line.upload(again)

    broken = line.insist(upload)
    assert broken >= CUTS - 1
    line.submit()
    sent = line.net.up.bytes - before
    again = sent - line.bytes
    print(f"\n{line.bytes} bytes up, {broken} cuts, {again} bytes sent again, {again / broken:.0f} a cut")
    assert again <= broken * BLOCK
    line.fleet.finish(line.job)


def test_a_download_cut_again_and_again_fetches_at_most_a_block_twice_for_each_cut(line: Line, tmp_path: Path) -> None:
    chance = random.Random(2)
    before, cuts, target = line.net.down.bytes, 0, tmp_path / "model"
    assert line.work.base is not None
    base = line.work.base

    def download(_: bool) -> None:
        nonlocal cuts
        if cuts < CUTS:
            line.net.down.fault = Fault(chance.choice(["reset", "close"]), after=chance.randrange(FURTHEST))
        cuts += 1
        line.api.download_model(base.digest, target, size=base.size)

    broken = line.insist(download)
    again = line.net.down.bytes - before - line.bytes
    print(f"\n{line.bytes} bytes down, {broken} cuts, {again} bytes fetched again, {again / broken:.0f} a cut")
    assert broken >= CUTS - 1
    assert again <= broken * BLOCK
    assert file_digest(target) == line.digest
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_one_flipped_byte_on_the_way_up_is_no_strike_and_is_sent_again(line: Line) -> None:
    line.net.up.fault = Fault("corrupt", after=MIB)  # of one stream; of several each may carry but a part
    line.upload(False)
    with pytest.raises(BadUpdateError) as refused:
        line.submit()
    assert refused.value.code == "digest_mismatch"
    line.upload(True)
    line.submit()
    assert line.fleet.finish(line.job).model is not None
    assert not line.fleet.api.logs(line.job)


def test_one_flipped_byte_on_the_way_down_is_fetched_again(line: Line, tmp_path: Path) -> None:
    assert line.work.base is not None
    line.net.down.fault = Fault("corrupt", after=MIB)
    with pytest.raises(BadUpdateError) as damaged:
        line.api.download_model(line.work.base.digest, tmp_path / "m", size=line.work.base.size)
    assert damaged.value.code == "digest_mismatch"
    assert list(tmp_path.iterdir()) == []
    line.api.download_model(line.work.base.digest, tmp_path / "m", size=line.work.base.size)
    assert file_digest(tmp_path / "m") == line.digest


@pytest.mark.parametrize("kind", ["close", "reset", "half"])
def test_a_lost_answer_to_a_submission_is_given_again(line: Line, kind: str) -> None:
    line.upload(False)
    line.net.cut_all()
    line.net.down.fault = Fault(kind, after=0)  # type: ignore[arg-type]
    with pytest.raises(UnavailableError):
        line.submit()
    line.submit()
    line.fleet.finish(line.job)
    facts = line.fleet.facts(line.job)
    assert len([fact for fact in facts if fact["type"] == "accepted"]) == 1


def open_things(process: psutil.Process) -> tuple[int, int]:
    return process.num_fds(), process.num_threads()


@pytest.mark.parametrize("line", ["impatient"], indirect=True)
def test_a_stalled_upload_is_ended_and_resumed_and_leaves_nothing_open(line: Line) -> None:
    assert line.fleet.coordinator is not None
    process = psutil.Process(line.fleet.coordinator.popen.pid)
    before = wait_for("the coordinator to be quiet", lambda: open_things(process))
    for _ in range(size(2, 50)):
        line.net.up.fault = Fault("stall", after=MIB)
        with pytest.raises((TooSlowError, UnavailableError)):
            line.upload(True)
        line.net.cut_all()
    line.upload(True)
    line.submit()
    line.net.cut_all()
    wait_for("every descriptor to be closed", lambda: open_things(process)[0] <= before[0])
    line.fleet.finish(line.job)


@pytest.mark.parametrize("line", ["impatient"], indirect=True)
def test_a_client_that_stops_reading_a_download_is_cut_off(line: Line) -> None:
    assert line.fleet.coordinator is not None
    assert line.work.base is not None
    process = psutil.Process(line.fleet.coordinator.popen.pid)
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect(("127.0.0.1", line.fleet.port))
        lazy.settimeout(PATIENCE_S)
        ours = lazy.getsockname()[1]
        lazy.sendall(
            f"GET /v1/models/{line.work.base.digest} HTTP/1.1\r\nHost: [::1]\r\n"
            f"Authorization: Bearer {line.worker.token}\r\n\r\n".encode()
        )

        def held() -> bool:
            return any(c.raddr and c.raddr.port == ours for c in process.net_connections() if c.status == "ESTABLISHED")

        assert lazy.recv(1) == b"H"  # it has begun, and not one more byte is read
        wait_for("the coordinator to give it up", lambda: not held())


@pytest.mark.parametrize("line", ["impatient"], indirect=True)
def test_a_message_whose_body_never_comes_is_answered_with_408(line: Line) -> None:
    with socket.create_connection(("127.0.0.1", line.fleet.port), timeout=PATIENCE_S) as slow:
        slow.sendall(
            b"POST /v1/jobs HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"
            + f"Authorization: Bearer {line.fleet.admin_token}\r\n\r\n{{".encode()
        )
        answer = b""
        while piece := slow.recv(4096):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"too_slow"' in answer
    assert f"no byte of the body came for {IDLE_S:g} s, after 1 bytes".encode() in answer


def test_a_message_that_is_far_too_large_is_refused_before_it_is_read(line: Line) -> None:
    with socket.create_connection(("127.0.0.1", line.fleet.port), timeout=PATIENCE_S) as big:
        big.sendall(
            b"POST /v1/jobs HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/json\r\nContent-Length: 900000000\r\n"
            + f"Authorization: Bearer {line.fleet.admin_token}\r\n\r\n".encode()
        )
        answer = b""
        while piece := big.recv(4096):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"too_large"' in answer


def test_a_coordinator_killed_in_mid_upload_asks_for_the_rest_alone(tmp_path: Path) -> None:
    with ExitStack() as stack:
        fleet = stack.enter_context(LocalFleet(tmp_path))
        net = stack.enter_context(Proxy("127.0.0.1", fleet.port))
        line = Line(fleet, net, stack)
        path = f"/v1/updates/{line.work.id}?attempt=1"
        upload = Upload(line.api._client, line.api.url, path, line.file, (), None)
        net.up.fault = Fault("stall", after=MODEL_BYTES // 2)
        # What the kernel has not passed on yet dies with the coordinator, so it is killed once it holds the half.
        half = MODEL_BYTES // 2 - BLOCK // 4  # and a little less: the request's head is of what the proxy counted
        killer = threading.Thread(target=kill_when, args=(fleet, lambda: held(line, path) >= half))
        killer.start()
        with pytest.raises(UnavailableError):
            upload.carry((0, line.bytes))  # in one request: of several streams none may come so far
        killer.join()
        fleet.start_coordinator()
        before = net.up.bytes
        line.upload(True)
        line.submit()
        sent = net.up.bytes - before
        print(f"\n{sent} of {line.bytes} bytes were sent after the restart")
        assert sent <= line.bytes - MODEL_BYTES // 2 + 2 * BLOCK
        fleet.finish(line.job)


def held(line: Line, path: str) -> int:
    """Bytes of the upload that the coordinator says it has; asked past the proxy."""
    answer = line.worker.api._client.head(path)
    return sum(stop - start for start, stop in parse_ranges(answer.headers["Lydian-Ranges"]))


def kill_when(fleet: LocalFleet, so: Callable[[], bool]) -> None:
    wait_for("the moment to kill the coordinator", so)
    assert fleet.coordinator is not None
    fleet.coordinator.kill()


def test_a_coordinator_told_to_stop_ends_with_0_whatever_is_open(tmp_path: Path) -> None:
    with ExitStack() as stack:
        fleet = stack.enter_context(LocalFleet(tmp_path))
        net = stack.enter_context(Proxy("127.0.0.1", fleet.port))
        line = Line(fleet, net, stack)
        assert fleet.coordinator is not None
        watched = fleet.api.events(line.job)
        assert next(watched)["type"] == "submitted"
        with socket.create_connection(("127.0.0.1", fleet.port)) as half:
            half.sendall(
                f"PUT /v1/updates/{line.work.id}?attempt=1 HTTP/1.1\r\nHost: [::1]\r\nContent-Length: {line.bytes}\r\n"
                f"Authorization: Bearer {line.worker.token}\r\n\r\nabc".encode()
            )
            fleet.coordinator.popen.send_signal(signal.SIGTERM)
            assert fleet.coordinator.popen.wait(PATIENCE_S) == 0
        assert "Traceback" not in fleet.coordinator.said()


def test_parallel_streams_bring_an_upload_over_a_line_that_is_slow_for_each(line: Line) -> None:
    file = line.fleet.folder / "part"
    file.write_bytes(os.urandom(6 * MIB))
    line.net.up.rate = 1.5 * MIB
    upload = Upload(line.api._client, line.api.url, f"/v1/updates/{line.work.id}?attempt=1", file, (), None)
    assert upload.run() == 6 * MIB
    assert upload.streams_used >= 2
