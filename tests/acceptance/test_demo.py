"""`lydian demo`, as a new user runs it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.acceptance


def test_the_demo_prints_its_rounds_and_an_accuracy_of_nine_in_ten_and_leaves_nothing_running(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "client.main", "demo"],
        capture_output=True, text=True, check=False, timeout=240, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = re.search(r"^final accuracy (0\.\d+)$", ended.stdout, re.MULTILINE)
    assert found
    assert float(found[1]) >= 0.90
    rows = re.findall(r"^ *\*? +(\d) +[\d.]+ s +[123] ", ended.stdout, re.MULTILINE)
    assert rows == ["1", "2", "3", "4", "5"]
    commands = (" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    assert [command for command in commands if f"{tmp_path}/lydian-demo" in command] == []
