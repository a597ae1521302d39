"""Things that may happen as often as a stranger likes, such as refused calls: the first is told, then they are counted.

    first of its kind ──▶ told at once          the window ends ──▶ "… and N more", once a kind

Pure. Memory and rows are bounded whatever comes: in a window at most MOST kinds are told apart, all others are one, and
each has at most two rows.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

MOST = 32  # kinds in one window
WINDOW_S = 600.0

T = TypeVar("T")


@dataclass
class _Kind(Generic[T]):
    told: T
    more: int = 0


@dataclass
class Tally(Generic[T]):
    """Counts within one window after the other. `T` is what is told of a kind."""

    window_s: float = WINDOW_S
    most: int = MOST
    _kinds: dict[Hashable, _Kind[T]] = field(default_factory=dict)
    _others: _Kind[T] | None = None
    _since: float = 0.0  # monotonic seconds at which the window began

    def add(self, kind: Hashable, what: T, now: float) -> bool:
        """Something happened. Whether it is to be told; else it is counted.

        Args:
            kind: what makes two of them alike.
            what: to tell of it.
            now: monotonic seconds.
        """
        if not self._kinds:
            self._since = now
        if (known := self._kinds.get(kind)) is not None:
            known.more += 1
            return False
        if len(self._kinds) < self.most:
            self._kinds[kind] = _Kind(what)
            return True
        if self._others is not None:
            self._others.more += 1
            return False
        self._others = _Kind(what)
        return True

    def due(self, now: float) -> bool:
        """Whether the window is over."""
        return bool(self._kinds) and now - self._since >= self.window_s

    def end(self) -> list[tuple[T, int, bool]]:
        """End the window: (what was told, how many more came, whether they are of kinds that were not told apart)."""
        found = [(kind.told, kind.more, False) for kind in self._kinds.values() if kind.more]
        if self._others is not None and self._others.more:
            found.append((self._others.told, self._others.more, True))
        self._kinds, self._others = {}, None
        return found
