"""Many shards in one command: the pure parts in this process, and the command in a real child beside one by one."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from tests.test_task_host import SMALL_TASK, Desk
from worker import task_stacked
from worker.child import Child, TaskStopped

PLAIN_TASK = SMALL_TASK.replace("nn.Dropout(0.2), ", "")
CLOSE = 1e-4  # of the length of an update; both ways compute in float32


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    with Child.start(device="cpu", threads=1, log_path=tmp_path_factory.mktemp("child") / "child.log") as child:
        yield child


@pytest.fixture
def desk(child: Child, tmp_path: Path) -> Desk:
    return Desk(child, tmp_path)


SHARDS = [list(range(7)), list(range(7, 30)), list(range(30, 40)), list(range(40, 61)), list(range(5, 25)), [3, 4]]


def train_many(desk: Desk, stack: str, shards: Sequence[Sequence[int]] = SHARDS, **fields: Any) -> dict[str, Any]:
    given = []
    for number, shard in enumerate(shards):
        rows = desk.folder / f"rows-{number}.npy"
        np.save(rows, np.array(shard, dtype=np.int64))
        given.append({"indices": str(rows), "out": str(desk.path(f"{stack}-{number}")), "seed": 100 + number})
    return desk.ask("train_many", base=str(desk.path("base")), shards=given, round=1, stack=stack, **fields)


def bytes_of(desk: Desk, stack: str, number: int) -> str:
    return hashlib.sha256(desk.path(f"{stack}-{number}").read_bytes()).hexdigest()


def apart(desk: Desk, one: str, other: str, number: int) -> float:
    ours, theirs = (load_file(desk.path(f"{way}-{number}")) for way in (one, other))
    assert ours.keys() == theirs.keys()
    return task_stacked.distance(ours, theirs, load_file(desk.path("base")))


# ---------------------------------------------------------------- the pure parts


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=20), st.integers(1, 8))
def test_groups_hold_every_shard_once_and_those_with_more_steps_come_first(lengths: list[list[int]], most: int) -> None:
    found = task_stacked.groups(lengths, most)
    assert sorted(at for group in found for at in group) == list(range(len(lengths)))
    for group in found:
        assert len(group) <= most
        steps = [len(lengths[at]) for at in group]
        assert steps == sorted(steps, reverse=True)


def test_shards_of_very_unlike_sizes_are_in_groups_of_their_own() -> None:
    assert task_stacked.groups([[2], [100, 100], [2], [100, 99]], most=8) == [[1, 3], [0, 2]]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.integers(0, 5), st.booleans(), st.data())
def test_the_mean_over_a_filled_up_batch_is_that_of_its_own_samples(
    samples: int, more: int, probabilities: bool, data: st.DataObject
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    logits, y = torch.randn(samples, 4), torch.randint(0, 4, (samples,))
    if not probabilities and samples > 1:
        y[0] = task_stacked.IGNORED
    wanted: torch.Tensor = torch.softmax(torch.randn(samples, 4), 1) if probabilities else y
    rows = torch.cat([torch.arange(samples), torch.zeros(more, dtype=torch.int64)])
    counted = torch.cat([torch.ones(samples), torch.zeros(more)])
    found = task_stacked.mean_cross_entropy(logits[rows], wanted[rows], counted)
    torch.testing.assert_close(found, nn.functional.cross_entropy(logits, wanted))


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(2, 2), None),
        (nn.Dropout(0.5), "its layer 0 is a Dropout"),
        (nn.Dropout(0.0), None),
        (nn.BatchNorm1d(2), "its layer 0 is a BatchNorm1d"),
        (nn.GroupNorm(1, 2), None),
    ],
)
def test_a_layer_that_no_stack_can_have_is_named(layer: nn.Module, expected: str | None) -> None:
    assert task_stacked.why_not(nn.Sequential(layer, nn.Linear(2, 2))) == expected


def test_nothing_is_as_far_as_nan() -> None:
    base, nan = {"w": torch.zeros(2)}, {"w": torch.tensor([1.0, float("nan")])}
    assert task_stacked.distance(nan, {"w": torch.ones(2)}, base) == float("inf")
    assert task_stacked.distance(base, base, base) == 0.0


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    "length", [{}, {"epochs": 3}, {"steps": 5}, {"steps": 1}], ids=["default", "epochs", "steps", "one step"]
)
@pytest.mark.parametrize("config", [{}, {"momentum": 0.9, "weight_decay": 0.01}], ids=["plain", "momentum"])
def test_a_stack_trains_what_the_loop_trains(desk: Desk, config: dict[str, float], length: dict[str, int]) -> None:
    desk.open(PLAIN_TASK, **config)
    desk.init()
    looped, stacked = train_many(desk, "off", **length), train_many(desk, "on", **length)
    assert looped["stacked"] == 0
    assert stacked["stacked"] == len(SHARDS)
    for number, (one, other) in enumerate(zip(looped["results"], stacked["results"], strict=True)):
        assert (one["samples"], one["steps"]) == (other["samples"], other["steps"])
        assert one["metrics"]["train_loss"][1] == other["metrics"]["train_loss"][1]
        assert one["metrics"]["train_loss"][0] == pytest.approx(other["metrics"]["train_loss"][0], rel=1e-4)
        assert apart(desk, "on", "off", number) < CLOSE


def test_one_by_one_leaves_the_bytes_of_train(desk: Desk) -> None:
    desk.open(SMALL_TASK)
    desk.init()
    train_many(desk, "off")
    for number, shard in enumerate(SHARDS):
        desk.train(indices=shard, seed=100 + number)
        assert hashlib.sha256(desk.path("out").read_bytes()).hexdigest() == bytes_of(desk, "off", number)


def test_many_shards_follow_the_schedule_of_the_job_one_by_one(desk: Desk) -> None:
    desk.open(PLAIN_TASK, schedule="linear")
    desk.init()
    length = {"epochs": 1, "job_rounds": 2, "largest_shard": 23}
    done = train_many(desk, "on", **length)
    assert (done["stacked"], done["why"]) == (0, "a stack knows no schedule = linear")
    desk.train(indices=SHARDS[1], seed=101, **length)
    assert hashlib.sha256(desk.path("out").read_bytes()).hexdigest() == bytes_of(desk, "on", 1)
    desk.train(indices=SHARDS[1], seed=101, epochs=1)  # without one
    assert hashlib.sha256(desk.path("out").read_bytes()).hexdigest() != bytes_of(desk, "on", 1)


def test_the_same_shards_stacked_again_leave_the_same_bytes(desk: Desk) -> None:
    desk.open(PLAIN_TASK, momentum=0.9)
    desk.init()
    train_many(desk, "on")
    first = [bytes_of(desk, "on", number) for number in range(len(SHARDS))]
    train_many(desk, "on")
    assert [bytes_of(desk, "on", number) for number in range(len(SHARDS))] == first


def test_a_trial_leaves_updates_of_every_shard_that_are_the_loops(desk: Desk) -> None:
    desk.open(PLAIN_TASK)
    desk.init()
    many = [list(range(at, at + 30)) for at in range(12)]
    train_many(desk, "off", many)
    tried = train_many(desk, "auto", many)
    assert "samples/s" in tried["why"]
    assert 1 <= tried["stacked"] < len(many)
    assert all(apart(desk, "auto", "off", number) < CLOSE for number in range(len(many)))
    again = train_many(desk, "auto", many)
    assert again["why"] == tried["why"]  # one trial a task
    assert again["stacked"] in (0, len(many))


FUNCTIONAL_DROPOUT = (
    PLAIN_TASK
    + """
