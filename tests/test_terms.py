"""Terms in local steps: by hand, beside a loss that has the term in it, and through all that a step goes through."""

import io
import math
import runpy
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from common.messages import CLIENT_TERMS, TrainSection
from tests import loops
from tests.test_checkpoints import TASK as NOISY_TASK
from tests.test_checkpoints import Bench
from worker import task_host, task_terms
from worker.task_host import Events, Host
from worker.task_terms import add, base_of, proximal, terms_of

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


class Desk:
    """Hosts in this process that train one task with some terms."""

    def __init__(self, folder: Path, source: str, terms: dict[str, Any], **config: Any) -> None:
        self.folder, self.terms, self.config = folder, terms, {"batch_size": 1, "lr": 0.1, **config}
        (folder / "task.py").write_text(source)
        self.base = folder / "base"
        self.host = self.opened()
        self.answer("init", seed=3, out=str(self.base), labels=None)

    def opened(self, **terms: Any) -> Host:
        host = Host(CPU, Events(io.BytesIO()), threading.Event())
        host.open(task=str(self.folder / "task.py"), config=dict(self.config), terms={**self.terms, **terms})
        return host

    def answer(self, do: str, host: Host | None = None, **fields: Any) -> dict[str, Any]:
        return (host or self.host).answer({"do": do, **fields})

    def train(self, out: str = "out", host: Host | None = None, **fields: Any) -> dict[str, Any]:
        given = {"base": str(self.base), "indices": None, "out": str(self.folder / out), "seed": 5, "round": 1}
        return self.answer("train", host, **{**given, **fields})

    def trained(self, out: str = "out", host: Host | None = None, **fields: Any) -> dict[str, torch.Tensor]:
        done = self.train(out, host, **fields)
        assert done["event"] == "done", done
        return load_file(self.folder / out)


# ---------------------------------------------------------------- by hand

LINE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0]))
    def forward(self, x):
        return self.w

def model(config):
    return Scaled()

def dataset(config, split):
    return TensorDataset(torch.zeros(1, 1))

def loss(model, batch, config):  # its gradient is (2, 0.5), wherever the weights are
    return (model(batch[0]) * torch.tensor([2.0, 0.5])).sum()
"""


def by_hand(steps: int, *, mu: float, lr: float, clip: float = math.inf) -> list[float]:
    """w_{j+1} = w_j - lr · c(g + mu (w_j - w_0)), where c cuts the gradient to the norm `clip`."""
    base, w = [1.0, -2.0], [1.0, -2.0]
    for _ in range(steps):
        g = [fixed + mu * (now - then) for fixed, now, then in zip([2.0, 0.5], w, base, strict=True)]
        length = math.hypot(*g)
        w = [now - lr * one * min(1.0, clip / length) for now, one in zip(w, g, strict=True)]
    return w


@pytest.mark.parametrize("mu", [0.01, 1.0, 3.0])
def test_fedprox_over_several_steps_is_what_is_computed_by_hand(tmp_path: Path, mu: float) -> None:
    bench = Desk(tmp_path, LINE, {"proximal": mu})
    found = bench.trained(steps=7)["w"].tolist()
    assert found == pytest.approx(by_hand(7, mu=mu, lr=0.1), abs=1e-6)
    # The closed form of a constant gradient: w_0 - g (1 - (1 - lr·mu)^7) / mu.
    closed = [w - g * (1 - (1 - 0.1 * mu) ** 7) / mu for w, g in zip([1.0, -2.0], [2.0, 0.5], strict=True)]
    assert found == pytest.approx(closed, abs=1e-6)


def test_the_term_comes_before_the_gradient_is_clipped(tmp_path: Path) -> None:
    bench = Desk(tmp_path, LINE, {"proximal": 5.0}, clip=0.7)
    found = bench.trained(steps=5)["w"].tolist()
    assert found == pytest.approx(by_hand(5, mu=5.0, lr=0.1, clip=0.7), abs=1e-6)
    assert found != pytest.approx(by_hand(5, mu=0.0, lr=0.1, clip=0.7), abs=1e-3)


def test_every_round_begins_from_its_own_base(tmp_path: Path) -> None:
    bench = Desk(tmp_path, LINE, {"proximal": 1.0})
    first = bench.trained("one", steps=3)["w"]
    bench.base = tmp_path / "one"
    second = bench.trained("two", steps=3)["w"]
    torch.testing.assert_close(second - first, first - torch.tensor([1.0, -2.0]), atol=1e-6, rtol=0)


# ---------------------------------------------------------------- beside a loss that has the term in it

NET = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last, self.never = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(2, 2)
        self.last.bias.requires_grad_(False)
    def forward(self, x):
        return self.last(self.first(x).relu())

def model(config):
    return Net()

def dataset(config, split):
    x = torch.randn(37, 4, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x[:, :3].argmax(1))
"""
IN_THE_LOSS = (
    NET
    + """
MU, kept = 0.3, {}
def loss(model, batch, config):
    if not kept:
        kept.update({name: p.detach().clone() for name, p in model.named_parameters()})
    pull = sum(((p - kept[n]) ** 2).sum() for n, p in model.named_parameters() if p.requires_grad and n[:5] != "never")
    return nn.functional.cross_entropy(model(batch[0]), batch[1]) + MU / 2 * pull
"""
)
OWN_OPTIMIZER = """
def optimizer(model, config):
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
"""


