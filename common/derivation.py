"""Keys from a secret: HKDF over SHA-256. Whoever lacks the secret can tell none of them from random bytes.

Pure. Each key has a purpose, a list of plain values; keys of unlike purposes have nothing to do with each other, and
the same secret and purpose give the same key on every machine.

Source: Krawczyk, Eronen 2010, RFC 5869.
"""

import hashlib
import hmac
import json

LONGEST = 255 * hashlib.sha256().digest_size  # bytes that one expansion gives


def derived_key(secret: bytes, *purpose: int | str, size: int = 32) -> bytes:
    """A key for one purpose, e.g. derived_key(seed, "noise", round, tensor).

    Args:
        secret: at least 16 random bytes.
        purpose: as compact ASCII JSON it is HKDF's info, so that 1, "1" and ("a", "b"), ("ab",) stay apart.
        size: bytes, at most LONGEST.
    """
    info = json.dumps(purpose, separators=(",", ":")).encode()
    return hkdf(secret, info=info, size=size)


def hkdf(secret: bytes, *, salt: bytes = b"", info: bytes = b"", size: int = 32) -> bytes:
    """Extract, then expand.

    Args:
        secret: the input keying material.
        salt: not secret; empty is as many zeros as a digest has.
        info: what the key is for.
        size: bytes of the key, 1 to LONGEST.

    Raises:
        ValueError: another size.
    """
    if not 1 <= size <= LONGEST:
        raise ValueError(f"HKDF gives 1 to {LONGEST} bytes, and not {size}")
    extracted = hmac.digest(salt or bytes(hashlib.sha256().digest_size), secret, "sha256")
    key, block, number = b"", b"", 0
    while len(key) < size:
        number += 1
        block = hmac.digest(extracted, block + info + bytes([number]), "sha256")
        key += block
    return key[:size]
