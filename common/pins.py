"""What a token says, behind an @, of the coordinator that it is for: so that it is shown to no other.

    lyd_join_<id>_<43 characters>[@<StableID>][@sha256.<43 characters>]

    StableID    of its machine in a tailnet; a worker asks its own tailscaled for that (worker/pin.py)
    sha256.…    of its certificate, in base64url; a connection that shows another one is ended (common/guarding.py)

Each may be missing, and they stand in this order. To the coordinator the token is the same with and without. Where the
pins are kept or given alone, they are written as here, without the first @. Pure.
"""

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass

from common.errors import LydianError

NODE = r"[A-Za-z0-9]+"
CERTIFICATE = r"sha256\.[A-Za-z0-9_-]{43}"
SUFFIX = rf"(?:@{NODE})?(?:@{CERTIFICATE})?"

_PINS = re.compile(rf"(?:({NODE})(?:@|$))?({CERTIFICATE})?")
_OPENSSL = re.compile(r"(?:sha-?256[^=:]*[=:])?((?:[0-9a-f]{2}:?){32})", re.IGNORECASE)


@dataclass(frozen=True)
class Pins:
    """What the coordinator must turn out to be; None: that is not told."""

    node: str | None = None  # StableID of its machine
    certificate: str | None = None  # sha256.… of its certificate

    def __str__(self) -> str:
        return "@".join(pin for pin in (self.node, self.certificate) if pin)

    def __bool__(self) -> bool:
        return self.node is not None or self.certificate is not None

    def behind(self, token: str) -> str:
        """A token, that had no pins, with these."""
        return f"{token}@{self}" if self else token

    def over(self, others: "Pins") -> "Pins":
        """These, and what they do not tell from the others."""
        return Pins(self.node or others.node, self.certificate or others.certificate)


NOTHING = Pins()


def split(token: str | None) -> tuple[str | None, Pins]:
    """A token as it was pasted: what the coordinator is told, and what it must turn out to be.

    Raises:
        LydianError: what is behind the @ is cut off or damaged (`bad_pin`). To go on without would be to trust anybody.
    """
    if token is None:
        return None, NOTHING
    bare, sign, pins = token.strip().partition("@")
    return bare, parse(pins) if sign else NOTHING


def parse(text: str) -> Pins:
    """Pins as they are written.

    Raises:
        LydianError: they are none (`bad_pin`).
    """
    found = _PINS.fullmatch(text)
    if not text or found is None or text.endswith("@") or found[1] == "sha256":
        raise LydianError(
            f"{text[:80]!r} behind the @ of a token is neither a machine of a tailnet nor sha256.… of a certificate",
            code="bad_pin",
            advice="Paste the token whole, as `lydian serve` or `lydian token join` printed it.",
        )
    return Pins(found[1], found[2])


def certificate_pin(text: str) -> str:
    """The pin of a certificate, as a person gives it: sha256.… or the fingerprint that OpenSSL prints.

    Raises:
        LydianError: it is neither (`bad_pin`).
    """
    bare = text.strip().removeprefix("@")
    if re.fullmatch(CERTIFICATE, bare):
        return bare
    if hexed := _OPENSSL.fullmatch(bare):
        return _written(binascii.unhexlify(hexed[1].replace(":", "")))
    raise LydianError(
        f"{text[:100]!r} is no pin of a certificate",
        code="bad_pin",
        advice="It is sha256. and 43 characters, as `lydian serve` prints it, or what "
        "`openssl x509 -noout -fingerprint -sha256 -in CERTIFICATE` prints.",
    )


def pin_of(certificate: bytes) -> str:
    """The pin of a certificate in DER."""
    return _written(hashlib.sha256(certificate).digest())


def _written(digest: bytes) -> str:
    return f"sha256.{base64.urlsafe_b64encode(digest).decode().rstrip('=')}"
