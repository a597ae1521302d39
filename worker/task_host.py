"""The child that trains: torch and one task file on one device, spoken to in lines of JSON.

A script, run as `python -P -u …/task_host.py --device D --threads N`. It imports the standard library, torch, numpy and
safetensors, and must never import this repository, or let the task file reach it by accident: the task's own `common`
or `server` is the task's. Nothing is pickled. One command at a time; the model and the data stay loaded between them.
With several devices it is the parent of one such process for each (worker/task_ranks.py); what follows is then rank 0.

    agent ──stdin──▶  {"do": "open" | "init" | "describe" | "probe" | "train" | "train_many" | "evaluate" | "close", …};
                      {"do": "stop"} ends each of them
    agent ◀──stdout── {"event": "hello"}, then for each command any number of {"event": "progress"}
                      and exactly one {"event": "done" | "stopped" | "error"}
    log   ◀──stderr── prints and warnings of the task, stacks on SIGUSR1 and on a crash

What a train command leaves behind is a function of the command, the base model and, where the command names one, the
optimiser's state that an earlier round left: it seeds every generator, and torch is asked for deterministic kernels
where it has them (a task file that wants speed instead may call `torch.use_deterministic_algorithms(False)`). A train
command that was killed in the middle and is given again goes on from the checkpoint that it wrote
(worker/task_checkpoint.py), and leaves the same bytes.
"""

import argparse
import ctypes
import faulthandler
import hashlib
import importlib.util
import io
import json
import math
import os
import queue
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

HERE = Path(__file__).resolve()


def beside(name: str) -> ModuleType:
    """A file of the child beside this one, as a module: by its path, since none of our packages may be imported."""
    spec = importlib.util.spec_from_file_location(name, HERE.with_name(f"{name}.py"))
    assert spec is not None  # noqa: S101 - it is a .py file
    assert spec.loader is not None  # noqa: S101 - as before
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


task_batches = beside("task_batches")
task_checkpoint = beside("task_checkpoint")
task_classes = beside("task_classes")
task_compiler = beside("task_compiler")
task_ranks = beside("task_ranks")
task_device = beside("task_device")
task_precision = beside("task_precision")
task_schedule = beside("task_schedule")
task_stacked = beside("task_stacked")
task_parts = beside("task_parts")
task_terms = beside("task_terms")
task_drift = beside("task_drift")
task_given = beside("task_given")
task_private = beside("task_private")
task_cage = beside("task_cage")
task_script = beside("task_script")

is_out_of_memory = task_device.is_out_of_memory

PROGRESS_EVERY_S = 0.2  # a person's eye and a heartbeat need no more
SENTENCE_LIMIT = 1_000  # characters
TRACEBACK_LIMIT = 100_000  # characters, the last ones
HOUSE = HERE.parent.parent
HOUSE_NAMES = frozenset({"server", "worker", "client", "common"})
PR_SET_PDEATHSIG = 1  # prctl(2)

Metrics = dict[str, list[float]]  # name -> [sum, count]


class Stopped(BaseException):
    """The agent asked for the command under way to end. No Exception: a task's `except Exception` lets it through."""


class TaskError(Exception):
    """A command could not be carried out; what the error event says."""

    def __init__(self, code: str, sentence: str, detail: str = "") -> None:
        super().__init__(sentence)
        self.code = code
        self.detail = detail


# ---------------------------------------------------------------- speaking with the agent


class Events:
    """The way to the agent: one JSON object a line, whole lines only."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._doing = ""
        self._reported_at = -math.inf

    def send(self, event: dict[str, Any]) -> None:
        """Send one event at once."""
        self._stream.write(json.dumps(event, allow_nan=False).encode() + b"\n")
        self._stream.flush()
        if event["event"] != "progress":
            self._doing = ""  # whatever comes next is news again

    def due(self, doing: str) -> bool:
        """Whether progress is worth telling: something else is done now, or the last report is old."""
        return doing != self._doing or time.monotonic() - self._reported_at >= PROGRESS_EVERY_S

    def progress(self, doing: str, **fields: float | str | None) -> None:
        """Tell where the command stands, if that is due. Numbers that are not finite are sent as null."""
        if not self.due(doing):
            return
        self._doing, self._reported_at = doing, time.monotonic()
        self.send({"event": "progress", "doing": doing, **{name: finite(value) for name, value in fields.items()}})


def finite(value: float | str | None) -> float | str | None:
    """The value, or None where JSON has no word for it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def take_command(command: dict[str, Any], commands: "queue.Queue[dict[str, Any]]", stopping: threading.Event) -> None:
    """Queue a command. A stop counts for the command before it alone: the one after it takes it back."""
    if command["do"] == "stop":
        stopping.set()
    else:
        stopping.clear()
        commands.put(command)


def command_in(line: bytes) -> dict[str, Any] | None:
    """The command that a line holds; None for an empty line.

    Raises:
        ValueError: the line is no JSON object with a "do".
    """
    if not line.strip():
        return None
    try:
        command = json.loads(line)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not isinstance(command, dict) or not isinstance(command.get("do"), str):
        raise ValueError('it is no object with a "do"')
    return command


def read_commands(stream: BinaryIO, commands: "queue.Queue[dict[str, Any]]", stopping: threading.Event) -> None:
    """Own stdin until the agent is gone, and then end this process and all that it started.

    A line that is no command ends the process as well: who sent it and what it was to mean cannot be known, and a
    child that stopped reading would notice neither a stop nor the agent's death.
    """
    for line in stream:
        if not line.endswith(b"\n"):
            break  # the agent died while it wrote
        try:
            command = command_in(line)
        except ValueError as error:
            sentence = f"the training process ends: a line on its stdin is no command ({error}): {line[:200]!r}\n"
            os.write(2, sentence.encode())  # no sys.stderr: the task may have put something else in its place
            os._exit(1)  # the agent, which lives, ends what this process started
        if command is not None:
            take_command(command, commands, stopping)
    if os.name == "posix" and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)  # loader processes too; only where the group is ours
    os._exit(0)


# ---------------------------------------------------------------- the device


def ready_device(asked: str, threads: int) -> tuple[torch.device, dict[str, Any]]:
    """Set torch up for the device and try it; what hello says of it.

    Raises:
        TaskError: the device does not work; code worker_error.
    """
    try:
        ready: tuple[torch.device, dict[str, Any]] = task_device.ready_device(asked, threads, task_precision)
    except task_device.BrokenDeviceError as error:
        raise TaskError("worker_error", str(error), trace(error)) from error
    return ready


def limited_device(asked: str, threads: int, memory: float) -> tuple[torch.device, dict[str, Any]]:
    """A device made ready (`ready_device`), of whose memory torch takes no more than this (`limit_memory`)."""
    device, build = ready_device(asked, threads)
    limit_memory(device, memory)
    return device, build


def limit_memory(device: torch.device, most: float) -> None:
    """Have torch take no more of the device's memory; what comes on top is the driver's own, some 300 to 500 MB.

    Args:
        device: as `ready_device` gave it.
        most: a share of the device's memory up to 1, or bytes; 1: there is no limit.

    Raises:
        TaskError: torch can set no such limit for this kind of device; code worker_error.
    """
    if most == 1:
        return
    backend = getattr(torch, device.type, None)
    limit = getattr(backend, "set_per_process_memory_fraction", None)
    if limit is None:
        sentence = f"--max-gpu-memory cannot be kept: torch {torch.__version__} knows no limit for {device}"
        raise TaskError("worker_error", f"{sentence}; leave it out, or give another --device")
    if most > 1:
        most = min(most / total_memory(device), 1.0)
    if device.type == "mps":  # there is one, and its limit has no device
        limit(most)
    else:
        limit(most, device)


def total_memory(device: torch.device) -> int:
    """Bytes of memory that a device has."""
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    return int(getattr(torch, device.type).get_device_properties(device).total_memory)


def ask_for_deterministic_kernels() -> None:
    """Have torch take deterministic kernels where it has them, and warn where not; float32 is float32 on every card.

    Not by use_deterministic_algorithms, which imports the compiler to tell it: the variable does, when it is imported.
    """
    torch.backends.cudnn.allow_tf32 = False  # torch's default for convolutions alone: 10 bits, and only on new cards
    torch.set_deterministic_debug_mode("warn")
    os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # costs a pass over memory


# ---------------------------------------------------------------- errors of the task, in words


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:SENTENCE_LIMIT]


def trace(error: BaseException) -> str:
    """The traceback as Python prints it, cut to its end where it is very long."""
    return "".join(traceback.format_exception(error))[-TRACEBACK_LIMIT:]


def explain(error: BaseException, hook: str, own_hook: bool, task: Path, config: dict[str, Any]) -> TaskError:
    """What the error event says about an exception that came out of the task's code.

    Args:
        error: what was raised.
        hook: what was called for: train, dataset …; "" while the file itself was imported.
        own_hook: the task file defines that function; if not, the sentence names the function of the file that failed.
        task: the task file.
        config: the task's configuration, for its batch size.
    """
    if isinstance(error, task_batches.OneSampleError):
        sentence = f"out of memory in {hook}() with as few samples as can be computed at once: {first_line(error)}"
        sentence += "; use a smaller model, smaller samples or a larger machine"
        return TaskError("out_of_memory", sentence, trace(error))
    if is_out_of_memory(error):
        sentence = f"out of memory in {hook}() at batch_size {config.get('batch_size')}: {first_line(error)}"
        return TaskError("out_of_memory", f"{sentence}; lower train.batch_size or use a smaller model", trace(error))
    if isinstance(error, SyntaxError):
        place = f"{Path(error.filename or task).name}, line {error.lineno}"
        return TaskError("bad_task", f"{type(error).__name__} in {place}: {error.msg}", trace(error))
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(task)]
    place = f"{task.name}, line {lines[-1].lineno}" if lines else task.name
    if hook == "dataset" and isinstance(error, FileNotFoundError):
        own_words = error.errno is None  # raised by the task, not by open()
        sentence = first_line(error) if own_words else f"FileNotFoundError in dataset(): {first_line(error)} ({place})"
        return TaskError("no_data", sentence, trace(error))
    if not hook:
        return TaskError("bad_task", f"{type(error).__name__} in {place}: {first_line(error)}", trace(error))
    where = hook if own_hook or not lines else lines[-1].name
    return TaskError("task_failed", f"{type(error).__name__} in {where}(): {first_line(error)} ({place})", trace(error))


