"""The machine of secure sums: whose keys, shares and opened shares are in, who sums together, and what is awaited.

Pure: no clock, network or disk, and no key is computed with here. A decision looks at a Seal and answers with a
Decision: the entries to journal, and why, in words. `evolve` applies one entry; nothing else changes a Seal, so that
replaying the journal gives it back, wherever its coordinator was killed.

    keys come ──none awaited──▶ Roster ──shares come, none awaited──▶ Group ──updates come, none awaited──▶ Survivors
        ──as many as the threshold have opened their shares──▶ the sum can be unmasked
    fewer than the threshold left, at any of these: the round is begun anew, as a new Seal with new keys

Whom a shard is awaited from is the caller's to say: who is gone, or has given its work back, is awaited no more.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, assert_never

from pydantic import Field, TypeAdapter

from common.errors import BadRequestError, ConflictError, SupersededError
from common.messages import (
    MEMBERS,
    Count,
    Group,
    Message,
    Reveal,
    Roster,
    SealedShares,
    SecureKeys,
    SecureMember,
    SecureShares,
)
from common.secure import LEAST_MEMBERS, digest_of

# ---------------------------------------------------------------- what is journalled


class KeysIn(Message):
    """A member announced itself."""

    type: Literal["keys"] = "keys"
    member: SecureMember


class RosterFixed(Message):
    """Who sums together is decided: nobody joins any more."""

    type: Literal["roster"] = "roster"
    roster: Roster


class SharesIn(Message):
    """A member's secrets are with its peers, in shares that only they can open."""

    type: Literal["shares"] = "shares"
    shard: Count
    sealed: dict[Count, SealedShares]


class GroupFixed(Message):
    """Whose masks go into the updates is decided."""

    type: Literal["group"] = "group"
    shards: tuple[Count, ...]


class SurvivorsFixed(Message):
    """Whose updates are summed is decided: of them the seeds are asked for, of the others the mask keys."""

    type: Literal["survivors"] = "survivors"
    shards: tuple[Count, ...]


class RevealIn(Message):
    """A survivor opened its shares."""

    type: Literal["reveal"] = "reveal"
    shard: Count
    reveal: Reveal


Entry = Annotated[KeysIn | RosterFixed | SharesIn | GroupFixed | SurvivorsFixed | RevealIn, Field(discriminator="type")]
ENTRY: TypeAdapter[Entry] = TypeAdapter(Entry)


# ---------------------------------------------------------------- what there is


@dataclass(frozen=True)
class Seal:
    """All that is known of one sum. `number` counts how often the round was begun anew."""

    job: str
    round: int
    number: int = 0
    keys: Mapping[int, SecureMember] = field(default_factory=dict)  # by shard; the roster's, once that is fixed
    roster: Roster | None = None
    sealed: Mapping[int, Mapping[int, str]] = field(default_factory=dict)  # sender -> receiver -> shares
    group: tuple[int, ...] | None = None
    survivors: tuple[int, ...] | None = None
    reveals: Mapping[int, Reveal] = field(default_factory=dict)

    @property
    def members(self) -> frozenset[int]:
        """The shards that may still be in the sum; all that have announced themselves, before the roster is fixed."""
        if self.group is not None:
            return frozenset(self.group)
        return frozenset(self.keys)

    @property
    def can_be_unmasked(self) -> bool:
        """Whether enough shares are open."""
        return self.roster is not None and self.survivors is not None and len(self.reveals) >= self.roster.threshold


@dataclass(frozen=True)
class Decision:
    """What follows: entries to journal, and why, in words."""

    entries: tuple[Entry, ...] = ()
    reason: str = ""
    anew: bool = False  # the sum cannot come about: the round is to be begun anew, with fresh keys


