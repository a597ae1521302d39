"""`lydian token` against a coordinator: where a secret goes, what is shown, and what ends."""

import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
import uvicorn

from client.calling import IN_ARGV, run_program, without_secret
from client.main import app
from client.tokens import seconds_of, write_private
from common.api import CoordinatorApi
from common.errors import LydianError
from common.messages import JobRequest, JobSpec
from server.app import create_app
from server.settings import Settings
from tests.rounds_kit import registration


class Running(NamedTuple):
    url: str
    folder: Path

    @property
    def admin(self) -> str:
        return (self.folder / "admin.token").read_text().strip()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("coordinator")
    made = create_app(Settings(state_dir=folder, reserve_bytes=1 << 16, tailscaled=folder / "none"))
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(made, log_config=None, timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        with CoordinatorApi(url) as api:
            api.version()  # answered when it is up: connections wait in the socket
        try:
            yield Running(url, folder)
        finally:
            server.should_exit = True
            thread.join()


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Lydian = Callable[..., Ran]


@pytest.fixture
def lydian(running: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lydian:
    for name in [name for name in os.environ if name.startswith("LYDIAN_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LYDIAN_URL", running.url)
    monkeypatch.setenv("LYDIAN_STATE_DIR", str(running.folder))

    def run(*arguments: str) -> Ran:
        with pytest.raises(SystemExit) as caught:
            run_program(app, "lydian", arguments)
        captured = capsys.readouterr()
        return Ran(int(caught.value.code or 0), captured.out, captured.err)

    return run


def passes(running: Running, token: str) -> bool:
    with CoordinatorApi(running.url, token) as api:
        try:
            api.jobs()
        except LydianError:
            return False
    return True


# ---------------------------------------------------------------- made


def test_a_made_token_is_all_of_stdout_and_counts(lydian: Lydian, running: Running) -> None:
    ran = lydian("token", "create", "--scope", "read", "--name", "screen", "--ttl", "30d")
    assert (ran.code, len(ran.out.split()), ran.err) == (0, 1, "")
    assert ran.out.startswith("lyd_read_")
    assert passes(running, ran.out.strip())


def test_a_token_in_a_file_is_its_owners_alone_and_nowhere_else(
    lydian: Lydian, running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "ada.token"
    ran = lydian("token", "create", "--scope", "submit", "--out", str(target))
    token = target.read_text().strip()
    assert (ran.code, ran.out, target.stat().st_mode & 0o777) == (0, "", 0o600)
    assert token.split("_")[3] not in ran.err
    monkeypatch.setenv("LYDIAN_TOKEN_FILE", str(target))
    refused = lydian("token", "list")
    assert (refused.code, "has scope submit" in refused.err) == (1, True), "it is the file's token that calls"
    monkeypatch.setenv("LYDIAN_TOKEN_FILE", str(tmp_path / "nothing"))
    assert "LYDIAN_TOKEN_FILE names" in lydian("jobs").err


def test_a_join_token_is_bare_in_a_pipe_and_a_whole_line_on_a_terminal(
    lydian: Lydian, monkeypatch: pytest.MonkeyPatch
) -> None:
    piped = lydian("token", "join", "--uses", "1", "--ttl", "1h", "--label", "attic")
    assert (piped.code, len(piped.out.split()), piped.out[:9]) == (0, 1, "lyd_join_")
    assert "LYDIAN_TOKEN=TOKEN lydian work URL" in piped.err
    assert piped.out.strip() not in piped.err
    as_json = json.loads(lydian("token", "join", "--json").out)
    assert as_json["token"].startswith(f"lyd_join_{as_json['id']}_")
    monkeypatch.setattr("client.tokens.is_terminal", lambda: True)
    assert lydian("token", "join").out.startswith("lydian work URL --token lyd_join_")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("--scope", "read", "--uses", "2"), "--uses and --label are for --scope join"),
     (("--scope", "read", "--label", "x"), "--uses and --label are for --scope join"),
     (("--scope", "join", "--ttl", "3 weeks"), "is no duration such as 30d"),
     (("--scope", "join", "--ttl", "0d"), "is no duration such as 30d"),
     (("--scope", "join", "--name", "a b"), "name: String should match"),
     (("--scope", "work",), "work"), ((), "--scope")],
)  # fmt: skip
def test_wrong_usage_is_said_before_anybody_is_asked(lydian: Lydian, arguments: tuple[str, ...], said: str) -> None:
    ran = lydian("token", "create", *arguments, "--url", "http://127.0.0.1:1")
    assert (ran.code, ran.out, said in ran.err) == (2, "", True)


# ---------------------------------------------------------------- listed, revoked, rotated


def test_a_list_says_all_but_the_secret_and_leaves_out_what_counts_no_more(lydian: Lydian, running: Running) -> None:
    token = lydian("token", "create", "--scope", "read", "--name", "listed").out.strip()
    passes(running, token)
    line = next(line for line in lydian("token", "list").out.splitlines() if "listed" in line)
    assert ["read" in line, "127.0.0.1" in line, "never" in line, token.split("_", 3)[3] in line] == [True] * 3 + [
        False
    ]
    revoked = lydian("token", "revoke", "listed")
    assert (revoked.code, revoked.out) == (0, f"{token.split('_')[2]} (listed) is revoked\n")
    assert not passes(running, token)
    assert "listed" not in lydian("token", "list").out
    found = {view["id"]: view for view in json.loads(lydian("token", "list", "--all", "--json").out)}
    assert found[token.split("_")[2]]["state"] == "revoked"


def test_the_coordinators_own_admin_token_is_rotated_in_its_file(lydian: Lydian, running: Running) -> None:
    before = running.admin
    ran = lydian("token", "rotate", "--overlap", "0s")
    assert (ran.code, ran.out) == (0, "")
    assert str(running.folder / "admin.token") in ran.err
    assert running.admin.split("_")[2] == before.split("_")[2]
    assert (passes(running, before), passes(running, running.admin)) == (False, True)
    assert lydian("jobs").code == 0


def test_a_rotated_token_of_somebody_else_is_printed_once(lydian: Lydian, running: Running) -> None:
    first = lydian("token", "create", "--scope", "submit", "--name", "bob").out.strip()
    second = lydian("token", "rotate", "bob").out.strip()
    assert (passes(running, first), passes(running, second), passes(running, first)) == (True, True, False)
    refused = lydian("token", "rotate", "nobody")
    assert (refused.code, "there is no token 'nobody' that counts" in refused.err) == (1, True)


def test_a_workers_credential_is_never_shown(lydian: Lydian, running: Running) -> None:
    with CoordinatorApi(running.url, (running.folder / "join.token").read_text().strip()) as api:
        welcome = api.register(registration("gpu-box"))
    ran = lydian("token", "rotate", "gpu-box")
    assert (ran.code, ran.out) == (0, "")
    said = "gpu-box is to fetch a new credential by TIME, when the old one ends; else it has to join anew\n"
    assert re.sub(r"20[0-9T:-]+Z", "TIME", ran.err) == said
    assert lydian("token", "revoke", "gpu-box").out.endswith("(gpu-box) is revoked\n")
    with CoordinatorApi(running.url, welcome.credential) as api, pytest.raises(LydianError, match="was revoked"):
        api.register(registration("gpu-box"))
    assert "credential" not in repr(welcome)


def test_a_revoked_tokens_jobs_go_on_unless_they_are_to_end_with_it_which_is_on_record(
    lydian: Lydian, running: Running
) -> None:
    token = lydian("token", "create", "--scope", "submit", "--name", "ada").out.strip()
    with CoordinatorApi(running.url, token) as api:
        jobs = [api.submit_job(JobRequest(key=key, spec=JobSpec(task="digits", rounds=1))).id for key in ("k1", "k2")]
        api.cancel(jobs[0])
    with CoordinatorApi(running.url, running.admin) as api:
        others = api.submit_job(JobRequest(key="k3", spec=JobSpec(task="digits", rounds=1))).id
    ran = lydian("token", "revoke", "ada")
    assert (ran.code, ran.err) == (0, f"go on (--cancel-jobs ends them): {jobs[1]}\n")
    with CoordinatorApi(running.url, running.admin) as api:
        assert api.job(jobs[1]).state == "queued"
        ran = lydian("token", "revoke", token.split("_")[2], "--cancel-jobs")
        assert (ran.code, ran.err) == (0, f"cancelled: {jobs[1]}\n")
        ended = api.job(jobs[1])
        assert ended.state == "cancelled"
        assert "who revoked the token ada that submitted it" in ended.reason
        assert api.job(others).state == "queued"
        (row,) = api.audit(job=jobs[1], action="job.cancelled").entries
        assert row.actor == f"admin:{running.admin.split('_')[2]}"
    assert lydian("token", "revoke", token.split("_")[2], "--cancel-jobs").err == "", "twice is once"


# ---------------------------------------------------------------- command lines


def test_a_token_on_a_command_line_is_warned_of_and_one_in_the_environment_is_not(
    lydian: Lydian, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lydian("jobs", "--token", running.admin).err.startswith(IN_ARGV)
    monkeypatch.setenv("LYDIAN_TOKEN", running.admin)
    assert IN_ARGV not in lydian("jobs").err


@pytest.mark.parametrize(
    ("given", "kept", "token"),
    [(["URL", "--token", "x", "--name", "a"], ["URL", "--name", "a"], "x"), (["--token=x", "URL"], ["URL"], "x"),
     (["URL", "--token"], ["URL", "--token"], None), (["URL"], ["URL"], None)],
)  # fmt: skip
def test_a_workers_token_is_taken_off_its_command_line(
    monkeypatch: pytest.MonkeyPatch, given: list[str], kept: list[str], token: str | None
) -> None:
    monkeypatch.delenv("LYDIAN_TOKEN", raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert (without_secret(given), os.environ.get("LYDIAN_TOKEN")) == (kept, token)


@pytest.mark.parametrize(("text", "seconds"), [("30d", 2_592_000), ("12h", 43_200), ("90m", 5400), ("45s", 45)])
def test_a_duration_is_a_number_with_its_unit(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


def test_a_file_that_cannot_be_written_says_that_the_token_is_lost(tmp_path: Path) -> None:
    with pytest.raises(LydianError, match="cannot be written") as refused:
        write_private(tmp_path / "nowhere" / "x.token", "lyd\n")
    assert "revoke" in refused.value.advice
