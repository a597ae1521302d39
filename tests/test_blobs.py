"""Weight files and uploads: any order of pieces gives exactly the bytes; nothing leaves the folder; room is kept."""

import errno
import hashlib
import os
import random
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import staging as stagings
from common.errors import BadRequestError, ConflictError, DiskFullError, NotFoundError
from common.ranges import content_range
from common.staging import Staging
from server import blobs as module
from server import store
from server.blobs import Blobs, parse_content_range

SIZE = 64
DATA = bytes(range(SIZE))
SPANS = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(lambda pair: (min(pair), max(pair)))


def sha256(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path, reserve_bytes=0)


@pytest.fixture
def staging(tmp_path: Path) -> Iterator[Staging]:
    with closing(Staging.open(tmp_path / "upload", SIZE)) as opened:
        yield opened


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------- uploads


@given(st.lists(SPANS, max_size=12), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_pieces_in_any_order_and_number_give_exactly_the_bytes(
    spans: list[tuple[int, int]], dice: random.Random
) -> None:
    with tempfile.TemporaryDirectory() as folder, closing(Staging.open(Path(folder) / "u", SIZE)) as staging:
        for start, stop in spans:
            staging.write(start, DATA[start:stop])
        held = {number for start, stop in spans for number in range(start, stop)}
        assert {number for start, stop in staging.ranges for number in range(start, stop)} == held
        assert staging.complete == (len(held) == SIZE)
        rest = list(staging.missing)
        dice.shuffle(rest)
        for start, stop in rest:
            staging.write(start, DATA[start:stop])
        assert staging.complete
        assert staging.missing == ()
        assert staging.ranges == ((0, SIZE),)
        assert staging.path.read_bytes() == DATA


@given(st.lists(st.tuples(st.integers(0, 5), st.binary(min_size=1, max_size=3)), max_size=6))
@settings(deadline=None)
def test_what_was_written_last_is_what_the_file_holds(writes: list[tuple[int, bytes]]) -> None:
    file = bytearray(6)  # few bytes, so that many writes meet
    with tempfile.TemporaryDirectory() as folder, closing(Staging.open(Path(folder) / "u", 6)) as staging:
        for offset, written in writes:
            data = written[: 6 - offset]
            staging.write(offset, data)
            file[offset : offset + len(data)] = data
            assert staging.path.read_bytes() == file


def test_an_upload_of_no_bytes_is_complete_at_once(tmp_path: Path) -> None:
    with closing(Staging.open(tmp_path / "upload", 0)) as staging:
        assert staging.complete


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (SIZE, 1), (SIZE - 1, 2), (0, SIZE + 1), (10**17, 1)])
def test_bytes_outside_of_the_upload_are_refused_and_not_written(staging: Staging, offset: int, length: int) -> None:
    with pytest.raises(BadRequestError, match=f"not in an upload of {SIZE}") as refused:
        staging.write(offset, b"x" * length)
    assert refused.value.code == "out_of_range"
    assert staging.ranges == ()
    assert staging.path.read_bytes() == bytes(SIZE)


def test_an_upload_in_crumbs_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stagings, "MAX_RANGES", 3)
    with closing(Staging.open(tmp_path / "upload", SIZE)) as staging:
        for offset in (0, 10, 20):
            staging.write(offset, b"x")
        with pytest.raises(BadRequestError, match="3 separate pieces, and byte 30 would begin another") as refused:
            staging.write(30, b"x")
        assert refused.value.code == "too_many_pieces"
        staging.write(1, b"x" * 9)  # joins two
        staging.write(30, b"x")
        assert staging.ranges == ((0, 11), (20, 21), (30, 31))


def test_a_closed_upload_takes_no_byte_more(staging: Staging) -> None:
    staging.write(0, DATA)
    staging.close()
    staging.close()
    with pytest.raises(ConflictError, match="complete and being looked at") as refused:
        staging.write(0, b"changed after it was checked")
    assert refused.value.code == "upload_closed"
    assert staging.path.read_bytes() == DATA
    assert sha256(staging.path.read_bytes()) == sha256(DATA)


def test_a_discarded_upload_leaves_no_file(staging: Staging) -> None:
    staging.discard()
    assert not staging.path.exists()
    staging.discard()