# ---------------------------------------------------------------- the task file


class HouseHidden:
    """A finder that keeps the packages of this repository from the task, where both are installed side by side."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:  # noqa: ARG004
        """Look for one of our four names everywhere but at home; leave every other name to the usual finders."""
        if name not in HOUSE_NAMES:
            return None
        spec = PathFinder.find_spec(name, [entry for entry in sys.path if Path(entry).resolve() != HOUSE])
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return spec


@dataclass(frozen=True)
class Task:
    """A task file that was imported, and the configuration that its functions get."""

    file: Path
    module: ModuleType
    config: dict[str, Any]
    digest: str  # SHA-256 over the file, configuration and terms, as they were before the task's code ran
    terms: dict[str, Any] = field(default_factory=dict)  # what [train] says that no task has to know of

    def has(self, hook: str) -> bool:
        """Whether the file defines this optional function."""
        return callable(getattr(self.module, hook, None))

    def call(self, hook: str, *arguments: Any) -> Any:  # noqa: ANN401 - whatever the task returns
        """Call a function of the task file as it is; wrap it in `watched`."""
        return getattr(self.module, hook)(*arguments)

    @contextmanager
    def watched(self, hook: str) -> Iterator[None]:
        """Turn whatever the task's code raises into a TaskError that names the function, file and line."""
        try:
            yield
        except TaskError:
            raise
        except (Exception, SystemExit) as error:  # user code can raise anything, and the child lives on
            raise explain(error, hook, self.has(hook), self.file, self.config) from error


class FromSource(SourceFileLoader):
    """Runs a file's text as it was read once, and never a compiled copy that somebody has put beside it."""

    text = b""

    def read(self) -> bytes:
        """Read the file; what is run from now on is this."""
        self.text = Path(self.path).read_bytes()
        return self.text

    def get_code(self, fullname: str) -> CodeType:  # noqa: ARG002 - importlib's signature
        """The text, compiled."""
        code: CodeType = self.source_to_code(self.text, self.path)
        return code


def import_task(file: Path, config: dict[str, Any], terms: dict[str, Any] | None = None, allowed: str = "") -> Task:
    """Import a task file by its path. Files beside it can be imported by it.

    Args:
        file: the task file.
        config: what its functions get.
        terms: see Task.
        allowed: SHA-256 of the text that may be run, in hex; empty: whatever it is.

    Raises:
        TaskError: it cannot be imported, or lacks model() or dataset(); code bad_task.
    """
    folder = str(file.parent)
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that a file beside the task never hides the standard library or torch
    if file.suffix != ".py":
        raise TaskError("bad_task", f"{file.name} is not a Python file: its name must end in .py")
    loader = FromSource("lydian_task", str(file))
    spec = importlib.util.spec_from_file_location("lydian_task", file, loader=loader)
    assert spec is not None  # noqa: S101 - it has a loader
    seen = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    if terms:
        seen.update(json.dumps(terms, sort_keys=True).encode())
    module = importlib.util.module_from_spec(spec)
    task = Task(file=file, module=module, config=config, digest="", terms=terms or {})
    sys.modules[spec.name] = task.module  # dataclasses and typing look their module up while it is imported
    with task.watched(""):
        seen.update(loader.read())
        check_text(file, loader.text, allowed)
        loader.exec_module(task.module)
    missing = [f"{hook}({arguments})" for hook, arguments in REQUIRED_HOOKS.items() if not task.has(hook)]
    if missing:
        raise TaskError("bad_task", f"{file.name} does not define {' and '.join(missing)}")
    return replace(task, digest=seen.hexdigest())


def check_text(file: Path, text: bytes, allowed: str) -> None:
    """Make sure that a file's text is the one that may be run.

    Raises:
        TaskError: it is another one; code not_trusted.
    """
    found = hashlib.sha256(text).hexdigest()
    if allowed and found != allowed:
        raise TaskError("not_trusted", f"{file.name} is {found[:12]}… and not {allowed[:12]}…, which may run here")


REQUIRED_HOOKS = {"model": "config", "dataset": "config, split"}


