"""A training script in the child: run as its main program, with the child's commands carried out inside its own loop.

Part of the child (worker/task_host.py), which loads it by its path: torch, none of our packages but `lydian`, which the
script imports and which imports nobody.

    open ──▶ the script runs as __main__, in this very thread
               └─▶ for round in lydian.rounds(model):      open is done
                     ◀── init, describe, evaluate          carried out between two rounds
                     ◀── train: the base is loaded, then the body of the loop runs
                     ──▶ the body is through: what the model has now is the update
               └─▶ the loop ends when the agent says close; what stands below it runs
    close is done when the script has ended

So each command has one answer, whoever has to give it: the loop for all but the last, `run` for the one that was under
way when the script ended, by itself or by an error.

On several devices each rank runs the script, as under torchrun, with the group of the ranks made. All of them have the
same rounds; what is told and written is rank 0's. A script that fails on one of them ends them all.
"""

import importlib.util
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

PACKAGE = "lydian"


def run(
    house: ModuleType,
    host: Any,  # noqa: ANN401 - a task_host.Host
    file: Path,
    config: dict[str, Any],
    terms: dict[str, Any],
    allowed: str,
) -> dict[str, Any]:
    """Run a script from its first line to its end, and carry out the agent's commands meanwhile.

    Args:
        house: task_host.
        host: its Host, whose commands come from `host.inbox`.
        file: the script.
        config: of it, `data`: name -> folder.
        terms: `script` (config, arguments, rounds, shared), `seed` (of what the script draws before its loop).
        allowed: SHA-256 of the text that may be run; empty: whatever it is.

    Returns:
        what is answered to the command that was the last, close.

    Raises:
        TaskError: what is answered to the command under way when the script ended otherwise.
    """
    try:
        return _run(house, host, file, config, terms, allowed)
    except house.TaskError as error:
        host._ranks.leave(error, lambda cause: host._events.send(house.failure(cause)))
        raise


def _run(
    house: ModuleType,
    host: Any,  # noqa: ANN401 - as `run` takes it
    file: Path,
    config: dict[str, Any],
    terms: dict[str, Any],
    allowed: str,
) -> dict[str, Any]:
    lydian = package(house.HERE.parent.parent / PACKAGE)
    loop = Loop(house, host, lydian, file, config, terms)
    loader = house.FromSource("__main__", str(file))
    with as_main(house, loader, file, terms["script"]["arguments"]) as module, host._ranks.of_script():
        house.check_text(file, loader.read(), allowed)
        aim(host._device)
        house.seed_everything(terms["seed"])
        lydian.put(loop)
        counting = register_optimizer_step_post_hook(loop.count_step)
        try:
            loader.exec_module(module)
        except house.TaskError:
            raise
        except SystemExit as end:
            loop.exited(end)
        except Exception as error:  # user code can raise anything
            raise loop.explain(error) from error
        finally:
            counting.remove()
            lydian.put(lydian.Alone())
    return loop.ended()


def package(folder: Path) -> Any:  # noqa: ANN401 - lydian.loop
    """The package that scripts import, from beside us: a worker that runs from a clone has it nowhere else."""
    if PACKAGE not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None  # noqa: S101 - it is a .py file
        assert spec.loader is not None  # noqa: S101 - as before
        module = sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[f"{PACKAGE}.loop"]


@contextmanager
def as_main(house: ModuleType, loader: Any, file: Path, arguments: Sequence[str]) -> Iterator[ModuleType]:  # noqa: ANN401 - a FromSource
    """Inside, an empty module for the script is the main program of this process, as `python script.py …` has it."""
    if file.suffix != ".py":
        raise house.TaskError("bad_task", f"{file.name} is not a Python file: its name must end in .py")
    spec = importlib.util.spec_from_file_location("__main__", file, loader=loader)
    assert spec is not None  # noqa: S101 - it has a loader
    module = importlib.util.module_from_spec(spec)
    module.__spec__ = None  # as that of a script: a process that it spawns begins with its path
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # last, so that a file beside it hides nothing
    before = sys.modules["__main__"], sys.argv
    sys.modules["__main__"], sys.argv = module, [str(file), *arguments]
    try:
        yield module
    finally:
        sys.modules["__main__"], sys.argv = before


