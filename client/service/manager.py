"""Asking systemd: `systemctl` of the system or of the user, and what its journal says."""

import getpass
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.errors import LydianError

LOOK_S = 0.25  # between two looks at a service that starts
ANSWER_S = 90.0  # seconds, for systemctl to answer
LAST_LINES = 12


@dataclass(frozen=True)
class State:
    """How a service stands, as systemd sees it."""

    active: str  # active, activating, deactivating, inactive, failed
    detail: str  # running, auto-restart, …
    restarts: int
    exit_code: str

    @property
    def down(self) -> bool:
        """It ended by itself at least once since it was started, or is not to run."""
        return self.active in ("failed", "inactive") or self.detail == "auto-restart" or self.restarts > 0

    def __str__(self) -> str:
        return f"{self.active} ({self.detail})"


class _UnansweredError(LydianError):
    """systemctl took too long."""


@dataclass(frozen=True)
class Manager:
    """The system's service manager, or that of this user."""

    of_user: bool

    @property
    def words(self) -> list[str]:
        """How its commands begin."""
        return ["systemctl", "--user"] if self.of_user else ["systemctl"]

    def command(self, *arguments: str) -> str:
        """A command as a person would type it."""
        return " ".join([*([] if self.of_user or os.geteuid() == 0 else ["sudo"]), *self.words, *arguments])

    def journal(self, unit: str) -> str:
        """The command that reads a service's log."""
        return f"journalctl {'--user ' if self.of_user else ''}-u {unit}"

    def require(self) -> None:
        """Make sure that it is there and answers.

        Raises:
            LydianError: no_systemd, with what to do instead.
        """
        if shutil.which("systemctl") is None:
            raise _no_systemd("there is no systemctl on this machine", of_user=self.of_user)
        asked = self._ask("show", "--property=Version")
        if asked.returncode != 0 or "Version=" not in asked.stdout:
            said = " ".join(asked.stderr.split()) or f"exit code {asked.returncode}"
            raise _no_systemd(f"`{' '.join(self.words)}` does not answer: {said}", of_user=self.of_user)

    def restart(self, unit: str, limit_s: float) -> bool:
        """Start a service, stop it before if it runs, and wait until it is up. The caller says so.

        Returns:
            Whether it is up; False: not yet, after `limit_s` seconds, and systemd goes on with it.

        Raises:
            LydianError: it ended (code service_failed), with the last lines of its log.
        """
        try:
            done = self._ask("restart", f"{unit}.service", limit_s=limit_s)
        except _UnansweredError:
            return False
        if done.returncode != 0:
            raise self.failure(unit, f"{unit} could not be started: {' '.join(done.stderr.split())}")
        return True

    def failure(self, unit: str, sentence: str) -> LydianError:
        """That a service does not run, with what it said itself."""
        last = "\n".join(f"    {line}" for line in self.last_words(unit).splitlines())
        return LydianError(
            f"{sentence}\nIts log ends with:\n{last}",
            code="service_failed",
            advice=f"`{self.journal(unit)}` shows all of it. The service stays installed and is tried again, "
            f"unless the cause is one that stays; `{self.command('stop', unit)}` stops it.",
        )

    def do(self, *arguments: str, limit_s: float = ANSWER_S) -> None:
        """Run a command of it.

        Raises:
            LydianError: systemctl_failed, with what it said.
        """
        done = self._ask(*arguments, limit_s=limit_s)
        if done.returncode != 0:
            raise LydianError(
                f"`{' '.join([*self.words, *arguments])}` failed with exit code {done.returncode}: "
                f"{' '.join(done.stderr.split()) or 'it said nothing'}",
                code="systemctl_failed",
                advice="What was written before stays; run the same command again when the cause is gone.",
            )

    def state(self, unit: str) -> State:
        """How a service stands; one that systemd does not know is inactive."""
        names = ("ActiveState", "SubState", "NRestarts", "ExecMainStatus")
        asked = self._ask("show", f"{unit}.service", *(f"--property={name}" for name in names))
        found = dict(line.split("=", 1) for line in asked.stdout.splitlines() if "=" in line)
        return State(
            active=found.get("ActiveState", "unknown"),
            detail=found.get("SubState", "unknown"),
            restarts=int(found.get("NRestarts") or 0),
            exit_code=found.get("ExecMainStatus", "unknown"),
        )

    def is_enabled(self, unit: str) -> bool:
        """Whether it starts by itself."""
        return self._ask("is-enabled", f"{unit}.service").stdout.strip() == "enabled"

    def last_words(self, unit: str) -> str:
        """The end of a service's log, or why it cannot be had."""
        command = [*self.journal(unit).split(), "-n", str(LAST_LINES), "-o", "cat", "--no-pager"]
        try:
            shown = subprocess.run(command, capture_output=True, text=True, check=False, timeout=ANSWER_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"(the journal cannot be read: {error})"
        return shown.stdout.rstrip() or shown.stderr.strip() or "(the journal is empty)"

    def lingers(self) -> bool:
        """Whether this user's services run without the user being logged in; False where it cannot be told."""
        if shutil.which("loginctl") is None:
            return False
        asked = subprocess.run(
            ["loginctl", "show-user", getpass.getuser(), "--property=Linger", "--value"],
            capture_output=True, text=True, check=False, timeout=ANSWER_S,
        )  # fmt: skip
        return asked.stdout.strip() == "yes"

    def _ask(self, *arguments: str, limit_s: float = ANSWER_S) -> subprocess.CompletedProcess[str]:
        command = [*self.words, *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_s)
        except subprocess.TimeoutExpired as error:
            raise _UnansweredError(
                f"`{' '.join(command)}` did not answer in {limit_s:g} s",
                code="systemctl_failed",
                advice=f"Look at `{self.command('status')}`, then run the same command again.",
            ) from error


def wait_until(there: Callable[[], bool], state: Callable[[], State], *, limit_s: float) -> State | None:
    """Look until something is there, or the service is down, or the time is up. The caller says what is waited for.

    Returns:
        None: it is there. Else the service's last state.
    """
    until = time.monotonic() + limit_s
    while not there():
        now = state()
        if now.down or time.monotonic() > until:
            return now
        time.sleep(LOOK_S)
    return None


# ---------------------------------------------------------------- where there is none


def _no_systemd(why: str, *, of_user: bool) -> LydianError:
    advice = instead(
        system=sys.platform,
        kernel=platform.release(),
        in_container=any(Path(mark).exists() for mark in ("/.dockerenv", "/run/.containerenv")),
        booted=Path("/run/systemd/system").is_dir(),
        of_user=of_user,
    )
    return LydianError(f"No service can be installed: {why}", code="no_systemd", advice=advice)


def instead(*, system: str, kernel: str, in_container: bool, booted: bool, of_user: bool) -> str:
    """What to do on a machine whose systemd does not answer.

    Args:
        system: as `sys.platform`.
        kernel: its release; Microsoft's names itself.
        in_container: a container engine left its mark.
        booted: systemd started this machine.
        of_user: the user's manager was asked, not the system's.
    """
    if system == "darwin":
        return "macOS has launchd: run `lydian serve` or `lydian work` from a launch agent, or in a terminal."
    if "microsoft" in kernel.lower() and not booted:
        return (
            "WSL starts systemd if /etc/wsl.conf says `[boot]` and `systemd=true`: add that, run `wsl --shutdown` in "
            "Windows, and try again."
        )
    if in_container and not booted:
        return "In a container, let `lydian serve` or `lydian work` be its command: deploy/Dockerfile shows it."
    if booted and of_user:
        return (
            "Log in as this user itself (su and sudo bring no user manager), or let root run "
            "`loginctl enable-linger USER`; or install a system service: sudo, with the whole path of this lydian."
        )
    return "Let your init system or tmux run `lydian serve` or `lydian work`; both end in good order on SIGTERM."
