"""What a round costs when training costs nothing: real coordinator, real workers, a model of so many megabytes."""

import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import psutil

from client.running import Children, python_module, wait_for_line
from common.api import CoordinatorApi
from common.messages import JobRequest, JobSpec

TASK = Path(__file__).with_name("constant.py")


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    megabytes: int
    workers: int
    rounds: int
    median_s: float
    slowest_s: float
    server_bytes: int  # peak resident memory of the coordinator
    agent_bytes: int  # peak resident memory of the largest agent, without its child


def measure(megabytes: int, workers: int, rounds: int) -> Result:
    """Run one job of `rounds` rounds and look at the time from one closed round to the next."""
    with tempfile.TemporaryDirectory() as folder, Children(Path(folder)) as children:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LYDIAN_")}
        state = Path(folder) / "state"
        arguments = ["--host", "127.0.0.1", "--port", "0", "--state-dir", str(state)]
        server = children.start("coordinator", python_module("server", arguments), environment)
        url = wait_for_line(server, "ready ", timeout_s=60)
        environment["LYDIAN_TOKEN"] = (state / "join.token").read_text().strip()
        agents = []
        for number in range(workers):
            name = f"w{number}"
            arguments = [url, "--name", name, "--state-dir", f"{folder}/{name}", "--threads", "1", "--device", "cpu"]
            command = python_module("worker", [*arguments, "--trust", "any"])
            agents.append(children.start(name, command, environment))
        with CoordinatorApi(url, (state / "admin.token").read_text().strip()) as api:
            seconds = _run(api, megabytes, workers, rounds)
            server_bytes = _peak(server.process.pid)
            agent_bytes = max(_peak(agent.process.pid) for agent in agents)
    return Result(megabytes, workers, rounds, statistics.median(seconds), max(seconds), server_bytes, agent_bytes)


def _run(api: CoordinatorApi, megabytes: int, workers: int, rounds: int) -> list[float]:
    """Seconds of each round but the first, in which models are built and loaded."""
    spec = JobSpec.model_validate(
        {
            "task": "constant",
            "rounds": rounds + 1,
            "data": {"shards": workers},
            "round": {"min_workers": workers},
            "config": {"megabytes": megabytes},
        }
    )
    job = api.submit_job(JobRequest(spec=spec, task_source=TASK.read_text(), key=uuid4().hex)).id
    seconds: list[float] = []
    for event in api.events(job):
        if event["type"] == "round":
            seconds.append(event["seconds"])
        if event["type"] == "job" and event["state"] == "failed":
            raise SystemExit(f"the job failed: {event['reason']}")
    return seconds[1:]


def _peak(pid: int) -> int:
    """Peak resident bytes of a process (Linux), or what it has now elsewhere."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return int(psutil.Process(pid).memory_info().rss)
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
