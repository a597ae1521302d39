"""A train command that is broken off and given again ends with the very bytes of one that was left alone."""

import gc
import hashlib
import io
import json
import random
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from common.messages import Progress
from tests import loops
from worker import task_device
from worker.child import Child, TaskStopped
from worker.task_batches import Stepper
from worker.task_checkpoint import Checkpoint, UnkeepableError, generators, pack, set_generators, unpack
from worker.task_host import Context, Events, Host

CPU = torch.device("cpu")
SAMPLES, BATCHES = 37, 8  # of one pass, with batches of five

TASK = '''
import random
import numpy as np, torch
from torch import nn

def model(config):
    net = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4),
        nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3),
    )
    net[5].weight = net[4].weight  # tied
    return net

class Noisy(torch.utils.data.Dataset):
    """Draws from every generator when a sample is read, as augmentation does."""
    def __len__(self):
        return 37
    def __getitem__(self, i):
        x = torch.arange(4.0) * (i % 5) + torch.randn(4) + float(np.random.randn()) + random.gauss(0, 1)
        return x, i % 3

def dataset(config, split):
    return Noisy() if split == "train" else None
'''

OPTIMIZERS = {
    "default": "",  # SGD from the configuration, with momentum
    "scheduled": "",
    "nesterov": "torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)",
    "adam": "torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.8, 0.99), amsgrad=True)",
    "groups": "torch.optim.Adam([{'params': list(model.parameters())[:2], 'lr': 0.1}, "
    "{'params': list(model.parameters())[2:], 'lr': 0.001, 'betas': (0.7, 0.9)}])",
}

CONFIGURED = {
    "scheduled": {"optimizer": "adamw", "lr": 0.01, "clip": 0.5, "schedule": "cosine", "warmup_steps": 5},
}


def with_optimizer(kind: str) -> str:
    made = OPTIMIZERS[kind]
    return TASK + (f"\ndef optimizer(model, config):\n    return {made}\n" if made else "")


pytestmark = pytest.mark.usefixtures("one_thread")


class Killed(BaseException):
    """The process ends here, as by kill -9: nobody tidies up."""


class Bench:
    """Hosts that train one command, one life after another."""

    def __init__(self, folder: Path, source: str = TASK, **config: Any) -> None:
        self.folder = folder
        self.task = folder / "task.py"
        self.task.write_text(source)
        self.config = {"batch_size": 5, "lr": 0.05, "momentum": 0.9, **config}
        self.base, self.out, self.kept = folder / "base.safetensors", folder / "out", folder / "checkpoint"
        self.stopping = threading.Event()
        done = self.host().init(seed=7, out=str(self.base), labels=None)
        assert done["train_samples"] == SAMPLES

    def host(self) -> Host:
        host = Host(CPU, Events(io.BytesIO()), self.stopping)
        host.open(task=str(self.task), config=dict(self.config))
        return host

    def command(self, **fields: Any) -> dict[str, Any]:
        length = {} if fields.keys() & {"steps", "seconds"} else {"epochs": 2}
        kept = {"checkpoint": str(self.kept), "checkpoint_every_s": 0.0, "base_digest": "b"}
        ways = {"base": str(self.base), "indices": None, "out": str(self.out), "seed": 11, "round": 1}
        return {"do": "train", **ways, **length, **kept, **fields}

    def answer(self, host: Host | None = None, **fields: Any) -> dict[str, Any]:
        """One life, from another state of the generators than any before; after every step a checkpoint."""
        answer = (host or self.host()).answer(self.command(**fields))
        assert not self.kept.with_name("checkpoint.part").exists()
        return answer

    def train(self, **fields: Any) -> tuple[dict[str, Any], bytes]:
        done = self.answer(**fields)
        assert done.pop("event") == "done", done
        return done, self.out.read_bytes()

    def undisturbed(self, **fields: Any) -> tuple[dict[str, Any], bytes]:
        return self.train(**{"checkpoint": None, **fields})

    def killed(self, at: int, *, kept: int | None = None, batches_later: int = 0, **fields: Any) -> None:
        """A life that ends between two steps, `at` or more of them done; a checkpoint at `kept` (None: at each)."""
        real, left = Context.wants_more, iter(range(batches_later))

        def wants_more(context: Context) -> bool:
            keep, wanted = context._keep, kept is None or context._taken == kept
            context._keep = keep if wanted else None
            more = real(context)
            context._keep = keep
            if context._taken >= at and next(left, None) is None:
                raise Killed
            return more

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Context, "wants_more", wants_more)
            with pytest.raises(Killed):
                self.train(**fields)


