"""DP-SGD on one shard: each sample's gradient is clipped, noise is added in each step, and the cost is counted.

Part of the child (worker/task_host.py), which loads it by its path: torch and opacus, none of our packages.

    each step: every sample with chance rate ──loss──▶ gradient a sample ──clip──▶ sum + noise ──/ (rate n)──▶ optimiser

What a step draws (which samples, which noise) follows from a secret of this worker and the number of the step alone. So
a training that was killed goes on from its checkpoint with the noise that it would have had, and the same work done
twice on one machine gives the same bytes: no second draw, from which the first could be taken. Nobody else can draw it.

The loss is told to nobody, since it would say more of the data than the noise lets through. Buffers that training
changes would as well, so a model that has such is refused.

Source: Abadi et al. 2016, arXiv 1607.00133, algorithm 1; sampling, clip, noise and accountant are those of opacus.
"""

import hashlib
import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

INSTALL = "pip install 'opacus>=1.6.0'"


def step_seed(secret: str, purpose: str, step: int) -> int:
    """A seed for one draw of one step, 64 bits."""
    return int.from_bytes(hashlib.sha256(f"{secret} {purpose} {step}".encode()).digest()[:8], "little")


def sampled(shard: Tensor, rate: float, secret: str, step: int) -> Tensor:
    """The samples of one step: each with the same chance, for itself, and maybe none.

    Args:
        shard: int64 (samples,).
        rate: the chance, up to 1.
        secret: of this shard and round.
        step: from 0.

    Returns:
        int64 (n,), in the order of the shard.
    """
    generator = torch.Generator().manual_seed(step_seed(secret, "sample", step))
    return shard[torch.rand(len(shard), generator=generator, dtype=torch.float64) < rate]


def check(house: ModuleType, task: Any, model: nn.Module, ranks: Any) -> None:  # noqa: ANN401 - of the house
    """Make sure that this task can be trained privately here.

    Raises:
        TaskError: missing_package, opacus is not installed; worker_error, on several devices; bad_task, it cannot be.
    """
    if importlib.util.find_spec("opacus") is None:
        sentence = f"example-level privacy needs opacus, which this worker has not: {INSTALL}"
        raise house.TaskError("missing_package", sentence)
    if ranks.world > 1:
        sentence = "example-level privacy trains on one device: start the worker with --device cuda:0, not with several"
        raise house.TaskError("worker_error", sentence)
    if task.has("train"):
        sentence = f"{task.file.name} has its own train(), in which nobody can see each sample's gradient"
        raise house.TaskError("bad_task", f"{sentence}: leave it out for privacy.level = example")
    from opacus.grad_sample import GradSampleModule
    from opacus.validators import ModuleValidator

    errors = [str(error) for error in (*ModuleValidator.validate(model), *GradSampleModule.validate(model))]
    if house.has_batch_norm(model):  # one without parameters and buffers as well: it mixes the samples of a batch
        errors.insert(0, "it has BatchNorm, which mixes the samples of a batch")
    if errors:
        advice = "replace BatchNorm by GroupNorm (in model(): opacus.validators.ModuleValidator.fix(model))"
        sentence = f"the model cannot be trained with example-level privacy: {errors[0][:300]}"
        raise house.TaskError("bad_task", f"{sentence}; {advice}")


def train(
    house: ModuleType,
    task: Any,  # noqa: ANN401 - a Task
    model: nn.Module,
    dataset: Any,  # noqa: ANN401 - a map-style Dataset
    shard: Tensor,
    context: Any,  # noqa: ANN401 - a Context
    private: dict[str, Any],
) -> dict[str, Any]:
    """Train, and count what it cost.

    Args:
        house: the module of task_host.
        task: the task.
        model: on its device, in training mode; trained in place.
        dataset: to take the shard's samples from.
        shard: int64 (samples,).
        context: whose optimiser is used; counts the steps.
        private: clip, noise, delta; `seed`, the secret of this shard and round; `before`, a list of [rate, noise,
            steps] that the samples have been through.

    Returns:
        sample_rate, noise, steps of this training; epsilon of it and of all before, at delta.
    """
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    batch = min(int(task.config.get("batch_size", 32)), len(shard))
    rate, secret = batch / len(shard), private["seed"]
    before = {name: value.detach().clone() for name, value in model.named_buffers()}
    noise = torch.Generator(device=context.device)
    wrapped = GradSampleModule(model)
    optimizer = DPOptimizer(
        context.optimizer,
        noise_multiplier=private["noise"],
        max_grad_norm=private["clip"],
        expected_batch_size=batch,
        generator=noise,
        secure_mode=True,  # sums of several draws: the low bits of one would give a value away
    )
    try:
        while context.wants_more():
            step = context._taken
            rows = sampled(shard, rate, secret, step)
            context.gave(batch)  # what is expected, not what was drawn
            optimizer.zero_grad(set_to_none=True)
            if len(rows):
                (one,) = house.read_batches(dataset, [rows], context.device, workers=0, seed=0)
                house.loss_of(task, wrapped, one).backward()
            _fill(optimizer, len(rows))
            noise.manual_seed(step_seed(secret, "noise", step))
            context.follow_schedule()
            optimizer.step()
            context.step(0.0)
    finally:
        wrapped.to_standard_module()
    _check_buffers(house, model, before)
    return {
        "sample_rate": rate,
        "noise": private["noise"],
        "steps": context._taken,
        "epsilon": epsilon([*private["before"], [rate, private["noise"], context._taken]], private["delta"]),
        "delta": private["delta"],
    }


def _fill(optimizer: Any, samples: int) -> None:  # noqa: ANN401 - a DPOptimizer
    """A gradient of zero for each sample, of what no loss came from: nobody was drawn, or a layer was not used."""
    for parameter in optimizer.params:
        if getattr(parameter, "grad_sample", None) is None:
            parameter.grad_sample = parameter.detach().new_zeros((samples, *parameter.shape))


def _check_buffers(house: ModuleType, model: nn.Module, before: dict[str, Tensor]) -> None:
    changed = [name for name, value in model.named_buffers() if name in before and not value.equal(before[name])]
    if changed:
        sentence = f"training changed the buffer {changed[0]!r} ({len(changed)} in all), to which no noise is added"
        raise house.TaskError("bad_task", f"{sentence}: privacy.level = example allows none that changes")


def epsilon(runs: list[list[float]], delta: float) -> float:
    """Epsilon of DP-SGD, by opacus' accountant of Rényi divergences.

    Args:
        runs: [sample rate, noise, steps] each.
        delta: above 0 and below 1.
    """
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(noise, rate, int(steps)) for rate, noise, steps in runs]
    return float(accountant.get_epsilon(delta))
