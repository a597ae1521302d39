"""Checkpoints of one train command: how far it came, so that a killed worker's shard is not trained again.

Part of the child (worker/task_host.py), which loads it by its path: torch, numpy and safetensors, none of our packages.

    one safetensors file: tensors as they are; all else as JSON in its metadata, floats to the bit; SHA-256 over both

Never pickled. Not fsynced: after a power cut the file may be empty, short or zeros under its right name; its digest
shows that, and the shard is trained from its base. It says which command it belongs to, and no other may use it.
"""

import hashlib
import json
import random
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MOST_TIME = 0.05  # of the period that writing may take, before the period is doubled
KEY = "lydian"  # in the file's metadata


class UnpackableError(Exception):
    """A value that is none of those that a checkpoint can hold."""


@dataclass(frozen=True)
class Saved:
    """What a checkpoint held."""

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    generators: dict[str, Any]
    position: dict[str, Any]


class Checkpoint:
    """The newest checkpoint of one command, at one path."""

    def __init__(
        self,
        path: Path,
        every_s: float,
        command: str,
        device: torch.device,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """None is written before the first period has passed: a short command pays nothing.

        Args:
            path: where it is kept.
            every_s: seconds between the end of one and the beginning of the next.
            command: digest of what is trained, on what, for how long.
            device: whose generator belongs to it.
            clock: monotonic seconds.
        """
        self.path = path
        self.every_s = every_s
        self._command = command
        self._device = device
        self._clock = clock
        self._due_at = clock() + every_s

    @property
    def due(self) -> bool:
        """Whether it is time for the next one."""
        return self._clock() >= self._due_at

    def write(self, model: dict[str, Tensor], optimizer: Any, position: dict[str, Any]) -> None:  # noqa: ANN401
        """Keep this moment. A checkpoint that cannot be written costs the training nothing but a line in the log.

        Args:
            model: name -> tensor, each tensor's memory once.
            optimizer: with a state_dict().
            position: plain values.
        """
        began = self._clock()
        try:
            content = {
                "optimizer": optimizer.state_dict(),
                "generators": generators(self._device),
                "position": position,
            }
            self._save(model, content)
        except (OSError, SafetensorError, UnpackableError) as error:
            say(f"no more checkpoints of this command: {error}")
            self._due_at = float("inf")
            with suppress(OSError):  # it says nothing that was not said
                self.path.with_name(self.path.name + ".part").unlink(missing_ok=True)
            return
        took = self._clock() - began
        if took > MOST_TIME * self.every_s:
            self.every_s *= 2
            say(f"a checkpoint took {took:.1f} s: from now on every {self.every_s:g} s")
        self._due_at = self._clock() + self.every_s

    def _save(self, model: dict[str, Tensor], content: dict[str, Any]) -> None:
        tensors = {f"model.{name}": alone(tensor) for name, tensor in model.items()}
        packed = json.dumps(pack(content, tensors), allow_nan=False)
        digest = digest_of(self._command, packed, tensors)
        part = self.path.with_name(self.path.name + ".part")
        save_file(tensors, part, {KEY: json.dumps({"command": self._command, "content": packed, "digest": digest})})
        part.replace(self.path)

    def read(self) -> Saved | None:
        """The checkpoint of this very command, if there is one and it is whole. Any other is deleted."""
        if not self.path.is_file():
            return None
        try:
            return self._read()
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            say(f"the checkpoint is damaged, training starts from the base: {type(error).__name__}: {error}")
        self.remove()
        return None

    def _read(self) -> Saved | None:
        with safe_open(self.path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[KEY])
            if about["command"] != self._command:
                say("the checkpoint is of another command, training starts from the base")
                self.remove()
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
        if digest_of(self._command, about["content"], tensors) != about["digest"]:
            raise ValueError("its bytes have another digest")
        content = unpack(json.loads(about["content"]), tensors)
        model = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
        return Saved(model, content["optimizer"], content["generators"], content["position"])

    def remove(self) -> None:
        """The command is done, or the checkpoint is of no use."""
        self.path.unlink(missing_ok=True)


def say(sentence: str) -> None:
    """One line in the child's log."""
    sys.stderr.write(f"checkpoint: {sentence}\n")


def alone(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous, in memory of its own: safetensors refuses views into a larger storage."""
    plain = tensor.detach().to("cpu").contiguous()
    owns_all = plain.untyped_storage().nbytes() == plain.numel() * plain.element_size()
    return plain if owns_all else plain.clone()


def digest_of(command: str, content: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 over everything that the file says."""
    seen = hashlib.sha256(f"{command}\n{content}\n".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        seen.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if tensor.numel():
            seen.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return seen.hexdigest()


# ---------------------------------------------------------------- values


def pack(value: Any, tensors: dict[str, Tensor]) -> Any:  # noqa: ANN401 - any nesting of an optimiser's
    """A value as JSON; its tensors go into `tensors`, under numbers.

    Raises:
        UnpackableError: there is something else in it than None, booleans, numbers, strings, tensors, and dictionaries,
            lists and tuples of them.
    """
    match value:
        case Tensor():
            name = f"value.{len(tensors)}"
            tensors[name] = alone(value)
            return {"tensor": name}
        case None | bool() | int() | str():
            return value
        case float():
            return {"float": value.hex()}  # to the bit, and infinities too
        case list():
            return [pack(item, tensors) for item in value]
        case tuple():
            return {"tuple": [pack(item, tensors) for item in value]}
        case dict():
            return {"dict": [[pack(key, tensors), pack(item, tensors)] for key, item in value.items()]}
        case np.ndarray() | np.generic():
            return pack(value.tolist(), tensors)
        case _:
            raise UnpackableError(f"a {type(value).__name__} cannot be kept in one")


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:  # noqa: ANN401
    """The inverse of `pack`; arrays come back as lists."""
    match value:
        case list():
            return [unpack(item, tensors) for item in value]
        case {"tensor": name}:
            return tensors[name]
        case {"float": text}:
            return float.fromhex(text)
        case {"tuple": items}:
            return tuple(unpack(item, tensors) for item in items)
        case {"dict": items}:
            return {unpack(key, tensors): unpack(item, tensors) for key, item in items}
        case _:
            return value


# ---------------------------------------------------------------- generators


def generators(device: torch.device) -> dict[str, Any]:
    """The state of every generator that a task can draw from."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["device"] = torch.cuda.get_rng_state(device)
    elif device.type == "xpu":
        states["device"] = torch.xpu.get_rng_state(device)
    elif device.type == "mps":
        states["device"] = torch.mps.get_rng_state()
    return states


def set_generators(states: dict[str, Any], device: torch.device) -> None:
    """Put every generator where it was."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["device"], device)
    elif device.type == "xpu":
        torch.xpu.set_rng_state(states["device"], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(states["device"])
