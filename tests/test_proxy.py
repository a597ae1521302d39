"""The fault proxy does what it says to the bytes, exactly, and to nothing else."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from client.chaos.proxy import Fault, Proxy

DATA = bytes(range(256)) * 400  # 102,400 bytes


class Echo:
    """A service that sends back what it was sent, and remembers it."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.got: list[bytes] = []
        self.ended = threading.Semaphore(0)
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            with connection:
                seen = b""
                try:
                    while data := connection.recv(1 << 16):
                        seen += data
                        connection.sendall(data)
                except OSError:
                    pass  # reset: that is what is tested
                if seen == b"stop":
                    return
                self.got.append(seen)
                self.ended.release()

    def stop(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port)) as last:
            last.sendall(b"stop")
            last.shutdown(socket.SHUT_WR)
            while last.recv(16):
                pass
        self.thread.join()
        self.listener.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    service = Echo()
    yield service
    service.stop()


def talk(port: int, data: bytes = DATA) -> bytes:
    """Send, end this direction, and read to the end."""
    back = b""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as line:
        sender = threading.Thread(target=_send, args=(line, data))
        sender.start()
        try:
            while piece := line.recv(1 << 16):
                back += piece
        finally:
            sender.join()
    return back


def _send(line: socket.socket, data: bytes) -> None:
    try:
        line.sendall(data)
        line.shutdown(socket.SHUT_WR)
    except OSError:
        return  # reset: the reader sees it too