def aim(device: torch.device) -> None:
    """Have "cuda" in a script mean the worker's card, and no card where the worker trains on something else."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


class Loop:
    """What a script's loop of rounds talks with: a lydian.loop.Place."""

    def __init__(
        self,
        house: ModuleType,
        host: Any,  # noqa: ANN401 - of the house
        lydian: Any,  # noqa: ANN401 - lydian.loop
        file: Path,
        config: dict[str, Any],
        terms: dict[str, Any],
    ) -> None:
        """The command `open` is under way."""
        self._house, self._host, self._lydian, self._file = house, host, lydian, file
        self._ranks = host._ranks
        self._terms: dict[str, Any] = terms["script"]
        self.config: dict[str, Any] = self._terms["config"]
        self.folders: dict[str, str] = config.get("data", {})
        self.device = str(host._device)
        self._doing = "open"  # the command under way; empty: none is, the last one was answered
        self._wish: Any = None
        self._parts: Any = None  # a task_parts.Parts
        self._round: Any = None  # the one under way or the last: a lydian.Round
        self._training = False  # the body of the loop runs
        self._steps, self._began = 0, 0.0
        self._told: dict[str, Any] = {}  # what the script said of its progress

    # ------------------------------------------------------------ the script's side

    def rounds(self, wish: Any) -> Iterator[Any]:  # noqa: ANN401 - a lydian.loop.Wish
        """The rounds, as the agent asks for them."""
        if not isinstance(wish.model, nn.Module):
            kind = type(wish.model).__name__
            raise self._house.TaskError("bad_task", f"lydian.rounds() needs a torch.nn.Module, and was given a {kind}")
        self._wish, self._parts = wish, self._parted(wish)
        self._kinds = self._kinds_now()
        return self._rounds()

    def _rounds(self) -> Iterator[Any]:
        """Carry out commands until the agent closes; the body of the script's loop is what carries out `train`."""
        self._done({})
        try:
            while (command := self._next()).pop("do") != "close":
                if self._doing != "train":
                    self._answer(partial(self._carry_out, **command))
                elif self._begin(**command):
                    yield self._round
                    self._training = False
                    self._answer(partial(self._finish, **command))
        finally:  # `break`, or an error of the script: `run` has the answer
            self._training = False

    def count_step(self, *_: object) -> None:
        """One of torch's optimisers took a step: a sign of life."""
        self._steps += 1
        self._tell()

    def _say(self, **told: Any) -> None:  # noqa: ANN401 - as Round.progress has it
        """The script tells where it is."""
        self._told |= {name: value for name, value in told.items() if value is not None}
        self._tell()

    def _tell(self) -> None:
        events = self._host._events
        if (
            not self._training
            or threading.current_thread() is not threading.main_thread()
            or not events.due("training")
        ):
            return
        elapsed, told = time.monotonic() - self._began, self._told
        samples = int(told.get("samples", 0))
        loss = self._lydian.number(told["loss"]) if "loss" in told else None
        events.progress(
            "training",
            step=int(told.get("step", self._steps)),
            steps=told.get("steps"),
            samples=samples,
            samples_per_s=samples / elapsed if samples and elapsed else None,
            loss=loss,
        )

    # ------------------------------------------------------------ the agent's side

    def _next(self) -> dict[str, Any]:
        """The next command, which is under way from now on."""
        command: dict[str, Any] = self._host.inbox.get()
        self._doing = command["do"]
        return command

    def _done(self, answer: dict[str, Any]) -> None:
        self._send({"event": "done", **answer})

    def _send(self, event: dict[str, Any]) -> None:
        if self._ranks.rank and event["event"] == "error":
            sys.stderr.write(f"{event['sentence']}\n{event['detail']}\n")  # rank 0 alone talks with the agent
        self._host._events.send(event)
        self._doing = ""

    def _answer(self, work: Callable[[], dict[str, Any]]) -> None:
        """Have a command done and answered; an error of it ends no script, the agent does."""
        try:
            event = {"event": "done", **work()}
        except self._house.Stopped:
            event = {"event": "stopped"}
        except self._house.TaskError as error:
            event = self._house.failure(error)
        except Exception as error:  # noqa: BLE001 - the script's evaluate(), a full disk, a torn file: told, not lost
            house = not self._own_lines(error) and not self._through_lydian(error)
            event = self._house.failure(self._house.unexpected(error, self._doing) if house else self.explain(error))
        self._send(event)

    def _carry_out(self, **command: Any) -> dict[str, Any]:  # noqa: ANN401 - as task_host.Host takes them
        """Whatever is no training."""
        known: dict[str, Callable[..., dict[str, Any]]] = {
            "init": self._init,
            "describe": self._describe,
            "evaluate": self._evaluate,
        }
        if self._doing not in known:
            sentence = f"{self._file.name} is a script, for which there is no command {self._doing!r}"
            raise self._house.TaskError("worker_error", sentence)
        if self._ranks.rank and self._doing != "evaluate":
            return {}  # it is done once
        self._host._events.progress("evaluating" if self._doing == "evaluate" else "loading")
        return known[self._doing](**command)

    def _init(self, out: str, labels: str | None = None, base: str = "", **_: Any) -> dict[str, Any]:  # noqa: ANN401 - what is a task's
        """Write the model as it is when the loop begins, or with what the job begins with."""
        model = self._wish.model
        if base:
            self._house.task_given.put(self._house, model, Path(base), self._parts)
        self._house.save_state(model, Path(out), self._parts)
        return {
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "test_samples": int(self._wish.evaluate is not None),
            **self._describe(labels),
        }

    def _describe(self, labels: str | None, by: str | None = None) -> dict[str, Any]:
        """Count the training samples, and write the class or id of each, as task_host.Host.describe does."""
        data, samples = self._wish.data, self._wish.samples
        if samples is None and self._terms["shared"]:
            sentence = f"{self._file.name} does not say what there is to share: lydian.rounds(model, data=train_set)"
            raise self._house.TaskError("bad_task", f'{sentence}; or submit it with partition = "local"')
        if labels is not None:
            if not hasattr(data, "__getitem__"):
                sentence = f"{self._file.name} gives lydian.rounds(data=…) a number, and shards by label or id need the"
                raise self._house.TaskError("bad_task", f"{sentence} data set itself")
            self._write_labels(data, Path(labels), by)
        return {"train_samples": samples or 0}

    def _write_labels(self, data: Any, out: Path, by: str | None) -> None:  # noqa: ANN401 - a map-style dataset
        told = partial(self._host._events.progress, "loading")
        house = self._house
        found = (
            house.label_array(data, lambda samples: told(samples=samples)) if by is None else house.id_array(data, by)
        )
        with out.open("wb") as file:  # a file object: numpy would add a suffix to a name
            np.save(file, found, allow_pickle=False)

    def _begin(self, **command: Any) -> bool:  # noqa: ANN401 - as plan.script_command has it
        """Have all that a round begins with; where that fails, it is answered, and this is False."""
        try:
            with self._ranks.all_or_none("train"):
                self._ready(**command)
        except self._house.TaskError as error:
            self._send(self._house.failure(error))
        except Exception as error:  # noqa: BLE001 - a torn file, a full device: told, not lost
            self._send(self._house.failure(self._house.unexpected(error, "train")))
        else:
            self._training = True
            self._tell()
            return True
        return False

    def _ready(
        self,
        base: str,
        seed: int,
        round: int,  # noqa: A002 - the command's word
        shard: int,
        shards: int,
        indices: str | None,
        **_: Any,  # noqa: ANN401 - the command's word
    ) -> None:
        """Load the base, and make the round that the script is given."""
        self._load(base)
        samples = None if indices is None else self._house.read_shard(indices, self._wish.samples).tolist()
        self._round = self._lydian.Round(
            number=round,
            rounds=self._terms["rounds"],
            shard=shard,
            shards=shards,
            seed=seed,
            config=self.config,
            data=self._wish.samples,
            indices=samples,
            wanted=lambda: not self._host._stopping.is_set(),
            tell=self._say,
        )
        self._marks = self._house.task_parts.marks_of(self._wish.model, self._parts.built)
        self._written = self._house.task_parts.marks_of(self._wish.model, self._kinds)
        self._house.seed_everything(self._ranks.own_seed(seed))
        self._steps, self._began, self._told = 0, time.monotonic(), {}

    def _finish(self, base: str, out: str, **_: Any) -> dict[str, Any]:  # noqa: ANN401 - what `_begin` has
        """The body is through: check what it did, and write the update."""
        if self._host._stopping.is_set():
            raise self._house.Stopped
        if not self._ranks.same(self._wish.model):
            sentence = f"round {self._round.number} of {self._file.name} leaves its {self._ranks.world} ranks with"
            raise self._house.TaskError(
                "task_failed",
                f"{sentence} different weights: train DistributedDataParallel(model), each rank on its part",
            )
        if self._ranks.rank:
            return {}
        seconds, report = time.monotonic() - self._began, self._round.said
        if report is None:
            raise self._house.TaskError("task_failed", f"{self._file.name}: {self._lydian.forgotten(self._round)}")
        self._check_model(Path(base))
        self._house.save_state(self._wish.model, Path(out), self._parts)
        metrics = {name: [total, count] for name, (total, count) in report.metrics.items()}
        return {
            "samples": report.samples,
            "steps": self._steps,
            "seconds": seconds,
            "metrics": metrics,
            "resumed_at": 0,
        }

    def _evaluate(self, base: str, **_: Any) -> dict[str, Any]:  # noqa: ANN401 - what is a task's
        """Measure the base with the script's evaluate(). Sums that are not finite are left out."""
        self._load(base)
        self._house.seed_everything(0)
        began, found = time.monotonic(), self._lydian.measured(self._wish)
        usable = {name: list(pair) for name, pair in found.items() if all(map(math.isfinite, pair))}
        samples = int(max((count for _, count in found.values() if math.isfinite(count)), default=0))
        return {"metrics": usable, "samples": samples, "seconds": time.monotonic() - began}

    # ------------------------------------------------------------ the model

    def _parted(self, wish: Any) -> Any:  # noqa: ANN401 - a Wish; gives a task_parts.Parts
        """Which of the model's tensors travel, by what the script said with `only`."""
        if wish.only is None:
            return self._house.task_parts.WHOLE
        aliases = self._house.state_of(wish.model)[1].aliases
        try:
            if wish.only == "trainable":
                return self._house.task_parts.parts_of({"trainable_only": True}, wish.model, aliases)
            return self._house.task_parts.chosen_by(wish.only, wish.model, aliases)
        except self._house.task_parts.UnfitError as error:
            raise self._house.TaskError("bad_task", f"lydian.rounds(only=…): {error}") from error

    def _kinds_now(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """What travels of the model: name -> dtype and shape."""
        kept: dict[str, Tensor] = self._house.state_of(self._wish.model, self._parts)[0]
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in kept.items()}

    def _load(self, base: str) -> None:
        self._check_kinds()
        self._house.load_state(self._wish.model, Path(base), self._parts)

    def _check_kinds(self) -> None:
        """Make sure that the model has the tensors that it had when the loop began.

        Raises:
            TaskError: it has not.
        """
        now = self._kinds_now()
        if now == self._kinds:
            return
        name = min(name for name in {*now, *self._kinds} if now.get(name) != self._kinds.get(name))
        was, found = (shown(kinds.get(name)) for kinds in (self._kinds, now))
        sentence = f"{self._file.name} changed its model in the loop of rounds: {name!r} was {was} and is {found} now"
        raise self._house.TaskError("task_failed", f"{sentence}; change it before lydian.rounds(model)")

    def _check_model(self, base: Path) -> None:
        """Make sure that a round has trained the model that the loop was given, and nothing of it that stays behind.

        Raises:
            TaskError: it has not.
        """
        self._check_kinds()
        parts, model = self._house.task_parts, self._wish.model
        if (name := parts.changed(self._marks, model)) is not None:
            sentence = f"{name!r} changes in round {self._round.number} of {self._file.name}, and lydian.rounds(only=…)"
            raise self._house.TaskError(
                "task_failed", f"{sentence} leaves it behind: train it and have it travel, or not"
            )
        if parts.changed(self._written, model) is None and self._is(base):
            sentence = f"round {self._round.number} of {self._file.name} changed nothing of the model that was given to"
            raise self._house.TaskError(
                "task_failed", f"{sentence} lydian.rounds(): train that very model, and no copy"
            )

    def _is(self, base: Path) -> bool:
        """Whether the model is still what this file has."""
        kept, there = self._house.state_of(self._wish.model, self._parts)[0], self._house.load_file(base)
        return all(torch.equal(tensor.cpu(), there[name]) for name, tensor in kept.items())

    # ------------------------------------------------------------ the end of the script

    def ended(self) -> dict[str, Any]:
        """The script has come to its end: the answer to the command under way, or to the next where there is none.

        Raises:
            TaskError: it ended before its time.
            SystemExit: it left its loop as it was told that nobody wants its round: the agent may begin it anew.
        """
        name = self._file.name
        if self._doing == "open":
            sentence = f"{name} came to its end and never to `for round in lydian.rounds(model):`"
            raise self._house.TaskError("bad_task", sentence)
        if not self._doing:
            self._next()
        if self._doing == "close":
            return {}
        if self._doing == "train" and self._host._stopping.is_set():
            self._send({"event": "stopped"})
            raise SystemExit(0)
        number, rounds = (self._round.number, self._round.rounds) if self._round else (0, self._terms["rounds"])
        sentence = f"{name} left its loop over lydian.rounds(model) in round {number} of {rounds}"
        advice = "a script stays in it until the job is over; to end a round early, `continue` after round.report()"
        raise self._house.TaskError("task_failed", f"{sentence}: {advice}")

    def exited(self, end: SystemExit) -> None:
        """The script called sys.exit: with 0 it has come to its end.

        Raises:
            TaskError: with another code, before the job was over.
        """
        if end.code in (None, 0) or self._doing == "close":
            return
        how = f"with exit code {end.code}" if isinstance(end.code, int) else f"and said: {end.code}"
        sentence = f"{self._file.name} ended {self._where()} {how}"
        raise self._house.TaskError("task_failed", sentence[: self._house.SENTENCE_LIMIT]) from end

    def _where(self) -> str:
        if self._wish is None:
            return "before lydian.rounds(model)"
        if self._doing in ("close", "evaluate"):
            return "after its loop of rounds" if self._doing == "close" else "in evaluate(model)"
        return f"in round {self._round.number}" if self._round is not None else "in its loop of rounds"

    def explain(self, error: Exception) -> Any:  # noqa: ANN401 - a TaskError
        """What is said of an exception that came out of the script."""
        house, name, lines = self._house, self._file.name, self._own_lines(error)
        own = error.__traceback__
        while own is not None and own.tb_frame.f_code.co_filename != str(self._file):
            own = own.tb_next  # what stands above is ours
        detail = house.trace(error.with_traceback(own or error.__traceback__))
        if isinstance(error, SyntaxError):
            place = f"{Path(error.filename or name).name}, line {error.lineno}"
            return house.TaskError("bad_task", f"{type(error).__name__} in {place}: {error.msg}", detail)
        place = f"{lines[-1][0]}, line {lines[-1][1]}, {self._where()}" if lines else f"{name} {self._where()}"
        if house.is_out_of_memory(error):
            sentence = f"out of memory in {place}: {house.first_line(error)}; use a smaller batch or a smaller model"
            return house.TaskError("out_of_memory", sentence, detail)
        before = self._wish is None
        code = "missing_package" if before and isinstance(error, ModuleNotFoundError) else "task_failed"
        code = "no_data" if before and isinstance(error, FileNotFoundError) else code
        return house.TaskError(code, f"{type(error).__name__} in {place}: {house.first_line(error)}", detail)

    def _own_lines(self, error: Exception) -> list[tuple[str, int | None]]:
        """File and line of what of the script an exception came through, the innermost last."""
        came, script, own = traceback.extract_tb(error.__traceback__), str(self._file), self._lydian.Here.own
        return [(Path(f.filename).name, f.lineno) for f in came if f.filename == script or f.filename.startswith(own)]

    def _through_lydian(self, error: Exception) -> bool:
        """Whether the package that a script imports said it, of what the script gave."""
        here = f"{Path(self._lydian.__file__).parent}{os.sep}"
        return any(f.filename.startswith(here) for f in traceback.extract_tb(error.__traceback__))


def shown(kind: tuple[torch.dtype, tuple[int, ...]] | None) -> str:
    """A tensor's dtype and shape for a sentence."""
    return "missing" if kind is None else f"{str(kind[0]).removeprefix('torch.')} {list(kind[1])}"
