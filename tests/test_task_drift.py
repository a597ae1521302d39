"""What the child adds to its gradients with `train.drift`, and the learning rates that it tells of."""

import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from common.drift import Method
from common.messages import JobSpec
from common.slots import Carried, write_correction
from common.weights import Notes, load, read_layout
from tests import loops
from worker import plan, task_drift
from worker.task_host import Context, Events, Host
from worker.task_schedule import lr_factor

TASK = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.unused = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(2, 2)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        return self.two(self.norm(self.one(x)).tanh())

def model(config):
    return Net()

def dataset(config, split):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(37, 4, generator=generator)
    return TensorDataset(x, x[:, :3].argmax(1)) if split == "train" else None
"""

BY_HAND = """
from safetensors.torch import load_file

def train(model, loader, context):
    given, base = load_file(context.config["given"]), {n: p.detach().clone() for n, p in model.named_parameters()}
    while not context.done:
        for x, y in loader:
            context.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            for name, p in model.named_parameters():
                if p.requires_grad:
                    p.grad = given[name].clone() if p.grad is None else p.grad.add_(given[name])
                    if context.config["pull"]:
                        p.grad += (p.detach() - base[name]).mul_(context.config["pull"])
            if context.config.get("clip"):
                nn.utils.clip_grad_norm_(model.parameters(), context.config["clip"])
            context.follow_schedule()
            context.optimizer.step()
            context.step(loss)
"""

pytestmark = pytest.mark.usefixtures("one_thread")


class Killed(BaseException):
    """The process ends here."""


class Bench:
    """Hosts in this process, a first model, and a correction made by the worker's own code."""

    def __init__(self, folder: Path, method: Method = "scaffold", source: str = TASK, **config: Any) -> None:
        self.folder, self.method = folder, method
        self.file, self.base = folder / "task.py", folder / "base.safetensors"
        self.file.write_text(source)
        self.config = {"batch_size": 5, "lr": 0.05, **config}
        train = {"drift": method, **({"dyn_alpha": 0.5} if method == "feddyn" else {})}
        self.terms = plan.client_terms(JobSpec.model_validate({"task": "t", "train": train, "data": {"shards": 2}}))
        assert self.answer("init", seed=7, out=str(self.base), labels=None)["event"] == "done"
        self.numbers = sum(t.elements for t in read_layout(self.base).tensors if t.name in load_file(self.correct()))

    def host(self, source: str | None = None, terms: dict[str, Any] | None = None) -> Host:
        if source is not None:
            self.file.write_text(source)
        host = Host(torch.device("cpu"), Events(io.BytesIO()), threading.Event())
        host.open(task=str(self.file), config=dict(self.config), terms=self.terms if terms is None else terms)
        return host

    def answer(self, do: str, host: Host | None = None, **fields: Any) -> dict[str, Any]:
        return (host or self.host()).answer({"do": do, **fields})

    def correct(self, scale: float = 0.1) -> str:
        """A correction file, of a slot and a sum that are drawn."""
        if not hasattr(self, "numbers"):
            write_correction(self.base, Carried(self.method, 2), self.folder / "given")
            return str(self.folder / "given")
        chance = np.random.default_rng(3)
        for name in ("own", "total"):
            (scale * chance.normal(size=self.numbers)).astype(np.float32).tofile(self.folder / name)
        carried = Carried(self.method, 2, self.folder / "own", self.folder / "total")
        write_correction(self.base, carried, self.folder / "given")
        return str(self.folder / "given")

    def train(self, out: str, host: Host | None = None, **fields: Any) -> dict[str, Any]:
        ways = {"base": str(self.base), "indices": None, "out": str(self.folder / out), "seed": 11, "round": 2}
        return self.answer("train", host, **{**ways, "steps": 12, "total_steps": 40, **fields})

    def read(self, out: str) -> bytes:
        return (self.folder / out).read_bytes()


