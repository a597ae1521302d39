"""Masks and shares: every sum comes out as if there were none, and nothing but the sum does."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import secure
from common.errors import BadUpdateError, RefusedError
from common.messages import Group, Reveal, SecureShares, Unmask
from common.secure import Mask, Secrets, add_masks, check_roster, check_survivors, digest_of, masks_left, stream
from tests.secure_kit import Sum, member, secrets_of

pytest.importorskip("cryptography")


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_whoever_drops_out_the_unmasked_sum_is_the_plain_one(data: st.DataObject) -> None:
    count = data.draw(st.integers(3, 5), label="members")
    shards = sorted(data.draw(st.permutations(range(10)))[:count])
    threshold = data.draw(st.integers(count // 2 + 1, count), label="threshold")
    together = Sum.of(shards, threshold)

    def some(of: list[int]) -> list[int]:
        return sorted(data.draw(st.permutations(of))[: data.draw(st.integers(threshold, len(of)))])

    group = some(shards)  # the others dropped out before their shares
    survivors = some(group)  # before their update
    opened = some(survivors)  # before they opened shares
    numbers = {
        shard: np.array(data.draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=5, max_size=5)), np.int64)
        for shard in survivors
    }
    updates = {shard: together.masked(shard, group, numbers[shard]) for shard in survivors}
    found = together.unmasked(updates, group, together.reveals(group, survivors, opened))
    plain = [sum(int(numbers[shard][at]) for shard in survivors) for at in range(5)]
    assert found.tolist() == [(value + 2**63) % 2**64 - 2**63 for value in plain]


def test_below_the_threshold_nothing_is_unmasked_and_it_is_said() -> None:
    together = Sum.of([0, 1, 2, 3], 3)
    reveals = together.reveals([0, 1, 2, 3], [0, 1, 2], [0, 1])
    with pytest.raises(BadUpdateError, match="2 members opened their shares, and 3 are needed"):
        masks_left(together.roster, [0, 1, 2, 3], [0, 1, 2], reveals)


def test_a_member_that_opened_too_little_is_noticed() -> None:
    together = Sum.of([0, 1, 2], 2)
    reveals = together.reveals([0, 1, 2], [0, 1], [0, 1])
    reveals[0] = reveals[0].model_copy(update={"keys": {}})
    with pytest.raises(BadUpdateError, match=r"shard 2 \(w2\): 1 shares are here, and 2 are needed"):
        masks_left(together.roster, [0, 1, 2], [0, 1], reveals)


@pytest.mark.parametrize(("of", "shard", "said"), [("seeds", 1, "seed of shard 1"), ("keys", 2, "mask key of shard 2")])
def test_a_wrong_share_is_noticed_and_not_averaged(of: str, shard: int, said: str) -> None:
    together = Sum.of([0, 1, 2], 2)
    reveals = together.reveals([0, 1, 2], [0, 1], [0, 1])
    wrong = {**getattr(reveals[0], of), shard: "0" * 131 + "1"}
    reveals[0] = reveals[0].model_copy(update={of: wrong})
    with pytest.raises(BadUpdateError, match=said):
        masks_left(together.roster, [0, 1, 2], [0, 1], reveals)


def test_one_masked_update_of_zeros_looks_like_noise() -> None:
    together = Sum.of([0, 1, 2], 2)
    update = together.masked(1, [0, 1, 2], np.zeros(1 << 15, np.int64))
    counts = np.bincount(update.view(np.uint8), minlength=256)
    expected = update.nbytes / 256
    chi_square = float((np.square(counts - expected) / expected).sum())
    assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)  # five standard deviations, of a fixed seed


def test_without_its_own_mask_too_an_update_whose_pairs_are_known_stays_hidden() -> None:
    """All pairwise masks of a survivor can be learned by calling it dropped out: its seed's mask is left then."""
    together = Sum.of([0, 1, 2], 2)
    update = together.masked(0, [0, 1, 2], np.zeros(64, np.int64))
    pairs = together.secrets[0].masks(together.roster, 0, [0, 1, 2])[1:]
    add_masks(update, 0, [mask.opposite for mask in pairs])
    assert np.count_nonzero(update) == 64


