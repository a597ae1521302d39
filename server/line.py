"""How this coordinator is spoken to: in plain words where nobody else listens, with TLS, or in plain words anyway."""

from dataclasses import dataclass
from typing import Literal

from server.certificates import Certificate

WORDS = Literal["plain", "tls", "insecure"]


@dataclass(frozen=True)
class Line:
    """What the whole process knows of it."""

    certificate: Certificate | None = None  # None: plain HTTP
    exposed: tuple[str, ...] = ()  # addresses where others may read along, as the user allowed

    @property
    def encrypted(self) -> bool:
        """Whether nothing is said in plain words."""
        return self.certificate is not None

    @property
    def word(self) -> WORDS:
        """The same in a word, for the header `Lydian-Line`."""
        return "tls" if self.encrypted else "insecure" if self.exposed else "plain"

    @property
    def pin(self) -> str | None:
        """Of the certificate, where tokens name it."""
        return self.certificate.pin if self.certificate is not None else None
