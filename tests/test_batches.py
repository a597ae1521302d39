"""How much is computed at once: pieces with the gradients of the whole, and the batch that a memory has room for."""

import hashlib
import io
import threading
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from worker import task_batches, task_device
from worker.task_batches import FullError, OneSampleError, Stepper, cut, grow, halved, lr_scale, most_for, pieces
from worker.task_host import Events, Host

CPU = torch.device("cpu")
TOLERANCE = 1e-5  # of a gradient's or an update's length, in float32: the sums are taken in another order

TASK = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

class Small(nn.Module):
    def __init__(self, room):
        super().__init__()
        self.layers, self.room = nn.Sequential(nn.Linear(4, 8), {layer}nn.Tanh(), nn.Linear(8, 3)), room
    def forward(self, x):
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.layers(x)

def model(config):
    return Small(config.get("room", 10_000))

def dataset(config, split):
    x = torch.randn(41, 4, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x[:, :3].argmax(1))
"""

OWN_LOOP = """
def train(model, loader, context):
    while not context.done:
        for x, y in loader:
            context.optimizer.zero_grad()
            with context.autocast():
                loss = nn.functional.cross_entropy(model(x), y)
            context.scaler.scale(loss).backward()
            context.scaler.step(context.optimizer)
            context.scaler.update()
            context.step(loss)
"""


OWN_METRICS = """
def metrics(model, batch, config):
    x, y = batch
    return {"far": (float((model(x).argmax(1) - y).abs().sum()), len(y))}
"""


class Bench:
    """A host in this process, a task whose model has room for so many samples, and the log that it writes."""

    def __init__(self, folder: Path, *, layer: str = "", own: str = "") -> None:
        self.folder = folder
        (folder / "task.py").write_text(TASK.replace("{layer}", layer) + own)
        self.stopping = threading.Event()
        self.events = io.BytesIO()
        self.open()
        self.host.init(seed=7, out=str(folder / "base"), labels=None)

    def open(self, **config: Any) -> None:
        self.host = Host(CPU, Events(self.events), self.stopping)
        self.host.open(
            task=str(self.folder / "task.py"), config={"batch_size": 12, "lr": 0.1, "momentum": 0.9, **config}
        )

    def train(self, out: str, **fields: Any) -> dict[str, Any]:
        command = {"do": "train", "base": str(self.folder / "base"), "indices": None, "out": str(self.folder / out)}
        return self.host.answer({**command, "seed": 5, "round": 1, "epochs": 2, **fields})

    def evaluate(self, batch_size: int, **fields: Any) -> dict[str, Any]:
        return self.host.answer(
            {"do": "evaluate", "base": str(self.folder / "base"), "batch_size": batch_size, **fields}
        )

    def probe(self) -> dict[str, Any]:
        return self.host.answer({"do": "probe", "base": str(self.folder / "base"), "indices": None, "seed": 5})

    def apart(self, one: str, other: str) -> float:
        """How far two updates are apart, as a part of the second's length."""
        base, ours, theirs = (load_file(self.folder / name) for name in ("base", one, other))
        length = sum(float((theirs[name] - base[name]).square().sum()) for name in base)
        return float((sum(float((ours[name] - theirs[name]).square().sum()) for name in base) / length) ** 0.5)

    def digest(self, name: str) -> str:
        return hashlib.sha256((self.folder / name).read_bytes()).hexdigest()


# ---------------------------------------------------------------- pieces


@given(st.integers(1, 300), st.none() | st.integers(1, 400), st.sampled_from([1, 2]))
def test_pieces_are_the_whole_batch_and_none_is_larger_than_what_fits(
    samples: int, fits: int | None, least: int
) -> None:
    found = pieces(samples, fits, least)
    assert sum(found) == samples
    assert max(found) - min(found) <= 1
    assert min(found) >= min(least, samples)
    assert fits is None or max(found) <= max(fits, 3 if least == 2 else 1)


@given(st.integers(1, 300), st.none() | st.integers(1, 400), st.sampled_from([1, 2]))
def test_halving_ends_with_pieces_that_cannot_be_smaller(samples: int, fits: int | None, least: int) -> None:
    tried = []
    while fits is None or fits:
        tried.append(pieces(samples, fits, least)[0])
        smaller = halved(samples, fits, least)
        if smaller is None:
            break
        fits = smaller
    assert tried == sorted(set(tried), reverse=True)  # each time less
    assert tried[-1] <= (1 if least == 1 else 3) or tried[-1] == samples


Pair = namedtuple("Pair", ["left", "right"])