def counts(done: dict[str, Any]) -> dict[str, Any]:
    return {name: done[name] for name in ("samples", "steps", "metrics")}


# ---------------------------------------------------------------- the same bytes


@pytest.mark.parametrize(
    "schedule", [{"schedule": "linear"}, {"schedule": "step", "milestones": [9, 20], "gamma": 0.3, "warmup_steps": 3}]
)
def test_a_schedule_that_counts_passes_goes_on_after_a_kill_where_it_was(
    tmp_path: Path, schedule: dict[str, Any]
) -> None:
    bench = Bench(tmp_path, **schedule)
    length = {"epochs": 2, "job_rounds": 3, "largest_shard": SAMPLES, "round": 2}
    wanted, update = bench.undisturbed(**length)
    bench.killed(BATCHES + 1, **length)
    done, again = bench.train(**length)
    assert again == update
    assert done["resumed_at"] > 0
    assert counts(done) == counts(wanted)


Cases = dict[tuple[str, str], tuple[Bench, dict[str, Any], bytes]]
LENGTHS: dict[str, dict[str, Any]] = {"epochs": {"epochs": 2}, "steps": {"steps": 16, "total_steps": 20}}
STEPS = 16


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """(optimiser, length) -> what trains it, and what comes of it undisturbed."""
    found: Cases = {}
    for kind in OPTIMIZERS:
        bench = Bench(tmp_path_factory.mktemp(kind), with_optimizer(kind), **CONFIGURED.get(kind, {}))
        for name, length in LENGTHS.items():
            done, update = bench.undisturbed(**length)
            assert (done["steps"], done["resumed_at"]) == (STEPS, 0)
            found[kind, name] = bench, done, update
    return found


@given(
    kind=st.sampled_from(sorted(OPTIMIZERS)),
    length=st.sampled_from(sorted(LENGTHS)),
    lives=st.lists(st.tuples(st.integers(1, STEPS - 1), st.integers(0, STEPS - 1)), min_size=1, max_size=3),
)
@example(kind="adam", length="epochs", lives=[(BATCHES, BATCHES)])  # between two passes
@example(kind="default", length="steps", lives=[(BATCHES - 1, BATCHES), (BATCHES + 1, STEPS - 1)])
@settings(deadline=None, max_examples=20)
def test_a_command_killed_at_any_steps_always_ends_with_the_bytes_of_one_that_was_left_alone(
    cases: Cases, kind: str, length: str, lives: list[tuple[int, int]]
) -> None:
    bench, truth, update = cases[kind, length]
    bench.kept.unlink(missing_ok=True)
    resumed_at = 0
    for kept, at in lives:
        bench.killed(at, kept=kept, **LENGTHS[length])
        if resumed_at <= kept <= max(at, resumed_at):
            resumed_at = kept
    done, resumed = bench.train(**LENGTHS[length])
    assert done["resumed_at"] == resumed_at
    assert resumed == update
    assert counts(done) == counts(truth)
    assert not bench.kept.exists(), "a checkpoint outlived its command"


# ---------------------------------------------------------------- the optimiser's state of the round before


def going_on(bench: Bench) -> dict[str, Any]:
    """Round 2, which begins with the state that round 1 left."""
    first, second = str(bench.folder / "after 1"), str(bench.folder / "after 2")
    return {"round": 2, "optimizer": second, "optimizer_from": first, "optimizer_of": 1}


