"""A job that each worker measures on its own data, and that stops when nothing gets better: on real processes."""

from pathlib import Path

from common.messages import Assignment, Submission
from common.weights import file_digest
from tests.acceptance.kit import LocalFleet, closed_rounds, of_type, wait_for
from tests.acceptance.played import Played, update

TASK = """
import torch
from pathlib import Path
from torch import nn
from torch.utils.data import TensorDataset

def model(config):
    return nn.Linear(4, 3)

def dataset(config, split):
    rows = int((Path(config["data"]["private"]) / split).read_text())
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows))
    return TensorDataset(x, x[:, :3].argmax(1)) if rows else None
"""


def private_data(folder: Path, **rows: int) -> str:
    folder.mkdir()
    for split in ("train", "test", "local-test"):
        (folder / split).write_text(str(rows.get(split.replace("-", "_"), 0)))
    return f"private={folder}"


def test_each_worker_measures_on_its_own_data_and_the_job_stops_early_with_its_best_model(tmp_path: Path) -> None:
    task = tmp_path / "private.py"
    task.write_text(TASK)
    rows = {"w1": {"train": 40, "test": 30}, "w2": {"train": 20, "test": 99, "local_test": 10}, "w3": {"train": 9}}
    with LocalFleet(tmp_path) as fleet:
        for name, own in rows.items():
            fleet.start_worker(name, "--trust", "any", "--data", private_data(tmp_path / f"{name}-data", **own))
        fleet.await_workers(3)
        job = fleet.submit(
            task, rounds=40, data={"partition": "local", "name": "private"}, round={"min_workers": 3},
            train={"lr": 1e-9}, evaluation={"scope": "workers", "patience": 2, "per_class": True},
        )  # fmt: skip
        facts, view = fleet.facts(job), fleet.finish(job)
        best = fleet.pull(job, "best")
    evaluations = list(of_type(facts, "evaluation"))
    assert len(evaluations) == 3  # the second and third are no better
    for one in evaluations:
        by_name = {worker["worker_name"]: worker for worker in one["workers"]}
        assert [by_name[name]["samples"] for name in rows] == [30, 10, 0]
        assert by_name["w3"]["why"] == "it has no test data of its own"
        right = sum(by_name[name]["metrics"]["accuracy"] * by_name[name]["samples"] for name in ("w1", "w2"))
        assert abs(one["metrics"]["accuracy"] - right / 40) < 1e-9
        assert {"accuracy/0", "accuracy/1", "accuracy/2"} <= one["metrics"].keys()
    assert view.reason.startswith(f"stopped early at round {evaluations[2]['round']}: accuracy was not better than 0.")
    assert view.reason.endswith(f"in 2 evaluations; the best model is that of round {view.best_round}")
    digests = {one["round"]: one["digest"] for one in closed_rounds(facts)}
    assert view.best_round == evaluations[0]["round"]
    assert file_digest(best) == digests[view.best_round]


BY_USER = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

def model(config):
    return nn.Linear(4, 3)

def dataset(config, split):
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
    rows = TensorDataset(x, x[:, :3].argmax(1))
    rows.users = [f"user-{number * number % 7}" for number in range(30)]
    return rows
"""


def test_each_user_is_a_shard_on_every_worker_and_too_few_of_them_end_the_job_in_words(
    crew: LocalFleet,
    tmp_path: Path,
) -> None:
    task = tmp_path / "by_user.py"
    task.write_text(BY_USER)
    data = {"partition": "natural", "by": "users"}
    facts = crew.facts(crew.submit(task, rounds=2, data=data, round={"min_workers": 2}))
    failed = crew.finish(crew.submit(task, rounds=2, data={**data, "shards": 5}), state="failed")
    sizes = [sum(number * number % 7 == user for number in range(30)) for user in (0, 1, 2, 4)]
    for number in (1, 2):
        updates = {one["shard"]: one["samples"] for one in of_type(facts, "accepted") if one["round"] == number}
        assert [updates[shard] for shard in range(4)] == sizes
    assert "30 samples of 4 ids cannot be cut into 5 shards: a shard has at least one whole id. Set [data] shards" in (
        failed.reason
    )


def test_a_part_that_is_handed_in_twice_counts_once_and_is_answered_as_a_repeat(tmp_path: Path) -> None:
    with LocalFleet(tmp_path) as fleet, Played(fleet, "a") as a, Played(fleet, "b") as b:
        job = fleet.submit(rounds=2, data={"shards": 2}, round={"min_workers": 2}, evaluation={"scope": "workers"})
        a.init()
        for worker in (a, b):
            worker.hand_in(worker.poll(), update(1.0))
        work = wait_for("the round to be measured", lambda: _measuring(a))
        said = Submission(attempt=work.attempt, samples=4, metrics={"accuracy": (2.0, 4.0), "loss": (4.0, 4.0)})
        assert [a.api.submit(work.id, said).repeat for _ in range(3)] == [False, True, True]
        fleet.api.cancel(job)


def _measuring(worker: Played) -> Assignment | None:
    """Its part of an evaluation; what is to be trained before is trained."""
    work = worker.poll()
    if work.kind == "evaluate":
        return work
    worker.hand_in(work, update(2.0))
    return None
