"""Example-level privacy in the child that trains, and what a worker and the fleet decide about it."""

import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from common.messages import Assignment, JobSpec, ModelRef, PrivateSteps, TaskRef
from server.fleet import Worker, why_not
from server.rounds import new_job
from tests.rounds_kit import Submitted, registration
from tests.test_task_host import SMALL_TASK, Desk, child, desk  # noqa: F401 - fixtures
from worker import plan, secret, task_private
from worker.child import TaskFailure

TASK = SMALL_TASK.replace("nn.Dropout(0.2), ", "")
PRIVATE = {"clip": 0.5, "noise": 1.0, "delta": 1e-5, "seed": "ab" * 32, "before": []}
SPEC = {"task": "digits", "privacy": {"level": "example", "clip": 0.5, "noise": 1.0, "delta": 1e-5}}


def train(desk: Desk, out: str = "out", **private: Any) -> dict[str, Any]:  # noqa: F811
    length = {"steps": private.pop("steps", 3)}
    return desk.train(out, private={**PRIVATE, **private}, **length)


def opened(desk: Desk, source: str = TASK, **config: Any) -> Desk:  # noqa: F811
    desk.open(source, **config)
    desk.init()
    return desk


# ---------------------------------------------------------------- one step


def test_every_samples_gradient_is_clipped_before_the_sum(desk: Desk) -> None:  # noqa: F811
    """All 61 samples, next to no noise, one step of SGD: written out with a backward pass for each sample."""
    opened(desk, batch_size=61)
    done = train(desk, steps=1, noise=1e-9)
    assert done["private"]["sample_rate"] == 1.0
    base = {name: torch.from_numpy(value) for name, value in load_file(desk.path("base")).items()}
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    model.load_state_dict(base)
    x = torch.randn(61, 4, generator=torch.Generator().manual_seed(1))
    y = (x @ torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])).argmax(1)
    total = {name: torch.zeros_like(value) for name, value in base.items()}
    clipped = 0
    for row in range(61):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[row : row + 1]), y[row : row + 1]).backward()
        gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        norm = float(torch.sqrt(sum((g.square().sum() for g in gradient.values()), torch.zeros(()))))
        clipped += norm > 0.5
        for name, g in gradient.items():
            total[name] += g * min(1.0, 0.5 / norm)
    assert clipped > 10
    for name, value in load_file(desk.path("out")).items():
        assert np.allclose(value, base[name] - 0.1 * total[name] / 61, atol=1e-6)


def test_noise_has_the_deviation_that_was_asked_for(desk: Desk) -> None:  # noqa: F811
    wide = TASK.replace("nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)", "nn.Linear(4, 3000), nn.Linear(3000, 3)")
    opened(desk, wide, batch_size=61)
    train(desk, steps=1, noise=200.0)
    base, out = load_file(desk.path("base")), load_file(desk.path("out"))
    moves = np.concatenate([(out[name] - base[name]).ravel() for name in base])
    assert moves.std() == pytest.approx(0.1 * 200.0 * 0.5 / 61, rel=0.03)


# ---------------------------------------------------------------- what comes again


def test_the_same_work_has_the_same_noise_and_another_secret_another(desk: Desk) -> None:  # noqa: F811
    opened(desk)
    train(desk, "first")
    train(desk, "again")
    train(desk, "other", seed="cd" * 32)
    assert desk.path("first").read_bytes() == desk.path("again").read_bytes() != desk.path("other").read_bytes()


def test_a_sample_is_drawn_for_itself_from_the_secret() -> None:
    shard = torch.arange(100, 5_100)
    drawn = task_private.sampled(shard, 0.2, "ab", 0)
    assert abs(len(drawn) - 1_000) < 150
    assert torch.equal(drawn, task_private.sampled(shard, 0.2, "ab", 0))
    assert not torch.equal(drawn, task_private.sampled(shard, 0.2, "ab", 1))
    assert torch.equal(task_private.sampled(shard, 1.0, "ab", 0), shard)


def test_a_step_without_a_sample_is_noise_alone(desk: Desk) -> None:  # noqa: F811
    opened(desk, batch_size=1)
    draws = [len(task_private.sampled(torch.arange(61), 1 / 61, PRIVATE["seed"], step)) for step in range(8)]
    assert 0 in draws
    assert train(desk, steps=8)["steps"] == 8


# ---------------------------------------------------------------- what is told


def test_epsilon_is_that_of_opacus_for_what_was_run_and_what_was_before(desk: Desk) -> None:  # noqa: F811
    from opacus.accountants import RDPAccountant  # seconds: not for every process that collects this file

    opened(desk)
    cost = train(desk, steps=4, before=[[0.25, 1.0, 10]])["private"]
    book = RDPAccountant()
    book.history = [(1.0, 0.25, 10), (1.0, 10 / 61, 4)]
    assert cost == {
        "sample_rate": 10 / 61, "noise": 1.0, "steps": 4, "delta": 1e-5,
        "epsilon": pytest.approx(book.get_epsilon(1e-5)),
    }  # fmt: skip