class Drop(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5, self.training)

def model(config):
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Drop(), nn.Linear(8, 3))
"""
)
OVER_THE_BATCH = (
    PLAIN_TASK
    + """
class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)

def model(config):
    return nn.Sequential(Centred(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
"""
)
COUNTS = (
    PLAIN_TASK
    + """
class Count(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
    def forward(self, x):
        self.calls += 1
        return x

def model(config):
    return nn.Sequential(Count(), nn.Linear(4, 3))
"""
)


@pytest.mark.parametrize(
    ("source", "config", "why"),
    [
        (SMALL_TASK, {}, "is a Dropout"),
        (FUNCTIONAL_DROPOUT, {}, "random"),
        (OVER_THE_BATCH, {}, "of their length away from the loop's"),
        (COUNTS, {}, "changes '0.calls'"),
        (PLAIN_TASK, {"one_by_one": True}, "no TensorDataset"),
        (
            PLAIN_TASK + "\ndef loss(model, batch, config):\n    return model(batch[0]).sum()\n",
            {},
            "has its own loss()",
        ),
        (
            PLAIN_TASK + "\ndef optimizer(model, config):\n    return torch.optim.Adam(model.parameters())\n",
            {},
            "own opti",
        ),
    ],
    ids=["dropout layer", "functional dropout", "over the batch", "counter", "data set", "loss", "optimizer"],
)
def test_what_cannot_be_stacked_is_trained_one_by_one_to_the_bit(
    desk: Desk, source: str, config: dict[str, Any], why: str
) -> None:
    desk.open(source, **config)
    desk.init()
    train_many(desk, "off")
    tried = train_many(desk, "auto")
    assert tried["stacked"] == 0
    assert why in tried["why"]
    for number in range(len(SHARDS)):
        assert bytes_of(desk, "auto", number) == bytes_of(desk, "off", number)


def test_seconds_are_trained_one_by_one(desk: Desk) -> None:
    desk.open(PLAIN_TASK)
    desk.init()
    done = train_many(desk, "on", SHARDS[:2], seconds=0.01)
    assert done["stacked"] == 0
    assert all(result["steps"] >= 1 for result in done["results"])


@pytest.mark.parametrize("stack", ["off", "on", "auto"])
def test_a_shard_that_fails_does_not_spoil_the_others(desk: Desk, stack: str) -> None:
    desk.open(PLAIN_TASK)
    desk.init()
    done = train_many(desk, stack, [*SHARDS[:3], [60, 61], *SHARDS[3:]])
    errors = [number for number, result in enumerate(done["results"]) if "error" in result]
    assert errors == [3]
    assert done["results"][3]["error"]["code"] == "bad_task"
    assert all(desk.path(f"{stack}-{number}").exists() for number in range(7) if number != 3)


@pytest.mark.parametrize("stack", ["off", "on"])
def test_stop_ends_many_shards_too(desk: Desk, stack: str) -> None:
    desk.open(PLAIN_TASK)
    desk.init()
    desk.when_seen = lambda progress: desk.child.stop() if progress.step else None
    with pytest.raises(TaskStopped):
        train_many(desk, stack, epochs=2_000)
    desk.when_seen = lambda _: None
    assert train_many(desk, stack)["results"][0]["steps"] == 1


def test_tied_and_frozen_weights_are_stacked_as_they_are(desk: Desk) -> None:
    desk.open(
        PLAIN_TASK
        + """
def model(config):
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    second.bias.requires_grad_(False)
    return nn.Sequential(first, nn.Tanh(), second, nn.Linear(4, 3))
""",
        momentum=0.5,
    )
    desk.init()
    train_many(desk, "off")
    assert train_many(desk, "on")["stacked"] == len(SHARDS)
    for number in range(len(SHARDS)):
        assert apart(desk, "on", "off", number) < CLOSE
        base, found = load_file(desk.path("base")), load_file(desk.path(f"on-{number}"))
        assert torch.equal(base["2.bias"], found["2.bias"])
        assert "2.weight" not in found
