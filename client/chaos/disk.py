"""A small disk for the coordinator's state that can lose its power and run full: ext4 in a file, on a loop device.

Linux and root alone. A killed process proves nothing about a disk, since what it wrote is in the kernel's cache; here
ext4 is shut down without its log being flushed, so that whatever was not synced is gone, as after a power cut.

    with Disk(folder / "disk.img", folder / "disk") as disk:     # files go under disk.path
        disk.cut(server.kill)
        with disk.filled(): ...
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from common.errors import LydianError

SIZE = 96 << 20  # bytes; the file has holes, and takes what is written
TOOLS = ("losetup", "mkfs.ext4", "mount", "umount")
SEARCHED = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
UNMOUNT_TRIES, UNMOUNT_WAIT_S = 100, 0.05  # the kernel may let go of a dead process's files a moment later
SMALLEST_PIECE = 4096  # bytes; the smallest piece that fills a disk

_FS_IOC_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32), include/uapi/linux/fs.h
_NO_LOG_FLUSH = 2
_CLONE_NEWNS = 0x00020000  # linux/sched.h


class Disk:
    """One disk, as a context manager; mounted inside."""

    def __init__(self, image: Path, path: Path, size: int = SIZE) -> None:
        """Makes nothing yet.

        Args:
            image: the file that is the disk.
            path: the folder under which it is mounted.
            size: bytes.
        """
        self.image, self.path, self._size = image, path, size

    def __enter__(self) -> Self:
        self.path.mkdir()
        with self.image.open("wb") as file:
            file.truncate(self._size)
        _run(["mkfs.ext4", "-q", "-F", "-m", "0", str(self.image)])
        self._mount()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.path.is_mount():  # not where a cut was interrupted
            self._unmount()

    def cut(self, kill: Callable[[], None]) -> None:
        """The power fails now; then it is there again.

        Args:
            kill: ends every process that has files open here, and waits for their end.
        """
        descriptor = os.open(self.path, os.O_RDONLY)
        try:  # the disk first: no process may learn of its death before
            fcntl.ioctl(descriptor, _FS_IOC_SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(descriptor)
        kill()
        self._unmount()
        self._mount()

    @contextlib.contextmanager
    def filled(self) -> Iterator[None]:
        """Inside, no byte is free, as far as nobody frees any."""
        filler = self.path / "filler"
        try:
            with filler.open("wb") as file:
                _fill(file.fileno())
            yield
        finally:
            filler.unlink(missing_ok=True)

    def _mount(self) -> None:
        """On a loop device of its own each time: any process with mounts of its own may keep what was unmounted here
        alive for as long as it runs, and `mount -o loop` would find that again, with the power still off."""
        device = _run(["losetup", "--find", "--show", str(self.image)])
        try:
            _run(["mount", device, str(self.path)])
        finally:
            _run(["losetup", "--detach", device])  # done by the kernel when it is unmounted

    def _unmount(self) -> None:
        never = threading.Event()
        for _ in range(UNMOUNT_TRIES):
            if _try(["umount", str(self.path)]) == "":
                return
            never.wait(UNMOUNT_WAIT_S)
        _run(["umount", str(self.path)])


def keep_mounts_private() -> str:
    """From now on, what this thread and its children mount is theirs alone, and is gone when the last of them is.

    So that not even `kill -9` leaves a mount behind. Threads that run already are not part of it.

    Returns:
        why that is not possible; empty: it is done.
    """
    if sys.platform != "linux":
        return "needs Linux"
    if os.geteuid() != 0:
        return "needs root"
    if missing := [tool for tool in TOOLS if shutil.which(tool, path=SEARCHED) is None]:
        return f"needs {' and '.join(missing)}"
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS) != 0:
        return f"root may not mount here: {os.strerror(ctypes.get_errno())}"
    return _try(["mount", "--make-rprivate", "/"])


def why_no_disk() -> str:
    """Why a Disk cannot be made here, tried with a small one; empty: it can."""
    with tempfile.TemporaryDirectory(prefix="lydian-disk-") as folder:
        try:
            with Disk(Path(folder) / "image", Path(folder) / "disk", 8 << 20) as disk:
                disk.cut(lambda: None)
        except (LydianError, OSError) as error:
            return f"no disk can be made here: {error}"
    return ""


def _fill(descriptor: int) -> None:
    """Append until nothing fits, in pieces that get smaller."""
    piece = 64 << 20
    while piece >= SMALLEST_PIECE:
        try:
            os.posix_fallocate(descriptor, os.fstat(descriptor).st_size, piece)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            piece //= 2


def _run(command: Sequence[str]) -> str:
    """Run a command. Returns what it printed.

    Raises:
        LydianError: disk_tool, with what it said.
    """
    trouble, said = _tried(command)
    if trouble:
        raise LydianError(trouble, code="disk_tool", advice="Leave out the faults of disks with --kinds.")
    return said


def _try(command: Sequence[str]) -> str:
    """What went wrong with a command; empty: nothing."""
    return _tried(command)[0]


def _tried(command: Sequence[str]) -> tuple[str, str]:
    """(What went wrong with a command, what it printed)."""
    tool, *arguments = command
    found = shutil.which(tool, path=SEARCHED)
    if found is None:
        return f"there is no {tool}", ""
    ended = subprocess.run([found, *arguments], capture_output=True, text=True, check=False, timeout=60)
    trouble = "" if ended.returncode == 0 else f"{tool}: {ended.stderr.strip() or ended.returncode}"
    return trouble, ended.stdout.strip()
