"""A client term of your own: FedProx with a pull that is never stronger than a bound.

FedProx pulls the harder the further a weight goes, so one that a worker's data truly wants elsewhere is held back
without limit. Here the pull grows as FedProx's does for a distance up to 1, and stays what it is beyond that: the
gradient of Huber's function instead of the square's.

A term is such a function: weights now, weights when the round began, the job's coefficient; what it returns is added to
the gradient of each local step, before clipping. It must not write to what it is given. To have it in every job:

    worker/task_terms.py    the function, and its line in TERMS: "bounded_pull": bounded_pull
    common/messages.py      bounded_pull: float = Field(0.0, ge=0, …) in TrainSection, and its name in CLIENT_TERMS

Checkpoints, several GPUs, pieces of a batch, half precision and a task's own optimiser need nothing more.
"""


def bounded_pull(weights, base, strength):
    return strength * (weights - base).clamp(-1.0, 1.0)
