"""A fleet on a tailnet: real WireGuard tunnels, 100.64.x addresses, MTU 1280, unplugged hosts and a bad road.

The coordinator is on host 0, as are the test's own calls; a worker is on each other host (tests/net/hosts.py).
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from tests.acceptance.kit import PATIENCE_S, LocalFleet, of_type, size
from tests.acceptance.test_many_kills import JOB
from tests.net.hosts import Hosts, why_no_hosts

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(why_no_hosts() != "", reason=why_no_hosts()),
]

ROUNDS, SHARDS = 5, 4
SHORTER: dict[str, Any] = {**JOB, "rounds": ROUNDS, "data": {"shards": SHARDS}}
TTL_S = 40.0  # as a coordinator has it by default
WORKERS = size(2, 4)
UNPLUGGED_S = [5.0, 60.0, 600.0][: size(1, 3)]


@dataclass(frozen=True)
class Fleet:
    hosts: Hosts
    fleet: LocalFleet
    truth: str  # SHA-256 of the undisturbed job's model


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with ExitStack() as stack:
        hosts = stack.enter_context(Hosts(1 + WORKERS))
        hosts.call("path", "relay")
        stack.enter_context(hosts.on(0))
        folder = tmp_path_factory.mktemp("tailnet")
        fleet = stack.enter_context(LocalFleet(folder, host=hosts.address(0), ttl_s=TTL_S))
        for number in range(1, 1 + WORKERS):
            with hosts.on(number):
                fleet.start_worker(f"w{number}")
        fleet.await_workers(WORKERS)
        yield Fleet(hosts, fleet, fleet.truth(**SHORTER))


def in_the_middle(seconds: float) -> None:
    """Let the job run: the length of the fault is the test's, no condition of ours."""
    threading.Event().wait(seconds)


def unplug_in_mid_job(net: Fleet, host: int, seconds: float) -> list[str]:
    """Unplug a worker's host for so long after the second round, and see the job through to the same model.

    Returns why shards were handed back.
    """
    job = net.fleet.submit(**SHORTER)
    net.fleet.await_event(job, lambda e: e["type"] == "round" and e["round"] == 2, "round 2")
    net.hosts.call("cut", str(host))
    in_the_middle(seconds)
    net.hosts.call("heal", str(host))
    model = net.fleet.finish(job).model
    assert model is not None
    assert model.digest == net.truth
    facts = net.fleet.facts(job)
    accepted = [(fact["round"], fact["shard"]) for fact in of_type(facts, "accepted")]
    assert sorted(accepted) == [(r, s) for r in range(1, ROUNDS + 1) for s in range(SHARDS)]
    return [fact["code"] for fact in of_type(facts, "handed_back")]


@pytest.mark.parametrize("host", range(1, 1 + size(1, WORKERS)))
@pytest.mark.parametrize("seconds", UNPLUGGED_S)
def test_a_host_unplugged_in_mid_job_costs_time_alone(net: Fleet, host: int, seconds: float) -> None:
    backs = unplug_in_mid_job(net, host, seconds)
    assert backs == [] or (backs == ["expired"] and seconds > TTL_S / 2), "work went to and fro"


def test_the_job_over_a_bad_road_with_an_unplugged_host_ends_with_the_same_model(net: Fleet) -> None:
    net.hosts.call("wan", "all", "delay_ms=20", "loss_pct=1", "up_mbit=20")  # 20 ms at each end, each way: 80 ms
    try:
        backs = unplug_in_mid_job(net, 1, float(size(10, 60)))
    finally:
        net.hosts.call("wan", "all", "delay_ms=0", "loss_pct=0", "up_mbit=0")
    print(f"\n80 ms, 1 % loss, 20 Mbit/s, a host unplugged: {len(backs)} shards were handed out again")


def test_a_worker_told_to_stop_says_goodbye_over_the_tunnel(net: Fleet) -> None:
    worker = net.fleet.workers["w2"].popen
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(PATIENCE_S) == 0
    assert [w.reason for w in net.fleet.api.workers() if w.name == "w2"] == ["it said goodbye"]
