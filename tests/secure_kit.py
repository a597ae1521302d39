"""Members of a secure sum, without a coordinator: what each would send, and what is made of it."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.messages import Reveal, Roster, SecureMember
from common.secure import Secrets, add_masks, masks_left


def secrets_of(shard: int, salt: str = "") -> Secrets:
    return Secrets(hashlib.sha256(f"{shard} {salt}".encode()).digest())


def member(shard: int, secrets: Secrets, attempt: int = 1) -> SecureMember:
    return SecureMember(shard=shard, worker=f"w{shard}", **secrets.keys(attempt).model_dump())


@dataclass
class Sum:
    """One sum, played by all its members."""

    secrets: dict[int, Secrets]
    roster: Roster

    @classmethod
    def of(cls, shards: Sequence[int], threshold: int, *, seal: int = 0) -> "Sum":
        secrets = {shard: secrets_of(shard, str(seal)) for shard in shards}
        members = tuple(member(shard, secrets[shard]) for shard in sorted(shards))
        return cls(secrets, Roster(job="job-1", round=1, seal=seal, threshold=threshold, members=members))

    def sealed(self, senders: Collection[int]) -> dict[int, dict[int, str]]:
        """Receiver -> sender -> sealed shares."""
        sent = {shard: self.secrets[shard].shares(self.roster, shard) for shard in senders}
        return {to: {by: sent[by][to] for by in senders if by != to} for to in self.secrets}

    def masked(self, shard: int, group: Collection[int], numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        update = numbers.astype(np.int64).view(np.uint64).copy()
        add_masks(update, 0, self.secrets[shard].masks(self.roster, shard, group))
        return update

    def reveals(self, group: Collection[int], survivors: Collection[int], who: Collection[int]) -> dict[int, Reveal]:
        sealed = self.sealed(group)
        return {
            shard: self.secrets[shard].reveal(1, self.roster, shard, group, survivors, sealed[shard]) for shard in who
        }

    def unmasked(
        self,
        updates: Mapping[int, npt.NDArray[np.uint64]],
        group: Sequence[int],
        reveals: Mapping[int, Reveal],
    ) -> npt.NDArray[np.int64]:
        total = np.zeros(len(next(iter(updates.values()))), np.uint64)
        for update in updates.values():
            total += update
        add_masks(total, 0, masks_left(self.roster, group, sorted(updates), reveals))
        return total.view(np.int64)
