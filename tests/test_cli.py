"""The commands against a real HTTP server with canned answers: output, exit codes, pipes, tokens, child processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import safetensors.numpy
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse

from client import running, submit_job
from client.calling import Ending, run_program, whole_url
from client.main import _precision, app
from client.running import Children, wait_for_line
from common import __version__
from common.errors import LydianError, NotFoundError, UnauthenticatedError, UnavailableError
from common.messages import JobRequest, JobView, Progress, WorkerView
from common.weights import Notes, file_digest, save
from tests.privileges import interruptible

ROOT = Path(__file__).parent.parent
ADMIN = "lyd_admin_secret"
TASK_FILE = "def model(config): ...\ndef dataset(config, split): ...\n"
AT = "2026-01-01T00:00:00Z"


class Canned:
    """A coordinator that knows one job, one worker, and what it was asked."""

    def __init__(self, model: Path) -> None:
        self.url = ""
        self.model = model
        self.requests: list[JobRequest] = []
        self.asked: list[str] = []
        self.ending = "finished"
        self.cut_after: int | None = None  # events after which the next stream breaks off
        self.held = threading.Event()  # set: the stream ends; clear: it stays open after the facts
        self.held.set()
        self.away = False  # as if it had ended before it could say what tasks write

    def job(self, state: str = "training") -> dict[str, Any]:
        return {
            "id": "digits-1", "name": "numbers", "task": "digits", "state": state, "reason": "waiting for 2 updates",
            "submitted_at": AT, "round": 1, "rounds": 2, "metrics": {"accuracy": 0.9}, "spec": {"task": "digits"},
        }  # fmt: skip

    def facts(self) -> list[dict[str, Any]]:
        closed = {
            "type": "round", "seconds": 0.5, "workers": 2, "shards": 2, "samples": 100, "bytes_down": 10,
            "bytes_up": 10, "digest": "0" * 64, "size": 10, "metrics": {"train_loss": 0.3},
        }  # fmt: skip
        evaluation = {
            "type": "evaluation", "round": 1, "attempt": 1, "worker": "w-1", "metrics": {"accuracy": 0.9},
            "samples": 10, "seconds": 0.1, "best": True,
        }  # fmt: skip
        end = {"type": "job", "state": self.ending, "reason": "that is all"}
        return [
            {"id": number, "at": AT} | fact
            for number, fact in enumerate([closed | {"round": 1}, closed | {"round": 2}, evaluation, end], start=1)
        ]

    def stream(self, after: int) -> Iterator[str]:
        now = {
            "type": "now",
            "state": "training",
            "reason": "1 of 2",
            "round": 1,
            "rounds": 2,
            "received": 1,
            "shards": 2,
        }
        yield f"data: {json.dumps(now)}\n\n"
        for fact in self.facts()[after:]:
            if self.cut_after == fact["id"] - 1:
                self.cut_after = None
                return
            if fact["type"] == "job" and not self.held.is_set():
                self.held.wait(10)
            yield f"id: {fact['id']}\ndata: {json.dumps(fact)}\n\n"


WORKER = {
    "id": "w-1", "name": "gpu-box", "state": "working", "reason": "trains", "last_seen_s": 1.5, "version": "0.1.0",
    "hardware": {
        "hostname": "gpu-box", "system": "Linux", "python": "3.11", "cpu": "x", "cores": 8, "memory": 1,
        "gpus": [{"index": 1, "name": "RTX 3090", "memory": 1, "driver": "5"}],
        "torch": {"version": "2.7.1", "device": "cuda:1", "threads": 8},
    },
    "data": [], "trust": "none", "assignment": "digits-1: round 2, shard 0",
    "progress": {"doing": "training", "samples_per_s": 1234.0},
}  # fmt: skip
TROUBLE = {
    "id": 3, "at": AT, "worker": "gpu-box", "where": "round 1, shard 0, attempt 1", "code": "out_of_memory",
    "sentence": "CUDA out of memory", "detail": "Traceback:\n  \x1b[31mline 2\n",
}  # fmt: skip


def canned_app(canned: Canned) -> FastAPI:
    web = FastAPI()

    @web.exception_handler(LydianError)
    async def answer(request: Request, error: LydianError) -> JSONResponse:
        return JSONResponse(error.answer(), status_code=error.status)

    @web.middleware("http")
    async def only_admin(request: Request, go_on: Callable[[Request], Any]) -> Response:
        canned.asked.append(f"{request.method} {request.url.path}")
        if request.headers.get("Authorization") != f"Bearer {ADMIN}":
            return JSONResponse(UnauthenticatedError("no such token").answer(), status_code=401)
        return await go_on(request)  # type: ignore[no-any-return]

    def known(job: str) -> None:
        if job != "digits-1":
            raise NotFoundError(f"there is no job {job}", code="unknown_job")

    @web.post("/v1/jobs", status_code=201)
    async def submit(request: JobRequest) -> dict[str, Any]:
        canned.requests.append(request)
        return canned.job() | {"spec": request.spec.model_dump(mode="json")}

    @web.get("/v1/jobs")
    async def jobs() -> list[dict[str, Any]]:
        return [canned.job()]

    @web.get("/v1/jobs/{job}")
    async def one(job: str) -> dict[str, Any]:
        known(job)
        return canned.job()

    @web.post("/v1/jobs/{job}/{command}")
    async def act(job: str, command: str) -> dict[str, Any]:
        known(job)
        return canned.job({"cancel": "cancelled", "pause": "paused", "resume": "training"}[command])

    @web.get("/v1/jobs/{job}/logs")
    async def logs(job: str) -> list[dict[str, Any]]:
        return [TROUBLE]

    @web.get("/v1/jobs/{job}/output")
    async def output(job: str) -> list[dict[str, Any]]:
        if canned.away:
            raise UnavailableError("it ends just now")
        return [{"worker": "gpu-box", "where": "round 1, shard 0, attempt 2", "said": "epoch 1\n\x1b[31mepoch 2"}]

    @web.get("/v1/jobs/{job}/events")
    def events(job: str, request: Request) -> StreamingResponse:
        return StreamingResponse(canned.stream(int(request.headers["Last-Event-ID"])), media_type="text/event-stream")

    @web.get("/v1/jobs/{job}/model")
    async def model(job: str, which: str) -> FileResponse:
        canned.asked.append(which)
        return FileResponse(canned.model, headers={"ETag": f'"{file_digest(canned.model)}"'})

    @web.get("/v1/workers")
    async def workers() -> list[dict[str, Any]]:
        return [WORKER]

    @web.post("/v1/workers/{worker}/readmit")
    async def readmit(worker: str) -> dict[str, Any]:
        return WORKER | {"state": "idle", "reason": "waiting for work"}

    @web.post("/v1/workers/{worker}/drain")
    async def drain(worker: str) -> dict[str, Any]:
        return WORKER | {"state": "draining", "reason": "finishes round 2"}

    @web.post("/v1/workers/{worker}/pause")
    async def pause_worker(worker: str) -> dict[str, Any]:
        return WORKER | {"state": "paused", "reason": f"{worker} gives back round 2"}

    @web.post("/v1/workers/{worker}/resume")
    async def resume_worker(worker: str) -> dict[str, Any]:
        return WORKER | {"state": "idle", "reason": "waiting for work"}

    @web.post("/v1/tokens")
    async def tokens() -> dict[str, str]:
        return {"token": "lyd_join_new"}

    @web.get("/elsewhere/v1/jobs")
    async def elsewhere() -> dict[str, str]:
        return {"hello": "world"}

    return web


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Canned]:
    model = tmp_path_factory.mktemp("model") / "model.safetensors"
    save(
        model,
        {"head.weight": np.arange(6, dtype=np.float32).reshape(2, 3)},
        Notes(aliases={"tied.weight": "head.weight"}),
    )
    canned = Canned(model)
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        canned.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(canned_app(canned), log_config=None, timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield canned
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def coordinator(served: Canned, monkeypatch: pytest.MonkeyPatch) -> Canned:
    served.requests.clear()
    served.asked.clear()
    served.ending, served.cut_after, served.away = "finished", None, False
    served.held.set()
    for name in [name for name in os.environ if name.startswith("LYDIAN_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LYDIAN_URL", served.url)
    monkeypatch.setenv("LYDIAN_TOKEN", ADMIN)
    return served


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    def lines(self) -> list[str]:
        return self.out.splitlines()


Lydian = Callable[..., Ran]


@pytest.fixture
def lydian(coordinator: Canned, capsys: pytest.CaptureFixture[str]) -> Lydian:
    """Run one command line in this process, as the console script does."""

    def run(*arguments: str) -> Ran:
        with pytest.raises(SystemExit) as caught:
            run_program(app, "lydian", arguments)
        captured = capsys.readouterr()
        return Ran(int(caught.value.code or 0), captured.out, captured.err)

    return run


def lydian_process(*arguments: str) -> Ran:
    """Run one command line as a process of its own, its output in pipes."""
    done = subprocess.run([sys.executable, "-m", "client.main", *arguments], cwd=ROOT, capture_output=True, text=True)
    return Ran(done.returncode, done.stdout, done.stderr)


# ---------------------------------------------------------------- the program


def test_help_has_examples_and_needs_no_heavy_package() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "client.main", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert "lydian submit fashion-mnist --rounds 20 --watch" in done.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert not imported & {"httpx2", "pydantic", "rich", "numpy", "torch", "server", "worker"}


def test_version_is_printed_bare(lydian: Lydian) -> None:
    assert lydian("--version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [("no-such-command",), ("jobs", "--no-such-option"), ("watch",), ("submit",), ("submit", "digits", "--nope"),
     ("submit", "digits", "--task", "t.py"), ("pull", "digits-1", "-o", "x", "--best", "--round", "1"),
     ("jobs", "--url", "ftp://x"), ("jobs", "--url", "http://host:port")],
)  # fmt: skip
def test_wrong_usage_exits_2_and_asks_nobody(lydian: Lydian, coordinator: Canned, arguments: tuple[str, ...]) -> None:
    ran = lydian(*arguments)
    assert (ran.code, ran.out, coordinator.asked) == (Ending.USAGE, "", [])


@pytest.mark.parametrize("arguments", [("jobs",), ("submit", "digits"), ("watch", "digits-1"), ("token", "join")])
def test_no_coordinator_exits_3_with_a_sentence_and_advice(lydian: Lydian, arguments: tuple[str, ...]) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
    ran = lydian(*arguments, "--url", f"http://127.0.0.1:{port}")
    sentence, advice = ran.err.splitlines()
    assert (ran.code, ran.out) == (Ending.UNREACHABLE, "")
    assert sentence.startswith(f"the coordinator at http://127.0.0.1:{port} does not answer: ")
    assert "lydian serve" in advice


@pytest.mark.parametrize("command", ["watch", "cancel", "pause", "resume"])
def test_an_unknown_job_exits_1_with_the_sentence_of_the_coordinator(lydian: Lydian, command: str) -> None:
    assert lydian(command, "digits-7")[::2] == (1, "there is no job digits-7\n" + NotFoundError.advice + "\n")


def test_something_else_that_answers_is_named_and_no_traceback_is_shown(lydian: Lydian, coordinator: Canned) -> None:
    ran = lydian("jobs", "--url", f"{coordinator.url}/elsewhere")
    assert ran.code == Ending.FAILED
    assert ran.err.startswith(
        f"{coordinator.url}/elsewhere/v1/jobs answered something that this version does not understand"
    )


@pytest.mark.parametrize(
    ("given", "whole"),
    [("gpu-box:8470", "http://gpu-box:8470"), ("https://x/y", "https://x/y"), ("http://[::1]:8", "http://[::1]:8")],
)
def test_an_address_needs_no_scheme(given: str, whole: str) -> None:
    assert whole_url(given) == whole


# ---------------------------------------------------------------- tokens


def test_a_wrong_token_is_answered_by_the_coordinator(lydian: Lydian) -> None:
    assert "\nno such token\n" in lydian("jobs", "--token", "wrong").err


def test_a_missing_token_is_named_with_the_file_that_holds_it(
    lydian: Lydian, coordinator: Canned, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("LYDIAN_TOKEN")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    ran = lydian("jobs")
    assert ran.code == Ending.FAILED
    assert ran.err.startswith(f"{coordinator.url} wants a token, and none was given or found here\n")
    assert "admin.token" in ran.err


@pytest.mark.parametrize("named", [True, False])
def test_the_admin_token_of_a_coordinator_on_this_machine_is_found(
    lydian: Lydian, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: bool
) -> None:
    folder = tmp_path if named else tmp_path / "lydian" / "coordinator"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "admin.token").write_text(f"{ADMIN}\n")
    monkeypatch.delenv("LYDIAN_TOKEN")
    monkeypatch.setenv("LYDIAN_STATE_DIR" if named else "XDG_STATE_HOME", str(tmp_path))
    assert lydian("token", "join")[:2] == (0, "lyd_join_new\n")


def test_the_admin_token_never_goes_to_another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from client.calling import local_admin_token

    (tmp_path / "admin.token").write_text(ADMIN)
    monkeypatch.setenv("LYDIAN_STATE_DIR", str(tmp_path))
    addresses = [
        "http://127.0.0.1:1",
        "http://localhost:1",
        "http://[::1]:1",
        "http://100.64.0.1:1",
        "http://gpu-box:1",
    ]
    assert [local_admin_token(url) for url in addresses] == [ADMIN, ADMIN, ADMIN, None, None]


# ---------------------------------------------------------------- submit


def test_submit_prints_the_bare_id_and_sends_what_was_said(lydian: Lydian, coordinator: Canned, tmp_path: Path) -> None:
    (tmp_path / "my_task.py").write_text(TASK_FILE)
    file = tmp_path / "job.toml"
    file.write_text('task = "my_task.py"\nrounds = 2\n[data]\nshards = 4\n')
    flags = ["--rounds", "9", "--config", "depth=3", "--lr", "0.5", "--set", "train.lr=0.25", "--data-name", "mine"]
    assert lydian("submit", str(file), *flags) == (0, "digits-1\n", "")
    [request] = coordinator.requests
    spec = request.spec
    assert (spec.task, spec.rounds, spec.data.shards, spec.data.name) == ("my_task", 9, 4, "mine")
    assert (spec.train.lr, spec.config, request.task_source) == (0.25, {"depth": 3}, TASK_FILE)


def test_submit_says_on_stderr_what_is_seldom_meant(lydian: Lydian) -> None:
    ran = lydian("submit", "digits", "--algorithm", "diloco", "--local-steps", "20")
    assert (ran.code, ran.out) == (0, "digits-1\n")
    assert ran.err.startswith("caution: diloco with outer_momentum = 0.9 is meant for 50 local steps a round and more")


def test_submit_makes_a_new_key_each_time_unless_one_is_given(lydian: Lydian, coordinator: Canned) -> None:
    for arguments in ([], [], ["--key", "nightly"]):
        lydian("submit", "digits", *arguments)
    first, second, third = (request.key for request in coordinator.requests)
    assert first != second
    assert third == "nightly"


def test_submit_prints_the_view_as_json(lydian: Lydian) -> None:
    ran = lydian("submit", "digits", "--json")
    assert JobView.model_validate_json(ran.out).id == "digits-1"
    assert len(ran.lines()) == 1


def test_a_wrong_job_is_refused_before_anyone_is_asked(lydian: Lydian, coordinator: Canned) -> None:
    ran = lydian("submit", "digits", "--rounds", "many", "--set", "train.learning_rate=1")
    assert (ran.code, ran.out, coordinator.asked) == (Ending.FAILED, "", [])
    assert ran.err.splitlines() == [
        "unknown key train.learning_rate in --set: did you mean train.lr?",
        'rounds = "many" in --rounds: a whole number (at least 1 and at most 1,000,000) is allowed',
        "See `lydian submit --help` for every key.",
    ]


def test_submit_with_watch_prints_the_id_first_and_exits_as_the_job_ended(lydian: Lydian, coordinator: Canned) -> None:
    coordinator.ending = "cancelled"
    ran = lydian("submit", "digits", "--watch")
    assert (ran.code, ran.lines()[0], ran.lines()[-1]) == (Ending.CANCELLED, "digits-1", "cancelled: that is all")


def test_submit_job_is_the_same_command_as_a_program_of_its_own(coordinator: Canned) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "client.submit_job", "digits", "--rounds", "3"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "digits-1\n", "")
    assert [request.spec.rounds for request in coordinator.requests] == [3]


@pytest.mark.parametrize("program", ["lydian submit", "submit_job"])
def test_the_help_of_submit_lists_every_key_under_its_section(
    capsys: pytest.CaptureFixture[str], lydian: Lydian, program: str
) -> None:
    if program == "submit_job":
        with pytest.raises(SystemExit):
            run_program(submit_job.make_app("submit_job"), "submit_job", ["--help"])
        text = capsys.readouterr().out
    else:
        text = lydian("submit", "--help").out
    assert f"{program} job.toml --lr 0.05" in text
    assert text.index("[train]:") < text.index("--momentum X") < text.index("[data]:") < text.index("--alpha X")
    assert "--partition iid|quantity|dirichlet|labels|natural|local" in text


# ---------------------------------------------------------------- watch


@pytest.mark.parametrize(
    ("ending", "code"), [("finished", Ending.FINE), ("failed", Ending.FAILED), ("cancelled", Ending.CANCELLED)]
)
def test_watch_exits_as_the_job_ended(lydian: Lydian, coordinator: Canned, ending: str, code: Ending) -> None:
    coordinator.ending = ending
    ran = lydian("watch", "digits-1")
    assert (ran.code, ran.lines()[-1]) == (code, f"{ending}: that is all")


def test_watch_in_a_pipe_is_plain_even_where_colour_is_forced(
    coordinator: Canned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    ran = lydian_process("watch", "digits-1")
    assert (ran.code, len(ran.lines())) == (0, 4)
    assert "\x1b" not in ran.out


def test_watch_json_is_the_facts_and_its_last_line_is_terminal(lydian: Lydian, coordinator: Canned) -> None:
    facts = [json.loads(line) for line in lydian("watch", "digits-1", "--json").lines()]
    assert facts == coordinator.facts()
    assert (facts[-1]["type"], facts[-1]["state"]) == ("job", "finished")


def test_watch_goes_on_after_a_cut_line_and_shows_every_fact_once(lydian: Lydian, coordinator: Canned) -> None:
    coordinator.cut_after = 2
    ran = lydian("watch", "digits-1", "--json")
    assert [json.loads(line)["id"] for line in ran.lines()] == [1, 2, 3, 4]


def test_ctrl_c_leaves_the_job_running_and_says_so(coordinator: Canned) -> None:
    coordinator.held.clear()
    watching = subprocess.Popen(
        [sys.executable, "-m", "client.main", "watch", "digits-1"], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible,
    )  # fmt: skip
    with watching:
        assert watching.stdout is not None
        assert watching.stdout.readline().startswith("round 1 of 2")
        watching.send_signal(signal.SIGINT)
        _, err = watching.communicate(timeout=10)
    coordinator.held.set()
    assert watching.returncode == Ending.INTERRUPTED
    assert err.startswith("digits-1 goes on; `lydian watch digits-1`")
    assert "POST /v1/jobs/digits-1/cancel" not in coordinator.asked


# ---------------------------------------------------------------- reads and orders


def test_jobs_in_a_pipe_are_aligned_text(lydian: Lydian) -> None:
    header, row = lydian("jobs").lines()
    assert header.split() == ["JOB", "NAME", "TASK", "STATE", "ROUND", "ACCURACY", "REASON"]
    assert row.split()[:6] == ["digits-1", "numbers", "digits", "training", "1/2", "0.900"]
    assert header.index("REASON") == row.index("waiting for 2 updates")


@pytest.mark.parametrize(
    ("best", "reason", "now", "cell"),
    [
        ("fp32", "", None, "fp32"),  # a worker of protocol 1
        ("bf16", "compute capability 8.6", None, "bf16 (compute capability 8.6)"),
        ("bf16", "compute capability 8.6", "bf16", "bf16 (compute capability 8.6)"),
        ("bf16", "compute capability 8.6", "fp32", "fp32, best bf16 (compute capability 8.6)"),
    ],
)
def test_a_worker_shows_what_it_computes_in_and_what_it_could(
    best: str, reason: str, now: str | None, cell: str
) -> None:
    view = WorkerView.model_validate(WORKER)
    torch = view.hardware.torch.model_copy(update={"precision": best, "precision_reason": reason})
    hardware = view.hardware.model_copy(update={"torch": torch})
    progress = Progress(doing="training", precision=now)  # type: ignore[arg-type]
    assert _precision(view.model_copy(update={"hardware": hardware, "progress": progress})) == cell


def test_workers_in_a_pipe_name_the_gpu_that_is_used(lydian: Lydian) -> None:
    _, row = lydian("workers").lines()
    for expected in (
        "w-1",
        "gpu-box",
        "working",
        "1.50 s ago",
        "cuda:1 RTX 3090",
        "2.7.1",
        "round 2, shard 0",
        "1,234/s",
    ):
        assert expected in row


def test_a_worker_without_a_line_or_a_tailnet_has_dashes_and_no_column_for_its_machine(lydian: Lydian) -> None:
    header, row = lydian("workers").lines()
    assert "NODE" not in header
    at = header.index("PATH")
    assert row[at:].split()[:4] == ["-", "-", "-", "-"]


def test_a_relayed_worker_is_shown_with_its_machine_and_line_and_warned_of(
    lydian: Lydian, monkeypatch: pytest.MonkeyPatch
) -> None:
    further = {
        "link": {"down": 475_000.0, "up": 12_500.0, "latency_s": 0.0692},
        "node": {"stable_id": "n2CNTRL", "name": "far.tailnet.test", "owner": "tag:lydian-worker"},
        "path": {"kind": "relay", "via": "fra"}, "address": "100.64.0.3",
        "warnings": ["relayed by \x1b[31mfra, which is slow"],
    }  # fmt: skip
    monkeypatch.setitem(globals(), "WORKER", WORKER | further)
    said = lydian("workers")
    header, row = said.lines()
    assert "NODE" in header
    for expected in (
        "far.tailnet.test (tag:lydian-worker)",
        "relayed by fra",
        "3.8 Mbit/s",
        "0.10 Mbit/s",
        "69 ms",
    ):
        assert expected in row
    assert "warning: gpu-box: relayed by \N{REPLACEMENT CHARACTER}[31mfra, which is slow" in said.err


@pytest.mark.parametrize("arguments", [("jobs",), ("workers",), ("logs", "digits-1")])
def test_lists_are_json_arrays_when_asked_for(lydian: Lydian, arguments: tuple[str, ...]) -> None:
    [item] = json.loads(lydian(*arguments, "--json").out)
    assert item["id"] in ("digits-1", "w-1", 3)


def test_logs_are_whole_and_cannot_steer_the_terminal(lydian: Lydian) -> None:
    assert lydian("logs", "digits-1").lines() == [
        f"{AT} gpu-box round 1, shard 0, attempt 1: CUDA out of memory (out_of_memory)",
        "Traceback:",
        "  \N{REPLACEMENT CHARACTER}[31mline 2",
    ]


@pytest.mark.parametrize("ending", ["finished", "failed", "cancelled"])
def test_followed_logs_go_on_with_what_tasks_write_and_end_with_the_job(
    lydian: Lydian, coordinator: Canned, ending: str
) -> None:
    coordinator.ending = ending
    ran = lydian("logs", "digits-1", "--follow")
    assert ran.lines()[1:] == [
        "Traceback:",
        "  \N{REPLACEMENT CHARACTER}[31mline 2",
        "gpu-box  epoch 1",
        "gpu-box  \N{REPLACEMENT CHARACTER}[31mepoch 2",
    ]
    assert ran.code == {"finished": 0, "failed": 1, "cancelled": 4}[ending]


def test_followed_logs_as_json_are_one_object_a_line(lydian: Lydian) -> None:
    trouble, *lines = map(json.loads, lydian("logs", "digits-1", "-f", "--json").out.splitlines())
    assert trouble == TROUBLE | {"type": "trouble", "cause": "", "advice": "", "scene": None}
    assert lines == [
        {"type": "output", "worker": "gpu-box", "where": "round 1, shard 0, attempt 2", "line": line}
        for line in ("epoch 1", "\x1b[31mepoch 2")
    ]


def test_followed_logs_outlive_a_coordinator_that_ends_between_an_event_and_a_look(
    lydian: Lydian, coordinator: Canned
) -> None:
    coordinator.away = True
    ran = lydian("logs", "digits-1", "--follow")
    assert ran.code == 0
    assert ran.err.count("it ends just now") == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("cancel", "digits-1"), "digits-1 is cancelled: waiting for 2 updates"),
        (("pause", "digits-1"), "digits-1 is paused: waiting for 2 updates"),
        (("resume", "digits-1"), "digits-1 is training: waiting for 2 updates"),
        (("drain", "w-1"), "gpu-box is draining: finishes round 2"),
        (("readmit", "w-1"), "gpu-box is idle: waiting for work"),
        (("pause", "--worker", "w-1"), "gpu-box is paused: w-1 gives back round 2"),
        (("resume", "--worker", "w-1"), "gpu-box is idle: waiting for work"),
    ],
)
def test_an_order_is_answered_with_the_state_that_followed(
    lydian: Lydian, arguments: tuple[str, ...], line: str
) -> None:
    assert lydian(*arguments) == (0, f"{line}\n", "")


@pytest.mark.parametrize("command", ["pause", "resume"])
@pytest.mark.parametrize("named", [(), ("digits-1", "--worker", "w-1")])
def test_an_order_to_both_a_job_and_a_worker_or_to_neither_is_wrong_usage(
    lydian: Lydian, command: str, named: tuple[str, ...]
) -> None:
    code, out, err = lydian(command, *named)
    assert (code, out) == (2, "")
    assert "one of the two" in err


def test_a_reader_that_goes_away_is_no_traceback(coordinator: Canned) -> None:
    command = f"{sys.executable} -m client.main watch digits-1 --json | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 1
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- pull


@pytest.mark.parametrize(
    ("arguments", "which"), [((), "newest"), (("--best",), "best"), (("--round", "3"), "3")]
)  # fmt: skip
def test_pull_writes_every_name_of_a_tied_weight(
    lydian: Lydian, coordinator: Canned, tmp_path: Path, arguments: Sequence[str], which: str
) -> None:
    target = tmp_path / "model.safetensors"
    assert lydian("pull", "digits-1", "-o", str(target), *arguments) == (0, f"{target}\n", "")
    weights = safetensors.numpy.load_file(target)
    assert set(weights) == {"head.weight", "tied.weight"}
    assert np.array_equal(weights["tied.weight"], np.arange(6, dtype=np.float32).reshape(2, 3))
    assert which in coordinator.asked
    assert list(tmp_path.iterdir()) == [target]


def test_pull_overwrites_only_by_force(lydian: Lydian, coordinator: Canned, tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    target.write_text("mine")
    ran = lydian("pull", "digits-1", "-o", str(target))
    assert (ran.code, ran.err) == (1, f"{target} exists already\n--force overwrites it.\n")
    assert target.read_text() == "mine"
    assert coordinator.asked == []
    assert lydian("pull", "digits-1", "-o", str(target), "--force").code == 0
    assert set(safetensors.numpy.load_file(target)) == {"head.weight", "tied.weight"}


def test_pull_into_a_folder_that_is_not_there_is_one_sentence(lydian: Lydian, tmp_path: Path) -> None:
    ran = lydian("pull", "digits-1", "-o", str(tmp_path / "none" / "m.safetensors"))
    assert (ran.code, ran.err.splitlines()[0]) == (
        1, f"{tmp_path}/none/m.safetensors cannot be written: No such file or directory"
    )  # fmt: skip


# ---------------------------------------------------------------- other processes


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def gone(pid: int) -> bool:
    """Whether the process has ended, waiting for it a little."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:  # ended; whoever adopted it does not care
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.01)
    return False


