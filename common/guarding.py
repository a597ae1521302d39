"""What a connection to the coordinator must show before one byte of a call, and so of a token, goes over it.

    https://, with a pin     the very certificate that is pinned: no authority, no name and no date counts beside it
    https://, without        a certificate that this system's authorities, or those of SSL_CERT_FILE, vouch for
    http://                  the other end has an address of loopback or of a tailnet, unless `insecure`

TLS 1.3 or nothing. Looked at for each connection, whoever makes it and why: calls, parallel streams, those that take
the place of a broken one. Through a proxy, https:// is looked at behind it; for http:// the proxy is the other end.
"""

import ssl
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx2

from common.errors import LydianError, UnavailableError
from common.networks import is_address, is_sheltered
from common.pins import pin_of

REFUSALS = ("wrong_certificate", "untrusted_certificate", "no_tls", "plain_http")
"""Codes of the errors that say: somebody is there, and is told nothing. Waiting alone will hardly mend them."""

NO_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "UNEXPECTED_MESSAGE")
"""OpenSSL's reasons when the other end answers, and not in TLS."""

DATES = (9, 10)  # OpenSSL's verdicts (X509_V_ERR) that a certificate does not count yet, or no more
OUT_OF_DATE = "Is this machine's clock right? If it is, whoever runs the coordinator has to renew its certificate."
UNKNOWN = (
    "Is the URL's name one of the certificate's? Of a certificate that `lydian serve` made itself, the token as it is "
    "printed has the pin (@sha256.…), or give --pin or LYDIAN_PIN; SSL_CERT_FILE names an authority of your own."
)

Trace = Callable[[str, dict[str, Any]], None]
"""Told of each step of a connection, as httpx2 does it for the extension `trace` of a request."""


class WrongCertificateError(ssl.SSLCertVerificationError):
    """The other end showed another certificate than the pinned one."""

    def __init__(self, shown: str, pinned: str) -> None:
        super().__init__(f"the certificate {shown} was shown, and {pinned} is pinned")
        self.shown, self.pinned = shown, pinned


class _Pinned(ssl.SSLContext):
    """Trusts one certificate, by its digest. That the other end has its key is part of every handshake."""

    pin: str

    def wrap_socket(self, *arguments: Any, **options: Any) -> ssl.SSLSocket:  # noqa: ANN401 - as they come
        """Shake hands, and look."""
        line = super().wrap_socket(*arguments, **options)
        try:
            self.look_at(line.getpeercert(binary_form=True))  # ValueError: there was no handshake
        except (OSError, ValueError):
            line.close()
            raise
        return line

    def look_at(self, certificate: bytes | None) -> None:
        """Raise WrongCertificateError for another certificate than the pinned one."""
        shown = pin_of(certificate) if certificate is not None else "none"
        if shown != self.pin:
            raise WrongCertificateError(shown, self.pin)


class _PinnedObject(ssl.SSLObject):
    """The same for TLS inside TLS, through a proxy that is called by https://."""

    def do_handshake(self) -> None:
        """Shake hands, and look."""
        super().do_handshake()
        context = self.context
        assert isinstance(context, _Pinned)  # noqa: S101 - which makes it
        context.look_at(self.getpeercert(binary_form=True))


def pinned_context(pin: str) -> ssl.SSLContext:
    """For connections that show the certificate with this pin, and for no other."""
    context = _Pinned(ssl.PROTOCOL_TLS_CLIENT)
    context.pin = pin
    context.sslobject_class = _PinnedObject
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # by nobody else than `look_at`
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def check_scheme(url: str, pin: str | None) -> None:
    """Refuse to forget a pin.

    Raises:
        LydianError: the URL has no certificate to compare it with (`pin_without_tls`).
    """
    if pin is not None and urlsplit(url).scheme != "https":
        raise LydianError(
            f"{url} is plain HTTP, and the certificate that this coordinator must show was told ({pin})",
            code="pin_without_tls",
            advice="Say https:// in the URL, or, if that coordinator speaks plain HTTP now, paste the token that it "
            "prints now.",
        )


# ---------------------------------------------------------------- plain HTTP


def is_plainly_sheltered(url: str) -> bool:
    """Whether this is an http:// URL with an address on loopback or of a tailnet in it; a name may stand for any."""
    parts = urlsplit(url)
    return parts.scheme == "http" and is_sheltered(parts.hostname or "")


def plain_trace(url: str) -> Trace:
    """Lets no connection to this http:// URL live whose other end is neither on loopback nor in a tailnet."""
    host = urlsplit(url).hostname or ""

    def look(step: str, about: dict[str, Any]) -> None:
        if step.endswith("connect_tcp.started") and is_address(host) and not is_sheltered(host):
            raise _exposed(url, host)  # whatever a proxy makes of it
        if not step.endswith("connect_tcp.complete"):
            return
        line = about["return_value"]
        try:
            address = str(line.get_extra_info("server_addr")[0])
        except OSError as error:  # it was reset the moment it stood
            line.close()
            raise httpx2.ConnectError(f"the connection broke at once: {error}") from error
        if not is_sheltered(address):
            line.close()
            raise _exposed(url, address)

    return look


def _exposed(url: str, address: str) -> UnavailableError:
    return UnavailableError(
        f"{url} is plain HTTP, and {address} is neither on this machine nor in a tailnet: whoever listens on the way "
        "would read the token and everything else, so nothing was sent",
        code="plain_http",
        advice="Start the coordinator with `lydian serve --tls self-made` and paste the line that it prints; "
        "--insecure, or LYDIAN_INSECURE=true, sends it in plain words all the same.",
    )


# ---------------------------------------------------------------- what went wrong, in words


def tls_trouble(url: str, error: BaseException) -> UnavailableError | None:
    """What an error of a connection says about its encryption; None: nothing.

    Args:
        url: the coordinator's.
        error: what was raised; those that led to it are looked at.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, WrongCertificateError):
        return UnavailableError(
            f"what answers at {url} shows the certificate {cause.shown}, and {cause.pinned} is pinned; nothing was "
            "sent to it",
            code="wrong_certificate",
            advice="If the coordinator was set up anew, paste the line that `lydian serve` prints now; if it was not, "
            "somebody else answers at its address.",
        )
    if isinstance(cause, ssl.SSLCertVerificationError):
        return UnavailableError(
            f"the certificate that {url} shows is not trusted here: {cause.verify_message}; nothing was sent to it",
            code="untrusted_certificate",
            advice=OUT_OF_DATE if cause.verify_code in DATES else UNKNOWN,
        )
    if cause is not None and cause.reason in NO_TLS:
        return UnavailableError(
            f"what answers at {url} does not speak TLS ({cause.reason}); nothing was sent to it",
            code="no_tls",
            advice="Is it http://, or another port?",
        )
    return None