def default_loss(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401 - the task's batch
    """Cross-entropy of model(x) against the class indices y, for a batch (x, y).

    Returns:
        the mean loss, 0-dim; the logits (N, C, …); the classes int64 (N, …).
    """
    if not (isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
        sentence = f"the default loss needs batches (x, y) of tensors, not {type(batch).__name__}"
        raise TaskError("bad_task", f"{sentence}: define loss(model, batch, config)")
    x, y = batch
    logits = model(x)
    classes = y if y.is_floating_point() else y.long()  # class probabilities stay what they are
    return nn.functional.cross_entropy(logits, classes), logits, classes


def loss_of(task: Task, model: nn.Module, batch: Any) -> Tensor:  # noqa: ANN401 - the task's batch
    """The task's loss of one batch, or the default one."""
    if task.has("loss"):
        loss: Tensor = task.call("loss", model, batch, task.config)
        return loss
    return default_loss(model, batch)[0]


def metrics_of(
    task: Task,
    model: nn.Module,
    batch: Any,  # noqa: ANN401 - the task's batch
    samples: int,
    *,
    per_class: bool = False,
) -> dict[str, tuple[float, float]]:
    """Sums and counts of one batch: the task's metrics(), else its loss(), else accuracy and cross-entropy.

    Args:
        task: the task; a loss() of its own says nothing about accuracy, so then only `loss` is measured.
        model: in evaluation mode.
        batch: on the model's device.
        samples: samples in the batch.
        per_class: the accuracy of each class as well; only where a task has neither a metrics() nor a loss().

    Returns:
        name -> (sum, count).
    """
    if task.has("metrics"):
        measured = task.call("metrics", model, batch, task.config)
        return {str(name): (float(total), float(count)) for name, (total, count) in measured.items()}
    if task.has("loss"):
        return {"loss": (float(task.call("loss", model, batch, task.config)) * samples, samples)}
    loss, logits, classes = default_loss(model, batch)
    wanted = classes.argmax(1) if classes.is_floating_point() else classes
    right = logits.argmax(1) == wanted
    of_classes: dict[str, tuple[float, float]] = task_classes.accuracies(wanted, right) if per_class else {}
    return {"accuracy": (float(right.sum()), right.numel()), "loss": (float(loss) * samples, samples), **of_classes}


def refuse_per_class(task: Task) -> None:
    """Make sure that the default metrics, which know of classes, are the ones that measure this task.

    Raises:
        TaskError: the file has its own; code bad_task.
    """
    own = next((hook for hook in ("metrics", "loss") if task.has(hook)), None)
    if own is not None:
        sentence = f"evaluation.per_class is measured by the default metrics, and {task.file.name} has its own {own}()"
        advice = "return accuracy/0 … from a metrics() there, or leave per_class out"
        raise TaskError("bad_task", f"{sentence}: {advice}")


def optimizer_of(task: Task, model: nn.Module) -> Any:  # noqa: ANN401 - a task may bring its own kind of optimiser
    """The task's optimiser, or AdamW or SGD by the job's [train], as it is before its first step."""
    config = task.config
    if task.has("optimizer"):
        return task.call("optimizer", model, config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    lr, decay = config.get("lr", 0.1), config.get("weight_decay", 0.0)
    if config.get("optimizer") == "adamw":
        betas = config.get("beta1", 0.9), config.get("beta2", 0.95)
        return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=decay)
    return torch.optim.SGD(parameters, lr=lr, momentum=config.get("momentum", 0.0), weight_decay=decay)


# ---------------------------------------------------------------- samples in their order


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators, on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # all that numpy takes
    torch.manual_seed(seed)


def pass_seed(seed: int, number: int) -> int:
    """A seed for one pass of a command, 63 bits; neighbouring seeds and passes share nothing."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:8], "little") >> 1


def pass_order(shard: Tensor, seed: int, number: int) -> Tensor:
    """The shard's samples in the order of one pass: of (seed, number of the pass) alone, the same on any device.

    Args:
        shard: int64 (samples,), indices into the dataset.
        seed: the command's seed.
        number: 0 for the first pass.

    Returns:
        int64 (samples,), a permutation of the shard.
    """
    generator = torch.Generator().manual_seed(pass_seed(seed, number))
    return shard[torch.randperm(len(shard), generator=generator)]


def batch_ends(samples: int, batch_size: int, *, join_last_one: bool) -> list[int]:
    """Where each batch of a pass ends. The last, smaller batch is kept.

    Args:
        samples: samples in the pass, at least one.
        batch_size: samples a batch.
        join_last_one: give a last batch of one sample to the batch before it. BatchNorm refuses to train on one
            sample, and dropping it would leave a sample out of the round.
    """
    ends = [*range(batch_size, samples, batch_size), samples]
    if join_last_one and len(ends) > 1 and ends[-1] - ends[-2] == 1 and batch_size > 1:
        del ends[-2]
    return ends


def row_reader(dataset: Dataset[Any]) -> Callable[[Tensor], list[Tensor]] | None:
    """A reader of whole batches by their indices, for tensors in memory (TensorDataset, or a Subset of one).

    It gives what DataLoader's default collation of the single samples gives, without a Python call a sample.

    Returns:
        indices int64 (n,) -> one tensor of n rows for each tensor of the dataset; None for any other dataset.
    """
    if type(dataset) is TensorDataset:
        tensors = dataset.tensors
        return lambda rows: [tensor[rows] for tensor in tensors]
    if type(dataset) is not Subset:  # a subclass may do more than choose
        return None
    inner, chosen = row_reader(dataset.dataset), torch.as_tensor(dataset.indices, dtype=torch.int64)
    return None if inner is None else lambda rows: inner(chosen[rows])


def to_device(batch: Any, device: torch.device) -> Any:  # noqa: ANN401 - any nesting of the task's
    """The batch with every tensor in it on the device; dicts, lists and tuples are walked, the rest is left alone."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)([to_device(value, device) for value in batch])
    return batch


def read_batches(
    dataset: Dataset[Any], parts: Sequence[Tensor], device: torch.device, *, workers: int, seed: int
) -> Iterator[Any]:
    """The batches with these indices, in this order, on the device.

    Draws nothing from torch's global generator, so that dropout does not depend on how the data is read.

    Args:
        dataset: map-style.
        parts: one int64 tensor of indices a batch.
        device: where the tensors go.
        workers: processes that read; 0 reads here. Tensors in memory are always read here.
        seed: what the random augmentation of those processes starts from.
    """
    rows = row_reader(dataset)
    if rows is not None:
        yield from (to_device(rows(part), device) for part in parts)
        return
    loader = DataLoader(
        dataset,
        batch_sampler=[part.tolist() for part in parts],
        num_workers=workers,
        generator=torch.Generator().manual_seed(seed),
        # Forked readers need no pickled dataset, whose class would have to be importable by name.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )
    yield from (to_device(batch, device) for batch in loader)


def labels_of(dataset: Any, told: Callable[[int], None]) -> Any:  # noqa: ANN401 - datasets have no common type for it
    """The label of every sample, from `targets`, `labels` or the second tensor, or else by looking at each sample.

    Args:
        dataset: map-style.
        told: called with the number of samples looked at.
    """
    if isinstance(dataset, Subset):
        return np.asarray(labels_of(dataset.dataset, told))[np.asarray(dataset.indices, dtype=np.int64)]
    for name in ("targets", "labels"):
        if hasattr(dataset, name):
            return getattr(dataset, name)
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1] if len(dataset.tensors) > 1 else None
    labels = []
    for index in range(len(dataset)):
        told(index)
        sample = dataset[index]
        if not isinstance(sample, list | tuple) or len(sample) < 2:
            return None
        labels.append(float(sample[1]))
    return labels


def label_array(dataset: Any, told: Callable[[int], None]) -> "np.ndarray[Any, np.dtype[np.int64]]":  # noqa: ANN401
    """The class of every sample, int64 (samples,).

    Raises:
        TaskError: the samples have no single whole number as their label; code bad_task.
    """
    found = labels_of(dataset, told)
    labels = np.asarray(found.cpu() if isinstance(found, Tensor) else found)
    whole = labels.dtype.kind in "iub" or (labels.dtype.kind == "f" and bool(np.all(labels == np.floor(labels))))
    if labels.shape != (len(dataset),) or not whole:
        sentence = "the train split has no class a sample (one whole number as `targets`, `labels` or second item)"
        raise TaskError("bad_task", f"{sentence}, so it cannot be cut by label: use partition iid or local")
    return labels.astype(np.int64)


def ids_of(dataset: Any, by: str) -> Any:  # noqa: ANN401 - datasets have no common type for it
    """The ids that a dataset has under a name, one a sample; a Subset has those of its samples.

    Raises:
        TaskError: it has none under that name; code bad_task.
    """
    if hasattr(dataset, by):
        found = getattr(dataset, by)
        return found.cpu() if isinstance(found, Tensor) else found
    if isinstance(dataset, Subset):
        return np.asarray(ids_of(dataset.dataset, by))[np.asarray(dataset.indices, dtype=np.int64)]
    kind = type(dataset).__name__
    sentence = f"the train split, a {kind}, has no attribute {by!r} with an id for each sample"
    raise TaskError("bad_task", f"{sentence}: set it in dataset(), or name another with [data] by")


def id_array(dataset: Any, by: str) -> "np.ndarray[Any, np.dtype[np.int64]]":  # noqa: ANN401 - a map-style dataset
    """The id of every sample as 0, 1, … in the order of the ids: of numbers by size, of texts by their characters.

    Raises:
        TaskError: they are not whole numbers or texts, or not one a sample; code bad_task.
    """
    ids = np.asarray(ids_of(dataset, by))
    if ids.shape != (len(dataset),) or ids.dtype.kind not in "iubU":
        kind = "texts" if ids.dtype.kind == "U" else str(ids.dtype)
        sentence = f"{by!r} of the train split has {kind} of shape {list(ids.shape)}"
        raise TaskError("bad_task", f"{sentence}, where a whole number or a text for each of {len(dataset)} is needed")
    return np.unique(ids, return_inverse=True)[1].astype(np.int64).reshape(-1)


# ---------------------------------------------------------------- the model's state as a file


@dataclass(frozen=True)
class Layout:
    """How a model's state is written: each tensor once, and what averaging must know about it.

    aliases: other name -> the name it is written under, for tied weights.
    variances: running variance -> its running mean, for normalisation layers with running statistics.
    buffers: floating-point tensors that no optimiser trains.
    rest: digest of the tensors that are not written, because model(config) builds them; empty: there are none.
    """

    aliases: dict[str, str]
    variances: dict[str, str]
    buffers: list[str]
    rest: str = ""

    def metadata(self) -> dict[str, str]:
        """One key alone: safetensors writes several in random order, and equal models must give equal bytes."""
        facts = {"aliases": self.aliases, "variances": self.variances, "buffers": self.buffers}
        facts |= {"rest": self.rest} if self.rest else {}
        return {"lydian": json.dumps(facts, sort_keys=True, separators=(",", ":"))}


def state_of(model: nn.Module, parts: Any = task_parts.WHOLE) -> tuple[dict[str, Tensor], Layout]:  # noqa: ANN401
    """The model's persistent tensors by name, tied ones under their first name only, and how they are written.

    Args:
        model: whose they are.
        parts: a task_parts.Parts: what of it stays is left out.

    Raises:
        TaskError: something in the state is not a plain tensor; code bad_task.
    """
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor) or nn.parameter.is_lazy(value) or value.layout != torch.strided:
            kind = type(value).__name__
            sentence = f"the model's state {name!r} is a {kind} and cannot travel: only dense tensors with a shape can"
            raise TaskError("bad_task", f"{sentence} (a lazy layer gets its shape from one batch inside model())")
    first: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in state.items():
        if tensor.numel():  # empty tensors have no memory to share
            place = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
            same = first.setdefault((tensor.device, *place, tensor.dtype, tensor.shape, tensor.stride()), name)
            if same != name:
                aliases[name] = same
    kept = {name: tensor for name, tensor in state.items() if name not in aliases and name not in parts.stays}
    aliases = {name: first for name, first in aliases.items() if first in kept}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)} - parts.untrained
    buffers = sorted(name for name, tensor in kept.items() if tensor.is_floating_point() and name not in parameters)
    return kept, Layout(aliases, running_variances(model, kept), buffers, parts.rest)


def running_variances(model: nn.Module, kept: dict[str, Tensor]) -> dict[str, str]:
    """Running variance -> running mean, of every BatchNorm, SyncBatchNorm and InstanceNorm that keeps them."""
    pairs = {}
    for prefix, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            dot = f"{prefix}." if prefix else ""
            if f"{dot}running_var" in kept and f"{dot}running_mean" in kept:
                pairs[f"{dot}running_var"] = f"{dot}running_mean"
    return pairs


def save_state(model: nn.Module, out: Path, parts: Any = task_parts.WHOLE) -> None:  # noqa: ANN401 - a task_parts.Parts
    """Write the model's state as safetensors: equal states give equal bytes, and a torn file never has the name."""
    kept, layout = state_of(model, parts)
    tensors = {}
    for name, tensor in kept.items():
        plain = tensor.detach().to("cpu").contiguous()
        owns_all = plain.untyped_storage().nbytes() == plain.numel() * plain.element_size()
        tensors[name] = plain if owns_all else plain.clone()  # safetensors refuses views into a larger storage
    unfinished = out.with_name(out.name + ".part")
    save_file(tensors, unfinished, metadata=layout.metadata())
    unfinished.replace(out)


def load_state(model: nn.Module, base: Path, parts: Any = task_parts.WHOLE) -> None:  # noqa: ANN401 - a task_parts.Parts
    """Load a file that save_state wrote into a model of the same shape; tied weights stay tied.

    Raises:
        TaskError: the file is not one of this model: other names, shapes or dtypes; code bad_task. What is not in the
            file was built otherwise on this machine; code no_data.
    """
    if parts.rest:
        check_rest(base, parts.rest)
    put_state(model, load_file(base), parts)


def check_rest(base: Path, rest: str) -> None:
    """Make sure that this machine's model is that of the file, in what the file does not have.

    Args:
        base: the file.
        rest: digest of what is built here.

    Raises:
        TaskError: it is not; code no_data: another worker may well have the right one.
    """
    with safe_open(base, framework="pt") as file:
        there = json.loads((file.metadata() or {}).get("lydian", "{}")).get("rest", "")
    if there != rest:
        sentence = f"what does not travel of the model is {rest[:12]}… here, built with torch {torch.__version__}, and"
        sentence += f" {there[:12]}… where the job began: give this machine the same pretrained weights and torch, or"
        raise TaskError("no_data", f"{sentence} seed what is drawn when it is built")


def put_state(model: nn.Module, tensors: dict[str, Tensor], parts: Any = task_parts.WHOLE) -> None:  # noqa: ANN401
    """Put tensors into a model, under the names that state_of gives them.

    Raises:
        TaskError: they are not those of this model: other names, shapes or dtypes; code bad_task.
    """
    kept, layout = state_of(model, parts)
    differences = [f"{name!r} is missing" for name in kept.keys() - tensors.keys()]
    differences += [f"{name!r} is not in the model" for name in tensors.keys() - kept.keys()]
    for name in kept.keys() & tensors.keys():
        here, there = kept[name], tensors[name]
        if (here.shape, here.dtype) != (there.shape, there.dtype):
            differences.append(f"{name!r} is {there.dtype} {list(there.shape)}, not {here.dtype} {list(here.shape)}")
    if differences:
        more = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
        raise TaskError(
            "bad_task", f"the global model does not fit the one that is built here: {min(differences)}{more}"
        )
    given = {**tensors, **{alias: tensors[name] for alias, name in layout.aliases.items()}}
    model.load_state_dict(given, strict=not parts.stays)  # what stays is not missing


# ---------------------------------------------------------------- training


