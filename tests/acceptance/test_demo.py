"""`lydian demo`, as a new user runs it."""

import re
import subprocess
import sys

import psutil
import pytest

pytestmark = pytest.mark.acceptance


def test_the_demo_prints_its_rounds_and_an_accuracy_of_nine_in_ten_and_leaves_nothing_running() -> None:
    before = {process.pid for process in psutil.process_iter()}
    ended = subprocess.run(
        [sys.executable, "-m", "client.main", "demo"], capture_output=True, text=True, check=False, timeout=240
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = re.search(r"^final accuracy (0\.\d+)$", ended.stdout, re.MULTILINE)
    assert found
    assert float(found[1]) >= 0.90
    rows = re.findall(r"^ *\*? +(\d) +[\d.]+ s +[123] ", ended.stdout, re.MULTILINE)
    assert rows == ["1", "2", "3", "4", "5"]
    ours = [
        process
        for process in psutil.process_iter(["cmdline"])
        if process.pid not in before and "lydian-demo" in " ".join(process.info["cmdline"] or [])
    ]
    assert ours == []
