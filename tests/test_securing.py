"""The machine of secure sums: in any order of messages, with any drop-out and any kill, the plain sum or a sentence."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import BadRequestError, ConflictError, LydianError, SupersededError
from common.messages import Reveal, SecureKeys, SecureShares
from common.secure import Secrets, add_masks, digest_of, masks_left
from server import securing
from server.securing import ENTRY, Decision, Entry, Seal
from tests.secure_kit import secrets_of

pytest.importorskip("cryptography")


class Play:
    """A sum on a stage: decisions are journalled as text, and the coordinator may be killed after any of them."""

    def __init__(self, shards: int, share: float | None = None) -> None:
        self.secrets: dict[int, Secrets] = {shard: secrets_of(shard) for shard in range(shards)}
        self.share = share
        self.gone: set[int] = set()
        self.seal = Seal("job-1", 1)
        self.journal: list[bytes] = []
        self.updates: dict[int, np.ndarray[Any, Any]] = {}

    def do(self, decision: Decision) -> Decision:
        for entry in decision.entries:
            self.journal.append(entry.model_dump_json().encode())
            self.seal = securing.evolve(self.seal, entry)
        return decision

    def killed(self) -> None:
        self.seal = Seal("job-1", 1)
        for line in self.journal:
            self.seal = securing.evolve(self.seal, ENTRY.validate_json(line))

    @property
    def there(self) -> dict[int, int]:
        return dict.fromkeys(sorted(self.secrets.keys() - self.gone), 1)

    # what members send ----------------------------------------------------------

    def keys(self, shard: int, **other: Any) -> Decision:
        sent = self.secrets[shard].keys(1).model_copy(update=other)
        return self.do(securing.take_keys(self.seal, shard, f"w{shard}", sent))

    def shares_of(self, shard: int) -> SecureShares:
        assert self.seal.roster is not None
        sealed = self.secrets[shard].shares(self.seal.roster, shard)
        return SecureShares(attempt=1, roster=digest_of(self.seal.roster), sealed=sealed)

    def shares(self, shard: int) -> Decision:
        return self.do(securing.take_shares(self.seal, shard, self.shares_of(shard)))

    def upload(self, shard: int) -> None:
        assert self.seal.roster is not None
        assert self.seal.group is not None
        update = np.full(3, shard + 1, np.uint64)
        add_masks(update, 0, self.secrets[shard].masks(self.seal.roster, shard, self.seal.group))
        self.updates[shard] = update

    def reveal_of(self, shard: int) -> Reveal:
        assert self.seal.roster is not None
        assert self.seal.group is not None
        assert self.seal.survivors is not None
        sealed = securing.sealed_for(self.seal, shard)
        return self.secrets[shard].reveal(1, self.seal.roster, shard, self.seal.group, self.seal.survivors, sealed)

    def reveal(self, shard: int) -> Decision:
        return self.do(securing.take_reveal(self.seal, shard, self.reveal_of(shard)))

    # what the coordinator does --------------------------------------------------

    def look(self) -> Decision:
        decision = self.do(securing.advance(self.seal, self.there, self.share))
        if self.seal.group is None or decision.anew:
            return decision
        decision = self.do(securing.settle_survivors(self.seal, self.updates, self.there))
        return decision if self.seal.survivors is None else securing.await_reveals(self.seal, self.there)

    def sum(self) -> list[int]:
        seal = self.seal
        assert seal.roster is not None
        assert seal.group is not None
        assert seal.survivors is not None
        total = np.zeros(3, np.uint64)
        for shard in seal.survivors:
            total += self.updates[shard]
        add_masks(total, 0, masks_left(seal.roster, seal.group, seal.survivors, seal.reveals))
        return [int(value) for value in total]

    def until_group(self) -> "Play":
        for send in (self.keys, self.shares):
            for shard in sorted(self.there):
                send(shard)
            self.look()
        return self

    def until_survivors(self) -> "Play":
        for shard in sorted(self.until_group().there):
            self.upload(shard)
        self.look()
        return self


@settings(max_examples=12)
@given(st.data())
def test_whatever_happens_in_whatever_order_the_sum_is_plain_or_begun_anew(data: st.DataObject) -> None:
    play = Play(data.draw(st.integers(3, 5), label="workers"))
    steps: list[Callable[[int], Any]] = [play.keys, play.shares, play.upload, play.reveal]
    done = dict.fromkeys(play.secrets, 0)
    for _ in range(60):
        decision = play.look()
        if decision.anew or play.seal.can_be_unmasked:
            break
        ready = [shard for shard in play.there if done[shard] == sum(map(bool, stage(play)))]
        shard = data.draw(st.sampled_from(ready), label="who")
        what = data.draw(st.sampled_from(["send", "send", "send", "send twice", "kill", "leave"]), label="what")
        if what == "leave":
            play.gone.add(shard)
        elif what == "kill":
            play.killed()
        else:
            for _ in range(1 + (what == "send twice")):
                steps[done[shard]](shard)
            done[shard] += 1
    if play.seal.can_be_unmasked:
        assert play.seal.survivors is not None
        assert play.sum() == [sum(shard + 1 for shard in play.seal.survivors)] * 3
    else:
        assert play.look().anew
        assert "are needed" in play.look().reason or "a secure sum of 3" in play.look().reason


def stage(play: Play) -> tuple[bool, bool, bool]:
    """Which of its decisions a sum has behind it: a member sends one thing between each two."""
    return play.seal.roster is not None, play.seal.group is not None, play.seal.survivors is not None


def test_a_worker_that_leaves_before_its_update_is_left_out_and_its_masks_too() -> None:
    play = Play(4).until_group()
    for shard in (0, 1, 3):
        play.upload(shard)
    assert play.look().reason == "round 1: 3 of 4 masked updates are in; awaiting shard 2"
    play.gone.add(2)
    assert play.look().reason == "round 1: 0 of 3 workers have opened their shares; awaiting shard 0, 1, 3"
    for shard in (0, 1, 3):
        play.reveal(shard)
    assert play.sum() == [1 + 2 + 4] * 3
    assert play.look().reason == "round 1: the sum of 3 updates is unmasked"


def test_what_is_awaited_is_said() -> None:
    play = Play(4)
    play.keys(1)
    assert play.look().reason == "round 1: 1 keys are in; awaiting shard 0, 2, 3"
    for shard in (0, 2, 3):
        play.keys(shard)
    assert play.look().reason == "round 1: 4 workers sum together, 3 of them can unmask the sum"
    play.shares(0)
    assert play.look().reason == "round 1: 1 have cut shares; awaiting shard 1, 2, 3"


def test_two_workers_make_no_secure_sum() -> None:
    play = Play(3)
    play.keys(0)
    play.keys(1)
    play.gone.add(2)
    decision = play.look()
    assert decision.anew
    assert decision.reason == "round 1: 2 workers are there for a secure sum of 3 to 50"


def test_one_that_sent_keys_and_left_is_not_in_the_roster() -> None:
    play = Play(4)
    for shard in range(4):
        play.keys(shard)
    play.gone.add(1)
    play.look()
    assert play.seal.roster is not None
    assert [member.shard for member in play.seal.roster.members] == [0, 2, 3]
    assert play.seal.members == {0, 2, 3}


def test_too_few_shares_begin_the_round_anew() -> None:
    play = Play(4)
    for shard in range(4):
        play.keys(shard)
    play.look()
    play.shares(0)
    play.shares(1)
    play.gone |= {2, 3}
    decision = play.look()
    assert decision.anew
    assert decision.reason == "round 1 is begun anew: 2 of 4 workers cut their shares, and 3 are needed"


def test_too_few_updates_begin_the_round_anew() -> None:
    play = Play(4).until_group()
    play.upload(0)
    play.gone |= {1, 2, 3}
    decision = play.look()
    assert decision.anew
    assert decision.reason == "round 1 is begun anew: 1 of 4 workers handed in, and 3 are needed"


def test_survivors_that_cannot_open_their_shares_any_more_begin_the_round_anew() -> None:
    play = Play(4).until_survivors()
    play.reveal(0)
    play.gone |= {0, 1}  # the first has opened its own before it left
    assert not play.look().anew
    play.gone.add(2)
    decision = play.look()
    assert decision.anew
    assert "2 of 4 workers opened their shares or still can, and 3 are needed" in decision.reason


# ---------------------------------------------------------------- messages that must not count


def test_one_worker_cannot_be_two_members() -> None:
    play = Play(3)
    play.keys(0)
    with pytest.raises(ConflictError, match="w0 is in round 1 with another shard"):
        securing.take_keys(play.seal, 1, "w0", play.secrets[1].keys(1))


def test_a_newer_attempt_takes_the_place_of_an_older_one_and_never_the_other_way() -> None:
    play = Play(3)
    play.keys(0)
    play.do(securing.take_keys(play.seal, 0, "w9", play.secrets[1].keys(2)))
    assert play.seal.keys[0].worker == "w9"
    with pytest.raises(ConflictError, match="has other keys, of attempt 2"):
        play.keys(0)


def test_keys_of_an_attempt_that_is_gone_are_not_waited_with() -> None:
    play = Play(3)
    for shard in range(3):
        play.keys(shard)
    assert securing.advance(play.seal, {0: 1, 1: 1, 2: 2}, None).reason.endswith("awaiting shard 2")
    assert securing.advance(play.seal, {0: 1, 1: 1, 2: 0}, None).reason.endswith("awaiting shard 2")
    assert securing.advance(play.seal, {0: 1, 1: 1}, None).anew


def test_nobody_joins_after_the_roster_is_fixed() -> None:
    play = Play(4)
    play.gone.add(3)
    for shard in range(3):
        play.keys(shard)
    play.look()
    with pytest.raises(SupersededError, match="summed by 3 others, and closed to new ones"):
        play.keys(3)
    assert play.keys(0).reason == "shard 0 is in already"


def test_other_shares_than_before_are_refused() -> None:
    play = Play(3)
    for shard in range(3):
        play.keys(shard)
    play.look()
    play.shares(0)
    assert play.shares(0).entries == ()
    other = play.shares_of(0).model_copy(update={"sealed": {1: "0" * 296, 2: "0" * 296}})
    with pytest.raises(ConflictError, match="sent other shares before"):
        securing.take_shares(play.seal, 0, other)


def test_shares_must_be_one_for_each_peer() -> None:
    play = Play(3)
    for shard in range(3):
        play.keys(shard)
    play.look()
    with pytest.raises(BadRequestError, match=r"sent shares for \[\], and its peers are \[1, 2\]"):
        securing.take_shares(play.seal, 0, play.shares_of(0).model_copy(update={"sealed": {}}))


def test_shares_that_come_after_the_group_was_fixed_do_not_join_it() -> None:
    play = Play(4)
    for shard in range(4):
        play.keys(shard)
    play.look()
    play.gone.add(3)
    for shard in range(3):
        play.shares(shard)
    play.look()
    with pytest.raises(SupersededError, match="goes on without shard 3"):
        play.shares(3)


@pytest.mark.parametrize("wrong", [{"attempt": 2}, {"roster": "0" * 64}])
def test_messages_of_another_sum_or_attempt_are_superseded(wrong: dict[str, Any]) -> None:
    play = Play(3)
    for shard in range(3):
        play.keys(shard)
    play.look()
    with pytest.raises(SupersededError, match="is not in the sum"):
        securing.take_shares(play.seal, 0, play.shares_of(0).model_copy(update=wrong))


def test_shares_before_the_roster_are_superseded() -> None:
    early = SecureShares(attempt=1, roster="0" * 64, sealed={})
    with pytest.raises(SupersededError):
        securing.take_shares(Seal("job-1", 1), 0, early)


def test_the_coordinator_takes_both_shares_of_nobody() -> None:
    play = Play(3).until_survivors()
    reveal = play.reveal_of(0)
    both = reveal.model_copy(update={"keys": {1: "0" * 132}})
    with pytest.raises(BadRequestError, match=r"mask keys of \[1\]"):
        securing.take_reveal(play.seal, 0, both)


def test_shares_opened_before_they_were_asked_for_are_not_taken() -> None:
    play = Play(3).until_group()
    assert play.seal.roster is not None
    early = Reveal(attempt=1, roster=digest_of(play.seal.roster), seeds={}, keys={})
    with pytest.raises(SupersededError, match="is not asked to open anything"):
        securing.take_reveal(play.seal, 0, early)


def test_what_was_opened_once_is_not_opened_otherwise() -> None:
    play = Play(3).until_survivors()
    reveal = play.reveal_of(0)
    play.reveal(0)
    assert play.reveal(0).entries == ()
    with pytest.raises(ConflictError, match="has opened other shares before"):
        securing.take_reveal(play.seal, 0, reveal.model_copy(update={"seeds": dict.fromkeys(reveal.seeds, "0" * 132)}))


def test_more_opened_shares_than_needed_are_not_kept() -> None:
    play = Play(4).until_survivors()
    for shard in range(4):
        play.reveal(shard)
    assert sorted(play.seal.reveals) == [0, 1, 2]


@pytest.mark.parametrize(
    ("share", "members", "threshold"),
    [(None, 3, 3), (None, 4, 3), (None, 5, 4), (None, 6, 5), (None, 50, 34), (0.51, 5, 3), (0.6, 5, 3), (1.0, 7, 7),
     (0.51, 3, 3), (0.51, 4, 3), (0.8, 10, 8)],
)  # fmt: skip
def test_the_threshold_is_more_than_half_and_never_two(share: float | None, members: int, threshold: int) -> None:
    assert securing.threshold_of(share, members) == threshold


def test_a_sum_that_is_not_so_far_says_so() -> None:
    seal = Seal("job-1", 1)
    assert securing.settle_survivors(seal, [], []).reason == "round 1: who sums together is not decided yet"
    assert securing.await_reveals(seal, []).reason == "round 1: whose updates are summed is not decided yet"
    assert securing.group_of(seal) is None
    play = Play(3).until_survivors()
    assert securing.settle_survivors(play.seal, [], []).reason == "round 1: 3 updates are summed"
    group = securing.group_of(play.seal)
    assert group is not None
    assert group.shards == (0, 1, 2)


def test_many_shards_are_not_all_named() -> None:
    assert securing.advance(Seal("job-1", 1), dict.fromkeys(range(9), 0), None).reason.endswith(
        "awaiting shard 0, 1, 2, 3, 4, 5, 6, 7 …"
    )


def test_a_refusal_changes_nothing() -> None:
    play = Play(3)
    before = play.seal
    with pytest.raises(LydianError):
        securing.take_reveal(play.seal, 0, Reveal(attempt=1, roster="0" * 64, seeds={}, keys={}))
    assert play.seal == before


def test_keys_are_three_numbers_of_their_length() -> None:
    with pytest.raises(ValueError, match="cipher_key"):
        SecureKeys(attempt=1, cipher_key="00", mask_key="0" * 64, seed_check="0" * 64)


def test_an_entry_reads_back_as_itself() -> None:
    play = Play(3).until_survivors()
    play.reveal(0)
    before = play.seal
    play.killed()
    assert play.seal == before
    entries: list[Entry] = [ENTRY.validate_json(line) for line in play.journal]
    assert {entry.type for entry in entries} == {"keys", "roster", "shares", "group", "survivors", "reveal"}
