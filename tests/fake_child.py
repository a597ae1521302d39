"""A child without torch, for tests of the agent: speaks worker/task_host.py's lines, and does what its folder says.

The folder is $FAKE_CHILD. A file hold-DO in it keeps the command DO waiting, hold-train-N before step N, until it is
removed; fail-DO holds the error event that DO is answered with. calls.txt gets a line for everything that is done.
"""

import ctypes
import hashlib
import json
import os
import signal
import struct
import sys
import threading
from pathlib import Path
from typing import Any

CONTROL = Path(os.environ.get("FAKE_CHILD", "."))
STEPS = 4
SAMPLES = 10
PR_SET_PDEATHSIG = 1  # prctl(2)
stopping = threading.Event()


def note(line: str) -> None:
    with (CONTROL / "calls.txt").open("a") as calls:
        calls.write(line + "\n")


def send(event: str, **fields: object) -> None:
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


def held(name: str) -> bool:
    """Wait while the file is there. Whether the wait ended because of a stop."""
    pause = threading.Event()
    while (CONTROL / f"hold-{name}").exists():
        if stopping.is_set():
            return True
        pause.wait(0.005)
    return stopping.is_set()


def model_bytes(numbers: int) -> bytes:
    header: dict[str, object] = {"__metadata__": {"lydian": '{"aliases":{},"buffers":[],"variances":{}}'}}
    header["w"] = {"dtype": "F32", "shape": [numbers], "data_offsets": [0, 4 * numbers]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + struct.pack("<f", 0.5) * numbers


def write(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)


def shard_size(indices: Path) -> int:
    """How many int64 numbers a .npy file holds."""
    content = indices.read_bytes()
    header = int.from_bytes(content[8:10], "little")
    return (len(content) - 10 - header) // 8


def train(command: dict[str, Any]) -> None:
    begun_at = 0
    checkpoint = Path(command["checkpoint"]) if command.get("checkpoint") else None
    if checkpoint is not None and checkpoint.exists():
        begun_at = int(checkpoint.read_text())
    note(f"train begin {begun_at}")
    if command.get("optimizer_of"):
        state = Path(command["optimizer_from"])
        note(f"optimizer of {command['optimizer_of']}: {state.read_text() if state.exists() else 'missing'}")
    base = Path(command["base"]).read_bytes()
    if checkpoint is not None:
        assert hashlib.sha256(base).hexdigest() == command["base_digest"]
    for step in range(begun_at, STEPS):
        send("progress", doing="training", step=step, steps=STEPS, samples=step)
        if held(f"train-{step}"):
            send("stopped")
            return
        if checkpoint is not None:
            write(checkpoint, str(step + 1).encode())
    last = struct.unpack("<f", base[-4:])[0] + (command["seed"] % 1000) / 1000
    write(Path(command["out"]), base[:-4] + struct.pack("<f", last))
    if command.get("optimizer"):
        write(Path(command["optimizer"]), f"after round {command['round']}".encode())
    note("train end")
    samples = shard_size(Path(command["indices"])) if command["indices"] else SAMPLES
    metrics = {"train_loss": [1.0, samples]}
    send("done", samples=samples, steps=STEPS, seconds=0.01, metrics=metrics, resumed_at=begun_at)


def train_many(command: dict[str, Any]) -> None:
    """All shards at once; the file fail-shard holds the number of one that fails."""
    failing = (CONTROL / "fail-shard").read_text() if (CONTROL / "fail-shard").exists() else ""
    results: list[dict[str, Any]] = []
    for number, shard in enumerate(command["shards"]):
        if str(number) == failing:
            results.append({"error": {"code": "task_failed", "sentence": "it fell over", "detail": "where"}})
            continue
        write(Path(shard["out"]), Path(command["base"]).read_bytes())
        samples = shard_size(Path(shard["indices"]))
        results.append({"samples": samples, "steps": STEPS, "seconds": 0.01, "metrics": {}, "resumed_at": 0})
    note(f"train_many {len(results)} {command['stack']}")
    send("done", results=results, stacked=0, why="it is a fake")


def answer(command: dict[str, Any]) -> None:
    do = command["do"]
    failing = CONTROL / f"fail-{do}"
    if failing.exists():
        send("error", **json.loads(failing.read_text()))
    elif held(do):
        send("stopped")
    elif do == "open":
        send("done")
    elif do == "init":
        write(Path(command["out"]), model_bytes(1000))
        send("done", parameters=1000, train_samples=SAMPLES, test_samples=SAMPLES)
    elif do == "describe":
        send("done", train_samples=SAMPLES)
    elif do == "train":
        train(command)
    elif do == "train_many":
        train_many(command)
    else:
        send("done", samples=SAMPLES, seconds=0.01, metrics={"accuracy": [5.0, SAMPLES]})


def main() -> None:
    if sys.platform == "linux":  # as the real one: no step is taken after its agent's death, whoever lets it go on
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    send("hello", torch={"version": "none", "device": "cpu", "threads": 1})
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "stop":
            stopping.set()
            continue
        stopping.clear()
        note(command["do"])
        threading.Thread(target=answer, args=(command,), daemon=True).start()
    os._exit(0)  # the agent is gone


if __name__ == "__main__":
    main()
