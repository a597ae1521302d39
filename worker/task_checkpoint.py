"""Checkpoints of one train command: how far it came, so that a killed worker's shard is not trained again.

An optimiser's state at the end of a round, for the next round of the same shard, is a file of the same kind.

Part of the child (worker/task_host.py), which loads it by its path: torch, numpy and safetensors, none of our packages.

    NAME, a safetensors file: header, with all that is no tensor as JSON in its metadata, floats to the bit
                              tensors, as they are
                              the last tensor: SHA-256 over every byte before it
    NAME.part                 the same, while it is written

Never pickled. Not fsynced: after a power cut the file may be empty, short or zeros under its right name; its digest is
compared before anything in it is looked at, and without a whole one the shard is trained from its base. It says which
command it belongs to, and no other may use it.

Written by us and not by safetensors: that writes under a random name, which a kill would leave behind, and wants every
tensor in the machine's memory at once. Here one tensor at a time comes over from the device, and the digest is known
at the end of the one pass over them. The training waits meanwhile: a thread would need a second copy of everything,
and 20 MB (1.7 M parameters and Adam) take 25 ms of CPU, 303 MB (25 M) 0.4 s, once in 30 s.
"""

import hashlib
import json
import random
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

MOST_TIME = 0.05  # of the period that writing may take, before the period is doubled
DIGEST_BYTES = 32  # SHA-256
PIECE_BYTES = 1 << 20  # read at once

