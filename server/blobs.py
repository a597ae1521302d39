"""Weight files, named by what is in them, and uploads on their way to becoming one.

    folder/parts/NAME.part ──adopt──▶ folder/blobs/ab/ab12…   (the SHA-256 of its bytes)
    folder/parts/NAME.ranges          what of NAME.part is here (common.staging)

A file under its digest is whole, unless a power cut took bytes of one that was adopted without waiting for the disk.
Nothing that came over the network becomes a path: digests are 64 hex digits, part names a few plain characters. Knows
nothing of jobs or tensors; who needs which file is the caller's to say (`sweep`).
"""

import hashlib
import os
import re
import secrets
import threading
from collections.abc import Collection, Iterator
from pathlib import Path

from common.errors import BadRequestError, DiskFullError, NotFoundError
from common.staging import RECORD
from server.reading import Reading
from server.store import sync

BLOCK = 512  # bytes; the unit of st_blocks, whatever the file system

_DIGEST = re.compile(r"[0-9a-f]{64}")
_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", re.IGNORECASE)


class Blobs:
    """The files of one state folder. Calls may come from any thread; two on the same digest do no harm."""

    def __init__(self, folder: Path, *, reserve_bytes: int, ballast: Path | None = None) -> None:
        """Make the folders where they are missing.

        Args:
            folder: the state folder; blobs/ and parts/ lie in it, on one file system.
            reserve_bytes: room that uploads and models leave to the journal.
            ballast: a file that holds some of that room already (server.ballast).
        """
        self._blobs, self._parts = folder / "blobs", folder / "parts"
        self._reserve_bytes, self._ballast = reserve_bytes, ballast
        self.reading = Reading()
        # Bytes that are promised at most: what was counted last and all that was asked for since. Every part is looked
        # at only when that may be too much.
        self._promised_most: int | None = None
        self._lasting: set[Path] = set()  # folders in blobs/ whose own name would survive a power cut
        self._counting = threading.Lock()
        for each in (self._blobs, self._parts):
            each.mkdir(parents=True, exist_ok=True, mode=0o700)

    # ------------------------------------------------------------ whole files

    def path(self, digest: str) -> Path:
        """Where the file of this digest is, or would be.

        Raises:
            BadRequestError: it is no SHA-256 in small hex digits.
        """
        if _DIGEST.fullmatch(digest) is None:
            raise BadRequestError(f"{digest[:80]!r} is no SHA-256 in 64 small hex digits", code="bad_digest")
        return self._blobs / digest[:2] / digest

    def has(self, digest: str) -> bool:
        """Whether there is a file of this digest. Its bytes are not looked at."""
        return self.path(digest).is_file()

    def size(self, digest: str) -> int:
        """Bytes of the file of this digest.

        Raises:
            NotFoundError: there is none (`unknown_blob`).
        """
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            raise NotFoundError(f"there is no file {digest[:12]}… here", code="unknown_blob") from None

    def adopt(self, part: Path, digest: str, durable: bool, *, synced: bool = False) -> None:
        """Give a finished file the name of its bytes. The caller has checked that the digest is theirs.

        Args:
            part: the file, closed; gone afterwards.
            digest: SHA-256 of its bytes.
            durable: return only when it would survive a power cut. Otherwise it survives a killed process, and after a
                power cut may be gone, or there with too few bytes.
            synced: its bytes would survive one already; only its name is still to.
        """
        target = self.path(digest)
        target.parent.mkdir(exist_ok=True, mode=0o700)
        # A file that is there may be a durable one, of a model that no update changed: it must not become less safe.
        durable = durable or target.exists()
        if durable and not synced:
            sync(part)
        part.replace(target)
        if durable:
            sync(target.parent)
            if target.parent not in self._lasting:  # its own name may be new
                sync(self._blobs)
                self._lasting.add(target.parent)

    def put_bytes(self, data: bytes, durable: bool = True) -> str:
        """Keep bytes; returns their digest.

        Raises:
            DiskFullError: there is no room; nothing was written.
        """
        self.check_room(len(data))
        digest = hashlib.sha256(data).hexdigest()
        part = self.part(f"bytes.{digest}.{secrets.token_hex(4)}")
        try:
            part.write_bytes(data)
            self.adopt(part, digest, durable)
        finally:
            part.unlink(missing_ok=True)
        return digest

    def remove(self, digest: str) -> None:
        """Delete the file of this digest, if there is one. Whoever has it open reads on."""
        self.path(digest).unlink(missing_ok=True)

    def sweep(self, keep: Collection[str]) -> int:
        """Delete every file whose digest is not in `keep`. Returns the bytes that were freed."""
        freed = 0
        for path, about in _files(self._blobs, "[0-9a-f][0-9a-f]/*"):
            if path.name not in keep and _DIGEST.fullmatch(path.name):
                freed += about.st_size
                path.unlink(missing_ok=True)
        return freed

    # ------------------------------------------------------------ files on their way

    def part(self, name: str) -> Path:
        """Where to write a file before it has its digest's name.

        Raises:
            BadRequestError: the name is none of letters, digits, dots, dashes and underscores, or too long.
        """
        if _PART.fullmatch(name) is None:
            raise BadRequestError(f"{name[:80]!r} cannot be the name of a file", code="bad_name")
        return self._parts / f"{name}.part"

    def recorded(self) -> list[str]:
        """Names of the parts that have a record of what is in them, the one first that was written to longest ago."""
        found = sorted((about.st_mtime_ns, path.name) for path, about in _files(self._parts, f"*{RECORD}"))
        return [name.removesuffix(RECORD) for _, name in found]

    def clear_parts(self, keep: Collection[str] = ()) -> int:
        """Delete every part and record but those of these names. Returns the bytes that were freed."""
        freed = 0
        for path, about in [*_files(self._parts, "*.part"), *_files(self._parts, f"*{RECORD}")]:
            if path.stem not in keep:
                freed += about.st_blocks * BLOCK
                path.unlink(missing_ok=True)
        return freed

    def check_room(self, wanted: int) -> None:
        """Make sure that `wanted` more bytes fit, beside the reserve and what open uploads have still to bring.

        Raises:
            DiskFullError: they do not.
        """
        disk = os.statvfs(self._parts)
        free = disk.f_bavail * disk.f_frsize
        reserved = max(self._reserve_bytes - self._ballast_held(), 0)
        with self._counting:
            if self._promised_most is None or wanted > free - self._promised_most - reserved:
                self._promised_most = promised = self._promised()
                if wanted > free - promised - reserved:
                    raise DiskFullError(
                        f"{wanted} bytes do not fit: {free} are free in {self._parts.parent}, of which "
                        f"{promised} are promised to uploads under way and {reserved} reserved for the journal"
                    )
            self._promised_most += wanted

    def _ballast_held(self) -> int:
        """Bytes of the ballast, which may be given up at this very moment."""
        try:
            return self._ballast.stat().st_blocks * BLOCK if self._ballast is not None else 0
        except FileNotFoundError:
            return 0

    def _promised(self) -> int:
        """Bytes that open uploads have still to bring: a part has its full length at once, its blocks by and by."""
        return sum(max(about.st_size - about.st_blocks * BLOCK, 0) for _, about in _files(self._parts, "*.part"))


