"""`lydian install-service` in a home folder of its own, with a systemctl that records what it is asked."""

import contextlib
import io
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

from client.calling import run_program
from client.main import app
from client.service import given, install
from client.service.manager import Manager, State, instead
from client.service.units import MARK, Side, program_line
from common.errors import LydianError
from tests import fake_systemd

SECRET = "A" * 43
JOIN = f"lyd_join_0123456789ab_{SECRET}"
ADMIN = f"lyd_admin_0123456789ab_{SECRET}"
URL = "http://127.0.0.1:8470"
LYDIAN = str(Path(sys.executable).parent / "lydian")


class Ended(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class House:
    """A home folder, and the machine that it is on."""

    home: Path
    systemd: Path
    environment: dict[str, str]
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def run(self, *arguments: str, typed: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        """`lydian install-service …` as a process."""
        command = [sys.executable, "-m", "client.main", "install-service", *arguments]
        return subprocess.run(
            command, cwd=self.home, env=self.environment | more, input=typed, capture_output=True, text=True,
            check=False, timeout=280,
        )  # fmt: skip

    def user(self, *arguments: str, typed: str = "", **more: str) -> Ended:
        """The same for this user, in this process, and without asking the program about its options: fast."""
        words = ["install-service", arguments[0], "--scope", "user", *arguments[1:]]
        with self.monkeypatch.context() as here:
            for name in [name for name in os.environ if name.startswith(("LYDIAN_", "XDG_"))]:
                here.delenv(name)
            for name, value in (self.environment | more).items():
                here.setenv(name, value)
            here.chdir(self.home)
            here.setattr(sys, "stdin", io.StringIO(typed))
            here.setattr(install, "check_options", lambda design: None)
            self.capsys.readouterr()
            with pytest.raises(SystemExit) as ended:
                run_program(app, "lydian", words)
        said = self.capsys.readouterr()
        return Ended(int(ended.value.code or 0), said.out, said.err)

    def unit(self, name: str) -> Path:
        return self.home / ".config/systemd/user" / f"{name}.service"

    @property
    def calls(self) -> list[list[str]]:
        return fake_systemd.calls(self.systemd)

    @property
    def everything(self) -> str:
        """All that was written and said to systemd, but files that only their owner can read."""
        found = [path.read_text() for path in self.systemd.glob("calls")]
        for path in (Path(folder, name) for folder, _, names in os.walk(self.home) for name in names):
            with contextlib.suppress(FileNotFoundError):  # what runs there deletes while the test looks
                if path.is_file() and stat.S_IMODE(path.stat().st_mode) != 0o600:
                    found.append(path.read_text())
        return "\n".join(found)


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[House]:
    home = tmp_path / "home"
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LYDIAN_", "XDG_"))}
    systemd = tmp_path / "systemd"
    environment = kept | fake_systemd.put_on_path(systemd) | {"HOME": str(home)}
    yield House(home, systemd, environment, monkeypatch, capsys)
    fake_systemd.end_all(systemd)


def settled(house: House) -> None:
    """Services start here without a process."""
    fake_systemd.plan(house.systemd, restart="fine")


# ---------------------------------------------------------------- what is done, and what a second run does


def test_a_dry_run_shows_everything_and_touches_nothing(house: House) -> None:
    words = ("work", "box:8470", "--data", "scans=pictures", "--scope", "user", "--dry-run")
    shown = house.run(*words, LYDIAN_TOKEN=JOIN)
    assert shown.returncode == 0, shown.stderr
    assert f"work http://box:8470 --state-dir {house.home}/.local/state/lydian/workers/" in shown.stdout
    assert f"--data scans={house.home}/pictures" in shown.stdout
    assert "would run systemctl --user enable lydian-worker.service" in shown.stdout
    assert f"would write {house.home}/.config/lydian/worker.env (0600)" in shown.stdout
    assert SECRET not in shown.stdout + shown.stderr
    assert list(house.home.iterdir()) == []
    assert house.calls == []


def test_a_service_is_written_enabled_started_and_left_alone_by_a_second_run(house: House) -> None:
    settled(house)
    first = house.user("serve", "--port", "9000")
    unit = house.unit("lydian-coordinator")
    assert (first.returncode, first.stdout) == (0, f"{unit}\n"), first.stderr
    state = house.home / ".local/state/lydian/coordinator"
    assert program_line(unit.read_text()) == [LYDIAN, "serve", "--state-dir", str(state), "--port", "9000"]
    assert house.calls == [
        ["--user", "daemon-reload"],
        ["--user", "enable", "lydian-coordinator.service"],
        ["--user", "restart", "lydian-coordinator.service"],
    ]
    assert "waiting until lydian-coordinator listens, at most" in first.stderr
    assert "journalctl --user -u lydian-coordinator" in first.stderr
    assert f"{state}/join.token" in first.stderr
    assert "loginctl enable-linger" in first.stderr

    fake_systemd.plan(house.systemd, restart="fine", linger="yes")
    second = house.user("serve", "--port", "9000")
    assert f"unchanged: {unit}" in second.stderr
    assert "unchanged: lydian-coordinator runs" in second.stderr
    assert "enable-linger" not in second.stderr
    assert len(house.calls) == 3

    third = house.user("serve", "--port", "9001")
    assert f"changed {unit}" in third.stderr
    assert "--port 9000" in third.stderr  # what it was
    assert house.calls[3:] == [["--user", "daemon-reload"], ["--user", "restart", "lydian-coordinator.service"]]


def test_a_second_worker_has_a_unit_and_a_folder_of_its_own(house: House) -> None:
    for unit, name in (("lydian-worker", "one"), ("lydian-worker-2", "two")):
        done = house.user("work", URL, "--unit", unit, "--name", name, "--no-enable", LYDIAN_TOKEN=JOIN)
        assert done.returncode == 0, done.stderr
        assert f"systemctl --user enable --now {unit}" in done.stderr
        assert f"workers/{name}" in house.unit(unit).read_text()
    assert house.calls == [["--user", "daemon-reload"]] * 2


# ---------------------------------------------------------------- the token


def test_a_token_goes_into_a_private_file_and_nowhere_else(house: House) -> None:
    environment = house.home / ".config/lydian/worker.env"
    environment.parent.mkdir(parents=True)
    environment.write_text("# mine\nLYDIAN_POLL_S=3\n")
    done = house.user("work", URL, "--no-enable", typed=f"{JOIN}\n")
    assert done.returncode == 0, done.stderr
    assert environment.read_text() == f"# mine\nLYDIAN_POLL_S=3\nLYDIAN_TOKEN={JOIN}\n"
    assert stat.S_IMODE(environment.stat().st_mode) == 0o600
    assert SECRET not in done.stdout + done.stderr + house.everything
    assert "from stdin" in done.stderr
    again = house.user("work", URL, "--no-enable")  # the token is there and not asked for again
    assert "unchanged" in again.stderr
    assert "stdin" not in again.stderr


@pytest.mark.parametrize(("given_one", "said"), [(ADMIN, "scope admin"), ("secret-rubbish", "nothing like lyd_join_"),
                                                 (" ", "empty")])  # fmt: skip
def test_a_token_that_lets_nobody_join_is_refused_and_not_shown(given_one: str, said: str, house: House) -> None:
    done = house.user("work", URL, LYDIAN_TOKEN=given_one)
    assert done.returncode == 1
    assert said in done.stderr
    assert SECRET not in done.stderr
    assert "rubbish" not in done.stderr
    assert list(house.home.iterdir()) == []


@pytest.mark.parametrize("options", [("--token", JOIN), (f"--token={JOIN}",), ("--name", JOIN)])
def test_a_token_on_the_command_line_is_refused(options: tuple[str, ...], house: House) -> None:
    done = house.user("work", URL, *options)
    assert done.returncode == 1
    assert "in the unit file and in the list of processes" in done.stderr
    assert SECRET not in done.stderr


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("work", "--name", "x"), 2, "a worker needs its coordinator"),
        (("work", "http://"), 2, "is not an address"),
        (("serve", "--version"), 1, "would end at once"),
        (("serve", "--unit", "a b"), 1, "cannot be a service's name"),
        (("serve", "--user", "me"), 2, "a service of this user runs as this user"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(
    arguments: tuple[str, ...], code: int, said: str, house: House
) -> None:
    done = house.user(*arguments, LYDIAN_TOKEN=JOIN)
    assert done.returncode == code
    assert said in " ".join(done.stderr.replace("│", " ").split())
    assert list(house.home.iterdir()) == []
    assert house.calls == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("serve", "--prot", "1"), "`lydian serve` does not take these options: No such option: --prot"),
        (("work", URL, "--help-me"), "`lydian work` does not take these options: No such option: --help-me"),
    ],
)
def test_the_program_itself_is_asked_about_its_options(arguments: tuple[str, ...], said: str, house: House) -> None:
    done = house.run(*arguments, "--scope", "user", LYDIAN_TOKEN=JOIN)
    assert done.returncode == 1
    assert said in " ".join(done.stderr.split())
    assert list(house.home.iterdir()) == []
    assert house.calls == []


