"""Ranks that train together: how they share a batch, pure; then two real processes over gloo, and how they fail."""

import io
import itertools
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from client.main import _device
from common.messages import Gpu, Progress, TorchBuild, WorkerView
from tests.test_child import is_gone, wait_until
from worker import child as child_module
from worker import task_host
from worker.child import Child, TaskFailure, TaskStopped
from worker.task_host import Events, Host

task_ranks = task_host.task_ranks

STALL_S = 60.0
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""How near two ranks come to one process in 21 steps: float32 sums of ten samples, added up in another order."""

TASK = """
import os, signal, subprocess, sys, threading
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, norm, dropout):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.never = nn.Linear(2, 2)  # has no gradient, and weight decay must not shrink it

    def forward(self, x):
        return self.last(self.dropout(self.norm(self.first(x).relu())))

def model(config):
    return Net(config.get("norm", False), config.get("dropout", 0.0))

def dataset(config, split):
    print("dataset of", split)
    generator = torch.Generator().manual_seed({"train": 1, "test": 2}[split])
    x = torch.randn(61, 4, generator=generator)
    return torch.utils.data.TensorDataset(x, (x @ torch.eye(4)[:, :3]).argmax(1))
"""

FAULTY = f"""{TASK}
def loss(model, batch, config):
    if os.environ.get("RANK") == "1":
        {{fault}}
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
"""

HELD = f"""{TASK}
from pathlib import Path
STEPS = 0
def loss(model, batch, config):
    global STEPS
    STEPS += 1
    if STEPS > 20 and Path(config["gate"]).exists():
        threading.Event().wait(1.0)  # it is asked to stop before many of these are taken
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
"""

OWN_LOOP = f"""{TASK}
def train(model, loader, context):
    seen = 0
    while not context.done:
        for x, y in loader:
            context.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            context.optimizer.step()
            context.step(loss)
            seen += len(x)
    assert seen == 61
