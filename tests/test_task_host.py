"""The child that trains: its pure parts in this process, its protocol in a real child that the tests share."""

import hashlib
import json
import os
import py_compile
import queue
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from common.messages import Progress
from worker import task_host
from worker.child import Child, TaskFailure, TaskStopped

STALL_S = 280.0  # a bound for a busy machine; nothing is asserted about it

SMALL_TASK = """
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

def model(config):
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))

class OneByOne(Dataset):
    def __init__(self, rows):
        self.rows = rows
    def __len__(self):
        return len(self.rows)
    def __getitem__(self, index):
        return self.rows[index]

def dataset(config, split):
    generator = torch.Generator().manual_seed({"train": 1, "test": 2}[split])
    x = torch.randn(61, 4, generator=generator)
    rows = TensorDataset(x, (x @ torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])).argmax(1))
    return OneByOne(rows) if config.get("one_by_one") else rows
"""


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Desk:
    """A child and a folder, with the commands that the tests give."""

    def __init__(self, child: Child, folder: Path) -> None:
        self.child = child
        self.folder = folder
        self.seen: list[Progress] = []
        self.when_seen: Callable[[Progress], None] = lambda _: None

    def _note(self, progress: Progress) -> None:
        self.seen.append(progress)
        self.when_seen(progress)

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        return self.child.ask({"do": do, **fields}, on_progress=self._note, stall_s=STALL_S)

    def open(self, source: str, **config: Any) -> None:
        file = self.folder / "my_task.py"
        file.write_text(source)
        self.ask("open", task=str(file), config={"lr": 0.1, "batch_size": 10, **config})

    def init(self, seed: int = 7, labels: Path | None = None) -> dict[str, Any]:
        return self.ask("init", seed=seed, out=str(self.path("base")), labels=None if labels is None else str(labels))

    def train(self, out: str = "out", *, indices: list[int] | None = None, **fields: Any) -> dict[str, Any]:
        rows = None
        if indices is not None:
            rows = str(self.folder / "rows.npy")
            np.save(rows, np.array(indices, dtype=np.int64))
        command = {"base": str(self.path("base")), "indices": rows, "out": str(self.path(out)), "seed": 5, "round": 1}
        return self.ask("train", **{**command, **fields})

    def evaluate(self, name: str = "base") -> dict[str, Any]:
        return self.ask("evaluate", base=str(self.path(name)), batch_size=16)

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    with Child.start(device="cpu", threads=1, log_path=tmp_path_factory.mktemp("child") / "child.log") as child:
        yield child


@pytest.fixture
def desk(child: Child, tmp_path: Path) -> Desk:
    return Desk(child, tmp_path)


# ---------------------------------------------------------------- which text is run

PLAIN = "def model(config): ...\ndef dataset(config, split): ...\n"


def test_a_compiled_copy_that_somebody_put_beside_a_task_file_is_not_run(desk: Desk) -> None:
    file, ran = desk.folder / "my_task.py", desk.folder / "ran"
    file.write_text(f"open({str(ran)!r}, 'w')\n" + PLAIN)
    planted = Path(py_compile.compile(str(file), doraise=True))
    about = file.stat()
    file.write_text("#" * (about.st_size - len(PLAIN) - 1) + "\n" + PLAIN)
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))  # of the time and size that the copy was made of
    assert planted.exists()
    assert file.stat().st_size == about.st_size
    desk.ask("open", task=str(file), config={}, allowed=hashlib.sha256(file.read_bytes()).hexdigest())
    assert not ran.exists()


def test_a_text_that_is_not_the_one_that_was_allowed_is_not_run(desk: Desk) -> None:
    file, ran = desk.folder / "my_task.py", desk.folder / "ran"
    file.write_text(f"open({str(ran)!r}, 'w')\n" + PLAIN)
    with pytest.raises(TaskFailure, match=r"my_task\.py is [0-9a-f]{12}… and not 000000000000…") as caught:
        desk.ask("open", task=str(file), config={}, allowed="0" * 64)
    assert caught.value.code == "not_trusted"
    assert not ran.exists()


# ---------------------------------------------------------------- order and batches


@given(st.integers(1, 300), st.integers(1, 70), st.booleans())
def test_batches_hold_every_sample_once_and_none_is_too_large(samples: int, batch_size: int, join: bool) -> None:
    ends = task_host.batch_ends(samples, batch_size, join_last_one=join)
    sizes = np.diff([0, *ends])
    assert ends[-1] == samples
    assert sizes.min() >= 1
    assert set(sizes[:-1].tolist()) <= {batch_size}
    assert sizes[-1] <= batch_size + (1 if join else 0)


@given(st.integers(2, 300), st.integers(2, 70))
def test_batchnorm_never_meets_a_last_batch_of_one(samples: int, batch_size: int) -> None:
    sizes = np.diff([0, *task_host.batch_ends(samples, batch_size, join_last_one=True)])
    assert sizes[-1] >= 2