@pytest.fixture(scope="module")
def rounds_of_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Bench, bytes, bytes]]:
    """optimiser -> what trains it, and the update and the state that come of the second round undisturbed."""
    found = {}
    for kind in OPTIMIZERS:
        bench = Bench(tmp_path_factory.mktemp(kind), with_optimizer(kind), **CONFIGURED.get(kind, {}))
        command = going_on(bench)
        done, _ = bench.undisturbed(**LENGTHS["steps"], optimizer=command["optimizer_from"])
        assert done["metrics"]["fresh_optimizer"] == [1, 1]
        done, update = bench.undisturbed(**LENGTHS["steps"], **command)
        assert done["metrics"]["fresh_optimizer"] == [0, 1]
        assert update != bench.undisturbed(**LENGTHS["steps"], round=2)[1], "the state changed nothing"
        found[kind] = bench, update, Path(command["optimizer"]).read_bytes()
    return found


@given(
    kind=st.sampled_from(sorted(OPTIMIZERS)),
    lives=st.lists(st.tuples(st.integers(1, STEPS - 1), st.integers(0, STEPS - 1)), min_size=1, max_size=3),
)
@settings(deadline=None, max_examples=15)
def test_a_round_that_begins_with_a_kept_state_and_is_killed_at_any_steps_always_ends_with_the_same_bytes(
    rounds_of_two: dict[str, tuple[Bench, bytes, bytes]], kind: str, lives: list[tuple[int, int]]
) -> None:
    bench, update, state = rounds_of_two[kind]
    command = going_on(bench)
    for path in (bench.kept, Path(command["optimizer"])):
        path.unlink(missing_ok=True)
    for kept, at in lives:
        bench.killed(at, kept=kept, **LENGTHS["steps"], **command)
    done, resumed = bench.train(**LENGTHS["steps"], **command)
    assert (resumed, Path(command["optimizer"]).read_bytes()) == (update, state)
    assert done["metrics"]["fresh_optimizer"] == [0, 1]


def damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


UNUSABLE: dict[str, tuple[Callable[[Bench, Path], object], dict[str, Any], str]] = {
    "missing": (lambda _, path: path.unlink(), {}, "No such file"),
    "damaged": (lambda _, path: damaged(path), {}, "damaged"),
    "empty": (lambda _, path: path.write_bytes(b""), {}, "damaged"),
    "of another round": (lambda *_: None, {"optimizer_of": 3}, "of round 1, not of round 3"),
    "of another optimiser": (
        lambda bench, _: bench.task.write_text(with_optimizer("adam")), {}, "of another optimiser or model",
    ),
    "of another model": (
        lambda bench, _: bench.task.write_text(TASK.replace("nn.Linear(8, 3)", "nn.Linear(8, 3, bias=False)")),
        {}, "of another optimiser or model",
    ),
    "of other groups": (
        lambda bench, _: bench.task.write_text(
            TASK + "\ndef optimizer(model, config):\n    return torch.optim.SGD(list(model.parameters())[:2], lr=0.1)"
        ),
        {}, "cannot be put back: ValueError",
    ),
}  # fmt: skip


@pytest.mark.parametrize("harm", UNUSABLE)
def test_without_the_state_of_the_round_before_training_begins_fresh_and_says_so(
    tmp_path: Path, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(tmp_path)
    command = going_on(bench)
    bench.undisturbed(optimizer=command["optimizer_from"])
    spoil, changed, why = UNUSABLE[harm]
    spoil(bench, Path(command["optimizer_from"]))
    bench.host().init(seed=7, out=str(bench.base), labels=None)
    done, update = bench.train(**{**command, **changed})
    assert done["metrics"]["fresh_optimizer"] == [1, 1]
    assert update == bench.undisturbed(round=2)[1]
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("optimizer: ")]
    assert why in said
    assert Path(command["optimizer"]).exists()


def test_a_state_that_cannot_be_written_costs_one_line_and_no_old_one_is_taken_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(tmp_path)
    state = tmp_path / "state"
    truth = bench.undisturbed(optimizer=str(state))[1]
    state.with_name("state.part").symlink_to("/dev/full")
    done, update = bench.undisturbed(optimizer=str(state))
    assert (update, done["metrics"]["fresh_optimizer"]) == (truth, [1, 1])
    assert "its state is not kept" in capsys.readouterr().err
    assert not state.exists()


def test_a_job_that_keeps_no_optimizers_says_nothing_of_them(tmp_path: Path) -> None:
    assert Bench(tmp_path).undisturbed()[0]["metrics"].keys() == {"train_loss"}


