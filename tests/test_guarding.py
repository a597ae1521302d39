"""No byte of a call goes to whom it is not meant for: asked of servers that count what they are told."""

import contextlib
import http.server
import select
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from client.calling import run_program
from client.main import app
from common import guarding
from common.api import CoordinatorApi
from common.errors import LydianError, UnavailableError
from tests.tls_kit import Listener, issued, pin_in, written

TOKEN = "lyd_admin_0123456789ab_" + "x" * 43


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two, that nobody vouches for."""
    folder = tmp_path_factory.mktemp("certificates")
    return written(folder, "one.pem"), written(folder, "other.pem")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


CALLS: dict[str, Callable[[CoordinatorApi, Path], object]] = {
    "a call": lambda api, _: api.jobs(),
    "a download": lambda api, folder: api.download_model("0" * 64, folder / "model", size=1 << 20),
    "an upload": lambda api, folder: api.upload("j-1-1", 1, folder / "update"),
    "a measurement": lambda api, _: api.measure_link(),
    "events": lambda api, _: list(api.events("j-1")),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_server_with_another_certificate_hears_nothing_of_any_call(
    certificates: tuple[Path, Path], call: Callable[[CoordinatorApi, Path], object], tmp_path: Path
) -> None:
    mine, another = certificates
    (tmp_path / "update").write_bytes(b"weights")
    with Listener(another) as there:
        url = f"https://127.0.0.1:{there.port}"
        with CoordinatorApi(url, TOKEN, pin=pin_in(mine)) as api, pytest.raises(LydianError) as refused:
            call(api, tmp_path)
    assert refused.value.code == "wrong_certificate"
    assert pin_in(another) in str(refused.value)
    assert pin_in(mine) in str(refused.value)
    assert there.connections >= 1
    assert there.heard == b""


def test_the_certificate_is_compared_again_when_a_connection_is_made_again(certificates: tuple[Path, Path]) -> None:
    mine, another = certificates
    with Listener(mine) as there, CoordinatorApi(f"https://127.0.0.1:{there.port}", f"{TOKEN}@{pin_in(mine)}") as api:
        assert api.version().protocol == 2
        assert f"Bearer {TOKEN}\r\n".encode() in there.heard  # and nothing of the pin
        there._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        there._context.load_cert_chain(another)
        heard = there.heard
        api._client._transport.close()  # as when the line broke
        with pytest.raises(LydianError) as refused:
            api.version()
        assert refused.value.code == "wrong_certificate"
        assert there.heard == heard


def test_without_a_pin_the_system_decides_and_an_authority_can_be_named(
    certificates: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, _ = certificates
    with Listener(mine) as there:
        url = f"https://127.0.0.1:{there.port}"
        with CoordinatorApi(url, TOKEN) as api, pytest.raises(LydianError) as refused:
            api.version()
        assert refused.value.code == "untrusted_certificate"
        assert "SSL_CERT_FILE" in refused.value.advice
        assert there.heard == b""
        monkeypatch.setenv("SSL_CERT_FILE", str(mine))
        with CoordinatorApi(url, TOKEN) as api:
            assert api.version().protocol == 2


@pytest.mark.parametrize("pinned", [True, False])
def test_tls_1_2_is_spoken_with_nobody(
    certificates: tuple[Path, Path], pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, _ = certificates
    monkeypatch.setenv("SSL_CERT_FILE", str(mine))
    with Listener(mine, newest=ssl.TLSVersion.TLSv1_2) as there:
        pin = pin_in(mine) if pinned else None
        with CoordinatorApi(f"https://127.0.0.1:{there.port}", TOKEN, pin=pin) as api, pytest.raises(LydianError):
            api.version()
    assert there.heard == b""


def test_a_server_without_tls_is_named_as_one_and_hears_no_token(certificates: tuple[Path, Path]) -> None:
    with Listener(None) as there:
        url = f"https://127.0.0.1:{there.port}"
        with CoordinatorApi(url, TOKEN, pin=pin_in(certificates[0])) as api, pytest.raises(LydianError):
            api.version()
    assert TOKEN.encode() not in there.heard


def test_a_pin_is_never_forgotten_for_a_plain_url(certificates: tuple[Path, Path]) -> None:
    with pytest.raises(LydianError) as refused:
        CoordinatorApi("http://127.0.0.1:8470", f"{TOKEN}@{pin_in(certificates[0])}")
    assert refused.value.code == "pin_without_tls"


# ---------------------------------------------------------------- through a proxy


class _Tunnel(http.server.BaseHTTPRequestHandler):
    """CONNECT, and then whatever comes, to where the test says."""

    to = 0

    def do_CONNECT(self) -> None:
        with socket.create_connection(("127.0.0.1", self.to)) as far:
            self.send_response(200)
            self.end_headers()
            back = threading.Thread(target=_pour, args=(far, self.connection))
            back.start()
            _pour(self.connection, far)
            back.join()

    def log_message(self, *_: object) -> None:
        """Nothing."""


def _pour(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65_536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


@pytest.fixture
def proxy() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Tunnel)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_behind_a_proxy_it_is_the_coordinators_certificate_that_counts(
    certificates: tuple[Path, Path], proxy: http.server.ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, another = certificates
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.server_port}")
    monkeypatch.setenv("NO_PROXY", "")
    with Listener(mine) as there:
        monkeypatch.setattr(_Tunnel, "to", there.port)
        with CoordinatorApi("https://coordinator.example:8470", TOKEN, pin=pin_in(mine)) as api:
            assert api.version().protocol == 2
        heard = there.heard
        far = "https://coordinator.example:8470"
        with CoordinatorApi(far, TOKEN, pin=pin_in(another)) as api, pytest.raises(LydianError) as refused:
            api.version()
    assert refused.value.code == "wrong_certificate"
    assert there.heard == heard


# ---------------------------------------------------------------- plain HTTP


def test_plain_http_goes_to_loopback_under_any_name() -> None:
    with Listener(None) as there:
        for host in ("127.0.0.1", "localhost"):
            with CoordinatorApi(f"http://{host}:{there.port}", TOKEN) as api:
                assert api.version().protocol == 2


@pytest.mark.parametrize("url", ["http://192.168.1.10:8470", "http://203.0.113.5:8470", "http://[2001:db8::1]:8470"])
def test_plain_http_to_another_network_is_refused_before_a_connection_is_tried(
    url: str, proxy: http.server.ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.server_port}")  # whatever a proxy makes of it
    with CoordinatorApi(url, TOKEN) as api, pytest.raises(LydianError) as refused:
        api.version()
    assert refused.value.code == "plain_http"
    assert "--tls" in refused.value.advice


def test_a_name_is_judged_by_the_address_that_it_led_to() -> None:
    class Line:
        closed = False

        def get_extra_info(self, _: str) -> tuple[str, int]:
            return ("198.51.100.7", 8470)

        def close(self) -> None:
            self.closed = True

    line, look = Line(), guarding.plain_trace("http://gpu-box:8470")
    look("connection.connect_tcp.started", {"host": "gpu-box"})
    with pytest.raises(LydianError, match=r"198\.51\.100\.7 is neither on this machine nor in a tailnet"):
        look("connection.connect_tcp.complete", {"return_value": line})
    assert line.closed


def test_the_steps_that_the_look_waits_for_are_still_told_under_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a newer httpx2 would let everything pass, in silence."""
    monkeypatch.setattr(guarding, "is_sheltered", lambda host: host == "gpu-box")
    with Listener(None) as there:
        with CoordinatorApi(f"http://localhost:{there.port}", TOKEN) as api, pytest.raises(LydianError) as refused:
            api.version()
        assert refused.value.code == "plain_http"
    assert there.heard == b""


