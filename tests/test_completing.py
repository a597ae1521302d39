"""What a shell completes: names from the coordinator while it answers, and nothing at all while it does not."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from client import completing

ROOT = Path(__file__).parent.parent


def complete(words: str, shell: str = "bash") -> list[str]:
    """What the program that the shell calls at a Tab prints."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("LYDIAN_")},
        "_LYDIAN_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
        "LYDIAN_URL": "http://127.0.0.1:9",
    }
    done = subprocess.run(
        [sys.executable, "-m", "client.main"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_jobs_and_workers_are_completed_by_what_they_begin_with(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"jobs": [("digits-1", "finished"), ("mnist-2", "training"), ("digits-3", "training")],
             "workers": [("gpu-box", "idle"), ("attic", "gone")]}  # fmt: skip
    monkeypatch.setattr(completing, "_asked", known.__getitem__)
    assert completing.complete_jobs("digits") == [("digits-3", "training"), ("digits-1", "finished")]
    assert completing.complete_workers("g") == [("gpu-box", "idle")]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "not an address"])
def test_a_coordinator_that_is_away_completes_nothing_and_says_nothing(
    url: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LYDIAN_URL", url)
    assert completing.complete_jobs("") == []
    assert capfd.readouterr() == ("", "")


def test_one_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completing, "PATIENCE_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection, and never answers
        monkeypatch.setenv("LYDIAN_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert completing.complete_workers("") == []


def test_the_shell_is_given_commands_and_the_flags_of_submit() -> None:
    assert "watch" in complete("lydian wa")
    assert "--lr" in complete("lydian submit --l")