@pytest.mark.parametrize("more", ["", OWN_OPTIMIZER, loops.WITH_TERMS], ids=["default", "own optimiser", "own loop"])
def test_the_weights_are_those_of_a_loss_that_has_the_term_in_it(tmp_path: Path, more: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    config = {"batch_size": 8, "momentum": 0.9, "weight_decay": 0.01}
    ours = Desk(tmp_path / "a", NET + more, {"proximal": 0.3}, **config).trained(epochs=3)
    other = IN_THE_LOSS + more.replace(
        "nn.functional.cross_entropy(model(x), y)", "globals()['loss'](model, (x, y), {})"
    )
    truth = Desk(tmp_path / "b", other.replace("context.add_terms()", "pass"), {}, **config).trained(epochs=3)
    without = Desk(tmp_path / "b", NET + more, {}, **config).trained(epochs=3)
    for name in truth:
        torch.testing.assert_close(ours[name], truth[name], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(ours["first.weight"], without["first.weight"], atol=1e-4)
    assert torch.equal(ours["never.weight"], without["never.weight"])  # weight decay did not begin to move it


@given(st.integers(0, 2**20), st.floats(0.001, 10), st.booleans())
@settings(deadline=None, max_examples=40)
def test_a_term_never_changes_weights_or_base_and_adds_mu_times_the_way_from_it(
    seed: int, mu: float, half: bool
) -> None:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2).to(torch.bfloat16 if half else torch.float64)
    base = base_of({"proximal": mu}, model)
    assert all(tensor.dtype == (torch.float32 if half else torch.float64) for tensor in base.values())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
            parameter.grad = torch.randn_like(parameter)
    before = {name: (p.clone(), base[name].clone(), p.grad) for name, p in model.named_parameters()}
    wanted = {n: (g.double() + mu * (p - b).double()).detach() for n, (p, b, g) in before.items() if g is not None}
    (term,) = terms_of({"proximal": mu}, base)
    term(model)
    for name, parameter in model.named_parameters():
        weights, kept, _ = before[name]
        assert torch.equal(parameter, weights)
        assert torch.equal(base[name], kept)
        assert parameter.grad is not None
        close = {"atol": 2e-2 * (1 + mu), "rtol": 2e-2} if half else {"atol": 1e-6 * (1 + mu), "rtol": 1e-6}
        torch.testing.assert_close(parameter.grad.double(), wanted[name], **close)


def test_a_parameter_without_a_gradient_is_pulled_back_once_it_has_moved() -> None:
    model = nn.Linear(2, 1, bias=False)
    base = base_of({"proximal": 2.0}, model)
    add(proximal, base, 2.0, model)
    assert model.weight.grad is None
    with torch.no_grad():
        model.weight += 1.5
    add(proximal, base, 2.0, model)
    assert model.weight.grad is not None
    torch.testing.assert_close(model.weight.grad, torch.full((1, 2), 3.0))


def test_a_sparse_gradient_is_refused_in_words() -> None:
    model = nn.Embedding(4, 2, sparse=True)
    base = base_of({"proximal": 1.0}, model)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="the gradient of 'weight' is sparse"):
        add(proximal, base, 1.0, model)


def test_a_job_without_terms_keeps_no_copy_of_the_model() -> None:
    model = nn.Linear(2, 2)
    for config in ({}, {"proximal": 0.0}, {"proximal": 0}):
        assert base_of(config, model) == {}
        assert terms_of(config, {}) == ()
    assert base_of({"proximal": 1.0}, model, without=["bias"]).keys() == {"weight"}


