"""Signatures of task files: Ed25519 keys of people, and what a signature says. Pure but for new keys' randomness.

    lydkey_ada_Wf3…                          a public key, as it is handed on: a name and 32 bytes, base64url
    lydian-task-v1 ‖ 0 ‖ SHA-256 ‖ name      what is signed: this very file, under the name of that key

What decides what code a job runs on a worker is the task file's bytes, and so its SHA-256 is all that is signed: the
job's name, its settings and its data are no code. A built-in task is the worker's own file and needs no signature.

The package cryptography is loaded when a key is used, not before. A public key does not begin with `lyd_`: what does
is a secret, and is blacked out wherever it is seen.
"""

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import LydianError
from common.messages import TaskRef, TaskSignature

DOMAIN = b"lydian-task-v1\0"
PIP = "pip install 'cryptography>=42'"
KEY_BYTES = 32
KEY_ID_DIGITS = 16

_LINE = re.compile(r"lydkey_([A-Za-z0-9._-]{1,63})_([A-Za-z0-9_-]{43})")


def unavailable() -> str:
    """Why this process can neither sign nor check signatures; empty: it can."""
    try:
        import cryptography.hazmat.primitives.asymmetric.ed25519  # noqa: F401
    except ImportError as error:
        return f"signatures need the package cryptography ({error}): {PIP}"
    return ""


@dataclass(frozen=True)
class Signer:
    """Somebody's public key."""

    name: str
    public: bytes  # KEY_BYTES

    @property
    def id(self) -> str:
        """Names the key in few digits: the first of the SHA-256 of its bytes."""
        return hashlib.sha256(self.public).hexdigest()[:KEY_ID_DIGITS]

    @property
    def line(self) -> str:
        """The key as it is handed on."""
        return f"lydkey_{self.name}_{_text(self.public)}"


def signer_in(line: str) -> Signer:
    """The key that a line holds.

    Raises:
        LydianError: it holds none (code bad_key).
    """
    found = _LINE.fullmatch(line.strip())
    try:
        public = _bytes(found[2]) if found else b""
    except ValueError:
        public = b""
    if found is None or len(public) != KEY_BYTES:
        raise LydianError(
            f"{line.strip()[:100]!r} is no public key of a signer",
            code="bad_key",
            advice="It looks like lydkey_NAME_ and 43 characters: `lydian sign --new-key FILE` prints it.",
        )
    return Signer(found[1], public)


def signers_in(text: str, where: str) -> tuple[Signer, ...]:
    """The keys of a list, one a line; # begins a comment.

    Args:
        text: the list.
        where: what it is called in a sentence.

    Raises:
        LydianError: a line holds no key (code bad_key); it is named.
    """
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if bare := line.partition("#")[0].strip():
            try:
                found.append(signer_in(bare))
            except LydianError as error:
                raise LydianError(f"{where}, line {number}: {error}", code=error.code, advice=error.advice) from None
    return tuple(dict.fromkeys(found))


# ---------------------------------------------------------------- signing, and looking at a signature


def signed_message(digest: str, name: str) -> bytes:
    """The bytes that a signature is over.

    Args:
        digest: SHA-256 of the task file, in hex.
        name: of the key.
    """
    return DOMAIN + bytes.fromhex(digest) + name.encode()


def sign(digest: str, name: str, private: Any) -> TaskSignature:  # noqa: ANN401 - cryptography is not loaded here
    """Sign a task file.

    Args:
        digest: SHA-256 of the file, in hex.
        name: of the key.
        private: an Ed25519PrivateKey.
    """
    signature = private.sign(signed_message(digest, name))
    signer = Signer(name, private.public_key().public_bytes_raw())
    return TaskSignature(name=name, key=signer.id, digest=digest, signature=_text(signature))


def is_by(signature: TaskSignature, signer: Signer) -> bool:
    """Whether a signature was made with this key, over the digest and the name that it has."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = Ed25519PublicKey.from_public_bytes(signer.public)
        key.verify(_bytes(signature.signature), signed_message(signature.digest, signature.name))
    except (InvalidSignature, ValueError):  # ValueError: the bytes of the key are none
        return False
    return True


def why_unsigned(task: TaskRef, signers: Sequence[Signer]) -> str:
    """Why no signature of a task is one of these signers'; empty: one is.

    Args:
        task: a user's file by digest, with the signatures that came with it.
        signers: whose signatures count.
    """
    if not task.signatures:
        return f"{task_words(task)} is not signed"
    reasons = []
    for signature in task.signatures:
        if signature.digest != task.digest:
            reasons.append(f"{who(signature)} signed another file ({signature.digest[:12]}…)")
            continue
        known = [signer for signer in signers if signer.id == signature.key]
        if any(is_by(signature, signer) for signer in known):
            return ""
        unknown = f"it is signed by {who(signature)}, whose key is not listed here"
        reasons.append(f"the signature of {who(signature)} is not right" if known else unknown)
    return f"{task_words(task)} has no signature that counts here: {'; '.join(reasons)}"


def task_words(task: TaskRef) -> str:
    """A user's task, for people."""
    return f"task {task.name} ({(task.digest or '')[:12]}…)"


def who(signature: TaskSignature) -> str:
    """Who says to have signed, for people; only the id of the key can be relied on."""
    return f"{signature.name} (key {signature.key})"


def whos(signatures: Iterable[TaskSignature]) -> str:
    """All of them."""
    return ", ".join(who(signature) for signature in signatures)


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _bytes(text: str) -> bytes:
    """The bytes that a text is the one spelling of.

    Raises:
        ValueError: it is not base64url without padding, or spells them in another way.
    """
    raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    if _text(raw) != text:
        raise ValueError("not the one spelling of its bytes")
    return raw