def test_an_upload_begins_empty_whatever_lay_there(tmp_path: Path) -> None:
    (tmp_path / "upload").write_bytes(b"old" * 100)
    with closing(Staging.open(tmp_path / "upload", SIZE)) as staging:
        assert staging.path.read_bytes() == bytes(SIZE)


def test_a_disk_that_takes_a_few_bytes_at_a_time_gets_them_all(
    staging: Staging, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: pwrite(descriptor, data[:5], offset))
    staging.write(0, DATA)
    assert staging.path.read_bytes() == DATA
    assert sha256(staging.path.read_bytes()) == sha256(DATA)


def test_a_disk_that_fills_up_in_a_write_leaves_the_upload_true(
    staging: Staging, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite

    def fills_at_ten(descriptor: int, data: memoryview, offset: int) -> int:
        if offset >= 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, data[: 10 - offset], offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fills_at_ten)
        with pytest.raises(OSError, match="No space left"):
            staging.write(0, DATA)
    assert staging.ranges == ((0, 10),)
    staging.write(10, DATA[10:])
    assert sha256(staging.path.read_bytes()) == sha256(DATA)


# ---------------------------------------------------------------- whole files


def test_bytes_are_found_under_their_digest(blobs: Blobs, tmp_path: Path) -> None:
    digest = blobs.put_bytes(b"def model(config): ...")
    assert digest == sha256(b"def model(config): ...")
    assert blobs.path(digest).read_bytes() == b"def model(config): ..."
    assert (blobs.has(digest), blobs.size(digest)) == (True, 22)
    assert blobs.put_bytes(b"def model(config): ...") == digest
    assert files(tmp_path) == [f"blobs/{digest[:2]}/{digest}"]


def test_bytes_that_cannot_be_kept_leave_nothing_behind(blobs: Blobs, tmp_path: Path) -> None:
    in_the_way = tmp_path / "blobs" / sha256(b"x")[:2]
    in_the_way.touch()
    with pytest.raises(FileExistsError):
        blobs.put_bytes(b"x")
    assert files(tmp_path) == [str(in_the_way.relative_to(tmp_path))]


def test_a_file_that_is_not_there_has_no_size(blobs: Blobs) -> None:
    assert not blobs.has("0" * 64)
    with pytest.raises(NotFoundError, match="no file 000000000000… here"):
        blobs.size("0" * 64)


@pytest.mark.parametrize("durable", [True, False])
def test_an_adopted_upload_moves_to_its_name(blobs: Blobs, tmp_path: Path, durable: bool) -> None:
    staging = Staging.open(blobs.part("job.train.1.0.1"), SIZE)
    staging.write(0, DATA)
    blobs.adopt(staging.path, sha256(DATA), durable=durable)
    staging.forget()
    assert blobs.path(sha256(DATA)).read_bytes() == DATA
    assert files(tmp_path) == [f"blobs/{sha256(DATA)[:2]}/{sha256(DATA)}"]


def waits(blobs: Blobs, monkeypatch: pytest.MonkeyPatch, *, durable: bool, synced: bool = False) -> list[str]:
    """What adopting DATA waits for, in order, each with what stood under the digest at that moment."""
    digest, seen, sync = sha256(DATA), list[str](), store.sync

    def watched(path: Path) -> None:
        kept = blobs.path(digest).read_bytes() if blobs.has(digest) else None
        seen.append(f"{path.name} {'new' if kept == DATA else 'old' if kept is not None else 'none'}")
        sync(path)

    part = blobs.part("p")
    part.write_bytes(DATA)
    with monkeypatch.context() as patch:
        patch.setattr(module, "sync", watched)
        blobs.adopt(part, digest, durable=durable, synced=synced)
    return seen


