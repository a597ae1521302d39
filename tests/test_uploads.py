"""Uploads of a coordinator: any streams at once, any death in between; what is wanted no more is gone at the start."""

import asyncio
import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import BadUpdateError, ConflictError, DiskFullError, UnavailableError
from common.staging import Staging
from server.blobs import Blobs
from server.uploads import NOTE_EVERY, Uploads
from tests.privileges import needs_mounts

KEY = ("job.train.1.0", 2)
MIB = 1 << 20


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path, reserve_bytes=0)


async def chunks(data: bytes, size: int = 1 << 16, dies_after: int | None = None) -> AsyncIterator[bytes]:
    for at in range(0, len(data), size):
        if dies_after is not None and at >= dies_after:
            raise ConnectionResetError("the client is gone")
        yield data[at : at + size]
        await asyncio.sleep(0)


def killed(blobs: Blobs, uploads: Uploads) -> Uploads:
    """Another process takes over."""
    uploads.close()
    again = Uploads(blobs)
    again.restore(lambda _: True)
    return again


def test_streams_at_once_and_out_of_order_give_the_bytes(blobs: Blobs) -> None:
    data = os.urandom(3 * MIB)
    seen: list[int] = []

    async def send() -> Uploads:
        uploads = Uploads(blobs)
        parts = [(2 * MIB, 3 * MIB), (0, MIB), (MIB, 2 * MIB), (0, MIB // 2)]
        await asyncio.gather(
            *(uploads.receive(KEY, len(data), a, b, chunks(data[a:b]), lambda: seen.append(1)) for a, b in parts)
        )
        return uploads

    uploads = asyncio.run(send())
    assert uploads.held(KEY) == ((0, len(data)),)
    assert uploads.finish(KEY).path.read_bytes() == data
    assert len(seen) == 56


def test_a_broken_stream_keeps_what_it_brought_over_a_restart(blobs: Blobs) -> None:
    data = os.urandom(MIB)
    uploads = Uploads(blobs)
    with pytest.raises(ConnectionResetError):
        asyncio.run(uploads.receive(KEY, len(data), 0, len(data), chunks(data, dies_after=500_000)))
    before = uploads.held(KEY)
    assert before[0][1] >= 500_000
    again = killed(blobs, uploads)
    assert again.held(KEY) == before
    start = before[0][1]
    asyncio.run(again.receive(KEY, len(data), start, len(data), chunks(data[start:])))
    assert again.finish(KEY).path.read_bytes() == data


def test_an_update_that_is_looked_at_as_it_ends_is_noted_only_if_it_breaks_off(blobs: Blobs, tmp_path: Path) -> None:
    data, uploads = os.urandom(MIB - 1), Uploads(blobs)
    record = tmp_path / "parts" / f"{KEY[0]}.2.ranges"
    broken, whole = (chunks(data, dies_after=500_000), chunks(data))
    with pytest.raises(ConnectionResetError):
        asyncio.run(uploads.receive(KEY, MIB - 1, 0, MIB - 1, broken, handed_in=True))
    assert record.read_bytes().splitlines()[0] == str(MIB - 1).encode()
    uploads.drop(KEY)
    asyncio.run(uploads.receive(KEY, MIB - 1, 0, MIB - 1, whole, handed_in=True))
    assert not record.exists()
    assert uploads.finish(KEY).path.read_bytes() == data
    assert KEY not in killed(blobs, uploads), "it is sent again, whole, as nobody has said that it was here"


def test_a_killed_coordinator_forgets_at_most_a_note_of_a_stream(blobs: Blobs, tmp_path: Path) -> None:
    data = os.urandom(5 * MIB + 1000)

    async def until(at: int) -> AsyncIterator[bytes]:
        async for chunk in chunks(data):
            yield chunk
            if uploads.held(KEY) and uploads.held(KEY)[0][1] >= at:
                snapshot.append((uploads.held(KEY)[0][1], (tmp_path / "parts" / f"{KEY[0]}.2.ranges").read_bytes()))

    uploads, snapshot = Uploads(blobs), list[tuple[int, bytes]]()
    asyncio.run(uploads.receive(KEY, len(data), 0, len(data), until(3 * MIB)))
    for held, record in snapshot:  # a kill at any of these moments leaves this record
        noted = max(int(line.split()[1]) for line in record.splitlines()[1:])
        assert held - NOTE_EVERY - (1 << 16) <= noted <= held


def test_what_is_wanted_no_more_is_deleted_at_the_start(blobs: Blobs, tmp_path: Path) -> None:
    uploads = Uploads(blobs)
    for attempt in (1, 2):
        asyncio.run(uploads.receive((KEY[0], attempt), 100, 0, 50, chunks(b"x" * 50)))
    uploads.close()
    (tmp_path / "parts" / "job.model.3.part").write_bytes(b"half a model")
    (tmp_path / "parts" / "odd-name.ranges").write_bytes(b"5\n")
    again = Uploads(blobs)
    again.restore(lambda key: key == KEY)
    assert KEY in again
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == [
        "job.train.1.0.2.part",
        "job.train.1.0.2.ranges",
    ]
    again.close()


def test_more_and_fewer_bytes_than_announced_are_refused_and_what_fits_is_kept(blobs: Blobs) -> None:
    uploads = Uploads(blobs)
    with pytest.raises(BadUpdateError, match="more than the 10 bytes announced"):
        asyncio.run(uploads.receive(KEY, 100, 0, 10, chunks(b"x" * 11)))
    with pytest.raises(BadUpdateError, match="5 of 10 bytes announced"):
        asyncio.run(uploads.receive(KEY, 100, 0, 10, chunks(b"x" * 5)))
    assert uploads.held(KEY) == ((0, 5),)
    with pytest.raises(BadUpdateError, match="announced 100 bytes before and 99 now"):
        uploads.begin(KEY, 99)
    with pytest.raises(ConflictError, match="5 of 100 bytes"):
        uploads.finish(KEY)
    uploads.drop(KEY)


# ---------------------------------------------------------------- any streams, any deaths

SIZE = 3000
DATA = bytes(number % 251 for number in range(SIZE))
SPANS = st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(lambda p: (p[0], min(p[0] + p[1], SIZE)))
STREAMS = st.lists(st.tuples(SPANS, st.integers(0, 40)), min_size=1, max_size=4)  # and after how many chunks it breaks


async def together(uploads: Uploads, streams: list[tuple[tuple[int, int], int]]) -> None:
    results = await asyncio.gather(
        *(
            uploads.receive(KEY, SIZE, start, stop, chunks(DATA[start:stop], 100, dies_after=100 * breaks))
            for (start, stop), breaks in streams
        ),
        return_exceptions=True,
    )
    assert all(result is None or isinstance(result, ConnectionResetError) for result in results)


def of_disk(folder: Path) -> tuple[tuple[tuple[int, int], ...], bytes]:
    """What a coordinator that starts on these very bytes of the disk holds of the upload, and its file."""
    with tempfile.TemporaryDirectory() as other:
        copy = Path(other) / "state"
        shutil.copytree(folder, copy)
        started = Uploads(Blobs(copy, reserve_bytes=0))
        started.restore(lambda _: True)
        held = started.held(KEY)
        started.close()
        part = copy / "parts" / f"{KEY[0]}.{KEY[1]}.part"
        return held, part.read_bytes() if held else b""


@given(st.lists(STREAMS, min_size=1, max_size=3))
@settings(deadline=None)
def test_whatever_streams_come_and_whenever_it_dies_a_coordinator_holds_what_was_written_and_nothing_else(
    lives: list[list[tuple[tuple[int, int], int]]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        blobs = Blobs(Path(folder), reserve_bytes=0)
        uploads = Uploads(blobs)
        for streams in lives:
            asyncio.run(together(uploads, streams))
            before = uploads.held(KEY)
            held, file = of_disk(Path(folder))
            assert held == before  # every stream has ended, so every byte of it was noted
            for start, stop in held:
                assert file[start:stop] == DATA[start:stop]
            uploads = killed(blobs, uploads)
            assert uploads.held(KEY) == before
        uploads.close()


# ---------------------------------------------------------------- what is dropped


def test_what_nobody_wants_any_more_is_deleted_and_what_is_wanted_goes_on(blobs: Blobs) -> None:
    uploads, other = Uploads(blobs), ("job.train.2.0", 1)
    for key in (KEY, other, ("another.train.1.0", 1)):
        asyncio.run(uploads.receive(key, 100, 0, 50, chunks(b"x" * 50)))
    uploads.keep_only(lambda key: key != KEY)
    assert KEY not in uploads
    assert other in uploads
    uploads.drop_job("job")
    assert blobs.recorded() == ["another.train.1.0.1"]
    uploads.drop_job("another")
    assert blobs.recorded() == []


def test_the_streams_of_an_upload_that_was_dropped_are_told_to_come_again_and_not_that_their_work_is_over(
    blobs: Blobs,
) -> None:
    uploads = Uploads(blobs)

    async def until_dropped() -> AsyncIterator[bytes]:
        yield b"x"
        uploads.drop(KEY)
        yield b"y"

    with pytest.raises(UnavailableError) as told:
        asyncio.run(uploads.receive(KEY, 100, 0, 100, until_dropped()))
    assert told.value.code == "upload_dropped"
    assert blobs.recorded() == []


def test_bytes_for_an_upload_that_is_being_looked_at_are_refused(blobs: Blobs) -> None:
    uploads = Uploads(blobs)
    asyncio.run(uploads.receive(KEY, 10, 0, 10, chunks(b"x" * 10)))
    uploads.finish(KEY)
    with pytest.raises(ConflictError) as refused:
        asyncio.run(uploads.receive(KEY, 10, 0, 10, chunks(b"y" * 10)))
    assert refused.value.code == "upload_closed"
    assert blobs.part(f"{KEY[0]}.2").read_bytes() == b"x" * 10


# ---------------------------------------------------------------- disks


def failing(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """From the second chunk on, the disk answers with this error."""
    write, calls = Staging.write, list[int]()

    def second_fails(staging: Staging, offset: int, data: bytes) -> None:
        calls.append(offset)
        if len(calls) > 1:
            raise OSError(number, os.strerror(number))
        write(staging, offset, data)

    monkeypatch.setattr(Staging, "write", second_fails)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_and_the_half_upload_gives_its_room_back(
    blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    failing(monkeypatch, number)
    uploads = Uploads(blobs)
    with pytest.raises(DiskFullError, match=os.strerror(number)):
        asyncio.run(uploads.receive(KEY, 100, 0, 20, chunks(b"x" * 20, size=10)))
    assert KEY not in uploads
    assert list((tmp_path / "parts").iterdir()) == []


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG])
def test_a_disk_that_may_not_be_written_to_is_said_and_what_came_is_kept(
    blobs: Blobs, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    failing(monkeypatch, number)
    uploads = Uploads(blobs)
    with pytest.raises(DiskFullError, match=os.strerror(number)):
        asyncio.run(uploads.receive(KEY, 100, 0, 20, chunks(b"x" * 20, size=10)))
    assert uploads.held(KEY) == ((0, 10),)
    uploads.close()


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
def test_a_disk_that_is_broken_and_a_process_without_descriptors_are_not_taken_for_a_full_disk(
    blobs: Blobs, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    failing(monkeypatch, number)
    uploads = Uploads(blobs)
    with pytest.raises(OSError, match=os.strerror(number)) as failed:
        asyncio.run(uploads.receive(KEY, 100, 0, 20, chunks(b"x" * 20, size=10)))
    assert failed.value.errno == number
    assert uploads.held(KEY) == ((0, 10),)
    uploads.close()


@needs_mounts
def test_a_disk_that_is_really_full_is_said_and_takes_an_upload_again_when_it_has_room(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], check=True)
    try:
        uploads = Uploads(Blobs(disk, reserve_bytes=0))
        other = disk / "of another program"
        other.write_bytes(bytes(3 * MIB))
        with pytest.raises(DiskFullError, match="No space left"):
            asyncio.run(uploads.receive(KEY, 3 * MIB, 0, 3 * MIB, chunks(bytes(3 * MIB))))
        assert KEY not in uploads
        other.unlink()
        asyncio.run(uploads.receive(KEY, 3 * MIB, 0, 3 * MIB, chunks(bytes(3 * MIB))))
        assert uploads.finish(KEY).complete
        uploads.close()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
