"""`lydian serve` on a tailnet, as a person meets it: the lines that it prints, who its callers are, and new addresses.

The tailnet is a stand-in for tailscaled whose machines have addresses of loopback: 127.0.0.2 and so on.
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
from fastapi import FastAPI

from common.api import CoordinatorApi
from common.errors import UnavailableError
from common.messages import Registration, TokenRequest, WorkerView
from server.__main__ import _announce
from server.binding import Binding
from server.line import Line
from server.settings import Settings
from tests.acceptance.kit import Process, free_port, wait_for
from tests.fake_tailscaled import FakeTailscaled, Peer
from tests.rounds_kit import registration
from tests.tls_kit import issued, pin_in

ME = Peer("127.0.0.2", "coordinator", tags=("tag:lydian-coordinator",))
GPU = Peer("127.0.0.3", "gpu", tags=("tag:lydian-worker",), key_expiry="2020-01-01T00:00:00Z", current_address="")
LAPTOP = Peer("127.0.0.4", "laptop", login="alice@example.com")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeTailscaled]:
    with FakeTailscaled(tmp_path_factory.mktemp("daemon") / "tailscaled.sock", [ME, GPU, LAPTOP]) as running:
        yield running


class Served:
    """A coordinator that finds out by itself where to listen."""

    def __init__(self, folder: Path, daemon: FakeTailscaled, **settings: str) -> None:
        self.port, self.state = free_port(), folder / "state"
        environment = {"LYDIAN_TAILSCALED": str(daemon.path), "LYDIAN_TAILNET_S": "0.1", **settings}
        arguments = ["-m", "server", "--port", str(self.port), "--state-dir", str(self.state)]
        self.process = Process(arguments, folder / "coordinator.log", environment)
        try:
            wait_for("the coordinator to listen", lambda: "ready " in self.said or self.process.popen.poll())
        except AssertionError:
            self.process.kill_all()
            raise
        assert self.process.popen.poll() is None, self.said

    @property
    def said(self) -> str:
        return self.process.said()

    def api(self, token: str | None = None, *, host: str = "127.0.0.2") -> CoordinatorApi:
        return CoordinatorApi(f"http://{host}:{self.port}", token or (self.state / "admin.token").read_text().strip())

    def call_from(self, address: str, method: str, path: str, token: str, **options: object) -> httpx2.Response:
        """One call whose connection comes from an address."""
        with httpx2.Client(transport=httpx2.HTTPTransport(local_address=address)) as client:
            url = f"http://127.0.0.2:{self.port}{path}"
            headers = {"Authorization": f"Bearer {token}", **options.pop("headers", {})}  # type: ignore[dict-item]
            return client.request(method, url, headers=headers, **options)  # type: ignore[arg-type]

    def join_from(self, address: str, token: str, asked: Registration) -> httpx2.Response:
        body = asked.model_dump_json()
        headers = {"Content-Type": "application/json"}
        return self.call_from(address, "POST", "/v1/workers", token, content=body, headers=headers)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, daemon: FakeTailscaled) -> Iterator[Served]:
    one = Served(tmp_path_factory.mktemp("served"), daemon)
    yield one
    one.process.kill_all()


def view(served: Served, name: str) -> WorkerView:
    with served.api() as api:
        (found,) = [worker for worker in api.workers() if worker.name == name]
    return found


def test_the_join_line_names_the_machine_and_every_join_token_does(served: Served) -> None:
    join = (served.state / "join.token").read_text().strip()
    assert f"LYDIAN_TOKEN=TOKEN lydian work http://coordinator.tailnet.test:{served.port}\n" in served.said
    assert f"join token: {served.state / 'join.token'}\n" in served.said
    assert join not in served.said, "a service's log is read by others"
    assert f"where the name is not resolved, http://127.0.0.2:{served.port}\n" in served.said
    assert f"ready http://coordinator.tailnet.test:{served.port}\n" in served.said
    with served.api() as api:
        made = api.new_token(TokenRequest())
    assert made.url == f"http://coordinator.tailnet.test:{served.port}"
    token = made.token
    assert token.endswith("@n0CNTRL")
    for given in (token, token.partition("@")[0]):  # a worker that does not know of pins sends it as it is
        assert served.join_from("127.0.0.3", given, registration(f"w{len(given)}")).status_code == 200


def test_a_worker_is_shown_with_its_machine_path_and_what_is_wrong(served: Served) -> None:
    join = (served.state / "join.token").read_text().strip()
    served.join_from("127.0.0.3", join, registration("shown"))
    found = view(served, "shown")
    assert found.address == "127.0.0.3"
    assert found.node is not None
    assert (found.node.name, found.node.owner) == ("gpu.tailnet.test", "tag:lydian-worker")
    assert found.path is not None
    assert (found.path.kind, found.path.via) == ("relay", "fra")
    assert found.warnings[0].startswith("relayed by fra, ")
    assert "its Tailscale key expired" in found.warnings[1]


def test_a_credential_works_from_the_machine_that_it_was_given_to_whatever_the_caller_says_of_itself(
    served: Served,
) -> None:
    join = (served.state / "join.token").read_text().strip()
    credential = served.join_from("127.0.0.3", join, registration("pinned")).json()["credential"]
    assert served.call_from("127.0.0.3", "GET", "/openapi.json", credential).status_code == 200
    stolen = served.call_from("127.0.0.4", "GET", "/openapi.json", credential)
    assert (stolen.status_code, stolen.json()["code"]) == (403, "wrong_node")
    forged = {"X-Forwarded-For": "127.0.0.3", "Forwarded": "for=127.0.0.3", "X-Real-IP": "127.0.0.3"}
    assert served.call_from("127.0.0.4", "GET", "/openapi.json", credential, headers=forged).status_code == 403
    assert served.join_from("127.0.0.4", credential, registration("pinned")).status_code == 403
    assert view(served, "pinned").address == "127.0.0.3"
    assert "laptop.tailnet.test (n2CNTRL)" in view(served, "pinned").warnings[0]
    with served.api() as api:
        assert api.readmit(view(served, "pinned").id).warnings[0].startswith("relayed")
    assert served.call_from("127.0.0.4", "GET", "/openapi.json", credential).status_code == 200


def test_a_worker_that_nobody_can_tell_apart_is_let_in_when_it_is_not_pinned(
    served: Served, daemon: FakeTailscaled
) -> None:
    daemon.answers["/localapi/v0/whois"] = (500, "oops")
    join = (served.state / "join.token").read_text().strip()
    joined = served.join_from("127.0.0.3", join, registration("unknown"))
    daemon.answers.clear()
    assert joined.status_code == 200
    found = view(served, "unknown")
    assert found.node is None
    assert "oops" in found.node_unknown


def test_a_coordinator_goes_where_its_tailnet_address_goes_and_stays_while_it_has_none(tmp_path: Path) -> None:
    with FakeTailscaled(tmp_path / "tailscaled.sock", [ME, GPU]) as daemon:
        one = Served(tmp_path, daemon)

        def reached(host: str) -> bool:
            with one.api(host=host) as api:
                try:
                    api.version()
                except UnavailableError:
                    return False
            return True

        try:
            looks = len(daemon.calls)
            daemon.states = ["NeedsLogin"]
            wait_for("some looks at a tailnet that is logged out", lambda: len(daemon.calls) >= looks + 3)
            assert reached("127.0.0.2")
            daemon.peers, daemon.states = [Peer("127.0.0.9", "coordinator"), GPU], ["Running"]
            wait_for("the new address to be listened on", lambda: reached("127.0.0.9"))
            wait_for("the old one to be given up", lambda: not reached("127.0.0.2"))
            assert reached("127.0.0.1")
            assert "this machine has the tailnet address 127.0.0.9 now" in one.said
            assert one.process.terminate() == 0
        finally:
            one.process.kill_all()


def test_the_certificate_of_the_tailnets_name_is_shown_and_tokens_do_not_pin_it(tmp_path: Path) -> None:
    with FakeTailscaled(tmp_path / "tailscaled.sock", [ME, GPU]) as daemon:
        daemon.pair = "".join(issued("coordinator.tailnet.test"))
        one = Served(tmp_path, daemon, LYDIAN_TLS="tailscale")
        try:
            join = (one.state / "join.token").read_text().strip()
            assert f"LYDIAN_TOKEN=TOKEN lydian work https://coordinator.tailnet.test:{one.port}\n" in one.said
            assert "@" not in join
            assert "where the name" not in one.said  # under its address the certificate would not be trusted
            pin = pin_in(one.state / "tls-tailscale.pem")
            with CoordinatorApi(f"https://127.0.0.2:{one.port}", pin=pin) as api:
                assert api.version().protocol == 2
            assert one.process.terminate() == 0
        finally:
            one.process.kill_all()


def test_without_tailscale_nothing_of_it_is_printed(tmp_path: Path) -> None:
    daemon = FakeTailscaled(tmp_path / "nothing.sock", [ME])  # not started
    one = Served(tmp_path, daemon)
    try:
        assert "listening on 127.0.0.1 alone" in one.said
        assert f"LYDIAN_TOKEN=TOKEN lydian work http://127.0.0.1:{one.port}\n" in one.said
        assert "where the name" not in one.said
    finally:
        one.process.kill_all()


def test_a_person_at_a_terminal_is_shown_the_whole_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app = FastAPI()
    app.state.coordinator = SimpleNamespace(url="")
    (tmp_path / "join.token").write_text("lyd_join_x\n")
    binding = Binding(("127.0.0.2",), "gpu-box", "here", pin="n0CNTRL")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    _announce(app, Settings(state_dir=tmp_path), binding, Line(), 8470)
    shown = capsys.readouterr()
    assert "    lydian work http://gpu-box:8470 --token lyd_join_x@n0CNTRL\n" in shown.err
    assert (shown.out, app.state.coordinator.url) == ("ready http://gpu-box:8470\n", "http://gpu-box:8470")