def test_checkpoints_change_nothing_of_what_is_trained(cases: Cases) -> None:
    for bench, truth, update in cases.values():
        bench.kept.unlink(missing_ok=True)
        length = next(length for length in LENGTHS.values() if bench.undisturbed(**length)[1] == update)
        done, kept_always = bench.train(**length)
        assert (kept_always, counts(done)) == (update, counts(truth))


COUNTED = (
    TASK.replace("return x, i % 3", "return x, i")
    + """
def loss(model, batch, config):
    x, i = batch
    with open(config["seen"], "a") as file:
        file.write(" ".join(map(str, i.tolist())) + " ")
    return nn.functional.cross_entropy(model(x), i % 3)
"""
)


@pytest.mark.parametrize("at", [3, BATCHES, BATCHES + 2])
def test_with_loader_processes_every_sample_is_trained_as_often_as_without_a_kill(tmp_path: Path, at: int) -> None:
    seen = tmp_path / "seen"
    bench = Bench(tmp_path, COUNTED, loader_workers=1, seen=str(seen))
    bench.killed(at)
    done, _ = bench.train()
    assert (done["resumed_at"], done["steps"]) == (at, STEPS)
    assert Counter(map(int, seen.read_text().split())) == dict.fromkeys(range(SAMPLES), 2)


# ---------------------------------------------------------------- the clock of a round in seconds


def a_thousand_seconds() -> Context:
    return Context(
        device=CPU,
        config={},
        seed=1,
        round=1,
        epochs=None,
        steps=None,
        seconds=1000.0,
        optimizer=None,
        _stepper=Stepper(CPU, "fp32", task_device),
        _events=Events(io.BytesIO()),
        _stopping=threading.Event(),
        _batches=BATCHES,
    )


@pytest.mark.parametrize(("elapsed_s", "done"), [(0.0, False), (999.0, False), (1000.0, True), (5000.0, True)])
def test_seconds_of_training_before_a_kill_count(elapsed_s: float, done: bool) -> None:
    killed, resumed = a_thousand_seconds(), a_thousand_seconds()
    killed.gave(5)
    killed.step(1.0)
    resumed.go_on_from({**killed.position(), "elapsed_s": elapsed_s})
    assert resumed.done == done
    assert resumed.result()["seconds"] >= elapsed_s


def test_a_round_of_seconds_goes_on_in_the_middle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench(tmp_path)
    bench.killed(3, seconds=1000.0)
    bench.killed(20, seconds=1000.0)
    assert "going on at step 3" in capsys.readouterr().err


# ---------------------------------------------------------------- whose checkpoint it is


def changed_config(bench: Bench) -> dict[str, Any]:
    bench.config["lr"] = 0.5
    return {}


def changed_task(bench: Bench) -> dict[str, Any]:
    bench.task.write_text(TASK + "# another file")
    return {}


CHANGES: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "seed": lambda _: {"seed": 12},
    "round": lambda _: {"round": 2},
    "length": lambda _: {"epochs": 3},
    "kind of length": lambda _: {"epochs": None, "steps": 2},
    "base": lambda _: {"base_digest": "c"},
    "length of the job": lambda _: {"total_steps": 9},
    "shard": lambda bench: {"indices": saved_rows(bench.folder / "rows.npy")},
    "config": changed_config,
    "task": changed_task,
}


def saved_rows(path: Path) -> str:
    np.save(path, np.arange(SAMPLES - 1), allow_pickle=False)
    return str(path)


