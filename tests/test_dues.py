"""The dues of a round: those of the shards that are out now, and none worked out that nobody asks for."""

from hypothesis import given
from hypothesis import strategies as st

from server.deadlines import Due
from server.dues import Dues
from server.rounds import Task

TASKS = st.builds(Task, st.sampled_from(["train", "evaluate"]), st.integers(1, 3), st.integers(0, 5))


def due_of(worker: str) -> Due:
    return Due(worker, worker.upper(), since=1.0, within=None)


@given(st.dictionaries(TASKS, st.sampled_from("abcdef")), st.integers(1, 3))
def test_they_are_those_of_the_shards_of_this_round_and_of_nothing_else(holders: dict[Task, str], number: int) -> None:
    wanted = {
        task.shard: due_of(worker) for task, worker in holders.items() if (task.kind, task.round) == ("train", number)
    }
    dues = Dues(number, holders, due_of)
    assert dict(dues) == wanted
    assert len(dues) == len(wanted)
    assert all((shard in dues) == (shard in wanted) for shard in range(6))


def test_what_is_not_asked_for_is_not_worked_out() -> None:
    asked = list[str]()

    def noted(worker: str) -> Due:
        asked.append(worker)
        return due_of(worker)

    dues = Dues(1, {Task("train", 1, shard): f"w{shard}" for shard in range(1000)}, noted)
    assert len(dues) == 1000
    assert 1000 not in dues
    assert dues[7].worker == "w7"
    assert asked == ["w7"]