SLEEP = "import time; print('ready now', flush=True); time.sleep(60)"
STUBBORN = (
    "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "grandchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    "print('ready', grandchild.pid, flush=True); time.sleep(60)"
)


@pytest.mark.parametrize("command", ["serve", "work"])
def test_serve_and_work_become_the_real_program_with_all_arguments(
    lydian: Lydian, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    seen: list[list[str]] = []

    class BecameAnotherError(BaseException):
        pass

    def execv(path: str, arguments: list[str]) -> None:  # the one call that a test cannot come back from
        seen.append([path, *arguments])
        raise BecameAnotherError

    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(BecameAnotherError):
        lydian(command, "http://x", "--name", "n", "--help", "--", "-v")
    module = {"serve": "server", "work": "worker"}[command]
    assert seen[0][:2] == [sys.executable, sys.executable]
    assert seen[0][seen[0].index("-m") :] == ["-m", module, "http://x", "--name", "n", "--help", "--", "-v"]


def test_a_folder_named_worker_is_not_taken_for_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "worker.py").write_text("print('not me')")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", "from client.running import python_module; print(python_module('worker', [])[1:])"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "['-P', '-m', 'worker']\n"


def test_missing_packages_are_named_with_the_way_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(running._NEEDS, "server", ("fastapi", "no_such_package"))
    with pytest.raises(LydianError, match=r"needs no_such_package, which .* does not have") as caught:
        running.python_module("server", [])
    assert "requirements_server.txt" in caught.value.advice


