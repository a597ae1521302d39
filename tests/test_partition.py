"""`lydian partition`: statistics of cuts computed by hand, what is printed, and the picture."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from client.main import app
from client.partition import command, picture
from client.partition.command import shards_of
from client.partition.statistics import distances, effective_labels, gini, histogram, rounded, statistics_of, table_of
from common.errors import BadJobError, LydianError
from common.messages import JobSpec
from common.sharding import Partition, order_of

CLI = CliRunner()
TABLE = np.array([[4, 0], [2, 2], [0, 8]])

TABLES = st.integers(1, 5).flatmap(
    lambda classes: st.lists(
        st.lists(st.integers(0, 50), min_size=classes, max_size=classes).filter(any), min_size=1, max_size=8
    ).map(np.array)
)

TASK = """
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

def model(config):
    return nn.Linear(2, 3)

def dataset(config, split):
    whole = TensorDataset(torch.zeros(40, 2), torch.arange(40) % 3)
    whole.users = [f"user-{sample % 7}" for sample in range(40)]
    return Subset(whole, range(30))
"""


def cut(order: list[int], bounds: tuple[int, ...]) -> Partition:
    return Partition(np.array(order), bounds)


# ---------------------------------------------------------------- numbers


def test_a_table_counts_the_samples_of_each_shard_and_class() -> None:
    table, classes = table_of(cut([3, 0, 2, 1], (0, 1, 4)), np.array([7, -1, 7, 5]))
    assert table.tolist() == [[0, 1, 0], [1, 0, 2]]
    assert classes == [-1, 5, 7]


def test_without_classes_a_table_has_the_sizes() -> None:
    table, _ = table_of(cut([3, 0, 2, 1], (0, 1, 4)), None)
    assert table.tolist() == [[1], [3]]


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [([5, 5, 5], 0.0), ([7], 0.0), ([1, 3], 0.25), ([3, 1], 0.25), ([1, 2, 3, 4], 0.25), ([1, 1, 1, 97], 0.72)],
)
def test_gini_is_what_is_computed_by_hand(sizes: list[int], wanted: float) -> None:
    assert gini(sizes) == pytest.approx(wanted)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=12))
def test_gini_is_half_the_mean_difference_as_a_part_of_the_mean(sizes: list[int]) -> None:
    pairs = sum(abs(one - other) for one, other in itertools.product(sizes, sizes))
    assert gini(sizes) == pytest.approx(pairs / (2 * len(sizes) * sum(sizes)))


def test_effective_labels_and_distance_are_what_is_computed_by_hand() -> None:
    assert effective_labels(TABLE) == pytest.approx([1.0, 2.0, 1.0])
    assert effective_labels(np.array([[3, 1]])) == pytest.approx(
        [math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))]
    )
    assert distances(TABLE) == pytest.approx([0.625, 0.125, 0.375])  # the whole is 6 of 16 and 10 of 16


@given(TABLES)
def test_labels_are_from_one_to_all_and_distances_from_none_to_below_one(table: np.ndarray) -> None:
    assert (effective_labels(table) >= 1 - 1e-9).all()
    assert (effective_labels(table) <= table.shape[1] + 1e-9).all()
    assert (distances(table) >= 0).all()
    assert (distances(table) < 1).all()
    assert distances(table * 0 + table.sum(axis=0)) == pytest.approx(np.zeros(len(table)))


def test_a_summary_has_least_median_mean_and_most() -> None:
    found = statistics_of(TABLE, labelled=True)
    assert (found.shards, found.samples) == (3, 16)
    assert (found.sizes.least, found.sizes.median, found.sizes.mean, found.sizes.most) == (4, 4, 16 / 3, 8)
    assert found.labels is not None
    assert found.labels.median == pytest.approx(1.0)
    assert found.gini == pytest.approx(1 / 6)
    plain = statistics_of(TABLE, labelled=False)
    assert (plain.labels, plain.distance) == (None, None)


def test_a_histogram_names_the_most_frequent_and_counts_the_rest() -> None:
    assert histogram([1, 0, 9, 3], [0, 1, 2, 3], 9) == "2:9 3:3 0:1"
    assert histogram([1, 0, 9, 3], [0, 1, 2, 3], 1) == "2:9 +2 more"
    assert (rounded(0.123456), rounded(math.inf)) == (0.1235, math.inf)


# ---------------------------------------------------------------- the command


def partition(*arguments: str) -> Any:
    return CLI.invoke(app, ["partition", *arguments])


def test_what_is_shown_is_the_cut_that_the_job_will_have(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(TASK)
    (tmp_path / "job.toml").write_text(
        'task = "mine.py"\nseed = 5\n[data]\npartition = "natural"\nby = "users"\nshards = 3\n'
    )
    picture_file = tmp_path / "cut.svg"
    done = partition(str(tmp_path / "job.toml"), "--json", "--plot", str(picture_file))
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    users, classes = np.array([sample % 7 for sample in range(30)]), np.array([sample % 3 for sample in range(30)])
    wanted = order_of("natural", total=30, shards=3, seed=5, alpha=0.5, labels_per_shard=2, labels=users)
    shards = np.split(wanted.order, wanted.bounds[1:-1])
    assert [row["samples"] for row in found["shards"]] == [len(shard) for shard in shards]
    assert [row["labels"] for row in found["shards"]] == [
        {str(label): int(count) for label, count in enumerate(np.bincount(classes[shard])) if count} for shard in shards
    ]
    assert found["summary"]["samples"] == 30
    assert "mine: natural, by users, 3 shards, seed 5" in picture_file.read_text()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--set", "data.partition=local"], "partition = local is not cut"),
        (["--set", "data.shards=3", "--workers", "2"], "--workers 2 says nothing: data.shards = 3"),
        (["--plot", "cut.jpg"], "--plot cut.jpg is no picture"),
        (["--plot", "nowhere/cut.png"], "there is no folder nowhere"),
    ],
)
def test_what_cannot_be_shown_is_refused_before_any_data_is_read(
    given: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_described", None)
    done = partition("digits", *given)
    assert isinstance(done.exception, LydianError)
    assert sentence in str(done.exception)


def test_without_matplotlib_the_line_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LydianError, match="matplotlib, which is not installed") as refusal:
        picture.check_target(tmp_path / "cut.png")
    assert refusal.value.advice == "pip install 'matplotlib>=3.9'"


def test_what_the_task_says_is_said_again_with_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(TASK)
    done = partition(str(tmp_path / "mine.py"), "--set", "data.partition=natural", "--set", "data.by=writers")
    assert isinstance(done.exception, LydianError)
    assert str(done.exception) == (
        "the train split, a TensorDataset, has no attribute 'writers' with an id for each sample: "
        "set it in dataset(), or name another with [data] by"
    )


def test_a_fleet_that_would_decide_is_taken_for_as_many_workers_as_said(capsys: pytest.CaptureFixture[str]) -> None:
    def job(**data: Any) -> JobSpec:
        return JobSpec.model_validate({"task": "d", "data": data, "round": {"min_workers": 3}})

    assert shards_of(job(), None) == 3
    assert shards_of(job(partition="dirichlet"), 5) == 5
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("data.shards = auto: cut for 3 workers, of equal speed: its cut follows theirs;")
    assert said[1].startswith("data.shards = auto: cut for 5 workers;")
    assert shards_of(job(shards=9), None) == 9
    assert shards_of(job(partition="natural", by="users"), None) is None
    with pytest.raises(BadJobError, match="natural cuts by the ids"):
        shards_of(job(partition="natural", by="users"), 4)


def test_a_table_for_a_person_is_cut_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    table = np.ones((50, 1), np.int64)
    command.show(table, [0], statistics_of(table, labelled=False), labelled=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["SHARD", "SAMPLES"]
    assert lines[41] == "… and 10 more shards: --json has all of them"
    assert lines[42] == "50 samples in 50 shards"


# ---------------------------------------------------------------- the picture


@pytest.mark.parametrize(("shards", "classes"), [(3, 2), (3, 15), (60, 3), (5, 40)])
def test_the_same_cut_gives_the_same_picture(tmp_path: Path, shards: int, classes: int) -> None:
    table = np.arange(1, shards * classes + 1).reshape(shards, classes)
    drawn = [tmp_path / name for name in ("one.svg", "two.svg", "one.png")]
    for target in drawn:
        picture.draw(table, list(range(classes)), "a cut", target, labelled=True)
    assert drawn[0].read_bytes() == drawn[1].read_bytes()
    assert drawn[2].read_bytes().startswith(b"\x89PNG")
    picture.draw(table[:, :1], [0], "sizes", tmp_path / "plain.svg", labelled=False)
    assert ">class<" not in (tmp_path / "plain.svg").read_text()
