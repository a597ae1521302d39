"""Training processes without the seconds that torch takes to load: an agent that has it loaded forks them.

Loading torch is most of what a short training costs, and a test run starts hundreds. A forked process is the agent's
child like another: its group, pipes, environment, log and end are its own, and nothing is left to it that the agent has
open or has imported of this repository. Agents that were forked themselves (tests.acceptance.forks) do this; those that
a test starts anew start the real command, as do all where the child has a sandbox, or several devices.
"""

import gc
import logging
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
import types
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn

from worker import child

HOUSE = ("server", "worker", "client", "common", "lydian", "tests")
LOADED = {"PYTHONHASHSEED": "0"}  # in the environment of every child, too late for one that is forked


class Forked:
    """One training process: of subprocess.Popen what the agent uses."""

    def __init__(self, pid: int, stdin: IO[bytes], stdout: IO[bytes]) -> None:
        self.pid, self.stdin, self.stdout = pid, stdin, stdout

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def load() -> None:
    """Load what every child loads."""
    import safetensors.torch  # noqa: F401
    import torch.utils.data  # noqa: F401


def install() -> None:
    """Have this process, an agent to be whose program has loaded all that, fork its children."""
    child.subprocess = types.SimpleNamespace(Popen=start, PIPE=subprocess.PIPE)  # type: ignore[assignment]


def start(command: list[str], **options: Any) -> "Forked | subprocess.Popen[bytes]":
    """Start what worker.child starts, with the options that it gives to subprocess.Popen."""
    if not _can_be_forked(command, options):
        return subprocess.Popen(command, **options)
    commands, to_child = os.pipe()
    from_child, events = os.pipe()
    pid = os.fork()
    if pid == 0:
        become(command, options["env"], options["cwd"], (commands, events, options["stderr"].fileno()))
    os.close(commands)
    os.close(events)
    return Forked(pid, os.fdopen(to_child, "wb", buffering=0), os.fdopen(from_child, "rb", buffering=0))


def _can_be_forked(command: list[str], options: dict[str, Any]) -> bool:
    """Whether it is the plain command: no sandbox, one device, and nothing new that decides how Python is loaded."""
    usual = {"stdin", "stdout", "stderr", "env", "cwd", "start_new_session", "bufsize"}
    device = command[command.index("--device") + 1] if "--device" in command else ""
    loads = [name for name in options["env"] if name.startswith(("PYTHON", "LD_", "OMP_", "MKL_", "TORCH"))]
    loaded = os.environ | LOADED
    return (
        options.keys() == usual
        and command[:4] == [sys.executable, "-P", "-u", str(child.HOST)]
        and device in {"cpu", "auto"}
        and all(options["env"][name] == loaded.get(name) for name in loads)
    )


def become(command: list[str], environment: dict[str, str], cwd: Path, files: tuple[int, int, int]) -> NoReturn:
    """Be the training process, as if the command had been started by itself."""
    code = 1
    try:
        gc.freeze()  # what the agent has open is not closed again by a number that is the child's by then
        os.setsid()
        for number, file in enumerate(files):
            os.dup2(file, number)
        _let_go_of_files()
        _forget_the_agent()
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(cwd)
        sys.argv = command[3:]
        sys.path.remove(str(child.HOST.parents[1]))  # of `python -m`; -P has none
        runpy.run_path(command[3], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 - as Python itself does at the top
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)


def _let_go_of_files() -> None:
    """Let every number but the first three mean /dev/null: an object of the agent that closes its own harms nobody."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        if number > 2:
            with suppress(OSError):  # the listing's own is closed by now
                os.fstat(number)
                os.dup2(nothing, number, inheritable=False)


def _forget_the_agent() -> None:
    """Signals, hooks, logs and modules as in a new interpreter."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.set_wakeup_fd(-1)
    sys.excepthook, threading.excepthook = sys.__excepthook__, threading.__excepthook__
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    for name in [name for name in sys.modules if name.partition(".")[0] in HOUSE]:
        del sys.modules[name]
