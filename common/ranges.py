"""Byte ranges: which pieces of an upload are held, which are missing, and how both are written in headers.

Pure. In memory a range is (start, stop), stop excluded; several are a tuple in ascending order that neither overlap nor
touch. On the wire they are inclusive at both ends, as in HTTP (RFC 9110, section 14): `0-4194303,8388608-12582911`.
"""

import re

from common.errors import BadRequestError

Ranges = tuple[tuple[int, int], ...]
"""(start, stop) pairs, ascending, with a gap between any two."""

_RANGE = re.compile(r"([0-9]{1,18})-([0-9]{1,18})")


def with_range(held: Ranges, start: int, stop: int) -> Ranges:
    """The ranges `held` and [start, stop) together. Looks from the end, where uploads grow."""
    if start >= stop:
        return held
    first = len(held)
    while first > 0 and held[first - 1][1] >= start:
        first -= 1
    last = first
    while last < len(held) and held[last][0] <= stop:
        last += 1
    joined = held[first:last]
    merged = (min([start, *(a for a, _ in joined)]), max([stop, *(b for _, b in joined)]))
    return (*held[:first], merged, *held[last:])


def gaps(held: Ranges, size: int) -> Ranges:
    """What of [0, size) is not in `held`."""
    starts = [0, *(stop for _, stop in held)]
    stops = [*(start for start, _ in held), size]
    return tuple((start, stop) for start, stop in zip(starts, stops, strict=True) if start < stop)


def format_ranges(held: Ranges) -> str:
    """`held` as a header says it; the empty text when nothing is held."""
    return ",".join(f"{start}-{stop - 1}" for start, stop in held)


def parse_ranges(text: str) -> Ranges:
    """The inverse of `format_ranges`.

    Raises:
        BadRequestError: the text is no list of ascending ranges with a gap between any two.
    """
    held: list[tuple[int, int]] = []
    for piece in text.split(",") if text else ():
        found = _RANGE.fullmatch(piece.strip())
        start, stop = (int(found[1]), int(found[2]) + 1) if found else (0, 0)
        if start >= stop or (held and start <= held[-1][1]):
            raise BadRequestError(
                f"{text[:80]!r} is no list of byte ranges like '0-99,200-299': it fails at {piece[:40]!r}"
            )
        held.append((start, stop))
    return tuple(held)


def content_range(start: int, stop: int, total: int) -> str:
    """The value of `Content-Range` for bytes [start, stop) of `total`; `server.blobs.parse_content_range` reads it."""
    return f"bytes {start}-{stop - 1}/{total}"
