"""Pieces of blobs: the right bytes, read once for all who want them, and no more of them in memory than is bounded."""

import asyncio
import os
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server import reading
from server.reading import KEPT, LARGEST, OUT, SMALLEST, Reading

SIZE = 3 * LARGEST + 12_345
DATA = os.urandom(SIZE)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reading") / "blob"
    path.write_bytes(DATA)
    return path


async def answer(of: Reading, path: Path, start: int, stop: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    got = b""
    try:
        with of.answering():
            while len(got) < stop - start:
                piece = await of.piece("d", descriptor, start + len(got), stop)
                assert 0 < len(piece) <= LARGEST
                got += piece
    finally:
        os.close(descriptor)
    return got


SPANS = st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(lambda p: (p[0], min(p[0] + p[1], SIZE)))


@given(st.lists(SPANS, min_size=1, max_size=5), st.integers(0, 200))
@settings(deadline=None, max_examples=30)
def test_every_answer_has_its_bytes_however_many_others_there_are(
    file: Path, spans: list[tuple[int, int]], others: int
) -> None:
    async def all_of_them() -> list[bytes]:
        of = Reading()
        of._answers = others
        return await asyncio.gather(*(answer(of, file, *span) for span in spans))

    assert asyncio.run(all_of_them()) == [DATA[start:stop] for start, stop in spans]


def test_a_small_file_is_the_same_bytes_for_all_who_want_it_however_many_answer(tmp_path: Path) -> None:
    path, small = tmp_path / "small", os.urandom(LARGEST - 7)
    path.write_bytes(small)

    async def all_of_them() -> list[bytes]:
        of = Reading()
        of._answers = OUT // SMALLEST
        return await asyncio.gather(*(of.whole("d", path) for _ in range(5)))

    found = asyncio.run(all_of_them())
    assert found[0] == small
    assert all(one is found[0] for one in found)


def test_a_small_file_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        asyncio.run(Reading().whole("d", tmp_path / "gone"))


def test_what_many_want_at_once_is_read_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    read = reading._read_and_close

    def counted(descriptor: int, start: int, size: int) -> bytes:
        reads.append(start)
        return read(descriptor, start, size)

    monkeypatch.setattr(reading, "_read_and_close", counted)

    async def many() -> None:
        of = Reading()
        await asyncio.gather(*(answer(of, file, 0, LARGEST) for _ in range(20)))

    asyncio.run(many())
    assert reads == [0]


@given(st.integers(1, 5000))
def test_all_pieces_together_are_bounded(answers: int) -> None:
    of = Reading()
    of._answers = answers
    assert SMALLEST <= of.piece_bytes <= LARGEST
    assert of.piece_bytes * answers <= max(OUT, SMALLEST * answers)


def test_what_is_kept_is_bounded_and_what_was_used_last_is_kept(tmp_path: Path) -> None:
    async def read_much() -> Reading:
        of = Reading()
        for name in range(20):
            path = tmp_path / f"{name}"
            path.write_bytes(bytes(LARGEST))
            descriptor = os.open(path, os.O_RDONLY)
            await of.piece(str(name), descriptor, 0, LARGEST)
            os.close(descriptor)
        return of

    of = asyncio.run(read_much())
    assert [digest for digest, _, _ in of._pieces] == [str(name) for name in range(20 - KEPT // LARGEST, 20)]


def test_a_file_that_is_shorter_than_it_was_said_to_be_is_an_error(file: Path) -> None:
    with pytest.raises(OSError, match="ends before"):
        asyncio.run(answer(Reading(), file, 0, SIZE + 1))


def test_an_answer_that_is_given_up_takes_nothing_from_the_others_and_leaves_no_descriptor(file: Path) -> None:
    async def one_leaves() -> bytes:
        of = Reading()
        first = asyncio.create_task(answer(of, file, 0, SIZE))
        second = asyncio.create_task(answer(of, file, 0, SIZE))
        await asyncio.sleep(0)
        first.cancel()
        return await second

    before = psutil.Process().num_fds()
    assert asyncio.run(one_leaves()) == DATA
    assert psutil.Process().num_fds() == before
