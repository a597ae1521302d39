"""A fleet with one relayed host: who is slow, and why, is there to be read, and the job runs all the same.

Real WireGuard tunnels (tests/net); a stand-in for tailscaled says which machine is whose and how it is reached, since
nothing relays by itself here: the host that it calls relayed has a slow road.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from common.messages import WorkerView
from tests.acceptance.kit import LocalFleet, Process, of_type, wait_for
from tests.acceptance.test_many_kills import TASK
from tests.fake_tailscaled import FakeTailscaled, Peer
from tests.net.hosts import Hosts, why_no_hosts

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.skipif(why_no_hosts() != "", reason=why_no_hosts()),
]

SLOW_MBIT = 4.0
PEERS = [
    Peer("100.64.0.1", "coordinator", tags=("tag:lydian-coordinator",)),
    Peer("100.64.0.2", "near", login="alice@example.com", current_address="198.18.0.2:41641"),
    Peer("100.64.0.3", "far", tags=("tag:lydian-worker",), current_address="", relay="fra"),
]


class TailnetFleet(LocalFleet):
    """A fleet that finds its tailnet by itself: the coordinator its addresses, the workers the machine it is on."""

    def __init__(self, folder: Path, daemon: FakeTailscaled, host: str) -> None:
        super().__init__(folder, host=host, LYDIAN_TAILSCALED=str(daemon.path))
        self.daemon = daemon

    def start_coordinator(self) -> Process:
        arguments = ["-m", "server", "--port", str(self.port), "--state-dir", str(self.state)]
        process = Process(arguments, self.folder / "coordinator.log", self.environment)
        self.coordinator = process
        wait_for("the coordinator to listen", lambda: "\nready " in process.said() or process.popen.poll())
        assert process.popen.poll() is None, process.said()
        return process

    def join(self, name: str) -> None:
        """Start a worker with a token that names the coordinator's machine."""
        token = self.lydian("token", "join").stdout.strip()
        self.workers[name] = Process(
            ["-m", "worker", self.url, "--name", name, "--state-dir", str(self.folder / name), "--threads", "1",
             "--device", "cpu", "--trust", "any"],
            self.folder / f"{name}.log",
            {"LYDIAN_TOKEN": token, "LYDIAN_TAILSCALED": str(self.daemon.path)},
        )  # fmt: skip

    def lydian(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("LYDIAN_")}
        return subprocess.run(
            [sys.executable, "-m", "client.main", *arguments],
            env={**kept, "LYDIAN_URL": self.url, "LYDIAN_TOKEN": self.admin_token},
            capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TailnetFleet]:
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("relayed")
        hosts = stack.enter_context(Hosts(3))
        hosts.call("path", "relay")
        hosts.call("wan", "2", "delay_ms=20", f"up_mbit={SLOW_MBIT:g}", f"down_mbit={SLOW_MBIT:g}")
        daemon = stack.enter_context(FakeTailscaled(folder / "tailscaled.sock", PEERS))
        stack.enter_context(hosts.on(0))
        fleet = stack.enter_context(TailnetFleet(folder, daemon, hosts.address(0)))
        for number, name in ((1, "near"), (2, "far")):
            with hosts.on(number):
                fleet.join(name)
        fleet.await_workers(2)
        yield fleet


def measured(fleet: TailnetFleet) -> dict[str, WorkerView]:
    """Both workers, once they have told of their lines."""

    def look() -> dict[str, WorkerView]:
        found = {worker.name: worker for worker in fleet.api.workers()}
        return found if all(worker.link is not None for worker in found.values()) else {}

    return wait_for("both lines to be measured", look)


def test_lydian_workers_says_who_is_relayed_and_how_slow_that_is(fleet: TailnetFleet) -> None:
    found = measured(fleet)
    near, far = found["near"], found["far"]
    assert near.node is not None
    assert (near.node.owner, near.address) == ("alice@example.com", "100.64.0.2")
    assert near.path is not None
    assert near.path.kind == "direct"
    assert near.warnings == ()
    assert far.link is not None
    assert near.link is not None
    assert far.link.down * 8e-6 < 1.5 * SLOW_MBIT
    assert far.link.up * 8e-6 < 1.5 * SLOW_MBIT
    assert far.link.latency_s > 0.035  # 20 ms each way
    assert near.link.down > far.link.down

    shown = fleet.lydian("workers")
    header, *rows = shown.stdout.splitlines()
    assert "NODE" in header
    row = next(row for row in rows if " far " in row)
    assert "far.tailnet.test (tag:lydian-worker)" in row
    assert "relayed by fra" in row
    assert "Mbit/s" in row
    assert "relayed" not in next(row for row in rows if " near " in row)
    (warning,) = shown.stderr.splitlines()
    assert re.fullmatch(
        r"warning: far: relayed by fra, which is slow \([0-9.]+ Mbit/s down, [0-9.]+ Mbit/s up\): .*41641.*", warning
    )
    as_json = json.loads(fleet.lydian("workers", "--json").stdout)
    told = {worker["name"]: worker["path"]["kind"] for worker in as_json}
    assert told == {"near": "direct", "far": "relay"}


def test_both_found_the_machine_that_their_token_names(fleet: TailnetFleet) -> None:
    for name in ("near", "far"):
        said = fleet.workers[name].said()
        assert "100.64.0.1 is coordinator.tailnet.test (n0CNTRL), as the join token says" in said


@pytest.fixture(scope="module")
def job(fleet: TailnetFleet) -> str:
    """A job that is done. Its shards are cut for each: of anybody's, the near worker may train all before the other."""
    data, train = {"shards": "auto"}, {"local_steps": 1}  # it is the road that takes the time, on a busy machine too
    submitted = fleet.submit(TASK, rounds=2, data=data, train=train, round={"min_workers": 2})
    fleet.finish(submitted)
    return submitted


def test_a_job_runs_over_the_relay_and_both_take_part(fleet: TailnetFleet, job: str) -> None:
    accepted = list(of_type(fleet.facts(job), "accepted"))
    assert sorted((fact["round"], fact["shard"]) for fact in accepted) == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert {fact["worker_name"] for fact in accepted} == {"near", "far"}


def test_the_plan_of_the_job_says_who_is_waited_for_and_that_it_is_the_relay(fleet: TailnetFleet, job: str) -> None:
    plan = json.loads(fleet.lydian("plan", job, "--json").stdout)
    assert plan["blame"].startswith("far is waited for during ")
    assert "(relayed by fra)" in plan["blame"]
    assert plan["advice"]