@dataclass
class Context:
    """What a training loop gets to know, and how it tells where it is. The third argument of a task's train().

        def train(model, loader, context):
            while not context.done:
                for batch in loader:                       # one pass, on the device, in this round's order
                    context.optimizer.zero_grad()
                    loss = ...
                    loss.backward()
                    context.optimizer.step()
                    context.step(loss)

    Call `step` once an optimiser step. The loader ends by itself when the round is over, and a loop never has to ask
    which of epochs, steps and seconds the job gave. One of those three is set; the other two are None.

    Where a job has terms (`train.proximal`), they are added to the gradients between backward() and step(), and before
    the loop clips: `context.add_terms()`, once a step, after `context.scaler.unscale_(context.optimizer)` where that is
    used. A loop that does not is stopped at its first step, in words: the job's setting would have no effect.

    A killed worker trains such a loop from the start, unless the file says `RESUMABLE = True`: all that the loop
    remembers from one batch to the next is in the model's state_dict, in context.optimizer, and in what the loader and
    this context count; a batch is done with before the next one is asked for. Then it goes on from a checkpoint:
    train() is called again, and its loader begins in the middle.

    The default loop clips gradients (`clip`) and follows the job's schedule. A loop of a task's own does what it wants
    to: `global_step` is the number of the step under way in the whole job, `lr_factor` what the schedule makes of it.

                    for group in context.optimizer.param_groups:
                        group["lr"] = context.config["lr"] * context.lr_factor
    """

    device: torch.device
    config: dict[str, Any]
    seed: int
    round: int
    epochs: int | None
    steps: int | None
    seconds: float | None
    optimizer: Any
    _stepper: Any  # a task_batches.Stepper
    _events: Events
    _stopping: threading.Event
    _batches: int  # in one pass
    _began: float = field(default_factory=time.monotonic)
    _drawn: int = 0  # batches that the loader gave
    _settled: bool = True  # the last batch that it gave was stepped on, or its pass is over
    _batch_samples: int = 0  # in that batch
    _own_samples: int = 0  # of them, those of this rank
    _taken: int = 0  # calls of step()
    _samples: int = 0
    _loss_sum: float = 0.0
    _unread: list[tuple[Tensor, int]] = field(default_factory=list)  # losses that are still on the device
    _pass: int = 0  # number of the pass under way
    _at: int = 0  # batches given in that pass
    _resumed_at: int = 0  # the step of the checkpoint that this went on from
    round_steps: int | None = None  # that a round counts in the whole job; None: not known
    total_steps: int | None = None  # of the whole job; None: not known
    lr_scale: float = 1.0  # of the learning rate, where the batch size was found and not asked for
    _fresh: bool | None = None  # whether the optimiser began without the state of an earlier round; None: nobody asked
    _fresh_personal: bool | None = None  # likewise, the personal tensors
    _rates: list[Any] = field(default_factory=list)  # learning rate of each group of the optimiser, before any step
    _silent: bool = False  # example-level privacy: the loss is told to nobody
    _keep: Callable[["Context"], None] | None = None  # keeps a checkpoint if one is due; holds no context: no cycle
    _ranks: Any = field(default_factory=lambda: task_ranks.Alone(threading.Event()))  # those who train this together
    _terms: tuple[Callable[[], None], ...] = ()  # each adds one of the job's terms to the gradients
    _terms_added: bool = False  # since the last step
    _rate_sum: float | None = None  # of the learning rates of the steps that were taken; None: nobody asked
    _scale: float = 1.0  # of the loss in float16, in the step under way

    @property
    def global_step(self) -> int | None:
        """Optimiser steps of the whole job before this one, in this shard's place; None unless they are counted."""
        return None if self.round_steps is None else (self.round - 1) * self.round_steps + self._taken

    @property
    def scheduled(self) -> bool:
        """Whether the learning rate changes from step to step."""
        changes = self.config.get("schedule", "constant") != "constant" or self.config.get("warmup_steps", 0) > 0
        return self.total_steps is not None and self.round_steps is not None and changes

    @property
    def lr_factor(self) -> float:
        """What schedule and batch multiply the learning rate with in the step under way; 1.0 where neither does."""
        step = self.global_step
        if not self.scheduled or step is None or self.total_steps is None:
            return self.lr_scale
        factor: float = task_schedule.lr_factor(
            step,
            schedule=self.config.get("schedule", "constant"),
            warmup=self.config.get("warmup_steps", 0),
            total=self.total_steps,
            milestones=self.config.get("milestones", ()),
            gamma=self.config.get("gamma", task_schedule.GAMMA),
        )
        return self.lr_scale * factor

    def follow_schedule(self) -> None:
        """Set the learning rate of the step under way; where nothing changes it, leave it as it is."""
        if not self.scheduled and self.lr_scale == 1.0:
            return
        factor = self.lr_factor
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor

    def autocast(self) -> AbstractContextManager[Any]:
        """Inside, a forward pass computes in the job's precision, as far as this device can; for fp32, as always."""
        precision: AbstractContextManager[Any] = self._stepper.autocast()
        return precision

    @property
    def scaler(self) -> torch.amp.GradScaler:
        """Scales a loss in float16, as torch's documentation of mixed precision has it; otherwise it does nothing."""
        scaler: torch.amp.GradScaler = self._stepper.scaler
        return scaler

    def add_terms(self) -> None:
        """Add the job's terms to the gradients, which are unscaled and not clipped yet. Without terms, do nothing."""
        for term in self._terms:
            term()
        self._terms_added = True
        if self._rate_sum is not None and self.scaler.is_enabled():
            self._scale = self.scaler.get_scale()

    @property
    def done(self) -> bool:
        """Whether this round's training is as long as the job wants it."""
        if self.steps is not None:
            return self._taken >= self.steps
        if self.seconds is not None:
            began = self._settled and (self._taken or self._drawn) > 0  # one step at least
            return began and bool(self._ranks.time_is_up(time.monotonic() - self._began, self.seconds))
        return self._settled and self._drawn >= (self.epochs or 1) * self._batches

    def step(self, loss: Tensor | float, samples: int | None = None) -> bool:
        """Count one optimiser step, and report it when a report is due.

        Args:
            loss: the mean loss of the step's samples, one number; it may still be on the device.
            samples: how many samples the step used; by default those of the loader's last batch.

        Returns:
            whether there is more to do: `not done`.

        Raises:
            Stopped: the agent wants the training to end now. Let it through.
        """
        if self._stopping.is_set():
            raise Stopped
        if self._terms and not self._terms_added:
            sentence = "train() took a step without the job's terms (train.proximal and the like)"
            raise TaskError("bad_task", f"{sentence}: call context.add_terms() before each step of the optimiser")
        self._terms_added = False
        self._count_rate()
        count = self._batch_samples if samples is None else samples
        if not self._silent:
            value = torch.as_tensor(loss, dtype=torch.float32, device=self.device).detach().reshape(())
            self._unread.append((value, count))
        self._taken += 1
        self._samples += count
        self._settled = True
        if self._events.due("training"):
            self.report()
        return not self.done

    def _count_rate(self) -> None:
        """Add the learning rate of the step that was taken, if it was: in float16 the scale falls when one is skipped.

        Which of the numbers of the schedule it was does not matter, nor who set it: the optimiser has it still.
        """
        if self._rate_sum is None or (self.scaler.is_enabled() and self.scaler.get_scale() < self._scale):
            return
        self._rate_sum += self.optimizer.param_groups[0]["lr"]

    def report(self) -> None:
        """Tell the agent how far the training is, with the mean loss since the last report."""
        samples = sum(count for _, count in self._unread)
        loss = self.read_losses() / samples if samples else None
        elapsed = time.monotonic() - self._began
        total = (self.epochs or 1) * self._batches if self.seconds is None else None
        self._events.progress(
            "training",
            step=self._taken,
            steps=self.steps if self.steps is not None else total,
            samples=self._samples,
            samples_per_s=self._samples / elapsed if self._samples and elapsed else None,
            loss=loss,
            precision=self._stepper.used,
        )

    def read_losses(self) -> float:
        """Bring the losses over from the device, all in one wait, and return their sum over samples."""
        if not self._unread:
            return 0.0
        values = torch.stack([value for value, _ in self._unread]).tolist()
        recent = 0.0
        for value, (_, count) in zip(values, self._unread, strict=True):
            recent += value * count
            self._loss_sum += value * count  # one by one: the sum is the same whenever it was read
        self._unread.clear()
        return recent

    def result(self) -> dict[str, Any]:
        """What the done event says of the loop: steps, seconds, and the loss unless it is not finite."""
        self.read_losses()
        seconds = time.monotonic() - self._began
        loss: Metrics = {"train_loss": [self._loss_sum, self._samples]}
        has_loss = self._samples > 0 and not self._silent and math.isfinite(self._loss_sum)
        metrics = loss if has_loss else {}
        if self._fresh is not None:
            metrics["fresh_optimizer"] = [float(self._fresh), 1.0]
        if self._fresh_personal is not None:
            metrics["fresh_personal"] = [float(self._fresh_personal), 1.0]
        rates = {} if self._rate_sum is None else {"rate_sum": self._rate_sum}
        return {"steps": self._taken, "seconds": seconds, "metrics": metrics, "resumed_at": self._resumed_at, **rates}

    # What follows is between the loader and the context; a task has no use for it.

    def wants_more(self) -> bool:
        """Whether the loader is to give another batch. Before it does, a checkpoint is kept if one is due.

        Here and not in step(): whatever the loop does after step() is done now, and nothing was drawn for the next
        batch. Not between the batches of one step either: their gradients are in no checkpoint.
        """
        if self._stopping.is_set():
            raise Stopped
        if self.done:
            return False
        if self._keep is not None and self._settled and self._taken:
            self._keep(self)
        return True

    def gave(self, samples: int, own: int | None = None) -> None:
        """The loader gave a batch of so many samples, `own` of them to this rank (None: all)."""
        self._drawn, self._settled, self._batch_samples = self._drawn + 1, False, samples
        self._own_samples = samples if own is None else own
        self._at += 1

    def of_all_ranks(self, loss: Tensor | None) -> Any:  # noqa: ANN401 - a Tensor
        """The loss of the whole batch, and its gradients in the model: this rank had a part of it, or None."""
        elapsed = time.monotonic() - self._began
        return self._ranks.mean(loss, self._own_samples, elapsed, self.seconds)

    def next_pass(self) -> None:
        """The loader begins another pass."""
        self._pass, self._at = self._pass + 1, 0

    def place(self) -> tuple[int, int]:
        """The pass under way, and how many of its batches were given."""
        return self._pass, self._at

    def passed(self) -> None:
        """The loader is through with a pass."""
        self._settled = True

    def position(self) -> dict[str, Any]:
        """Where the training is, between two steps: what `go_on_from` takes."""
        self.read_losses()
        return {
            "pass": self._pass,
            "at": self._at,
            "drawn": self._drawn,
            "batch_samples": self._batch_samples,
            "taken": self._taken,
            "samples": self._samples,
            "loss_sum": self._loss_sum,
            "elapsed_s": time.monotonic() - self._began,
            "fresh": self._fresh,
            "fresh_personal": self._fresh_personal,
            "rate_sum": self._rate_sum,
            "stepper": self._stepper.state(),
        }

    def go_on_from(self, position: dict[str, Any]) -> None:
        """Go on in the middle: the clock too, so that `seconds` are seconds of training."""
        self._pass, self._at, self._drawn = position["pass"], position["at"], position["drawn"]
        self._batch_samples, self._taken = position["batch_samples"], position["taken"]
        self._samples = position["samples"]
        self._loss_sum = position["loss_sum"]
        self._began = time.monotonic() - position["elapsed_s"]
        self._resumed_at = self._taken
        self._fresh = position.get("fresh", self._fresh)
        self._fresh_personal = position.get("fresh_personal", self._fresh_personal)
        self._rate_sum = position.get("rate_sum", self._rate_sum)
        if "stepper" in position:
            self._stepper.go_on_from(position["stepper"])