DTYPES = {  # as safetensors calls them
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class UnkeepableError(Exception):
    """A value that is none of those that a checkpoint can hold."""


class UnusableError(Exception):
    """A file that is damaged, or of something else."""


@dataclass(frozen=True)
class Saved:
    """What a checkpoint held: model by name on the CPU, the optimiser's state, generators and position as they were."""

    model: dict[str, Tensor]
    optimizer: Any
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
        self._part = part_of(path)
        self._command = command
        self._device = device
        self._clock = clock
        self._due_at = clock() + every_s

    @property
    def due(self) -> bool:
        """Whether it is time for the next one."""
        return self._clock() >= self._due_at

    def write(self, model: dict[str, Tensor], optimizer: Any, position: dict[str, Any]) -> None:  # noqa: ANN401
        """Keep this moment, and the one before until then. What cannot be kept costs a line in the log and no more.

        Args:
            model: name -> tensor, each tensor's memory once.
            optimizer: its state_dict().
            position: plain values.
        """
        began = self._clock()
        content = {"optimizer": optimizer, "generators": generators(self._device), "position": position}
        try:
            self._save(model, content)
        except (OSError, UnkeepableError) as error:
            self.give_up(str(error))
            return
        took = self._clock() - began
        if 0 < MOST_TIME * self.every_s < took:
            self.every_s *= 2
            say(f"one took {took:.1f} s: from now on every {self.every_s:g} s")
        self._due_at = self._clock() + self.every_s

    def give_up(self, why: str) -> None:
        """Write no more of them. The newest is good for as far as it goes, and stays."""
        say(f"no more of this command: {why}")
        self._due_at = float("inf")
        unlink(self._part)

    def _save(self, model: dict[str, Tensor], content: dict[str, Any]) -> None:
        save(self.path, self._command, content, {f"model.{name}": tensor for name, tensor in model.items()})

    def read(self) -> Saved | None:
        """The checkpoint of this very command, if there is one and it is whole. Any other is deleted."""
        try:
            if not self.path.is_file():
                return None
            content, tensors = load(self.path, self._command)
        except UnusableError as error:
            say(f"it is {error}, training starts from the base")
            self.remove()
            return None
        except OSError as error:
            say(f"it cannot be read, training starts from the base: {error}")
            self.remove()
            return None
        model = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
        return Saved(model, content["optimizer"], content["generators"], content["position"])

    def remove(self) -> None:
        """The command is done, or the checkpoint is of no use. Where it cannot be removed, that is said."""
        unlink(self._part)
        unlink(self.path)


def say(sentence: str, *, about: str = "checkpoint") -> None:
    """One line in the child's log."""
    sys.stderr.write(f"{about}: {sentence}\n")


def unlink(path: Path) -> None:
    """Remove a file if it is there. A checkpoint is a help: its disk's troubles are no reason to fail the training."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        say(f"{path.name} cannot be removed: {error}")


# ---------------------------------------------------------------- an optimiser's state


def write_optimizer(path: Path, optimizer: str, round_index: int, state: Any) -> None:  # noqa: ANN401
    """Keep an optimiser's state under this name, whole or not at all; one tensor at a time comes over from the device.

    Args:
        path: where it goes.
        optimizer: digest of the kind of optimiser and of the parameters it is for.
        round_index: the round at the end of which this is the state.
        state: its state_dict().

    Raises:
        OSError: the disk does not take it.
        UnkeepableError: there is something in it that cannot be kept.
    """
    save(path, optimizer, {"round": round_index, "optimizer": state}, {})


def read_optimizer(path: Path, optimizer: str, round_index: int) -> Any:  # noqa: ANN401
    """The state that `write_optimizer` was given, on the CPU.

    Raises:
        OSError: there is none, or it cannot be read.
        UnusableError: it is damaged, of another optimiser or model, or of another round.
    """
    content, _ = load(path, optimizer, of="optimiser or model")
    if content["round"] != round_index:
        raise UnusableError(f"of round {content['round']}, not of round {round_index}")
    return content["optimizer"]


# ---------------------------------------------------------------- personal tensors


def write_personal(path: Path, kind: str, round_index: int, tensors: dict[str, Tensor]) -> None:
    """Keep tensors that never leave this machine, whole or not at all.

    Args:
        path: where they go.
        kind: digest of their names, shapes and dtypes.
        round_index: the round at the end of which they are so.
        tensors: by name.

    Raises:
        OSError: the disk does not take them.
        UnkeepableError: one of them cannot be kept.
    """
    save(path, kind, {"round": round_index}, {f"model.{name}": tensor for name, tensor in tensors.items()})


def read_personal(path: Path, kind: str, round_index: int | None) -> dict[str, Tensor]:
    """The tensors that `write_personal` was given, on the CPU.

    Raises:
        OSError: there are none, or they cannot be read.
        UnusableError: they are damaged, of another model, or of another round than the one asked for.
    """
    content, tensors = load(path, kind, of="model")
    if round_index not in (None, content["round"]):
        raise UnusableError(f"of round {content['round']}, not of round {round_index}")
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}


# ---------------------------------------------------------------- the file


def save(path: Path, owner: str, content: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a file of this module's kind, so that a kill leaves the one before or this one.

    Args:
        path: its name.
        owner: what it belongs to: who reads it must say the same.
        content: any nesting that `pack` takes; its tensors go into the file as well.
        tensors: more tensors, by name.

    Raises:
        OSError: the disk does not take it.
        UnkeepableError: there is something in it that cannot be kept.
    """
    tensors = dict(tensors)
    packed = json.dumps(pack(content, tensors), allow_nan=False)
    # Large items first: with them, every tensor lies at a multiple of its own item size.
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    seen = hashlib.sha256()
    part = part_of(path)
    with part.open("wb") as file:

        def put(piece: Any) -> None:  # noqa: ANN401 - bytes, or a view of a tensor's
            seen.update(piece)
            file.write(piece)

        put(header(order, tensors, {"command": owner, "content": packed}))
        for name in order:
            if tensors[name].numel():
                put(tensors[name].detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.write(seen.digest())
    part.replace(path)


def load(path: Path, owner: str, *, of: str = "command") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `save` was given.

    Args:
        path: the file.
        owner: what it must belong to.
        of: what that is called.

    Returns:
        the content, and every tensor by its name in the file.

    Raises:
        OSError: it cannot be read.
        UnusableError: it is damaged, or of another owner.
    """
    if not is_whole(path):
        raise UnusableError("damaged")
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("command") != owner:
                raise UnusableError(f"of another {of}")
            # Copies: what is given back is a view of the file, and the file goes away while the training goes on.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no dictionary
    except SafetensorError as error:
        raise UnusableError(f"no file of ours ({error})") from error
    return unpack(json.loads(about["content"]), tensors), tensors


def part_of(path: Path) -> Path:
    """Where a file is while it is written."""
    return path.with_name(path.name + ".part")


def header(order: list[str], tensors: dict[str, Tensor], about: dict[str, str]) -> bytes:
    """The beginning of a safetensors file that has these tensors in this order, and the digest as the last of them.

    Raises:
        UnkeepableError: a tensor is no plain one, or of a dtype that the format does not know.

    Source: github.com/huggingface/safetensors, README, "Format".
    """
    entries: dict[str, Any] = {"__metadata__": about}
    end = 0
    for name in order:
        tensor = tensors[name]
        if type(tensor) not in {Tensor, nn.Parameter} or tensor.layout != torch.strided or tensor.dtype not in DTYPES:
            kind = f"{type(tensor).__name__} ({tensor.layout}, {tensor.dtype})"
            raise UnkeepableError(f"a {kind} cannot be kept: only dense tensors of a common dtype can")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    entries["digest"] = {"dtype": "U8", "shape": [DIGEST_BYTES], "data_offsets": [end, end + DIGEST_BYTES]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return struct.pack("<Q", len(text)) + text


def is_whole(path: Path) -> bool:
    """Whether the file ends with the digest of all that comes before.

    Raises:
        OSError: it cannot be read.
    """
    seen = hashlib.sha256()
    left = path.stat().st_size - DIGEST_BYTES
    with path.open("rb") as file:
        while left > 0 and (piece := file.read(min(left, PIECE_BYTES))):
            seen.update(piece)
            left -= len(piece)
        return file.read() == seen.digest()


# ---------------------------------------------------------------- values


def pack(value: Any, tensors: dict[str, Tensor]) -> Any:  # noqa: ANN401 - any nesting of an optimiser's
    """A value as JSON; its tensors go into `tensors`, under numbers.

    Raises:
        UnkeepableError: there is something else in it than None, booleans, numbers, strings, tensors, and dictionaries,
            lists and tuples of them.
    """
    match value:
        case Tensor():
            name = f"value.{len(tensors)}"
            tensors[name] = value
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
        case np.generic():
            return pack(value.item(), tensors)
        case _:
            raise UnkeepableError(f"a {type(value).__name__} cannot be kept: only plain values and tensors can")


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:  # noqa: ANN401
    """The inverse of `pack`; a subclass comes back as its plain class."""
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
    """The state of every global generator: Python's, numpy's, torch's, the device's. Others' owners are not known."""
    name, keys, *rest = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["device"] = torch.cuda.get_rng_state(device)
    elif device.type == "xpu":
        states["device"] = torch.xpu.get_rng_state(device)
    elif device.type == "mps":
        states["device"] = torch.mps.get_rng_state()
    return states


def set_generators(states: dict[str, Any], device: torch.device) -> None:
    """Put every generator where it was.

    Args:
        states: what `generators` gave for a device of the same kind.
        device: the one that trains.
    """
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
