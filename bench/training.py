"""A real job beside the same training with nothing around it: seconds a round, and from `submit` to the first step.

The task is the built-in one, read from its file, with a hook that notes when a net is first trained; the plain loop is
bench.reference. Both train the same shards in the same order with one thread each, so they end with the same bytes.
"""

import os
import statistics
import time
from pathlib import Path
from typing import Any

from bench.fleet import Fleet, running
from bench.limits import Limits
from bench.scenario import Column, Outcome, Row, Say, Scenario, Spec, Wish, merge, number, ratio, seconds, words
from common.tasks import BUILTIN
from common.weights import load

WARM_S = 8.0  # for a new child to import torch, on a machine with other things to do
FASHION = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist

# Appended to the text of the task. A child notes the time once a job, in a file of its own.
HOOK = """

import os as _os, time as _time

_plain_model = model


def model(config):
    made = _plain_model(config)

    def note(module, inputs):
        if module.training:
            handle.remove()
            with open(_os.path.join(config["stamps"], f"{_os.getpid()}"), "w") as file:
                file.write(repr(_time.time()))

    handle = made.register_forward_pre_hook(note)
    return made
"""


def measure(wish: Wish, _: Limits, say: Say) -> Outcome:
    """One row: the fleet, the plain loop after it, and the same training on all cores around both."""
    task = wish.pick(tiny="digits", quick="digits", full="fashion-mnist")
    skipped = []
    if task == "fashion-mnist" and not FASHION.is_dir():
        skipped.append("fashion-mnist: the Debian package dataset-fashion-mnist is not installed; digits instead")
        task = "digits"
    workers = wish.pick(tiny=1, quick=4, full=4)
    rounds = wish.rounds or wish.pick(tiny=2, quick=5, full=5)
    spec = spec_of(task, workers, rounds, wish)
    processes = min(workers, os.cpu_count() or 1)
    say(f"{task} in a plain loop on each of {processes} cores")
    at_once = _together(spec, processes)
    say(f"{task} on {workers} workers, {rounds} rounds, the second job on warm workers")
    with running() as fleet:
        fleet.start_workers(workers)
        _run(fleet, _short(spec))  # the workers are warm after it: all that they read is in the page cache
        found = _run(fleet, spec)
        model = fleet.folder / "model.safetensors"
        fleet.api.pull(found["job"], model)
        state = load(model)
        fleet.pause(WARM_S)
        found["warm_firsts"] = _run(fleet, _short(spec))["firsts"]
    say(f"{task} in one plain loop, and once more on each of {processes} cores")
    reference = _plain(spec, state)
    at_once += _together(spec, processes)  # before and after: what else the machine does changes within minutes
    return Outcome((_row(task, workers, found, reference, statistics.median(at_once)),), tuple(skipped))


def spec_of(task: str, workers: int, rounds: int, wish: Wish) -> Spec:
    """The job: the task's defaults but for momentum, iid, a shard a worker."""
    spec: Spec = {
        "task": task,
        "rounds": rounds,
        "seed": wish.seed,
        "train": {"local_epochs": 1, "batch_size": 64, "lr": 0.05, "momentum": 0.0},
        "data": {"shards": workers},
        "round": {"min_workers": workers, "evaluate_every": 0},
    }
    return merge(spec, wish.overrides)


def _short(spec: Spec) -> Spec:
    return merge(spec, {"rounds": 1})