def test_any_nesting_of_tensors_is_cut_by_its_rows() -> None:
    x, y = torch.arange(10).reshape(5, 2), torch.arange(5)
    first, second = cut({"in": [x, (y, y)], "out": Pair(y, x)}, [3, 2]) or []
    assert first["in"][0].tolist() == x[:3].tolist()
    assert isinstance(second["in"][1], tuple)
    assert second["out"].left.tolist() == [3, 4]
    assert isinstance(second["out"], Pair)


@pytest.mark.parametrize("batch", ["text", torch.tensor(1.0), torch.zeros(4), [torch.zeros(5), 3], [], {}, None])
def test_what_has_no_row_for_each_sample_is_not_cut(batch: Any) -> None:
    assert cut(batch, [3, 2]) is None


# ---------------------------------------------------------------- gradients in pieces


@pytest.mark.parametrize("fits", [1, 2, 3, 5, 12])
def test_the_gradients_of_pieces_are_those_of_the_whole_batch(fits: int) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))
    batch = torch.randn(13, 6), torch.randint(4, (13,))

    def gradients(fits: int | None) -> tuple[float, list[torch.Tensor]]:
        stepper = Stepper(CPU, "fp32", task_device)
        stepper.fits = fits

        def loss_of(part: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return nn.functional.cross_entropy(model(part[0]), part[1])

        loss = float(stepper.gradients(loss_of, batch, 13, model.zero_grad))
        return loss, [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    whole, in_pieces = gradients(None), gradients(fits)
    assert in_pieces[0] == pytest.approx(whole[0], rel=TOLERANCE)
    assert len(whole[1]) == 4
    for ours, theirs in zip(in_pieces[1], whole[1], strict=True):
        assert float((ours - theirs).norm()) <= TOLERANCE * float(theirs.norm())


def test_running_out_of_memory_halves_the_pieces_and_trains_on_to_the_same_update(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(tmp_path)
    whole = bench.train("whole")
    assert whole["fits"] is None
    bench.open(room=4)
    in_pieces = bench.train("pieces")
    assert in_pieces["fits"] == 3
    assert (in_pieces["steps"], in_pieces["samples"]) == (whole["steps"], whole["samples"])
    assert in_pieces["metrics"]["train_loss"] == pytest.approx(whole["metrics"]["train_loss"], rel=TOLERANCE)
    assert bench.apart("pieces", "whole") < TOLERANCE
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("memory: ")]
    assert len(said) == 2
    assert said[1].startswith("memory: 6 samples at once do not fit, so 3 are taken, with the same gradients: CUDA out")


def test_what_fitted_last_time_is_where_the_next_training_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(tmp_path)
    bench.open(room=4)
    bench.train("first")
    capsys.readouterr()
    assert bench.train("second", fits=3)["fits"] == 3
    assert "memory: " not in capsys.readouterr().err
    assert bench.apart("second", "first") < TOLERANCE


def test_one_sample_that_does_not_fit_is_an_error_with_its_advice(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.open(room=0)
    failed = bench.train("out")
    assert (failed["event"], failed["code"]) == ("error", "out_of_memory")
    assert failed["sentence"] == (
        "out of memory in train() with as few samples as can be computed at once: 1 at once, and no less can be "
        "computed: CUDA out of memory. Tried to allocate 2.00 GiB.; use a smaller model, smaller samples or a larger "
        "machine"
    )


def test_batchnorm_is_never_given_a_piece_of_one_sample(tmp_path: Path) -> None:
    bench = Bench(tmp_path, layer="nn.BatchNorm1d(8), ")
    bench.open(room=3, batch_size=7)
    done = bench.train("out")
    assert done["event"] == "done", done
    assert done["fits"] == 3  # pieces of 3, 2 and 2
    bench.open(room=2, batch_size=7)
    failed = bench.train("out")
    assert failed["code"] == "out_of_memory"
    assert "3 at once, and no less can be computed" in failed["sentence"]


@pytest.mark.parametrize("own", ["", OWN_METRICS])
def test_an_evaluation_that_runs_out_of_memory_halves_its_batch_and_measures_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], own: str
) -> None:
    bench = Bench(tmp_path, own=own)
    whole = bench.evaluate(41)
    bench.open(room=6)
    pieces_of = [bench.evaluate(41), bench.evaluate(20)]  # the second begins with what fitted
    assert whole["event"] == "done"
    for got in pieces_of:
        assert got["samples"] == 41
        assert got["metrics"].keys() == whole["metrics"].keys()
        for name, (total, count) in whole["metrics"].items():
            assert got["metrics"][name] == [pytest.approx(total, rel=1e-6), count]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("memory: ")]
    assert [line.partition(":")[2].split(",")[0] for line in said] == [
        " 41 samples at once do not fit", " 14 samples at once do not fit", " 7 samples at once do not fit",
    ]  # fmt: skip
    assert all("with the same measurements" in line for line in said)