def is_reset(port: int) -> bool:
    """Whether a connection is reset by itself. Nothing is sent: a send would take the error away from the reader."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as line:
            line.recv(1)
            return False
    except ConnectionError:
        return True


def test_without_a_fault_every_byte_passes_in_both_directions(echo: Echo) -> None:
    with Proxy("127.0.0.1", echo.port) as net:
        assert talk(net.port) == DATA
        assert (net.up.bytes, net.down.bytes, net.connections) == (len(DATA), len(DATA), 1)


@pytest.mark.parametrize("kind", ["reset", "close"])
def test_a_cut_upload_has_passed_just_the_bytes_before_it_and_the_next_connection_is_whole(
    echo: Echo, kind: str
) -> None:
    with Proxy("127.0.0.1", echo.port) as net:
        net.up.fault = Fault(kind, after=50_000)  # type: ignore[arg-type]
        try:
            talk(net.port)
        except ConnectionError:
            assert kind == "reset"
        echo.ended.acquire(timeout=20)
        assert net.up.bytes == 50_000
        assert DATA.startswith(echo.got[0])
        assert net.up.fault is None
        assert talk(net.port) == DATA


def test_a_fault_strikes_as_often_as_it_says(echo: Echo) -> None:
    with Proxy("127.0.0.1", echo.port) as net:
        net.down.fault = Fault("close", after=10, times=2)
        assert [len(talk(net.port, b"x" * 100)) for _ in range(3)] == [10, 10, 100]


def test_a_corrupted_byte_is_one_byte(echo: Echo) -> None:
    with Proxy("127.0.0.1", echo.port) as net:
        net.up.fault = Fault("corrupt", after=70_000)
        back = talk(net.port)
        assert [at for at, (a, b) in enumerate(zip(back, DATA, strict=True)) if a != b] == [70_000]


def test_dropped_bytes_look_sent(echo: Echo) -> None:
    with Proxy("127.0.0.1", echo.port) as net:
        net.up.fault = Fault("drop", after=1000)
        with socket.create_connection(("127.0.0.1", net.port), timeout=20) as line:
            line.sendall(DATA)
            while net.up.fault is not None:
                line.sendall(b"x")
            net.cut_all()
        echo.ended.acquire(timeout=20)
        assert DATA.startswith(echo.got[0])
        assert len(echo.got[0]) <= 1000


def test_a_half_closed_direction_leaves_the_other_open(echo: Echo) -> None:
    with Proxy("127.0.0.1", echo.port) as net:
        net.up.fault = Fault("half", after=500)
        assert talk(net.port) == DATA[:500]
        assert echo.got[0] == DATA[:500]


def test_a_stalled_connection_goes_on_when_it_is_released(echo: Echo) -> None:
    with Proxy("127.0.0.1", echo.port) as net:
        net.up.fault = Fault("stall", after=500)
        with socket.create_connection(("127.0.0.1", net.port), timeout=20) as line:
            line.sendall(DATA[:1000])
            got = b""
            while len(got) < 500:
                got += line.recv(1000)
            line.settimeout(0.2)
            with pytest.raises(TimeoutError):
                line.recv(1000)
            net.release()
            line.settimeout(20)
            while len(got) < 1000:
                got += line.recv(1000)
            assert got == DATA[:1000]


def test_all_connections_can_be_cut_and_new_ones_refused(echo: Echo) -> None:
    with Proxy("127.0.0.1", echo.port) as net:
        with socket.create_connection(("127.0.0.1", net.port), timeout=20) as line:
            line.sendall(b"x")
            assert line.recv(1) == b"x"
            net.cut_all()
            with pytest.raises(ConnectionError):
                line.recv(1)
        net.refusing = True
        assert is_reset(net.port)
        net.refusing = False
        assert talk(net.port, b"again") == b"again"


def test_an_answer_given_before_the_sender_is_through_arrives_whatever_became_of_the_rest() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            for _ in range(20):
                connection, _ = listener.accept()
                with connection:  # closed with bytes unread: a reset
                    connection.recv(1000)
                    connection.sendall(b"refused")

        service = threading.Thread(target=refuse)
        service.start()
        with Proxy("127.0.0.1", listener.getsockname()[1]) as net:
            heard = []
            for _ in range(20):
                with socket.create_connection(("127.0.0.1", net.port), timeout=20) as line:
                    _send(line, DATA * 50)
                    heard.append(line.recv(100))
        service.join()
    assert heard == [b"refused"] * 20


def test_a_service_that_is_away_is_a_reset() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with Proxy("127.0.0.1", port) as net:
        assert is_reset(net.port)


def test_a_port_that_is_taken_is_said_at_once(echo: Echo) -> None:
    with pytest.raises(OSError, match="in use"), Proxy("127.0.0.1", 1, listen_port=echo.port):
        raise AssertionError("it listens")


def test_a_rate_that_is_lifted_lets_what_waits_go(echo: Echo) -> None:
    with Proxy("127.0.0.1", echo.port) as net:
        net.up.rate = 10.0  # the data would take hours
        with socket.create_connection(("127.0.0.1", net.port), timeout=20) as line:
            line.sendall(DATA[:1000])
            net.up.rate = None
            got = b""
            while len(got) < 1000:
                got += line.recv(1000)
        assert got == DATA[:1000]


def test_a_far_service_answers_no_earlier_than_there_and_back(echo: Echo) -> None:
    with Proxy("127.0.0.1", echo.port) as net:
        net.up.latency_s = net.down.latency_s = 0.1
        began = time.monotonic()
        assert talk(net.port, b"x") == b"x"
        assert time.monotonic() - began >= 0.2


def fill(line: socket.socket) -> int:
    """Send until nothing more is taken; returns the bytes that were."""
    sent = 0
    try:
        while True:
            sent += line.send(DATA)
    except TimeoutError:
        return sent


def test_what_a_slow_reader_does_not_take_is_held_back_from_the_sender(echo: Echo) -> None:
    with Proxy("127.0.0.1", echo.port) as net, socket.create_connection(("127.0.0.1", net.port)) as line:
        net.up.fault = Fault("stall", after=0)
        line.settimeout(0.5)
        sent = fill(line)
        assert sent < 64 << 20
        assert net.up.bytes == 0


def test_a_proxy_that_ends_leaves_no_thread_and_no_connection(echo: Echo) -> None:
    before = threading.active_count()
    with Proxy("127.0.0.1", echo.port) as net:
        line = socket.create_connection(("127.0.0.1", net.port), timeout=20)
        line.sendall(b"x")
        assert line.recv(1) == b"x"
    with line, pytest.raises(ConnectionError):
        line.recv(1)
    assert threading.active_count() == before
