"""Uploads of a coordinator: any streams at once, any death in between; what is wanted no more is gone at the start."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from common.errors import BadUpdateError, ConflictError, DiskFullError
from common.staging import Staging
from server.blobs import Blobs
from server.uploads import NOTE_EVERY, Uploads

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


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_no_more_is_said_and_a_full_one_gets_the_room_of_the_half_upload_back(
    blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Staging, "write", refuse)
    uploads = Uploads(blobs)
    with pytest.raises(DiskFullError, match=os.strerror(number)):
        asyncio.run(uploads.receive(KEY, 100, 0, 10, chunks(b"x" * 10)))
    uploads.close()
    full = number in (errno.ENOSPC, errno.EDQUOT)
    assert (list((tmp_path / "parts").iterdir()) == []) == full


def test_a_broken_disk_is_not_taken_for_a_full_one(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Staging, "write", fail)
    with pytest.raises(OSError, match="Input/output error"):
        asyncio.run(Uploads(blobs).receive(KEY, 100, 0, 10, chunks(b"x" * 10)))
