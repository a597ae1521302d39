"""`lydian simulate`: real processes, and a simulating process that dies in the middle."""

import collections
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.acceptance.kit import PATIENCE_S, wait_for
from tests.privileges import interruptible

pytestmark = pytest.mark.acceptance

ROOT = Path(__file__).resolve().parents[2]
HELD_TASK = """
import time
from pathlib import Path
from torch import nn
import torch
from torch.utils.data import TensorDataset

def model(config):
    return nn.Linear(4, 2)

def dataset(config, split):
    x = torch.randn(400, 4, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, (x.sum(1) > 0).long())

def loss(model, batch, config):
    while Path("@GATE@").exists():
        time.sleep(0.02)
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
"""


@contextlib.contextmanager
def started(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`lydian simulate`, ended at the end whatever happens."""
    log = (folder / "said.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "client.main", "simulate", *arguments],
        stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, preexec_fn=interruptible,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE_S)
        assert process.stdout is not None
        process.stdout.close()
        log.close()


def facts_of(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    assert process.stdout is not None
    return [json.loads(line) for line in process.stdout]


def ours(folder: Path) -> list[int]:
    """The processes whose command line names the folder."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if process.pid != os.getpid() and any(str(folder) in part for part in process.info["cmdline"] or [])
    ]


def check_counts(facts: list[dict[str, Any]], rounds: int, each: int) -> None:
    """Every round has all its updates, and none counts twice."""
    counted = collections.Counter((fact["round"], fact["shard"]) for fact in facts if fact["type"] == "accepted")
    assert set(counted.values()) == {1}
    closed = [fact for fact in facts if fact["type"] == "round"]
    assert [fact["round"] for fact in closed] == list(range(1, rounds + 1))
    for fact in closed:
        assert (fact["shards"], fact["left_out"]) == (each, 0)
        assert sum(1 for number, _ in counted if number == fact["round"]) == each
    assert sum(counted.values()) == facts[-1]["updates"] == rounds * each


def digests_of(facts: list[dict[str, Any]]) -> list[str]:
    """Of the models, round by round."""
    return [fact["digest"] for fact in facts if fact["type"] == "round"]


def test_forty_clients_in_two_processes_train_every_update_counts_once_and_one_process_comes_to_the_same_bits(
    tmp_path: Path,
) -> None:
    folder, model = tmp_path / "kept", tmp_path / "model.safetensors"
    arguments = ["digits", "--clients", "40", "--fraction", "0.25", "--rounds", "3", "--json", "--device", "cpu"]
    arguments += ["--stack", "off"]  # one by one: stacks of other sizes would sum in another order
    both = ("--set", "round.min_workers=10")  # virtual ones, of which each process has five: it begins with both
    with started(tmp_path, *arguments, *both, "--state-dir", str(folder), "-o", str(model)) as process:
        facts = facts_of(process)
        assert process.wait(PATIENCE_S) == 0, (tmp_path / "said.log").read_text()
    check_counts(facts, rounds=3, each=10)
    names = {fact["worker_name"].rpartition("-")[0] for fact in facts if fact["type"] == "accepted"}
    assert names == {"simulator-1", "simulator-2"}
    workers = {fact["worker"] for fact in facts if fact["type"] == "accepted"}
    assert len(workers) >= 5
    summary = facts[-1]
    assert (summary["type"], summary["clients"], summary["metric"]) == ("summary", 40, "accuracy")
    assert summary["value"] > 0.15
    assert summary["state_dir"] == str(folder / "coordinator")
    assert model.stat().st_size > 30_000
    assert ours(folder) == []

    with started(tmp_path, *arguments, "--processes", "1") as process:
        again = facts_of(process)
        assert process.wait(PATIENCE_S) == 0, (tmp_path / "said.log").read_text()
    assert digests_of(again) == digests_of(facts)
    assert len(digests_of(again)) == 3


def test_a_process_that_is_killed_leaves_its_clients_to_the_other(tmp_path: Path) -> None:
    folder, task, gate = tmp_path / "kept", tmp_path / "held.py", tmp_path / "gate"
    task.write_text(HELD_TASK.replace("@GATE@", str(gate)))
    gate.touch()  # each process waits with the half of the clients that it can take
    arguments = [str(task), "--clients", "20", "--fraction", "0.4", "--rounds", "2", "--json", "--device", "cpu"]
    with started(tmp_path, *arguments, "--state-dir", str(folder), "--lease", "8") as process:
        assert process.stdout is not None
        facts = []
        for line in process.stdout:
            facts.append(json.loads(line))
            trains = facts[-1]["type"] == "handed_out" and facts[-1]["kind"] == "train"
            if trains and facts[-1]["worker"].startswith("simulator-2"):
                break
        victim = wait_for("simulator-2", lambda: [pid for pid in ours(folder / "simulator-2") if _is_parent(pid)])
        for pid in victim:
            os.kill(pid, signal.SIGKILL)
        gate.unlink()
        facts += facts_of(process)
        said = (tmp_path / "said.log").read_text()
        assert process.wait(PATIENCE_S) == 0, said
    check_counts(facts, rounds=2, each=8)
    assert "simulator-2 ended by itself with exit code -9: its clients go to the others" in said
    expired = [fact for fact in facts if fact["type"] == "handed_back"]
    assert expired
    assert {fact["code"] for fact in expired} == {"expired"}
    assert {fact["worker_name"].rpartition("-")[0] for fact in expired} == {"simulator-2"}
    wait_for("every process to end", lambda: not ours(folder))


def _is_parent(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return "worker.simulation" in psutil.Process(pid).cmdline()
    return False


def test_ctrl_c_ends_everything_and_removes_the_folder(tmp_path: Path) -> None:
    doubtful = ("--set", "aggregation.algorithm=diloco", "--set", "train.local_steps=1")
    with started(
        tmp_path, "digits", "--clients", "40", "--rounds", "100000", "--device", "cpu", "--processes", "1", *doubtful
    ) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("round 2 "))
        assert line
        said = (tmp_path / "said.log").read_text()
        assert "caution: diloco with outer_momentum = 0.9" in said
        folder = Path(re.findall(r"starting a coordinator in (\S+)", said)[0])
        assert folder.is_dir()
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 130
    assert not folder.exists()
    assert ours(folder) == []


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    ended = subprocess.run(
        [sys.executable, "-m", "client.main", "simulate", "digits", "--state-dir", str(tmp_path)],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "is not empty" in ended.stderr
