"""What a worker writes for people. Much of it was said by another machine, so nothing of it may play tricks.

An escape code could clear a terminal or paint over a line, and a line break could make one line look like two: the
first is shown as a question mark, the second indents what follows.
"""

import logging
import re
import sys

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""C0 and C1 controls but tab and line feed, and the marks that change the direction of text."""


def plain(text: str) -> str:
    """The text without what a terminal would obey."""
    return _CONTROL.sub("?", text)


class PlainFormatter(logging.Formatter):
    """One record, one paragraph."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The record's line, those that it has besides indented."""
        return super().formatMessage(record).replace("\n", "\n    ")

    def format(self, record: logging.LogRecord) -> str:
        """The line, and a traceback where there is one."""
        return plain(super().format(record))


def to_stderr(level: int) -> None:
    """Have everything logged to stderr from now on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainFormatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler])
