"""Shamir's secret sharing over GF(2^521 − 1): a secret in n shares, of which any t give it back and t − 1 say nothing.

Pure: randomness is passed in. A share is the value at its holder's point of a polynomial of degree t − 1 whose value at
0 is the secret.

Source: Shamir 1979, "How to share a secret", Communications of the ACM 22 (11).
"""

from collections.abc import Mapping, Sequence

PRIME = 2**521 - 1  # a Mersenne prime: wide enough for any secret of 64 bytes
SHARE_BYTES = 66  # of one share


def share(secret: int, points: Sequence[int], coefficients: Sequence[int]) -> dict[int, int]:
    """Cut a secret into shares.

    Args:
        secret: in [0, PRIME).
        points: of the holders: different numbers in [1, PRIME).
        coefficients: t − 1 numbers in [0, PRIME), drawn uniformly and used for this secret alone.

    Returns:
        point -> share.

    Raises:
        ValueError: a number is out of its range, a point is there twice, or there are fewer points than t.
    """
    if not all(0 <= number < PRIME for number in (secret, *coefficients)):
        raise ValueError("a secret or a coefficient is not in the field")
    if not all(0 < point < PRIME for point in points) or len(set(points)) < len(points):
        raise ValueError(f"the points {sorted(points)} are not different numbers from 1 on")
    if len(points) <= len(coefficients):
        raise ValueError(f"{len(points)} shares were to be cut, of which {len(coefficients) + 1} give the secret back")
    return {point: _value((secret, *coefficients), point) for point in points}


def _value(polynomial: Sequence[int], point: int) -> int:
    """Horner's rule."""
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * point + coefficient) % PRIME
    return value


def reconstruct(shares: Mapping[int, int], threshold: int) -> int:
    """The secret, from `threshold` of its shares: those with the smallest points.

    Whether it is the secret that was shared cannot be known here: a wrong share gives a wrong secret.

    Args:
        shares: point -> share.
        threshold: the t that it was cut with.

    Raises:
        ValueError: there are fewer shares than that.
    """
    if len(shares) < threshold:
        raise ValueError(f"{len(shares)} shares are here, and {threshold} are needed")
    points = sorted(shares)[:threshold]
    secret = 0
    for point in points:
        above, below = 1, 1
        for other in points:
            if other != point:
                above = above * other % PRIME
                below = below * (other - point) % PRIME
        secret = (secret + shares[point] * above * pow(below, -1, PRIME)) % PRIME
    return secret
