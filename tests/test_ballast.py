"""Room that is the journal's: held as real blocks, given up when a commit needs it, taken back later."""

import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from common.errors import DiskFullError
from common.facts import StateChanged
from server.ballast import Ballast
from server.store import Journal
from tests.privileges import needs_mounts

MIB = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Write until nothing more fits."""
    filler = folder / "filler"

    def write() -> None:
        with filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    with pytest.raises(OSError, match="No space left"):
        write()
    return filler


def test_a_ballast_occupies_blocks_and_not_only_a_length(tmp_path: Path) -> None:
    ballast = Ballast(tmp_path / "ballast", MIB)
    assert ballast.held == 0
    assert ballast.hold()
    assert ballast.held >= MIB
    assert ballast.hold()


def test_a_ballast_is_released_once(tmp_path: Path) -> None:
    ballast = Ballast(tmp_path / "ballast", MIB)
    ballast.hold()
    assert ballast.release()
    assert not ballast.release()
    assert ballast.held == 0


def test_a_ballast_of_nothing_makes_no_file(tmp_path: Path) -> None:
    assert Ballast(tmp_path / "ballast", 0).hold()
    assert not (tmp_path / "ballast").exists()


@needs_mounts
def test_a_ballast_that_does_not_fit_leaves_the_disk_as_it_was(small_disk: Path) -> None:
    ballast = Ballast(small_disk / "ballast", 8 * MIB)
    assert not ballast.hold()
    assert not ballast.path.exists()


@needs_mounts
def test_a_journal_on_a_full_disk_still_writes_into_the_room_of_its_ballast(small_disk: Path) -> None:
    with closing(Journal.open(small_disk / "journal.sqlite", ballast_bytes=MIB)) as journal:
        assert journal.ballast.hold()
        filler = fill(small_disk)
        fact = StateChanged(state="paused", reason=1000 * "x")
        while journal.ballast.held:  # until the first commit that needs it
            journal.append("a", [fact])
        for _ in range(20):
            journal.append("a", [fact])
        fill(small_disk)
        before = len(list(journal.facts()))
        assert before > 20

        def write() -> None:
            while True:
                journal.append("a", [fact])

        with pytest.raises(DiskFullError, match="no room left for the journal"):
            write()
        assert len(list(journal.facts())) >= before
        filler.unlink()
        journal.append("a", [StateChanged(state="paused", reason="there is room again")])


@needs_mounts
def test_a_journal_opens_on_a_disk_that_only_its_ballast_has_room_on(small_disk: Path) -> None:
    with closing(Journal.open(small_disk / "journal.sqlite", ballast_bytes=MIB)) as journal:
        journal.append("a", [StateChanged(state="paused", reason="before")])
        journal.ballast.hold()
    fill(small_disk)
    with closing(Journal.open(small_disk / "journal.sqlite", ballast_bytes=MIB)) as journal:
        assert len(list(journal.facts())) == 1
        journal.append("a", [StateChanged(state="paused", reason="after")])
