"""A `systemctl`, `loginctl` and `journalctl` for tests: records its calls, and runs a unit's program for real.

Run as a program with the name of the tool as its first argument. The folder FAKE_SYSTEMD holds:

    calls           one call a line, as JSON
    plan.json       how to answer: "gone" (systemctl does not answer), "restart" (run, fail, fine), "state", "linger"
    NAME.pid        of a unit that runs
    NAME.log        what it said: the journal
"""

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.unit_syntax import read_unit, read_words

FOLDER = Path(os.environ.get("FAKE_SYSTEMD", "."))
ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("systemctl", "loginctl", "journalctl")


def put_on_path(folder: Path) -> dict[str, str]:
    """Make the tools in a folder. Returns the variables with which a process finds them."""
    (folder / "bin").mkdir(parents=True)
    for tool in TOOLS:
        program = folder / "bin" / tool
        program.write_text(
            f'#!/bin/sh\nexec "{sys.executable}" -S -m tests.fake_systemd {tool} "$@"\n', encoding="utf-8"
        )
        program.chmod(0o755)
    return {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "FAKE_SYSTEMD": str(folder),
        "PYTHONPATH": str(ROOT),
    }


def calls(folder: Path, tool: str = "systemctl") -> list[list[str]]:
    """What a tool was called with, oldest first, without the calls that only ask."""
    lines = (folder / "calls").read_text(encoding="utf-8").splitlines() if (folder / "calls").exists() else []
    every = [json.loads(line) for line in lines]
    return [rest for name, *rest in every if name == tool and not {"show", "is-enabled"} & set(rest)]


def plan(folder: Path, **answers: Any) -> None:
    """Say how to answer from now on."""
    (folder / "plan.json").write_text(json.dumps(answers), encoding="utf-8")


def end_all(folder: Path) -> None:
    """Kill what still runs."""
    for file in folder.glob("*.pid"):
        _end(int(file.read_text()), signal.SIGKILL)


# ---------------------------------------------------------------- the tools


def main(tool: str, arguments: list[str]) -> int:
    with (FOLDER / "calls").open("a", encoding="utf-8") as file:
        file.write(json.dumps([tool, *arguments]) + "\n")
    answers = json.loads((FOLDER / "plan.json").read_text()) if (FOLDER / "plan.json").exists() else {}
    words = [word for word in arguments if word != "--user"]
    if tool == "loginctl":
        print(answers.get("linger", "no"))
        return 0
    if tool == "journalctl":
        print((FOLDER / f"{words[words.index('-u') + 1]}.log").read_text(encoding="utf-8"))
        return 0
    if answers.get("gone"):
        print("System has not been booted with systemd as init system (PID 1). Can't operate.", file=sys.stderr)
        return 1
    return systemctl(words, "--user" in arguments, answers)


def systemctl(words: list[str], of_user: bool, answers: Mapping[str, Any]) -> int:
    verb, *rest = words
    names = [word.removesuffix(".service") for word in rest if not word.startswith("--")]
    enabled = FOLDER / f"{names[0]}.enabled" if names else FOLDER
    if verb == "show" and not names:
        print("Version=252")
    elif verb == "show":
        state = {"ActiveState": "active" if pid_of(names[0]) else "inactive", "NRestarts": "0"}
        print("\n".join(f"{key}={value}" for key, value in (state | answers.get("state", {})).items()))
    elif verb == "is-enabled":
        print("enabled" if enabled.exists() else "disabled")
    elif verb == "enable":
        enabled.touch()
    elif verb == "disable":
        enabled.unlink(missing_ok=True)
        if pid := pid_of(names[0]):
            _end(pid, signal.SIGTERM)
    elif verb == "restart":
        if answers.get("restart") == "fail":
            print(f"Job for {names[0]}.service failed because the control process exited.", file=sys.stderr)
            return 1
        if answers.get("restart") != "fine":
            return run(names[0], of_user)
        (FOLDER / f"{names[0]}.pid").write_text("-1")
    return 0


def run(name: str, of_user: bool) -> int:
    """Start the program of a unit of this user, and wait until it is ready if the unit says that it says so."""
    import socket  # late, as all that a call which only records does not need
    import subprocess
    import tempfile

    assert of_user, "units of the system are not run in tests"
    home = Path(os.environ["HOME"])
    unit = read_unit((home / ".config/systemd/user" / f"{name}.service").read_text(encoding="utf-8"))
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(ROOT)}
    settings = Path(unit["EnvironmentFile"][0].removeprefix("-").replace("%%", "%"))
    lines = settings.read_text(encoding="utf-8").splitlines() if settings.exists() else []
    environment |= dict(line.split("=", 1) for line in lines if line and line[0] != "#")
    command = read_words(unit["ExecStart"][0])
    command[0] = command[0].removeprefix(":")
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(f"{folder}/notify")
        told.settimeout(0.2)
        with (FOLDER / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, env=environment | {"NOTIFY_SOCKET": f"{folder}/notify"}, cwd=home, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        (FOLDER / f"{name}.pid").write_text(str(process.pid))
        ready = unit["Type"] != ["notify"]
        while not ready and process.poll() is None:
            try:
                ready = told.recv(100) == b"READY=1"
            except TimeoutError:
                continue
    return 0 if ready else 1


def pid_of(name: str) -> int | None:
    """The process of a unit that runs; one that was started without a process is any number."""
    file = FOLDER / f"{name}.pid"
    pid = int(file.read_text()) if file.exists() else 0
    return pid if pid and (pid < 0 or _runs(pid)) else None


def _runs(pid: int) -> bool:
    """Whether a process is there and leads a session: else its number is another's by now."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status[0] not in "ZX" and status[3] == str(pid)


def _end(pid: int, number: int) -> None:
    if pid > 0 and _runs(pid):
        os.killpg(pid, number) if number == signal.SIGKILL else os.kill(pid, number)
    while pid > 0 and _runs(pid):
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
