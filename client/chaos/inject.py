"""The faults, one function a kind: strike, hold, lift.

Each takes the stage and a planned fault, and returns when the fault is lifted: processes run again, connections carry
again. What it returns says when the fault struck, or why it did not.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from client.chaos.clocks import NOTICED_S
from client.chaos.disk import Disk
from client.chaos.fleet import ASK_S, BULK, COORDINATOR, AimedWay, Fleet, worker_name
from client.chaos.ledger import Ledger
from client.chaos.proxy import Fault
from client.chaos.schedule import PlannedFault

TAKEN_S = 20.0  # for a connection to come by that takes a fault of the proxy
POINT_S = 20.0  # for a coordinator to come to the point at which it dies
BACK_S = 60.0  # for workers that were killed to be back


@dataclass(frozen=True)
class Stage:
    """What there is to break."""

    fleet: Fleet
    ledger: Ledger  # of the job that is disturbed
    disk: Disk | None  # under the coordinator's state, where it can lose its power


@dataclass(frozen=True)
class Blow:
    """What became of one fault."""

    struck_at: float = 0.0  # monotonic seconds
    missed: str = ""  # why it did not strike; empty: it did


Inject = Callable[[Stage, PlannedFault], Blow]


# ---------------------------------------------------------------- processes


def kill_worker(stage: Stage, fault: PlannedFault) -> Blow:
    """SIGKILL; the child that trains dies with its agent."""
    return _kill(stage, fault, _worker(fault))


def kill_coordinator(stage: Stage, fault: PlannedFault) -> Blow:
    """SIGKILL."""
    return _kill(stage, fault, COORDINATOR)


def kill_both(stage: Stage, fault: PlannedFault) -> Blow:
    """SIGKILL for both."""
    return _kill(stage, fault, COORDINATOR, _worker(fault))


def _kill(stage: Stage, fault: PlannedFault, *names: str) -> Blow:
    struck_at = time.monotonic()
    stage.fleet.kill(*names)
    stage.fleet.pause(float(fault.parameters["away_s"]))
    for name in names:
        if name == COORDINATOR:
            stage.fleet.start_coordinator()
        else:
            stage.fleet.start_worker(name)
    return Blow(struck_at)


def kill_at_point(stage: Stage, fault: PlannedFault) -> Blow:
    """A coordinator that dies at a point takes the place of the present one. It struck when it has died there."""
    point, times = fault.parameters["point"], fault.parameters["times"]
    met = stage.fleet.kill_at(f"{point}:{times}", lambda: bool(stage.ledger.ending), POINT_S)
    struck_at = time.monotonic()
    if met:
        stage.fleet.pause(float(fault.parameters["away_s"]))
    stage.fleet.start_coordinator()
    return Blow(struck_at) if met else Blow(missed=f"the coordinator did not come to {point}")


def stop_worker(stage: Stage, fault: PlannedFault) -> Blow:
    """SIGSTOP for the agent and its child, SIGCONT some leases later."""
    return _stop(stage, fault, _worker(fault))


def stop_coordinator(stage: Stage, fault: PlannedFault) -> Blow:
    """SIGSTOP, and SIGCONT some leases later."""
    return _stop(stage, fault, COORDINATOR)


def _stop(stage: Stage, fault: PlannedFault, name: str) -> Blow:
    struck_at = time.monotonic()
    with stage.fleet.frozen(name):
        stage.fleet.pause(float(fault.parameters["leases"]) * stage.fleet.lease_s)
    return Blow(struck_at)


# ---------------------------------------------------------------- connections


def cut(stage: Stage, _: PlannedFault) -> Blow:
    """A reset for every connection."""
    struck_at = time.monotonic()
    stage.fleet.proxy.cut_all()
    return Blow(struck_at)


def stall(stage: Stage, fault: PlannedFault) -> Blow:
    """The next connection that carries what is aimed at holds it for a while."""
    blow = _aim(stage, fault, "stall")
    if not blow.missed:
        stage.fleet.pause(float(fault.parameters["idles"]) * stage.fleet.idle_s)
        stage.fleet.proxy.release()
    return blow


def half_close(stage: Stage, fault: PlannedFault) -> Blow:
    """One direction of a connection ends, the other stays open."""
    return _aim(stage, fault, "half")


def corrupt(stage: Stage, fault: PlannedFault) -> Blow:
    """One byte in the middle of a model or an update. Messages are left alone: they have no digest of their own, and
    the network's checksums and the tunnel's are all that protects them."""
    return _aim(stage, fault, "corrupt")


def _aim(stage: Stage, fault: PlannedFault, kind: Literal["stall", "half", "corrupt"]) -> Blow:
    """Set a fault of the proxy, and wait until a connection has taken it."""
    way: AimedWay = stage.fleet.up if fault.parameters["way"] == "up" else stage.fleet.down
    way.least = BULK if fault.parameters.get("inside", "body") == "body" else 0
    way.fault = Fault(kind)
    stage.fleet.wait(lambda: way.fault is None or bool(stage.ledger.ending), TAKEN_S)
    taken = way.fault is None
    way.fault = None
    return Blow(time.monotonic()) if taken else Blow(missed="no connection carried what it was aimed at")


# ---------------------------------------------------------------- the machine


def clock_jump(stage: Stage, fault: PlannedFault) -> Blow:
    """The clock of one machine is wrong from now on."""
    number = int(fault.parameters["machine"])
    clock = stage.fleet.clock(worker_name(number) if number else COORDINATOR)
    if clock is None:
        return Blow(missed="clocks cannot jump here")
    clock.set(float(fault.parameters["by_s"]))
    struck_at = time.monotonic()
    stage.fleet.pause(NOTICED_S)
    return Blow(struck_at)


def disk_full(stage: Stage, fault: PlannedFault) -> Blow:
    """A file takes every byte that is free, and goes away again."""
    if stage.disk is None:
        return Blow(missed="the state is not on a disk of its own")
    struck_at = time.monotonic()
    with stage.disk.filled():
        stage.fleet.pause(float(fault.parameters["held_s"]))
    return Blow(struck_at)


def power_cut(stage: Stage, fault: PlannedFault) -> Blow:
    """The coordinator's machine loses its power.

    Workers that were killed are waited for: an update whose worker is gone when the coordinator's power fails may be
    trained again, which is the one corner that the promise leaves out.
    """
    fleet = stage.fleet
    if stage.disk is None:
        return Blow(missed="the state is not on a disk of its own")
    fleet.wait(fleet.everybody_is_back, BACK_S, every_s=ASK_S)
    struck_at = time.monotonic()
    stage.disk.cut(lambda: fleet.kill(COORDINATOR))
    fleet.pause(float(fault.parameters["away_s"]))
    fleet.start_coordinator()
    return Blow(struck_at)


def _worker(fault: PlannedFault) -> str:
    return worker_name(int(fault.parameters["worker"]))


INJECT: Mapping[str, Inject] = {
    "kill-worker": kill_worker,
    "kill-coordinator": kill_coordinator,
    "kill-both": kill_both,
    "kill-at-point": kill_at_point,
    "stop-worker": stop_worker,
    "stop-coordinator": stop_coordinator,
    "cut": cut,
    "stall": stall,
    "half-close": half_close,
    "corrupt": corrupt,
    "clock-jump": clock_jump,
    "disk-full": disk_full,
    "power-cut": power_cut,
}