@given(st.integers(0, 2**63 - 1), st.integers(0, 1000), st.integers(1, 200))
def test_a_pass_is_a_permutation_that_seed_and_number_alone_decide(seed: int, number: int, samples: int) -> None:
    shard = torch.arange(1000, 1000 + samples)
    torch.manual_seed(samples)  # the global generator must not matter
    order = task_host.pass_order(shard, seed, number)
    torch.manual_seed(samples + 1)
    assert torch.equal(order.sort().values, shard)
    assert torch.equal(order, task_host.pass_order(shard, seed, number))


def test_two_passes_have_different_orders() -> None:
    shard = torch.arange(100)
    assert not torch.equal(task_host.pass_order(shard, 3, 0), task_host.pass_order(shard, 3, 1))


TENSORS = {
    "float32": lambda n: torch.randn(n, 2, 3),
    "uint8": lambda n: torch.randint(0, 255, (n, 4), dtype=torch.uint8),
    "int64": lambda n: torch.arange(n),
    "windows": lambda n: torch.arange(n * 2 + 3).unfold(0, 4, 2)[:n],  # views that overlap
}


@given(st.data(), st.lists(st.sampled_from(sorted(TENSORS)), min_size=1, max_size=3), st.integers(1, 20))
def test_reading_rows_gives_what_the_default_collation_gives(data: st.DataObject, kinds: list[str], n: int) -> None:
    whole = TensorDataset(*(TENSORS[kind](n) for kind in kinds))
    indices = st.lists(st.integers(0, n - 1), min_size=1, max_size=2 * n)
    dataset: Subset[Any] | TensorDataset = Subset(whole, data.draw(indices)) if data.draw(st.booleans()) else whole
    parts = data.draw(st.lists(st.lists(st.integers(0, len(dataset) - 1), min_size=1, max_size=6), min_size=1))
    wanted = list(DataLoader(dataset, batch_sampler=parts))
    got = list(task_host.read_batches(dataset, list(map(torch.tensor, parts)), torch.device("cpu"), workers=0, seed=0))
    assert task_host.row_reader(dataset) is not None
    assert len(got) == len(wanted)
    for ours, theirs in zip(got, wanted, strict=True):
        assert type(ours) is type(theirs)
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_subclass_with_a_getitem_of_its_own_is_read_sample_by_sample() -> None:
    class Doubled(TensorDataset):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
            return tuple(2 * tensor[index] for tensor in self.tensors)

    parts = [torch.tensor([2, 0])]
    (batch,) = task_host.read_batches(Doubled(torch.arange(3)), parts, torch.device("cpu"), workers=0, seed=0)
    assert batch[0].tolist() == [4, 0]