class ShardLoader:
    """The worker's share of the data, in batches on the device. Each iteration is the next pass, in its own order."""

    def __init__(self, dataset: Dataset[Any], shard: Tensor, ends: Sequence[int], context: Context) -> None:
        self._dataset = dataset
        self._shard = shard
        self._ends = ends
        self._context = context
        self._begun = False  # whether the pass of the context is under way already

    def __len__(self) -> int:
        """Batches in one pass."""
        return len(self._ends)

    def __iter__(self) -> Iterator[Any]:
        """One pass over the shard; shorter when the round is over before, or when it goes on in the middle of one.

        A pass that goes on gives the very batches that were left, also where the dataset draws from the global
        generators of Python, numpy or torch. Only in `loader_workers`, and from a generator of the dataset's own, it
        draws other numbers than it would have; each sample is still given as often.
        """
        context = self._context
        if self._begun:
            context.next_pass()
        self._begun = True
        number, first = context.place()
        ranks, workers = context._ranks, context.config.get("loader_workers", 0)
        seed = ranks.own_seed(pass_seed(context.seed, number))
        parts = torch.tensor_split(pass_order(self._shard, context.seed, number), self._ends[:-1])[first:]
        own = [ranks.part(part) for part in parts]
        read = [part for part in own if len(part)]
        batches = read_batches(self._dataset, read, context.device, workers=workers, seed=seed)
        for place, part in enumerate(parts):
            if not context.wants_more():
                return
            ranks.seed_step(context.seed, number, first + place)
            batch = next(batches) if len(own[place]) else None  # a batch of fewer samples than there are ranks
            context.gave(len(part), len(own[place]))
            yield batch
        context.passed()


def default_train(task: Task, model: nn.Module, loader: ShardLoader, context: Context) -> None:
    """Forward, backward, step, until the round is over."""
    stepper, clip = context._stepper, context.config.get("clip")

    def before_step() -> None:
        context.add_terms()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        context.follow_schedule()

    def clear() -> None:
        context.optimizer.zero_grad(set_to_none=True)

    while not context.done:
        for batch in loader:
            loss = None
            if batch is not None:
                loss = stepper.gradients(partial(loss_of, task, model), batch, context._own_samples, clear)
            else:  # this rank has no part of a small batch
                clear()
                stepper.scaler.scale(torch.zeros((), device=context.device))
            loss = context.of_all_ranks(loss)
            stepper.step(context.optimizer, before_step)
            context.step(loss)


# ---------------------------------------------------------------- the commands


def fresh_optimizer(task: Task, model: nn.Module, seed: int) -> Any:  # noqa: ANN401 - a task may bring its own kind
    """Have a model that was just loaded ready to be trained by the optimiser that is returned."""
    seed_everything(seed)  # after model and data were built: those that were kept have drawn no numbers
    model.train()
    model.zero_grad(set_to_none=True)
    with task.watched("optimizer" if task.has("optimizer") else "model"):
        return optimizer_of(task, model)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether the model has a layer that cannot be trained on one sample."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def optimizer_digest(optimizer: Any, model: nn.Module) -> str:  # noqa: ANN401 - a task may bring its own kind
    """A digest of the kind of optimiser and of the model's parameters: only with the same one does a state fit."""
    kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    parameters = [[name, list(p.shape), str(p.dtype), p.requires_grad] for name, p in model.named_parameters()]
    return hashlib.sha256(json.dumps([kind, parameters]).encode()).hexdigest()


def why_not_resumable(task: Task, optimizer: Any) -> str | None:  # noqa: ANN401 - a task may bring its own kind
    """Why a training loop could not go on from a checkpoint; None: it can.

    The default loop can. A task's own train() may remember things that nobody else knows of: it can where the file
    says `RESUMABLE = True` (see Context). `RESUMABLE = False` is for hooks that remember things, such as a schedule
    that counts in loss() or sits beside the optimiser.
    """
    if getattr(task.module, "RESUMABLE", not task.has("train")) is not True:
        return f"{task.file.name} does not say RESUMABLE = True"
    if not all(callable(getattr(optimizer, name, None)) for name in ("state_dict", "load_state_dict")):
        return f"the optimiser, a {type(optimizer).__name__}, has no state_dict() and load_state_dict()"
    return None