# ---------------------------------------------------------------- whatever a step goes through


def test_a_loop_of_the_tasks_own_that_leaves_the_terms_out_is_stopped_at_its_first_step(tmp_path: Path) -> None:
    source = NET + loops.WITH_TERMS.replace("            context.add_terms()\n", "")
    answer = Desk(tmp_path, source, {"proximal": 0.3}).train(steps=3)
    assert (answer["event"], answer["code"]) == ("error", "bad_task")
    assert "call context.add_terms() before each step" in answer["sentence"]
    assert Desk(tmp_path, source, {}).train(steps=3)["event"] == "done"


def test_a_step_in_pieces_has_the_term_once(tmp_path: Path) -> None:
    bench = Desk(tmp_path, NET, {"proximal": 0.5}, batch_size=8)
    whole, pieces = bench.trained("whole", epochs=2), bench.trained("pieces", epochs=2, fits=3)
    for name in whole:
        torch.testing.assert_close(pieces[name], whole[name], atol=1e-6, rtol=1e-5)


def test_the_term_is_added_to_gradients_that_float16_has_left_unscaled(tmp_path: Path) -> None:
    found = Desk(tmp_path, LINE, {"proximal": 1.0}, precision="fp16").trained(steps=4)["w"].tolist()
    assert found == pytest.approx(by_hand(4, mu=1.0, lr=0.1), abs=1e-6)


class Terms(Bench):
    """The bench of checkpoints, with terms."""

    def host(self) -> Host:
        host = super().host()
        host.open(task=str(self.task), config=dict(self.config), terms={"proximal": 0.5})
        return host


def test_a_shard_killed_in_the_middle_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    bench = Terms(tmp_path, NOISY_TASK, clip=1.0)
    done, update = bench.undisturbed(steps=12)
    assert update != Bench(tmp_path, NOISY_TASK, clip=1.0).undisturbed(steps=12)[1]
    for at in (3, 9):
        bench.killed(at, kept=at, steps=12)
    resumed, again = bench.train(steps=12)
    assert (again, resumed["resumed_at"], done["resumed_at"]) == (update, 9, 0)


def test_a_checkpoint_of_another_coefficient_is_not_gone_on_from(tmp_path: Path) -> None:
    bench = Terms(tmp_path, NOISY_TASK)
    bench.killed(5, kept=5, steps=12)
    plain = Bench(tmp_path, NOISY_TASK)
    assert plain.train(steps=12)[0]["resumed_at"] == 0


def test_many_shards_in_one_command_are_trained_one_by_one_with_the_term(tmp_path: Path) -> None:
    bench = Desk(tmp_path, NET, {"proximal": 0.5}, batch_size=8)
    shards = []
    for number, rows in enumerate((range(10), range(10, 30))):
        np.save(tmp_path / f"{number}.npy", np.array(rows))
        shards.append({"indices": str(tmp_path / f"{number}.npy"), "out": str(tmp_path / f"many-{number}"), "seed": 5})
    answer = bench.answer("train_many", base=str(bench.base), shards=shards, round=1, epochs=2, stack="on")
    assert (answer["stacked"], answer["why"]) == (0, "a stack has no proximal")
    own = {**shards[1], "out": str(tmp_path / "alone")}
    assert bench.answer("train", base=str(bench.base), round=1, epochs=2, **own)["event"] == "done"
    assert (tmp_path / "alone").read_bytes() == (tmp_path / "many-1").read_bytes()


def test_the_example_of_an_own_term_is_two_lines_away_from_every_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(__file__).parent.parent / "examples" / "extending" / "bounded_pull.py"
    monkeypatch.setitem(task_host.task_terms.TERMS, "bounded_pull", runpy.run_path(str(file))["bounded_pull"])
    found = Desk(tmp_path, LINE, {"bounded_pull": 1.0}, lr=1.0).trained(steps=4)["w"].tolist()
    # By hand, from (1, -2) with the gradient (2, 0.5): each step is -2 - clamp(d0) and -0.5 - clamp(d1).
    assert found == pytest.approx([1.0 - 2 - 1 - 1 - 1, -2.0 - 0.5], abs=1e-6)


def test_every_term_is_a_key_of_the_job() -> None:
    assert set(task_terms.TERMS) <= set(CLIENT_TERMS) <= TrainSection.model_fields.keys()