def test_the_loss_is_told_to_nobody(desk: Desk) -> None:  # noqa: F811
    done = train(opened(desk))
    assert done["metrics"] == {}
    assert [progress.loss for progress in desk.seen if progress.loss is not None] == []


# ---------------------------------------------------------------- what cannot be private


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("nn.ReLU()", "nn.BatchNorm1d(8)"), "has BatchNorm, which mixes the samples"),
        (("nn.ReLU()", "nn.BatchNorm1d(8, affine=False, track_running_stats=False)"), "replace BatchNorm by GroupNorm"),
        (
            ("class OneByOne", "def train(model, loader, context): ...\nclass OneByOne"),
            "my_task.py has its own train()",
        ),
        (("nn.ReLU()", "Counter()"), "training changed the buffer '1.seen' (1 in all), to which no noise is added"),
    ],
)
def test_what_would_leave_without_noise_is_refused(desk: Desk, change: tuple[str, str], said: str) -> None:  # noqa: F811
    counter = """
class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
    def forward(self, x):
        self.seen += x.sum().detach()
        return x
"""
    opened(desk, (TASK + counter).replace(*change))
    with pytest.raises(TaskFailure) as caught:
        train(desk)
    assert caught.value.code == "bad_task"
    assert said in caught.value.sentence


def test_a_child_without_opacus_says_which_line_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from worker import task_host

    monkeypatch.setattr(task_private.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(task_host.TaskError) as caught:
        task_private.check(task_host, None, nn.Linear(1, 1), None)
    assert caught.value.code == "missing_package"
    assert "pip install 'opacus>=1.6.0'" in str(caught.value)


# ---------------------------------------------------------------- who may do it


def test_a_worker_without_opacus_or_with_several_devices_is_given_no_such_work() -> None:
    job = new_job("j", Submitted(spec=JobSpec.model_validate(SPEC), key="k"))

    def why(**build: Any) -> str | None:
        known = registration("gpu1")
        torch_build = known.hardware.torch.model_copy(update=build)
        hardware = known.hardware.model_copy(update={"torch": torch_build})
        return why_not(Worker("w", known.model_copy(update={"hardware": hardware})), job)

    assert why(opacus="1.6.0") is None
    assert "gpu1 has no opacus" in (why() or "")
    assert "pip install 'opacus>=1.6.0'" in (why() or "")
    assert "trains on 2 devices together" in (why(opacus="1.6.0", ranks=2) or "")


def test_this_machines_child_says_that_it_has_opacus(child: Any) -> None:  # noqa: F811
    assert child.hello.opacus.startswith("1.")


def assignment(**keys: Any) -> Assignment:
    fields = {
        "id": "j.train.1.0", "attempt": 1, "job": "j", "kind": "train", "round": 1, "shards": 1, "ttl_s": 1.0,
        "task": TaskRef(name="digits"), "spec": JobSpec.model_validate(SPEC), "max_bytes": 1,
        "base": ModelRef(digest="0" * 64, size=1), **keys,
    }  # fmt: skip
    return Assignment.model_validate(fields)


def test_the_child_is_told_what_the_samples_have_been_through() -> None:
    before = (PrivateSteps(sample_rate=0.1, noise=1.0, steps=20),)
    command = plan.train_command(assignment(private_before=before), base="b", indices=None, out="o", noise_seed="ab")
    wanted = {"clip": 0.5, "noise": 1.0, "delta": 1e-5, "seed": "ab", "before": [[0.1, 1.0, 20]]}
    assert command["private"] == wanted
    plain = assignment(spec=JobSpec(task="digits"))
    assert "private" not in plan.train_command(plain, base="b", indices=None, out="o")


def test_a_workers_secret_is_its_own_and_each_piece_of_work_has_its_noise(tmp_path: Path) -> None:
    seeds = [
        secret.noise_seed(tmp_path, assignment()),
        secret.noise_seed(tmp_path, assignment(round=2)),
        secret.noise_seed(tmp_path, assignment(shard=1)),
        secret.noise_seed(tmp_path, assignment(base=ModelRef(digest="1" * 64, size=1))),
    ]
    assert len(set(seeds)) == 4
    assert secret.noise_seed(tmp_path, assignment(attempt=2)) == seeds[0]
    assert stat.S_IMODE((tmp_path / secret.NAME).stat().st_mode) == 0o600
    assert secret.own_secret(tmp_path).hex() not in "".join(seeds)