def parse_content_range(header: str | None, length: int | None) -> tuple[int, int, int]:
    """What bytes a PUT brings: (start, stop, total), stop excluded.

    Args:
        header: the value of Content-Range, `bytes FIRST-LAST/TOTAL`; None: the body is the whole.
        length: the value of Content-Length; None: not announced.

    Raises:
        BadRequestError: it is malformed, the total is left open, or the length is another than the range's.

    Source: RFC 9110, sections 14.4 and 14.5.
    """
    if header is None:
        if length is None or length < 0:
            raise BadRequestError("a PUT needs Content-Range or Content-Length: how long will it be?")
        return 0, length, length
    found = _CONTENT_RANGE.fullmatch(header.strip())
    if found is None:
        raise BadRequestError(f"Content-Range {header[:80]!r} is not of the form 'bytes FIRST-LAST/TOTAL'")
    first, last, total = (int(number) for number in found.groups())
    if not first <= last < total:
        raise BadRequestError(f"Content-Range {header[:80]!r} does not hold: FIRST <= LAST < TOTAL is needed")
    if length is not None and length != last + 1 - first:
        raise BadRequestError(
            f"Content-Range {header[:80]!r} has {last + 1 - first} bytes and Content-Length announces {length}"
        )
    return first, last + 1, total


def _files(folder: Path, pattern: str) -> Iterator[tuple[Path, os.stat_result]]:
    """Files and what is known of them; one that another thread took away meanwhile is none."""
    for path in folder.glob(pattern):
        try:
            yield path, path.stat()
        except FileNotFoundError:
            continue
