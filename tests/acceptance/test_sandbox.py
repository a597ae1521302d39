"""A hostile task file in the sandbox of a real worker: the job is trained, and the file got at nothing."""

import os
import re
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest

from tests.acceptance.kit import LocalFleet, wait_for
from tests.privileges import needs_bubbles

pytestmark = [pytest.mark.acceptance, needs_bubbles]

TASK = """
import os, socket, subprocess
from pathlib import Path
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

STATE, PORT, OUTSIDE, AGENT = Path("@STATE@"), @PORT@, "@OUTSIDE@", @AGENT@

ATTEMPTS = {
    "reads the credential": lambda: (STATE / "identity.json").read_bytes(),
    "sees the state folder": lambda: [p for p in STATE.iterdir() if p.name != "cage"][0],
    "writes to the state folder": lambda: (STATE / "trusted.txt").write_text("x"),
    "writes elsewhere": lambda: Path(OUTSIDE, "x").write_text("x"),
    "writes to the data": lambda: Path("@DATA@", "x").write_text("x"),
    "calls the coordinator": lambda: socket.create_connection(("127.0.0.1", PORT), 2),
    "asks a name server": lambda: socket.getaddrinfo("example.com", 80),
    "reads the agent's environment": lambda: Path(f"/proc/{AGENT}/environ").read_bytes(),
    "signals the agent": lambda: os.kill(AGENT, 0),
    "sees its tokens": lambda: [n for n in os.environ if n.startswith("LYDIAN_") or "TOKEN" in n][0],
    "becomes root": lambda: os.setuid(0),
    "becomes root by a program": lambda: subprocess.run(["su", "-c", "true"], check=True, capture_output=True),
    "mounts": lambda: subprocess.run(["mount", "-t", "tmpfs", "x", "/mnt"], check=True, capture_output=True),
    "reads passwords": lambda: Path("/etc/shadow").read_bytes(),
}


def model(config):
    return nn.Linear(4, 2)


def dataset(config, split):
    if split != "train":
        return None
    got = []
    for name, act in ATTEMPTS.items():
        try:
            act()
        except (OSError, IndexError, subprocess.SubprocessError):
            continue
        got.append(name)
    if got:
        raise RuntimeError("it " + ", it ".join(got))
    left = os.fork()
    if left == 0:
        os.setsid()
        os.execve("/bin/sleep", ["sleep", "@SLEEP@"], {})
    while b"@SLEEP@" not in Path(f"/proc/{left}/cmdline").read_bytes():
        os.sched_yield()
    x = torch.from_numpy(np.load(Path(config["data"]["mine"]) / "x.npy"))
    assert len([len(b) for b in DataLoader(TensorDataset(x), 32, num_workers=1)]) == 2
    return TensorDataset(x, (x[:, 0] > 0).long())
"""


def sleepers(seconds: str) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.cmdline() == ["sleep", seconds]:
                found.append(process.pid)
        except psutil.Error:  # it has just ended
            continue
    return found


def test_a_hostile_task_file_in_bubblewrap_trains_and_gets_at_nothing(tmp_path: Path) -> None:
    data, outside, sleep = tmp_path / "data", tmp_path / "outside", f"{100_000 + os.getpid()}"
    for folder in (data, outside):
        folder.mkdir()
    outside.chmod(0o777)
    np.save(data / "x.npy", np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32))
    options = ["--sandbox", "bwrap", "--trust", "any", "--data", f"mine={data}"]
    options += ["--child-user", "nobody"] if os.geteuid() == 0 else []
    with LocalFleet(tmp_path, anew=True) as fleet:
        worker = fleet.start_worker("w1", *options)
        fleet.await_workers(1)
        text, file = TASK, tmp_path / "hostile.py"
        state = fleet.folder / "w1"
        told = {"STATE": state, "PORT": fleet.port, "OUTSIDE": outside, "DATA": data, "AGENT": worker.popen.pid}
        for name, value in {**told, "SLEEP": sleep}.items():
            text = text.replace(f"@{name}@", str(value))
        file.write_text(text)
        view = fleet.finish(fleet.submit(file, rounds=2, train={"keep_optimizer": True, "momentum": 0.9}))
        assert view.round == 2
        assert list(outside.iterdir()) == []
        assert {path.name for path in data.iterdir()} == {"x.npy"}
        assert worker.terminate() == 0
        wait_for("what it left behind to be gone", lambda: not sleepers(sleep))
        assert not (state / "cage" / "home").exists()
        assert not re.search("Traceback", worker.said())
