"""Transfers over real sockets: what arrived is kept, what is missing is fetched, what is damaged or odd is not used.

The other side is a small shelf of files that answers exactly as a test wants; the real coordinator's transfers are in
tests/acceptance/test_transfers.py.
"""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st

from client.chaos.proxy import Fault, Proxy, Way
from common import streams, transfers
from common.api import CoordinatorApi
from common.errors import (
    BadUpdateError,
    DiskFullError,
    LateError,
    LydianError,
    TooSlowError,
    UnavailableError,
)
from common.ranges import Ranges, format_ranges, gaps, with_range
from common.streams import FIRST, SMALL
from common.transfers import NOTE_EVERY, Download, TransferStopped

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
SIZE = 6 * MIB + 12_345
DATA = os.urandom(SIZE)
DIGEST = hashlib.sha256(DATA).hexdigest()
UPDATE = "/v1/updates/j.1.train.0"


def wait_for(what: str, look: Callable[[], T | None], patience_s: float = 30.0) -> T:
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        if found := look():
            return found
        time.sleep(0.01)  # between two looks at a condition
    raise AssertionError(f"waited {patience_s:.0f} s for {what}")


@dataclass
class Shelf:
    """An ASGI application: one file to be fetched, one upload to be filled, and how it behaves."""

    data: bytes = DATA
    ranges: str = "honoured"  # or ignored, unsatisfiable, shifted
    asked: list[str | None] = field(default_factory=list)  # Range of each GET
    sent: list[tuple[int, int]] = field(default_factory=list)  # spans announced by each PUT
    held: Ranges = ()
    upload: bytearray = field(default_factory=bytearray)
    refusal: LydianError | None = None
    refuse_after: int = 0  # bytes of uploads that are taken before
    head_status: int = 200
    came: int = 0  # bytes of uploads
    caller: bytes = field(default_factory=lambda: f"Bearer {os.urandom(8).hex()}".encode())

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        if scope["method"] == "GET":
            await self.get(headers, send)
        elif scope["method"] == "HEAD":
            held = {"Lydian-Ranges": format_ranges(self.held)}
            await answer(send, self.head_status, b"", **(held if self.head_status == 200 else {}))
        else:
            await self.put(headers, receive, send)

    async def get(self, headers: dict[str, str], send: Any) -> None:
        wanted = headers.get("range")
        self.asked.append(wanted)
        tag = {"ETag": f'"{self.digest}"'}
        fresh = headers.get("if-range", tag["ETag"]) == tag["ETag"]
        if wanted is None or self.ranges == "ignored" or not fresh:
            await answer(send, 200, self.data, **tag)
            return
        first, last = map(int, wanted.removeprefix("bytes=").split("-"))
        if self.ranges == "unsatisfiable" or first >= len(self.data):
            await answer(send, 416, b"out of range", **{"Content-Range": f"bytes */{len(self.data)}"})
            return
        said = first + (self.ranges == "shifted")
        span = {"Content-Range": f"bytes {said}-{last + said - first}/{len(self.data)}"}
        await answer(send, 206, self.data[first : last + 1], **tag, **span)

    async def put(self, headers: dict[str, str], receive: Any, send: Any) -> None:
        span, _, total = headers["content-range"].removeprefix("bytes ").partition("/")
        at, last = map(int, span.split("-"))
        self.sent.append((at, last + 1))
        self.upload.extend(bytes(int(total) - len(self.upload)))
        more = True
        while more:
            if self.refusal is not None and self.came >= self.refuse_after:
                body = json.dumps(self.refusal.answer()).encode()
                await answer(send, self.refusal.status, body, Connection="close")
                return
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            block, more = message["body"], message["more_body"]
            self.upload[at : at + len(block)] = block
            self.held = with_range(self.held, at, at + len(block))
            at += len(block)
            self.came += len(block)
        await answer(send, 204, b"")