@pytest.mark.parametrize("what", CHANGES)
def test_a_checkpoint_of_another_command_is_never_used_and_goes_away(
    tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(tmp_path)
    bench.killed(9)
    changed = {"epochs": 2, "checkpoint_every_s": 1000.0, **CHANGES[what](bench)}
    assert bench.train(**changed)[0]["resumed_at"] == 0
    assert "of another command" in capsys.readouterr().err
    assert not bench.kept.exists()


def test_a_base_without_a_digest_is_known_by_its_content(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.killed(9, base_digest="")
    assert bench.train(base_digest="")[0]["resumed_at"] == 9
    bench.killed(9, base_digest="")
    bench.host().init(seed=8, out=str(bench.base), labels=None)
    assert bench.train(base_digest="")[0]["resumed_at"] == 0


def test_paths_and_the_period_make_no_other_command(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    truth = bench.undisturbed()[1]
    bench.killed(9)
    moved = bench.base.rename(tmp_path / "moved.safetensors")
    done, _ = bench.train(base=str(moved), out=str(tmp_path / "elsewhere"), checkpoint_every_s=1000.0)
    assert done["resumed_at"] == 9
    assert (tmp_path / "elsewhere").read_bytes() == truth


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("harm", ["empty", "short", "zeros", "flipped", "foreign"])
def test_a_damaged_checkpoint_is_said_and_the_shard_is_trained_from_its_base(
    tmp_path: Path, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(tmp_path)
    truth = bench.undisturbed()[1]
    bench.killed(9)
    whole = bench.kept.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0x10
    harmed = {
        "empty": b"",
        "short": whole[:-10],
        "zeros": bytes(len(whole)),
        "flipped": bytes(flipped),
        "foreign": b"x",
    }
    bench.kept.write_bytes(harmed[harm])
    done, update = bench.train(checkpoint_every_s=1000.0)
    assert (done["resumed_at"], update) == (0, truth)
    assert capsys.readouterr().err.count("it is damaged, training starts from the base") == 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("whole") / "checkpoint"
    model = nn.Linear(3, 2)
    Checkpoint(path, 0.0, "command", CPU).write(dict(model.state_dict()), {"lr": 0.1}, {"taken": 3})
    return path, path.read_bytes()


@given(st.data())
@settings(deadline=None)
def test_no_flipped_bit_and_no_torn_end_is_ever_taken_for_whole(whole: tuple[Path, bytes], data: st.DataObject) -> None:
    path, content = whole
    at = data.draw(st.integers(0, len(content) - 1))
    harmed = bytearray(content)
    match data.draw(st.sampled_from(["flip", "cut", "zeros", "longer"])):
        case "flip":
            harmed[at] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            del harmed[at:]
        case "zeros":
            harmed[at:] = bytes(len(content) - at)
        case _:
            harmed += bytes(at + 1)
    path.write_bytes(harmed)
    read = Checkpoint(path, 0.0, "command", CPU).read()
    if harmed == content:  # its last bytes can be zeros
        assert read is not None
    else:
        assert read is None
        assert not path.exists()


def test_a_checkpoint_that_cannot_be_put_back_is_trained_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = (
        TASK
        + """
class Forgetful(torch.optim.SGD):
    def load_state_dict(self, state):
        super().load_state_dict(state)
        raise KeyError("momentum")
def optimizer(model, config):
    return Forgetful(model.parameters(), lr=0.1, momentum=0.9)
"""
    )
    bench = Bench(tmp_path, source)
    truth = bench.undisturbed()[1]
    bench.killed(9)
    done, update = bench.train(checkpoint_every_s=1000.0)
    assert (done["resumed_at"], update) == (0, truth)
    assert "it cannot be gone on from, training starts from the base: KeyError" in capsys.readouterr().err


# ---------------------------------------------------------------- what it costs


def test_a_command_shorter_than_the_period_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench(tmp_path)
    bench.train(checkpoint=str(tmp_path / "no folder" / "checkpoint"), checkpoint_every_s=3600.0)
    assert capsys.readouterr().err == ""  # a try to write there would have been said
    bench.train(checkpoint=str(tmp_path / "no folder" / "checkpoint"))
    assert "no more of this command" in capsys.readouterr().err


def test_a_disk_that_is_full_costs_the_training_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench(tmp_path)
    truth = bench.undisturbed()[1]
    bench.kept.with_name("checkpoint.part").symlink_to("/dev/full")
    done, update = bench.train()
    assert (done["resumed_at"], update) == (0, truth)
    said = capsys.readouterr().err
    assert said.count("checkpoint: ") == 1
    assert "No space left on device" in said


def test_a_checkpoint_is_still_good_when_the_next_one_could_not_be_written(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    truth = bench.undisturbed()[1]
    bench.killed(5)
    bench.kept.with_name("checkpoint.part").symlink_to("/dev/full")
    bench.killed(9)
    done, update = bench.train()
    assert (done["resumed_at"], update) == (5, truth)


def test_a_checkpoint_that_cannot_be_removed_costs_the_training_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(tmp_path)
    bench.kept.mkdir()
    bench.train(checkpoint_every_s=3600.0)
    assert capsys.readouterr().err.count("checkpoint cannot be removed") == 1


def test_a_part_that_a_kill_left_behind_goes_away_with_the_command(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.kept.with_name("checkpoint.part").write_bytes(b"half")
    bench.train(checkpoint_every_s=3600.0)  # looks itself that none is left


def test_what_training_held_is_given_back_with_the_last_step(tmp_path: Path) -> None:
    source = (
        TASK
        + """
import weakref
MADE = []
def optimizer(model, config):
    made = torch.optim.Adam(model.parameters())
    MADE.append(weakref.ref(made))
    return made
"""
    )
    bench = Bench(tmp_path, source)
    host = bench.host()
    gc.disable()  # a cycle would hold the optimiser's memory on the device for as long as it pleases
    try:
        assert bench.answer(host)["event"] == "done"
        assert host._task is not None
        assert [made() for made in host._task.module.MADE] == [None]
    finally:
        gc.enable()


class Clock:
    """Seconds that pass as told: so many at each look."""

    def __init__(self, step_s: float) -> None:
        self.now, self.step_s = 0.0, step_s

    def __call__(self) -> float:
        self.now += self.step_s
        return self.now


@pytest.mark.parametrize(("took_s", "every_s"), [(4.0, 100.0), (6.0, 200.0)])
def test_the_period_is_doubled_when_writing_takes_more_than_a_twentieth_of_it(
    tmp_path: Path, took_s: float, every_s: float, capsys: pytest.CaptureFixture[str]
) -> None:
    keeper = Checkpoint(tmp_path / "c", 100.0, "command", CPU, clock=Clock(took_s))
    keeper.write(dict(nn.Linear(2, 2).state_dict()), {}, {})
    assert keeper.every_s == every_s
    assert ("from now on every 200 s" in capsys.readouterr().err) == (every_s == 200.0)


def test_the_period_counts_from_the_end_of_the_last_one(tmp_path: Path) -> None:
    clock = Clock(0.0)
    keeper = Checkpoint(tmp_path / "c", 100.0, "command", CPU, clock=clock)
    assert not keeper.due
    clock.now = 100.0
    assert keeper.due
    clock.step_s = 1.0  # 101 when it begins, 102 and 103 when it has ended
    keeper.write(dict(nn.Linear(2, 2).state_dict()), {}, {})
    clock.now, clock.step_s = 202.9, 0.0
    assert not keeper.due
    clock.now = 203.0
    assert keeper.due


# ---------------------------------------------------------------- tasks of other kinds


def test_a_loop_of_the_tasks_own_is_kept_only_if_the_file_says_that_it_can_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(tmp_path, TASK + loops.PLAIN)
    host = bench.host()
    truth = bench.undisturbed()[1]
    for _ in range(2):
        assert bench.answer(host)["resumed_at"] == 0
    assert capsys.readouterr().err.count("task.py does not say RESUMABLE = True") == 1, "said once a task"
    bench.killed(9)
    assert not bench.kept.exists()
    bench.task.write_text(TASK + loops.PLAIN + "\nRESUMABLE = True\n")
    bench.killed(9)
    done, update = bench.train()
    assert (done["resumed_at"], update) == (9, truth)


def test_a_task_whose_hooks_remember_things_can_say_that_it_is_not_resumable(tmp_path: Path) -> None:
    bench = Bench(tmp_path, TASK + "\nRESUMABLE = False\n")
    bench.killed(9)
    assert not bench.kept.exists()


ACCUMULATING = (
    TASK.replace("    return net", "    net.register_buffer('mean', torch.zeros(3))\n    return net")
    + """
RESUMABLE = True

def train(model, loader, context):
    while not context.done:
        for number, (x, y) in enumerate(loader):
            loss = nn.functional.cross_entropy(model(x), y) / 2
            loss.backward()
            if number % 2 == 1:
                context.optimizer.step()
                context.optimizer.zero_grad()
                context.step(loss)
                model.mean.lerp_(model[6].bias.detach(), 0.3)  # after step(): part of that step all the same
"""
)


@pytest.mark.parametrize("at", [1, 3, 4, 7])
def test_a_loop_that_gathers_gradients_is_kept_between_its_steps_only(tmp_path: Path, at: int) -> None:
    bench = Bench(tmp_path, ACCUMULATING)
    truth = bench.undisturbed()[1]
    bench.killed(at, batches_later=1)
    done, update = bench.train()
    assert (done["resumed_at"], done["steps"], update) == (at, BATCHES, truth)


def test_an_optimiser_without_a_state_dict_trains_without_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = (
        TASK
        + """
class Plain:
    def __init__(self, model):
        self.parameters = list(model.parameters())
    def zero_grad(self, set_to_none=True):
        for p in self.parameters: p.grad = None
    def step(self):
        with torch.no_grad():
            for p in self.parameters: p -= 0.01 * p.grad
def optimizer(model, config):
    return Plain(model)
"""
    )
    bench = Bench(tmp_path, source)
    bench.killed(4)
    assert not bench.kept.exists()
    assert bench.train()[0]["resumed_at"] == 0
    assert "the optimiser, a Plain, has no state_dict()" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("raise RuntimeError('no')", "RuntimeError in optimizer(): no"),
        ("return {'x': {1, 2}}", "a set cannot be kept"),
        ("return {'x': torch.eye(3).to_sparse()}", "torch.sparse_coo"),
        ("return {'x': torch.zeros(1, dtype=torch.complex128)}", "torch.complex128"),
    ],
)
def test_a_state_that_cannot_be_kept_costs_the_training_one_line(
    tmp_path: Path, state: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = (
        TASK
        + f"""
class Odd(torch.optim.SGD):
    def state_dict(self):
        {state}
def optimizer(model, config):
    return Odd(model.parameters(), lr=0.1)
"""
    )
    bench = Bench(tmp_path, source)
    assert bench.train()[0]["steps"] == STEPS
    lines = capsys.readouterr().err
    assert lines.count("checkpoint: no more of this command") == lines.count("checkpoint: ") == 1
    assert said in lines


def test_a_stop_leaves_the_newest_checkpoint(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    truth = bench.undisturbed()[1]
    real = Context.step

    def step(context: Context, *arguments: Any) -> bool:
        if context._taken == 5:
            bench.stopping.set()
        return real(context, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Context, "step", step)
        assert bench.answer() == {"event": "stopped"}
    bench.stopping.clear()
    done, update = bench.train()
    assert (done["resumed_at"], update) == (5, truth)


# ---------------------------------------------------------------- values

plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
values = st.recursive(
    plain,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
)


@given(values)
@settings(deadline=None)
def test_any_plain_value_comes_back_as_it_was(value: Any) -> None:
    back = unpack(json.loads(json.dumps(pack(value, {}), allow_nan=False)), {})
    assert repr(back) == repr(value)  # NaN and -0.0 too, and no tuple that became a list


@pytest.mark.parametrize("value", [{1, 2}, object(), len, b"bytes", np.zeros(3)])
def test_what_is_no_plain_value_is_refused(value: Any) -> None:
    with pytest.raises(UnkeepableError):
        pack({"deep": [value]}, {})


DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int16, torch.uint8, torch.bool]


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)), max_size=6))
@settings(deadline=None)
def test_tensors_of_any_dtype_and_shape_come_back_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[torch.dtype, list[int]]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "tensors"
    tensors = [
        (torch.randn(shape) * 100).to(dtype).movedim(0, -1) if shape else torch.tensor(2.5) for dtype, shape in shapes
    ]
    keeper = Checkpoint(path, 0.0, "command", CPU)
    keeper.write({f"{number}": tensor for number, tensor in enumerate(tensors)}, {"state": tensors}, {})
    saved = keeper.read()
    assert saved is not None
    for before, *after in zip(tensors, saved.optimizer["state"], saved.model.values(), strict=True):
        for tensor in after:
            assert tensor.dtype == before.dtype
            assert torch.equal(tensor, before)


MADE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1), momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), foreach=False),
    "fused": lambda p: torch.optim.Adam(p, fused=True),
    "radam": lambda p: torch.optim.RAdam(p, decoupled_weight_decay=True),
    "nadam": lambda p: torch.optim.NAdam(p),
    "adamax": lambda p: torch.optim.Adamax(p),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr_decay=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p),
    "asgd": lambda p: torch.optim.ASGD(p, t0=1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe"),
}


