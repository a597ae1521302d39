"""The dues of a round's shards, worked out one by one as somebody asks for them.

Pure. A round is looked at with each of its updates, and few of its dues are ever said: of a thousand shards, those that
are awaited first, by name; all of them only where a round closes without them.
"""

from collections.abc import Callable, Iterator, Mapping

from server.deadlines import Due
from server.rounds import Task


class Dues(Mapping[int, Due]):
    """Shard -> who has it, and when its update is expected, as far as it is out now."""

    def __init__(self, round_index: int, holders: Mapping[Task, str], due_of: Callable[[str], Due]) -> None:
        """Of the shards of one round.

        Args:
            round_index: its number.
            holders: the job's tasks that are out -> the worker that holds each; looked at whenever something is asked.
            due_of: when the update of a worker's task is expected.
        """
        self._round, self._holders, self._due_of = round_index, holders, due_of

    def __getitem__(self, shard: int) -> Due:
        """When this shard is due; KeyError: nobody has it."""
        return self._due_of(self._holders[Task("train", self._round, shard)])

    def __iter__(self) -> Iterator[int]:
        return (task.shard for task in self._holders if (task.kind, task.round) == ("train", self._round))

    def __len__(self) -> int:
        return sum(1 for _ in self)
