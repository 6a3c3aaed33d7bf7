"""Sums that come out the same however they are grouped: fixed-point integers in two int64 limbs.

A total is (high * 2**62 + low) * 2**-scale with 0 <= low < 2**62. Addition is exact, so it is associative and
commutative to the bit, which floating-point addition is not.
"""

import numpy as np
from jaxtyping import Float64, Int64

SUM_SCALE = 40
"""Codes keep 40 binary places: a code of 1e-6 still has six digits."""
SQUARE_SCALE = 48
"""Squares of codes keep 48."""

_LOW_BITS, _PART_BITS = 62, 40
_LOW_MASK, _PART_MASK = (1 << _LOW_BITS) - 1, (1 << _PART_BITS) - 1

Limbs = Int64[np.ndarray, "F 2"]


def zeros(num_totals: int) -> Limbs:
    """Totals of nothing."""
    return np.zeros((num_totals, 2), np.int64)


def headroom(values: Float64[np.ndarray, " N"], scale: int, num_terms: int) -> bool:
    """Whether sums of up to `num_terms` such values stay inside the intermediate int64 parts."""
    largest = float(np.abs(values).max(initial=0))
    return largest * num_terms * 2.0 ** (scale - _PART_BITS) < 2.0**62 and num_terms < 1 << 22


def segment_sums(values: Float64[np.ndarray, " N"], starts: Int64[np.ndarray, " U"], scale: int) -> Limbs:
    """Exact totals of consecutive runs of values, each value rounded once to 2**-scale.

    Args:
        values: nonnegative or negative; float64 with at most 53 significant bits, as any product of two
            float32 is.
        starts: where each run begins; ascending, the first is 0.
        scale: binary places kept.
    """
    if len(starts) == 0:
        return zeros(0)
    scaled = np.rint(values * 2.0**scale)
    high = np.floor(scaled * 2.0**-_PART_BITS)
    low = (scaled - high * 2.0**_PART_BITS).astype(np.int64)
    high_sums = np.add.reduceat(high.astype(np.int64), starts)
    low_sums = np.add.reduceat(low, starts)
    high_sums += low_sums >> _PART_BITS
    low_sums &= _PART_MASK
    shift = _LOW_BITS - _PART_BITS
    rest = high_sums & ((1 << shift) - 1)
    return np.stack([high_sums >> shift, (rest << _PART_BITS) | low_sums], axis=1)


def of(values: Float64[np.ndarray, " N"], scale: int) -> Limbs:
    """Each nonnegative value as a total of its own, rounded once to 2**-scale; for values below 2**(124 - scale)."""
    scaled = np.rint(values * 2.0**scale)
    high = np.floor(scaled * 2.0**-_LOW_BITS)
    low = scaled - high * 2.0**_LOW_BITS
    return np.stack([high.astype(np.int64), low.astype(np.int64)], axis=1)


def segment_totals(limbs: Int64[np.ndarray, "N 2"], starts: Int64[np.ndarray, " U"]) -> Limbs:
    """The totals of consecutive runs of fewer than 2**31 totals; exact.

    Args:
        limbs: the totals.
        starts: where each run begins; ascending, the first is 0.
    """
    if len(starts) == 0:
        return zeros(0)
    half = _LOW_BITS // 2
    mask = (1 << half) - 1
    low = np.add.reduceat(limbs[:, 1] & mask, starts)
    middle = np.add.reduceat(limbs[:, 1] >> half, starts) + (low >> half)
    high = np.add.reduceat(limbs[:, 0], starts) + (middle >> half)
    return np.stack([high, ((middle & mask) << half) | (low & mask)], axis=1)


def add(a: Limbs, b: Limbs) -> Limbs:
    """The totals of both; exact."""
    low = a[:, 1] + b[:, 1]
    return np.stack([a[:, 0] + b[:, 0] + (low >> _LOW_BITS), low & _LOW_MASK], axis=1)


def to_float(limbs: Limbs, scale: int) -> Float64[np.ndarray, " F"]:
    """The totals as float64: two roundings, relative error below 4e-16."""
    negative = limbs[:, 0] < 0  # read out the magnitude, or the two limbs would cancel
    high = np.where(negative, -limbs[:, 0] - (limbs[:, 1] > 0), limbs[:, 0]).astype(np.float64)
    low = np.where(negative, -limbs[:, 1] & _LOW_MASK, limbs[:, 1]).astype(np.float64)
    size = np.ldexp(high, _LOW_BITS - scale) + np.ldexp(low, -scale)
    return np.asarray(np.where(negative, -size, size))
