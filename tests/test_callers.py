"""Who calls the coordinator and from where, asked of a stand-in for tailscaled: pins, caches, a daemon in trouble."""

import asyncio
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import ForbiddenError, UnavailableError
from common.messages import TailnetNode
from common.tailscale import parse_node, whois
from server.store import Journal
from server.tailnet import AGAIN_S, ASKED_EVERY_S, FRESH_S, Tailnet
from tests.fake_tailscaled import FakeTailscaled, Peer
from tests.rounds_kit import registration

ME = Peer("100.64.0.1", "coordinator", tags=("tag:lydian-coordinator",))
GPU = Peer("100.64.0.2", "gpu", ip6="fd7a:115c:a1e0::2", tags=("tag:lydian-worker", "tag:gpu"), proxied=(50_001,))
LAPTOP = Peer("100.64.0.3", "laptop", login="alice@example.com", key_expiry="2026-08-05T00:00:00Z", proxied=(50_002,))
GPU_AT, LAPTOP_AT, LAN_AT = ("100.64.0.2", 50_000), ("100.64.0.3", 50_000), ("192.168.1.7", 50_000)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeTailscaled]:
    with FakeTailscaled(tmp_path / "tailscaled.sock", [ME, GPU, LAPTOP]) as running:
        yield running


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with closing(Journal.open(tmp_path / "journal.sqlite")) as kept:
        kept.worker_put("w1", registration())
        yield kept


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tailnet(daemon: FakeTailscaled, journal: Journal, clock: Clock) -> Tailnet:
    return Tailnet(daemon.path, journal, clock=clock)


def asked(daemon: FakeTailscaled) -> int:
    return sum("whois" in call for call in daemon.calls)


# ---------------------------------------------------------------- whois


def test_a_tagged_machine_is_its_tags_and_another_is_its_users(daemon: FakeTailscaled) -> None:
    assert whois("100.64.0.2", socket_path=daemon.path).node == TailnetNode(
        stable_id="n1CNTRL", name="gpu.tailnet.test", owner="tag:lydian-worker, tag:gpu", os="linux"
    )
    laptop = whois("100.64.0.3", 50_000, daemon.path).node
    assert laptop is not None
    assert laptop.owner == "alice@example.com"
    assert laptop.key_expiry is not None
    assert laptop.key_expiry.isoformat() == "2026-08-05T00:00:00+00:00"


def test_an_ipv6_address_is_asked_for_as_tailscaled_wants_it(daemon: FakeTailscaled) -> None:
    for port in (0, 50_000):
        found = whois("fd7a:115c:a1e0::2", port, daemon.path)
        assert found.node is not None
        assert found.node.stable_id == "n1CNTRL"


def test_on_loopback_the_port_tells_machines_apart(daemon: FakeTailscaled) -> None:
    names = [whois("127.0.0.1", port, daemon.path).node for port in (50_001, 50_002, 50_003)]
    assert [node and node.name for node in names] == ["gpu.tailnet.test", "laptop.tailnet.test", None]


def test_nobody_is_told_from_no_answer(daemon: FakeTailscaled, tmp_path: Path) -> None:
    nobody = whois("192.168.1.7", socket_path=daemon.path)
    assert (nobody.node, nobody.asked) == (None, True)
    assert "192.168.1.7" in nobody.why
    absent = whois("100.64.0.2", socket_path=tmp_path / "nothing.sock")
    assert (absent.node, absent.asked) == (None, False)
    assert "no tailscaled" in absent.why
    for answer in [(500, "oops"), (200, "<html>"), (200, {"Node": {}}), (200, {"Node": {"StableID": 7}})]:
        daemon.answers["/localapi/v0/whois"] = answer
        strange = whois("100.64.0.2", socket_path=daemon.path)
        assert (strange.node, strange.asked) == (None, False)
        assert strange.why


@pytest.mark.parametrize(
    "body",
    [None, [], {"Node": None}, {"Node": []}, {"Node": {"StableID": ""}}],
)
def test_what_names_nobody_is_nobody(body: Any) -> None:
    assert parse_node(body) is None


