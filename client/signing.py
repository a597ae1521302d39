"""Signing task files: a person's private key in a file of their own, and the signatures beside a task file.

    NAME.key      the private key (PKCS 8, PEM), 0600, not encrypted: who can read it can sign
    task.py.sig   `sha256 DIGEST`, and below it a line for each who signed: name, id of the key, signature

The client has no torch and runs nothing of the file that it signs: who signs has read it.
"""

import hashlib
import os
import re
import stat
from pathlib import Path
from typing import Any

import platformdirs
from pydantic import ValidationError

from client.task_file import read_task
from common.errors import BadTaskError, LydianError
from common.messages import SIGNATURES, TaskSignature
from common.signing import Signer, sign, unavailable

SUFFIX = ".sig"
MOST_BYTES = 1 << 16  # of a file of signatures or a key
_NAME = re.compile(r"[A-Za-z0-9._-]{1,63}")
_HEAD = "# Signatures by `lydian sign`. They are of this very file, and of no other version of it:\n"


def signatures_path(task: Path) -> Path:
    """Where the signatures of a task file are."""
    return task.with_name(task.name + SUFFIX)


def key_folder() -> Path:
    """Where keys are looked for: under XDG_CONFIG_HOME."""
    return Path(platformdirs.user_config_dir("lydian"))


# ---------------------------------------------------------------- keys


def new_key(path: Path) -> Signer:
    """Make a key and write it to a file that is not there yet, 0600. Its name is the file's, without the suffix.

    Raises:
        LydianError: the name cannot be a key's, or the file is there or cannot be written.
    """
    _check_able()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    name = path.stem
    if not _NAME.fullmatch(name):
        raise LydianError(
            f"{name!r} cannot be a signer's name",
            code="bad_name",
            advice="The file's name, without its suffix, has 1 to 63 letters, digits, dots, dashes and underscores.",
        )
    private = Ed25519PrivateKey.generate()
    signer = Signer(name, private.public_key().public_bytes_raw())
    text = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError as error:
        raise LydianError(
            f"{path} is there already, and a key that is gone cannot be had again",
            code="key_exists",
            advice="Give another FILE, or use this key: `lydian sign TASK.py --key FILE`.",
        ) from error
    except OSError as error:
        raise LydianError(f"{path} cannot be written: {error.strerror}", code="bad_key_file") from error
    return signer


def own_key(given: Path | None) -> tuple[Path, Any]:
    """The private key to sign with, and the file that it is in: the one given, else the only one of this user.

    Raises:
        LydianError: there is none, or several, or the file holds none (code bad_key_file).
    """
    _check_able()
    path = given or _only_key()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        with path.open("rb") as file:
            mode, text = stat.S_IMODE(os.fstat(file.fileno()).st_mode), file.read(MOST_BYTES)
        if mode & 0o077:
            raise _bad_key_file(path, f"others may read it (mode {mode:03o})", f"chmod 600 {path}, or make a new one.")
        private = load_pem_private_key(text, password=None)
    except OSError as error:
        raise _bad_key_file(path, f"it cannot be read: {error.strerror}") from error
    except (ValueError, TypeError) as error:  # TypeError: it is encrypted
        raise _bad_key_file(path, "it is no private key that is not encrypted") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise _bad_key_file(path, f"it is of another kind: {type(private).__name__}")
    return path, private


def _only_key() -> Path:
    folder = key_folder()
    found = sorted(folder.glob("*.key"))
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} keys are in {folder}" if found else f"there is no key in {folder}"
    advice = "Name one with --key FILE." if found else f"lydian sign --new-key {folder}/NAME.key makes one."
    raise LydianError(what, code="no_key", advice=advice)


def _bad_key_file(path: Path, why: str, advice: str = "`lydian sign --new-key FILE` makes one.") -> LydianError:
    return LydianError(f"{path} cannot be signed with: {why}", code="bad_key_file", advice=advice)


def _check_able() -> None:
    if missing := unavailable():
        raise LydianError(missing, code="no_signatures", advice="Install it in the environment of `lydian`.")


# ---------------------------------------------------------------- signatures


def sign_file(task: Path, key: Path | None) -> tuple[Path, Signer]:
    """Sign a task file, beside what others have signed of this very version. Returns the file written, and who signed.

    Raises:
        BadTaskError: it is no task file.
        LydianError: there is no key to sign with, or the signature cannot be written.
    """
    path, private = own_key(key)
    digest = hashlib.sha256(read_task(task).encode()).hexdigest()
    made = sign(digest, path.stem, private)
    target = signatures_path(task)
    found, of = _parsed(target) if target.exists() else ((), digest)
    others = tuple(one for one in found if of == digest and one.key != made.key)
    if len(others) >= SIGNATURES:
        raise LydianError(f"{target} has {len(others)} signatures, the most that travel", advice="Take one out.")
    text = _HEAD + f"sha256 {digest}\n"
    text += "".join(f"{one.name} {one.key} {one.signature}\n" for one in (*others, made))
    try:
        part = target.with_name(target.name + ".part")
        part.write_text(text, encoding="ascii")
        part.replace(target)
    except OSError as error:
        raise LydianError(f"{target} cannot be written: {error.strerror}", code="bad_signatures") from error
    return target, Signer(path.stem, private.public_key().public_bytes_raw())


def read_signatures(task: Path, source: str) -> tuple[TaskSignature, ...]:
    """The signatures beside a task file; none where there is no such file.

    Args:
        task: the task file.
        source: its text, as it is sent.

    Raises:
        BadTaskError: they are of another version of the file, or cannot be read.
    """
    path = signatures_path(task)
    if not path.exists():
        return ()
    found, digest = _parsed(path)
    sent = hashlib.sha256(source.encode()).hexdigest()
    if digest != sent:
        raise BadTaskError(
            f"{path} is of another version of {task.name}: {digest[:12]}…, and the file is {sent[:12]}…",
            advice=f"Sign it anew (`lydian sign {task}`), or remove {path.name} to send it unsigned.",
        )
    return found


def _parsed(path: Path) -> tuple[tuple[TaskSignature, ...], str]:
    """The signatures in a file, and the digest that they are of."""
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES).decode("ascii")
        lines = [line for raw in text.splitlines() if (line := raw.partition("#")[0].strip())]
        [[word, digest], *rest] = [line.split() for line in lines]
        if word != "sha256" or not 1 <= len(rest) <= SIGNATURES:
            raise ValueError(word)
        found = tuple(TaskSignature(name=n, key=k, digest=digest, signature=s) for n, k, s in rest)
    except (OSError, ValueError, ValidationError) as error:  # UnicodeDecodeError is a ValueError
        reason = error.strerror if isinstance(error, OSError) else "it is not what `lydian sign` writes"
        raise BadTaskError(
            f"the signatures in {path} cannot be read: {reason}", advice="Sign anew, or remove the file."
        ) from error
    return found, digest
