"""A worker's part in a secure sum: what it keeps, what it refuses to open, and that it never waits for nothing."""

import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from common.api import CoordinatorApi
from common.errors import RefusedError, SupersededError
from common.messages import Assignment, Group, ModelRef, Roster, SecureKeys, SecureShares, Submission, TaskRef, Unmask
from common.secure import digest_of
from common.weights import Notes, file_digest, save
from tests.rounds_kit import spec
from tests.secure_kit import Sum
from worker.child import TaskFailure, TaskStopped
from worker.heart import Watch
from worker.sealing import Sealed, Sealing, mask, opened
from worker.spool import Kept, Secret, Spool, Untrained

pytest.importorskip("cryptography")

URL = "http://coordinator"


def work(**secure: Any) -> Assignment:
    job = spec(secure={"enabled": True, **secure}, data={"shards": "auto"}, round={"min_workers": 3})
    return Assignment(
        id="job-1.1.train.0", attempt=1, job="job-1", kind="train", round=1, shard=0, shards=3,
        task=TaskRef(name="digits"), spec=job, base=ModelRef(digest="0" * 64, size=100), ttl_s=40, max_bytes=1 << 20,
    )  # fmt: skip


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    with Spool.open(tmp_path / "spool") as one:
        yield one


class Peers:
    """The coordinator as one worker meets it, with two peers that do their part."""

    def __init__(self, change: Callable[[Roster], Roster] = lambda roster: roster) -> None:
        self.others, self.change = Sum.of([1, 2], 3), change
        self.keys: list[SecureKeys] = []
        self.shares: list[SecureShares] = []
        self.roster: Roster | None = None

    def announce(self, assignment: str, keys: SecureKeys) -> Roster | None:
        self.keys.append(keys)
        if len(self.keys) == 1:
            return None  # not decided while the call lasted
        own = {"shard": 0, "worker": "w0", **keys.model_dump()}
        members = (type(self.others.roster.members[0]).model_validate(own), *self.others.roster.members)
        self.roster = self.change(self.others.roster.model_copy(update={"members": members}))
        return self.roster

    def cut(self, assignment: str, shares: SecureShares) -> Group | None:
        self.shares.append(shares)
        return Group(roster=shares.roster, shards=(0, 1, 2))


def fetch(call: Callable[[], int], watch: Watch) -> int:
    return call()


def sealing(peers: Any, spool: Spool, begun: Untrained, watch: Watch | None = None) -> Sealing:
    return Sealing(cast("CoordinatorApi", peers), spool, begun, fetch, watch or Watch(), "w0")


def agreed(peers: Peers, spool: Spool, begun: Untrained) -> Sealed:
    thread = sealing(peers, spool, begun)
    thread.start()
    return thread.result()


def kept(spool: Spool, peers: Peers, begun: Untrained) -> Kept:
    """The attempt, handed in."""
    begun.place.update.write_bytes(b"masked")
    submission = Submission(attempt=1, digest=file_digest(begun.place.update), samples=1)
    return spool.keep(spool.finish(begun, submission))


def question(peers: Peers, survivors: tuple[int, ...] = (0, 1, 2)) -> Unmask:
    assert peers.roster is not None
    sealed = {shard: peers.others.secrets[shard].shares(peers.roster, shard)[0] for shard in (1, 2)}
    return Unmask(
        assignment="job-1.1.train.0", attempt=1, roster=digest_of(peers.roster), survivors=survivors, sealed=sealed
    )


def test_a_worker_agrees_and_keeps_what_it_needs_where_nobody_else_can_read_it(spool: Spool) -> None:
    begun, peers = spool.begin(work(), URL), Peers()
    found = agreed(peers, spool, begun)
    secret = spool.secret(begun.place)
    assert secret is not None
    assert (secret.roster, secret.group) == (peers.roster, (0, 1, 2))
    assert (found.roster, found.group) == (peers.roster, (0, 1, 2))
    assert stat.S_IMODE(begun.place.secret.stat().st_mode) == 0o600


def test_a_worker_that_was_killed_sends_the_same_again(spool: Spool) -> None:
    begun, peers = spool.begin(work(), URL), Peers()
    agreed(peers, spool, begun)
    root = cast("Secret", spool.secret(begun.place)).root
    for kept_so_far in (Secret(root=root), Secret(root=root, roster=peers.roster)):
        spool.keep_secret(begun.place, kept_so_far)
        agreed(peers, spool, begun)
    assert len(set(map(str, peers.keys))) == 1
    assert len(set(map(str, peers.shares))) == 1
    assert len(peers.shares) == 3


def test_what_unmasks_an_update_stays_while_it_is_kept(spool: Spool, tmp_path: Path) -> None:
    begun, peers = spool.begin(work(), URL), Peers()
    agreed(peers, spool, begun)
    held = kept(spool, peers, begun)
    with Spool.open(tmp_path / "spool") as again:
        (found,) = again.kept(URL)
        assert again.secret(found.place) == spool.secret(held.place)
    spool.drop(held)
    assert not begun.place.secret.exists()