def test_a_node_of_strange_fields_is_what_can_be_read_of_it() -> None:
    body = {"Node": {"StableID": "n1", "Name": 7, "Tags": {"a": 1}, "Hostinfo": [], "KeyExpiry": "soon"}}
    assert parse_node(body) == TailnetNode(stable_id="n1", name="n1", owner="")
    assert parse_node({"Node": {"StableID": "n1", "Name": "\ud800."}}) is not None


# ---------------------------------------------------------------- callers and pins


def test_a_worker_is_pinned_to_the_machine_that_it_joins_from_and_the_pin_outlives_a_restart(
    tailnet: Tailnet, daemon: FakeTailscaled, journal: Journal, clock: Clock
) -> None:
    async def play() -> None:
        await tailnet.joined("w1", GPU_AT)
        await tailnet.admit("w1", GPU_AT)
        reborn = Tailnet(daemon.path, journal, clock=clock)
        await reborn.admit("w1", GPU_AT)
        with pytest.raises(ForbiddenError) as refused:
            await reborn.admit("w1", LAPTOP_AT)
        assert refused.value.code == "wrong_node"
        assert "readmit" in refused.value.advice
        assert "laptop.tailnet.test (n2CNTRL)" in str(refused.value)
        assert "gpu.tailnet.test (n1CNTRL)" in str(refused.value)
        with pytest.raises(ForbiddenError, match=r"192\.168\.1\.7, which is not in the tailnet"):
            await reborn.admit("w1", LAN_AT)
        await reborn.admit("w1", GPU_AT)  # the owner is let in all the while
        assert reborn.callers["w1"].address == GPU_AT
        assert "192.168.1.7" in reborn.refused["w1"].verdict.sentence  # and what happened is remembered

    asyncio.run(play())


def test_a_second_registration_does_not_move_the_pin(tailnet: Tailnet, journal: Journal) -> None:
    async def play() -> None:
        await tailnet.joined("w1", GPU_AT)
        await tailnet.joined("w1", LAPTOP_AT)

    asyncio.run(play())
    assert journal.pins()["w1"].stable_id == "n1CNTRL"