@pytest.mark.parametrize(
    "config", [{}, {"clip": 0.3}, {"clip": 0.3, "schedule": "cosine", "warmup_steps": 15, "weight_decay": 0.01}]
)
@pytest.mark.parametrize("method", ["scaffold", "feddyn"])
def test_every_gradient_has_the_correction_before_it_is_clipped(tmp_path: Path, method: Method, config: Any) -> None:
    bench = Bench(tmp_path, method, **config)
    correction = bench.correct()
    done = bench.train("ours", correction=correction)
    assert done["event"] == "done", done
    bench.config |= {"given": correction, "pull": 0.5 if method == "feddyn" else 0}
    assert bench.train("by hand", bench.host(TASK + BY_HAND, terms={}))["event"] == "done"
    assert bench.read("ours") == bench.read("by hand")


def test_a_parameter_that_no_loss_depends_on_is_moved_by_the_correction_alone(tmp_path: Path) -> None:
    """Its gradient is zero and not nothing: else its slot would run away from zero by the mean of all, every round."""
    bench = Bench(tmp_path)
    correction = bench.correct()
    bench.train("out", correction=correction)
    base, out, given = (load_file(path) for path in (bench.base, tmp_path / "out", correction))
    moved = base["unused.weight"] - 12 * 0.05 * given["unused.weight"]
    assert torch.allclose(out["unused.weight"], moved, atol=1e-6)
    assert torch.equal(out["frozen"], base["frozen"])


def test_buffers_are_in_no_correction(tmp_path: Path) -> None:
    given = load(Path(Bench(tmp_path).correct()))
    assert {name for name in given if name.startswith("norm.")} == {"norm.weight", "norm.bias"}
    assert read_layout(tmp_path / "given").notes == Notes()


def test_the_sum_of_rates_is_that_of_the_schedule_in_this_round(tmp_path: Path) -> None:
    bench = Bench(tmp_path, schedule="cosine", warmup_steps=15)
    done = bench.train("out")
    rates = [0.05 * lr_factor(step, schedule="cosine", warmup=15, total=40) for step in range(12, 24)]
    assert done["rate_sum"] == pytest.approx(sum(rates), rel=1e-12)


def test_a_batch_that_was_found_has_its_rate_in_the_sum(tmp_path: Path) -> None:
    assert Bench(tmp_path).train("out", batch_size=16)["rate_sum"] == pytest.approx(12 * 0.05 * 16 / 32)


def test_a_batch_in_pieces_is_corrected_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path, source=TASK.replace("self.norm(self.one(x))", "self.one(x)"))
    correction = bench.correct()
    bench.train("whole", correction=correction)
    assert bench.train("pieces", correction=correction, fits=2)["fits"] == 2
    whole, pieces = load_file(tmp_path / "whole"), load_file(tmp_path / "pieces")
    assert all(torch.allclose(whole[name], pieces[name], atol=1e-6) for name in whole)


@pytest.mark.parametrize("at", [1, 7, 11])
def test_a_shard_that_is_killed_goes_on_to_the_same_bytes_and_the_same_sum(
    tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, schedule="cosine")
    keeping = {"checkpoint": str(tmp_path / "kept"), "checkpoint_every_s": 0.0, "base_digest": "b"}
    keeping["correction"] = bench.correct()
    truth = bench.train("truth", correction=keeping["correction"])
    real = Context.wants_more

    def wants_more(context: Context) -> bool:
        more = real(context)
        if context._taken >= at:
            raise Killed
        return more

    with monkeypatch.context() as patch:
        patch.setattr(Context, "wants_more", wants_more)
        with pytest.raises(Killed):
            bench.train("out", **keeping)
    done = bench.train("out", **keeping)
    assert (done["resumed_at"], done["rate_sum"]) == (at, truth["rate_sum"])
    assert bench.read("out") == bench.read("truth")


def test_a_checkpoint_made_with_another_correction_is_not_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path)
    keeping = {"checkpoint": str(tmp_path / "kept"), "checkpoint_every_s": 0.0, "base_digest": "b"}
    real = Context.wants_more
    with monkeypatch.context() as patch:
        patch.setattr(Context, "wants_more", lambda context: real(context) and _die_after(context, 5))
        with pytest.raises(Killed):
            bench.train("out", **keeping, correction=bench.correct(0.1))
    assert bench.train("out", **keeping, correction=bench.correct(0.2))["resumed_at"] == 0


def _die_after(context: Context, steps: int) -> bool:
    if context._taken >= steps:
        raise Killed
    return True


# ---------------------------------------------------------------- fp16


