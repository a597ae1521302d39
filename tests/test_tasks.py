"""The built-in tasks and the example: plain PyTorch files, loaded by their path as the child loads them."""

import ast
import gzip
import importlib.util
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import TensorDataset

from common.messages import JobSpec
from common.tasks import BUILTIN, BuiltinTask

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "my_task.py"
FILES = sorted({task.file for task in BUILTIN.values()} | {EXAMPLE})
HOOKS = {"model": 1, "dataset": 2, "loss": 3, "metrics": 3, "optimizer": 2, "train": 3}


pytestmark = pytest.mark.usefixtures("one_thread")


def load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"task_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def config_of(task: BuiltinTask, **more: Any) -> dict[str, Any]:
    """What the child hands to the task's functions under its default job."""
    train = {key.removeprefix("train."): value for key, value in task.defaults.items() if key.startswith("train.")}
    return {**train, **task.config, **more}


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    x, y = data.tensors
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


# ---------------------------------------------------------------- the list


def test_every_builtin_task_makes_a_valid_job_by_its_defaults() -> None:
    for name, task in BUILTIN.items():
        sections: dict[str, dict[str, Any]] = {}
        for dotted, value in task.defaults.items():
            section, key = dotted.split(".")
            sections.setdefault(section, {})[key] = value
        spec = JobSpec.model_validate({"task": name, **sections, "config": task.config})
        assert spec.task == task.name == name
        assert task.file.is_file()
        assert task.summary


