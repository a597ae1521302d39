"""`lydian chaos` for real: a handful of faults, nothing lost, and nothing left on the machine."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from tests.acceptance.kit import wait_for

pytestmark = pytest.mark.acceptance

ROOT = Path(__file__).resolve().parent.parent.parent
KINDS = "kill-worker,kill-coordinator,cut,corrupt"
KILLS_FIRST = "7"  # both are due long before the job's end, so that neither can come too late


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "client.main", "chaos", *arguments],
        cwd=ROOT, env=os.environ | {"TMPDIR": str(folder)}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def living(folder: Path) -> list[str]:
    """The processes that have the folder in their command line."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if str(folder) in command:
            found.append(command)
    return found


def test_a_handful_of_faults_loses_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    few = ("--workers", "2", "--faults", "4", "--rounds", "6", "--kinds", KINDS)
    with start(tmp_path, *few, "--seed", KILLS_FIRST, "--json") as run:
        out, err = run.communicate(timeout=240)
    assert run.returncode == 0, err
    told = json.loads(out)
    assert told["kept"] is True
    assert sum(told["faults"].values()) + sum(bool(each["missed"]) for each in told["incidents"]) == 4
    assert told["faults"].keys() <= set(KINDS.split(","))
    assert {"kill-worker", "kill-coordinator"} <= told["faults"].keys()
    assert (told["updates_lost"], told["updates_counted_twice"], told["facts_forgotten"]) == (0, 0, 0)
    assert told["found"]["accepted"] == 6 * 4
    assert told["found"]["digests"] == told["truth"]["digests"]
    assert told["same_model"] is True
    assert f"schedule {told['schedule']}" in err
    assert living(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_in_the_middle_takes_every_process_with_it(tmp_path: Path, number: signal.Signals) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored by whatever started the tests (a shell's background), so by a run too")
    with start(tmp_path, "--workers", "1", "--faults", "1", "--kinds", "cut") as run:
        wait_for("a worker to run", lambda: any("-m worker" in command for command in living(tmp_path)))
        run.send_signal(number)
        run.communicate(timeout=60)
    assert run.returncode != 0
    wait_for("all of it to be gone", lambda: living(tmp_path) == [])
    assert number == signal.SIGKILL or list(tmp_path.iterdir()) == []
