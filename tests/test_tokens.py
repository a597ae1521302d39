"""How long a token counts: until it is revoked, its time is over, its uses are spent, or its second secret was used."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConflictError, DiskFullError, ForbiddenError, NotFoundError, UnauthenticatedError
from server.calendar import Calendar
from server.store import Journal
from server.tokens import ASKED_EVERY_S, Principal, Tokens
from tests.rounds_kit import registration

DAY = 86_400.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000 * DAY


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with closing(Journal.open(tmp_path / "journal.sqlite")) as opened:
        for name in ("w1", "w2", "w3"):
            opened.worker_put(name, registration(name))
        yield opened


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tokens(journal: Journal, clock: Clock) -> Tokens:
    made = Tokens(journal, Calendar(lambda: clock.now, lambda: clock.now, None))
    made.issue("admin", name="first")
    return made


def id_of(token: str) -> str:
    return token.split("_")[2]


def passes(tokens: Tokens, token: str) -> bool:
    try:
        tokens.check(f"Bearer {token}", "100.64.0.3")
    except UnauthenticatedError:
        return False
    return True


# ---------------------------------------------------------------- its time


def test_a_token_counts_until_its_time_is_over_and_not_a_moment_longer(tokens: Tokens, clock: Clock) -> None:
    token, other = tokens.issue("submit", ttl_s=30 * DAY, name="ada"), tokens.issue("submit")
    clock.now += 30 * DAY - 1
    assert passes(tokens, token)
    clock.now += 1
    with pytest.raises(UnauthenticatedError, match=r"counted until 1972-10-27T00:00:00Z") as refused:
        tokens.check(f"Bearer {token}")
    assert (refused.value.code, passes(tokens, other)) == ("token_expired", True)
    assert tokens.view(id_of(token)).state == "expired"


def test_a_token_ages_also_while_no_coordinator_runs(journal: Journal, tokens: Tokens, clock: Clock) -> None:
    token = tokens.issue("read", ttl_s=DAY)
    tokens.keep_seen()
    later = Tokens(journal, Calendar(lambda: clock.now + 2 * DAY, lambda: 0.0, journal.calendar_reached()))
    assert not passes(later, token)


def test_an_expired_token_does_not_come_back_with_a_clock_that_was_set_back(
    journal: Journal, tokens: Tokens, clock: Clock
) -> None:
    token = tokens.issue("read", ttl_s=DAY)
    clock.now += DAY
    assert not passes(tokens, token)
    tokens.keep_seen()
    later = Tokens(journal, Calendar(lambda: 0.0, lambda: 0.0, journal.calendar_reached()))
    assert not passes(later, token)


# ---------------------------------------------------------------- its last use


def test_the_last_use_is_known_at_once_and_kept_in_one_commit_now_and_then(journal: Journal, tokens: Tokens) -> None:
    token = tokens.issue("read", name="screen")
    written = journal._database.total_changes
    for _ in range(100):
        assert passes(tokens, token)
    assert journal._database.total_changes == written, "a call costs no commit"
    assert tokens.view(id_of(token)).last_address == "100.64.0.3"
    tokens.keep_seen()
    again = Tokens(journal).view(id_of(token))
    assert (again.name, again.last_address, (again.last_used_at or "")[:2]) == ("screen", "100.64.0.3", "20")


def test_a_full_disk_is_no_reason_to_refuse_a_call(tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise DiskFullError("no room")

    token = tokens.issue("submit")
    second = tokens.rotate(tokens.find(id_of(token)), 60.0)
    assert second is not None
    monkeypatch.setattr(tokens._journal, "keep_seen", full)
    monkeypatch.setattr(tokens._journal, "token_put", full)
    tokens.keep_seen()
    assert passes(tokens, second)
    assert passes(tokens, token), "that the second was used could not be kept"


# ---------------------------------------------------------------- a second secret


def test_both_secrets_count_until_the_second_is_used_also_after_a_restart(journal: Journal, tokens: Tokens) -> None:
    first = tokens.issue("submit", name="ada", ttl_s=DAY)
    second = tokens.rotate(tokens.find("ada"), overlap_s=3600.0)
    assert second is not None
    assert id_of(second) == id_of(first), "it stays the same token, with its jobs"
    for known in (tokens, Tokens(journal, tokens._calendar)):
        assert passes(known, first)
        assert known.view(id_of(first)).rotating
    assert passes(tokens, second)
    for known in (tokens, Tokens(journal, tokens._calendar)):
        assert (passes(known, first), passes(known, second)) == (False, True)


def test_the_first_secret_ends_with_the_overlap_though_the_second_was_never_used(tokens: Tokens, clock: Clock) -> None:
    first = tokens.issue("read")
    second = tokens.rotate(tokens.find(id_of(first)), overlap_s=60.0)
    assert second is not None
    clock.now += 60
    with pytest.raises(UnauthenticatedError, match="its first secret counted until 1972-09-27T00:01:00Z"):
        tokens.check(f"Bearer {first}")
    assert passes(tokens, second)


def test_a_rotation_makes_no_token_live_longer(tokens: Tokens, clock: Clock) -> None:
    second = tokens.rotate(tokens.find(id_of(tokens.issue("read", ttl_s=60.0))), overlap_s=3600.0)
    assert second is not None
    clock.now += 60
    assert not passes(tokens, second)
    with pytest.raises(ConflictError, match="counts no more") as refused:
        tokens.rotate(tokens.find(id_of(second)), overlap_s=1.0)
    assert refused.value.code == "token_dead"


def test_a_revoked_token_counts_by_neither_secret(tokens: Tokens) -> None:
    first = tokens.issue("submit")
    second = tokens.rotate(tokens.find(id_of(first)), overlap_s=60.0)
    tokens.revoke(id_of(first))
    assert second is not None
    assert (passes(tokens, first), passes(tokens, second)) == (False, False)


@settings(max_examples=20)
@given(steps=st.lists(st.sampled_from(["rotate", "use first", "use second", "wait"]), max_size=12))
def test_at_most_two_secrets_of_a_token_are_known_and_the_newest_ends_all_others(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str]
) -> None:
    clock = Clock()
    with closing(Journal.open(tmp_path_factory.mktemp("two") / "journal.sqlite")) as journal:
        tokens = Tokens(journal, Calendar(lambda: clock.now, lambda: clock.now, None))
        made = [tokens.issue("read")]
        for step in steps:
            if step == "rotate":
                made.append(tokens.rotate(tokens.find(id_of(made[0])), overlap_s=10.0) or "")
            elif step == "wait":
                clock.now += 6
            else:
                passes(tokens, made[0 if step == "use first" else -1])
            stored = journal.tokens()[0]
            known = {stored.secret_hash, stored.next_hash} - {None}
            assert len(known) <= 2
            assert passes(tokens, made[-1]) is True
            assert sum(passes(tokens, one) for one in set(made)) == 1, "the newest was used: it is the only one"


def test_a_workers_second_secret_waits_for_the_worker_which_is_asked_now_and_then(tokens: Tokens) -> None:
    first = tokens.credential("w1", "gpu-box", None, "claim")
    assert first is not None
    assert tokens.credential("w1", "gpu-box", None, "claim") is None, "it goes on with what it has"
    assert not tokens.is_to_renew("w1", 0.0)
    assert tokens.rotate(tokens.find("gpu-box"), overlap_s=DAY) is None
    asked = [tokens.is_to_renew("w1", at) for at in (0.0, 1.0, ASKED_EVERY_S, ASKED_EVERY_S + 1)]
    assert asked == [True, False, True, False]
    second = tokens.credential("w1", "gpu-box", None, "claim")
    assert second is not None
    assert passes(tokens, first), "its answer may have been lost"
    assert passes(tokens, second)
    assert (passes(tokens, first), tokens.is_to_renew("w1", 1e9)) == (False, False)


@pytest.mark.parametrize("fetched", [False, True])
def test_a_rotated_workers_old_credential_ends_with_the_overlap_whether_the_new_one_was_fetched_or_not(
    journal: Journal, tokens: Tokens, clock: Clock, fetched: bool
) -> None:
    first = tokens.credential("w1", "gpu-box", None, "claim") or ""
    tokens.rotate(tokens.find("gpu-box"), overlap_s=60.0)
    clock.now += 59
    second = tokens.credential("w1", "gpu-box", None, "claim") if fetched else None
    tokens = Tokens(journal, tokens._calendar)
    assert passes(tokens, first)
    assert tokens.first_until(id_of(first)) == "1972-09-27T00:01:00Z"
    clock.now += 1
    with pytest.raises(UnauthenticatedError, match="its first secret counted until 1972-09-27T00:01:00Z") as refused:
        tokens.check(f"Bearer {first}")
    assert "joins anew" in refused.value.advice
    assert second is None or passes(tokens, second)


def test_a_workers_join_that_is_said_again_ends_neither_of_its_credentials_with_time(
    tokens: Tokens, clock: Clock
) -> None:
    caller = joining(tokens)
    first, second = let_in(tokens, caller, "w1", "claim"), let_in(tokens, caller, "w1", "claim")
    clock.now += 100 * DAY
    assert tokens.first_until(id_of(first)) == "the second is used"
    assert passes(tokens, first), "whichever of the two answers was lost, the other has come"
    assert passes(tokens, second)


def test_a_join_token_is_replaced_and_not_rotated(tokens: Tokens) -> None:
    tokens.issue("join", name="attic")
    with pytest.raises(ConflictError, match="lets workers join, and is not rotated"):
        tokens.rotate(tokens.find("attic"), 1.0)


# ---------------------------------------------------------------- joining


def joining(tokens: Tokens, **options: object) -> Principal:
    return tokens.check(f"Bearer {tokens.issue('join', **options)}")  # type: ignore[arg-type]


def let_in(tokens: Tokens, caller: Principal, worker: str, claim: str) -> str:
    """A worker joins; returns its credential."""
    known = tokens.joined_before(caller, claim)
    return tokens.credential(known or worker, worker, caller, claim) or ""


def test_a_token_lets_in_as_many_as_it_may_and_names_what_to_do_then(tokens: Tokens) -> None:
    caller = joining(tokens, uses=2, labels=["legacy"])
    assert passes(tokens, let_in(tokens, caller, "w1", "one"))
    assert passes(tokens, let_in(tokens, caller, "w2", "two"))
    with pytest.raises(ForbiddenError, match="lets 2 join, and as many have") as refused:
        let_in(tokens, caller, "w3", "three")
    assert refused.value.code == "token_spent"
    view = tokens.view(caller.token_id)
    assert (view.state, view.joined, view.uses, tokens.labels_of("w1")) == ("spent", 2, 2, ("legacy",))


def test_a_join_whose_answer_was_lost_is_the_same_worker_and_counts_once(journal: Journal, tokens: Tokens) -> None:
    caller = joining(tokens, uses=1)
    lost = let_in(tokens, caller, "w1", "one")
    for known in (tokens, Tokens(journal, tokens._calendar)):
        assert known.joined_before(caller, "one") == "w1"
    heard = let_in(tokens, caller, "w1", "one")
    assert tokens.view(caller.token_id).joined == 1
    assert passes(tokens, heard)
    assert not passes(tokens, lost), "what nobody heard counts no more once the other was used"


def test_who_joins_again_after_its_worker_has_called_is_another_worker(tokens: Tokens) -> None:
    caller = joining(tokens)
    assert passes(tokens, let_in(tokens, caller, "w1", "one"))
    assert tokens.joined_before(caller, "one") is None


def test_a_join_is_nobody_elses_and_no_other_tokens(tokens: Tokens) -> None:
    caller, other = joining(tokens), joining(tokens)
    let_in(tokens, caller, "w1", "one")
    assert tokens.joined_before(caller, "two") is None
    assert tokens.joined_before(other, "one") is None
    tokens.revoke(tokens.find("w1").id)
    assert tokens.joined_before(caller, "one") is None, "whoever was sent away does not come back as the same"


# ---------------------------------------------------------------- found, revoked


def test_a_token_is_found_by_id_name_worker_and_by_what_of_it_is_public(tokens: Tokens) -> None:
    ada = tokens.issue("submit", name="ada")
    tokens.credential("w1", "gpu-box", None, "claim")
    worker = tokens.find("w1").id
    for named in (id_of(ada), "ada", f"lyd_submit_{id_of(ada)}_…", ada):
        assert tokens.find(named).id == id_of(ada)
    assert tokens.find("gpu-box").id == worker
    with pytest.raises(NotFoundError, match="no token 'eve' that counts"):
        tokens.find("eve")


def test_a_name_that_several_have_is_refused_with_their_ids_unless_one_alone_counts(tokens: Tokens) -> None:
    one, two = (id_of(tokens.issue("read", name="screen")) for _ in range(2))
    with pytest.raises(ConflictError, match=f"2 tokens are called screen: {one}, {two}"):
        tokens.find("screen")
    tokens.revoke(one)
    assert tokens.find("screen").id == two


@pytest.mark.parametrize("other", [None, lambda tokens: tokens.issue("admin", ttl_s=1e-9)])
def test_the_last_token_that_could_make_others_stays(tokens: Tokens, other: Callable[[Tokens], str] | None) -> None:
    if other is not None:
        other(tokens)
    with pytest.raises(ConflictError, match="is the only token of scope admin that counts") as refused:
        tokens.revoke(tokens.find("first").id)
    assert refused.value.code == "last_admin"
    tokens.issue("admin")
    tokens.revoke(tokens.find("first").id)


def test_a_revoked_workers_call_that_is_under_way_ends(tokens: Tokens) -> None:
    tokens.check_worker("w1")
    tokens.credential("w1", "gpu-box", None, "claim")
    tokens.check_worker("w1")
    tokens.revoke(tokens.find("w1").id)
    with pytest.raises(UnauthenticatedError, match="was revoked at 20"):
        tokens.check_worker("w1")


def test_no_secret_is_in_what_is_shown_or_kept(journal: Journal, tokens: Tokens) -> None:
    made = [tokens.issue("submit", name="ada"), tokens.issue("join"), tokens.issue("read", ttl_s=1.0)]
    made.append(tokens.rotate(tokens.find("ada"), 60.0) or "")
    shown = "".join(view.model_dump_json() for view in tokens.views()) + repr(journal.tokens())
    content = b"".join(file.read_bytes() for file in journal.path.parent.glob("journal.sqlite*"))
    for token in made:
        secret = token.split("_", maxsplit=3)[3]
        assert (secret in shown, secret.encode() in content) == (False, False)
