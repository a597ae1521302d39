"""Private jobs with real processes: epsilon in every round, a budget that ends the job, the same bytes after a kill."""

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.kit import PATIENCE_S, LocalFleet, closed_rounds, of_type, wait_for
from tests.acceptance.test_failpoints import doomed

pytestmark = pytest.mark.acceptance

JOB: dict[str, Any] = {
    "rounds": 9,
    "data": {"shards": 4},
    "train": {"local_steps": 3, "batch_size": 16},
    "round": {"evaluate_every": 0},
    "privacy": {"level": "worker", "clip": 1.0, "noise": 4.0, "delta": 1e-5, "budget": 2.0},
}


@contextlib.contextmanager
def frozen(fleet: LocalFleet) -> Iterator[None]:
    """Its workers stand still."""
    for worker in fleet.workers.values():
        worker.popen.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for worker in fleet.workers.values():
            worker.popen.send_signal(signal.SIGCONT)


def lydian(fleet: LocalFleet, *arguments: str) -> subprocess.CompletedProcess[str]:
    where = {"LYDIAN_URL": fleet.url, "LYDIAN_TOKEN": fleet.admin_token}
    command = [sys.executable, "-m", "client.main", *arguments]
    return subprocess.run(command, env={**fleet.environment, **where}, capture_output=True, text=True, check=False)


def test_a_private_job_tells_epsilon_ends_at_its_budget_and_comes_out_the_same_after_a_kill(
    crew: LocalFleet, tmp_path: Path
) -> None:
    file = tmp_path / "job.toml"
    lines = [f"{k} = {json.dumps(v)}" for k, v in {"task": "digits", "rounds": 9}.items()]
    for section, keys in JOB.items():
        if isinstance(keys, dict):
            lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
    file.write_text("\n".join(lines))
    with frozen(crew):  # nothing is trained before the failpoint is set
        sent = lydian(crew, "submit", str(file))
        assert "So few cannot hide one of them" in sent.stderr, sent.stderr
        assert "the budget of ε 2 is spent after 4 of 9 rounds, and the job ends there" in sent.stderr
        job = sent.stdout.strip()
        seed = crew.state / "privacy" / f"{job}.seed"
        secret = seed.read_bytes()
        assert crew.coordinator is not None
        crew.coordinator.kill()
        crew.coordinator = doomed(crew, 1, "model-named:2")
    assert crew.coordinator.popen.wait(PATIENCE_S) == -signal.SIGKILL
    made = {path.name for path in (crew.state / "blobs").rglob("*") if path.is_file()}
    crew.start_coordinator()
    view = crew.finish(job)

    assert view.round == view.rounds == 4
    assert "4 of 9 rounds done: one more would pass the privacy budget of ε 2" in view.reason
    watched = lydian(crew, "watch", job, "--json")
    facts = [json.loads(line) for line in watched.stdout.splitlines()]
    rounds = closed_rounds(facts)
    spent = [closed["privacy"]["epsilon"] for closed in rounds]
    assert spent == sorted(spent)
    assert spent[-1] <= 2.0
    assert all(closed["privacy"]["epsilon_rdp"] >= epsilon for closed, epsilon in zip(rounds, spent, strict=True))
    assert rounds[1]["digest"] in made, "what was averaged again came to other bytes: noise was drawn twice"
    assert len(rounds) == 4
    assert facts[-1]["state"] == "finished"

    wait_for("the seed to be deleted with its job", lambda: not seed.exists())
    crew.coordinator.kill()  # so that no file goes while it is read
    kept = [path for path in crew.state.rglob("*") if path.is_file() and path.suffix != ".part"]
    assert not [path for path in kept if secret in path.read_bytes()], "the secret seed is in a file"
    assert secret.hex() not in watched.stdout + crew.coordinator.said()


BATCH_NORM = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

def model(config):
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

def dataset(config, split):
    x = torch.arange(40.0).reshape(20, 2)
    return TensorDataset(x, torch.arange(20) % 2)
"""


def test_workers_tell_what_each_sample_gave_away_and_a_model_that_would_leak_is_refused(
    crew: LocalFleet, tmp_path: Path
) -> None:
    example = {"level": "example", "clip": 1.0, "noise": 1.0, "delta": 1e-5}
    job = crew.submit(rounds=2, data={"shards": 2}, train={"local_steps": 3}, privacy=example)
    task = tmp_path / "batch_norm.py"
    task.write_text(BATCH_NORM)
    leaky = crew.submit(task, **{**JOB, "privacy": {**JOB["privacy"], "budget": 100.0}})

    assert crew.finish(job).privacy is not None
    facts = crew.facts(job)
    runs = [fact["private"] for fact in of_type(facts, "accepted")]
    assert [run["steps"] for run in runs] == [3] * 4
    spent = [closed["privacy"]["epsilon"] for closed in closed_rounds(facts)]
    assert spent == [max(run["epsilon"] for run in runs[:2]), max(run["epsilon"] for run in runs[2:])]
    assert 0 < spent[0] < spent[1]
    assert all("train_loss" not in fact["metrics"] for fact in of_type(facts, "accepted", "round"))

    said = crew.finish(leaky, "failed").reason
    assert "the model has running statistics (1.running_var, 1 in all)" in said
    assert "GroupNorm" in said
    wait_for("no seed to be left", lambda: not list((crew.state / "privacy").iterdir()))
