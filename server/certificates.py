"""The coordinator's certificate: where it comes from, what it says, and a newer one in the place of an old.

    --tls self-made ──make once──▶ STATE/tls.pem ─────────────┐             pinned: tokens name its SHA-256
    --tls tailscale ──ask twice a day──▶ STATE/tls-tailscale.pem ├─▶ SSLContext   verified by the world's authorities
    --tls CERT.pem [--tls-key KEY.pem] ───────────────────────┘             verified by whoever vouches for it

TLS 1.3, and nothing below. The two files of the state folder hold key and certificate, 0600. A file that changed is
taken for the connections that come after; one that is no certificate is said, and the old one stays.
"""

import asyncio
import logging
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from common.errors import LydianError
from common.pins import pin_of
from common.tailscale import TailscaleStatus, tailscale_certificate
from server.auth import tighten, write_private

SELF_MADE, FROM_TAILSCALE = "tls.pem", "tls-tailscale.pem"
LOOK_S = 60.0  # between two looks at the files
ASK_S = 12 * 3600.0  # between two questions for a newer certificate
WARNED_EVERY_S = 86_400.0
WARNING = timedelta(days=14)

# A certificate that ends with nobody's clock. Source: RFC 5280, section 4.1.2.5, for one without a well-defined end.
BEGIN, END = datetime(2000, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
NAMES, ADDRESSES = ("lydian", "localhost"), ("127.0.0.1", "::1")  # for what can compare a name, and no digest

log = logging.getLogger("lydian.certificates")

Fetch = Callable[[], str]
"""Returns key and certificates in PEM; raises LydianError where there are none."""


@dataclass(frozen=True)
class Shown:
    """What a certificate says."""

    pin: str  # sha256.…
    ends: datetime
    name: str | None  # the first DNS name that is no pattern


class Certificate:
    """The certificate that the coordinator shows, now and later."""

    def __init__(
        self,
        chain: Path,
        key: Path | None = None,
        *,
        self_made: bool = False,
        fetch: Fetch | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read it.

        Args:
            chain: certificates in PEM, the coordinator's first.
            key: its private key in PEM; None: it is in `chain` too.
            self_made: nobody vouches for it, so it is pinned.
            fetch: where a newer one comes from, for `chain`.
            clock: monotonic seconds.

        Raises:
            LydianError: the files are no certificate with its key (`bad_certificate`).
        """
        self._chain, self._key, self._fetch, self._clock = chain, key, fetch, clock
        self._self_made = self_made
        self._newest, self.shown = _read(chain, key)
        self._seen = self._state()
        self._asked_at, self._warned_at = clock(), clock() - WARNED_EVERY_S
        self.context, _ = _read(chain, key)
        self.context.sni_callback = self._show_newest  # asked for each connection, with a name in it or none
        self.warn_of_end()

    def _show_newest(self, line: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        line.context = self._newest

    @property
    def pin(self) -> str | None:
        """What tokens say of it; None: it is not pinned, since it is another one in a few weeks."""
        return self.shown.pin if self._self_made else None

    @property
    def name(self) -> str | None:
        """The host's name in URLs under which it is trusted; None: under any, since it is pinned, or it says none."""
        return None if self._self_made else self.shown.name

    @property
    def about(self) -> str:
        """In a sentence, for people."""
        if self._self_made:
            return f"TLS with the certificate {self.shown.pin}, made here, which tokens name"
        named = f" for {self.shown.name}" if self.shown.name else ""
        return f"TLS with the certificate {self.shown.pin}{named}, good until {self.shown.ends:%Y-%m-%d}"

    async def watch(self) -> None:
        """Look for a newer one for ever."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self.refresh()

    async def refresh(self) -> None:
        """Take a newer certificate, if there is one; say what stands in the way of it, and when the end is near."""
        if self._fetch is not None and self._clock() - self._asked_at >= ASK_S:
            self._asked_at = self._clock()
            try:
                write_private(self._chain, await asyncio.to_thread(self._fetch))
            except (LydianError, OSError) as error:
                log.warning("no newer certificate: %s", error)
        self._take()
        self.warn_of_end()

    def _take(self) -> None:
        state = self._state()
        if state == self._seen or state is None:
            return
        before = self.shown
        try:
            self._newest, self.shown = _read(self._chain, self._key)
        except LydianError as error:  # one of two files was replaced, and the other will be
            log.warning("%s: the old one is shown until it is", error)
            return
        finally:
            self._seen = state
        if self.shown.pin != before.pin:
            self._warned_at = self._clock() - WARNED_EVERY_S
            log.info("new connections get %s", self.about)

    def warn_of_end(self) -> None:
        """Once a day while the end is near. The wall clock decides nothing but this sentence."""
        left = self.shown.ends - datetime.now(UTC)
        if left < WARNING and self._clock() - self._warned_at >= WARNED_EVERY_S:
            self._warned_at = self._clock()
            days = left / timedelta(days=1)
            ends = f"ends in {days:.1f} days" if days > 0 else f"ended {-days:.1f} days ago"
            log.warning(
                "the certificate in %s %s: who goes by its dates calls no more then; renew it", self._chain, ends
            )

    def _state(self) -> tuple[tuple[int, int, int], ...] | None:
        """Something that is another when a file is; None: one is not there now."""
        try:
            about = [path.stat() for path in (self._chain, self._key) if path is not None]
        except OSError:
            return None
        return tuple((each.st_mtime_ns, each.st_size, each.st_ino) for each in about)


# ---------------------------------------------------------------- the three kinds


def open_certificate(
    how: str, key: Path | None, folder: Path, status: TailscaleStatus | None, tailscaled: Path
) -> Certificate:
    """The certificate that `--tls` asks for.

    Args:
        how: `self-made`, `tailscale`, or a file in PEM.
        key: the file of its key, where that is not in the same.
        folder: the state folder.
        status: tailscaled's; None: there is none.
        tailscaled: its socket.

    Raises:
        LydianError: there is none to be had (`no_certificate`), it cannot be used (`bad_certificate`), or a package is
            missing (`missing_package`).
    """
    _need_cryptography()
    if how == "self-made":
        return _self_made(folder)
    if how == "tailscale":
        return _tailscales(folder, status, tailscaled)
    return Certificate(Path(how).expanduser(), key)


def _self_made(folder: Path) -> Certificate:
    path = folder / SELF_MADE
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not path.exists():
            write_private(path, make())
            log.info("made a certificate of our own: %s", path)
        tighten(path)
    except OSError as error:
        raise LydianError(
            f"a certificate cannot be made in {path}: {error}",
            code="no_certificate",
            advice="Give this user the right to write there, or start with another --state-dir.",
        ) from error
    try:
        return Certificate(path, self_made=True)
    except LydianError as error:
        error.advice = (
            f"Put {path} back from a copy. Without one, move it away: a new one is made, and every worker must be "
            "given the join line anew."
        )
        raise


def _tailscales(folder: Path, status: TailscaleStatus | None, tailscaled: Path) -> Certificate:
    if status is None or status.name is None:
        raise LydianError(
            "tailscaled names no machine to get a certificate for: "
            + ("it does not answer" if status is None else "the tailnet resolves no names (MagicDNS)"),
            code="no_certificate",
            advice="See `tailscale status`, and switch MagicDNS and HTTPS certificates on in Tailscale's admin "
            "console; or take --tls self-made.",
        )
    name, path = status.name, folder / FROM_TAILSCALE

    def fetch() -> str:
        pem, why = tailscale_certificate(name, tailscaled)
        if pem is None:
            raise LydianError(
                f"Tailscale has no certificate for {name}: {why}",
                code="no_certificate",
                advice="HTTPS certificates are switched on in Tailscale's admin console; this user must be root, "
                "tailscaled's operator (`tailscale set --operator=USER`), or the one of TS_PERMIT_CERT_UID.",
            )
        return pem

    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        write_private(path, fetch())
    except LydianError as error:
        if not path.exists():
            raise
        log.warning("%s; the one of before is shown", error)
    return Certificate(path, fetch=fetch)


# ---------------------------------------------------------------- certificates


def make() -> str:
    """A new key and a certificate for it that it signed itself, in PEM: ECDSA with P-256, which every OpenSSL takes."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAMES[0])])
    names = [x509.DNSName(each) for each in NAMES]
    addresses = [x509.IPAddress(ip_address(each)) for each in ADDRESSES]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(BEGIN)
        .not_valid_after(END)
        .add_extension(x509.SubjectAlternativeName([*names, *addresses]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    kept = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return (kept + certificate.public_bytes(serialization.Encoding.PEM)).decode()


def _read(chain: Path, key: Path | None) -> tuple[ssl.SSLContext, Shown]:
    """A context that shows this certificate, and what it says.

    Raises:
        LydianError: it cannot be used (`bad_certificate`).
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # no client of ours comes back with one
    named = f"{chain}" if key is None else f"{chain} with {key}"
    try:
        context.load_cert_chain(chain, key, password="")  # else an encrypted key asks for it on the terminal
        return context, _say(chain.read_bytes())
    except ssl.SSLError as error:
        why = error.reason or str(error)
    except (OSError, ValueError) as error:
        why = str(error)
    raise LydianError(
        f"{named} is no certificate with its key: {why}",
        code="bad_certificate",
        advice="--tls is self-made, tailscale, or a file of certificates in PEM, its own first, then those "
        "between it and its authority; --tls-key is its private key, not encrypted, where that is another file.",
    )


def _say(pem: bytes) -> Shown:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    certificate = x509.load_pem_x509_certificates(pem)[0]
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        names = found.value.get_values_for_type(x509.DNSName)
    except x509.ExtensionNotFound:
        names = []
    name = next((each for each in names if "*" not in each), None)
    return Shown(pin_of(certificate.public_bytes(Encoding.DER)), certificate.not_valid_after_utc, name)


def _need_cryptography() -> None:
    try:
        import cryptography.x509  # noqa: F401
    except ImportError as error:
        raise LydianError(
            f"TLS needs the package cryptography, which cannot be loaded here: {error}",
            code="missing_package",
            advice="pip install 'cryptography>=42'",
        ) from error
