"""A coordinator with a certificate of its own make, as workers and people meet it off the tailnet."""

import contextlib
import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from common.api import CoordinatorApi
from common.errors import LydianError
from common.guarding import pinned_context
from common.pins import split
from tests.acceptance.kit import PATIENCE_S, LocalFleet, Process, wait_for
from tests.tls_kit import pin_in, written

pytestmark = pytest.mark.acceptance

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    settings = {"LYDIAN_TLS": "self-made", "LYDIAN_BODY_IDLE_S": "2"}
    with LocalFleet(tmp_path_factory.mktemp("tls"), ttl_s=10.0, **settings) as running:
        yield running


def test_a_job_is_trained_over_tls_though_a_worker_is_killed_in_the_middle_of_it(fleet: LocalFleet) -> None:
    fleet.start_workers(2, "--trust", "any")
    job = fleet.submit(rounds=3, seed=3, data={"shards": 3}, train={"batch_size": 16}, round={"min_workers": 1})
    fleet.await_event(job, lambda event: event["type"] == "accepted", "an update was accepted")
    fleet.workers["w2"].kill_all()
    view = fleet.finish(job)
    assert view.model is not None
    model = fleet.pull(job).read_bytes()
    assert hashlib.sha256(model).hexdigest() == view.model.digest
    part = fleet.api._client.get(f"/v1/models/{view.model.digest}", headers={"Range": "bytes=5-99"})
    assert (part.status_code, part.content) == (206, model[5:100])
    kept = (fleet.folder / "w1" / "identity.json").read_text()
    assert pin_in(fleet.state / "tls.pem") in kept


def test_people_on_its_machine_need_no_flag(fleet: LocalFleet) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LYDIAN_")}
    told = {"LYDIAN_URL": f"127.0.0.1:{fleet.port}", "LYDIAN_STATE_DIR": str(fleet.state)}
    ran = subprocess.run(
        [sys.executable, "-m", "client.main", "jobs", "--json"],
        env=environment | told, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout[:1]) == (0, "["), ran.stderr


def test_another_certificate_at_its_address_is_told_no_token(fleet: LocalFleet, tmp_path: Path) -> None:
    bare, _ = split(fleet.admin_token)
    pin = pin_in(written(tmp_path))
    with CoordinatorApi(fleet.url, bare, pin=pin) as api, pytest.raises(LydianError) as refused:
        api.jobs()
    assert refused.value.code == "wrong_certificate"


def test_a_client_that_never_ends_its_handshake_is_cut(fleet: LocalFleet) -> None:
    with socket.create_connection(("127.0.0.1", fleet.port)) as line:
        line.sendall(bytes.fromhex("1603010200"))  # the head of a record of TLS, and nothing after it
        line.settimeout(PATIENCE_S)
        assert line.recv(1) == b""


def test_an_answer_that_nobody_reads_is_cut(fleet: LocalFleet) -> None:
    bare, _ = split(fleet.admin_token)
    total = 16 << 20
    with socket.socket() as plain:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        plain.connect(("127.0.0.1", fleet.port))
        with pinned_context(pin_in(fleet.state / "tls.pem")).wrap_socket(plain) as line:
            head = f"GET /v1/probe?bytes={total} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {bare}\r\n\r\n"
            line.sendall(head.encode())
            assert line.recv(1) == b"H"  # and nothing more, until the coordinator has had enough
            me = line.getsockname()
            assert fleet.coordinator is not None
            coordinator = psutil.Process(fleet.coordinator.popen.pid)
            wait_for("the connection to be cut", lambda: me not in [at.raddr for at in coordinator.net_connections()])
            came = 0
            with contextlib.suppress(OSError):
                while data := line.recv(1 << 16):
                    came += len(data)
    assert came < total


def test_a_certificate_lives_as_long_as_the_state_folder_and_tokens_lose_it_with_tls(fleet: LocalFleet) -> None:
    pin, token = pin_in(fleet.state / "tls.pem"), fleet.admin_token
    assert token.endswith(f"@{pin}")
    assert fleet.coordinator is not None
    fleet.coordinator.kill()
    fleet.start_coordinator()
    assert fleet.admin_token == token
    fleet.coordinator.popen.send_signal(signal.SIGTERM)
    assert fleet.coordinator.popen.wait(PATIENCE_S) == 0
    with CoordinatorApi(fleet.url, token) as api, pytest.raises(LydianError):
        api.jobs()
    del fleet.environment["LYDIAN_TLS"]
    fleet.start_coordinator()
    assert fleet.admin_token == token.partition("@")[0]


# ---------------------------------------------------------------- without TLS


def serve(folder: Path, *arguments: str) -> Process:
    words = ["-m", "server", "--port", "0", "--state-dir", str(folder / "state"), *arguments]
    return Process(words, folder / "coordinator.log", {"LYDIAN_TAILSCALED": str(folder / "nothing.sock")})


def test_plain_http_is_not_spoken_to_everybody_unless_that_was_asked_for(tmp_path: Path) -> None:
    refused = serve(tmp_path, "--host", "0.0.0.0")
    assert refused.popen.wait(PATIENCE_S) == 1
    assert "plain HTTP on 0.0.0.0 could be read by whoever listens" in refused.said()
    assert not (tmp_path / "state").exists()
    allowed = serve(tmp_path, "--host", "0.0.0.0", "--insecure")
    try:
        ready = wait_for("it to listen", lambda: re.search(r"^ready http://\S+:(\d+)$", allowed.said(), re.MULTILINE))
        assert "!! INSECURE: plain HTTP on 0.0.0.0 " in allowed.said()
        with CoordinatorApi(f"http://127.0.0.1:{ready[1]}") as api:
            assert api._client.get("/version").headers["Lydian-Line"] == "insecure"
    finally:
        allowed.kill_all()