def threshold_of(share: float | None, members: int) -> int:
    """How many members it takes to unmask a sum.

    Args:
        share: of the members, as the job has it; None: more than two thirds, so that a coordinator that tells members
            different things gains nothing while fewer than a third of them help it.
        members: of the roster.

    Returns:
        more than half of the members, and at least LEAST_MEMBERS: a sum of two tells each of them the other's.
    """
    wanted = 2 * members // 3 + 1 if share is None else math.ceil(share * members)
    return min(max(wanted, members // 2 + 1, LEAST_MEMBERS), members)


# ---------------------------------------------------------------- what members send


def take_keys(seal: Seal, shard: int, worker: str, keys: SecureKeys) -> Decision:
    """A worker announces itself for its attempt at a shard. The same again changes nothing.

    Raises:
        SupersededError: the roster was fixed without it.
        ConflictError: it is in already with another shard, or with other keys for this attempt; or a newer attempt is.
    """
    member = SecureMember(shard=shard, worker=worker, **keys.model_dump())
    known = seal.keys.get(shard)
    if known == member:
        return Decision(reason=f"shard {shard} is in already")
    if seal.roster is not None:
        raise SupersededError(
            f"round {seal.round} is summed by {len(seal.roster.members)} others, and closed to new ones"
        )
    if known is not None and known.attempt >= keys.attempt:
        raise ConflictError(f"shard {shard} of round {seal.round} has other keys, of attempt {known.attempt}")
    if any(other.worker == worker for other in seal.keys.values() if other.shard != shard):
        raise ConflictError(f"{worker} is in round {seal.round} with another shard: it would hold two shares of each")
    return Decision((KeysIn(member=member),), f"round {seal.round}: keys of shard {shard} are in")


def take_shares(seal: Seal, shard: int, shares: SecureShares) -> Decision:
    """A member has cut its secrets into shares for its peers. The same again changes nothing.

    Raises:
        SupersededError: the roster is another one, or this attempt is not in it, or the group was fixed without it.
        ConflictError: other shares of it are in.
        BadRequestError: not exactly one for each peer.
    """
    roster = _member_of(seal, shard, shares.attempt, shares.roster)
    known = seal.sealed.get(shard)
    if known is not None:
        if dict(known) != shares.sealed:
            raise ConflictError(f"shard {shard} of round {seal.round} has sent other shares before")
        return Decision(reason=f"the shares of shard {shard} are in already")
    if seal.group is not None:
        raise SupersededError(f"round {seal.round} goes on without shard {shard}: its shares came too late")
    peers = {member.shard for member in roster.members} - {shard}
    if shares.sealed.keys() != peers:
        raise BadRequestError(
            f"shard {shard} sent shares for {sorted(shares.sealed)}, and its peers are {sorted(peers)}"
        )
    return Decision(
        (SharesIn(shard=shard, sealed=shares.sealed),), f"round {seal.round}: shares of shard {shard} are in"
    )


def take_reveal(seal: Seal, shard: int, reveal: Reveal) -> Decision:
    """A survivor has opened one share of each member. The same again changes nothing, and so does one more than needed.

    Raises:
        SupersededError: the roster is another one, or this member is not asked.
        ConflictError: it has opened others before.
        BadRequestError: not exactly what was asked for. Both shares of one member are never taken.
    """
    _member_of(seal, shard, reveal.attempt, reveal.roster)
    if seal.survivors is None or seal.group is None or shard not in seal.survivors:
        raise SupersededError(f"shard {shard} of round {seal.round} is not asked to open anything")
    wanted = set(seal.survivors), set(seal.group) - set(seal.survivors)
    if (set(reveal.seeds), set(reveal.keys)) != wanted:
        sent = f"seeds of {sorted(reveal.seeds)} and mask keys of {sorted(reveal.keys)}"
        raise BadRequestError(
            f"shard {shard} opened {sent}, where {sorted(wanted[0])} and {sorted(wanted[1])} were asked"
        )
    known = seal.reveals.get(shard)
    if known is not None and known != reveal:
        raise ConflictError(f"shard {shard} of round {seal.round} has opened other shares before")
    if known is not None or seal.can_be_unmasked:
        return Decision(reason=f"the shares that shard {shard} opens are not needed any more")
    return Decision((RevealIn(shard=shard, reveal=reveal),), f"round {seal.round}: shard {shard} opened its shares")


def _member_of(seal: Seal, shard: int, attempt: int, roster: str) -> Roster:
    """The roster, if this attempt is in it and means it."""
    known = seal.keys.get(shard)
    if seal.roster is None or digest_of(seal.roster) != roster or known is None or known.attempt != attempt:
        raise SupersededError(
            f"attempt {attempt} at shard {shard} is not in the sum of round {seal.round} that is made now"
        )
    return seal.roster


# ---------------------------------------------------------------- what follows


def advance(seal: Seal, awaited: Mapping[int, int], share: float | None) -> Decision:
    """Fix the roster, then the group, as soon as nobody is awaited for it.

    Args:
        seal: the sum.
        awaited: shard -> the attempt whose worker may still answer; 0: one that is still to be handed out.
        share: [secure] threshold of the job.
    """
    if seal.roster is None:
        return _fix_roster(seal, awaited, share)
    if seal.group is None:
        return _fix_group(seal, seal.roster, present(seal, awaited))
    return Decision(reason=f"round {seal.round}: {len(seal.group)} workers send masked updates")


def present(seal: Seal, awaited: Mapping[int, int]) -> frozenset[int]:
    """The members whose worker may still answer: those whose very attempt is awaited."""
    return frozenset(shard for shard, member in seal.keys.items() if awaited.get(shard) == member.attempt)


def _fix_roster(seal: Seal, awaited: Mapping[int, int], share: float | None) -> Decision:
    missing = sorted(awaited.keys() - present(seal, awaited))
    if missing:
        return Decision(reason=f"round {seal.round}: {len(seal.keys)} keys are in; awaiting {_shards(missing)}")
    there = [seal.keys[shard] for shard in sorted(present(seal, awaited))]
    if not LEAST_MEMBERS <= len(there) <= MEMBERS:
        reason = f"round {seal.round}: {len(there)} workers are there for a secure sum of {LEAST_MEMBERS} to {MEMBERS}"
        return Decision(reason=reason, anew=True)
    threshold = threshold_of(share, len(there))
    roster = Roster(job=seal.job, round=seal.round, seal=seal.number, threshold=threshold, members=tuple(there))
    reason = f"round {seal.round}: {len(there)} workers sum together, {threshold} of them can unmask the sum"
    return Decision((RosterFixed(roster=roster),), reason)


def _fix_group(seal: Seal, roster: Roster, awaited: Collection[int]) -> Decision:
    members = {member.shard for member in roster.members}
    missing = sorted(members & set(awaited) - seal.sealed.keys())
    if missing:
        return Decision(reason=f"round {seal.round}: {len(seal.sealed)} have cut shares; awaiting {_shards(missing)}")
    if len(seal.sealed) < roster.threshold:
        return _anew(seal, roster, "cut their shares", len(seal.sealed))
    group = tuple(sorted(seal.sealed))
    return Decision((GroupFixed(shards=group),), f"round {seal.round}: {len(group)} workers send masked updates")


def settle_survivors(seal: Seal, accepted: Collection[int], awaited: Collection[int]) -> Decision:
    """Decide whose updates are summed, once none of the group's is awaited any more.

    Args:
        seal: the sum.
        accepted: shards whose update is in.
        awaited: shards whose worker may still hand in.
    """
    if seal.roster is None or seal.group is None:
        return Decision(reason=f"round {seal.round}: who sums together is not decided yet")
    if seal.survivors is not None:
        return Decision(reason=f"round {seal.round}: {len(seal.survivors)} updates are summed")
    survivors = tuple(shard for shard in seal.group if shard in accepted)
    missing = [shard for shard in seal.group if shard in awaited and shard not in accepted]
    tally = f"{len(survivors)} of {len(seal.group)} masked updates"
    if missing:
        return Decision(reason=f"round {seal.round}: {tally} are in; awaiting {_shards(missing)}")
    if len(survivors) < seal.roster.threshold:
        return _anew(seal, seal.roster, "handed in", len(survivors))
    return Decision((SurvivorsFixed(shards=survivors),), f"round {seal.round}: {tally} are summed")


def await_reveals(seal: Seal, able: Collection[int]) -> Decision:
    """What is awaited before the sum can be unmasked.

    Args:
        seal: the sum, its survivors decided.
        able: survivors that can still open their shares: they live, and have what they need.
    """
    if seal.roster is None or seal.survivors is None:
        return Decision(reason=f"round {seal.round}: whose updates are summed is not decided yet")
    if seal.can_be_unmasked:
        return Decision(reason=f"round {seal.round}: the sum of {len(seal.survivors)} updates is unmasked")
    possible = seal.reveals.keys() | (set(able) & set(seal.survivors))
    if len(possible) < seal.roster.threshold:
        return _anew(seal, seal.roster, "opened their shares or still can", len(possible))
    missing = sorted(possible - seal.reveals.keys())
    tally = f"{len(seal.reveals)} of {seal.roster.threshold} workers have opened their shares"
    return Decision(reason=f"round {seal.round}: {tally}; awaiting {_shards(missing)}")


def _anew(seal: Seal, roster: Roster, what: str, count: int) -> Decision:
    workers = f"{count} of {len(roster.members)} workers {what}"
    return Decision(reason=f"round {seal.round} is begun anew: {workers}, and {roster.threshold} are needed", anew=True)


def _shards(numbers: Collection[int]) -> str:
    shown = ", ".join(str(number) for number in list(numbers)[:8])
    return f"shard {shown}{' …' if len(numbers) > 8 else ''}"


def group_of(seal: Seal) -> Group | None:
    """What members are told of the group; None: it is not fixed yet."""
    if seal.roster is None or seal.group is None:
        return None
    return Group(roster=digest_of(seal.roster), shards=seal.group)


def sealed_for(seal: Seal, shard: int) -> dict[int, str]:
    """What the members of the group have sealed for one of them, by sender."""
    return {by: shares[shard] for by, shares in seal.sealed.items() if by != shard and by in seal.members}


# ---------------------------------------------------------------- entries into state


def evolve(seal: Seal, entry: Entry) -> Seal:
    """The sum after one more entry. Knows no rule about what should happen: the entry has been decided."""
    match entry:
        case KeysIn(member=member):
            return replace(seal, keys={**seal.keys, member.shard: member})
        case RosterFixed(roster=roster):
            return replace(seal, roster=roster, keys={member.shard: member for member in roster.members})
        case SharesIn(shard=shard, sealed=sealed):
            return replace(seal, sealed={**seal.sealed, shard: sealed})
        case GroupFixed(shards=shards):
            return replace(seal, group=shards)
        case SurvivorsFixed(shards=shards):
            return replace(seal, survivors=shards)
        case RevealIn(shard=shard, reveal=reveal):
            return replace(seal, reveals={**seal.reveals, shard: reveal})
        case _:
            assert_never(entry)
