"""Reading an answer whole without believing that it ends, and that where it points to is meant well.

A coordinator that was taken over must not be able to fill a worker's memory, by its length or by unpacking, or to send
its token elsewhere: no redirect is followed, nothing is unpacked, and there is a most that an answer may have.
"""

import httpx2

from common.errors import UnavailableError

LONGEST = 64 << 20  # bytes; the longest that a coordinator has reason to send is a list of thousands of jobs
SHOWN = 200  # characters of what another machine says


def whole(answer: httpx2.Response, most: int = LONGEST) -> httpx2.Response:
    """An answer with its body, read as it is.

    Args:
        answer: of a stream, its body not read yet; one that has been read is given back.
        most: bytes that it may have.

    Raises:
        UnavailableError: it is longer (code too_long), or packed (unreadable), neither of which was asked for.
    """
    if answer.is_stream_consumed:
        return answer
    packed = answer.headers.get("Content-Encoding", "identity")
    if packed != "identity":
        raise _doubtful(answer, f"packed as {packed[:SHOWN]!r}, which was not asked for", "unreadable")
    parts, length = [], 0
    for part in answer.iter_raw():
        length += len(part)
        if length > most:
            raise _doubtful(answer, f"more than {most} bytes, and was not read to its end", "too_long")
        parts.append(part)
    headers = [(name, value) for name, value in answer.headers.multi_items() if name != "transfer-encoding"]
    return httpx2.Response(answer.status_code, headers=headers, content=b"".join(parts), request=answer.request)


def check_not_elsewhere(answer: httpx2.Response) -> None:
    """Make sure that an answer is none that sends the caller to another address.

    Raises:
        UnavailableError: it is (code redirected).
    """
    if 300 <= answer.status_code < 400 and answer.status_code != 304:
        where = answer.headers.get("Location", "")[:SHOWN]
        raise _doubtful(
            answer, f"HTTP {answer.status_code}, which points to {where!r} and is not followed", "redirected"
        )


def _doubtful(answer: httpx2.Response, what: str, code: str) -> UnavailableError:
    return UnavailableError(
        f"{answer.request.url} answered {what}",
        code=code,
        advice="Is this the address of a coordinator itself, and of no proxy or page before it?",
    )
