"""Unit files: what deploy/ shows is what is written, and systemd reads every word as it was meant.

`python -m tests.test_units` writes deploy/*.service anew after a change of client/service/units.py.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.service.units import MARK, Service, Side, check_name, program_line, quote, split, unit_text
from common.errors import LydianError
from tests.unit_syntax import read_unit, read_words

ROOT = Path(__file__).resolve().parent.parent
FIRST_OFFLINE = 250  # the systemd that can judge a unit which is not installed
WORST_EXPOSURE = {"system": 3.0, "user": 7.0}  # of 10, as `systemd-analyze security` counts; bare ones have 9.6

COORDINATOR = Service(
    side=Side.serve,
    unit="lydian-coordinator",
    program="/opt/lydian/bin/lydian",
    options=(),
    state="/var/lib/lydian-coordinator",
    settings="/etc/lydian/coordinator.env",
    user="lydian-coordinator",
)
WORKER = Service(
    side=Side.work,
    unit="lydian-worker",
    program="/opt/lydian/bin/lydian",
    options=("http://gpu-box:8470",),
    state="/var/lib/lydian-worker",
    settings="/etc/lydian/worker.env",
    user="lydian-worker",
)
HOME = "/home/me"
OF_USER = {
    "program": f"{HOME}/lydian/.venv/bin/lydian",
    "user": None,
}
SHOWN = {
    "lydian-coordinator.service": COORDINATOR,
    "lydian-worker.service": WORKER,
    "user/lydian-coordinator.service": replace(
        COORDINATOR, **OF_USER, state=f"{HOME}/.local/state/lydian/coordinator",
        settings=f"{HOME}/.config/lydian/coordinator.env",
    ),
    "user/lydian-worker.service": replace(
        WORKER, **OF_USER, state=f"{HOME}/.local/state/lydian/workers/attic",
        settings=f"{HOME}/.config/lydian/worker.env",
    ),
}  # fmt: skip


def write_shown() -> None:
    for name, service in SHOWN.items():
        (ROOT / "deploy" / name).parent.mkdir(exist_ok=True)
        (ROOT / "deploy" / name).write_text(unit_text(service), encoding="utf-8")


# ---------------------------------------------------------------- one source


@pytest.mark.parametrize("name", SHOWN)
def test_a_unit_in_deploy_is_what_the_command_writes(name: str) -> None:
    shown = (ROOT / "deploy" / name).read_text(encoding="utf-8")
    assert shown == unit_text(SHOWN[name]), "python -m tests.test_units writes it anew"


def test_deploy_shows_no_other_unit() -> None:
    found = (ROOT / "deploy").rglob("*.service")
    assert {path.relative_to(ROOT / "deploy").as_posix() for path in found} == set(SHOWN)


# ---------------------------------------------------------------- quoting

WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20).filter(
    lambda text: not any(0xFDD0 <= ord(c) <= 0xFDEF or ord(c) & 0xFFFE == 0xFFFE for c in text)
)
TRICKY = st.text(st.sampled_from(" \t\n\r\"'\\%$#;:=-x41snaé{}@!+"), max_size=12)


@given(st.lists(WORDS | TRICKY, max_size=5))
def test_any_words_are_read_back_as_they_were(words: list[str]) -> None:
    line = " ".join(quote(word) for word in words)
    assert read_words(line) == words
    assert split(line) == words
    assert "\n" not in line


@given(st.lists(WORDS | TRICKY, max_size=4), TRICKY.map(lambda text: f"/srv/{text}"))
def test_any_options_and_folders_reach_the_program_and_change_no_other_line(words: list[str], state: str) -> None:
    service = replace(COORDINATOR, options=tuple(words), state=state)
    command = [service.program, "serve", "--state-dir", state, *words]
    unit = read_unit(unit_text(service))
    assert program_line(unit_text(service)) == command
    assert read_words(unit["ExecStart"][0]) == [f":{command[0]}", *command[1:]]  # the colon: no variables
    assert read_words(unit["ReadWritePaths"][0]) == [state]
    plain = read_unit(unit_text(replace(COORDINATOR, state="/srv/plain")))
    assert {key: value for key, value in unit.items() if key not in ("ExecStart", "ReadWritePaths")} == {
        key: value for key, value in plain.items() if key not in ("ExecStart", "ReadWritePaths")
    }


@pytest.mark.parametrize("bad", ["\ud800", "\0", "\ufffe", "\U0001ffff", "\ufdd0"])
def test_what_systemd_does_not_read_as_text_is_refused(bad: str) -> None:
    with pytest.raises(LydianError, match="cannot stand in a unit file") as refused:
        quote(f"a{bad}")
    assert refused.value.code == "bad_unit"


@pytest.mark.parametrize("bad", ["a'b", 'a"b', "a\\b", "a\nb", "a\x7fb"])
def test_a_program_whose_path_systemd_refuses_is_refused_here(bad: str) -> None:
    with pytest.raises(LydianError, match="systemd cannot be told of a path") as refused:
        unit_text(replace(WORKER, program=f"/opt/{bad}/lydian"))
    assert "/opt/lydian" in refused.value.advice


@pytest.mark.parametrize("bad", ["/etc/a\nb.env", "/etc/a.env "])
def test_a_settings_file_that_a_line_cannot_name_is_refused(bad: str) -> None:
    with pytest.raises(LydianError, match="systemd cannot be told of a path"):
        unit_text(replace(WORKER, settings=bad))


@pytest.mark.parametrize("name", ["", "a b", "a/b", "../a", "-a", "a.service", "ä", "a" * 65, "a\n"])
def test_a_name_that_is_no_unit_folder_and_user_at_once_is_refused(name: str) -> None:
    with pytest.raises(LydianError, match="cannot be a service's name"):
        check_name(name)


@pytest.mark.parametrize("text", ["", "[Service]\nExecStart=\n", "[Unit]\nDescription=x\n"])
def test_a_unit_that_runs_nothing_has_no_program(text: str) -> None:
    assert program_line(text) == []


# ---------------------------------------------------------------- what is in it


def test_each_side_has_a_unit_of_its_own() -> None:
    assert [side.default_unit for side in Side] == [COORDINATOR.unit, WORKER.unit]
    assert {COORDINATOR.file_name, WORKER.file_name} <= set(SHOWN)


def test_a_worker_gets_the_time_that_it_was_given_and_some_to_hand_in() -> None:
    assert read_unit(unit_text(WORKER))["TimeoutStopSec"] == ["90"]
    assert read_unit(unit_text(replace(WORKER, grace_s=300.5)))["TimeoutStopSec"] == ["331"]


def test_a_program_in_a_home_folder_can_be_seen_by_the_coordinator() -> None:
    assert read_unit(unit_text(COORDINATOR))["ProtectHome"] == ["yes"]
    assert read_unit(unit_text(replace(COORDINATOR, in_home=True)))["ProtectHome"] == ["read-only"]


@pytest.mark.parametrize("name", [name for name in SHOWN if name.startswith("user/")])
def test_a_unit_of_a_user_asks_for_nothing_that_takes_root(name: str) -> None:
    """A user's manager cannot drop capabilities, change users, or mount; a unit that asks for it does not start."""
    asked = set(read_unit(unit_text(SHOWN[name])))
    assert not {key for key in asked if key.startswith(("Protect", "Private", "Capability", "ReadWrite"))}
    assert not asked & {"User", "Group", "StateDirectory", "CacheDirectory", "RemoveIPC"}
    assert {"NoNewPrivileges", "SystemCallFilter", "RestrictAddressFamilies"} <= asked