def test_a_round_begun_anew_has_other_masks_and_other_shares() -> None:
    secrets = secrets_of(0)
    rosters = [Sum.of([0, 1, 2], 2, seal=seal).roster for seal in (0, 1)]
    first, second = (
        roster.model_copy(update={"members": (member(0, secrets), *roster.members[1:])}) for roster in rosters
    )
    again = second.model_copy(
        update={"members": first.members}
    )  # the same keys, and only the number of the seal differs
    assert digest_of(first) != digest_of(again)
    masks = [{mask.key for mask in secrets.masks(roster, 0, [0, 1, 2])} for roster in (first, again)]
    assert not masks[0] & masks[1]
    sealed = [set(secrets.shares(roster, 0).values()) for roster in (first, again)]
    assert not sealed[0] & sealed[1]


@pytest.mark.parametrize("field", ["job", "round", "threshold"])
def test_every_field_of_a_roster_changes_its_masks(field: str) -> None:
    roster = Sum.of([0, 1, 2], 2).roster
    other = roster.model_copy(update={field: {"job": "job-2", "round": 2, "threshold": 3}[field]})
    masks = [{mask.key for mask in secrets_of(0, "0").masks(one, 0, [0, 1, 2])} for one in (roster, other)]
    assert not masks[0] & masks[1]


def test_a_member_sends_the_same_bytes_after_a_restart() -> None:
    together, root = Sum.of([0, 1, 2], 2), secrets_of(0, "0").root
    again = Secrets(root)
    assert again.keys(1) == together.secrets[0].keys(1)
    assert again.shares(together.roster, 0) == together.secrets[0].shares(together.roster, 0)


def test_the_two_members_of_a_pair_have_opposite_masks() -> None:
    together = Sum.of([3, 5, 9], 2)
    ours = together.secrets[3].masks(together.roster, 3, [3, 5])[1]
    theirs = together.secrets[5].masks(together.roster, 5, [3, 5])[1]
    assert ours == theirs.opposite
    assert (ours.sign, theirs.sign) == (1, -1)


# ---------------------------------------------------------------- the stream


def test_the_stream_is_aes_in_counter_mode_as_nist_has_it() -> None:
    # SP 800-38A, F.5.5 encrypts with another first counter: here it is the plain AES-256 of blocks 0 and 1 (zero key).
    block = bytes.fromhex("dc95c078a2408989ad48a21492842087530f8afbc74536b9a963b4f1c4cb738b")
    assert stream(bytes(32), 0, 4).tobytes() == block


@settings(max_examples=20)
@given(st.integers(0, 50), st.integers(0, 50))
def test_a_stream_may_be_entered_at_any_number(first: int, count: int) -> None:
    whole = stream(b"k" * 32, 0, 100)
    assert stream(b"k" * 32, first, count).tolist() == whole[first : first + count].tolist()


def test_masking_in_blocks_is_masking_at_once() -> None:
    masks = [Mask(b"a" * 32, 1), Mask(b"b" * 32, -1)]
    whole, parts = np.zeros(10, np.uint64), np.zeros(10, np.uint64)
    add_masks(whole, 0, masks)
    for first, last in ((0, 3), (3, 4), (4, 10)):
        add_masks(parts[first:last], first, masks)
    assert parts.tolist() == whole.tolist()


# ---------------------------------------------------------------- what a member refuses


def test_shares_are_for_their_receiver_alone() -> None:
    together = Sum.of([0, 1, 2], 2)
    sealed = together.sealed([0, 1, 2])
    mixed = {1: sealed[2][1], 2: sealed[0][2]}
    with pytest.raises(RefusedError, match=r"the shares of shard 1 \(w1\) do not open: InvalidTag"):
        together.secrets[0].reveal(1, together.roster, 0, [0, 1, 2], [0, 1], mixed)


def test_missing_shares_are_named() -> None:
    together = Sum.of([0, 1, 2], 2)
    with pytest.raises(RefusedError, match=r"the shares of shard 1 \(w1\) do not open: KeyError"):
        together.secrets[0].reveal(1, together.roster, 0, [0, 1, 2], [0, 1], {})


def test_a_member_opens_one_share_of_each_and_never_its_own_mask_key() -> None:
    together = Sum.of([0, 1, 2, 3], 3)
    reveal = together.reveals([0, 1, 2, 3], [0, 1, 2], [0])[0]
    assert (set(reveal.seeds), set(reveal.keys)) == ({0, 1, 2}, {3})


