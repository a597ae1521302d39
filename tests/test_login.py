"""Reading without a token from machines of the tailnet: who, how, and everything that is refused."""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import tailscale
from common.tailscale import Person, parse_person, person
from server.login import SCOPES, may_log_in, parse_rules, scope_of
from server.logins import Logins
from tests.fake_tailscaled import FakeTailscaled, Peer
from tests.trust_kit import Answer, Served

RULES = parse_rules("alice@example.com=submit, tag:screen=read,")
CAP = "example.com/cap/lydian"
HERE = 50_000  # the port of loopback that tests/trust_kit.py calls from: a machine in userspace mode comes from there


def someone(login: str = "", tags: tuple[str, ...] = (), *, guest: bool = False, **caps: Any) -> Person:
    return Person("n1CNTRL", login, tags, guest, {CAP: tuple(caps["grants"])} if caps else {})


# ---------------------------------------------------------------- the rules


def test_the_owner_or_a_tag_of_a_machine_gives_it_its_scope() -> None:
    assert scope_of(someone("alice@example.com"), RULES, "") == "submit"
    assert scope_of(someone(tags=("tag:other", "tag:screen")), RULES, "") == "read"


@pytest.mark.parametrize(
    "who",
    [None, someone(), someone("eve@example.com"), someone("ALICE@example.com"), someone(tags=("tag:gpu",)),
     someone("alice@example.com", guest=True), someone("alice@example.com", ("tag:gpu",))],
)  # fmt: skip
def test_who_is_not_named_a_guest_or_nobody_may_do_nothing(who: Person | None) -> None:
    assert scope_of(who, RULES, CAP) is None


def test_grants_of_the_policy_count_where_their_name_was_set_and_the_greatest_scope_wins() -> None:
    granted = someone("bob@example.com", grants=[{"scopes": ["read", "root", 7]}, {"scopes": ["submit"]}, "x", {}])
    assert scope_of(granted, {}, CAP) == "submit"
    assert scope_of(granted, {}, "") is None
    assert scope_of(granted, {}, "example.org/cap/lydian") is None
    assert scope_of(someone("alice@example.com", grants=[{"scopes": ["read"]}]), RULES, CAP) == "submit"


@given(st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(
    st.sampled_from(["scopes", "x"]), inner)))  # fmt: skip
def test_no_value_of_a_grant_gives_anything_but_a_scope_or_nothing(value: Any) -> None:
    assert scope_of(someone("bob@example.com", grants=[value]), {}, CAP) in (None, *SCOPES)


@pytest.mark.parametrize("text", ["alice", "alice=root", "=read", "a=read=submit", "a=read, a=submit", "a b=read"])
def test_what_is_no_rule_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no rule"):
        parse_rules(text)


@pytest.mark.parametrize(
    ("host", "passes"),
    [("100.64.0.1:8470", True), ("[fd7a:115c:a1e0::1]:8470", True), ("coordinator:8470", True), ("localhost", True),
     ("coordinator.tailnet.test:8470", True), ("Coordinator.Tailnet.Test", True), ("evil.example:8470", False),
     ("coordinator.tailnet.test.evil.example", False), ("", False), ("a_b", False), ("100.64.0.1.nip.io", False)],
)  # fmt: skip
def test_a_foreign_pages_own_name_is_not_let_in_though_it_stands_for_our_address(host: str, passes: bool) -> None:
    assert may_log_in("GET", {"host": host}, "coordinator.tailnet.test") is passes


def test_nothing_but_a_get_without_an_origin_is_let_in() -> None:
    host = {"host": "100.64.0.1:8470"}
    assert may_log_in("GET", host, None)
    assert not may_log_in("GET", host | {"origin": "http://100.64.0.1:8470"}, None)
    assert [may_log_in(method, host, None) for method in ("POST", "PUT", "DELETE", "HEAD", "PATCH")] == [False] * 5
    assert not may_log_in("GET", {}, None)
    assert not may_log_in("GET", {"host": "coordinator.tailnet.test"}, None), "this machine's name is not known"


# ---------------------------------------------------------------- what tailscaled says