@pytest.mark.parametrize("kind", MADE)
def test_any_of_torchs_optimisers_goes_on_to_the_same_bits(tmp_path: Path, kind: str) -> None:
    def learner() -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = nn.Linear(5, 3)
        return model, MADE[kind](model.parameters())

    def steps(model: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            value: torch.Tensor = (model(torch.eye(5)) - torch.arange(15.0).reshape(5, 3)).square().mean()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        for _ in range(3):
            optimizer.step(loss)  # type: ignore[arg-type, unused-ignore] # float says torch, tensors it takes

    first, first_optimizer = learner()
    steps(first, first_optimizer)
    keeper = Checkpoint(tmp_path / "c", 0.0, "command", CPU)
    keeper.write(dict(first.state_dict()), first_optimizer.state_dict(), {})
    saved = keeper.read()
    assert saved is not None
    keeper.remove()
    second, second_optimizer = learner()
    second.load_state_dict(saved.model)
    second_optimizer.load_state_dict(saved.optimizer)
    steps(first, first_optimizer)
    steps(second, second_optimizer)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)


@given(draws=st.lists(st.sampled_from(["python", "numpy", "torch"]), max_size=8))
@settings(deadline=None)
def test_every_generator_goes_on_where_it_was(draws: list[str]) -> None:
    def drawn() -> list[float]:
        ways: dict[str, Callable[[], float]] = {
            "python": lambda: random.gauss(0, 1),  # each keeps a second number for the next time
            "numpy": lambda: float(np.random.randn()),
            "torch": lambda: float(torch.randn(())),
        }
        return [ways[kind]() for kind in draws]

    drawn()
    tensors: dict[str, torch.Tensor] = {}
    packed = json.dumps(pack(generators(CPU), tensors))
    expected = drawn()
    set_generators(unpack(json.loads(packed), tensors), CPU)
    assert drawn() == expected