def test_a_durable_file_reaches_the_disk_before_its_name_does(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sha256(DATA)[:2]
    assert waits(blobs, monkeypatch, durable=True) == ["p.part none", f"{folder} new", "blobs new"]


def test_a_file_whose_bytes_are_on_the_disk_waits_for_its_name_alone(
    blobs: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sha256(DATA)[:2]
    assert waits(blobs, monkeypatch, durable=True, synced=True) == [f"{folder} new", "blobs new"]


def test_a_folders_own_name_is_waited_for_once_by_each_process(
    blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, again = sha256(DATA)[:2], ["p.part new", f"{sha256(DATA)[:2]} new"]
    assert waits(blobs, monkeypatch, durable=True) == ["p.part none", f"{folder} new", "blobs new"]
    assert waits(blobs, monkeypatch, durable=True) == again
    next_process = Blobs(tmp_path, reserve_bytes=0)  # the one before may have died before it waited
    assert waits(next_process, monkeypatch, durable=True) == [*again, "blobs new"]


def test_an_update_waits_for_no_disk(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    assert waits(blobs, monkeypatch, durable=False) == []


def test_an_update_never_makes_a_durable_file_of_the_same_bytes_less_safe(
    blobs: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = blobs.path(sha256(DATA))
    path.parent.mkdir()
    path.write_bytes(b"cut short")  # as a power cut may leave it
    assert waits(blobs, monkeypatch, durable=False)[0] == "p.part old"
    assert path.read_bytes() == DATA


@given(st.sets(st.binary(max_size=8), max_size=6), st.sets(st.binary(max_size=8), max_size=6))
@settings(deadline=None)
def test_a_sweep_removes_exactly_what_nobody_needs(kept: set[bytes], dropped: set[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        blobs = Blobs(Path(folder), reserve_bytes=0)
        for data in kept | dropped:
            blobs.put_bytes(data, durable=False)
        freed = blobs.sweep({sha256(data) for data in kept})
        assert freed == sum(map(len, dropped - kept))
        assert all(blobs.has(sha256(data)) for data in kept)
        assert not any(blobs.has(sha256(data)) for data in dropped - kept)


def test_a_sweep_leaves_files_alone_that_are_not_named_by_digest(blobs: Blobs, tmp_path: Path) -> None:
    blobs.put_bytes(b"x")
    (tmp_path / "blobs" / sha256(b"x")[:2] / "notes.txt").write_text("a person's")
    blobs.part("under-way").write_bytes(b"y")
    blobs.sweep(set())
    assert files(tmp_path) == [f"blobs/{sha256(b'x')[:2]}/notes.txt", "parts/under-way.part"]


def test_a_removed_file_is_gone_and_may_be_removed_again(blobs: Blobs) -> None:
    digest = blobs.put_bytes(b"x")
    blobs.remove(digest)
    blobs.remove(digest)
    assert not blobs.has(digest)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "a/b", ".hidden", "a\0", "ä", "x" * 201, "a\n"])
def test_no_name_leads_out_of_the_folder(blobs: Blobs, name: str) -> None:
    with pytest.raises(BadRequestError, match="cannot be the name of a file"):
        blobs.part(name)


@pytest.mark.parametrize("digest", ["", "0" * 63, "0" * 65, "A" * 64, "../" * 21 + "x", "0" * 64 + "\n", "٣" * 64])
def test_no_digest_leads_out_of_the_folder(blobs: Blobs, digest: str) -> None:
    for call in (blobs.path, blobs.has, blobs.size, blobs.remove):
        with pytest.raises(BadRequestError, match="is no SHA-256"):
            call(digest)


# ---------------------------------------------------------------- room


def free_bytes(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def test_what_does_not_fit_is_refused_with_the_numbers_before_anything_is_written(tmp_path: Path) -> None:
    reserve = free_bytes(tmp_path) * 2
    blobs = Blobs(tmp_path, reserve_bytes=reserve)
    numbers = rf"3 bytes do not fit: \d+ are free in .*, of which 0 are promised .* and {reserve} reserved"
    with pytest.raises(DiskFullError, match=numbers):
        blobs.put_bytes(b"abc")
    assert files(tmp_path) == []


def test_room_that_is_promised_to_an_upload_is_not_promised_twice(blobs: Blobs, tmp_path: Path) -> None:
    most = free_bytes(tmp_path) * 6 // 10
    blobs.check_room(most)
    staging = Staging.open(blobs.part("first"), most)
    with pytest.raises(DiskFullError, match=f"{most} are promised to uploads under way"):
        blobs.check_room(most)
    staging.discard()
    blobs.check_room(most)


def test_what_an_upload_has_brought_is_counted_once(blobs: Blobs) -> None:
    with closing(Staging.open(blobs.part("first"), 8 << 20)) as staging:
        assert blobs._promised() == 8 << 20
        staging.write(0, bytes(6 << 20))
        store.sync(staging.path)  # some file systems find the blocks when they write
        assert blobs._promised() == 2 << 20
        staging.discard()


def test_every_part_and_record_is_cleared_but_those_that_are_kept(blobs: Blobs, tmp_path: Path) -> None:
    for at, name in enumerate(("kept", "gone")):
        with closing(Staging.open(blobs.part(name), 4096)) as staging:
            staging.write(0, b"x" * 4096)
            staging.note(0, 4096)
        os.utime(tmp_path / "parts" / f"{name}.ranges", (at, at))  # the clock of a file system stands still in between
    assert blobs.recorded() == ["kept", "gone"]
    assert blobs.clear_parts(keep={"kept"}) > 0
    assert files(tmp_path) == ["parts/kept.part", "parts/kept.ranges"]
    blobs.clear_parts()
    assert files(tmp_path) == []


def test_room_that_the_ballast_holds_is_not_reserved_twice(tmp_path: Path) -> None:
    ballast = tmp_path / "ballast"
    ballast.write_bytes(bytes(8 << 20))
    store.sync(ballast)
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    plain = Blobs(tmp_path, reserve_bytes=8 << 20)
    weighted = Blobs(tmp_path, reserve_bytes=8 << 20, ballast=ballast)
    wanted = free - (4 << 20)  # fits only where the reserve is not taken off once more
    with pytest.raises(DiskFullError):
        plain.check_room(wanted)
    weighted.check_room(wanted)
    ballast.unlink()  # given to the journal
    with pytest.raises(DiskFullError):
        weighted.check_room(wanted + (8 << 20))


def test_parts_that_vanish_while_room_is_counted_are_no_error(blobs: Blobs) -> None:
    over = threading.Event()

    def come_and_go() -> None:
        while not over.is_set():
            for number in range(20):
                blobs.part(str(number)).touch()
            for number in range(20):
                blobs.part(str(number)).unlink(missing_ok=True)

    other = threading.Thread(target=come_and_go)
    other.start()
    try:
        for _ in range(150):
            blobs.check_room(0)
    finally:
        over.set()
        other.join()


# ---------------------------------------------------------------- Content-Range


@given(st.integers(0, 10**12), st.integers(1, 10**12), st.integers(0, 10**12))
@settings(deadline=None)
def test_a_content_range_comes_back_from_its_header(start: int, length: int, rest: int) -> None:
    total = start + length + rest
    assert parse_content_range(content_range(start, start + length, total), length) == (start, start + length, total)


def test_a_body_without_a_range_is_the_whole() -> None:
    assert parse_content_range(None, 5) == (0, 5, 5)
    assert parse_content_range(None, 0) == (0, 0, 0)


def test_a_length_that_is_not_announced_is_not_compared() -> None:
    assert parse_content_range("Bytes 5-9/10", None) == (5, 10, 10)


@pytest.mark.parametrize(
    ("header", "length"),
    [
        (None, None),
        (None, -1),
        ("", 5),
        ("bytes 0-4", 5),
        ("bytes 0-4/*", 5),
        ("bytes */10", 5),
        ("bytes 4-0/10", 5),
        ("bytes 6-10/10", 5),
        ("bytes 0-4/10", 4),
        ("bytes -5/10", 5),
        ("bytes 0-4/10, 6-7/10", 7),
        ("lines 0-4/10", 5),
        ("bytes 0-4/" + "9" * 19, 5),
        ("bytes ٠-٤/١٠", 5),
    ],
)
def test_a_content_range_that_is_malformed_or_contradicts_itself_is_refused(
    header: str | None, length: int | None
) -> None:
    with pytest.raises(BadRequestError):
        parse_content_range(header, length)


@given(st.text(alphabet="bytes 0123456789-/*", max_size=30), st.integers(0, 99))
@settings(deadline=None)
def test_any_header_is_refused_or_gives_a_span_inside_its_total(header: str, length: int) -> None:
    try:
        start, stop, total = parse_content_range(header, length)
    except BadRequestError:
        return
    assert 0 <= start < stop <= total
    assert stop - start == length
