"""In which order tests run beside each other.

    modules in the order of their names ──▶ spread ──▶ n parts, slow modules first in each

xdist hands each of its processes one contiguous part, all of one size, and lets who is done take from the end of
another's. By name all slow tests would be in the first part, and one process would still be at them when the others
have nothing left.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, groupby
from typing import TypeVar

Item = TypeVar("Item")


def spread(
    items: Sequence[Item], parts: int, module: Callable[[Item], str], is_slow: Callable[[Item], bool]
) -> list[Item]:
    """The same items in another order: the slow modules dealt out over the parts, the others after them to fill up.

    Tests of a module stay together, but where a part ends; parts differ by at most one item as long as none has more
    slow ones than its share.
    """
    modules = [list(group) for _, group in groupby(items, module)]
    slow = [one for one in modules if is_slow(one[0])]
    dealt = [list(chain.from_iterable(slow[at::parts])) for at in range(parts)]
    quick = chain.from_iterable(one for one in modules if not is_slow(one[0]))
    share, more = divmod(len(items), parts)
    for at, part in enumerate(dealt):
        part.extend(_first(quick, share + (at < more) - len(part)))
    return [*chain.from_iterable(dealt), *quick]


def _first(items: Iterable[Item], count: int) -> Iterable[Item]:
    return (item for _, item in zip(range(count), items, strict=False))
