"""Secure aggregation: the keys, masks and shares with which a sum is learned and none of its parts.

    keys     each member sends two public keys, and the hash of its own seed           ─▶ Roster: who sums together
    shares   it cuts its seed and its mask key into shares, each sealed for one peer   ─▶ Group: who can be unmasked
    update   y_u = x_u + PRG(seed_u) + Σ_{v>u} PRG(s_uv) − Σ_{v<u} PRG(s_uv)  mod 2^64
    unmask   it opens, of each peer, one share: of the seed of who has sent y, of the mask key of who has not

A member is one attempt at one shard of a round. Everything of a member comes from one secret root of 32 bytes, so that
a restarted worker sends the same bytes again. What is derived for a sum is bound to its roster's digest, which covers
job, round, seal, threshold and every member with shard, attempt, worker and keys: no key has two uses.

Pure but for the package `cryptography`, an extra (`secure`): it is loaded when it is needed. Randomness is passed in.

Source: Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning", figure 4, without
its signatures: keys come by way of the coordinator, which is taken to follow the protocol.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt

from common.errors import BadUpdateError, RefusedError
from common.messages import MEMBERS, Reveal, Roster, SecureKeys, SecureMember
from common.shamir import PRIME, SHARE_BYTES, reconstruct, share

Uint64s = npt.NDArray[np.uint64]

LEAST_MEMBERS = 3  # with two, each would know the other's update from the sum
ROOT_BYTES = SEED_BYTES = 32
PIP = "pip install 'cryptography>=42'"
_ELEMENT, _AES_BLOCK = 8, 16  # bytes
_SALT = b"lydian secure aggregation 1"


def unavailable() -> str:
    """Why this process cannot take part in secure aggregation; empty: it can."""
    try:
        import cryptography.hazmat.primitives.ciphers.aead  # noqa: F401
    except ImportError as error:
        return f"secure aggregation needs the package cryptography ({error}): {PIP}"
    return ""


# ---------------------------------------------------------------- keys


def _derive(secret: bytes, what: str, *parts: bytes) -> bytes:
    """32 bytes for one use, by HKDF-SHA256. Each part is preceded by its length, so that no two uses read alike."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    info = b"".join(len(part).to_bytes(4, "big") + part for part in (what.encode(), *parts))
    return HKDF(SHA256(), 32, _SALT, info).derive(secret)


def _private(raw: bytes) -> Any:  # noqa: ANN401 - cryptography is not loaded with this module
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(raw)


def _public(raw: bytes) -> str:
    return str(_private(raw).public_key().public_bytes_raw().hex())


def _agree(private: bytes, public: str, of: SecureMember) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

    try:
        return bytes(_private(private).exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(public))))
    except ValueError as error:  # a point of small order: both sides would get zeros, and everybody knows them
        raise RefusedError(f"the key of shard {of.shard} ({of.worker}) is none: {error}", code="bad_key") from error


def _check_of(seed: bytes) -> str:
    return hashlib.sha256(_SALT + b" seed" + seed).hexdigest()


@lru_cache(maxsize=16)
def digest_of(roster: Roster) -> str:
    """SHA-256, in hex, of all that a sum is bound to."""
    fields = roster.model_dump(mode="json")
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_roster(roster: Roster, own: SecureMember) -> None:
    """Make sure that a roster is one to send shares to.

    Args:
        roster: as it came.
        own: this member, as it announced itself.

    Raises:
        RefusedError: too few or too many members, a threshold at which a cheating coordinator could have both shares of
            one member, one member twice, or this one is not in it as it announced itself.
    """
    count, shards = len(roster.members), [member.shard for member in roster.members]
    if not LEAST_MEMBERS <= count <= MEMBERS:
        _insecure(f"the roster has {count} members, where {LEAST_MEMBERS} to {MEMBERS} may sum together")
    if not max(count / 2, LEAST_MEMBERS - 1) < roster.threshold <= count:
        least = f"more than half of them, and at least {LEAST_MEMBERS}"
        _insecure(f"the threshold is {roster.threshold} of {count} members; it must be {least}")
    if shards != sorted(set(shards)) or len({member.worker for member in roster.members}) < count:
        _insecure("the roster names a shard or a worker twice, or not in the order of the shards")
    if own not in roster.members:
        _insecure(f"the roster has not this worker's own keys at shard {own.shard}")


def _insecure(sentence: str) -> NoReturn:
    raise RefusedError(sentence, code="insecure", advice="Is the coordinator to be trusted? Its log says what it sent.")


# ---------------------------------------------------------------- masks


@dataclass(frozen=True)
class Mask:
    """One stream of numbers modulo 2^64 that is added to an update, or taken from a sum."""

    key: bytes  # of AES-256, for this stream alone
    sign: Literal[1, -1]

    @property
    def opposite(self) -> "Mask":
        """What takes it away again."""
        return Mask(self.key, -1 if self.sign == 1 else 1)