"""


# ---------------------------------------------------------------- who trains what


@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 3))
def test_the_parts_of_a_batch_are_the_batch_and_even(samples: int, ranks: int, least: int) -> None:
    parts = [task_ranks.part_of_batch(samples, ranks, rank, least) for rank in range(ranks)]
    assert [at for start, stop in parts for at in range(start, stop)] == list(range(samples))
    sizes = [stop - start for start, stop in parts]
    taking = [size for size in sizes if size]
    assert max(taking) - min(taking) <= 1
    assert min(taking) >= min(least, samples)
    assert sizes[0]
    assert len(taking) == ranks or (len(taking) + 1) * least > samples


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 60))
def test_every_tensor_is_in_one_bucket_and_no_bucket_is_too_large(sizes: list[int], limit: int) -> None:
    runs = task_ranks.in_buckets(sizes, limit)
    assert [position for run in runs for position in run] == list(range(len(sizes)))
    for run in runs:
        assert sum(sizes[position] for position in run) <= limit or len(run) == 1
    for run, following in itertools.pairwise(runs):
        assert sum(sizes[position] for position in run) + sizes[following[0]] > limit


@given(st.integers(0, 2**63 - 1), st.lists(st.tuples(*[st.integers(0, 1000)] * 3), unique=True, min_size=2, max_size=5))
def test_no_two_batches_or_ranks_draw_the_same_numbers(seed: int, places: list[tuple[int, int, int]]) -> None:
    seeds = {task_ranks.step_seed(seed, *place) for place in places}
    assert len(seeds) == len(places)
    assert all(0 <= drawn < 2**63 for drawn in seeds)


@pytest.mark.parametrize(
    ("asked", "devices"),
    [
        ("cpu", ["cpu"]), ("auto", ["auto"]), ("cuda:1", ["cuda:1"]), ("cpu:2", ["cpu", "cpu"]), ("cpu:1", ["cpu"]),
        ("cuda:all", ["cuda:0", "cuda:1", "cuda:2"]), ("cuda:0,2", ["cuda:0", "cuda:2"]),
        ("cuda:2,cuda:0", ["cuda:2", "cuda:0"]), ("xpu:all", ["xpu:0"]),
    ],
)  # fmt: skip
def test_every_way_to_name_devices(asked: str, devices: list[str]) -> None:
    assert task_ranks.devices_of(asked, {"cuda": 3, "xpu": 1}.__getitem__) == devices


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ("cuda:0,0", "names a device twice"), ("cuda:0,cuda:0", "names a device twice"), ("cuda:all", "no cuda device"),
        ("cpu:0", "names no process"), ("cuda:0,xpu:1", "no list of GPUs"), ("cuda:0,", "no list of GPUs"),
        ("cuda,cuda", "no list of GPUs"), ("cpu:2,3", "no list of GPUs"),
    ],
)  # fmt: skip
def test_devices_that_make_no_sense_are_refused_with_the_reason(asked: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        task_ranks.devices_of(asked, lambda _: 0)


def test_gpus_without_nccl_are_summed_in_the_machines_memory() -> None:
    assert task_ranks.backends_for("cuda", nccl=True) == ("cpu:gloo,cuda:nccl", "cuda")
    assert task_ranks.backends_for("cuda", nccl=False) == ("gloo", "cpu")
    assert task_ranks.backends_for("xpu", nccl=True) == ("gloo", "cpu")
    assert task_ranks.backends_for("cpu", nccl=True) == ("gloo", "cpu")


def test_the_rank_that_died_is_blamed_and_not_one_that_lost_it() -> None:
    assert task_ranks.cause({0: task_ranks.EXIT_BROKEN, 1: -9}) == (1, -9)
    assert task_ranks.cause({0: -15, 1: task_ranks.EXIT_BROKEN, 2: -15}) == (1, task_ranks.EXIT_BROKEN)
    assert task_ranks.cause({0: -15, 1: -11}) == (1, -11)
    assert task_ranks.cause({1: 1, 0: 1}) == (0, 1)
    assert task_ranks.cause({1: -15}) == (1, -15)


def test_prints_of_a_rank_are_whole_lines_with_its_number() -> None:
    written = io.StringIO()
    stream = task_ranks.Prefixed(written, "[rank 1] ")
    for piece in ("be", "gun\nand ", "done\n", "not yet"):
        print(piece, end="", file=stream)
    assert written.getvalue() == "[rank 1] begun\n[rank 1] and done\n"


def test_rank_0_says_for_whom_it_waits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Store:
        looks = 0

        def check(self, keys: list[str]) -> bool:
            self.looks += 1
            return keys == ["ready/0"] or self.looks > 3

    monkeypatch.setattr(task_ranks, "MISSING_EVERY_S", 0.0)
    task_ranks.await_ranks(Store(), 0, 3)
    assert "rank 0 waits for rank 1, 2 of 3 to have torch and its device ready" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "ranks", "shown"),
    [("cpu", 2, "2 × cpu"), ("cuda:0", 4, "4 × cuda RTX"), ("cuda:0", 1, "cuda:0 RTX"), ("cpu", 1, "cpu")],
)
def test_people_see_how_many_devices_a_worker_trains_on(device: str, ranks: int, shown: str) -> None:
    torch_build = TorchBuild(version="2.14.1", device=device, threads=1, ranks=ranks)
    gpus = [Gpu(index=index, name="RTX", memory=1, driver="580", capability=(8, 9)) for index in range(4)]
    worker = SimpleNamespace(hardware=SimpleNamespace(torch=torch_build, gpus=gpus))
    assert _device(cast("WorkerView", worker)) == shown


# ---------------------------------------------------------------- two real processes


class Pair:
    """Two ranks, and beside them one process that is given the same commands."""

    def __init__(self, child: Child, folder: Path) -> None:
        self.child, self.folder = child, folder
        self.alone = Host(torch.device("cpu"), Events(io.BytesIO()), threading.Event())
        self.when_seen: Callable[[Progress], None] = lambda _: None

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        return self.child.ask({"do": do, **fields}, on_progress=lambda p: self.when_seen(p), stall_s=STALL_S)

    def open(self, source: str = TASK, terms: dict[str, Any] | None = None, **config: Any) -> None:
        file = self.folder / "my_task.py"
        file.write_text(source)
        config = {"lr": 0.1, "batch_size": 10, "momentum": 0.9, "weight_decay": 0.01, **config}
        self.ask("open", task=str(file), config=config, terms=terms)
        self.alone.open(str(file), dict(config), terms)
        self.ask("init", seed=7, out=str(self.folder / "base"), labels=None)

    def command(self, out: str, **fields: Any) -> dict[str, Any]:
        length = {} if fields.keys() & {"steps", "seconds"} else {"epochs": 3}
        ways = {"base": str(self.folder / "base"), "indices": None, "out": str(self.folder / out)}
        return {**ways, "seed": 5, "round": 1, **length, **fields}

    def train(self, out: str = "out", **fields: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        return self.ask("train", **self.command(out, **fields)), load_file(self.folder / out)

    def train_alone(self, **fields: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        answer = self.alone.answer({"do": "train", **self.command("alone", **fields)})
        assert answer.pop("event") == "done", answer
        return answer, load_file(self.folder / "alone")

    def log(self) -> str:
        return self.child.log_path.read_text()


def of_group(mark: str) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if child_module.carries(process, mark)]


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Child]]:
    """One to work with until a rank of it is killed, and one that hangs; torch loads in both at once."""
    folder, started = tmp_path_factory.mktemp("ranks"), list[Child]()

    def start() -> None:
        started.extend(Child.start(device="cpu:2", threads=2, log_path=folder / name / "log") for name in "ab")

    starter = threading.Thread(target=start)  # not a thread that goes on: a child outlives who started it
    starter.start()
    starter.join()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield started
    torch.set_num_threads(threads)
    for child in started:
        child.kill()


@pytest.fixture
def pair(groups: list[Child], tmp_path: Path) -> Pair:
    return Pair(groups[0], tmp_path)


def test_hello_tells_how_many_train_together(pair: Pair) -> None:
    assert (pair.child.hello.device, pair.child.hello.ranks, pair.child.hello.threads) == ("cpu", 2, 1)


@pytest.mark.parametrize(
    "config",
    [
        {"clip": 0.5},  # 61 samples in tens: the last batch has one, and rank 1 no part of it
        {"batch_size": 1},
        {"optimizer": "adamw", "lr": 0.01},
        {"batch_size": 100},
        {"clip": 0.5, "terms": {"proximal": 0.3}},
    ],
    ids=["uneven", "one by one", "adamw", "all at once", "proximal"],
)
def test_two_ranks_come_to_what_one_process_comes_to(pair: Pair, config: dict[str, Any]) -> None:
    pair.open(**config)
    done, together = pair.train()
    wanted, alone = pair.train_alone()
    assert (done["samples"], done["steps"]) == (wanted["samples"], wanted["steps"])
    assert done["metrics"]["train_loss"] == pytest.approx(wanted["metrics"]["train_loss"], rel=1e-4)
    assert together.keys() == alone.keys()
    base = load_file(pair.folder / "base")
    assert torch.equal(together["never.weight"], base["never.weight"])
    assert not torch.allclose(together["first.weight"], base["first.weight"], **CLOSE)
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], **CLOSE)


def test_batchnorm_sees_its_part_and_its_running_mean_that_of_the_whole_batch(pair: Pair) -> None:
    pair.open(norm=True)
    _, together = pair.train(steps=1)
    _, alone = pair.train_alone(steps=1)
    torch.testing.assert_close(together["norm.running_mean"], alone["norm.running_mean"], **CLOSE)
    assert not torch.allclose(together["norm.running_var"], alone["norm.running_var"], **CLOSE)
    assert together["norm.num_batches_tracked"] == alone["norm.num_batches_tracked"] == 1


def test_an_evaluation_by_two_is_that_of_one_to_the_bit(pair: Pair) -> None:
    pair.open()
    for batch_size in (7, 100):
        done = pair.ask("evaluate", base=str(pair.folder / "base"), batch_size=batch_size)
        wanted = pair.alone.answer({"do": "evaluate", "base": str(pair.folder / "base"), "batch_size": batch_size})
        assert (done["metrics"], done["samples"]) == (wanted["metrics"], wanted["samples"])
        assert done["samples"] == 61


def test_a_training_that_was_stopped_goes_on_to_the_same_bytes(pair: Pair) -> None:
    gate = pair.folder / "gate"
    pair.open(HELD, dropout=0.5, norm=True, gate=str(gate))
    length = {"steps": 100}
    pair.train("undisturbed", **length)
    kept = {"checkpoint": str(pair.folder / "kept"), "checkpoint_every_s": 0.0, "base_digest": "b"}
    pair.when_seen = lambda progress: pair.child.stop() if (progress.step or 0) > 10 else None
    pair.open(HELD, dropout=0.5, norm=True, gate=str(gate))  # which counts its steps anew
    gate.touch()
    with pytest.raises(TaskStopped):
        pair.train(**length, **kept)
    pair.when_seen = lambda _: None
    gate.unlink()
    done, _ = pair.train(**length, **kept)
    assert done["resumed_at"] > 0
    assert done["steps"] == 100
    assert (pair.folder / "out").read_bytes() == (pair.folder / "undisturbed").read_bytes()
    assert not (pair.folder / "kept").exists()
    assert "[rank 1] checkpoint: going on at step" in pair.log()


def test_seconds_end_for_all_ranks_at_the_same_step(pair: Pair) -> None:
    pair.open()
    done, _ = pair.train(seconds=0.1)
    assert done["steps"] >= 1
    assert pair.ask("describe", labels=None) == {"train_samples": 61}


@pytest.mark.parametrize(
    ("fault", "code", "sentence"),
    [
        ("raise ValueError('wrong')", "task_failed", "rank 1 of 2: ValueError in loss(): wrong (my_task.py, line "),
        (
            "raise torch.OutOfMemoryError('none left')",
            "out_of_memory",
            "rank 1 of 2: out of memory in train() with as few samples as can be computed at once",
        ),
    ],
    ids=["error", "memory"],
)
def test_an_error_of_one_rank_is_that_of_all_and_names_it(pair: Pair, fault: str, code: str, sentence: str) -> None:
    pair.open(FAULTY.replace("{fault}", fault))
    with pytest.raises(TaskFailure) as caught:
        pair.train()
    assert caught.value.code == code
    assert caught.value.sentence.startswith(sentence)
    assert "Traceback" in caught.value.detail
    pair.open()
    assert pair.train()[0]["steps"] == 21  # they are still together


def test_what_rank_1_prints_is_in_the_log_under_its_number(pair: Pair) -> None:
    pair.open()
    pair.train(steps=1)
    assert "\ndataset of train\n" in pair.log()
    assert "[rank 1] dataset of train\n" in pair.log()


def test_a_loop_of_the_tasks_own_is_run_by_rank_0_alone(pair: Pair) -> None:
    pair.open(OWN_LOOP)
    done, together = pair.train(epochs=1)
    _, alone = pair.train_alone(epochs=1)
    assert done["steps"] == 7
    assert all(torch.equal(together[name], alone[name]) for name in alone)
    assert "my_task.py has a train() of its own: rank 0 runs it, the other ranks have no part" in pair.log()


def test_ranks_find_each_other_where_nobody_else_looks(pair: Pair) -> None:
    """Gloo listens on loopback alone."""
    assert pair.child.hello
    listening = {
        connection.laddr.ip
        for process in of_group(pair.child._mark)
        if process.pid != pair.child.pid  # torchrun, whose store is not asked for anything
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening <= {"127.0.0.1", "::1"}


AGENT = """
import sys, threading
from pathlib import Path
from worker.child import Child
child = Child.start(device="cpu:2", threads=2, log_path=Path(sys.argv[1]) / "log")
print(child._mark, flush=True)
threading.Event().wait()
"""


def test_ranks_end_with_an_agent_that_is_killed_while_they_start(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", AGENT, str(tmp_path)], stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        mark = agent.stdout.readline().strip()
        wait_until(lambda: len(of_group(mark)) == 3, "torchrun and two ranks", 120.0)
        agent.kill()
        agent.wait()
        wait_until(lambda: not of_group(mark), "the end of all ranks", 120.0)


def test_a_rank_that_hangs_is_found_by_its_stack(groups: list[Child], tmp_path: Path) -> None:
    pair = Pair(groups[1], tmp_path)
    pair.open(FAULTY.replace("{fault}", "threading.Event().wait()"))
    with pytest.raises(TaskFailure) as caught:
        pair.child.ask({"do": "train", **pair.command("out")}, on_progress=lambda _: None, stall_s=8.0)
    assert caught.value.code == "task_stalled"
    assert "in loss" in caught.value.detail  # of rank 1
    assert "in vote" in caught.value.detail  # of rank 0, which waits for it
    wait_until(lambda: not of_group(pair.child._mark), "the end of all ranks")


def test_a_rank_that_is_killed_ends_them_all_and_what_they_started(pair: Pair) -> None:
    started = pair.folder / "pid"
    sleeper = f"open({str(started)!r}, 'w').write(str(subprocess.Popen(['sleep', '1000'], start_new_session=True).pid))"
    pair.open(FAULTY.replace("{fault}", f"{sleeper}; os.kill(os.getpid(), signal.SIGKILL)"))
    ranks = of_group(pair.child._mark)
    assert len(ranks) == 3
    with pytest.raises(TaskFailure) as caught:
        pair.train()
    assert caught.value.code == "task_exited"
    assert caught.value.sentence.startswith("the task's process lost rank 1 of 2, which was killed by SIGKILL")
    assert caught.value.sentence.endswith("in 'train'")
    assert not pair.child.alive
    assert is_gone(int(started.read_text()))
    assert not of_group(pair.child._mark)
    assert not pair.child.log_path.with_suffix(".ranks").exists()