@pytest.mark.parametrize(
    "body",
    [None, 7, {}, {"Node": {}}, {"Node": {"StableID": 7}}, {"Node": {"StableID": "n1", "Tags": "tag:x"}},
     {"Node": {"StableID": "n1", "Tags": [7]}}],
)  # fmt: skip
def test_a_strange_answer_is_nobody(body: Any) -> None:
    assert parse_person(body) is None


def test_a_guest_and_strange_grants_are_seen_as_such() -> None:
    found = parse_person(
        {"Node": {"StableID": "n1", "Sharer": 12}, "UserProfile": {"LoginName": "x"}, "CapMap": {"a": 1}}
    )
    assert found == Person("n1", "x", (), True, {})


# ---------------------------------------------------------------- calls


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTailscaled]:
    monkeypatch.setattr(tailscale, "TIMEOUT_S", 60.0)  # it answers from a thread of this busy process
    alice = Peer("100.64.0.3", "laptop", login="alice@example.com", proxied=(HERE,))
    with FakeTailscaled(tmp_path / "tailscaled.sock", [Peer("100.64.0.1", "coordinator"), alice]) as running:
        yield running


@contextlib.contextmanager
def serving(tmp_path: Path, daemon: FakeTailscaled, **settings: str) -> Iterator[Served]:
    running = Served(tmp_path / "state", tailscaled=daemon.path, **settings)
    try:
        yield running
    finally:
        running.close()


PLACE = "127.0.0.1:8470"


def read(served: Served, **headers: str) -> Answer:
    host = headers.pop("Host", PLACE)
    return served.call("GET", "/v1/jobs", None, b"", headers, hosts=(host,))


def test_it_is_off_unless_it_is_switched_on_and_then_reads_and_nothing_else(
    tmp_path: Path, daemon: FakeTailscaled
) -> None:
    with serving(tmp_path, daemon) as served:
        assert (read(served).status, read(served).code) == (401, "no_token")
        assert not [call for call in daemon.calls if "whois" in call]
    with serving(tmp_path, daemon, login="alice@example.com=submit") as served:
        assert read(served).status == 200
        assert served.call("GET", "/metrics", hosts=(PLACE,)).status == 200
        assert served.call("GET", "/v1/tokens", hosts=(PLACE,)).status == 403
        assert served.call("POST", "/v1/jobs", None, b"{}", hosts=(PLACE,)).status == 401
        assert read(served, Origin=f"http://{PLACE}").status == 401, "a page, be it of ours, needs a token"
        assert read(served, Origin="http://evil.example").status == 403
        assert read(served, Host="evil.example").status == 403
        assert read(served, Authorization="Bearer nonsense").status == 401, "a token that is wrong is not passed over"


def test_whoever_tailscaled_does_not_know_or_names_otherwise_stays_outside_whatever_it_says(
    tmp_path: Path, daemon: FakeTailscaled
) -> None:
    with serving(tmp_path, daemon, login="alice@example.com=read") as served:
        daemon.peers = [daemon.peers[0], Peer("100.64.0.3", "laptop", login="eve@example.com", proxied=(HERE,))]
        assert (
            read(served, **{"X-Forwarded-For": "100.64.0.3", "Tailscale-User-Login": "alice@example.com"}).status == 401
        )
        daemon.peers = daemon.peers[:1]
        assert read(served).status == 401
        daemon.answers["/localapi/v0/whois"] = (500, "oops")
        assert read(served).status == 401
    with serving(tmp_path, daemon, login="alice@example.com=read") as served:
        served.coordinator.logins._socket = tmp_path / "gone"
        assert read(served).status == 401


def test_a_machine_is_asked_for_once_a_minute_and_a_caller_from_loopback_each_time(
    tmp_path: Path, daemon: FakeTailscaled
) -> None:
    logins = Logins(RULES, "", daemon.path)
    headers = {"host": "100.64.0.1"}

    async def call(*address: Any) -> str | None:
        found = await logins.principal("GET", headers, address, None)
        return found.scope if found else None

    async def calls() -> list[str | None]:
        return [await call(host, HERE) for host in ("100.64.0.3", "100.64.0.3", "127.0.0.1", "127.0.0.1", "::1")]

    assert asyncio.run(calls()) == ["submit"] * 4 + [None]
    assert len([call for call in daemon.calls if "whois" in call]) == 4
    assert person("100.64.0.9", socket_path=daemon.path) is None