def test_the_list_of_tasks_never_imports_torch() -> None:
    code = "import sys, common.tasks; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'sklearn')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_task_file_imports_nothing_of_ours_and_defines_the_functions(file: Path) -> None:
    tree = ast.parse(file.read_text())
    nodes = list(ast.walk(tree))
    imported = {alias.name.partition(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {(node.module or "").partition(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not imported & {"common", "worker", "server", "client", ""}
    defined = {node.name: len(node.args.args) for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {"model", "dataset"} <= defined.keys()
    assert {name: count for name, count in defined.items() if name in HOOKS}.items() <= HOOKS.items()


# ---------------------------------------------------------------- digits


def rounds_until(wanted: float, module: ModuleType, config: dict[str, Any], *, workers: int, most: int) -> int | None:
    """Rounds of plain federated averaging over iid shards until the test accuracy is reached; None: not in `most`."""
    torch.manual_seed(0)
    train, test = module.dataset(config, "train"), module.dataset(config, "test")
    model, worker = module.model(config), module.model(config)
    x, y = train.tensors
    shards = torch.randperm(len(train)).tensor_split(workers)
    for number in range(1, most + 1):
        base, states = {name: value.clone() for name, value in model.state_dict().items()}, []
        for shard in shards:
            worker.load_state_dict(base)
            step = torch.optim.SGD(worker.parameters(), lr=config["lr"], momentum=config["momentum"])
            for _ in range(config["local_epochs"]):
                for rows in shard[torch.randperm(len(shard))].split(config["batch_size"]):
                    step.zero_grad()
                    nn.functional.cross_entropy(worker(x[rows]), y[rows]).backward()
                    step.step()
            states.append({name: value.clone() for name, value in worker.state_dict().items()})
        model.load_state_dict({name: sum(state[name] for state in states) / workers for name in base})
        if accuracy(model, test) >= wanted:
            return number
    return None


def test_digits_reaches_95_percent_in_five_rounds_of_three_workers() -> None:
    task = BUILTIN["digits"]
    assert rounds_until(0.95, load(task.file), config_of(task), workers=3, most=5) is not None


def test_digits_splits_the_same_way_every_time_and_keeps_the_classes_even() -> None:
    module = load(BUILTIN["digits"].file)
    train, test = module.dataset({}, "train"), module.dataset({}, "test")
    assert (len(train), len(test)) == (1437, 360)
    assert torch.equal(train.tensors[0], module.dataset({}, "train").tensors[0])
    counts = torch.bincount(test.tensors[1])
    assert counts.min() >= 34
    assert train.tensors[0].min() == 0
    assert train.tensors[0].max() == 1
    pictures = {tuple(picture.flatten().tolist()) for picture in train.tensors[0]}
    assert not any(tuple(picture.flatten().tolist()) in pictures for picture in test.tensors[0])


@pytest.mark.parametrize("name", ["digits", "fashion-mnist", "mnist", "cifar10", "char-lm"])
def test_the_models_sizes_are_as_they_are_told(name: str) -> None:
    task = BUILTIN[name]
    model = load(task.file).model(config_of(task))
    wanted = {"digits": 9_930, "fashion-mnist": 1_663_370, "mnist": 1_663_370, "cifar10": 289_194, "char-lm": 214_400}
    assert sum(parameter.numel() for parameter in model.parameters()) == wanted[name]


# ---------------------------------------------------------------- images

IMAGES = load(BUILTIN["fashion-mnist"].file)


def idx(array: np.ndarray[Any, Any]) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_set(folder: Path, *, samples: int = 6, packed: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for stems in IMAGES.IDX_FILES.values():
        pictures = np.arange(samples * 28 * 28, dtype=np.uint8).reshape(samples, 28, 28)
        for stem, array in zip(stems, (pictures, np.arange(samples, dtype=np.uint8)), strict=True):
            raw = idx(array)
            (folder / (f"{stem}.gz" if packed else stem)).write_bytes(gzip.compress(raw) if packed else raw)


@given(arrays.arrays(np.uint8, arrays.array_shapes(min_dims=1, max_dims=3, max_side=6)), st.booleans())
def test_an_idx_file_is_read_as_it_was_written(array: np.ndarray[Any, Any], packed: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("a.gz" if packed else "a")
        path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
        read = IMAGES.read_idx(path, dimensions=array.ndim)
    assert read.dtype == np.uint8
    assert np.array_equal(read, array)
    read += 1  # torch wants memory that it may write to


PICTURES = idx(np.zeros((2, 3, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("a", b"", "begins with nothing"),
        ("a", b"<html>not found", "is not an IDX file of bytes in 3 dimensions: it begins with 3c68746d"),
        ("a", PICTURES[:3] + b"\x01" + PICTURES[4:], "is not an IDX file"),
        ("a", PICTURES[:-1], "is damaged: 17 bytes for the shape (2, 3, 3)"),
        ("a", PICTURES + b"x", "is damaged: 19 bytes"),
        ("a.gz", gzip.compress(PICTURES, mtime=0)[:-9], "is damaged"),
        ("a.gz", PICTURES, "is damaged"),
    ],
)
def test_a_damaged_file_is_told_apart_and_named(tmp_path: Path, name: str, raw: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=r"fetch it anew|not an IDX file") as caught:
        IMAGES.read_idx(tmp_path / name, dimensions=3)
    assert words in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_pictures_and_classes_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(5, dtype=np.uint8)))
    with pytest.raises(ValueError, match=r"has 6 images, .* has 5 classes"):
        IMAGES.read_idx_folder(tmp_path, "train")


@pytest.mark.parametrize("inside", ["", "raw", "MNIST/raw"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_that_was_named_is_used_however_it_is_laid_out(tmp_path: Path, inside: str, packed: bool) -> None:
    write_set(tmp_path / inside, packed=packed)
    data = IMAGES.dataset({"images": "mnist", "data": {"mnist": str(tmp_path)}}, "test")
    assert data.tensors[0].shape == (6, 1, 28, 28)
    assert data.tensors[0].dtype == torch.uint8
    assert data.tensors[1].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.fixture
def empty_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home without data and a way out that leads nowhere."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_named_folder_without_the_data_is_an_error_and_nothing_else_is_tried(empty_machine: Path) -> None:
    write_set(empty_machine / "data" / "MNIST" / "raw")
    named = empty_machine / "wrong"
    with pytest.raises(FileNotFoundError, match=f"mnist is not on this machine: looked in {named}"):
        IMAGES.dataset({"images": "mnist", "data": {"mnist": str(named)}}, "train")
    assert not (empty_machine / "home").exists()


@pytest.mark.parametrize("place", ["home/.cache/lydian/data", "home/data", "data"])
def test_data_that_torchvision_left_on_the_machine_is_found(empty_machine: Path, place: str) -> None:
    write_set(empty_machine / place / "MNIST" / "raw")
    assert len(IMAGES.dataset({"images": "mnist", "data": {}}, "train")) == 6


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_data_that_is_nowhere_is_one_sentence_with_the_places_and_the_way_out(empty_machine: Path, name: str) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(FileNotFoundError) as caught:
        IMAGES.dataset({"images": name}, "train")
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert f"{name} is not on this machine: looked in /usr/share/datasets/{name}, " in sentence
    assert f"{empty_machine}/home/.cache/lydian/data" in sentence
    assert "it could not be downloaded: " in sentence
    assert f"`lydian work --data {name}=FOLDER`" in sentence


def test_the_sentence_for_fashion_mnist_names_the_debian_package(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`apt install dataset-fashion-mnist`, or put"):
        IMAGES.dataset({"images": "fashion-mnist", "data": {"fashion-mnist": str(tmp_path)}}, "train")


def test_fashion_mnist_from_debian_is_read_whole_and_its_pixels_are_centred(
    needs_debian_package: Callable[[str | Path, str], Path],
) -> None:
    needs_debian_package("/usr/share/datasets/fashion-mnist", "dataset-fashion-mnist")
    config = config_of(BUILTIN["fashion-mnist"], data={})
    train, test = IMAGES.dataset(config, "train"), IMAGES.dataset(config, "test")
    assert (len(train), len(test)) == (60_000, 10_000)
    assert torch.bincount(train.tensors[1]).tolist() == [6_000] * 10
    centred = IMAGES.Pixels(IMAGES.SOURCES["fashion-mnist"])(train.tensors[0][:10_000])
    assert abs(float(centred.mean())) < 0.02
    assert abs(float(centred.std()) - 1) < 0.02


@pytest.mark.parametrize(("name", "shape"), [("fashion-mnist", (1, 28, 28)), ("cifar10", (3, 32, 32))])
def test_the_nets_take_bytes_and_give_ten_logits(name: str, shape: tuple[int, ...]) -> None:
    model = IMAGES.model({"images": name})
    assert model(torch.zeros(2, *shape, dtype=torch.uint8)).shape == (2, 10)
    assert not [buffer for buffer in model.state_dict() if "scale" in buffer or "shift" in buffer]  # never sent


def test_a_name_that_is_no_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"images is 'mnits'; it must be one of fashion-mnist, mnist, cifar10"):
        IMAGES.model({"images": "mnits"})


# ---------------------------------------------------------------- char-lm

TEXT = load(BUILTIN["char-lm"].file)


@given(st.integers(2_000, 60_000), st.sampled_from(["train", "test"]))
def test_every_window_is_a_piece_of_the_text_and_predicts_the_byte_after_it(characters: int, split: str) -> None:
    config = {"characters": characters}
    text = TEXT.read_text(config)
    assert len(text) == characters
    (windows,) = TEXT.dataset(config, split).tensors
    part = text[: int(characters * 0.9)] if split == "train" else text[int(characters * 0.9) :]
    assert len(windows) == (len(part) - 1) // TEXT.WINDOW
    for number in (0, len(windows) - 1):
        start = number * TEXT.WINDOW
        assert torch.equal(windows[number], part[start : start + TEXT.WINDOW + 1])


def test_the_standard_library_has_as_much_text_as_every_machine_takes() -> None:
    assert len(TEXT.read_text({})) == TEXT.CHARACTERS


def test_a_folder_of_text_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "inner.txt").write_bytes(b"second")
    (tmp_path / "a.py").write_bytes(b"first ")
    (tmp_path / "c.txt").write_bytes(b" third")
    (tmp_path / "picture.png").write_bytes(b"no text")
    assert bytes(TEXT.read_text({"data": {"char-lm": str(tmp_path)}}).tolist()) == b"first second third"
    only = str(tmp_path / "picture.png")
    assert bytes(TEXT.read_text({"data": {"char-lm": only}}).tolist()) == b"no text"  # a file that was named


@pytest.mark.parametrize("folder", [".", "no/such/folder"])
def test_a_folder_without_text_is_an_error_with_the_way_out(tmp_path: Path, folder: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"finds no \.py or \.txt file .* `lydian work --data char-lm=PATH`"):
        TEXT.dataset({"data": {"char-lm": str(tmp_path / folder)}}, "train")


def test_a_text_too_short_for_one_sample_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(ValueError, match="4 bytes of text for the train split, and one sample needs 129"):
        TEXT.dataset({"data": {"char-lm": str(tmp_path)}}, "train")


def test_the_language_model_learns_within_a_few_steps() -> None:
    torch.manual_seed(0)
    config = config_of(BUILTIN["char-lm"], characters=40_000, width=32)
    model = TEXT.model(config)
    (windows,) = TEXT.dataset(config, "train").tensors
    optimizer = TEXT.optimizer(model, config)
    batch = [windows[:32]]
    first = TEXT.loss(model, batch, config).item()
    for _ in range(10):
        optimizer.zero_grad()
        TEXT.loss(model, batch, config).backward()
        optimizer.step()
    measured = TEXT.metrics(model, batch, config)
    total, count = measured["loss"]
    assert count == measured["accuracy"][1] == 32 * 128
    assert total / count < first - 1


# ---------------------------------------------------------------- the example


def test_the_example_is_short_and_learns() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 45
    torch.manual_seed(0)
    module, config = load(EXAMPLE), {"lr": 0.1}

    train, test = module.dataset(config, "train"), module.dataset(config, "test")
    assert len(train) + len(test) == 569
    model = module.model(config)
    optimizer = module.optimizer(model, config)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train.tensors[0]), train.tensors[1]).backward()
        optimizer.step()
    assert accuracy(model, test) > 0.9
    measured = module.metrics(model, test.tensors, config)
    assert int(measured["accuracy"][1]) == len(test)
    assert int(measured["missed"][1]) == int((test.tensors[1] == 0).sum())


def test_the_task_on_the_page_for_who_comes_from_elsewhere_builds_its_model_and_reads_its_data(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    task: dict[str, Any] = {}
    exec(page.partition("```python\n")[2].partition("```")[0], task)
    save_file({"x": torch.ones(3, 20), "y": torch.zeros(3, dtype=torch.int64)}, tmp_path / "train.safetensors")
    samples = task["dataset"]({"data": {"ward": str(tmp_path)}}, "train")
    assert len(samples) == 3
    assert task["model"]({})(samples[0][0]).shape == (2,)