def test_a_service_that_does_not_start_is_told_with_the_end_of_its_log(house: House) -> None:
    fake_systemd.plan(house.systemd, restart="fail")
    (house.systemd / "lydian-coordinator.log").write_text("port 8470 on 127.0.0.1 is taken\n")
    done = house.user("serve")
    assert done.returncode == 1
    assert "could not be started: Job for lydian-coordinator.service failed" in done.stderr
    assert "port 8470 on 127.0.0.1 is taken" in done.stderr
    assert done.stdout == ""


def test_a_worker_that_ends_instead_of_joining_is_told_with_the_end_of_its_log(house: House) -> None:
    state = {"ActiveState": "activating", "SubState": "auto-restart", "ExecMainStatus": "1"}
    fake_systemd.plan(house.systemd, restart="fine", state=state)
    (house.systemd / "lydian-worker.log").write_text("the token is not known to this coordinator\n")
    done = house.user("work", URL, LYDIAN_TOKEN=JOIN)
    assert done.returncode == 1, done.stderr
    assert f"waiting until it has joined {URL}, at most 60 s" in done.stderr
    assert "ended with exit code 1; it is activating (auto-restart)" in done.stderr
    assert "the token is not known to this coordinator" in done.stderr
    assert (house.home / ".config/lydian/worker.env").exists()  # for the next try


