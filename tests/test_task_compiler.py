"""torch's compiler in the child: not loaded by an optimiser, there as soon as somebody wants it, and then with its say.

What is loaded is asked of a process of its own: this one may have compiled already.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_task_host import Desk, child, desk

__all__ = ["child", "desk"]

WORKER = Path(__file__).parent.parent / "worker"

STORY = """
import inspect, json, sys
import torch
from torch import nn
import task_compiler

said = {}

def is_loaded():
    return "torch._dynamo.convert_frame" in sys.modules

def step(kind):
    model, inputs = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), torch.ones(5, 3)
    optimiser = kind(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, 1)
    optimiser.zero_grad()
    model(inputs).sum().backward()
    optimiser.step()
    schedule.step()
    optimiser.load_state_dict(optimiser.state_dict())
    return model, inputs, optimiser

task_compiler.wait_until_asked_for()
task_compiler.wait_until_asked_for()
for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop):
    model, inputs, optimiser = step(kind)
inspect.getmodule(step)
said["unknown"] = hasattr(torch._dynamo, "__of_any_module__")
said["after_optimisers"] = is_loaded()

from torch._dynamo import config
said["after_asking"] = is_loaded()
said["real"] = type(sys.modules["torch._dynamo"]).__name__ == "module" and torch._dynamo.config is config

graphs = []
def count(graph, inputs):
    graphs.append([node.target for node in graph.graph.nodes if node.op.startswith("call")])
    return graph.forward

plain = model(inputs)
said["compiled"] = bool(torch.equal(torch.compile(model, backend=count)(inputs), plain)) and len(graphs) == 1
graphs.clear()
compiled = torch.compile(lambda: optimiser.zero_grad(set_to_none=False), backend=count)
compiled()
said["graphs_of_zero_grad"] = len(graphs)
step(torch.optim.SGD)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said() -> dict[str, object]:
    """What a process says that trained, then asked for the compiler, then compiled."""
    ended = subprocess.run(
        [sys.executable, "-c", STORY],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PYTHONPATH": str(WORKER), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return dict(json.loads(ended.stdout.splitlines()[-1]))


def test_no_optimiser_loads_the_compiler(said: dict[str, object]) -> None:
    assert said["after_optimisers"] is False
    assert said["unknown"] is False


def test_whoever_asks_for_anything_of_the_compiler_gets_the_real_one(said: dict[str, object]) -> None:
    assert said["after_asking"] is True
    assert said["real"] is True
    assert said["compiled"] is True


def test_what_was_to_be_left_alone_before_the_compiler_was_there_is_left_alone_by_it(said: dict[str, object]) -> None:
    assert said["graphs_of_zero_grad"] == 0


TASK = """
import sys, torch
from torch import nn
from torch.utils.data import TensorDataset

def model(config): return nn.Linear(2, 2)
def dataset(config, split): return TensorDataset(torch.ones(20, 2), torch.zeros(20, dtype=torch.int64))
def optimizer(model, config): return torch.optim.AdamW(model.parameters(), lr=0.1)
def loss(model, batch, context):
    print("the compiler is loaded:", "torch._dynamo.convert_frame" in sys.modules)
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
"""


def test_a_child_that_trains_has_no_compiler_in_memory(desk: Desk) -> None:
    desk.open(TASK)
    desk.init()
    desk.train()
    log = desk.child.log_path.read_text()
    assert "the compiler is loaded: False" in log
    assert "the compiler is loaded: True" not in log
