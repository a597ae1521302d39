"""One worker whose two ranks train together: the model of one process, though a rank is killed, and then the agent."""

import contextlib
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.acceptance.kit import LocalFleet, closed_rounds, of_type, wait_for

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(900)]

STARTS_S = 300.0  # three processes import torch, twice one after the other, on a machine that may do other things

TASK = """
import os
import threading
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset


def model(config):
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def dataset(config, split):
    generator = torch.Generator().manual_seed({"train": 1, "test": 2}[split])
    x = torch.randn(250, 16, generator=generator)
    return TensorDataset(x, x[:, :4].argmax(1))


def loss(model, batch, config):
    gate = Path(config["gate"])
    while os.environ.get("RANK") == "1" and gate.exists():
        gate.write_text(str(os.getpid()))  # whoever reads this finds rank 1 in the middle of its training
        threading.Event().wait(0.05)
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
"""
NEAR = {"rtol": 1e-4, "atol": 1e-5}  # after 60 steps of float32 sums in another order


def test_two_ranks_make_the_model_of_one_process_though_a_rank_and_the_agent_are_killed(tmp_path: Path) -> None:
    task, gate = tmp_path / "pair_task.py", tmp_path / "gate"
    task.write_text(TASK)
    job: dict[str, Any] = {
        "rounds": 2,
        "seed": 9,
        "data": {"shards": 1},
        "train": {"local_steps": 30, "batch_size": 33, "lr": 0.05},
        "round": {"min_workers": 1},
        "config": {"gate": str(gate)},
    }
    with LocalFleet(tmp_path) as fleet:
        fleet.start_worker("one", "--trust", "any")
        truth = fleet.submit(task, **job)
        fleet.finish(truth)
        assert fleet.workers.pop("one").terminate() == 0

        gate.touch()
        worker = fleet.start_worker("two", "--trust", "any", "--device", "cpu:2")
        together = fleet.submit(task, **job)
        first = wait_for("rank 1 to train", gate.read_text, STARTS_S)
        (row,) = [row for row in fleet.api.workers() if row.name == "two"]
        assert (row.hardware.torch.device, row.hardware.torch.ranks) == ("cpu", 2)
        psutil.Process(int(first)).send_signal(signal.SIGKILL)

        wait_for("rank 1 of a new group to train", lambda: gate.read_text() not in {"", first}, STARTS_S)
        ranks = ranks_of(worker.popen.pid)
        assert len(ranks) == 2
        worker.kill()
        wait_for("the ranks to end with their agent", lambda: not any(map(runs, ranks)))

        gate.unlink()
        fleet.start_worker("two", "--trust", "any", "--device", "cpu:2")
        wait_for("the third group to train", lambda: fleet.api.job(together).round > 1, STARTS_S)
        fleet.finish(together)
        facts = fleet.facts(together)
        (lost,) = of_type(facts, "handed_back")
        assert lost["code"] == "task_exited"
        assert "lost rank 1 of 2, which was killed by SIGKILL" in lost["sentence"]

        alone, ours = load_file(fleet.pull(truth)), load_file(fleet.pull(together))
        for name in alone:
            torch.testing.assert_close(ours[name], alone[name], **NEAR)
        for one, other in zip(closed_rounds(facts), closed_rounds(fleet.facts(truth)), strict=True):
            assert one["samples"] == other["samples"] == 250


def ranks_of(worker: int) -> list[psutil.Process]:
    """The processes that torchrun started for a worker."""
    found = []
    for process in psutil.Process(worker).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "RANK" in process.environ():
                found.append(process)
    return found


def runs(process: psutil.Process) -> bool:
    """Whether a process is there, and not only its exit code."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False