def test_reading_leaves_the_global_generator_alone() -> None:
    class Plain(Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.tensor(index)

    before = torch.get_rng_state()
    list(task_host.read_batches(Plain(), [torch.arange(4)], torch.device("cpu"), workers=0, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


Pair = namedtuple("Pair", "left right")


def test_every_tensor_of_a_nested_batch_is_moved_and_the_rest_is_kept() -> None:
    one = torch.ones(1)
    moved = task_host.to_device({"a": [one, "word"], "b": Pair(one, (one, 3))}, torch.device("meta"))
    assert moved["a"][1] == "word"
    assert moved["b"].right[1] == 3
    assert {moved["a"][0].device.type, moved["b"].left.device.type, moved["b"].right[0].device.type} == {"meta"}
    assert isinstance(moved["b"], Pair)


# ---------------------------------------------------------------- labels


class Labelled(Dataset[Any]):
    def __init__(self, labels: list[Any]) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        raise AssertionError("the labels are known without looking at the samples")


class Unlabelled(Dataset[Any]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return 0, torch.tensor(index)


@pytest.mark.parametrize(
    ("dataset", "wanted"),
    [
        (TensorDataset(torch.zeros(3), torch.tensor([2, 0, 1])), [2, 0, 1]),
        (TensorDataset(torch.zeros(3), torch.tensor([2.0, 0.0, 1.0])), [2, 0, 1]),
        (Labelled([4, 5, 6]), [4, 5, 6]),
        (Subset(Labelled([4, 5, 6]), [2, 0]), [6, 4]),
        (Unlabelled(), [0, 1, 2]),
    ],
)
def test_labels_are_found_wherever_the_dataset_has_them(dataset: Any, wanted: list[int]) -> None:
    labels = task_host.label_array(dataset, lambda _: None)
    assert labels.dtype == np.int64
    assert labels.tolist() == wanted


@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(torch.zeros(3)),
        TensorDataset(torch.zeros(3), torch.tensor([0.5, 1.0, 2.0])),
        TensorDataset(torch.zeros(3), torch.zeros(3, 2, dtype=torch.int64)),
        Labelled(["cat", "dog"]),
    ],
)
def test_data_without_a_class_a_sample_cannot_be_cut_by_label(dataset: Any) -> None:
    with pytest.raises(task_host.TaskError, match="cannot be cut by label") as caught:
        task_host.label_array(dataset, lambda _: None)
    assert caught.value.code == "bad_task"


# ---------------------------------------------------------------- state


class Odd(nn.Module):
    """Everything that makes a state dict hard to write."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight  # tied
        self.norm = nn.BatchNorm1d(4)
        self.instance = nn.InstanceNorm1d(4, track_running_stats=True)
        self.bare = nn.BatchNorm1d(4, track_running_stats=False)
        self.scale = nn.Parameter(torch.tensor(3.0))  # 0-dim
        self.turned = nn.Parameter(torch.randn(3, 4).t())  # not contiguous
        self.frozen = nn.Parameter(torch.randn(2, dtype=torch.float16), requires_grad=False)
        shared = torch.randn(10)
        self.register_buffer("left", shared[:6])  # two views that overlap
        self.register_buffer("right", shared[4:])
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("empty_too", torch.zeros(0, 3))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("gone", torch.ones(2), persistent=False)


def metadata_of(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, "np") as file:
        metadata: dict[str, str] = file.metadata()
    return metadata


def test_an_odd_model_comes_back_bit_by_bit_and_still_tied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before, path = Odd(), tmp_path / "odd.safetensors"
    task_host.save_state(before, path)
    torch.manual_seed(1)
    after = Odd()
    task_host.load_state(after, path)
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor), name
    assert after.head.weight is after.embedding.weight
    assert not path.with_name(path.name + ".part").exists()


def test_the_file_says_what_averaging_must_know(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    task_host.save_state(Odd(), path)
    metadata = metadata_of(path)
    assert metadata.keys() == {"lydian"}
    facts = json.loads(metadata["lydian"])
    assert facts == {
        "aliases": {"head.weight": "embedding.weight"},
        "variances": {
            "instance.running_var": "instance.running_mean",
            "norm.running_var": "norm.running_mean",
        },
        "buffers": [
            "empty", "empty_too", "instance.running_mean", "instance.running_var", "left", "norm.running_mean",
            "norm.running_var", "right",
        ],
    }  # fmt: skip
    assert metadata["lydian"] == json.dumps(facts, sort_keys=True, separators=(",", ":"))
    arrays = safetensors.numpy.load_file(path)
    assert "head.weight" not in arrays
    assert arrays["scale"].shape == ()
    assert arrays["turned"].shape == (4, 3)


def test_equal_models_give_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.manual_seed(0)
        task_host.save_state(Odd(), tmp_path / name)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_a_batchnorm_at_the_top_has_its_variance_named(tmp_path: Path) -> None:
    _, layout = task_host.state_of(nn.BatchNorm1d(2))
    assert layout.variances == {"running_var": "running_mean"}


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Linear(3, 2), "'bias' is torch.float32 [2], not torch.float32 [4]"),
        (nn.Linear(3, 4, bias=False), "'bias' is missing"),
        (nn.BatchNorm1d(4), "'num_batches_tracked' is not in the model"),
        (nn.Linear(3, 4).half(), "'bias' is torch.float16 [4], not torch.float32 [4]"),
    ],
)
def test_a_base_of_another_model_is_refused_by_name(tmp_path: Path, model: nn.Module, words: str) -> None:
    task_host.save_state(model, tmp_path / "base")
    with pytest.raises(task_host.TaskError) as caught:
        task_host.load_state(nn.Linear(3, 4), tmp_path / "base")
    assert words in str(caught.value)


def test_a_lazy_layer_is_refused_with_the_way_out() -> None:
    with pytest.raises(task_host.TaskError, match=r"'weight' .* cannot travel.* one batch inside model"):
        task_host.state_of(nn.LazyLinear(3))


# ---------------------------------------------------------------- init, train, evaluate in a real child


def test_init_builds_the_same_model_from_the_same_seed_and_counts(desk: Desk) -> None:
    desk.open(SMALL_TASK)
    labels = desk.folder / "labels"  # numpy must not add a suffix
    facts = desk.init(7, labels)
    first = digest(desk.path("base"))
    assert facts == {"parameters": 4 * 8 + 8 + 8 * 3 + 3, "train_samples": 61, "test_samples": 61}
    assert np.load(labels, allow_pickle=False).shape == (61,)
    assert desk.ask("describe", labels=None) == {"train_samples": 61}
    desk.init(8)
    assert digest(desk.path("base")) != first
    desk.init(7)
    assert digest(desk.path("base")) == first


def test_the_same_command_gives_the_same_bytes_whatever_came_between(desk: Desk) -> None:
    desk.open(SMALL_TASK)
    desk.init()
    done = desk.train("first", indices=list(range(31)), epochs=2)
    desk.evaluate("first")
    desk.train("other", seed=6, epochs=1)
    desk.train("second", indices=list(range(31)), epochs=2)
    assert digest(desk.path("first")) == digest(desk.path("second"))
    assert digest(desk.path("first")) != digest(desk.path("other"))
    assert done["samples"] == 31
    assert done["steps"] == 8
    assert done["metrics"]["train_loss"][1] == 62


def test_tensors_in_memory_and_single_samples_train_to_the_same_bytes(desk: Desk) -> None:
    for name, config in {"rows": {}, "single": {"one_by_one": True}, "readers": {"one_by_one": True}}.items():
        desk.open(SMALL_TASK, **config, **({"loader_workers": 1} if name == "readers" else {}))
        desk.init()
        desk.train(name, epochs=2)
    assert digest(desk.path("rows")) == digest(desk.path("single")) == digest(desk.path("readers"))


@pytest.mark.parametrize(("length", "steps"), [({}, 7), ({"epochs": 3}, 21), ({"steps": 9}, 9), ({"steps": 2}, 2)])
def test_a_round_is_as_long_as_the_job_says(desk: Desk, length: dict[str, Any], steps: int) -> None:
    desk.open(SMALL_TASK)
    desk.init()
    assert desk.train(**length)["steps"] == steps


def test_a_round_of_seconds_ends_by_the_clock_after_one_step_at_least(desk: Desk) -> None:
    desk.open(SMALL_TASK)
    desk.init()
    assert desk.train(seconds=1e-6)["steps"] >= 1
    done = desk.train(seconds=0.3)
    assert done["steps"] > 7  # more than one pass
    assert 0.3 <= done["seconds"] < 3


def test_training_learns_and_evaluation_gives_sums_over_the_whole_test_split(desk: Desk) -> None:
    desk.open(SMALL_TASK)
    desk.init()
    before = desk.evaluate("base")
    desk.train(epochs=10)
    after = desk.evaluate("out")
    assert before["samples"] == before["metrics"]["accuracy"][1] == before["metrics"]["loss"][1] == 61
    assert after["metrics"]["accuracy"][0] > before["metrics"]["accuracy"][0]
    assert after["metrics"]["loss"][0] < before["metrics"]["loss"][0]


def test_the_small_tail_of_a_shard_does_not_stop_batchnorm(desk: Desk) -> None:
    desk.open(SMALL_TASK.replace("nn.ReLU()", "nn.BatchNorm1d(8)"), batch_size=10)
    desk.init()
    assert desk.train(indices=list(range(21)))["steps"] == 2  # 10 and 11


def test_progress_names_each_stage_and_is_not_a_flood(desk: Desk) -> None:
    desk.open(SMALL_TASK)
    desk.init()
    desk.seen.clear()
    done = desk.train(seconds=0.45)
    stages = list(dict.fromkeys(progress.doing for progress in desk.seen))
    assert stages == ["loading", "training"]
    assert len(desk.seen) <= 3 + done["seconds"] / task_host.PROGRESS_EVERY_S
    last = desk.seen[-1]
    assert last.steps is None
    assert last.step > 0
    assert last.samples_per_s is not None
    assert last.loss is not None
    desk.evaluate()
    assert desk.seen[-1].doing == "evaluating"


# ---------------------------------------------------------------- the task's own functions

OWN_LOOP = (
    SMALL_TASK
    + """
def train(model, loader, context):
    seen = 0
    while not context.done:
        for batch in loader:
            loss = torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
            context.optimizer.zero_grad()
            loss.backward()
            context.optimizer.step()
            more = context.step(loss)
            seen += 1
    assert not more
    assert context.round == 1 and context.seed == 5 and context.device.type == "cpu"
    assert len(loader) == 7
"""
)


@pytest.mark.parametrize("length", [{"epochs": 2}, {"steps": 10}, {"steps": 3}])
def test_an_own_loop_written_like_the_default_one_gives_the_same_bytes(desk: Desk, length: dict[str, Any]) -> None:
    desk.open(SMALL_TASK)
    desk.init()
    wanted = desk.train("default", **length)
    desk.open(OWN_LOOP)
    got = desk.train("own", **length)
    assert digest(desk.path("own")) == digest(desk.path("default"))
    assert (got["steps"], got["metrics"]) == (wanted["steps"], wanted["metrics"])


# ---------------------------------------------------------------- the default optimiser and its schedule

BY_HAND = (
    SMALL_TASK
    + """
def optimizer(model, config):
    return torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.8, 0.9), weight_decay=0.3)