async def answer(send: Any, status: int, body: bytes, **headers: str) -> None:
    length = {} if status == 204 else {"Content-Length": str(len(body))}
    pairs = [(name.lower().encode(), value.encode()) for name, value in {**length, **headers}.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


class Served(uvicorn.Server):
    """A server in a thread, of one shelf after the other."""

    def __init__(self) -> None:
        super().__init__(uvicorn.Config(self.serve_one, interface="asgi3", lifespan="off", log_level="critical"))
        self.shelf = Shelf()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.run, args=([self.listener],))
        self.thread.start()

    async def serve_one(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """What an earlier test left on its way finds its shelf gone."""
        came = dict(scope["headers"]).get(b"authorization", self.shelf.caller)
        if came == self.shelf.caller:
            await self.shelf(scope, receive, send)
        else:
            await answer(send, 503, b"")

    def stop(self) -> None:
        self.should_exit = True
        self.thread.join()
        self.listener.close()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served()
    wait_for("the server to listen", lambda: server.started)
    yield server
    server.stop()


@pytest.fixture
def shelf(served: Served) -> Shelf:
    served.shelf = Shelf()
    return served.shelf


@pytest.fixture
def net(served: Served, shelf: Shelf) -> Iterator[Proxy]:
    with no_thread_left(), Proxy("127.0.0.1", served.port) as proxy:
        yield proxy


@pytest.fixture
def api(net: Proxy, shelf: Shelf) -> Iterator[CoordinatorApi]:
    token = shelf.caller.decode().removeprefix("Bearer ")
    with CoordinatorApi(f"http://127.0.0.1:{net.port}", token, idle_s=10.0) as caller:
        yield caller


@contextmanager
def no_thread_left() -> Iterator[None]:
    """No thread may outlive what is inside."""
    before = set(threading.enumerate())
    yield
    assert [thread for thread in threading.enumerate() if thread not in before] == []


@pytest.fixture(params=[FIRST + 1, transfers.STRAIGHT], ids=["off the socket", "through httpx2"])
def target(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a download goes; each is tried in both ways in which bytes are read."""
    monkeypatch.setattr(transfers, "STRAIGHT", request.param)
    return tmp_path / "model"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "update"
    file.write_bytes(DATA)
    return file


def fetch(api: CoordinatorApi, target: Path, digest: str = DIGEST, **options: Any) -> int:
    return api.download_model(digest, target, **options)


def send(api: CoordinatorApi, source: Path, **options: Any) -> int:
    return api.upload("j.1.train.0", 1, source, **options)


# ---------------------------------------------------------------- downloads


def test_a_download_is_whole_and_leaves_nothing_else(api: CoordinatorApi, shelf: Shelf, target: Path) -> None:
    assert fetch(api, target, size=SIZE) == SIZE
    assert target.read_bytes() == DATA
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    assert shelf.asked == [f"bytes=0-{FIRST - 1}", f"bytes={FIRST}-{SIZE - 1}"]


def test_a_small_file_of_known_size_is_one_request(api: CoordinatorApi, shelf: Shelf, target: Path) -> None:
    shelf.data = DATA[:SMALL]
    assert fetch(api, target, shelf.digest, size=SMALL) == SMALL
    assert len(shelf.asked) == 1


def test_an_empty_file_is_fetched(api: CoordinatorApi, shelf: Shelf, target: Path) -> None:
    shelf.data = b""
    assert fetch(api, target, shelf.digest) == 0
    assert target.read_bytes() == b""


@pytest.mark.parametrize("kind", ["reset", "close", "half", "drop"])
def test_a_broken_download_is_gone_on_with_where_it_broke(
    api: CoordinatorApi, net: Proxy, target: Path, kind: Any
) -> None:
    api._idle_s = 0.5  # a drop is silence
    net.down.fault = Fault(kind, after=3 * MIB)
    with pytest.raises(UnavailableError) as broken:
        fetch(api, target, size=SIZE)
    assert broken.value.code == "unreachable"
    assert not target.exists()
    seen: list[int] = []
    received = fetch(api, target, size=SIZE, on_bytes=seen.append)
    assert target.read_bytes() == DATA
    # A reset takes what the kernel had not given on; of the others, one block of the proxy and a few headers are lost.
    kept = FIRST if kind == "reset" else 3 * MIB - 64 * 1024
    assert SIZE - 3 * MIB <= received <= SIZE - kept
    assert seen == sorted(seen)
    assert seen[0] > kept
    assert seen[-1] == SIZE


def test_a_download_that_stands_still_breaks_after_the_idle_time(api: CoordinatorApi, net: Proxy, target: Path) -> None:
    api._idle_s = 0.3
    net.down.fault = Fault("stall", after=MIB)
    with pytest.raises(UnavailableError):
        fetch(api, target, size=SIZE)
    net.cut_all()
    assert fetch(api, target, size=SIZE) < SIZE
    assert target.read_bytes() == DATA


@pytest.mark.parametrize(
    "tear",
    [
        lambda record: record.write_bytes(record.read_bytes()[:-3]),
        lambda record: record.write_bytes(record.read_bytes() + b"123 "),
        lambda record: record.write_bytes(record.read_bytes() + b"9 1\n\x00\xff\n0 99999999999\n"),
        lambda record: record.write_bytes(b""),
        lambda record: record.write_bytes(b"12"),
        lambda record: record.unlink(),
    ],
)
def test_a_torn_record_costs_bytes_and_never_the_file(
    api: CoordinatorApi, net: Proxy, target: Path, tear: Callable[[Path], object]
) -> None:
    net.down.fault = Fault("reset", after=3 * MIB)
    with pytest.raises(UnavailableError):
        fetch(api, target, size=SIZE)
    tear(next(target.parent.glob("*.ranges")))
    fetch(api, target, size=SIZE)
    assert target.read_bytes() == DATA
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_a_record_that_names_bytes_which_a_power_cut_took_is_found_out(
    api: CoordinatorApi, net: Proxy, target: Path
) -> None:
    net.down.fault = Fault("reset", after=3 * MIB)
    with pytest.raises(UnavailableError):
        fetch(api, target, size=SIZE)
    part = next(target.parent.glob("*.part"))
    part.write_bytes(bytes(SIZE))
    with pytest.raises(BadUpdateError) as damaged:
        fetch(api, target, size=SIZE)
    assert damaged.value.code == "digest_mismatch"
    assert list(target.parent.iterdir()) == []
    assert fetch(api, target, size=SIZE) == SIZE


@pytest.mark.parametrize("ranges", ["ignored", "unsatisfiable", "shifted"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_server_that_gives_no_right_ranges_is_asked_for_the_whole(
    api: CoordinatorApi, shelf: Shelf, net: Proxy, target: Path, ranges: str, begun: bool
) -> None:
    if begun:
        net.down.fault = Fault("reset", after=3 * MIB)
        with pytest.raises(UnavailableError):
            fetch(api, target, size=SIZE)
    shelf.ranges = ranges
    fetch(api, target, size=SIZE)
    assert target.read_bytes() == DATA
    assert shelf.asked[-1] is None
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_a_model_asked_for_by_name_that_changes_meanwhile_is_the_new_one(
    api: CoordinatorApi, shelf: Shelf, target: Path
) -> None:
    newer = os.urandom(2 * MIB)

    def change(_: int) -> None:
        shelf.data = newer

    api.pull("j", target, on_bytes=change)
    assert target.read_bytes() == newer
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_an_answer_without_a_digest_is_no_model(api: CoordinatorApi, shelf: Shelf, target: Path) -> None:
    class NoTag(str):
        pass

    shelf.__class__ = type("Untagged", (Shelf,), {"digest": property(lambda _: NoTag(""))})  # type: ignore[assignment]
    with pytest.raises(LydianError, match="without its length or its digest"):
        api.pull("j", target)
    assert list(target.parent.iterdir()) == []


def test_what_a_slow_line_brought_is_noted_although_it_is_less_than_a_block(
    api: CoordinatorApi, shelf: Shelf, net: Proxy, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.data = DATA[:SMALL]
    net.down.fault = Fault("stall", after=300_000)
    stop = threading.Event()
    seen: list[int] = []

    def call() -> None:
        with suppress(TransferStopped, UnavailableError):
            fetch(api, target, shelf.digest, size=SMALL, stop=stop, on_bytes=seen.append)

    calling = threading.Thread(target=call)
    calling.start()
    wait_for("the bytes to be written", lambda: seen and seen[-1] > 290_000)
    stop.set()
    net.cut_all()
    calling.join()
    assert fetch(api, target, shelf.digest, size=SMALL) < SMALL - 290_000
    assert target.read_bytes() == shelf.data


def test_a_download_that_is_stopped_while_nothing_comes_ends_soon(
    api: CoordinatorApi, net: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "STRAIGHT", FIRST + 1)
    net.down.fault = Fault("stall", after=MIB)
    stop, ended = threading.Event(), list[type[BaseException]]()

    def call() -> None:
        try:
            fetch(api, tmp_path / "model", size=SIZE, stop=stop)
        except LydianError as error:
            ended.append(type(error))
        except TransferStopped as stopped:
            ended.append(type(stopped))

    calling = threading.Thread(target=call)
    calling.start()
    wait_for("the line to stand still", lambda: net.down.fault is None)
    stop.set()
    calling.join(api._idle_s)  # it would take as long for the line to count as dead
    assert ended == [TransferStopped]


def test_one_flipped_byte_is_found_out_and_fetched_again(api: CoordinatorApi, net: Proxy, target: Path) -> None:
    net.down.fault = Fault("corrupt", after=4 * MIB)
    with pytest.raises(BadUpdateError) as damaged:
        fetch(api, target, size=SIZE)
    assert damaged.value.code == "digest_mismatch"
    assert list(target.parent.iterdir()) == []
    assert fetch(api, target, size=SIZE) == SIZE
    assert target.read_bytes() == DATA


def test_a_stopped_download_keeps_what_it_has(api: CoordinatorApi, target: Path) -> None:
    stop = threading.Event()
    with pytest.raises(TransferStopped):
        fetch(api, target, size=SIZE, stop=stop, on_bytes=lambda there: stop.set() if there > 2 * MIB else None)
    assert fetch(api, target, size=SIZE) <= SIZE - 2 * MIB
    assert target.read_bytes() == DATA


def test_many_calls_for_one_file_at_once_all_get_it_whole(api: CoordinatorApi, net: Proxy, target: Path) -> None:
    net.down.rate = 20 * MIB
    failures: list[BaseException] = []

    def call() -> None:
        try:
            fetch(api, target, size=SIZE)
        except LydianError as error:
            failures.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert target.read_bytes() == DATA
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_a_call_that_waits_for_another_one_can_be_stopped(api: CoordinatorApi, net: Proxy, target: Path) -> None:
    net.down.fault = Fault("stall", after=MIB)
    first = threading.Thread(target=lambda: fetch(api, target, size=SIZE))
    first.start()
    wait_for("the first call to be in the middle", lambda: net.down.fault is None)
    stop = threading.Event()
    stop.set()
    with pytest.raises(TransferStopped):
        fetch(api, target, size=SIZE, stop=stop)
    net.release()
    first.join()
    assert target.read_bytes() == DATA


FETCH = """
import sys
from pathlib import Path
from common.api import CoordinatorApi
url, digest, target, size = sys.argv[1:]
with CoordinatorApi(url) as api:
    print(api.download_model(digest, Path(target), size=int(size)))
"""


def python(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def noted(record: Path) -> int:
    """Bytes that a record says are here."""
    lines = record.read_text().splitlines()[1:] if record.exists() else []
    return sum(int(stop) - int(start) for start, stop in (line.split() for line in lines if " " in line))


def test_a_new_process_goes_on_where_a_killed_one_was(net: Proxy, target: Path) -> None:
    net.down.fault = Fault("stall", after=4 * MIB)
    arguments = (f"http://127.0.0.1:{net.port}", DIGEST, target, SIZE)
    with python(FETCH, *arguments) as first:
        wait_for("the process to note what came", lambda: noted(target.with_name("model.ranges")) >= 3 * MIB)
        first.send_signal(signal.SIGKILL)
        first.communicate()
    with python(FETCH, *arguments) as second:
        out, said = second.communicate(timeout=60)
    assert second.returncode == 0, said
    assert int(out) <= SIZE - 4 * MIB + NOTE_EVERY
    assert target.read_bytes() == DATA


# ---------------------------------------------------------------- uploads


def test_an_upload_is_whole(api: CoordinatorApi, shelf: Shelf, source: Path) -> None:
    seen: list[int] = []
    assert send(api, source, on_bytes=seen.append) == SIZE
    assert bytes(shelf.upload) == DATA
    assert seen == sorted(seen)
    assert seen[-1] == SIZE


def test_a_resumed_upload_sends_the_gaps_alone(api: CoordinatorApi, shelf: Shelf, source: Path) -> None:
    shelf.upload = bytearray(DATA)
    shelf.held = ((100, MIB), (2 * MIB, SIZE - 7))
    missing = gaps(shelf.held, SIZE)
    for start, stop in missing:
        shelf.upload[start:stop] = bytes(stop - start)
    seen: list[int] = []
    assert send(api, source, resume=True, on_bytes=seen.append) == sum(stop - start for start, stop in missing)
    assert bytes(shelf.upload) == DATA
    assert shelf.held == ((0, SIZE),)
    assert sum(stop - start for start, stop in shelf.sent) == sum(stop - start for start, stop in missing)
    assert seen[-1] == SIZE


@pytest.mark.parametrize("kind", ["reset", "close", "half"])
def test_a_broken_upload_is_resumed(api: CoordinatorApi, shelf: Shelf, net: Proxy, source: Path, kind: Any) -> None:
    net.up.fault = Fault(kind, after=3 * MIB)
    with pytest.raises(UnavailableError):
        send(api, source)
    assert send(api, source, resume=True) <= SIZE - FIRST  # and less, where the server had read more by then
    assert bytes(shelf.upload) == DATA


def test_an_upload_refused_before_its_body_costs_one_piece_and_not_the_file(
    api: CoordinatorApi, shelf: Shelf, net: Proxy, source: Path
) -> None:
    shelf.refusal = DiskFullError("no room")
    for _ in range(3):
        with pytest.raises(DiskFullError, match="no room"):
            send(api, source)
    assert net.up.bytes <= 3 * (FIRST + 1000)


@pytest.mark.parametrize("refusal", [TooSlowError("too slow"), DiskFullError("full"), UnavailableError("stopping")])
def test_an_answer_in_the_middle_of_a_body_is_heard_and_ends_it(
    api: CoordinatorApi, shelf: Shelf, net: Proxy, source: Path, refusal: LydianError
) -> None:
    os.truncate(source, 200 * MIB)
    shelf.refusal, shelf.refuse_after = refusal, 2 * MIB
    with pytest.raises(type(refusal), match=str(refusal)):
        send(api, source)
    assert net.up.bytes <= 16 * MIB  # what the kernel, the proxy and the server hold in their buffers


@pytest.mark.parametrize(("status", "kind"), [(410, LateError), (507, DiskFullError), (503, UnavailableError)])
def test_an_answer_without_a_body_is_the_error_of_its_status(
    api: CoordinatorApi, shelf: Shelf, source: Path, status: int, kind: type[LydianError]
) -> None:
    shelf.head_status = status
    with pytest.raises(kind, match=f"HTTP {status}"):
        send(api, source, resume=True)


def test_a_stopped_upload_ends_between_two_blocks_and_is_resumed(
    api: CoordinatorApi, shelf: Shelf, source: Path
) -> None:
    stop = threading.Event()
    with pytest.raises(TransferStopped):
        send(api, source, stop=stop, on_bytes=lambda there: stop.set() if there > 3 * MIB else None)
    sent = wait_for("the shelf to have what was sent", lambda: shelf.came if shelf.came >= 3 * MIB else None)
    assert sent <= 4 * MIB
    assert send(api, source, resume=True) <= SIZE - 3 * MIB
    assert bytes(shelf.upload) == DATA


def test_a_file_that_became_shorter_is_said(api: CoordinatorApi, source: Path) -> None:
    def cut(there: int) -> None:
        os.truncate(source, FIRST)

    with pytest.raises(LydianError, match="became shorter"):
        send(api, source, on_bytes=cut)


# ---------------------------------------------------------------- several streams


@pytest.fixture
def slow(net: Proxy, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    """Slow for each connection, and everything that takes seconds takes a tenth."""
    for name, value in {
        "FIRST": 64 << 10,
        "SMALL": 64 << 10,
        "ENOUGH_S": 0.2,
        "PIECE_S": 0.3,
        "LEAST": 64 << 10,
    }.items():
        monkeypatch.setattr(streams, name, value)
    net.up.rate = net.down.rate = 1.5 * MIB
    return net


def test_a_line_that_is_slow_for_each_connection_gets_several_and_each_byte_once(
    api: CoordinatorApi, shelf: Shelf, slow: Proxy, source: Path, target: Path
) -> None:
    down = Download(api._client, api.url, f"/v1/models/{DIGEST}", target, digest=DIGEST, size=SIZE)
    assert down.run() == SIZE
    assert target.read_bytes() == DATA
    assert down.streams_used >= 2  # how many more is measured, and tested where time is played (test_streams)
    send(api, source)
    assert bytes(shelf.upload) == DATA
    assert sum(stop - start for start, stop in shelf.sent) == SIZE
    assert len(shelf.sent) > 3
    assert slow.connections >= 2


def test_streams_that_were_too_many_and_are_wanted_again_come_back(
    api: CoordinatorApi, shelf: Shelf, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fickle(streams.Streams):
        """Wants eight streams and one in turn, whatever they bring."""

        def done(self, piece: streams.Piece, now: float) -> None:
            self._out -= 1
            self._number = getattr(self, "_number", 0) + 1
            self.wanted = 1 if self._number % 10 < 5 else 8

        def _size(self) -> int:
            return 64 << 10

    monkeypatch.setattr(transfers, "Streams", Fickle)
    assert send(api, source) == SIZE
    assert bytes(shelf.upload) == DATA
    assert sum(stop - start for start, stop in shelf.sent) == SIZE


def test_the_first_error_of_several_streams_ends_all_and_is_raised_once(
    api: CoordinatorApi, shelf: Shelf, slow: Proxy, source: Path
) -> None:
    shelf.refusal, shelf.refuse_after = DiskFullError("full in the middle"), 3 * MIB
    with no_thread_left(), pytest.raises(DiskFullError, match="full in the middle"):
        send(api, source)
    assert len(shelf.sent) > 2
    shelf.refusal = None
    assert send(api, source, resume=True) < SIZE
    assert bytes(shelf.upload) == DATA


def test_all_connections_cut_at_once_leave_what_every_stream_brought(
    api: CoordinatorApi, slow: Proxy, target: Path
) -> None:
    cutting = threading.Event()

    def cut(there: int) -> None:
        if there > 3 * MIB and not cutting.is_set():
            cutting.set()
            slow.cut_all()

    with no_thread_left(), pytest.raises(UnavailableError):
        fetch(api, target, size=SIZE, on_bytes=cut)
    slow.down.rate = None
    assert fetch(api, target, size=SIZE) <= SIZE - 3 * MIB
    assert target.read_bytes() == DATA


def test_a_fault_of_our_own_in_another_stream_is_not_lost(api: CoordinatorApi, slow: Proxy, source: Path) -> None:
    caller = threading.current_thread()

    def fail(_: int) -> None:
        if threading.current_thread() is not caller:
            raise ZeroDivisionError("in another stream")

    with no_thread_left(), pytest.raises(ZeroDivisionError):
        send(api, source, on_bytes=fail)


INTERRUPTED = """
import signal, sys
from pathlib import Path
from common import streams
from common.api import CoordinatorApi
signal.signal(signal.SIGINT, signal.default_int_handler)
streams.FIRST = streams.SMALL = streams.LEAST = 64 << 10
streams.PIECE_S = 0.3
def say(there):
    if there > 1 << 20:
        print(there, flush=True)
with CoordinatorApi(sys.argv[1]) as api:
    api.upload("j.1.train.0", 1, Path(sys.argv[2]), on_bytes=say)
"""


def test_an_interrupted_process_ends_with_all_its_streams(net: Proxy, source: Path) -> None:
    net.up.rate = 0.3 * MIB
    with python(INTERRUPTED, f"http://127.0.0.1:{net.port}", source) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert said.strip().endswith("KeyboardInterrupt")


def test_ranges_that_fail_while_several_streams_run_are_fetched_whole(
    api: CoordinatorApi, shelf: Shelf, slow: Proxy, target: Path
) -> None:
    def break_ranges(there: int) -> None:
        if there > 2 * MIB:
            shelf.ranges = "ignored"
            slow.down.rate = None

    fetch(api, target, size=SIZE, on_bytes=break_ranges)
    assert target.read_bytes() == DATA


# ---------------------------------------------------------------- any order, any cuts


CUTS = st.lists(st.tuples(st.sampled_from(["reset", "close", "half"]), st.integers(0, 2 * MIB)), max_size=6)


@given(cuts=CUTS, straight=st.sampled_from([FIRST + 1, transfers.STRAIGHT]))
@settings(deadline=None, max_examples=12)
def test_transfers_cut_anywhere_any_number_of_times_are_whole(
    served: Served, cuts: list[tuple[Any, int]], straight: int
) -> None:
    shelf = served.shelf = Shelf(data=DATA[: 2 * MIB + 1])
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory() as folder,
        Proxy("127.0.0.1", served.port) as net,
        CoordinatorApi(f"http://127.0.0.1:{net.port}") as api,
    ):
        patch.setattr(transfers, "STRAIGHT", straight)
        target = Path(folder) / "model"

        def insist(way: Way, call: Callable[[], object]) -> None:
            for kind, after in cuts:
                way.fault = Fault(kind, after=after)
                with suppress(UnavailableError):
                    call()
            way.fault = None
            call()

        insist(net.down, lambda: fetch(api, target, shelf.digest, size=len(shelf.data)))
        assert target.read_bytes() == shelf.data
        insist(net.up, lambda: send(api, target, resume=True))
        assert bytes(shelf.upload) == shelf.data
        assert shelf.held == ((0, len(shelf.data)),)


# ---------------------------------------------------------------- memory

MEMORY = """
import resource, sys, threading
from pathlib import Path
from common.api import CoordinatorApi
url, folder, digest, size = sys.argv[1:]
source, target, size = Path(folder) / "source", Path(folder) / "target", int(size)
with CoordinatorApi(url) as api:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    api.upload("j.1.train.0", 1, source)
    api.download_model(digest, target, size=size)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


class Zeros(Shelf):
    """Sends zeros by blocks, and keeps nothing of an upload."""

    size = 200 * MIB

    async def get(self, headers: dict[str, str], send: Any) -> None:
        first, last = map(int, headers["range"].removeprefix("bytes=").split("-"))
        span = f"bytes {first}-{last}/{self.size}".encode()
        await send({"type": "http.response.start", "status": 206, "headers": [
            (b"content-range", span), (b"content-length", str(last + 1 - first).encode())]})  # fmt: skip
        for at in range(first, last + 1, MIB):
            block = bytes(min(MIB, last + 1 - at))
            await send({"type": "http.response.body", "body": block, "more_body": at + len(block) <= last})

    async def put(self, headers: dict[str, str], receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await answer(send, 204, b"")


def test_memory_does_not_grow_with_the_file(served: Served, tmp_path: Path) -> None:
    shelf = served.shelf = Zeros()
    with (tmp_path / "source").open("wb") as file:
        file.truncate(shelf.size)
    with (tmp_path / "source").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with python(MEMORY, f"http://127.0.0.1:{served.port}", tmp_path, digest, shelf.size) as process:
        out, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert int(out) < 24 * 1024  # KiB