class Scaler:
    """A GradScaler whose scales are given."""

    def __init__(self, scales: list[float]) -> None:
        self.scales = scales

    def is_enabled(self) -> bool:
        return True

    def get_scale(self) -> float:
        return self.scales.pop(0)


def test_a_step_that_was_skipped_in_fp16_has_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale before and after each of three steps: it falls where the gradients were not finite."""
    scaler = Scaler([8.0, 8.0, 8.0, 4.0, 4.0, 8.0])
    monkeypatch.setattr(Context, "scaler", property(lambda _: scaler))
    context = Context.__new__(Context)
    context.optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.25)
    context._terms, context._rate_sum = (), 0.0
    for _ in range(3):
        context.add_terms()
        context._count_rate()
    assert context._rate_sum == 0.5


def test_a_round_without_one_step_taken_is_no_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "_count_rate", lambda _: None)
    failed = Bench(tmp_path).train("out")
    assert failed["code"] == "task_failed"
    assert "none of the 12 steps was taken" in failed["sentence"]


# ---------------------------------------------------------------- what a task may do


def test_a_loop_of_its_own_that_calls_for_the_terms_gives_the_same_bytes_and_sum(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    correction = bench.correct()
    ours = bench.train("ours", correction=correction)
    own = bench.train("own", bench.host(TASK + loops.WITH_TERMS), correction=correction)
    assert bench.read("own") == bench.read("ours")
    assert own["rate_sum"] == ours["rate_sum"]


def test_a_loop_of_its_own_that_does_not_is_refused_also_before_there_is_anything_to_correct(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    failed = bench.train("out", bench.host(TASK + loops.WITH_TERMS.replace("context.add_terms()", "pass")))
    assert failed["code"] == "bad_task"
    assert "call context.add_terms()" in failed["sentence"]


def test_a_task_with_an_optimizer_of_its_own_is_refused_as_it_is_opened(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    own = "\ndef optimizer(model, config):\n    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)\n"
    with pytest.raises(Exception, match=r"train.drift = scaffold needs plain SGD: task.py has its own optimizer\(\)"):
        bench.host(TASK + own)
    bench.host(TASK + own, terms={})


@pytest.mark.parametrize(
    ("config", "words"),
    [({"momentum": 0.9}, "SGD with momentum 0.9"), ({"optimizer": "adamw"}, "makes it a AdamW")],
)
def test_a_configuration_that_makes_it_another_optimiser_is_refused(tmp_path: Path, config: Any, words: str) -> None:
    failed = Bench(tmp_path, **config).train("out")
    assert failed["code"] == "bad_task"
    assert words in failed["sentence"]


def test_only_one_group_without_momentum_is_plain_sgd() -> None:
    one, two = torch.zeros(1), torch.zeros(1)
    assert task_drift.why_not_plain(torch.optim.SGD([one], lr=0.1, weight_decay=0.1)) is None
    groups = [{"params": [one]}, {"params": [two], "lr": 1.0}]
    assert task_drift.why_not_plain(torch.optim.SGD(groups, lr=0.1)) == "SGD with 2 groups of parameters"


def test_tied_weights_are_corrected_once(tmp_path: Path) -> None:
    tied = "self.one, self.two, self.unused = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(2, 2)"
    assert tied in TASK
    source = TASK.replace(tied, f"{tied}\n        self.again = nn.Linear(2, 2); self.again.weight = self.unused.weight")
    bench = Bench(tmp_path, source=source)
    correction = bench.correct()
    assert bench.train("out", correction=correction)["event"] == "done"
    base, out, given = (load_file(path) for path in (bench.base, tmp_path / "out", correction))
    assert "again.weight" not in given
    assert torch.allclose(out["unused.weight"], base["unused.weight"] - 0.6 * given["unused.weight"], atol=1e-6)


def test_a_parameter_that_its_state_calls_by_another_name_is_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "given"
    save_file({"weight": torch.zeros(2, 2)}, path)
    with pytest.raises(task_drift.UnfitError, match="'bias' is known by another name"):
        task_drift.read(str(path), nn.Linear(2, 2), {})
    assert list(task_drift.read(str(path), nn.Linear(2, 2, bias=False), {})) == ["weight"]
    assert task_drift.read("", nn.Linear(2, 2), {}) == {}
