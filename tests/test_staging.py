"""A half-filled file remembers what it has, whatever killed the process that filled it, and never claims more."""

import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.staging import RECORD, Staging

SIZE = 64
DATA = bytes(range(1, SIZE + 1))
SPANS = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(lambda pair: (min(pair), max(pair)))
STEPS = st.lists(st.tuples(SPANS, st.booleans(), st.booleans()), max_size=12)


def held(staging: Staging) -> set[int]:
    return {at for start, stop in staging.ranges for at in range(start, stop)}


@given(STEPS, st.integers(0, 6))
@settings(deadline=None)
def test_no_byte_is_ever_held_that_was_not_written(steps: list[tuple[tuple[int, int], bool, bool]], torn: int) -> None:
    """A step writes a span, notes it or not, and then the process is killed and another goes on, or not."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "upload.1.part"
        staging, written, noted = Staging.open(path, SIZE), set[int](), set[int]()
        for (start, stop), notes, dies in steps:
            staging.write(start, DATA[start:stop])
            written |= set(range(start, stop))
            if notes:
                staging.note(start, stop)
                noted |= set(range(start, stop))
            if dies:
                staging.close()  # what a kill does to the descriptors
                record = path.with_suffix(RECORD)
                if record.exists():
                    record.write_bytes(record.read_bytes() + b"3 40"[:torn])  # a line that was torn
                again = Staging.reopen(path)
                assert (again is None) == (not noted), "of what nothing was noted, nothing is known"
                staging = again or Staging.open(path, SIZE)
                assert noted <= held(staging) <= written
                written = held(staging)
        for at in held(staging):
            assert path.read_bytes()[at] == DATA[at]
        staging.discard()
        assert list(Path(folder).iterdir()) == []


@pytest.mark.parametrize("record", [b"", b"x\n", b"64", b"64 1\n", b"-5\n", b"\n0 64\n", b"63\n0 10\n", b"\xff\xfe\n"])
def test_a_record_that_does_not_fit_its_file_is_no_upload(tmp_path: Path, record: bytes) -> None:
    path = tmp_path / "u.1.part"
    path.write_bytes(bytes(SIZE))
    path.with_suffix(RECORD).write_bytes(record)
    assert Staging.reopen(path) is None


@pytest.mark.parametrize("line", [b"10 5", b"0 65", b"-1 5", b"a b", b"1", b"1 2 3", b"1e3 2"])
def test_a_line_that_cannot_be_true_says_nothing(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "u.1.part"
    path.write_bytes(bytes(SIZE))
    path.with_suffix(RECORD).write_bytes(b"64\n3 7\n" + line + b"\n20 30\n")
    again = Staging.reopen(path)
    assert again is not None
    with closing(again):
        assert again.ranges == ((3, 7), (20, 30))


def test_a_record_without_its_file_and_a_file_without_its_record_are_no_upload(tmp_path: Path) -> None:
    path = tmp_path / "u.1.part"
    assert Staging.reopen(path) is None
    path.with_suffix(RECORD).write_bytes(b"64\n")
    assert Staging.reopen(path) is None
    path.with_suffix(RECORD).unlink()
    path.write_bytes(bytes(SIZE))
    assert Staging.reopen(path) is None