@pytest.mark.parametrize("service", SHOWN.values(), ids=SHOWN)
def test_every_unit_says_whose_it_is_and_restarts(service: Service) -> None:
    text = unit_text(service)
    unit = read_unit(text)
    assert text.startswith(MARK)
    assert (unit["Restart"], unit["StartLimitIntervalSec"]) == (["always"], ["0"])
    assert "2" in unit["RestartPreventExitStatus"][0].split()


# ---------------------------------------------------------------- systemd's own word


def analyze(*arguments: str, runtime: Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not there: apt install systemd")
    environment = os.environ | {"XDG_RUNTIME_DIR": str(runtime)}
    return subprocess.run(
        [program, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def complaints(unit: Path, scope: str) -> list[str]:
    """What `systemd-analyze verify` says about a unit file. It starts nothing."""
    ended = analyze("verify", f"--{scope}", str(unit), runtime=unit.parent)
    return [line for line in ended.stderr.splitlines() if unit.stem in line]


@pytest.mark.parametrize("name", SHOWN)
def test_systemd_finds_nothing_wrong_with_a_unit_and_little_exposed(name: str, tmp_path: Path) -> None:
    shown = re.match(r"systemd (\d+)", analyze("--version", runtime=tmp_path).stdout)
    if shown is None or int(shown[1]) < FIRST_OFFLINE:
        pytest.skip(f"systemd {FIRST_OFFLINE} or newer judges a unit that is not installed")
    scope = "user" if SHOWN[name].user is None else "system"
    user = None if scope == "user" else "daemon"  # the program and the user that the unit names exist where it is used
    copy = tmp_path / Path(name).name
    copy.write_text(unit_text(replace(SHOWN[name], program="/bin/true", user=user)), encoding="utf-8")
    assert complaints(copy, scope) == []

    worst = f"--threshold={WORST_EXPOSURE[scope] * 10:.0f}"
    exposed = analyze("security", f"--{scope}", "--offline=true", worst, "--no-pager", str(copy), runtime=tmp_path)
    assert exposed.returncode == 0, exposed.stdout.splitlines()[-1:] or exposed.stderr


@settings(max_examples=12, deadline=None)
@given(st.text(st.sampled_from(" %$é;:#{}@!~"), min_size=1, max_size=8), st.lists(TRICKY | WORDS, max_size=3))
def test_systemd_finds_the_program_in_a_folder_of_any_name(
    tmp_path_factory: pytest.TempPathFactory, name: str, options: list[str]
) -> None:
    """`verify` says so where the program of a unit is not there, so a wrongly quoted path is seen."""
    folder = tmp_path_factory.mktemp("any") / f"{name}."
    folder.mkdir()
    program = folder / "lydian"
    program.symlink_to(sys.executable)
    unit = folder.parent / "lydian-any.service"
    service = replace(COORDINATOR, program=str(program), options=tuple(options), user="daemon", state="/srv/a b%")
    unit.write_text(unit_text(service), encoding="utf-8")
    assert complaints(unit, "system") == []
    program.unlink()
    assert any("not executable" in line for line in complaints(unit, "system"))


if __name__ == "__main__":
    write_shown()
