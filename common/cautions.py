"""What of a job is allowed, and seldom meant: a sentence each, for whoever submits it. Nothing is refused here.

Pure.
"""

from common.messages import JobSpec

ENOUGH_STEPS = 50
"""Local steps from which on DiLoCo's momentum is known to do well: the fewest of OpenDiLoCo, arXiv 2407.07852."""
DILOCO_MOMENTUM = 0.9  # unless the job says another


def cautions(spec: JobSpec) -> tuple[str, ...]:
    """What to tell whoever submits this job."""
    steps = spec.train.local_steps
    few = too_few_steps(spec, steps) if steps is not None else ""
    return tuple(filter(None, [few, feedback_under_momentum(spec), kept_without_noise(spec), counts_anew(spec)]))


def momentum_of(spec: JobSpec) -> float:
    """DiLoCo's outer momentum in this job; 0: it has none."""
    given = spec.aggregation.outer_momentum
    if spec.aggregation.algorithm != "diloco":
        return 0.0
    return DILOCO_MOMENTUM if given is None else given


def feedback_under_momentum(spec: JobSpec) -> str:
    """What to say where what top-k left out comes rounds later, under an outer momentum; empty: nothing.

    Source: measured, examples/experiments/low_communication.py.
    """
    if spec.aggregation.update != "topk" or spec.aggregation.feedback is False or momentum_of(spec) == 0:
        return ""
    return (
        "topk with feedback came out worse under diloco's momentum than without feedback: set "
        "aggregation.feedback = false, or use fedavg (docs/algorithms.md has the figures)"
    )


def kept_without_noise(spec: JobSpec) -> str:
    """What to say where updates stay on the coordinator's disk that were to be hidden by noise; empty: nothing."""
    if spec.privacy.level != "worker" or spec.round.keep_updates == 0:
        return ""
    return (
        f"round.keep_updates = {spec.round.keep_updates} leaves each worker's updates, without noise, and the seed of "
        "the noise in the coordinator's state folder, after the job's end too"
    )


def counts_anew(spec: JobSpec) -> str:
    """What to say where a private job begins with a model that may give something away itself; empty: nothing."""
    if spec.privacy.level == "none" or spec.init is None:
        return ""
    return (
        f"the epsilon of this job is of its own rounds alone: what the model of init = {spec.init} gives away of the "
        "same data comes on top"
    )


def too_few_steps(spec: JobSpec, steps: int) -> str:
    """What to say where DiLoCo's momentum meets few local steps; empty: nothing.

    Args:
        spec: the job.
        steps: that a worker takes in a round.
    """
    momentum = momentum_of(spec)
    if momentum == 0 or steps >= ENOUGH_STEPS:
        return ""
    return (
        f"diloco with outer_momentum = {momentum:g} is meant for {ENOUGH_STEPS} local steps a round and more, and here "
        f"it is {steps}: train longer between two rounds, or set outer_lr = 1 and outer_momentum = 0, which is fedavg"
    )