def test_an_evaluation_of_which_not_one_sample_fits_is_an_error_with_its_advice(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.open(room=0)
    got = bench.evaluate(10)
    assert (got["event"], got["code"]) == ("error", "out_of_memory")
    assert "out of memory in metrics() with as few samples as can be computed at once" in got["sentence"]


def test_an_own_loop_is_left_to_itself(tmp_path: Path) -> None:
    bench = Bench(tmp_path, own=OWN_LOOP)
    bench.open(room=4)
    failed = bench.train("out")
    assert failed["code"] == "out_of_memory"
    assert "lower train.batch_size" in failed["sentence"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_an_own_loop_may_ask_for_the_precision_of_the_job(tmp_path: Path, precision: str) -> None:
    bench = Bench(tmp_path, own=OWN_LOOP)
    bench.open()
    assert bench.train("plain")["precision"] == "fp32"
    bench.open(precision=precision)
    assert bench.train("half")["precision"] == precision
    assert 0 < bench.apart("half", "plain") < 0.05


def test_an_own_loop_that_does_not_ask_is_said_to_compute_in_float32(tmp_path: Path) -> None:
    bench = Bench(tmp_path, own=OWN_LOOP.replace("with context.autocast():", "if True:"))
    bench.open(precision="bf16")
    done = bench.train("out")
    assert done["precision"] == "fp32"
    assert done["precision_reason"].startswith("its own train() does not ask for bf16")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_job_in_half_precision_is_trained_to_nearly_the_same_update_in_pieces_too(
    tmp_path: Path, precision: str
) -> None:
    bench = Bench(tmp_path)
    bench.train("plain")
    bench.open(precision=precision)
    done = bench.train("half")
    assert done["precision"] == precision
    assert done["precision_reason"].startswith("the job asks for it")
    assert 0 < bench.apart("half", "plain") < 0.05
    assert f'"precision": "{precision}"' in bench.events.getvalue().decode()
    bench.open(precision=precision, room=5)
    assert bench.train("pieces")["fits"] == 3
    assert bench.apart("pieces", "plain") < 0.05
    for tensor in load_file(tmp_path / "half").values():
        assert tensor.dtype == torch.float32


def test_a_killed_training_in_half_precision_and_in_pieces_ends_with_the_same_bytes(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    config = {"precision": "fp16", "room": 4}
    kept = {"checkpoint": str(tmp_path / "kept"), "checkpoint_every_s": 0.0, "base_digest": "b", "fits": 3}
    bench.open(**config)
    whole = bench.train("whole", **kept)
    bench.open(**config)
    bench.host._events.progress = stop_at(bench, 5)  # type: ignore[method-assign]
    assert bench.train("resumed", **kept)["event"] == "stopped"
    bench.stopping.clear()
    bench.open(**config)
    resumed = bench.train("resumed", **{**kept, "fits": None})
    assert resumed["resumed_at"] > 0
    assert resumed["fits"] == 3
    assert resumed["metrics"] == whole["metrics"]
    assert bench.digest("resumed") == bench.digest("whole")


def stop_at(bench: Bench, reports: int) -> Callable[..., None]:
    """A progress() that asks for a stop once the training has taken some steps."""
    bench.host._events.due = lambda _: True  # type: ignore[method-assign]

    def progress(doing: str, *, step: float = 0, **_: Any) -> None:
        if doing == "training" and step >= reports:
            bench.stopping.set()

    return progress


# ---------------------------------------------------------------- the batch that a memory has room for

PER_SAMPLE = 1000  # bytes


def in_room(room: int, asked: list[int]) -> Callable[[int], tuple[int, int]]:
    """Steps on a machine with so many bytes."""

    def trial(size: int) -> tuple[int, int]:
        asked.append(size)
        if size * PER_SAMPLE > room:
            raise FullError("none left")
        return 0, size * PER_SAMPLE

    return trial


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 300), st.sampled_from([1, 2]))
def test_a_batch_that_is_found_fits_and_twice_as_much_would_not_or_is_not_wanted(
    room: int, allowed: int, most: int, least: int
) -> None:
    first, asked = min(least, most), []  # type: ignore[var-annotated]
    if first * PER_SAMPLE > room:
        with pytest.raises(OneSampleError, match=f"{first} at once, and no less can be computed: none left"):
            grow(in_room(room, asked), first=least, most=most, allowed=allowed)
        return
    found = grow(in_room(room, asked), first=least, most=most, allowed=allowed)
    assert found.batch_size in asked
    assert found.batch_size * PER_SAMPLE <= room
    twice = min(2 * found.batch_size, most)
    assert found.batch_size == most or twice * PER_SAMPLE > room or 2 * found.batch_size * PER_SAMPLE > allowed
    assert found.why


def test_where_memory_cannot_be_seen_the_usual_batch_is_taken() -> None:
    found = grow(lambda _: None, first=1, most=200, allowed=10)
    assert (found.batch_size, found.why) == (32, "this system does not tell what memory a step takes")
    assert grow(lambda _: None, first=1, most=20, allowed=10).batch_size == 20


@given(st.integers(1, 10**6))
def test_a_shard_gives_some_steps_and_never_more_than_it_has(shard: int) -> None:
    most = most_for(shard)
    assert 1 <= most <= min(shard, task_batches.MOST)
    assert most <= task_batches.REFERENCE or shard // most >= task_batches.STEPS_A_ROUND


@pytest.mark.skipif(not task_device.CLEAR_REFS.exists(), reason="only Linux tells what a step took")
def test_the_growth_ends_before_the_memory_that_a_step_really_took_would_be_too_much() -> None:
    each, room = 4 << 20, 128 << 20  # bytes

    class Memory:
        """The real meter, on a machine that has little memory free."""

        Meter, settle = task_device.Meter, staticmethod(task_device.settle)
        is_out_of_memory = staticmethod(task_device.is_out_of_memory)
        give_back_memory = staticmethod(task_device.give_back_memory)

        @staticmethod
        def memory(device: torch.device) -> tuple[int, int]:
            return room, room

    sizes: list[int] = []

    def step(size: int) -> None:
        sizes.append(size)
        torch.ones(size * each // 4).sum()

    found, _ = task_batches.find(step, shard=10**6, least=1, device=CPU, memory=Memory)  # type: ignore[arg-type]
    assert max(sizes) * each <= task_batches.SHARE["cpu"] * room
    assert found.batch_size >= 4
    assert "would need" in found.why


def test_the_learning_rate_follows_the_batch() -> None:
    assert lr_scale(32, adaptive=False) == lr_scale(32, adaptive=True) == 1.0
    assert lr_scale(128, adaptive=False) == 4.0
    assert lr_scale(8, adaptive=True) == 0.5


def test_the_probe_finds_what_the_model_has_room_for_and_how_fast_it_is(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.open(room=9)
    found = bench.probe()
    assert found["batch_size"] == 8
    assert found["why"] == "16 ran out of memory"
    assert found["samples_per_s"] > 0
    bench.open()
    assert bench.probe()["batch_size"] == 32  # of 41 samples
    bench.open(room=0)
    assert bench.probe()["code"] == "out_of_memory"


def test_a_probe_leaves_nothing_behind_that_a_training_would_see(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.open()
    bench.train("alone")
    bench.open()
    bench.probe()
    bench.train("after")
    assert bench.digest("after") == bench.digest("alone")


def test_a_batch_that_was_found_is_trained_with_and_the_learning_rate_follows_it(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.open(batch_size=8, lr=0.1 * 8 / 32)
    by_hand = bench.train("by_hand")
    bench.open(batch_size=32, lr=0.1)
    found = bench.train("found", batch_size=8)
    assert found["steps"] == by_hand["steps"] == 12
    assert bench.digest("found") == bench.digest("by_hand")


def test_a_step_of_an_own_loop_is_not_tried(tmp_path: Path) -> None:
    bench = Bench(tmp_path, own=OWN_LOOP)
    bench.open()
    found = bench.probe()
    assert (found["batch_size"], found["samples_per_s"]) == (32, None)
    assert found["why"] == "the task has its own train(): what a step of it takes cannot be tried"
    bench.train("plain", epochs=1)
    bench.train("found", epochs=1, batch_size=32)


def test_a_probe_ends_when_it_is_asked_to(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.open()
    bench.stopping.set()
    assert bench.probe() == {"event": "stopped"}


def test_a_speed_is_of_ten_steps_after_three() -> None:
    taken: list[int] = []
    times = iter([100.0, 102.0])
    rate = task_batches.samples_per_s(taken.append, 8, lambda: taken.append(0), lambda: next(times))
    assert taken == [8, 8, 8, 0, *[8] * 10, 0]
    assert rate == 40.0


def test_a_batch_that_fails_while_it_is_timed_is_halved() -> None:
    sizes: list[int] = []

    def step(size: int) -> None:
        sizes.append(size)
        if size > 4 and len(sizes) > 6:
            raise MemoryError("later")

    found, rate = task_batches.find(step, shard=32, least=1, device=CPU, memory=task_device)
    assert sizes[:6] == [1, 2, 4, 8, 16, 32]
    assert (found.batch_size, found.why) == (4, "8 ran out of memory")
    assert rate > 0