def train(model, loader, context):
    while not context.done:
        for x, y in loader:
            loss = nn.functional.cross_entropy(model(x), y)
            context.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.2)
            for group in context.optimizer.param_groups:
                group["lr"] = 0.01 * context.lr_factor
            context.optimizer.step()
            print("at", context.global_step, flush=True)
            context.step(loss)
"""
)
ADAMW = {"optimizer": "adamw", "lr": 0.01, "beta1": 0.8, "beta2": 0.9, "weight_decay": 0.3, "clip": 0.2}


@pytest.mark.parametrize("schedule", [{}, {"warmup_steps": 13}, {"schedule": "cosine"}])
def test_adamw_clip_and_schedule_give_the_bytes_of_a_loop_that_does_the_same_by_hand(
    desk: Desk, schedule: dict[str, Any]
) -> None:
    length = {"steps": 9, "total_steps": 36, "round": 2}
    desk.open(SMALL_TASK, **ADAMW, **schedule)
    desk.init()
    desk.train("default", **length)
    desk.open(BY_HAND, **schedule)
    desk.train("by_hand", **length)
    assert digest(desk.path("by_hand")) == digest(desk.path("default"))
    desk.open(SMALL_TASK, **{**ADAMW, "clip": 1e9}, **schedule)
    desk.train("unclipped", **length)
    assert digest(desk.path("unclipped")) != digest(desk.path("default"))


SCHEDULES = [{"warmup_steps": 13}, {"schedule": "cosine"}, {"schedule": "linear"},
             {"schedule": "step", "milestones": [12], "gamma": 0.5}]  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_follows_the_step_of_the_whole_job_and_not_that_of_the_round(
    desk: Desk, schedule: dict[str, Any]
) -> None:
    desk.open(SMALL_TASK, **schedule)
    desk.init()
    outs = []
    for round_index in (1, 2):
        desk.train("out", steps=9, total_steps=18, round=round_index)
        outs.append(digest(desk.path("out")))
    assert outs[0] != outs[1]  # the same base, seed and samples


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_epochs_of_a_known_cut_are_scheduled_as_the_same_number_of_steps(desk: Desk, schedule: dict[str, Any]) -> None:
    desk.open(SMALL_TASK, **schedule)
    desk.init()
    desk.train("steps", indices=list(range(40)), steps=8, total_steps=24, round=2)
    length = {"epochs": 2, "job_rounds": 3, "round": 2}
    desk.train("epochs", indices=list(range(40)), largest_shard=40, **length)
    assert digest(desk.path("epochs")) == digest(desk.path("steps"))
    desk.train("smaller", indices=list(range(40)), largest_shard=41, **length)  # the largest takes a step more
    assert digest(desk.path("smaller")) != digest(desk.path("steps"))


def test_without_a_schedule_a_loop_learns_that_the_factor_is_one(desk: Desk) -> None:
    desk.open(OWN_LOOP.replace("seen += 1", "assert context.lr_factor == 1 and context.global_step is None; seen += 1"))
    desk.init()
    desk.train("own")


# ---------------------------------------------------------------- ids, classes, own test data

OWN_DATA = """
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