def test_where_only_a_warning_is_wanted_the_call_passes_and_is_remembered(
    daemon: FakeTailscaled, journal: Journal, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    tailnet = Tailnet(daemon.path, journal, enforce=False, clock=clock)

    async def play() -> None:
        await tailnet.joined("w1", GPU_AT)
        for _ in range(3):
            await tailnet.admit("w1", LAPTOP_AT)

    asyncio.run(play())
    assert tailnet.refused["w1"].verdict.code == "wrong_node"
    assert tailnet.callers["w1"].address == LAPTOP_AT
    warned = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 1


def test_a_readmitted_worker_may_come_from_another_machine_and_stays_there(tailnet: Tailnet, journal: Journal) -> None:
    async def play() -> None:
        await tailnet.joined("w1", GPU_AT)
        tailnet.unpin("w1")
        tailnet.unpin("w1")  # twice is once
        await tailnet.admit("w1", LAPTOP_AT)
        await tailnet.joined("w1", LAPTOP_AT)
        with pytest.raises(ForbiddenError):
            await tailnet.admit("w1", GPU_AT)

    asyncio.run(play())
    assert journal.pins()["w1"].stable_id == "n2CNTRL"


def test_a_machine_is_asked_for_once_a_minute_and_on_loopback_once_a_connection(
    tailnet: Tailnet, daemon: FakeTailscaled, clock: Clock
) -> None:
    async def play() -> None:
        for port in range(40_000, 40_020):
            await tailnet.admit("w1", ("100.64.0.2", port))
        assert asked(daemon) == 1
        clock.now += ASKED_EVERY_S
        await tailnet.admit("w1", GPU_AT)
        assert asked(daemon) == 2
        for port in (50_001, 50_001, 50_003):
            await tailnet.admit("w1", ("127.0.0.1", port))
        assert asked(daemon) == 4
        found = tailnet.callers["w1"].found
        assert (found.node, found.asked) == (None, True)

    asyncio.run(play())


def test_behind_userspace_tailscale_a_pinned_credential_is_good_from_the_right_port_alone(tailnet: Tailnet) -> None:
    async def play() -> None:
        await tailnet.joined("w1", ("127.0.0.1", 50_001))
        await tailnet.admit("w1", ("127.0.0.1", 50_001))
        for port in (50_002, 50_003):
            with pytest.raises(ForbiddenError):
                await tailnet.admit("w1", ("127.0.0.1", port))

    asyncio.run(play())


def test_a_tailscaled_that_is_silent_for_a_while_does_not_shut_out_who_was_known(
    tailnet: Tailnet, daemon: FakeTailscaled, clock: Clock
) -> None:
    async def play() -> None:
        await tailnet.joined("w1", GPU_AT)
        daemon.answers["/localapi/v0/whois"] = (500, "oops")
        clock.now += ASKED_EVERY_S
        await tailnet.admit("w1", GPU_AT)
        with pytest.raises(UnavailableError) as refused:  # from somewhere else nothing is taken for granted
            await tailnet.admit("w1", LAPTOP_AT)
        assert refused.value.code == "cannot_verify"

    asyncio.run(play())


def test_a_pinned_worker_waits_until_tailscaled_can_tell_and_then_gets_in_soon(
    tailnet: Tailnet, daemon: FakeTailscaled, journal: Journal, clock: Clock
) -> None:
    async def play() -> None:
        await tailnet.joined("w1", GPU_AT)
        reborn = Tailnet(daemon.path, journal, clock=clock)
        daemon.answers["/localapi/v0/whois"] = (500, "oops")
        with pytest.raises(UnavailableError) as refused:
            await reborn.admit("w1", GPU_AT)
        assert refused.value.code == "cannot_verify"
        assert "LYDIAN_NODE_PIN" in refused.value.advice
        daemon.answers.clear()
        clock.now += AGAIN_S
        await reborn.admit("w1", GPU_AT)
        assert "w1" not in reborn.refused

    asyncio.run(play())


def test_without_tailscale_everybody_is_let_in_and_the_reason_is_known(
    journal: Journal, tmp_path: Path, clock: Clock
) -> None:
    tailnet = Tailnet(tmp_path / "nothing.sock", journal, clock=clock)

    async def play() -> None:
        await tailnet.joined("w1", LAN_AT)
        await tailnet.admit("w1", LAN_AT)
        await tailnet.refresh(0.0)

    asyncio.run(play())
    assert "no tailscaled" in tailnet.callers["w1"].found.why
    assert journal.pins() == {}
    assert tailnet.status is None
    assert "no tailscaled" in tailnet.why_none


# ---------------------------------------------------------------- the status


def test_the_status_is_asked_for_when_it_is_old_and_not_more_often(
    tailnet: Tailnet, daemon: FakeTailscaled, clock: Clock
) -> None:
    async def play() -> None:
        for _ in range(5):
            await tailnet.refresh()
        assert len(daemon.calls) == 1
        clock.now += FRESH_S
        await tailnet.refresh()
        assert len(daemon.calls) == 2

    asyncio.run(play())
    assert tailnet.status is not None
    assert [peer.stable_id for peer in tailnet.status.peers] == ["n1CNTRL", "n2CNTRL"]


def test_the_watch_tells_of_every_look_and_warns_of_a_key_once(
    daemon: FakeTailscaled, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    daemon.peers = [replace(ME, key_expiry="2020-01-01T00:00:00Z")]
    tailnet = Tailnet(daemon.path, journal, every_s=0.01)
    seen: list[str] = []

    async def play() -> None:
        enough = asyncio.Event()

        async def look(status: Any) -> None:
            seen.append(status.state)
            if len(seen) == 3:
                enough.set()

        tailnet.on_status = look
        watching = asyncio.create_task(tailnet.watch())
        await asyncio.wait_for(enough.wait(), 60)
        watching.cancel()

    asyncio.run(play())
    assert seen == ["Running"] * 3
    assert caplog.text.count("this machine's Tailscale key expired") == 1


def test_a_token_names_the_machine_where_there_is_one(tailnet: Tailnet) -> None:
    assert tailnet.pinned("lyd_join_x") == "lyd_join_x"
    tailnet.pin = "n0CNTRL"
    assert tailnet.pinned("lyd_join_x") == "lyd_join_x@n0CNTRL"