def test_shares_are_opened_for_one_sum_and_for_no_other(spool: Spool) -> None:
    begun, peers = spool.begin(work(), URL), Peers(lambda roster: roster.model_copy(update={"threshold": 3}))
    agreed(peers, spool, begun)
    held = kept(spool, peers, begun)
    first = opened(spool, held, question(peers))
    assert opened(spool, held, question(peers)) == first
    assert (set(first.seeds), set(first.keys)) == ({0, 1, 2}, set())
    with pytest.raises(RefusedError, match="both shares of one worker are never opened"):
        opened(spool, held, question(peers, (0, 1)))


def test_the_rule_holds_in_the_next_life_of_the_worker(spool: Spool, tmp_path: Path) -> None:
    begun, peers = spool.begin(work(), URL), Peers()
    agreed(peers, spool, begun)
    opened(spool, kept(spool, peers, begun), question(peers))
    with Spool.open(tmp_path / "spool") as again, pytest.raises(RefusedError, match="never opened"):
        opened(again, again.kept(URL)[0], question(peers, (0, 2)))


def test_fewer_survivors_than_the_threshold_are_not_unmasked(spool: Spool) -> None:
    begun, peers = spool.begin(work(), URL), Peers()
    agreed(peers, spool, begun)
    with pytest.raises(RefusedError, match="2 updates would be summed, and this sum needs 3"):
        opened(spool, kept(spool, peers, begun), question(peers, (0, 1)))


def test_shares_of_another_roster_are_not_opened(spool: Spool) -> None:
    begun, peers = spool.begin(work(), URL), Peers()
    agreed(peers, spool, begun)
    other = question(peers).model_copy(update={"roster": "0" * 64})
    with pytest.raises(RefusedError, match="is in no sum under roster 000000000000"):
        opened(spool, kept(spool, peers, begun), other)


def test_a_roster_that_would_not_protect_ends_the_attempt_before_a_share_is_sent(spool: Spool) -> None:
    peers = Peers(lambda roster: roster.model_copy(update={"members": roster.members[:2]}))
    thread = sealing(peers, spool, spool.begin(work(), URL))
    thread.start()
    with pytest.raises(TaskFailure, match="no masked update was sent: the roster has 2 members"):
        thread.result()
    assert peers.shares == []


def test_an_answer_that_is_final_reaches_who_waits(spool: Spool) -> None:
    class Gone(Peers):
        def announce(self, assignment: str, keys: SecureKeys) -> Roster | None:
            raise SupersededError("another attempt counts")

    thread = sealing(Gone(), spool, spool.begin(work(), URL))
    thread.start()
    with pytest.raises(SupersededError):
        thread.result()


def test_work_that_is_to_be_dropped_waits_for_no_peer(spool: Spool) -> None:
    class Never(Peers):
        def announce(self, assignment: str, keys: SecureKeys) -> Roster | None:
            return None

    watch = Watch()
    thread = sealing(Never(), spool, spool.begin(work(), URL), watch)
    thread.start()
    watch.order_reason = "the job is over"
    watch.ordered.set()
    with pytest.raises(TaskStopped, match="the job is over"):
        thread.result()
    thread.join()


# ---------------------------------------------------------------- masking


def trained(spool: Spool, tmp_path: Path, change: float, **secure: Any) -> tuple[Untrained, Sealed, str]:
    begun, together = spool.begin(work(**secure), URL), Sum.of([0, 1, 2], 3)
    save(tmp_path / "base", {"w": np.zeros(3, np.float32)}, Notes())
    save(begun.place.trained, {"w": np.array([0, change, 1], np.float32)}, Notes())
    return begun, Sealed(together.secrets[0], together.roster, (0, 1, 2)), str(tmp_path / "base")


def test_what_was_trained_is_gone_once_it_is_masked(
    spool: Spool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begun, sealed, base = trained(spool, tmp_path, 65.0)
    assert mask(begun, base, 10, sealed) == file_digest(begun.place.update)
    assert not begun.place.trained.exists()
    assert "1 numbers had changed by more than secure.clip = 64, and were cut to it" in caplog.text


def test_a_shard_that_has_no_room_in_the_sum_is_told_what_to_change(spool: Spool, tmp_path: Path) -> None:
    begun, sealed, base = trained(spool, tmp_path, 0.5, bits=48)
    with pytest.raises(TaskFailure, match=r"the shard has 100000 samples.*lower secure\.bits") as failed:
        mask(begun, base, 100_000, sealed)
    assert failed.value.code == "bad_task"


def test_a_model_that_diverged_is_given_back(spool: Spool, tmp_path: Path) -> None:
    begun, sealed, base = trained(spool, tmp_path, float("inf"))
    with pytest.raises(TaskFailure, match=r"is not finite.*lower train\.lr"):
        mask(begun, base, 10, sealed)