def identity(task: Task, device: torch.device, facts: list[Any], shard: Tensor) -> str:
    """A digest of all that decides what a train command does: two with the same one may share a checkpoint.

    Args:
        task: the task, whose digest is that of the file and the configuration.
        device: the kind counts, since its generator's state is in the checkpoint.
        facts: base model, seed, round and lengths; plain values.
        shard: int64 (samples,).
    """
    seen = hashlib.sha256(json.dumps([task.digest, facts, device.type, torch.__version__]).encode())
    seen.update(shard.numpy().data)
    return seen.hexdigest()


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Host:
    """Carries out commands, and keeps the task, its model and its data between them."""

    def __init__(
        self,
        device: torch.device,
        events: Events,
        stopping: threading.Event,
        ranks: Any = None,  # noqa: ANN401 - a task_ranks.Alone
    ) -> None:
        self._device = device
        self._events = events
        self._ranks = ranks or task_ranks.Alone(stopping)
        self._stopping = self._ranks.stopping
        self._task: Task | None = None
        self._model: nn.Module | None = None
        self._parts: Any = task_parts.WHOLE  # of that model
        self._first: dict[str, Tensor] = {}  # its personal tensors as they were built
        self._marks: Any = {}  # of what is built and never trained, as it was when a base was loaded
        self._splits: dict[str, Any] = {}
        self._measures: int | None = None  # samples at once that an evaluation found room for; None: any, so far
        self._said: str | None = None  # why this task's training cannot be resumed: said once, not once a round
        self._computes: tuple[str, str] | None = None  # in which precision, and why: said when it changes
        self._facts: Any = None  # of the device, for the choice of a precision
        self._many = task_stacked.Many(self, sys.modules[__name__])
        self.inbox: Any = queue.Queue()  # where commands come from: a script's loop takes them itself
        self._commands: dict[str, Callable[..., dict[str, Any]]] = {
            "open": self.open,
            "init": self.init,
            "describe": self.describe,
            "probe": self.probe,
            "train": self.train,
            "evaluate": self.evaluate,
            "train_many": self.train_many,
            "close": self.close,
        }

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """The one event that ends a command."""
        name = command.pop("do")
        if name not in self._commands:
            return failure(TaskError("worker_error", f"the training process knows no command {name!r}"))
        own_loop = self._task.file.name if self._task is not None and self._task.has("train") else ""
        try:
            return {"event": "done", **self._ranks.carry_out(name, self._commands[name], command, own_loop)}
        except Stopped:
            return {"event": "stopped"}
        except TaskError as error:
            return failure(error)
        except Exception as error:  # noqa: BLE001 - a full disk, a torn file, a bug of ours: told to the agent, not lost
            return failure(unexpected(error, name))

    def open(
        self, task: str, config: dict[str, Any], terms: dict[str, Any] | None = None, allowed: str = ""
    ) -> dict[str, Any]:
        """Import the task file; forget the one before, its model and its data. A script is run, to its end."""
        self._events.progress("loading")
        self._task, self._splits, self._said, self._computes = None, {}, None, None
        self._measures = None
        self._forget_model()
        self._many = task_stacked.Many(self, sys.modules[__name__])
        if terms is not None and "script" in terms:
            answer: dict[str, Any] = task_script.run(
                sys.modules[__name__], self, Path(task).resolve(), config, terms, allowed
            )
            return answer
        self._task = import_task(Path(task).resolve(), config, terms, allowed)
        if "drift" in self._task.terms and self._task.has("optimizer"):
            raise self._unfit(f"{self._task.file.name} has its own optimizer(): leave it out")
        return {}

    def close(self) -> dict[str, Any]:
        """Forget the task, its model and its data."""
        self._task, self._splits, self._said = None, {}, None
        self._forget_model()
        task_device.give_back_memory(self._device)
        return {}

    def init(
        self,
        seed: int,
        out: str,
        labels: str | None,
        per_class: bool = False,
        splits: Sequence[str] = ("test",),
        base: str = "",
    ) -> dict[str, Any]:
        """Build the model from the seed, on the CPU, and write it; count what there is to train on.

        Args:
            seed: of the model.
            out: path of what is written.
            labels: as `describe` takes it.
            per_class: as `evaluate` takes it; refused here already where it cannot be.
            splits: likewise.
            base: path of what the model begins with, in place of what the seed gives it; empty: nothing is given.
        """
        self._events.progress("loading")
        if per_class:
            refuse_per_class(self._opened())
        self._forget_model()
        model = self._built(seed)
        if base:
            task_given.put(sys.modules[__name__], model, Path(base), self._parts)
        save_state(model, Path(out), self._parts)
        facts, test = self.describe(labels), self._first_split(splits)
        if test is None and "test" not in splits:
            sentence = "evaluation.scope = workers measures on each worker's own test data, and dataset(config, "
            raise TaskError("bad_task", f"{sentence}'{splits[0]}') gives none: define that split, or have private data")
        return {
            "parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
            "test_samples": 0 if test is None else len(test),
            **facts,
        }

    def describe(self, labels: str | None, by: str | None = None) -> dict[str, Any]:
        """Count the training samples, and write the class of each, or its id, where the shards are cut by that.

        Args:
            labels: path of what is written, int64 (samples,) .npy; None: nothing is.
            by: the attribute of the dataset that has the ids; None: the classes are meant.
        """
        self._events.progress("loading")
        train = self._split("train")
        if labels is not None:
            self._write_labels(train, Path(labels), by)
        return {"train_samples": len(train)}

    def train(
        self,
        base: str,
        indices: str | None,
        out: str,
        seed: int,
        round: int,  # noqa: A002 - the command's word
        epochs: int | None = None,
        steps: int | None = None,
        seconds: float | None = None,
        total_steps: int | None = None,
        job_rounds: int | None = None,
        largest_shard: int | None = None,
        optimizer: str | None = None,
        optimizer_from: str = "",
        optimizer_of: int = 0,
        personal: str | None = None,
        personal_from: str = "",
        personal_of: int = 0,
        checkpoint: str | None = None,
        checkpoint_every_s: float = 0.0,
        base_digest: str = "",
        batch_size: int | None = None,
        fits: int | None = None,
        private: dict[str, Any] | None = None,
        correction: str = "",
    ) -> dict[str, Any]:
        """Train the base model on a shard and write what came out. Without a length: one epoch.

        Args:
            base: path of the model to train.
            indices: path of the shard's samples, int64 .npy; None: all there are.
            out: path of what comes out.
            seed: of all generators.
            round: for the task's own loop.
            epochs: length in passes; one of the three lengths is set, at most.
            steps: length in optimiser steps.
            seconds: length in seconds of training, those before a kill counted in.
            total_steps: optimiser steps of the whole job, for the schedule; None: not known.
            job_rounds: rounds of the whole job, where its steps follow from the passes over its shards.
            largest_shard: samples in the largest of those, whose steps are then those that a round counts for all.
            optimizer: path of what becomes of the optimiser's state in the end; None: it is not kept.
            optimizer_from: path of the state that an earlier round of this shard left.
            optimizer_of: the round that must have left it; 0: none did. Without it, the optimiser begins fresh.
            personal: path of what becomes of the personal tensors; None: they are not kept.
            personal_from: path of those that an earlier round of this shard left.
            personal_of: the round that must have left them; 0: none did. Without, they begin as they were built.
            checkpoint: path of a file: this command goes on from what it left there when it was killed, leaves others
                there from time to time, and removes them when `out` is written. None: it does nothing of the kind.
            checkpoint_every_s: seconds between two checkpoints, and before the first.
            base_digest: what the base is known by; without one, the file is hashed.
            batch_size: samples a step, as `probe` found them; None: as the configuration says.
            fits: samples that fit into memory at once, as an earlier `train` found; None: all of a batch, so far.
            private: DP-SGD, as task_private.train takes it; None: no such thing.
            correction: path of what is added to each gradient, where the job has `train.drift`; empty: nothing yet.
        """
        self._events.progress("loading")
        task, ranks = self._sized(batch_size), self._ranks
        dataset = ranks.first_rank_0(partial(self._split, "train"))
        shard = read_shard(indices, len(dataset))
        model = self._loaded(base, seed)
        if private is not None:
            task_private.check(sys.modules[__name__], task, model.train(), ranks)
        ranks.begin(model)
        terms = (*self._drift(model, correction), *self._terms(model))
        batch, join = int(task.config.get("batch_size", 32)), has_batch_norm(model)
        ends, round_steps = batch_ends(len(shard), batch, join_last_one=join), steps
        if job_rounds is not None and largest_shard is not None:
            round_steps = (epochs or 1) * len(batch_ends(largest_shard, batch, join_last_one=join))
            total_steps = job_rounds * round_steps
        optimizer_made = fresh_optimizer(task, model, seed)
        if "drift" in task.terms and (unfit := task_drift.why_not_plain(optimizer_made)) is not None:
            raise self._unfit(f"[config] makes it {unfit}: leave its keys of [train] out")
        stepper = self._stepper(model, optimizer_made)
        stepper.fits = fits
        if not task.has("train"):
            stepper.used = stepper.precision
        context = Context(
            device=self._device,
            config=task.config,
            seed=seed,
            round=round,
            epochs=1 if epochs is None and steps is None and seconds is None else epochs,
            steps=steps,
            seconds=seconds,
            optimizer=optimizer_made,
            _stepper=stepper,
            _events=self._events,
            _stopping=self._stopping,
            _batches=len(ends),
            round_steps=round_steps,
            total_steps=total_steps,
            _ranks=ranks,
            _terms=terms,
            _silent=private is not None,
            _rate_sum=0.0 if "drift" in task.terms else None,
        )
        if batch_size is not None:
            adaptive = not isinstance(optimizer_made, torch.optim.SGD)
            context.lr_scale = task_batches.lr_scale(min(batch_size, len(shard)), adaptive=adaptive)
        context._rates = [group.get("lr") for group in getattr(context.optimizer, "param_groups", [])]
        if optimizer is not None:
            context._fresh = True
        if self._parts.personal:
            context._fresh_personal = True
        kept, began = None, False
        if checkpoint is not None and self._resumable(context.optimizer):
            base_digest = base_digest or digest_of_file(Path(base))
            facts = [base_digest, seed, round, context.epochs, steps, seconds, total_steps, optimizer_of, batch_size]
            facts += [personal_of] if self._parts.personal else []
            facts += [ranks.world] if ranks.joint else []  # other ranks draw other numbers
            facts += [private] if private is not None else []
            facts += [digest_of_file(Path(correction))] if correction else []
            command = identity(task, self._device, facts, shard)
            kept = task_checkpoint.Checkpoint(Path(checkpoint), checkpoint_every_s, command, self._device)
            began = self._go_on(kept, model, Path(base), context)
            context._keep = partial(self._keep, kept, model)
        if optimizer_of and not began:  # one state at a time is in memory: a checkpoint has its own
            self._take_up(Path(optimizer_from), optimizer_of, model, context)
        if self._parts.personal and personal_of and not began:
            context._fresh_personal = not self._take_personal(model, Path(personal_from), personal_of)
        fresh = context._fresh, context._fresh_personal
        ranks.agree("where to begin", context.place(), context._taken, *fresh, len(dataset))
        context.report()
        loader, cost = ShardLoader(dataset, shard, ends, context), None
        with task.watched("train"):
            if private is not None:
                cost = task_private.train(sys.modules[__name__], task, model, dataset, shard, context, private)
            elif task.has("train"):
                task.call("train", model, loader, context)
            else:
                default_train(task, model, loader, context)
            result = context.result()
        if not result["steps"]:
            raise TaskError("task_failed", "train() returned and never called context.step(loss) after a step")
        if result.get("rate_sum") == 0:
            sentence = f"none of the {result['steps']} steps was taken: their gradients were not finite in fp16"
            raise TaskError("task_failed", f"{sentence}; take more steps a round, or train.precision = fp32")
        model.zero_grad(set_to_none=True)
        self._check_built(model)
        if ranks.rank == 0:  # all have the same
            save_state(model, Path(out), self._parts)
            if personal is not None:
                self._leave_personal(Path(personal), model, round)
            if optimizer is not None:
                self._leave(Path(optimizer), model, context)
            if kept is not None:
                kept.remove()
        if stepper.skipped:
            sentence = f"{stepper.skipped} of {result['steps']} steps were skipped: their gradients were not finite"
            task_batches.say(sentence, about="precision")
        reason = self._computes[1] if self._computes else ""
        if stepper.used != stepper.precision:
            reason = f"its own train() does not ask for {stepper.precision}, by `with context.autocast():`"
        used = {"precision": stepper.used, "precision_reason": reason}
        return {"samples": len(shard), **result, **used, "fits": stepper.fits, "private": cost}

    def probe(self, base: str, indices: str | None, seed: int) -> dict[str, Any]:
        """Find the batch for this device: the largest that its memory has room for, within what a shard is good for.

        Steps are taken with the job's own model, loss and optimiser, on the shard's own samples; nothing of them stays.

        Args:
            base: path of the model.
            indices: path of the shard's samples, int64 .npy; None: all there are.
            seed: of all generators.

        Returns:
            `batch_size`, and `why` that many; `samples_per_s` of the whole step, or None where a task's own train()
            decides what a step is.
        """
        self._events.progress("measuring")
        task, dataset = self._opened(), self._split("train")
        shard = read_shard(indices, len(dataset))
        if task.has("train"):
            why = "the task has its own train(): what a step of it takes cannot be tried"
            return {"batch_size": min(task_batches.REFERENCE, len(shard)), "why": why, "samples_per_s": None}
        model = self._loaded(base, seed)
        terms, optimizer = self._terms(model), fresh_optimizer(task, model, seed)
        stepper, order, began = self._stepper(model, optimizer), pass_order(shard, seed, 0), time.monotonic()
        done = 0

        def step(size: int) -> None:
            nonlocal done
            if self._stopping.is_set():
                raise Stopped
            rows = order[torch.arange(done, done + size) % len(order)]
            (batch,) = read_batches(dataset, [rows], self._device, workers=0, seed=seed)
            optimizer.zero_grad(set_to_none=True)
            stepper.once(partial(loss_of, task, model), batch)
            stepper.step(optimizer, lambda: [term() for term in terms])
            done += size
            self._events.progress("measuring", samples=done, samples_per_s=done / (time.monotonic() - began))

        with task.watched("train"):
            found, rate = task_batches.find(
                step, shard=len(shard), least=stepper.least, device=self._device, memory=task_device
            )
        model.zero_grad(set_to_none=True)
        task_batches.say(f"{found.batch_size} samples a step ({rate:,.0f} samples/s): {found.why}", about="batch")
        return {"batch_size": found.batch_size, "why": found.why, "samples_per_s": rate}

    def _drift(self, model: nn.Module, path: str) -> tuple[Callable[[], None], ...]:
        """What adds a shard's correction to the gradients; where there is none yet it is a term all the same."""
        if "drift" not in self._opened().terms:
            return ()
        try:
            given = task_drift.read(path, model, state_of(model)[1].aliases)
        except task_drift.UnfitError as error:
            raise self._unfit(str(error)) from error
        return (partial(task_drift.add, given, model),)

    def _unfit(self, why: str) -> TaskError:
        return TaskError("bad_task", f"train.drift = {self._opened().terms['drift']} needs plain SGD: {why}")

    def _terms(self, model: nn.Module) -> tuple[Callable[[], None], ...]:
        """What adds the job's terms to the gradients of this model, in which the round's base is now."""
        config = self._opened().terms
        base = task_terms.base_of(config, model, self._parts.personal)
        return tuple(partial(term, model) for term in task_terms.terms_of(config, base))

    def _sized(self, batch_size: int | None) -> Task:
        """The task that is open, its configuration with the batch that was found for it."""
        task = self._opened()
        if batch_size is not None:
            task = self._task = replace(task, config={**task.config, "batch_size": batch_size})
        return task

    def _stepper(self, model: nn.Module, optimizer: Any) -> Any:  # noqa: ANN401 - gives a task_batches.Stepper
        """What takes the steps of this model, in the precision of the job on this device. Says it when it changes."""
        if self._facts is None:
            self._facts = task_device.facts_of(self._device, task_precision)
        asked = self._opened().config.get("precision", "fp32")
        choice = task_precision.unless_unfit(
            task_precision.choose(asked, self._facts),
            dtypes={str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad},
            plain_optimizer=isinstance(optimizer, torch.optim.Optimizer),
        )
        if choice != self._computes and asked != "fp32":
            own = ", where its own train() asks for it" if self._opened().has("train") else ""
            task_batches.say(f"{choice[0]}{own}: {choice[1]}", about="precision")
        self._computes = choice
        least = 2 if has_batch_norm(model) else 1
        return task_batches.Stepper(self._device, choice[0], task_device, least=least)

    def _resumable(self, optimizer: Any) -> bool:  # noqa: ANN401 - a task may bring its own kind
        """Whether training can go on from a checkpoint; if not, says so once for each task."""
        why_not = why_not_resumable(self._opened(), optimizer)
        if why_not not in {None, self._said}:
            task_checkpoint.say(f"none are kept, a shard that is broken off starts anew: {why_not}")
            self._said = why_not
        return why_not is None

    def _take_up(self, path: Path, round_index: int, model: nn.Module, context: Context) -> None:
        """Give the optimiser the state that an earlier round of this shard left; without it, leave it fresh."""
        task = self._opened()
        try:
            state = task_checkpoint.read_optimizer(path, optimizer_digest(context.optimizer, model), round_index)
        except (OSError, task_checkpoint.UnusableError) as error:
            task_checkpoint.say(f"begins fresh: what was kept is {error}", about="optimizer")
            return
        try:
            with task.watched("optimizer"):
                context.optimizer.load_state_dict(state)
        except TaskError as error:
            task_checkpoint.say(f"begins fresh: what was kept cannot be put back: {error}", about="optimizer")
            context.optimizer = fresh_optimizer(task, model, context.seed)
            return
        context._fresh = False

    def _leave(self, path: Path, model: nn.Module, context: Context) -> None:
        """Keep the optimiser's state for the next round. Where it cannot be kept, that round begins fresh."""
        try:
            with self._opened().watched("optimizer"):
                state = context.optimizer.state_dict()
            task_checkpoint.write_optimizer(path, optimizer_digest(context.optimizer, model), context.round, state)
        except (OSError, TaskError, task_checkpoint.UnkeepableError) as error:
            task_checkpoint.say(f"its state is not kept, the next round begins fresh: {error}", about="optimizer")
            task_checkpoint.unlink(task_checkpoint.part_of(path))
            task_checkpoint.unlink(path)

    def _go_on(self, kept: Any, model: nn.Module, base: Path, context: Context) -> bool:  # noqa: ANN401 - a Checkpoint
        """Put everything where the checkpoint has it; without one that can be put back, leave it as it began.

        Returns:
            whether there was one.
        """
        saved = kept.read()
        if saved is None:
            return False
        task = self._opened()
        try:
            put_state(model, saved.model, self._parts.here)
            with task.watched("optimizer"):
                context.optimizer.load_state_dict(saved.optimizer)
        except TaskError as error:
            task_checkpoint.say(f"it cannot be gone on from, training starts from the base: {error}")
            kept.remove()
            self._load(model, base)
            context.optimizer = fresh_optimizer(task, model, context.seed)
            return False
        context.go_on_from(saved.position)
        task_checkpoint.set_generators(saved.generators, self._device)  # last: what was put back may have drawn
        task_checkpoint.say(f"going on at step {saved.position['taken']}")
        return True

    def _keep(self, kept: Any, model: nn.Module, context: Context) -> None:  # noqa: ANN401 - a Checkpoint
        """Keep a checkpoint, if one is due: rank 0's holds for all."""
        if self._ranks.rank or not kept.due:
            return
        try:
            with self._opened().watched("optimizer"):
                optimizer = context.optimizer.state_dict()
        except TaskError as error:  # an optimiser that trains is good enough to train with
            kept.give_up(str(error))
            return
        kept.write(state_of(model, self._parts.here)[0], optimizer, context.position())

    def train_many(self, **command: Any) -> dict[str, Any]:  # noqa: ANN401 - as task_stacked.Many takes them
        """Train the base model on many shards."""
        answer: dict[str, Any] = self._many.train(**command)
        return answer

    def evaluate(
        self,
        base: str,
        batch_size: int,
        per_class: bool = False,
        splits: Sequence[str] | None = None,
        personal_from: str = "",
    ) -> dict[str, Any]:
        """Measure the base model on a whole test split. Sums that are not finite are left out.

        Args:
            base: path of the model.
            batch_size: samples at once; fewer where memory does not take them, with the same sums.
            per_class: the accuracy of each class as well.
            splits: those of this worker's own test data, of which the first that there is counts; where there is none,
                nothing is measured, of 0 samples. None: the split `test`, which must be there.
            personal_from: path of personal tensors that training has left here; without, they are as they were built.
        """
        self._events.progress("loading")
        task, ranks = self._opened(), self._ranks
        if per_class:
            refuse_per_class(task)
        dataset = ranks.first_rank_0(partial(self._first_split, splits or ("test",)))
        if dataset is None or not len(dataset):
            if splits is not None:
                return {"metrics": {}, "samples": 0, "seconds": 0.0}
            raise TaskError("bad_task", "there is nothing to evaluate on: dataset(config, 'test') has no samples")
        model = self._loaded(base, seed=0)
        fresh = self._parts.personal and not (personal_from and self._take_personal(model, Path(personal_from)))
        seed_everything(0)
        model.eval()
        began = time.monotonic()
        ends = batch_ends(len(dataset), batch_size, join_last_one=False)
        parts = torch.tensor_split(torch.arange(len(dataset)), ends[:-1])
        workers = task.config.get("loader_workers", 0)
        stepper = task_batches.Stepper(self._device, "fp32", task_device)
        stepper.fits = self._measures
        measure, measured = partial(metrics_of, task, model, per_class=per_class), []
        with torch.no_grad(), task.watched("metrics"):
            own = ranks.own_batches(parts)
            for number, batch in enumerate(read_batches(dataset, own, self._device, workers=workers, seed=0)):
                if self._stopping.is_set():
                    raise Stopped
                measured.append(stepper.measured(measure, batch, len(own[number])))
                self._measures = stepper.fits
                ranks.keep_pace()
                step = min((number + 1) * ranks.world, len(parts))
                rate = ends[step - 1] / max(time.monotonic() - began, 1e-9)
                self._events.progress(
                    "evaluating", step=step, steps=len(parts), samples=ends[step - 1], samples_per_s=rate, loss=None
                )
        sums: Metrics = {}
        for metrics in ranks.gathered(measured, len(parts)):
            for name, (total, count) in metrics.items():
                held = sums.setdefault(name, [0.0, 0.0])
                held[0], held[1] = held[0] + total, held[1] + count
        if self._parts.personal:
            sums["fresh_personal"] = [float(fresh), 1.0]
        usable = {name: held for name, held in sums.items() if all(map(math.isfinite, held))}
        return {"metrics": usable, "samples": len(dataset), "seconds": time.monotonic() - began}

    def _opened(self) -> Task:
        """The task that is open."""
        if self._task is None:
            raise TaskError("worker_error", "no task is open: the agent must send 'open' first")
        return self._task

    def _built(self, seed: int) -> nn.Module:
        """The model: the one kept, else a new one, built on the CPU from the seed."""
        task = self._opened()
        if self._model is not None and task_parts.changed(self._marks, self._model) is not None:
            self._forget_model()  # a command that failed has left it so
        if self._model is None:
            seed_everything(task.terms.get("seed", seed))
            with task.watched("model"):
                model = task.call("model", task.config)
            if not isinstance(model, nn.Module):
                raise TaskError("bad_task", f"model(config) gives a {type(model).__name__}, not a torch.nn.Module")
            self._parts = self._parted(model)
            self._first = {name: t.cpu().clone() for name, t in task_parts.personal_of(model, self._parts).items()}
            self._model = model
        return self._model

    def _forget_model(self) -> None:
        self._model, self._parts, self._first, self._marks = None, task_parts.WHOLE, {}, {}

    def _parted(self, model: nn.Module) -> Any:  # noqa: ANN401 - a task_parts.Parts
        """Freeze what the job freezes in a model that was just built; which of its tensors travel and which stay."""
        terms = self._opened().terms
        if not terms.keys() & {"frozen", "personal", "trainable_only"}:
            return task_parts.WHOLE
        try:
            task_parts.freeze(model, terms.get("frozen", ()))
            return task_parts.parts_of(terms, model, state_of(model)[1].aliases)
        except task_parts.UnfitError as error:
            raise TaskError("bad_task", str(error)) from error

    def _load(self, model: nn.Module, base: Path) -> None:
        """Put the base file into the model, and its personal tensors back to what they were when it was built."""
        load_state(model, base, self._parts)
        task_parts.put(model, self._first)

    def _check_built(self, model: nn.Module) -> None:
        """Make sure that what does not travel was not trained either.

        Raises:
            TaskError: it was; code bad_task.
        """
        name = task_parts.changed(self._marks, model)
        if name is not None:
            self._forget_model()
            sentence = f"{name!r} changes while the model trains, and train.trainable_only lets only parameters with"
            sentence += " requires_grad and the running statistics of normalisation layers travel: what it learns would"
            raise TaskError("bad_task", f"{sentence} be lost; train it, keep it as it is, or leave trainable_only out")

    def _take_personal(self, model: nn.Module, path: Path, round_index: int | None = None) -> bool:
        """Give the model the personal tensors that an earlier round left here; without them, leave it as it is.

        Args:
            model: on its device.
            path: of what was left.
            round_index: the round that must have left it; None: any.

        Returns:
            whether they were there.
        """
        kind = task_parts.kind_of(self._first)
        try:
            tensors = task_checkpoint.read_personal(path, kind, round_index)
        except (OSError, task_checkpoint.UnusableError) as error:
            task_checkpoint.say(f"begins as it was built: what was kept is {error}", about="personal")
            return False
        task_parts.put(model, tensors)
        return True

    def _leave_personal(self, path: Path, model: nn.Module, round_index: int) -> None:
        """Keep the personal tensors for the next round. A disk that does not take them is an error: no copy exists."""
        tensors = task_parts.personal_of(model, self._parts)
        try:
            task_checkpoint.write_personal(path, task_parts.kind_of(tensors), round_index, tensors)
        except task_checkpoint.UnkeepableError as error:
            raise TaskError("bad_task", f"train.personal: {error}") from error

    def _loaded(self, base: str, seed: int) -> nn.Module:
        """The model on the device, with the state of the base file."""
        model = self._built(seed)
        with self._opened().watched("model"):
            model.to(self._device)
        self._load(model, Path(base))
        self._marks = task_parts.marks_of(model, self._parts.built)
        return model

    def _first_split(self, names: Sequence[str]) -> Any:  # noqa: ANN401 - a map-style dataset, or None
        """The first of these splits that the task has."""
        return next((found for found in map(self._split, names) if found is not None), None)

    def _split(self, name: str) -> Any:  # noqa: ANN401 - a map-style dataset, or None
        """The task's dataset of a split, loaded once; None where the task has no such split.

        A task says that it has no test split by returning None, by NotImplementedError, or by KeyError("test"), as
        `{"train": …}[split]` does. Any other error is an error: a mistake must not pass for a missing split.
        dataset() always runs with the generators at zero: a random_split in it is the same on every worker.
        """
        task = self._opened()
        if name not in self._splits:
            seed_everything(0)
            with task.watched("dataset"):
                try:
                    dataset = task.call("dataset", task.config, name)
                except NotImplementedError:
                    dataset = None
                except KeyError as error:
                    if error.args != (name,):
                        raise
                    dataset = None
                if dataset is None and name == "train":
                    raise TaskError("bad_task", "dataset(config, 'train') gives no dataset")
                if dataset is not None and not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
                    sentence = f"dataset(config, {name!r}) gives a {type(dataset).__name__}, not a map-style Dataset"
                    raise TaskError("bad_task", f"{sentence}: it needs __len__ and __getitem__")
            self._splits[name] = dataset
        return self._splits[name]

    def _write_labels(self, dataset: Any, out: Path, by: str | None) -> None:  # noqa: ANN401 - a map-style dataset
        """Write the class of every sample of the train split, or its id, int64 (samples,), as .npy."""

        def told(samples: int) -> None:
            if self._stopping.is_set():
                raise Stopped
            self._events.progress("loading", samples=samples)

        with self._opened().watched("dataset"):
            labels = label_array(dataset, told) if by is None else id_array(dataset, by)
        with out.open("wb") as file:  # a file object: numpy would add a suffix to a name
            np.save(file, labels, allow_pickle=False)