# ---------------------------------------------------------------- real processes


HELD = """
import time
from pathlib import Path
CALLS = 0
def loss(model, batch, config):
    global CALLS
    CALLS += 1
    if CALLS > 40 and Path(config["gate"]).exists():
        time.sleep(1.0)  # it is killed before many of these are taken
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
"""


def test_a_child_killed_in_mid_training_goes_on_where_it_was(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    bench = Bench(tmp_path, TASK + HELD, gate=str(gate))
    gate.touch()
    command = bench.command(epochs=150, checkpoint_every_s=0.05)
    opened = {"do": "open", "task": str(bench.task), "config": bench.config}

    def child() -> Child:
        return Child.start(device="cpu", threads=1, log_path=tmp_path / "log")

    with child() as first:

        def kill_in_the_middle(progress: Progress) -> None:
            if progress.step > 40 and bench.kept.exists():
                first.kill()

        first.ask(opened, on_progress=lambda _: None, stall_s=60)
        with pytest.raises(TaskStopped):
            first.ask(command, on_progress=kill_in_the_middle, stall_s=60)
    gate.unlink()
    with child() as second:
        told: list[int] = []
        second.ask(opened, on_progress=lambda _: None, stall_s=60)
        done = second.ask(command, on_progress=lambda progress: told.append(progress.step), stall_s=60)
        resumed = hashlib.sha256(bench.out.read_bytes()).hexdigest()
        truth = second.ask({**command, "checkpoint": None}, on_progress=lambda _: None, stall_s=60)
    assert 0 < done["resumed_at"] < done["steps"] == 150 * BATCHES
    assert done["resumed_at"] in told, "progress goes on from the step of the checkpoint"
    assert truth["resumed_at"] == 0
    assert resumed == hashlib.sha256(bench.out.read_bytes()).hexdigest()
    assert not bench.kept.exists()
