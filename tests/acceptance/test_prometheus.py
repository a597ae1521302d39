"""What deploy/ has for Prometheus and Grafana, in a real Prometheus beside a fleet: it reads, answers and warns."""

import contextlib
import json
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest

from common.messages import TokenRequest
from tests.acceptance.kit import LocalFleet, free_port, wait_for
from tests.test_monitoring_files import BOARD, DEPLOY

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Prometheus (Debian: apt install prometheus)"),
]
OFTEN = "200ms"  # instead of 15 s


class Prometheus:
    """A Prometheus with our configuration, but for the address, the token's file and how often it looks."""

    def __init__(self, folder: Path, fleet: LocalFleet) -> None:
        self.port = free_port()
        made = fleet.api.new_token(TokenRequest(scope="read", name="prometheus")).token
        (folder / "token").write_text(made.partition("@")[0])
        shutil.copy(DEPLOY / "prometheus/alerts.yml", folder)
        text = (DEPLOY / "prometheus/prometheus.yml").read_text(encoding="utf-8")
        for ours, here in (
            ("/etc/prometheus/lydian.token", str(folder / "token")),
            ("127.0.0.1:8470", f"127.0.0.1:{fleet.port}"),
            ("15s", OFTEN),
        ):
            assert ours in text
            text = text.replace(ours, here)
        (folder / "prometheus.yml").write_text(text, encoding="utf-8")
        self.log = folder / "prometheus.log"
        with self.log.open("wb") as out:
            self._process = subprocess.Popen(
                ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
                 f"--web.listen-address=127.0.0.1:{self.port}"],
                stdout=out, stderr=out,
            )  # fmt: skip

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()

    def get(self, path: str) -> Any:
        """What its API answers; None while it does not."""
        assert self._process.poll() is None, self.log.read_text()
        with (
            contextlib.suppress(URLError, ConnectionError),
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/v1/{path}") as answer,
        ):
            return json.load(answer)["data"]
        return None

    def query(self, promql: str) -> list[Any]:
        found = self.get(f"query?{urllib.parse.urlencode({'query': promql})}")
        return found["result"] if found is not None else []

    def warns_of(self, alert: str) -> bool:
        """Whether what an alert is about is so; that it lasts as long as the alert waits is not waited for."""
        return any(each["labels"]["alertname"] == alert for each in self.get("alerts")["alerts"])


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[LocalFleet]:
    with LocalFleet(tmp_path, ttl_s=4.0) as running:
        running.start_workers(2)
        yield running


@pytest.fixture
def prometheus(tmp_path: Path, fleet: LocalFleet) -> Iterator[Prometheus]:
    running = Prometheus(tmp_path, fleet)
    try:
        wait_for("it to read the coordinator", lambda: running.query('up{job="lydian"} == 1'))
        yield running
    finally:
        running.close()


def test_every_panel_has_an_answer_and_a_dead_fleet_is_warned_of(fleet: LocalFleet, prometheus: Prometheus) -> None:
    job = fleet.submit(rounds=2, data={"shards": 2})
    fleet.finish(job)
    for panel in BOARD["panels"]:
        for target in panel["targets"]:
            asked = target["expr"].replace("$__rate_interval", "1m")
            for variable in ("$instance", "$training", "$metric"):
                asked = asked.replace(variable, ".*")
            if "certificate" not in asked:  # of TLS, which this one does not speak
                wait_for(f"an answer to {asked}", partial(prometheus.query, asked))
    (rounds,) = prometheus.query("lydian_rounds_total")
    assert (rounds["metric"]["job_id"], rounds["value"][1]) == (job, "2")
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}

    for worker in fleet.workers.values():
        worker.kill_all()
    fleet.submit(rounds=2, data={"shards": 2})
    wait_for("a warning that nobody works", lambda: prometheus.warns_of("LydianNoWorker"))
    assert fleet.coordinator is not None
    fleet.coordinator.kill()
    wait_for("a warning that the coordinator is away", lambda: prometheus.warns_of("LydianCoordinatorDown"))