def _run(fleet: Fleet, spec: Spec) -> dict[str, Any]:
    """Run one job with the hook in its task: its rounds, its training seconds, and when nets were first trained."""
    task = BUILTIN[spec["task"]]
    stamps = fleet.folder / f"stamps-{time.monotonic_ns()}"
    stamps.mkdir()
    config = {**task.config, **spec.get("config", {}), "stamps": str(stamps)}
    hooked = merge(spec, {"task": f"{spec['task']}-timed", "config": config})
    submitted_at, closed, trained = time.time(), list[dict[str, Any]](), dict[int, list[float]]()
    job = fleet.submit(hooked, task.file.read_text(encoding="utf-8") + HOOK)
    for event in fleet.events(job):
        if event["type"] == "round":
            closed.append(event)
        if event["type"] == "accepted":
            trained.setdefault(int(str(event["round"])), []).append(float(str(event["seconds"])))
    firsts = [float(path.read_text()) - submitted_at for path in stamps.iterdir()]
    return {"job": job, "closed": closed, "trained": trained, "firsts": firsts}


def _plain(spec: Spec, state: dict[str, Any]) -> dict[str, Any]:
    """The plain loop of the same job, and whether it ends with the same bytes."""
    from bench.reference import fedavg
    from common.messages import JobSpec

    done = list(fedavg(JobSpec.model_validate(spec)))
    last = done[-1].state
    same = last.keys() == state.keys() and all(last[name].tobytes() == state[name].tobytes() for name in last)
    return {"seconds": [one.seconds for one in done], "accuracy": done[-1].accuracy, "same": same}


def _together(spec: Spec, processes: int) -> list[float]:
    """Seconds of rounds of the same training on so many cores, the first round left out."""
    from bench.reference import together
    from common.messages import JobSpec

    return together(JobSpec.model_validate(spec), processes)[1:]


def _row(task: str, workers: int, found: dict[str, Any], plain: dict[str, Any], ideal_s: float) -> Row:
    took = [event["seconds"] for event in found["closed"][1:]]
    trained = [max(found["trained"][event["round"]]) for event in found["closed"][1:]]
    plain_s = statistics.median(plain["seconds"][1:])
    round_s = statistics.median(took)
    return {
        "task": task,
        "workers": workers,
        "rounds": len(took),
        "round_s": round_s,
        "slowest_training_s": statistics.median(trained),
        "plain_s": plain_s,
        "ideal_s": ideal_s,
        "ratio": round_s / ideal_s,
        "first_step_s": min(found["firsts"]),
        "last_first_step_s": max(found["firsts"]),
        "warm_first_step_s": min(found["warm_firsts"]),
        "warm_last_first_step_s": max(found["warm_firsts"]),
        "accuracy": plain["accuracy"],
        "same_bytes": plain["same"],
    }


SCENARIO = Scenario(
    name="training",
    title="A real job",
    about=(
        "McMahan's CNN on Fashion-MNIST (digits in a quick run, or where the data is not installed), iid, one local "
        "epoch, batch 64, SGD at 0.05, one thread a worker; medians, the first round left out. *Plain loop*: "
        "`bench/reference.py`, one process that trains all shards in turn. *At best*: the same training with the "
        "shards dealt to as many processes as there are cores (workers, if those are fewer), which send nothing and "
        "average nothing, before and after the rest. *First step*: from `submit` to the first training step of the "
        "first and of the last worker; the workers have run such a job. *At once*: the job came the moment that the "
        "one before was over; its task is no built-in one, so its child is new and imports torch. *Warm*: it came some "
        "seconds later, when the new child has."
    ),
    measure=measure,
    takes_overrides=True,
    columns=(
        Column("task", "task", words),
        Column("workers", "workers", number),
        Column("rounds", "rounds", number),
        Column("round", "round_s", seconds),
        Column("slowest training in it", "slowest_training_s", seconds),
        Column("plain loop", "plain_s", seconds),
        Column("at best", "ideal_s", seconds),
        Column("round / at best", "ratio", ratio),
        Column("first step, at once", "first_step_s", seconds),
        Column("of the last worker", "last_first_step_s", seconds),
        Column("first step, warm", "warm_first_step_s", seconds),
        Column("of the last worker", "warm_last_first_step_s", seconds),
        Column("accuracy", "accuracy", lambda value: f"{value:.3f}"),
        Column("same bytes", "same_bytes", lambda same: "yes" if same else "no"),
    ),
)
