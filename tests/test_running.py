"""Processes that end with the block that started them: what a signal meets at the worst moment."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, signal, subprocess, sys, threading, time
from pathlib import Path
from client.running import Children

folder, number = Path(sys.argv[1]), int(sys.argv[2])
threading.Thread(target=threading.Event().wait, daemon=True).start()  # blocks no signal, so it may take this one


class Born(subprocess.Popen):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        print(self.pid, flush=True)
        os.kill(os.getpid(), number)
        for _ in range(100_000):  # a handler that may run does so between two of these
            pass


def end(number, frame):
    raise SystemExit(128 + number)


signal.signal(signal.SIGTERM, end)
subprocess.Popen = Born
try:
    with Children(folder) as children:
        children.start("child", [sys.executable, "-c", "import time; time.sleep(600)"], os.environ)
        raise AssertionError("the signal was lost")
finally:
    print(len(children.started), all(child.ended for child in children.started), flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_whose_birth_a_signal_interrupts_is_ended_all_the_same(
    tmp_path: Path, number: signal.Signals
) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(int(number))]
    ran = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's background ignores it
    )  # fmt: skip
    assert ran.stdout.splitlines()[1:] == ["1 True"], ran.stderr
    assert ran.returncode == (143 if number == signal.SIGTERM else -signal.SIGINT), ran.stderr