def test_a_worker_whose_coordinator_is_away_runs_on_with_its_token(house: House) -> None:
    fake_systemd.plan(house.systemd, restart="fine", state={"ActiveState": "active", "SubState": "running"})
    (house.systemd / "lydian-worker.log").write_text("waiting for the coordinator: connection refused\n")
    done = house.user("work", URL, "--wait", "0", LYDIAN_TOKEN=JOIN)
    assert done.returncode == 0
    assert "it runs and has not joined yet" in done.stderr
    assert "connection refused" in done.stderr
    assert given.token_in((house.home / ".config/lydian/worker.env").read_text()) == JOIN


def test_without_systemd_one_sentence_says_what_to_do_instead(house: House) -> None:
    fake_systemd.plan(house.systemd, gone=True)
    for environment, why in (({}, "has not been booted with systemd"), ({"PATH": "/nowhere"}, "there is no systemctl")):
        done = house.user("serve", **environment)
        assert done.returncode == 1
        assert done.stderr.startswith("No service can be installed: ")
        assert why in done.stderr
        assert len(done.stderr.splitlines()) == 2
    assert list(house.home.iterdir()) == []


def test_a_unit_that_somebody_else_wrote_is_left_alone_unless_told(house: House) -> None:
    settled(house)
    unit = house.unit("lydian-coordinator")
    unit.parent.mkdir(parents=True)
    unit.write_text("[Service]\nExecStart=/bin/true\n")
    for arguments in (("serve",), ("serve", "--uninstall")):
        refused = house.user(*arguments)
        assert refused.returncode == 1
        assert "was not written by `lydian install-service`" in refused.stderr
    assert unit.read_text() == "[Service]\nExecStart=/bin/true\n"
    assert house.user("serve", "--replace").returncode == 0
    assert unit.read_text().startswith(MARK)


