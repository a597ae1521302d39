"""A transfer that goes on where the line broke, for as long as each try brings something."""

import sys
from collections.abc import Callable

from client import shown
from common.errors import UnavailableError
from common.transfers import OnBytes


def until_whole(transfer: Callable[[OnBytes], object], kept: str) -> None:
    """Transfer until all is there.

    Args:
        transfer: one try; it tells the bytes that are there by now, those of earlier tries with them.
        kept: what is said where a try brings nothing after earlier ones have; may name `{there}`, what there is.

    Raises:
        UnavailableError: a try has brought nothing.
    """
    there = 0

    def seen(count: int) -> None:
        nonlocal there
        there = count

    while True:
        before = there
        try:
            transfer(seen)
        except UnavailableError as error:
            if there <= before:
                if there:
                    error.advice = f"{kept.format(there=shown.size(there))} {error.advice}"
                raise
            sys.stderr.write(f"{error}; going on after {shown.size(there)}\n")
        else:
            return
