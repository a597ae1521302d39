"""Who calls, over which path, and what is said of it: the pure part."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.messages import Link, TailnetNode, TailnetPath
from common.tailscale import Peer, TailscaleStatus, Whois
from server.paths import Verdict, is_loopback, judge, path_to, warnings

NOW = datetime(2026, 8, 1, tzinfo=UTC)
GPU = TailnetNode(stable_id="n1CNTRL", name="gpu.tailnet.test", owner="tag:lydian-worker", os="linux")
OTHER = TailnetNode(stable_id="n2CNTRL", name="laptop.tailnet.test", owner="alice@example.com")
LINK = Link(down=250_000, up=125_000, latency_s=0.2)
SILENT = Whois(None, "tailscaled did not answer", asked=False)
NOBODY = Whois(None, "100.64.0.9 is no address of a machine of the tailnet")

nodes = st.sampled_from([GPU, OTHER])
founds = st.sampled_from([Whois(GPU), Whois(OTHER), SILENT, NOBODY])


# ---------------------------------------------------------------- whose credential


@given(founds)
def test_a_credential_that_is_not_pinned_is_good_from_anywhere(found: Whois) -> None:
    assert judge(None, "100.64.0.9", found) == Verdict()


@given(nodes, founds)
def test_a_pinned_credential_passes_from_its_own_machine_alone(pinned: TailnetNode, found: Whois) -> None:
    passes = judge(pinned, "100.64.0.9", found).code == ""
    assert passes == (found.node == pinned)


def test_a_machine_that_was_renamed_and_has_another_owner_is_the_same() -> None:
    renamed = GPU.model_copy(update={"name": "gpu-1.tailnet.test", "owner": "bob@example.com"})
    assert judge(GPU, "100.64.0.9", Whois(renamed)) == Verdict()


@pytest.mark.parametrize(
    ("found", "code", "words"),
    [
        (Whois(OTHER), "wrong_node", ["laptop.tailnet.test (n2CNTRL)", "gpu.tailnet.test (n1CNTRL)"]),
        (NOBODY, "wrong_node", ["100.64.0.9, which is not in the tailnet", "gpu.tailnet.test"]),
        (SILENT, "cannot_verify", ["100.64.0.9", "did not answer", "gpu.tailnet.test"]),
    ],
)
def test_a_verdict_names_both_machines_and_why(found: Whois, code: str, words: list[str]) -> None:
    verdict = judge(GPU, "100.64.0.9", found)
    assert verdict.code == code
    for word in words:
        assert word in verdict.sentence


# ---------------------------------------------------------------- which path


def status(**peer: object) -> TailscaleStatus:
    others = (Peer("n7CNTRL", ("100.64.0.7",), direct="192.0.2.7:1"),)
    this = (Peer("n1CNTRL", ("100.64.0.2",), **peer),) if peer else ()  # type: ignore[arg-type]
    return TailscaleStatus("Running", stable_id="n0CNTRL", peers=others + this)


@pytest.mark.parametrize(
    ("peer", "kind", "via"),
    [
        ({"direct": "192.0.2.1:41641", "relay": "fra", "active": True}, "direct", "192.0.2.1:41641"),
        ({"peer_relay": "192.0.2.9:7777:vni:3", "relay": "fra", "active": True}, "peer relay", "192.0.2.9:7777:vni:3"),
        ({"relay": "fra", "active": True}, "relay", "fra"),
        ({"relay": "fra", "active": False}, "unknown", ""),
        ({"relay": "", "active": True}, "unknown", ""),
    ],
)
def test_the_path_is_the_one_that_packets_take(peer: dict[str, object], kind: str, via: str) -> None:
    path = path_to("100.64.0.2", GPU, status(**peer))
    assert (path.kind, path.via) == (kind, via)


def test_a_machine_that_the_status_does_not_know_has_no_path_that_is_known() -> None:
    assert path_to("100.64.0.2", GPU, status()).kind == "unknown"
    assert path_to("100.64.0.2", GPU, None).kind == "unknown"


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("127.0.0.1", "loopback"),
        ("::1", "loopback"),
        ("::ffff:127.0.0.1", "loopback"),
        ("192.168.1.7", "other"),
        ("100.64.0.9", "other"),  # a carrier's: only tailscaled can say that it is in the tailnet
        ("", "other"),
    ],
)
def test_a_caller_that_tailscale_does_not_know_is_on_this_machine_or_comes_another_way(address: str, kind: str) -> None:
    assert path_to(address, None, status()).kind == kind
    assert is_loopback(address) == (kind == "loopback")


def test_a_worker_beside_the_coordinator_is_on_loopback_although_it_calls_the_tailnet_address() -> None:
    me = GPU.model_copy(update={"stable_id": "n0CNTRL"})
    assert path_to("100.64.0.1", me, status(relay="fra")).kind == "loopback"


def test_in_userspace_mode_a_caller_from_loopback_has_the_path_of_its_machine() -> None:
    assert path_to("127.0.0.1", GPU, status(relay="fra", active=True)).kind == "relay"


# ---------------------------------------------------------------- what is said

DIRECT, RELAYED = TailnetPath(kind="direct", via="192.0.2.1:1"), TailnetPath(kind="relay", via="fra")


@given(
    st.sampled_from(["direct", "loopback", "other", "unknown"]),
    st.sampled_from([None, LINK]),
    st.sampled_from([None, GPU]),
)
def test_nothing_is_said_of_a_path_that_is_not_relayed(kind: str, link: Link | None, node: TailnetNode | None) -> None:
    path = TailnetPath.model_validate({"kind": kind})
    assert warnings(path, node, link, Verdict(), now=NOW) == ()
    assert warnings(None, node, link, Verdict(), now=NOW) == ()


def test_a_relayed_path_is_warned_of_with_its_speed_and_what_helps() -> None:
    (said,) = warnings(RELAYED, GPU, LINK, Verdict(), now=NOW)
    assert said.startswith("relayed by fra, which is slow (2.0 Mbit/s down, 1.0 Mbit/s up): ")
    assert "41641" in said
    (said,) = warnings(RELAYED, GPU, None, Verdict(), now=NOW)
    assert "Mbit/s" not in said
    (said,) = warnings(TailnetPath(kind="peer relay", via="192.0.2.9:7"), GPU, None, Verdict(), now=NOW)
    assert said == "relayed by the peer relay 192.0.2.9:7, which is slow"


@pytest.mark.parametrize(
    ("days", "said"), [(None, ""), (15, ""), (13, "expires in 13.0 days"), (-1, "expired 1.0 days ago")]
)
def test_a_workers_key_is_warned_of_two_weeks_before_its_end(days: float | None, said: str) -> None:
    expiry = None if days is None else NOW + timedelta(days=days)
    found = warnings(DIRECT, GPU.model_copy(update={"key_expiry": expiry}), LINK, Verdict(), now=NOW)
    assert bool(found) == bool(said)
    assert said in "".join(found)


def test_a_credential_on_another_machine_goes_before_everything_else() -> None:
    verdict = judge(GPU, "100.64.0.9", Whois(OTHER))
    found = warnings(RELAYED, GPU, LINK, verdict, now=NOW)
    assert found[0].startswith(verdict.sentence)
    assert len(found) == 2