def model(config):
    return nn.Linear(4, 3)

def dataset(config, split):
    if split not in config["sizes"]:
        return None
    rows = config["sizes"][split]
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows))
    whole = TensorDataset(x, torch.arange(rows) % 3)
    whole.users = config.get("users")
    return Subset(whole, list(range(rows))[::-1])
"""


@pytest.mark.parametrize(
    ("users", "wanted"),
    [(["b", "a", "c", "a"], [0, 2, 0, 1]), ([30, -2, 7, -2], [0, 1, 0, 2]), ([True, False, True, True], [1, 1, 0, 1])],
)
def test_ids_are_numbered_in_their_order_also_through_a_subset(desk: Desk, users: list[Any], wanted: list[int]) -> None:
    desk.open(OWN_DATA, sizes={"train": 4}, users=users)
    out = desk.folder / "ids.npy"
    assert desk.ask("describe", labels=str(out), by="users")["train_samples"] == 4
    assert np.load(out).tolist() == wanted
    assert np.load(out).dtype == np.int64


@pytest.mark.parametrize("users", [None, ["a"], [0.5, 1, 2, 3], [["a"], ["b"], ["c"], ["d"]]])
def test_what_is_no_id_for_each_sample_is_refused_with_its_shape(users: Any) -> None:
    rows = TensorDataset(torch.zeros(4, 1))
    rows.users = users
    with pytest.raises(
        task_host.TaskError, match=r"'users' of the train split has \w+ of shape \[.*\], where a whole "
    ):
        task_host.id_array(rows, "users")


def test_accuracies_of_classes_add_up_to_the_accuracy(desk: Desk) -> None:
    desk.open(OWN_DATA, sizes={"train": 4, "test": 50})
    desk.init()
    metrics = desk.ask("evaluate", base=str(desk.path("base")), batch_size=16, per_class=True)["metrics"]
    classes = [metrics[f"accuracy/{number}"] for number in range(3)]
    assert [count for _, count in classes] == [17, 17, 16]
    assert [sum(column) for column in zip(*classes, strict=True)] == metrics["accuracy"]
    assert desk.evaluate()["metrics"].keys() == {"accuracy", "loss"}


@pytest.mark.parametrize("hook", ["metrics", "loss"])
def test_classes_of_a_task_with_its_own_measure_are_refused_when_the_model_is_built(desk: Desk, hook: str) -> None:
    desk.open(OWN_DATA + f"def {hook}(model, batch, config): ...", sizes={"train": 4})
    with pytest.raises(TaskFailure, match=rf"and my_task.py has its own {hook}\(\): return accuracy/0") as failure:
        desk.ask("init", seed=1, out=str(desk.path("base")), labels=None, per_class=True)
    assert failure.value.code == "bad_task"


def test_the_classes_beyond_those_with_a_name_are_one() -> None:
    wanted = torch.tensor([[0, 2, 2], [90, 95, -100]])
    right = torch.tensor([[True, False, True], [True, False, False]])
    found = task_host.task_classes.accuracies(wanted, right)
    assert found == {"accuracy/0": (1.0, 1.0), "accuracy/2": (1.0, 2.0), "accuracy/rest": (1.0, 2.0)}
    everything = task_host.task_classes.accuracies(torch.arange(1000), torch.ones(1000, dtype=torch.bool))
    assert len(everything) == 91  # with accuracy and loss, and some of the task's own, a message takes them
    assert (
        task_host.task_classes.accuracies(torch.tensor([], dtype=torch.int64), torch.tensor([], dtype=torch.bool)) == {}
    )


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [({"train": 4, "test": 9, "local-test": 5}, 5), ({"train": 4, "test": 9}, 9), ({"train": 4}, 0)],
)
def test_a_worker_measures_on_the_first_of_its_own_splits_or_on_nothing(
    desk: Desk, sizes: dict[str, int], wanted: int
) -> None:
    desk.open(OWN_DATA, sizes=sizes)
    splits = ["local-test", "test"]
    facts = desk.ask("init", seed=1, out=str(desk.path("base")), labels=None, splits=splits)
    got = desk.ask("evaluate", base=str(desk.path("base")), batch_size=16, splits=splits)
    assert (facts["test_samples"], got["samples"], bool(got["metrics"])) == (wanted, wanted, wanted > 0)


def test_a_job_of_shared_data_that_wants_own_test_data_needs_that_split(desk: Desk) -> None:
    desk.open(OWN_DATA, sizes={"train": 4, "test": 9})
    with pytest.raises(TaskFailure, match="'local-test'\\) gives none: define that split, or have private data"):
        desk.ask("init", seed=1, out=str(desk.path("base")), labels=None, splits=["local-test"])


def test_own_loss_metrics_and_optimizer_are_used(desk: Desk) -> None:
    desk.open(
        SMALL_TASK
        + """
