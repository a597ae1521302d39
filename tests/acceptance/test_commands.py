"""The commands against a real fleet, as a person or a script uses them: stdout, exit codes, files."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.weights import file_digest
from tests.acceptance import forks
from tests.acceptance.kit import PATIENCE_S, LocalFleet, Process, free_port, wait_for

pytestmark = pytest.mark.acceptance

DIGIT = (1, 8, 8)
LINEAR = """import torch
from torch.utils.data import TensorDataset

def model(config):
    return torch.nn.Linear(2, 2)

def dataset(config, split):
    return TensorDataset(torch.zeros(8, 2), torch.zeros(8).long())
"""
SMALL = ["--shards", "2", "--min-workers", "2", "--local-epochs", "1"]
ONE = ["--shards", "1", "--local-epochs", "1"]  # of a task file: whoever has run one starts a new child after it


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    with LocalFleet(tmp_path_factory.mktemp("fleet"), LYDIAN_MAX_ATTEMPTS="1", LYDIAN_HEARTBEAT_S="0.5") as running:
        running.start_workers(2, "--trust", "any")
        yield running


def lydian(fleet: LocalFleet, *arguments: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LYDIAN_")}
    environment |= {"LYDIAN_URL": fleet.url, "LYDIAN_TOKEN": token or fleet.admin_token}
    return forks.run(["-m", "client.main", *arguments], environment, timeout_s=PATIENCE_S)


def test_a_job_submitted_watched_and_pulled_by_commands(fleet: LocalFleet, tmp_path: Path) -> None:
    submitted = lydian(fleet, "submit", "digits", "--rounds", "2", *SMALL)
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()
    assert job.startswith("digits-")
    watched = lydian(fleet, "watch", job, "--json")
    assert watched.returncode == 0, watched.stderr
    lines = [json.loads(line) for line in watched.stdout.splitlines()]
    rounds = [line for line in lines if line["type"] == "round"]
    assert [line["round"] for line in rounds] == [1, 2]
    wanted = {"round", "seconds", "workers", "samples", "bytes_down", "bytes_up", "digest"}
    assert all(wanted <= line.keys() for line in rounds)
    assert {line["round"] for line in lines if line["type"] == "evaluation" and "accuracy" in line["metrics"]} == {1, 2}
    assert lines[-1]["type"] == "job"
    assert lines[-1]["state"] == "finished"
    target = tmp_path / "model.safetensors"
    for choice in ([], ["--round", "1"], ["--best"]):
        pulled = lydian(fleet, "pull", job, "-o", str(target), "--force", *choice)
        assert pulled.returncode == 0, pulled.stderr
        assert len(load_file(target)) == 6
    shown = json.loads(lydian(fleet, "jobs", "--json").stdout)
    assert [one["state"] for one in shown if one["id"] == job] == ["finished"]


@pytest.fixture(scope="module")
def finished(fleet: LocalFleet) -> str:
    """A job that is over."""
    return fleet.finish(fleet.submit(task="digits", rounds=1, train={"local_epochs": 1}, data={"shards": 1})).id


def test_a_pulled_folder_tells_what_the_model_is(fleet: LocalFleet, finished: str, tmp_path: Path) -> None:
    job, folder = finished, tmp_path / "digits"
    pulled = lydian(fleet, "pull", job, "-o", f"{folder}/")
    assert (pulled.returncode, pulled.stdout) == (0, f"{folder}\n"), pulled.stderr
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    card = (folder / "README.md").read_text()
    for part in ("after round 1 of 1", "| Workers | w", "| accuracy |", file_digest(folder / "model.safetensors")):
        assert part in card
    assert json.loads((folder / "config.json").read_text())["task"] == "digits"
    assert "exists already" in lydian(fleet, "pull", job, "-o", str(folder)).stderr


def test_an_exported_program_has_the_weights_and_takes_any_number_of_samples(
    fleet: LocalFleet, finished: str, tmp_path: Path
) -> None:
    target, weights = tmp_path / "digits.pt2", tmp_path / "digits.safetensors"
    fleet.api.pull(finished, weights)
    exported = lydian(fleet, "export", finished, "--to", str(target))
    assert (exported.returncode, exported.stdout) == (0, f"{target}\n"), exported.stderr
    program, kept = torch.export.load(target), load_file(weights)
    assert all(torch.equal(value, kept[name]) for name, value in program.state_dict.items())
    assert program.module()(torch.zeros(5, *DIGIT)).shape == (5, 10)


def test_a_task_file_runs_here_only_with_consent(fleet: LocalFleet, tmp_path: Path) -> None:
    task = tmp_path / "mine.py"
    task.write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n{LINEAR}")
    job = lydian(fleet, "submit", "--task", str(task), "--rounds", "1", *ONE, "--watch").stdout.split()[0]
    fleet.await_workers(2)  # the one that had no work of it may still be loading it
    (tmp_path / "ran").unlink()  # by the workers
    refused = lydian(fleet, "export", job, "--to", str(tmp_path / "m.pt2"))
    assert refused.returncode == 1
    assert "would run on this machine as you" in refused.stderr
    assert "--run-task-file" in refused.stderr
    assert not (tmp_path / "ran").exists()
    assert lydian(fleet, "pull", job, "-o", f"{tmp_path}/look/").returncode == 0
    assert (tmp_path / "look" / "task.py").read_text() == task.read_text()
    assert not (tmp_path / "ran").exists()


def test_what_a_task_prints_is_on_its_job_s_page_while_it_trains(fleet: LocalFleet, tmp_path: Path) -> None:
    task = tmp_path / "talks.py"
    task.write_text(
        f"{LINEAR}\ndef loss(model, batch, config):\n    print('one <b>more</b> batch')\n"
        "    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])\n"
    )
    long = ["--shards", "1", "--local-seconds", "600"]
    job = lydian(fleet, "submit", "--task", str(task), "--rounds", "1", *long).stdout.strip()
    asked = urllib.request.Request(
        f"{fleet.url}/ui/jobs/{job}/output", headers={"Authorization": f"Bearer {fleet.admin_token}"}
    )

    def shown() -> str | None:
        page = urllib.request.urlopen(asked, timeout=30).read().decode()
        return page if "one " in page else None

    assert "one &lt;b&gt;more&lt;/b&gt; batch" in wait_for("the task to be heard", shown)
    assert any(worker.progress and worker.progress.memory_used for worker in fleet.api.workers())
    fleet.api.cancel(job)


def test_what_a_task_prints_is_followed_through_a_killed_coordinator_and_its_trouble_comes_after(
    fleet: LocalFleet, tmp_path: Path
) -> None:
    task, heard = tmp_path / "counts.py", tmp_path / "heard"
    task.write_text(
        f"import pathlib, time\n{LINEAR}\nseen = 0\n\ndef loss(model, batch, config):\n    global seen\n"
        "    seen += 1\n    print('batch', seen, flush=True)\n"
        f"    while not pathlib.Path({str(heard)!r}).exists():\n        time.sleep(0.02)\n"
        "    raise RuntimeError('no luck today')\n"
    )
    job = lydian(fleet, "submit", "--task", str(task), "--rounds", "1", *ONE).stdout.strip()
    environment = dict(os.environ) | {"LYDIAN_URL": fleet.url, "LYDIAN_TOKEN": fleet.admin_token}
    follows = [sys.executable, "-m", "client.main", "logs", job, "--follow", "--json"]
    with subprocess.Popen(follows, env=environment, stdout=subprocess.PIPE, text=True) as following:
        try:
            assert following.stdout is not None
            first = json.loads(following.stdout.readline())
            assert fleet.coordinator is not None
            fleet.coordinator.kill()  # who follows waits for the next one
            fleet.start_coordinator()
            heard.touch()
            others = [json.loads(line) for line in following.stdout]
            ended = following.wait(PATIENCE_S)
        finally:
            heard.touch()
            following.kill()
    assert first == {
        "type": "output", "worker": first["worker"], "where": "round 1, shard 0, attempt 1", "line": "batch 1",
    }  # fmt: skip
    assert first not in others
    trouble = next(one for one in others if one["type"] == "trouble")
    assert (trouble["worker"], trouble["cause"]) == (first["worker"], "task_failed")
    assert ended == 1
    again = lydian(fleet, "logs", job, "--follow")
    assert "RuntimeError: no luck today" in again.stdout
    assert (again.returncode, again.stderr) == (1, "")


def test_top_shows_the_fleet_once_in_a_pipe(fleet: LocalFleet) -> None:
    plain = lydian(fleet, "top", "--once")
    assert plain.returncode == 0, plain.stderr
    assert "2 workers: 2 " in plain.stdout
    assert "\x1b" not in plain.stdout
    document = json.loads(lydian(fleet, "top", "--once", "--json").stdout)
    assert {one["name"] for one in document["workers"]} == {"w1", "w2"}
    assert document["away"] == ""
    assert lydian(fleet, "top", "--once", "--url", f"http://127.0.0.1:{free_port()}").returncode == 3


def test_a_job_is_foretold_by_what_an_earlier_one_measured_and_set_beside_its_truth(fleet: LocalFleet) -> None:
    strange = lydian(fleet, "plan", "char-lm")
    assert strange.returncode == 1
    assert "nothing is measured of char-lm here" in strange.stderr
    measured = lydian(fleet, "plan", "digits", "--set", "data.shards=2", "--set", "train.batch_size=16", "--measure")
    assert measured.returncode == 0, measured.stderr
    assert "a round takes" in measured.stdout
    told = json.loads(lydian(fleet, "plan", "digits", "--set", "train.batch_size=16", "--json").stdout)
    assert {row["worker"] for row in told["workers"]} == {"w1", "w2"}
    assert sum(row["share"] for row in told["workers"]) == pytest.approx(1)
    assert told["measured_by"] in measured.stderr
    beside = json.loads(lydian(fleet, "plan", told["measured_by"], "--json").stdout)
    assert beside["true_round_s"] > 0
    known = [row["true_s"] for row in beside["workers"] if row["true_s"] is not None]  # one may have trained nothing
    assert known
    assert all(true_s > 0 for true_s in known)
    assert lydian(fleet, "plan", told["measured_by"], "--measure").returncode == 2


def test_workers_are_listed_with_their_hardware(fleet: LocalFleet) -> None:
    listed = json.loads(lydian(fleet, "workers", "--json").stdout)
    assert {one["name"] for one in listed} == {"w1", "w2"}
    assert all(one["hardware"]["torch"]["version"].startswith("2.") for one in listed)
    assert "w1" in lydian(fleet, "workers").stdout


def test_a_failed_job_exits_1_and_its_log_has_the_traceback(fleet: LocalFleet, tmp_path: Path) -> None:
    task = tmp_path / "fails.py"
    task.write_text(
        "import torch\nfrom torch.utils.data import TensorDataset\n\n"
        "def model(config):\n    return torch.nn.Linear(2, 2)\n\n"
        "def dataset(config, split):\n    return TensorDataset(torch.zeros(8, 2), torch.zeros(8).long())\n\n"
        "def loss(model, batch, config):\n    raise RuntimeError('no luck today')\n"
    )
    watched = lydian(fleet, "submit", "--task", str(task), "--rounds", "1", "--watch", *ONE)
    assert watched.returncode == 1
    job = watched.stdout.splitlines()[0]
    logs = lydian(fleet, "logs", job)
    assert logs.returncode == 0
    assert "RuntimeError: no luck today" in logs.stdout
    assert "fails.py" in logs.stdout
    assert "what to do: Mend the task file" in logs.stdout
    assert f"torch {torch.__version__}" in logs.stdout
    assert "what to do: Mend the task file" in watched.stdout


def test_a_cancelled_job_exits_4_under_watch(fleet: LocalFleet) -> None:
    job = lydian(fleet, "submit", "digits", "--rounds", "1000", *SMALL).stdout.strip()
    assert lydian(fleet, "pause", job).returncode == 0
    assert fleet.api.job(job).state == "paused"
    assert lydian(fleet, "resume", job).returncode == 0
    assert lydian(fleet, "cancel", job).returncode == 0
    assert lydian(fleet, "watch", job).returncode == 4


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["watch", "no-such"], 1, "there is no job 'no-such'"),
        (["submit", "digitz"], 1, "digits"),
        (["submit", "digits", "--set", "train.learning_rate=1"], 1, "train.lr"),
        (["submit", "digits", "--rounds", "many"], 1, "rounds"),
        (["no-such-command"], 2, "No such command"),
    ],
)
def test_a_wrong_command_says_what_is_wrong(fleet: LocalFleet, arguments: list[str], code: int, says: str) -> None:
    ended = lydian(fleet, *arguments)
    assert ended.returncode == code
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_wrong_token_and_an_absent_coordinator_have_sentences_of_their_own(fleet: LocalFleet) -> None:
    wrong = lydian(fleet, "jobs", token="lyd_admin_0123456789ab_" + "x" * 43)
    assert wrong.returncode == 1
    assert "not known to this coordinator" in wrong.stderr
    away = lydian(fleet, "jobs", "--url", f"http://127.0.0.1:{free_port()}")
    assert away.returncode == 3
    assert "does not answer" in away.stderr


def test_a_join_token_is_printed_bare_and_lets_a_worker_join(fleet: LocalFleet) -> None:
    printed = lydian(fleet, "token", "join")
    assert printed.stdout.startswith("lyd_join_")
    assert len(printed.stdout.split()) == 1


def test_the_three_modules_do_what_the_commands_do(tmp_path: Path) -> None:
    port, state = free_port(), tmp_path / "state"
    environment = {"LYDIAN_STATE_DIR": str(state)}
    server = Process(["-m", "uvicorn", "server.app:app", "--port", str(port)], tmp_path / "server.log", environment)
    url = f"http://127.0.0.1:{port}"
    wait_for("uvicorn to listen", lambda: "running on" in server.said())
    options = ["--name", "w", "--state-dir", "here", "--threads", "1", "--device", "cpu", "--trust", "any"]
    worker = Process(
        ["-m", "worker", url, *options],
        tmp_path / "worker.log",
        {"LYDIAN_TOKEN": (state / "join.token").read_text().strip()},
        cwd=tmp_path,  # a folder that is named from here, while the child works elsewhere
    )
    task = tmp_path / "mine.py"
    task.write_text(LINEAR)
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "client.submit_job", "--task", str(task), "--rounds", "1", "--watch"],
            capture_output=True, text=True, check=False, timeout=PATIENCE_S,
            env={**os.environ, "LYDIAN_URL": url, "LYDIAN_STATE_DIR": str(state)},
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        assert worker.terminate() == 0
        server.popen.terminate()
        server.popen.wait(PATIENCE_S)
    finally:
        worker.kill()
        server.kill()


def test_a_model_too_large_for_the_disk_pauses_the_job_with_the_numbers_and_goes_on_when_there_is_room(
    tmp_path: Path,
) -> None:
    with LocalFleet(tmp_path, LYDIAN_RESERVE_BYTES=str(2**52)) as fleet:
        fleet.start_workers(1)
        job = fleet.submit(rounds=1, data={"shards": 1})
        wait_for("the job to pause", lambda: fleet.api.job(job).state == "paused")
        reason = fleet.api.job(job).reason
        assert "do not fit" in reason
        assert str(2**52) in reason
        assert fleet.coordinator is not None
        assert fleet.coordinator.terminate() == 0
        fleet.environment["LYDIAN_RESERVE_BYTES"] = "0"
        fleet.start_coordinator()
        fleet.finish(job)
        handed_out = [e for e in fleet.facts(job) if e["type"] == "handed_out" and e["kind"] == "init"]
        assert len(handed_out) == 1, "the model was built once, and kept until there was room"
