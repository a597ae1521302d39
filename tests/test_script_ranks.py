"""A training script whose process is two, as under torchrun: one story of five rounds, told by real ranks."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from worker.child import Child, TaskFailure

STALL_S = 120.0

SCRIPT = """
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

import lydian

dist.init_process_group("gloo")
rank = dist.get_rank()
print("local rank", os.environ["LOCAL_RANK"], "of", dist.get_world_size())

data = TensorDataset(torch.arange(160.0).view(40, 4) / 160, torch.arange(40) % 3)
model = nn.Linear(4, 3)
parallel = DistributedDataParallel(model)


def evaluate(model):
    return {"seen": (float(rank == 0), 1)}


for round in lydian.rounds(model, data=data, evaluate=evaluate):
    part = Subset(data, round.share())
    loader = DataLoader(part, batch_size=5, sampler=DistributedSampler(part, shuffle=False))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    if round.number == 4 and rank == 1:
        raise ValueError("no more")
    for x, y in loader:
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(parallel(x), y)
        loss.backward()
        optimiser.step()
    if round.number == 2 and rank == 1:
        model.weight.data.add_(1)
    if rank == 0:
        round.report(samples=len(part), loss=loss)

dist.destroy_process_group()
"""


@dataclass
class Story:
    """What was asked of the ranks, and what they answered."""

    child: Child
    folder: Path
    told: dict[str, Any] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def ask(self, name: str, do: str, **fields: Any) -> None:
        try:
            told = self.child.ask({"do": do, **fields}, on_progress=lambda _: None, stall_s=STALL_S)
            self.told[name] = told
        except TaskFailure as failure:
            self.told[name] = failure

    def train(self, number: int, base: str = "base") -> None:
        paths = {"base": str(self.path(base)), "out": str(self.path(f"round {number}"))}
        about = {"indices": None, "seed": 5, "round": number, "shard": 0, "shards": 1}
        self.ask(f"round {number}", "train", **paths, **about)

    def open(self, source: str) -> None:
        file = self.folder / "train.py"
        file.write_text(source)
        terms = {"script": {"config": {}, "arguments": (), "rounds": 5, "shared": True}, "seed": 7}
        self.ask("open", "open", task=str(file), config={}, terms=terms)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder, started = tmp_path_factory.mktemp("script"), list[Child]()

    def start() -> None:
        started.append(Child.start(device="cpu:2", threads=2, log_path=folder / "log"))

    starter = threading.Thread(target=start)
    starter.start()
    starter.join()
    with started[0] as child:
        story = Story(child, folder)
        story.open(SCRIPT)
        story.ask("init", "init", seed=1, out=str(story.path("base")), labels=None)
        story.train(1)
        story.train(2)
        story.train(3, base="nowhere")
        story.ask("evaluate", "evaluate", base=str(story.path("base")), batch_size=8)
        story.train(5)
        story.ask("close", "close")
        story.open(SCRIPT)
        story.train(4)
        yield story


def by_hand(base: Path) -> nn.Linear:
    """The same round in one process: each step on what both ranks have in theirs."""
    x, y = torch.arange(160.0).view(40, 4) / 160, torch.arange(40) % 3
    model = nn.Linear(4, 3)
    model.load_state_dict(load_file(base))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    for at in range(0, 40, 10):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x[at : at + 10]), y[at : at + 10]).backward()
        optimiser.step()
    return model


def test_two_ranks_of_a_script_make_the_update_of_one_process_and_rank_0_tells(story: Story) -> None:
    assert story.told["open"] == {}
    assert story.told["init"]["parameters"] == 15
    assert (story.told["round 1"]["samples"], story.told["round 1"]["steps"]) == (40, 4)
    ours = load_file(story.path("round 1"))
    for name, tensor in by_hand(story.path("base")).state_dict().items():
        torch.testing.assert_close(ours[name], tensor)
    assert story.told["evaluate"]["metrics"] == {"seen": [1.0, 1.0]}


def test_ranks_that_come_apart_are_told_of_and_the_next_round_is_right_again(story: Story) -> None:
    apart = story.told["round 2"]
    assert isinstance(apart, TaskFailure)
    assert "round 2 of train.py leaves its 2 ranks with different weights" in apart.sentence
    assert "train DistributedDataParallel(model)" in apart.sentence
    assert story.path("round 5").read_bytes() == story.path("round 1").read_bytes()


def test_a_round_that_cannot_begin_begins_on_no_rank(story: Story) -> None:
    assert isinstance(story.told["round 3"], TaskFailure)
    assert story.told["round 5"]["steps"] == 4


def test_a_group_that_the_script_makes_or_ends_is_the_one_that_is_there(story: Story) -> None:
    log = (story.folder / "log").read_text()
    assert log.count("the group of the 2 ranks is there already, and stays") >= 4
    assert "[rank 1] local rank 1 of 2" in log
    assert story.told["close"] == {}


def test_a_script_that_fails_on_one_rank_ends_all_and_the_traceback_is_there(story: Story) -> None:
    failure = story.told["round 4"]
    assert isinstance(failure, TaskFailure)
    line = SCRIPT.splitlines().index('        raise ValueError("no more")') + 1
    told = f"{failure.sentence}\n{failure.detail}"
    assert f"ValueError in train.py, line {line}, in round 4: no more" in told
    assert "rank 1 of 2" in failure.sentence
    assert 'raise ValueError("no more")' in told
