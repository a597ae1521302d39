"""A train command that is broken off and asked again ends with the very bytes of one that was left alone."""

import io
import queue
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worker import task_host
from worker.child import Child, TaskStopped
from worker.task_checkpoint import Checkpoint, UnpackableError, pack, unpack
from worker.task_host import Context, Events, Host

CPU = torch.device("cpu")

TASK = '''
import numpy as np, torch
from torch import nn

def model(config):
    net = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4),
        nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3),
    )
    net[5].weight = net[4].weight  # tied
    return net

class Noisy(torch.utils.data.Dataset):
    """Draws from torch's and numpy's generators when a sample is read, as augmentation does."""
    def __len__(self):
        return 37
    def __getitem__(self, i):
        x = torch.arange(4.0) * (i % 5) + torch.randn(4) + float(np.random.rand())
        return x, i % 3

def dataset(config, split):
    return Noisy() if split == "train" else None

def optimizer(model, config):
    kind = config["optimizer"]
    if kind == "adam":
        return torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.8, 0.99))
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
'''

OWN_LOOP = """
def train(model, loader, context):
    while not context.done:
        for x, y in loader:
            context.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            context.optimizer.step()
            context.step(loss)
"""


class Killed(BaseException):
    """The process ends here, as by kill -9: nobody tidies up."""


class Bench:
    """Hosts that train one command, one life after another."""

    def __init__(self, folder: Path, source: str = TASK, **config: Any) -> None:
        self.folder = folder
        self.task = folder / "task.py"
        self.task.write_text(source)
        self.config = {"batch_size": 5, "optimizer": "sgd", **config}
        self.base = folder / "base.safetensors"
        done = self.host().init(seed=7, out=str(self.base), labels=None)
        assert done["train_samples"] == 37

    def host(self) -> Host:
        host = Host(CPU, Events(io.BytesIO()), threading.Event())
        host.open(task=str(self.task), config=self.config)
        return host

    @property
    def kept(self) -> Path:
        return self.folder / "checkpoint"

    def train(self, name: str = "out", *, every_s: float = 0.0, **length: Any) -> tuple[dict[str, Any], bytes]:
        out = self.folder / name
        given = length or {"epochs": 2}
        done = self.host().train(
            base=str(self.base),
            indices=None,
            out=str(out),
            seed=11,
            round=1,
            checkpoint=str(self.kept) if every_s >= 0 else None,
            checkpoint_every_s=every_s,
            base_digest="b",
            **given,
        )
        return done, out.read_bytes()


def kill_at(bench: Bench, step: int, **length: Any) -> None:
    """Train, and end right after a step and its checkpoint."""
    real = Context.step

    def step_and_die(self: Context, *arguments: Any) -> bool:
        more = real(self, *arguments)
        if self._taken == step:
            raise Killed
        return more

    Context.step = step_and_die  # type: ignore[method-assign]
    try:
        with pytest.raises(Killed):
            bench.train(**length)
    finally:
        Context.step = real  # type: ignore[method-assign]


def killed_and_resumed(bench: Bench, step: int, **length: Any) -> tuple[dict[str, Any], bytes]:
    kill_at(bench, step, **length)
    return bench.train(**length)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("length", [{"epochs": 2}, {"steps": 13}])
def test_a_command_killed_after_any_step_ends_with_the_same_bytes(
    tmp_path: Path, optimizer: str, length: dict[str, int]
) -> None:
    bench = Bench(tmp_path, optimizer=optimizer)
    truth_done, truth = bench.train("truth", every_s=-1, **length)
    assert truth_done["resumed_at"] == 0
    for step in (1, 7, 8, 9, truth_done["steps"] - 1):  # in a pass, at its end, in the next, before the last step
        done, update = killed_and_resumed(bench, step, **length)
        assert update == truth
        assert done["resumed_at"] == step
        same = ("samples", "steps", "metrics")
        assert {key: done[key] for key in same} == {key: truth_done[key] for key in same}
        assert not bench.kept.exists(), "a checkpoint outlived its command"


