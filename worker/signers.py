"""Whose signatures of task files count here: the owner's decision, read again each time that it matters.

So who takes a line out of the file has it count from the next piece of work on, without a restart. A key that is added
counts after one: the coordinator, which hands out the work, is told at the start whose signatures count. A file that
can no longer be read, or holds a line that is no key, lets nothing run.
"""

from dataclasses import dataclass
from pathlib import Path

from common.errors import LydianError
from common.signing import Signer, signer_in, signers_in, unavailable

MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Signers:
    """What `--signer` and `--signers` said."""

    lines: tuple[str, ...] = ()
    file: Path | None = None

    def now(self) -> tuple[Signer, ...]:
        """The keys that count.

        Raises:
            LydianError: the file cannot be read (code bad_signers), or a line is no key (bad_key).
        """
        given = tuple(signer_in(line) for line in self.lines)
        if self.file is None:
            return given
        try:
            with self.file.open("rb") as file:
                text = file.read(MOST_BYTES).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise LydianError(
                f"the signers in {self.file} cannot be read: {reason}",
                code="bad_signers",
                advice="The file has one public key a line, as `lydian sign --new-key` prints it; # begins a comment.",
            ) from error
        return tuple(dict.fromkeys((*given, *signers_in(text, str(self.file)))))


def checked(trust: str, signers: Signers) -> Signers:
    """The signers, if they can be used with this --trust.

    Raises:
        LydianError: there is none where they count, some where they do not (code bad_trust), or no way to check
            signatures here (no_signatures); and as `Signers.now`.
    """
    given = signers.now()
    if trust != "signed":
        if given or signers.file:
            raise LydianError(
                f"--signer and --signers count with --trust signed, and trust is {trust}",
                code="bad_trust",
                advice="Add --trust signed, or leave them out.",
            )
        return signers
    if not given:
        raise LydianError(
            "--trust signed names nobody whose signature counts",
            code="bad_trust",
            advice="Add --signer LINE or --signers FILE: `lydian sign --new-key` prints the line.",
        )
    if missing := unavailable():
        raise LydianError(missing, code="no_signatures", advice="Install it, or use --trust listed --allow FILE.")
    return signers
