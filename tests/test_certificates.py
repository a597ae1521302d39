"""The coordinator's certificate: made once, kept, read, renewed, and warned of."""

import asyncio
import logging
import ssl
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import LydianError
from common.tailscale import TailscaleStatus
from server.certificates import FROM_TAILSCALE, SELF_MADE, Certificate, open_certificate
from tests.fake_tailscaled import FakeTailscaled, Peer
from tests.tls_kit import NAME, issued, pin_in

STATUS = TailscaleStatus("Running", addresses=("100.64.0.1",), name=NAME, stable_id="n0CNTRL")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def shown_by(context: ssl.SSLContext) -> bytes:
    """The certificate that a client is shown, without a network."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    client = trusting.wrap_bio(back, there)  # says no name
    server = context.wrap_bio(there, back, server_side=True)
    for _ in range(3):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert client.version() == "TLSv1.3"
    shown = client.getpeercert(binary_form=True)
    assert shown is not None
    return shown


# ---------------------------------------------------------------- made here


def test_a_self_made_certificate_is_made_once_for_its_owner_alone_and_stays(tmp_path: Path) -> None:
    first = open_certificate("self-made", None, tmp_path / "state", None, tmp_path)
    path = tmp_path / "state" / SELF_MADE
    assert path.stat().st_mode & 0o777 == 0o600
    assert first.pin == pin_in(path)
    path.chmod(0o644)
    again = open_certificate("self-made", None, tmp_path / "state", None, tmp_path)
    assert again.pin == first.pin
    assert path.stat().st_mode & 0o777 == 0o600
    assert first.name is None  # it is trusted under any
    assert ssl.DER_cert_to_PEM_cert(shown_by(again.context)).strip() in path.read_text()


def test_no_clock_ends_a_self_made_certificate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = open_certificate("self-made", None, tmp_path, None, tmp_path)
    known = x509.load_pem_x509_certificate((tmp_path / SELF_MADE).read_bytes())
    assert known.not_valid_before_utc.year == 2000
    assert made.shown.ends == datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
    assert isinstance(known.public_key(), ec.EllipticCurvePublicKey)
    assert known.public_key().curve.name == "secp256r1"
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_self_made_certificate_that_was_damaged_is_never_replaced_in_silence(tmp_path: Path) -> None:
    (tmp_path / SELF_MADE).write_text("-----BEGIN nothing")
    with pytest.raises(LydianError) as refused:
        open_certificate("self-made", None, tmp_path, None, tmp_path)
    assert refused.value.code == "bad_certificate"
    assert "from a copy" in refused.value.advice
    assert (tmp_path / SELF_MADE).read_text() == "-----BEGIN nothing"


def test_without_cryptography_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.x509", None)
    with pytest.raises(LydianError) as refused:
        open_certificate("self-made", None, tmp_path, None, tmp_path)
    assert (refused.value.code, refused.value.advice) == ("missing_package", "pip install 'cryptography>=42'")


# ---------------------------------------------------------------- one's own


def test_ones_own_is_known_by_its_name_and_never_pinned(tmp_path: Path) -> None:
    key, chain = issued()
    (tmp_path / "key.pem").write_text(key)
    (tmp_path / "chain.pem").write_text(chain)
    (tmp_path / "both.pem").write_text(chain + key)
    for one in (
        open_certificate(str(tmp_path / "chain.pem"), tmp_path / "key.pem", tmp_path, None, tmp_path),
        open_certificate(str(tmp_path / "both.pem"), None, tmp_path, None, tmp_path),
    ):
        assert (one.pin, one.name) == (None, NAME)
        assert pin_in(tmp_path / "chain.pem") in one.about


@pytest.mark.parametrize("case", ["no file", "no key", "another's key", "an encrypted key", "no certificate"])
def test_what_is_no_certificate_with_its_key_is_refused_in_a_sentence(tmp_path: Path, case: str) -> None:
    key, chain = issued()
    path, key_path = tmp_path / "chain.pem", tmp_path / "key.pem"
    path.write_text("nothing" if case == "no certificate" else chain)
    key_path.write_text(issued()[0] if case == "another's key" else key)
    if case == "an encrypted key":
        secret = serialization.load_pem_private_key(key.encode(), None)
        how = serialization.BestAvailableEncryption(b"secret")
        pem, kind = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        key_path.write_bytes(secret.private_bytes(pem, kind, how))
    if case == "no file":
        path.unlink()
    with pytest.raises(LydianError) as refused:
        Certificate(path, None if case == "no key" else key_path)
    assert refused.value.code == "bad_certificate"
    assert str(path) in str(refused.value)


def test_a_renewed_file_is_shown_to_new_connections_and_half_of_a_renewal_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key, chain = issued()
    (tmp_path / "key.pem").write_text(key)
    (tmp_path / "chain.pem").write_text(chain)
    certificate = Certificate(tmp_path / "chain.pem", tmp_path / "key.pem")
    old, before = certificate.shown, shown_by(certificate.context)
    key, chain = issued(days=80)
    (tmp_path / "chain.pem").write_text(chain)
    asyncio.run(certificate.refresh())
    assert shown_by(certificate.context) == before
    assert "the old one is shown until it is" in caplog.text
    (tmp_path / "key.pem").write_text(key)
    asyncio.run(certificate.refresh())
    assert certificate.shown.pin == pin_in(tmp_path / "chain.pem") != old.pin
    assert shown_by(certificate.context) == ssl.PEM_cert_to_DER_cert(chain)
    (tmp_path / "chain.pem").unlink()
    asyncio.run(certificate.refresh())
    assert shown_by(certificate.context) == ssl.PEM_cert_to_DER_cert(chain)


@pytest.mark.parametrize(("days", "said"), [(15, ""), (13, "ends in 1"), (-3, "ended 3.0 days ago")])
def test_an_end_that_is_near_is_said_once_a_day(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, days: float, said: str
) -> None:
    (tmp_path / "both.pem").write_text("".join(issued(days=days)))
    clock = Clock()
    certificate = Certificate(tmp_path / "both.pem", clock=clock)
    for _ in range(3):
        asyncio.run(certificate.refresh())
    assert caplog.text.count("the certificate in ") == bool(said)
    assert said in caplog.text
    clock.now += 86_400.0
    asyncio.run(certificate.refresh())
    assert caplog.text.count("the certificate in ") == 2 * bool(said)


# ---------------------------------------------------------------- Tailscale's


def test_tailscales_certificate_is_asked_for_kept_and_renewed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with FakeTailscaled(tmp_path / "tailscaled.sock", [Peer("100.64.0.1", "coordinator")]) as daemon:
        daemon.pair = "".join(issued())
        certificate = open_certificate("tailscale", None, tmp_path / "state", STATUS, daemon.path)
        assert (certificate.pin, certificate.name) == (None, NAME)
        assert daemon.calls == [f"/localapi/v0/cert/{NAME}?type=pair"]
        path = tmp_path / "state" / FROM_TAILSCALE
        assert path.stat().st_mode & 0o777 == 0o600
        clock, before = Clock(), certificate.shown.pin
        certificate._clock, certificate._asked_at = clock, 0.0
        daemon.pair = "".join(issued())
        asyncio.run(certificate.refresh())
        assert certificate.shown.pin == before  # it is not asked every minute
        clock.now = 43_200.0
        asyncio.run(certificate.refresh())
        assert certificate.shown.pin == pin_in(path) != before
        daemon.pair = ""
        clock.now = 86_400.0
        asyncio.run(certificate.refresh())
        assert "no newer certificate: Tailscale has no certificate" in caplog.text
        again = open_certificate("tailscale", None, tmp_path / "state", STATUS, daemon.path)  # restarted meanwhile
        assert again.shown.pin == certificate.shown.pin


@pytest.mark.parametrize(
    ("status", "permits", "why"),
    [
        (None, True, "it does not answer"),
        (TailscaleStatus("Running", addresses=("100.64.0.1",)), True, "MagicDNS"),
        (STATUS, False, "cert access denied"),
        (STATUS, True, "does not support getting TLS certs"),
    ],
)
def test_a_tailnet_without_certificates_says_why_and_what_to_switch_on(
    tmp_path: Path, status: TailscaleStatus | None, permits: bool, why: str
) -> None:
    with FakeTailscaled(tmp_path / "tailscaled.sock", [Peer("100.64.0.1", "coordinator")]) as daemon:
        daemon.permits_cert = permits
        with pytest.raises(LydianError, match=why) as refused:
            open_certificate("tailscale", None, tmp_path, status, daemon.path)
    assert refused.value.code == "no_certificate"
    assert "admin console" in refused.value.advice