def read_shard(indices: str | None, samples: int) -> Tensor:
    """The shard's samples, int64 (n,): those in the .npy file, or all of the dataset.

    Raises:
        TaskError: the shard is empty, or names samples that this machine's data does not have; code bad_task.
    """
    shard = torch.arange(samples)
    if indices is not None:
        shard = torch.from_numpy(np.load(indices, allow_pickle=False).astype(np.int64))
    if not len(shard):
        raise TaskError("bad_task", f"the shard is empty; the train split has {samples} samples on this machine")
    low, high = int(shard.min()), int(shard.max())
    if low < 0 or high >= samples:
        sentence = f"the shard has samples {low} to {high}, but the train split has only {samples} on this machine"
        raise TaskError("bad_task", f"{sentence}: every worker needs the same data, unless partition is local")
    return shard


def unexpected(error: BaseException, command: str) -> TaskError:
    """What is told of an error that is neither the task's nor one of those foreseen here."""
    sentence = f"{type(error).__name__} in the training process while it did {command!r}: {first_line(error)}"
    return TaskError("worker_error", sentence, trace(error))


def failure(error: TaskError) -> dict[str, Any]:
    """The error event."""
    return {"event": "error", "code": error.code, "sentence": str(error)[:SENTENCE_LIMIT], "detail": error.detail}