def test_a_coordinator_that_ends_a_connection_the_moment_it_stands_is_one_that_is_away() -> None:
    def hang_up(listener: socket.socket) -> None:
        line, _ = listener.accept()
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing it is a reset
        line.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
        killed = threading.Thread(target=hang_up, args=(listener,))
        killed.start()
        with CoordinatorApi(f"http://{host}:{port}", TOKEN) as api:
            look = api._look

            def late(step: str, about: dict[str, Any]) -> None:
                if step.endswith("connect_tcp.complete"):
                    select.select([about["return_value"].get_extra_info("socket")], [], [], 60)  # the reset is here
                look(step, about)

            api._look = late
            with pytest.raises(UnavailableError, match="does not answer"):
                api.version()
        killed.join()


def test_who_allows_it_speaks_plainly_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarding, "is_sheltered", lambda _: False)
    with Listener(None) as there, CoordinatorApi(f"http://127.0.0.1:{there.port}", TOKEN, insecure=True) as api:
        assert api.version().protocol == 2


def test_a_worker_that_starts_ends_at_a_refusal_and_not_at_silence(certificates: tuple[Path, Path]) -> None:
    mine, another = certificates
    with Listener(another) as there:
        url = f"https://127.0.0.1:{there.port}"
        with CoordinatorApi(url, TOKEN, pin=pin_in(mine)) as api, pytest.raises(LydianError) as refused:
            api.check_line()
    assert refused.value.code == "wrong_certificate"
    with CoordinatorApi(url, TOKEN, pin=pin_in(mine)) as api:
        api.check_line()  # nobody is there


# ---------------------------------------------------------------- what people read

COMMANDS = {
    "jobs": ("jobs",), "watch": ("watch", "j-1"), "submit": ("submit", "digits"), "logs": ("logs", "j-1"),
    "doctor": ("doctor", "--only", "coordinator"), "audit": ("audit", "--follow"),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("case", ["another one", "out of date"])
def test_every_command_says_in_one_sentence_which_certificate_it_was_shown_and_tells_nothing(
    certificates: tuple[Path, Path],
    case: str,
    command: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mine, shown, token = certificates[0], certificates[1], f"{TOKEN}@{pin_in(certificates[0])}"
    if case == "out of date":
        shown, token = tmp_path / "old.pem", TOKEN
        shown.write_text("".join(issued("localhost", days=-1)))
        monkeypatch.setenv("SSL_CERT_FILE", str(shown))
    with Listener(shown) as there:
        for name, value in {"URL": f"https://localhost:{there.port}", "TOKEN": token, "STATE_DIR": tmp_path}.items():
            monkeypatch.setenv(f"LYDIAN_{name}", str(value))
        with pytest.raises(SystemExit) as ended:
            run_program(app, "lydian", command)
    printed = "".join(capsys.readouterr())
    assert ended.value.code == 1
    assert printed.count("nothing was sent to it") == 1
    told = f"{pin_in(mine)} is pinned" if case == "another one" else "is not trusted here: certificate has expired"
    assert (told in printed, "this machine's clock" in printed) == (True, case == "out of date")
    assert "Traceback" not in printed
    assert there.heard == b""