def loss(model, batch, config):
    return model(batch[0]).square().mean()

def optimizer(model, config):
    return torch.optim.SGD(model.parameters(), lr=0.0)

def metrics(model, batch, config):
    assert not model.training and not torch.is_grad_enabled()
    return {"seen": (torch.tensor(float(len(batch[0]))), 1), "broken": (float("nan"), 1)}
"""
    )
    desk.init()
    desk.train()
    assert digest(desk.path("out")) == digest(desk.path("base"))  # lr is 0
    assert desk.evaluate()["metrics"] == {"seen": [61.0, 4.0]}  # what is not finite is left out


def test_an_own_loss_without_metrics_is_all_that_is_measured(desk: Desk) -> None:
    desk.open(SMALL_TASK + "\ndef loss(model, batch, config):\n    return model(batch[0]).square().mean() * 0 + 2\n")
    desk.init()
    assert desk.evaluate()["metrics"] == {"loss": [122.0, 61.0]}


def test_a_loss_that_is_not_finite_is_shown_as_none_and_is_no_error(desk: Desk) -> None:
    desk.open(SMALL_TASK + "\ndef loss(model, batch, config):\n    return model(batch[0]).sum() * float('nan')\n")
    desk.init()
    desk.seen.clear()
    assert desk.train(seconds=0.3)["metrics"] == {}
    assert desk.seen[-1].step > 0
    assert desk.seen[-1].loss is None


def test_a_file_beside_the_task_can_be_imported_even_under_a_name_of_ours(desk: Desk) -> None:
    (desk.folder / "common").mkdir()
    (desk.folder / "common" / "__init__.py").write_text("WIDTH = 8\n")
    desk.open("import common\nassert common.WIDTH == 8\n" + SMALL_TASK)
    with pytest.raises(TaskFailure, match="No module named 'worker'"):
        desk.open("import worker.child\n" + SMALL_TASK)
    assert not list(desk.folder.glob("__pycache__"))


def test_prints_and_input_of_a_task_stay_out_of_the_protocol(desk: Desk) -> None:
    noise = """