@given(steps=st.lists(st.integers(1, 15), min_size=1, max_size=3, unique=True).map(sorted))
@settings(deadline=None, max_examples=8)
def test_a_command_killed_several_times_ends_with_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int]
) -> None:
    bench = Bench(tmp_path_factory.mktemp("bench"), optimizer="adam")
    truth = bench.train("truth", every_s=-1)[1]
    for step in steps:  # each life goes on from the one before
        kill_at(bench, step)
    done, update = bench.train()
    assert (done["resumed_at"], update) == (steps[-1], truth)


def test_seconds_of_training_go_on_counting(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    done, _ = killed_and_resumed(bench, 3, seconds=0.2)
    assert done["resumed_at"] == 3
    assert done["seconds"] >= 0.2


def test_a_checkpoint_of_another_command_is_not_used(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bench = Bench(tmp_path)
    truth = bench.train("truth", every_s=-1, epochs=1)[1]
    kill_at(bench, 9, epochs=2)
    assert bench.kept.exists()
    done, update = bench.train(every_s=1000.0, epochs=1)
    assert (done["resumed_at"], update) == (0, truth)
    assert "the checkpoint is of another command" in capfd.readouterr().err
    kill_at(bench, 9, epochs=2)
    bench.config["lr"] = 0.5
    assert bench.train(epochs=2)[0]["resumed_at"] == 0


@pytest.mark.parametrize("harm", ["empty", "short", "zeros", "flipped", "foreign"])
def test_a_damaged_checkpoint_is_said_and_the_shard_is_trained_from_its_base(
    tmp_path: Path, harm: str, capfd: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(tmp_path)
    truth = bench.train("truth", every_s=-1)[1]
    command = bench.kept
    kill_at(bench, 9)
    whole = command.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 0xFF
    content = {
        "empty": b"",
        "short": whole[:-10],
        "zeros": bytes(len(whole)),
        "flipped": bytes(flipped),
        "foreign": b"x",
    }
    command.write_bytes(content[harm])
    done, update = bench.train(every_s=1000.0)
    assert (done["resumed_at"], update) == (0, truth)
    assert "the checkpoint is damaged, training starts from the base" in capfd.readouterr().err


def test_no_file_is_touched_before_the_first_period_has_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path)
    monkeypatch.setattr(
        task_host.task_checkpoint, "save_file", lambda *_: pytest.fail("a short command wrote a checkpoint")
    )
    done, _ = bench.train(every_s=3600.0)
    assert done["resumed_at"] == 0


def test_a_loop_of_the_tasks_own_is_kept_only_if_the_file_says_that_it_can_be(tmp_path: Path) -> None:
    bench = Bench(tmp_path, TASK + OWN_LOOP)
    truth = bench.train("truth", every_s=-1)[1]
    done, update = killed_and_resumed(bench, 4)
    assert (done["resumed_at"], update) == (0, truth)
    bench.task.write_text(TASK + OWN_LOOP + "\nRESUMABLE = True\n")
    done, update = killed_and_resumed(bench, 9)
    assert (done["resumed_at"], update) == (9, truth)


def test_an_optimiser_that_cannot_be_kept_trains_without_checkpoints(tmp_path: Path) -> None:
    source = (
        TASK
        + """
class Plain:
    def __init__(self, model): self.parameters = list(model.parameters())
    def zero_grad(self, set_to_none=True):
        for p in self.parameters: p.grad = None
    def step(self):
        with torch.no_grad():
            for p in self.parameters: p -= 0.01 * p.grad
def optimizer(model, config):
    return Plain(model)
"""
    )
    bench = Bench(tmp_path, source)
    truth = bench.train("truth", every_s=-1)[1]
    done, update = killed_and_resumed(bench, 4)
    assert (done["resumed_at"], update) == (0, truth)


def test_a_disk_that_is_full_costs_the_training_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bench = Bench(tmp_path)
    truth = bench.train("truth", every_s=-1)[1]
    bench.kept.with_name("checkpoint.part").mkdir()  # nothing can be written there
    done, update = bench.train()
    assert (done["resumed_at"], update) == (0, truth)
    assert capfd.readouterr().err.count("no more checkpoints of this command") == 1


def test_a_checkpoint_that_takes_long_is_written_more_rarely(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    now = iter(range(0, 1000, 10))
    keeper = Checkpoint(tmp_path / "c", 100.0, "command", CPU, clock=lambda: float(next(now)))
    model = torch.nn.Linear(2, 2)
    keeper.write(dict(model.state_dict()), torch.optim.SGD(model.parameters(), lr=0.1), {})
    assert keeper.every_s == 200.0
    assert "from now on every 200 s" in capfd.readouterr().err


# ---------------------------------------------------------------- values

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    plain,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
)


@given(values)
@settings(deadline=None)
def test_any_plain_value_comes_back_as_it_was(value: Any) -> None:
    back = unpack(pack(value, {}), {})
    assert back == value
    assert type(back) is type(value)


def test_tensors_come_back_to_the_bit_with_their_dtype() -> None:
    tensors: dict[str, torch.Tensor] = {}
    value = {"a": torch.tensor([1.5, float("nan")]), "b": [torch.tensor(3), torch.zeros(0, dtype=torch.bfloat16)]}
    back = unpack(pack(value, tensors), tensors)
    assert torch.equal(back["a"], value["a"]) or back["a"].isnan().equal(value["a"].isnan())
    assert [(t.dtype, t.shape) for t in back["b"]] == [(t.dtype, t.shape) for t in value["b"]]


@pytest.mark.parametrize("value", [{1, 2}, object(), lambda: None, b"bytes"])
def test_what_is_no_plain_value_is_refused(value: Any) -> None:
    with pytest.raises(UnpackableError):
        pack(value, {})


# ---------------------------------------------------------------- a real process


def test_a_child_killed_in_mid_training_goes_on_where_it_was(tmp_path: Path) -> None:
    slow = TASK.replace("        x = torch", "        import time; time.sleep(0.002)\n        x = torch")
    bench = Bench(tmp_path, slow)
    command = {
        "do": "train", "base": str(bench.base), "indices": None, "out": str(tmp_path / "out"), "seed": 11, "round": 1,
        "epochs": 40, "steps": None, "seconds": None, "checkpoint": str(bench.kept), "checkpoint_every_s": 0.05,
        "base_digest": "b",
    }  # fmt: skip
    opened = {"do": "open", "task": str(bench.task), "config": bench.config}
    steps: queue.Queue[int] = queue.Queue()

    def child() -> Child:
        return Child.start(device="cpu", threads=1, log_path=tmp_path / "log")

    with child() as first:
        first.ask(opened, on_progress=lambda _: None, stall_s=60)

        def kill_in_the_middle(progress: Any) -> None:
            if progress.step > 40 and bench.kept.exists():
                steps.put(progress.step)
                first.kill()

        with pytest.raises(TaskStopped):
            first.ask(dict(command), on_progress=kill_in_the_middle, stall_s=60)
    assert steps.get(timeout=1) > 40
    with child() as second:
        second.ask(opened, on_progress=lambda _: None, stall_s=60)
        done = second.ask(dict(command), on_progress=lambda _: None, stall_s=60)
    assert 0 < done["resumed_at"] < 40 * 8
    truth = Host(CPU, Events(io.BytesIO()), threading.Event())
    truth.open(task=str(bench.task), config=bench.config)
    torch.set_num_threads(1)
    task_host.ask_for_deterministic_kernels()
    given_back = {key: value for key, value in command.items() if not key.startswith(("do", "checkpoint"))}
    truth.train(**{**given_back, "out": str(tmp_path / "truth")})
    assert (tmp_path / "truth").read_bytes() == (tmp_path / "out").read_bytes()
