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


def test_a_batch_is_looked_for_once_and_known_after_a_restart(tmp_path: Path) -> None:
    task = tmp_path / "roomy.py"
    task.write_text(TASK)
    with LocalFleet(tmp_path) as fleet:
        fleet.start_worker("w1", "--trust", "any")
        train = {"batch_size": "auto", "precision": "bf16"}
        job = fleet.submit(task, rounds=40, train=train, config={"room": 20})
        found = "16 samples a step"
        wait_for("the batch to be found", lambda: found in fleet.workers["w1"].said())
        fleet.await_event(job, lambda event: event["type"] == "round", "a round was closed")
        fleet.workers["w1"].kill_all()
        fleet.start_worker("w1", "--trust", "any")
        rounds = closed_rounds(fleet.facts(job))
        fleet.finish(job)
        left = f"sizes/*/{job}.json"
        wait_for("what was found for the job to be forgotten", lambda: not list((tmp_path / "w1").glob(left)))
        said = fleet.workers["w1"].said()
    assert len(rounds) == 40
    assert said.count(found) == 1
    assert f"{job} is trained in bf16: the job asks for it" in said


def test_a_batch_that_does_not_fit_is_trained_in_pieces_and_the_worker_says_so(tmp_path: Path) -> None:
    task = tmp_path / "roomy.py"
    task.write_text(TASK)
    with LocalFleet(tmp_path) as fleet:
        fleet.start_worker("w1", "--trust", "any")
        views = [fleet.finish(fleet.submit(task, rounds=3, train={"batch_size": 50}, config={"room": room}))
                 for room in (13, 50)]  # fmt: skip
        said = fleet.workers["w1"].said()
    assert said.count("memory takes 12 samples at once, so a batch is trained in pieces, with the same gradients") == 1
    assert views[0].metrics["loss"] == pytest.approx(views[1].metrics["loss"], rel=1e-5)