import os, sys
print('{"event": "done"}')
os.write(1, b'{"event": "error"}\\n')
print("to stderr", file=sys.stderr)
assert sys.stdin.read() == ""
"""
    desk.open(noise + SMALL_TASK)
    assert desk.init()["train_samples"] == 61
    log = desk.child.log_path.read_text()
    assert '{"event": "done"}' in log
    assert '{"event": "error"}' in log
    assert "to stderr" in log


# ---------------------------------------------------------------- what goes wrong, in words


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("def model(config)\n    pass\n", "SyntaxError in my_task.py, line 1: expected ':'"),
        ("\nimport no_such_package\n", "ModuleNotFoundError in my_task.py, line 2: No module named 'no_such_package'"),
        ("def model(config): ...\n", "my_task.py does not define dataset(config, split)"),
        ("model = 3\n", "my_task.py does not define model(config) and dataset(config, split)"),
        ("import sys\nsys.exit(3)\n", "SystemExit in my_task.py, line 2: 3"),
    ],
)
def test_a_file_that_is_no_task_is_refused_in_one_sentence(desk: Desk, source: str, sentence: str) -> None:
    with pytest.raises(TaskFailure) as caught:
        desk.open(source)
    assert (caught.value.code, str(caught.value)) == ("bad_task", sentence)


BROKEN = {
    "raises": (
        "def train(model, loader, context):\n    raise ValueError('wrong\\nin many lines')\n",
        "task_failed",
        "ValueError in train(): wrong (my_task.py, line 2)",
    ),
    "leaves": (
        "def train(model, loader, context):\n    raise SystemExit('enough')\n",
        "task_failed",
        "SystemExit in train(): enough (my_task.py, line 2)",
    ),
    "fails inside": (
        "def loss(model, batch, config):\n    return helper()\ndef helper():\n    return [][1]\n",
        "task_failed",
        "IndexError in helper(): list index out of range (my_task.py, line 4)",
    ),
    "no memory": (
        "def train(model, loader, context):\n    raise MemoryError('too much')\n",
        "out_of_memory",
        "out of memory in train() at batch_size 10: too much; lower train.batch_size or use a smaller model",
    ),
    "no memory for torch": (
        "import torch\ndef train(model, loader, context):\n    torch.empty(2**50)\n",
        "out_of_memory",
        "out of memory in train() at batch_size 10: [enforce fail",
    ),
    "never steps": (
        "def train(model, loader, context):\n    pass\n",
        "task_failed",
        "train() returned and never called context.step(loss) after a step",
    ),
}


@pytest.mark.parametrize("kind", sorted(BROKEN))
def test_an_error_of_the_task_is_told_in_one_sentence_and_the_child_lives_on(desk: Desk, kind: str) -> None:
    code_of_task, code, sentence = BROKEN[kind]
    desk.open(SMALL_TASK)
    desk.init()
    desk.open(code_of_task + SMALL_TASK)
    with pytest.raises(TaskFailure) as caught:
        desk.train()
    assert caught.value.code == code
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)
    if kind == "raises":
        assert "Traceback (most recent call last)" in caught.value.detail
        assert "in many lines" in caught.value.detail
    assert desk.child.alive
    desk.open(SMALL_TASK)
    assert desk.train()["steps"] == 7


@pytest.mark.parametrize(
    ("body", "code", "sentence"),
    [
        ("raise FileNotFoundError('digits are not here: put them there')", "no_data", "digits are not here: put them"),
        ("open('/no/such/file')", "no_data", "FileNotFoundError in dataset(): [Errno 2] No such file"),
        ("raise KeyError('trian')", "task_failed", "KeyError in dataset(): 'trian' (my_task.py"),
        ("return None", "bad_task", "dataset(config, 'train') gives no dataset"),
        ("return iter(())", "bad_task", "dataset(config, 'train') gives a tuple_iterator, not a map-style Dataset"),
    ],
)
def test_what_is_wrong_with_the_data_is_told(desk: Desk, body: str, code: str, sentence: str) -> None:
    desk.open(f"import torch\ndef model(config): return torch.nn.Linear(1, 1)\ndef dataset(config, split): {body}\n")
    with pytest.raises(TaskFailure) as caught:
        desk.init()
    assert caught.value.code == code
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize("body", ["return None", "raise NotImplementedError", "return {}[split]"])
def test_a_task_without_a_test_split_counts_none(desk: Desk, body: str) -> None:
    desk.open(SMALL_TASK.replace("    generator =", f"    if split == 'test':\n        {body}\n    generator ="))
    assert desk.init()["test_samples"] == 0
    with pytest.raises(TaskFailure, match="nothing to evaluate on"):
        desk.evaluate()


def test_a_mistake_in_the_test_split_does_not_pass_for_a_missing_one(desk: Desk) -> None:
    mistake = "    if split == 'test':\n        return {}['tset']\n    generator ="
    desk.open(SMALL_TASK.replace("    generator =", mistake))
    with pytest.raises(TaskFailure, match=r"KeyError in dataset\(\): 'tset'"):
        desk.init()


def test_a_shard_beyond_the_data_of_this_machine_is_refused(desk: Desk) -> None:
    desk.open(SMALL_TASK)
    desk.init()
    with pytest.raises(TaskFailure, match="samples 3 to 61, but the train split has only 61 on this machine"):
        desk.train(indices=[3, 61])
    with pytest.raises(TaskFailure, match="the shard is empty"):
        desk.train(indices=[])


def test_a_model_that_is_no_module_is_refused(desk: Desk) -> None:
    desk.open(SMALL_TASK + "\ndef model(config):\n    return 3\n")
    with pytest.raises(TaskFailure, match=r"model\(config\) gives a int"):
        desk.init()


def test_a_batch_that_the_default_loss_does_not_know_asks_for_an_own_loss(desk: Desk) -> None:
    desk.open(SMALL_TASK)
    desk.init()
    desk.open(SMALL_TASK + "\ndef dataset(config, split):\n    return TensorDataset(torch.zeros(9, 4))\n")
    with pytest.raises(TaskFailure, match=r"define loss\(model, batch, config\)") as caught:
        desk.train()
    assert caught.value.code == "bad_task"


def test_a_command_that_is_unknown_or_malformed_is_the_workers_error(desk: Desk) -> None:
    desk.open(SMALL_TASK)
    for do, fields in {"dance": {}, "train": {"speed": 3}}.items():
        with pytest.raises(TaskFailure) as caught:
            desk.ask(do, **fields)
        assert caught.value.code == "worker_error"


def test_a_file_that_cannot_be_written_is_told(desk: Desk) -> None:
    desk.open(SMALL_TASK)
    with pytest.raises(TaskFailure) as caught:
        desk.ask("init", seed=1, out=str(desk.folder / "no" / "folder" / "x"), labels=None)
    assert caught.value.code == "worker_error"


# ---------------------------------------------------------------- stopping

PATIENT = (
    SMALL_TASK
    + """
