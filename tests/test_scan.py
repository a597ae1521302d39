"""bandit's findings are excused by a reason of their own or not at all. `make check` runs the scan of the product."""

from pathlib import Path

import pytest

from tests.scan import EXCUSED, Finding, judged, scan

PLANTED = {
    "B506": "import yaml\nyaml.load(open('x'))\n",
    "B602": "import subprocess\nsubprocess.run('ls ' + name, shell=True)\n",
    "B202": "import tarfile\ntarfile.open('x').extractall()\n",
    "B306": "import tempfile\ntempfile.mktemp()\n",
    "B501": "import requests\nrequests.get('https://x', verify=False)\n",
    "B324": "import hashlib\nhashlib.md5(b'x')\n",
    "B301": "import pickle\npickle.loads(data)\n",
    "B614": "import torch\ntorch.load('x')\n",
    "B104": "HOST = '0.0.0.0'\n",
}


def finding(rule: str = "B101", file: str = "server/x.py", code: str = "assert x") -> Finding:
    return Finding(rule, file, 1, "said", code)


def excused() -> list[Finding]:
    return [finding(rule, file, "") for rule, file in EXCUSED]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # among bandit's own dependencies
def test_what_bandit_is_here_for_is_found(tmp_path: Path) -> None:
    for rule, source in PLANTED.items():
        (tmp_path / f"{rule}.py").write_text(f"{source}# nosec\n")
    found = scan([tmp_path], tmp_path)
    assert {rule for rule in PLANTED if (rule, f"{rule}.py") not in {(f.rule, f.file) for f in found}} == set()
    assert all(any(rule in line for line in judged(found)) for rule in PLANTED)


@pytest.mark.parametrize("code", ["assert x", "assert x  # noqa: S101", "assert x  # noqa: S608 - why", "x  # nosec"])
def test_a_finding_without_a_reason_of_its_own_rule_fails(code: str) -> None:
    assert len(judged([*excused(), finding(code=code)])) == 1


def test_a_line_that_says_why_under_ruffs_name_is_excused() -> None:
    assert judged([*excused(), finding(code="assert x  # noqa: S101 - `made` has looked")]) == []


def test_an_excuse_that_is_needed_no_more_fails() -> None:
    assert judged(excused()[1:]) == [f"{excused()[0].rule} in {excused()[0].file} is excused, and is not there"]


def test_another_file_is_not_excused_by_its_neighbour() -> None:
    assert len(judged([*excused(), finding("B603", "server/new.py", "subprocess.run(x)")])) == 1