def stream(key: bytes, first: int, count: int) -> Uint64s:
    """Numbers [first, first + count) of a key's stream: AES-256-CTR from counter 0, read as little-endian integers."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    block, within = divmod(first * _ELEMENT, _AES_BLOCK)
    cipher = Cipher(algorithms.AES(key), modes.CTR(block.to_bytes(_AES_BLOCK, "big"))).encryptor()
    data = cipher.update(bytes(within + count * _ELEMENT))
    return np.frombuffer(data, "<u8", offset=within)


def add_masks(block: Uint64s, first: int, masks: Collection[Mask]) -> None:
    """Add masks to numbers [first, first + len(block)) of an update or a sum, in place."""
    for mask in masks:
        values = stream(mask.key, first, len(block))
        if mask.sign == 1:
            np.add(block, values, out=block)
        else:
            np.subtract(block, values, out=block)


def _self_mask(seed: bytes, roster: str, shard: int) -> Mask:
    return Mask(_derive(seed, "self mask", bytes.fromhex(roster), _number(shard)), 1)


def _pair_mask(mask_key: bytes, own: int, peer: SecureMember, roster: str) -> Mask:
    """What member `own` adds for a peer; the peer adds the opposite."""
    low, high = sorted((own, peer.shard))
    secret = _agree(mask_key, peer.mask_key, peer)
    key = _derive(secret, "pair mask", bytes.fromhex(roster), _number(low), _number(high))
    return Mask(key, 1 if own < peer.shard else -1)


def _number(value: int) -> bytes:
    return value.to_bytes(8, "big")


# ---------------------------------------------------------------- one member


@dataclass(frozen=True)
class Secrets:
    """What one member keeps to itself. Whoever has the root of a member knows its update."""

    root: bytes  # ROOT_BYTES drawn for this attempt alone

    @cached_property
    def _cipher_key(self) -> bytes:
        return _derive(self.root, "cipher key")

    @cached_property
    def _mask_key(self) -> bytes:
        return _derive(self.root, "mask key")

    @cached_property
    def _seed(self) -> bytes:
        return _derive(self.root, "seed")

    def keys(self, attempt: int) -> SecureKeys:
        """What it announces."""
        return SecureKeys(
            attempt=attempt,
            cipher_key=_public(self._cipher_key),
            mask_key=_public(self._mask_key),
            seed_check=_check_of(self._seed),
        )

    def shares(self, roster: Roster, own: int) -> dict[int, str]:
        """Its two secrets, in shares, each pair sealed for one peer.

        Args:
            roster: `check_roster` has passed it.
            own: this member's shard.

        Returns:
            peer's shard -> sealed shares, in hex. The same roster gives the same bytes.
        """
        points = [member.shard + 1 for member in roster.members]
        seed = share(_whole(self._seed), points, self._coefficients("seed", roster))
        key = share(_whole(self._mask_key), points, self._coefficients("mask key", roster))
        sealed = {}
        for peer in roster.members:
            if peer.shard != own:
                pair = seed[peer.shard + 1].to_bytes(SHARE_BYTES, "big") + key[peer.shard + 1].to_bytes(
                    SHARE_BYTES, "big"
                )
                sealed[peer.shard] = self._box(roster, peer, own, peer.shard).encrypt(_ONCE, pair, None).hex()
        return sealed

    def _coefficients(self, of: str, roster: Roster) -> list[int]:
        digest = bytes.fromhex(digest_of(roster))
        key = _derive(self.root, "coefficients", of.encode(), digest)
        drawn = stream(key, 0, 9 * (roster.threshold - 1)).tobytes()  # 72 bytes each, for 521 bits
        return [_whole(drawn[at : at + SHARE_BYTES]) & PRIME for at in range(0, len(drawn), 72)]

    def _box(self, roster: Roster, peer: SecureMember, sender: int, receiver: int) -> Any:  # noqa: ANN401 - see _private
        """What seals the shares of one sender for one receiver. Its key seals this one message, hence no nonce."""
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

        secret, digest = _agree(self._cipher_key, peer.cipher_key, peer), bytes.fromhex(digest_of(roster))
        return ChaCha20Poly1305(_derive(secret, "shares", digest, _number(sender), _number(receiver)))

    def masks(self, roster: Roster, own: int, group: Collection[int]) -> list[Mask]:
        """What it adds to its update: its own mask, and one for each other member of the group."""
        digest = digest_of(roster)
        peers = [member for member in roster.members if member.shard in group and member.shard != own]
        return [_self_mask(self._seed, digest, own), *(_pair_mask(self._mask_key, own, p, digest) for p in peers)]

    def reveal(
        self,
        attempt: int,
        roster: Roster,
        own: int,
        group: Collection[int],
        survivors: Collection[int],
        sealed: Mapping[int, str],
    ) -> Reveal:
        """One share of each member of the group: of the seed of a survivor, of the mask key of who dropped out.

        Never both of one: that is why `survivors` must be the first that was ever asked for (worker.sealing keeps it).

        Args:
            attempt: this member's.
            roster: `check_roster` has passed it.
            own: this member's shard.
            group: the shards whose masks are in the updates.
            survivors: those of them whose updates are summed.
            sealed: sender's shard -> what it has sealed for this member.

        Raises:
            RefusedError: fewer survivors than the threshold, or somebody is in one set and not in the larger one; or a
                peer's shares are missing or do not open.
        """
        check_survivors(roster, own, group, survivors)
        seeds, keys = {}, {}
        for member in roster.members:
            if member.shard not in group:
                continue
            pair = self._open(roster, member, own, sealed)
            if member.shard in survivors:
                seeds[member.shard] = pair[:SHARE_BYTES].hex()
            else:
                keys[member.shard] = pair[SHARE_BYTES:].hex()
        return Reveal(attempt=attempt, roster=digest_of(roster), seeds=seeds, keys=keys)

    def _open(self, roster: Roster, sender: SecureMember, own: int, sealed: Mapping[int, str]) -> bytes:
        from cryptography.exceptions import InvalidTag

        if sender.shard == own:
            points = [member.shard + 1 for member in roster.members]
            seed = share(_whole(self._seed), points, self._coefficients("seed", roster))[own + 1]
            return seed.to_bytes(SHARE_BYTES, "big") + bytes(SHARE_BYTES)  # its own mask key it never opens
        try:
            box = self._box(roster, sender, sender.shard, own)
            pair = bytes(box.decrypt(_ONCE, bytes.fromhex(sealed[sender.shard]), None))
        except (KeyError, ValueError, InvalidTag) as error:
            sentence = f"the shares of shard {sender.shard} ({sender.worker}) do not open: {type(error).__name__}"
            raise RefusedError(sentence, code="bad_shares") from error
        if len(pair) != 2 * SHARE_BYTES:
            raise RefusedError(f"the shares of shard {sender.shard} have {len(pair)} bytes", code="bad_shares")
        return pair


_ONCE = bytes(12)


def _whole(data: bytes) -> int:
    return int.from_bytes(data, "big")


def check_survivors(roster: Roster, own: int, group: Collection[int], survivors: Collection[int]) -> None:
    """Make sure that a question for shares is one that an honest coordinator may ask.

    Raises:
        RefusedError: fewer survivors than the threshold, or somebody is in one set and not in the larger one.
    """
    members = {member.shard for member in roster.members}
    if not set(survivors) <= set(group) <= members or own not in survivors:
        shown = f"survivors {sorted(survivors)}, group {sorted(group)}, roster {sorted(members)}"
        _insecure(f"the sets do not lie in each other with shard {own} in all of them: {shown}")
    if len(survivors) < roster.threshold:
        _insecure(f"{len(survivors)} updates would be summed, and this sum needs {roster.threshold}")


# ---------------------------------------------------------------- the coordinator


def masks_left(
    roster: Roster, group: Sequence[int], survivors: Sequence[int], reveals: Mapping[int, Reveal]
) -> list[Mask]:
    """What takes every mask out of the sum of the survivors' updates.

    Args:
        roster: who summed together.
        group: the shards whose masks are in the updates.
        survivors: those of them whose updates are in the sum.
        reveals: shard -> the shares that its member opened; at least as many as the threshold.

    Raises:
        BadUpdateError: bad_shares: too few were opened, or they do not give back what a member had announced.
    """
    if len(reveals) < roster.threshold:
        raise BadUpdateError(
            f"{len(reveals)} members opened their shares, and {roster.threshold} are needed", code="bad_shares"
        )
    digest, of, left = digest_of(roster), {member.shard: member for member in roster.members}, list[Mask]()
    for shard in group:
        member = of[shard]
        if shard in survivors:
            seed = _secret({at: reveal.seeds for at, reveal in reveals.items()}, member, roster.threshold)
            if _check_of(seed) != member.seed_check:
                _wrong(member, "seed")
            left.append(_self_mask(seed, digest, shard).opposite)
            continue
        key = _secret({at: reveal.keys for at, reveal in reveals.items()}, member, roster.threshold)
        if _public(key) != member.mask_key:
            _wrong(member, "mask key")
        # The dropped one's mask for a survivor is the opposite of the one that is in the sum.
        left += [_pair_mask(key, shard, of[survivor], digest) for survivor in survivors]
    return left


def _secret(opened: Mapping[int, Mapping[int, str]], member: SecureMember, threshold: int) -> bytes:
    shares = {at + 1: _whole(bytes.fromhex(of[member.shard])) for at, of in opened.items() if member.shard in of}
    try:
        return reconstruct(shares, threshold).to_bytes(SHARE_BYTES, "big")[-SEED_BYTES:]
    except ValueError as error:
        raise BadUpdateError(f"shard {member.shard} ({member.worker}): {error}", code="bad_shares") from error


def _wrong(member: SecureMember, what: str) -> NoReturn:
    sentence = f"the shares of the {what} of shard {member.shard} ({member.worker}) do not give back what was announced"
    raise BadUpdateError(sentence, code="bad_shares", advice="One of the workers sent wrong shares: see docs.")