def train(model, loader, context):
    while True:
        try:
            for batch in loader:
                context.step(1.0)
        except Exception:
            pass  # a loop that swallows everything must still be stoppable
"""
)


def test_a_stop_ends_the_command_under_way_and_only_that(desk: Desk) -> None:
    desk.open(SMALL_TASK)
    desk.init()
    desk.open(PATIENT)
    desk.when_seen = lambda progress: desk.child.stop() if progress.step else None
    with pytest.raises(TaskStopped):
        desk.train(seconds=1e9)
    desk.when_seen = lambda _: None
    desk.child.stop()  # nothing is under way
    desk.open(SMALL_TASK)
    assert desk.train()["steps"] == 7


@settings(max_examples=30)
@given(st.lists(st.sampled_from(["train", "stop"]), max_size=12))
def test_a_stop_never_reaches_the_command_after_it(lines: list[str]) -> None:
    stopping = threading.Event()
    commands: queue.Queue[dict[str, Any]] = queue.Queue()
    for do in lines:
        task_host.take_command({"do": do}, commands, stopping)
    assert stopping.is_set() == (lines[-1:] == ["stop"])
    assert commands.qsize() == lines.count("train")


# ---------------------------------------------------------------- lines on stdin


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none()), st.text(), st.sampled_from(["", " ", "\r"]))
def test_a_command_is_read_as_it_was_sent(fields: dict[str, Any], do: str, space: str) -> None:
    command = {**fields, "do": do}
    assert task_host.command_in(f"{space}{json.dumps(command)}{space}\n".encode()) == command


@given(st.text(alphabet=" \t\r\f\v", max_size=5))
def test_an_empty_line_is_never_a_command(space: str) -> None:
    assert task_host.command_in(f"{space}\n".encode()) is None


@pytest.mark.parametrize(
    "line",
    [b"{", b"stop", b"\xff\xfe", b"3", b"null", b'["do"]', b"{}", b'{"do": null}', b'{"do": ["stop"]}', b"[" * 99_999],
)
def test_a_line_that_is_no_command_is_told_apart(line: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        task_host.command_in(line + b"\n")


@given(st.binary(max_size=60))
def test_no_line_ever_kills_the_reader_in_another_way(line: bytes) -> None:
    try:
        command = task_host.command_in(line)
    except ValueError:
        return
    assert command is None or isinstance(command["do"], str)


def test_an_empty_line_between_commands_is_ignored(desk: Desk) -> None:
    stdin = desk.child._process.stdin
    assert stdin is not None
    stdin.write(b"\n \r\n")
    desk.open(SMALL_TASK)
    stdin.write(b"\n")
    assert desk.init()["train_samples"] == 61
    assert "Exception in thread" not in desk.child.log_path.read_text()
