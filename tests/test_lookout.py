"""The lookout: it tells of each change once, follows an order before it returns, and blind it lets others go first."""

import threading
from datetime import datetime

import pytest

from worker import lookout
from worker.lookout import Lookout
from worker.manners import Manner, Measured, Rules

NOON = datetime(2026, 3, 2, 12)  # noqa: DTZ001 - a wall clock has no zone


class Agent:
    """What a lookout speaks to."""

    def __init__(self, **rules: bool | float) -> None:
        self.working, self.told, self.sees = False, list[Manner](), Measured()
        self.measured_in = set[threading.Thread]()
        self.lookout = Lookout(
            Rules(quiet_s=0, **rules),  # type: ignore[arg-type]
            lambda: self.working,
            self.told.append,
            wall=lambda: NOON,
        )

    def measure(self) -> Measured:
        self.measured_in.add(threading.current_thread())
        return self.sees


def test_a_change_is_told_once_and_the_way_back_too() -> None:
    agent = Agent(only_idle=True)
    agent.lookout.open(agent.measure)
    agent.lookout.close()
    agent.sees = Measured(others_on_gpu=("game (pid 7)",))
    for _ in range(3):
        agent.lookout.look()
    agent.sees = Measured()
    for _ in range(3):
        agent.lookout.look()
    assert [manner.act for manner in agent.told] == ["rest", "work"]


def test_without_a_rule_no_thread_looks_and_orders_are_followed_all_the_same() -> None:
    agent = Agent()
    agent.lookout.open(agent.measure)
    assert not agent.lookout.is_alive()
    agent.lookout.obey("pause")
    assert (agent.lookout.order, agent.lookout.manner.act) == ("pause", "rest")
    agent.lookout.obey("work")
    assert [manner.act for manner in agent.told] == ["rest", "work"]
    assert agent.measured_in == set()


def test_a_drained_worker_rests_when_its_work_is_done() -> None:
    agent = Agent()
    agent.working = True
    agent.lookout.obey("drain")
    assert agent.lookout.manner.act == "work"
    agent.working = False
    assert agent.lookout.judge().act == "rest"


def test_a_lookout_that_fails_lets_others_go_first_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookout, "LOOK_S", 0.001)
    agent = Agent(only_idle=True)
    agent.lookout._measure = lambda: 1 // 0  # type: ignore[assignment,return-value]
    with pytest.raises(ZeroDivisionError):
        agent.lookout.run()
    assert [(manner.act, manner.why) for manner in agent.told] == [("rest", "its lookout failed: see its log")]
    agent.lookout.obey("work")
    assert agent.lookout.judge().act == "rest"


def test_a_lookout_looks_by_itself_where_a_rule_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookout, "LOOK_S", 0.001)
    agent, gone = Agent(only_idle=True), threading.Event()
    agent.lookout._changed = lambda manner: gone.set()
    agent.lookout.open(agent.measure)
    agent.sees = Measured(others_on_gpu=("game (pid 7)",))
    assert gone.wait(30.0)
    agent.lookout.close()
    agent.lookout.join(30.0)
    assert not agent.lookout.is_alive()


def test_the_wall_shows_local_time_without_a_zone() -> None:
    assert lookout.local_time().tzinfo is None
