"""Which device this worker trains on: tried in a child, and judged with what the cards' driver says.

    a child on the device asked for ──▶ a kernel ran ───────────────────────────┐
            └─▶ none ran ─▶ a child on the CPU: which torch is this? ───────────┴─▶ common.fitness.choose
                                                        refused, with the one thing to do ◀─┤
                                          a child on the device chosen, and why it is that one ◀─┘

Happens once, before the worker registers: a box that cannot run its torch hears of it then, and not in a round.
"""

import importlib.util
import logging
import os
import sys
from dataclasses import dataclass

from common import fitness
from common.errors import LydianError
from common.messages import GpuInventory, TorchBuild
from worker.child import TaskFailure
from worker.training import Trainer

log = logging.getLogger("lydian.worker")


class UnfitError(LydianError):
    """This machine cannot train on the device that its owner asked for."""

    code = "unfit"

    def __init__(self, sentence: str, *, advice: str, code: str, lasting: bool) -> None:
        super().__init__(sentence, advice=advice, code=code)
        self.lasting = lasting  # until somebody changes the machine: starting again does not help


@dataclass(frozen=True)
class Fitted:
    """A child that works."""

    build: TorchBuild
    reason: str  # why it does not train on the first GPU that is there; empty: it does, or there is none


def fit_device(trainer: Trainer, asked: str, found: GpuInventory) -> Fitted:
    """Have the trainer's child on a device that works.

    Args:
        trainer: its child was started on the device that was asked for.
        asked: cpu, cuda, cuda:N, mps, xpu or auto.
        found: the machine's GPUs, asked for before that child took memory of one.

    Raises:
        UnfitError: the device that was asked for cannot be used, or there is no torch.
        TaskFailure: not even the CPU can be used.
        TaskStopped: the child was killed.
    """
    build, broke = _tried(trainer, asked, found)
    seen = fitness.visible(found.gpus, os.environ)
    choice = fitness.choose(asked, found, build, seen=seen, broke=broke or None)
    if choice.device is None:
        trainer.close()
        raise UnfitError(
            choice.fit.sentence, advice=f"{_capital(choice.fit.fix)}.", code=choice.fit.code, lasting=choice.fit.lasting
        )
    reason = choice.fit.words()
    if reason:
        log.warning("training on %s: %s", choice.device, reason)
    if choice.device == build.device or (choice.device == asked and not broke):
        return Fitted(build, reason)
    return _moved(trainer, choice.device, reason)


def _tried(trainer: Trainer, asked: str, found: GpuInventory) -> tuple[TorchBuild, str]:
    """What the child says of its torch, and why no kernel ran on the device asked for; empty: one ran."""
    try:
        return trainer.ready().hello, ""
    except TaskFailure as error:
        if importlib.util.find_spec("torch") is None:
            words = fitness.file_for(found.gpus)
            raise UnfitError(
                f"{sys.executable} has no torch", advice=f"Install {words}.", code="no_torch", lasting=True
            ) from error
        if asked == "cpu":
            raise
        log.info("%s; asking torch on the CPU what it is", error)
        trainer.use("cpu")
        return trainer.ready().hello, str(error)


def _moved(trainer: Trainer, device: str, reason: str) -> Fitted:
    """The child on another device than it was asked for; on the CPU where that fails too."""
    trainer.use(device)
    try:
        return Fitted(trainer.ready().hello, reason)
    except TaskFailure as error:
        if device == "cpu":
            raise
        log.warning("training on the CPU: %s", error)
        return _moved(trainer, "cpu", f"{reason}; {error}")


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]