def test_a_unit_of_another_installation_is_left_alone_unless_told(house: House) -> None:
    settled(house)
    assert house.user("serve").returncode == 0
    unit = house.unit("lydian-coordinator")
    unit.write_text(unit.read_text().replace(LYDIAN, "/opt/other/bin/lydian"))
    refused = house.user("serve")
    assert refused.returncode == 1
    assert "is the service of another installation: /opt/other/bin/lydian" in refused.stderr
    assert house.user("serve", "--replace").returncode == 0
    assert program_line(unit.read_text())[0] == LYDIAN


def test_a_folder_that_cannot_be_written_is_one_sentence(house: House) -> None:
    (house.home / ".config").write_text("a file")
    done = house.user("serve")
    assert done.returncode == 1
    assert ".config/systemd/user/lydian-coordinator.service cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- removing


def test_removing_stops_it_first_and_leaves_its_state(house: House) -> None:
    settled(house)
    assert house.user("serve").returncode == 0
    state = house.home / ".local/state/lydian/coordinator"
    state.mkdir(parents=True)
    before = len(house.calls)
    tried = house.user("serve", "--uninstall", "--dry-run")
    assert f"would remove {house.unit('lydian-coordinator')}" in tried.stdout
    assert len(house.calls) == before
    done = house.user("serve", "--uninstall")
    assert done.returncode == 0, done.stderr
    assert f"what it knows stays in {state}" in done.stderr
    assert state.is_dir()
    assert not house.unit("lydian-coordinator").exists()
    assert house.calls[before:] == [
        ["--user", "disable", "--now", "lydian-coordinator.service"],
        ["--user", "daemon-reload"],
    ]
    again = house.user("serve", "--uninstall")
    assert (again.returncode, again.stderr.startswith("nothing to remove")) == (0, True)


# ---------------------------------------------------------------- both sides, for real


@pytest.mark.acceptance
def test_a_coordinator_and_a_worker_installed_as_services_find_each_other(house: House) -> None:
    """The programs are real, and so are their units; systemd alone is played."""
    served = house.run("serve", "--scope", "user", "--wait", "250", "--port", "0", "--host", "127.0.0.1")
    assert served.returncode == 0, served.stderr
    log = (house.systemd / "lydian-coordinator.log").read_text()
    url = next(line.removeprefix("ready ") for line in log.splitlines() if line.startswith("ready "))
    token = (house.home / ".local/state/lydian/coordinator/join.token").read_text().strip()
    assert token not in served.stdout + served.stderr + house.everything

    worked = house.user("work", url, "--name", "attic-100", "--wait", "250", LYDIAN_TOKEN=token)
    assert worked.returncode == 0, worked.stderr
    assert "it has joined; its token is used and gone" in worked.stderr
    assert not (house.home / ".config/lydian/worker.env").exists()
    assert token not in worked.stdout + worked.stderr + house.everything

    calls = len(house.calls)
    again = house.user("work", url, "--name", "attic-100")  # it needs no token any more
    assert again.returncode == 0, again.stderr
    assert len(house.calls) == calls

    for side in ("work", "serve"):
        assert house.user(side, "--uninstall").returncode == 0
    assert (house.home / ".local/state/lydian/workers/attic-100/identity.json").exists()


# ---------------------------------------------------------------- services of the system


def test_a_service_of_the_system_is_shown_without_being_root(house: House) -> None:
    shown = house.run("serve", "--scope", "system", "--dry-run", "--user", "daemon")
    assert shown.returncode == 0, shown.stderr
    assert "User=daemon" in shown.stdout
    assert "would write /etc/systemd/system/lydian-coordinator.service" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("serve", "--state-dir", "/home/me/state"), "cannot be written by a system service"),
        (("work", URL, "--data", "x=/tmp/x"), "a system service does not see /tmp/x"),
    ],
)
def test_a_folder_that_a_hardened_service_cannot_see_is_refused(
    arguments: tuple[str, ...], said: str, house: House
) -> None:
    done = house.run(*arguments, "--scope", "system", "--dry-run")
    assert done.returncode == 1
    assert said in done.stderr