# ---------------------------------------------------------------- the process


def take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Take stdin and stdout for the protocol alone: input() finds nothing, print() goes to the log.

    Returns:
        where commands come from, where events go.
    """
    commands, events = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return io.open(commands, "rb"), io.open(events, "wb")  # noqa: UP020 - descriptors, not paths


def die_with_the_agent() -> None:
    """Ask Linux to kill this process when the thread that started it ends: the end of stdin is not seen while a
    library holds the interpreter lock."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def show_stacks_when_asked() -> None:
    """Write every thread's stack to stderr on SIGUSR1 and on a crash."""
    faulthandler.enable()
    if hasattr(faulthandler, "register"):
        faulthandler.register(signal.SIGUSR1, all_threads=True)


def serve(host: Host, device: torch.device, commands: "queue.Queue[dict[str, Any]]", events: Events) -> int:
    """Carry out commands one by one; only a device that is lost ends this. Returns the exit code."""
    host.inbox = commands
    while True:
        answer = host.answer(commands.get())
        events.send(answer)
        if answer["event"] == "done" or device.type == "cpu":
            continue
        task_device.give_back_memory(device)
        try:
            task_device.run_kernel(device)
        except RuntimeError as error:  # an error inside a kernel spoils the device for this process, and only for it
            sys.stderr.write(f"{device} is lost to this process: {first_line(error)}\n")
            return 1


def main() -> int:
    """Train on one device, or be the parent of those that train on several. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Trains for a Lydian worker; not meant to be run by hand.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--gpu-memory", type=float, default=1.0)
    parser.add_argument("--store", type=Path, help="where several processes find each other")
    parser.add_argument("--limits", default="", help="see task_cage.enter")
    parser.add_argument("--parent", type=int, help="torchrun's number, for its ranks")
    options = parser.parse_args()

    die_with_the_agent()
    if options.parent is not None and os.getppid() != options.parent:
        return 1  # it died while torch was imported, and Linux tells only of deaths to come
    if not task_ranks.is_rank():
        try:
            devices = task_ranks.devices_of(options.device, task_ranks.count_devices)
        except ValueError as error:
            Events(take_pipes()[1]).send(failure(TaskError("worker_error", f"--device: {error}")))
            return 1
        if len(devices) > 1:
            more = ["--gpu-memory", str(options.gpu_memory), "--limits", options.limits]
            return int(task_ranks.launch(HERE, devices, options.threads, options.store, more))
        options.device = devices[0]
    return train_for_the_agent(options)


def train_for_the_agent(options: argparse.Namespace) -> int:
    """Say hello, then serve, alone or as one of several ranks. Returns the exit code."""
    several = task_ranks.is_rank()
    talks = not several or task_ranks.own_rank() == 0
    commands_in, events_out = take_pipes()
    show_stacks_when_asked()
    commands: queue.Queue[dict[str, Any]] = queue.Queue()
    stopping = threading.Event()
    if talks:
        arguments = (commands_in, commands, stopping)
        threading.Thread(target=read_commands, args=arguments, name="stdin", daemon=True).start()
    else:
        commands_in.close()
        events_out.close()
        events_out = Path(os.devnull).open("wb")  # noqa: SIM115 - as long as the process lives
        sys.stdout, sys.stderr = task_ranks.prefixed(sys.stderr)
    events = Events(events_out)
    ready = partial(limited_device, task_ranks.own_device(options.device), options.threads, options.gpu_memory)
    try:
        device, build, ranks = task_ranks.joined(sys.modules[__name__], options.store, ready, stopping)
    except TaskError as error:
        events.send(failure(error))
        return 1
    task_cage.enter(options.limits)
    sys.meta_path.insert(0, HouseHidden)
    sys.dont_write_bytecode = True  # the task file's folder is not ours to write into
    task_compiler.wait_until_asked_for()
    events.send({"event": "hello", "torch": build})
    ask_for_deterministic_kernels()
    return serve(Host(device, events, stopping, ranks), device, ranks.commands(commands), events)


if __name__ == "__main__":
    sys.exit(main())