@pytest.mark.parametrize(
    ("group", "survivors", "said"),
    [
        ([0, 1, 2], [0], "1 updates would be summed, and this sum needs 2"),
        ([0, 1], [0, 2], "do not lie in each other"),
        ([0, 1, 2, 7], [0, 1], "do not lie in each other"),
        ([0, 1, 2], [1, 2], "do not lie in each other with shard 0"),
    ],
)
def test_a_question_that_no_honest_coordinator_asks_is_refused(
    group: list[int], survivors: list[int], said: str
) -> None:
    with pytest.raises(RefusedError, match=said):
        check_survivors(Sum.of([0, 1, 2], 2).roster, 0, group, survivors)


def change(roster: Any, **fields: Any) -> Any:
    return roster.model_copy(update=fields)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda r: change(r, members=r.members[:2]), "has 2 members, where 3 to 50"),
        (lambda r: change(r, threshold=2), "more than half of them, and at least 3"),
        (lambda r: change(r, threshold=6), "more than half"),
        (lambda r: change(r, members=(r.members[1], r.members[0], *r.members[2:])), "not in the order"),
        (lambda r: change(r, members=(*r.members[:4], change(r.members[4], worker="w1"))), "a worker twice"),
        (lambda r: change(r, members=(change(r.members[0], attempt=2), *r.members[1:])), "own keys at shard 0"),
    ],
)
def test_a_roster_that_would_not_protect_is_refused(wrong: Any, said: str) -> None:
    together = Sum.of([0, 1, 2, 3, 4], 3)
    own = member(0, together.secrets[0])
    check_roster(together.roster, own)
    with pytest.raises(RefusedError, match=said):
        check_roster(wrong(together.roster), own)


def test_a_key_of_small_order_is_refused() -> None:
    together = Sum.of([0, 1, 2], 2)
    members = (*together.roster.members[:2], change(together.roster.members[2], mask_key="0" * 64))
    with pytest.raises(RefusedError, match=r"the key of shard 2 \(w2\) is none"):
        together.secrets[0].masks(change(together.roster, members=members), 0, [0, 1, 2])


def test_shares_of_another_length_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    together = Sum.of([0, 1, 2], 2)
    sealed = together.sealed([0, 1, 2])
    roster = together.roster
    box = together.secrets[1]._box(roster, roster.members[0], 1, 0)
    sealed[0][1] = box.encrypt(bytes(12), b"short", None).hex()
    with pytest.raises(RefusedError, match="the shares of shard 1 have 5 bytes"):
        together.secrets[0].reveal(1, roster, 0, [0, 1, 2], [0, 1], sealed[0])


def test_without_the_package_it_is_said_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert secure.unavailable() == ""
    monkeypatch.setitem(__import__("sys").modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    assert "pip install" in secure.unavailable()


def test_a_reveal_carries_no_more_than_the_shares() -> None:
    assert set(Reveal.model_fields) == {"attempt", "roster", "seeds", "keys"}


def test_one_that_drops_out_after_its_shares_leaves_no_mask_behind() -> None:
    together, group = Sum.of([0, 1, 2, 3], 3), [0, 1, 2, 3]
    updates = {shard: together.masked(shard, group, np.arange(3) + shard) for shard in (0, 1, 3)}
    reveals = together.reveals(group, [0, 1, 3], [0, 1, 3])
    assert together.unmasked(updates, group, reveals).tolist() == [4, 7, 10]


@pytest.mark.parametrize(("members", "up", "down"), [(3, 1_700, 1_800), (10, 5_000, 6_000), (50, 25_000, 30_000)])
def test_beside_the_update_a_worker_sends_and_fetches_a_few_hundred_bytes_a_peer(
    members: int, up: int, down: int
) -> None:
    """Prints what docs/secure-aggregation.md shows: pytest -s tests/test_secure.py -k peer"""
    together = Sum.of(list(range(members)), members)
    own, digest = together.secrets[0], digest_of(together.roster)
    sealed = own.shares(together.roster, 0)
    keys, shares = own.keys(1), SecureShares(attempt=1, roster=digest, sealed=sealed)
    opened = Reveal(attempt=1, roster=digest, seeds=dict.fromkeys(range(members), "0" * 132), keys={})
    asked = Unmask(
        assignment="job-1.1.train.0", attempt=1, roster=digest, survivors=tuple(range(members)), sealed=sealed
    )
    group = Group(roster=digest, shards=tuple(range(members)))
    sent, came = (
        [len(m.model_dump_json()) for m in way] for way in ((keys, shares, opened), (together.roster, group, asked))
    )
    print(f"{members} workers: {sum(sent)} bytes up (keys, shares, reveal: {sent}), {sum(came)} down {came}")
    assert sum(sent) < up
    assert sum(came) < down