def test_only_root_installs_a_service_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(LydianError, match="installed by root") as refused:
        install.install(install.Wish(side=Side.serve, options=(), of_user=False))
    assert refused.value.code == "needs_root"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
@pytest.mark.parametrize(
    ("program", "said"), [("/bin/true", None), ("/bin/false", "cannot run"), ("/root/none", "cannot run")]
)
def test_the_user_of_a_service_is_made_to_try_the_program(
    program: str, said: str | None, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    wish = install.Wish(side=Side.serve, options=(), of_user=False, user="daemon")
    place = install.Place(house.home / "units", house.home / "etc", Path("/var/lib"))
    monkeypatch.setattr(install, "_program", lambda: program)
    service = install.plan(wish, place, Manager(of_user=False)).service
    if said is None:
        install.have_user(service, own=False)
    else:
        with pytest.raises(LydianError, match=said):
            install.have_user(service, own=False)


def test_a_user_that_cannot_be_made_is_told_in_useradds_words(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    program, asked = house.systemd / "bin" / "useradd", house.home / "asked"
    program.write_text(f'#!/bin/sh\necho "$@" > {asked}\necho cannot lock /etc/passwd >&2\nexit 10\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", house.environment["PATH"])
    wish = install.Wish(side=Side.serve, options=(), of_user=False, unit="lydian-of-no-machine")
    place = install.Place(house.home / "units", house.home / "etc", Path("/var/lib"))
    service = install.plan(wish, place, Manager(of_user=False)).service
    with pytest.raises(LydianError, match="could not be made: exit code 10 cannot lock /etc/passwd"):
        install.have_user(service, own=True)
    assert asked.read_text() == (
        "--system --user-group --no-create-home --shell /usr/sbin/nologin lydian-of-no-machine\n"
    )


def test_a_user_that_was_named_and_does_not_exist_is_not_made(house: House) -> None:
    wish = install.Wish(side=Side.serve, options=(), of_user=False, user="nobody-of-that-name")
    place = install.Place(house.home / "units", house.home / "etc", Path("/var/lib"))
    service = install.plan(wish, place, Manager(of_user=False)).service
    with pytest.raises(LydianError, match="there is no user nobody-of-that-name"):
        install.have_user(service, own=False)


# ---------------------------------------------------------------- advice and states


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        ({"system": "darwin"}, "launchd"),
        ({"kernel": "5.15.90.1-microsoft-standard-WSL2"}, "/etc/wsl.conf"),
        ({"in_container": True}, "deploy/Dockerfile"),
        ({"booted": True, "of_user": True}, "enable-linger"),
        ({}, "tmux"),
    ],
)
def test_the_advice_fits_the_machine(machine: dict[str, object], said: str) -> None:
    plain = {"system": "linux", "kernel": "6.1", "in_container": False, "booted": False, "of_user": False}
    assert said in instead(**(plain | machine))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("state", "down"),
    [
        (State("active", "running", 0, "0"), False),
        (State("activating", "start", 0, "0"), False),
        (State("activating", "auto-restart", 1, "1"), True),
        (State("active", "running", 3, "1"), True),
        (State("failed", "failed", 0, "2"), True),
    ],
)
def test_a_service_that_ended_once_counts_as_down(state: State, down: bool) -> None:
    assert state.down == down


def test_the_token_file_is_the_same_with_and_without_one() -> None:
    with_one = given.settings_with("A=1\n  LYDIAN_TOKEN=old\n", JOIN)
    assert (with_one, given.token_in(with_one)) == (f"A=1\nLYDIAN_TOKEN={JOIN}\n", JOIN)
    assert given.settings_with(with_one, None) == "A=1\n"