def test_children_end_when_the_block_fails(tmp_path: Path) -> None:
    children = Children(tmp_path)

    def fail_after_start() -> None:
        with children:
            wait_for_line(children.start("sleeper", python(SLEEP), os.environ), "ready ", timeout_s=10)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_after_start()
    assert children.started[0].process.returncode == -signal.SIGTERM


def test_a_child_that_does_not_listen_is_killed_with_its_own_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "GRACE_S", 0.1)
    with Children(tmp_path) as children:
        grandchild = int(wait_for_line(children.start("deaf", python(STUBBORN), os.environ), "ready ", timeout_s=10))
    assert children.started[0].process.returncode == -signal.SIGKILL
    assert gone(grandchild)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_children_end_even_when_their_starter_is_killed(tmp_path: Path) -> None:
    starter = subprocess.Popen(
        python(
            "import os, sys, time; from pathlib import Path; from client.running import Children\n"
            f"c = Children(Path({str(tmp_path)!r})).start('x', [sys.executable, '-c', {SLEEP!r}], os.environ)\n"
            "print(c.process.pid, flush=True); time.sleep(60)"
        ),
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with starter:
        assert starter.stdout is not None
        child = int(starter.stdout.readline())
        starter.kill()
    assert gone(child)


def test_a_child_that_ends_by_itself_is_noticed_with_its_log(tmp_path: Path) -> None:
    with Children(tmp_path) as children:
        child = children.start("broken", python("import sys; sys.exit('no torch here')"), os.environ)
        with pytest.raises(LydianError, match="broken ended with exit code 1"):
            wait_for_line(child, "ready ", timeout_s=10)
        with pytest.raises(LydianError, match="broken ended by itself with exit code 1"):
            children.check()
    assert child.tail() == "no torch here"


def test_a_child_that_is_never_ready_is_not_waited_for_longer(tmp_path: Path) -> None:
    started = time.monotonic()
    with Children(tmp_path) as children, pytest.raises(LydianError, match=r"slow was not ready in 0 s"):
        wait_for_line(
            children.start("slow", python("import time; time.sleep(60)"), os.environ), "ready ", timeout_s=0.1
        )
    assert time.monotonic() - started < 5
