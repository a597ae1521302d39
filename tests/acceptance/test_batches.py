"""A batch that is left to the workers, a memory that is too small for it, and a restart: on real processes."""

from pathlib import Path

import pytest

from tests.acceptance.kit import LocalFleet, closed_rounds, wait_for

TASK = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

class Small(nn.Module):
    def __init__(self, room):
        super().__init__()
        self.layer, self.room = nn.Linear(4, 3), room
    def forward(self, x):
        if self.training and len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.layer(x)

def model(config):
    return Small(config["room"])

def dataset(config, split):
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x[:, :3].argmax(1))
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    file = tmp_path / "roomy.py"
    file.write_text(TASK)
    return file


def test_a_batch_is_looked_for_once_and_known_after_a_restart(alone: LocalFleet, task: Path) -> None:
    before = len(alone.workers["w1"].said())
    train = {"batch_size": "auto", "precision": "bf16"}
    job = alone.submit(task, rounds=40, train=train, config={"room": 20})
    found = "16 samples a step"
    wait_for("the batch to be found", lambda: found in alone.workers["w1"].said()[before:])
    alone.await_event(job, lambda event: event["type"] == "round", "a round was closed")
    alone.workers["w1"].kill_all()
    alone.start_worker("w1")
    rounds = closed_rounds(alone.facts(job))
    alone.finish(job)
    left = f"w1/sizes/*/{job}.json"
    wait_for("what was found for the job to be forgotten", lambda: not list(alone.folder.glob(left)))
    said = alone.workers["w1"].said()[before:]
    assert len(rounds) == 40
    assert said.count(found) == 1
    assert f"{job} is trained in bf16: the job asks for it" in said


def test_a_batch_that_does_not_fit_is_trained_in_pieces_and_the_worker_says_so(alone: LocalFleet, task: Path) -> None:
    before = len(alone.workers["w1"].said())
    views = [alone.finish(alone.submit(task, rounds=3, train={"batch_size": 50}, config={"room": room}))
             for room in (13, 50)]  # fmt: skip
    said = alone.workers["w1"].said()[before:]
    assert said.count("memory takes 12 samples at once, so a batch is trained in pieces, with the same gradients") == 1
    assert views[0].metrics["loss"] == pytest.approx(views[1].metrics["loss"], rel=1e-5)
