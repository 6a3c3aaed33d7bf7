"""Keyed hashes of addresses: which firings and contexts a sample draws, whoever draws it and in whatever order."""

import numpy as np
from jaxtyping import Int32, Int64, UInt64

NO_KEY = np.iinfo(np.int64).max
"""Greater than every key."""


def firing_keys(
    seed: int,
    shard_key: int | UInt64[np.ndarray, " N"],
    feature: Int32[np.ndarray, " N"] | Int64[np.ndarray, " N"],
    row: Int32[np.ndarray, " N"],
    position: Int32[np.ndarray, " N"],
) -> Int64[np.ndarray, " N"]:
    """The keyed hash of each firing, uniform over nonnegative int64 (but the largest) and independent of the plan.

    Args:
        seed: the key.
        shard_key: 64 bits of the shard's id, of all firings or of each.
        feature: ids in the whole dictionary, whatever range is at hand.
        row: context in the shard.
        position: token in the context.
    """
    features = np.arange(int(feature.max(initial=0)) + 1, dtype=np.uint64)
    salt = _mix(features ^ _mix(np.uint64(seed)))
    # of one shard, a mix for every feature is cheaper than one for every firing
    salt = _mix(salt ^ np.uint64(shard_key))[feature] if isinstance(shard_key, int) else _mix(salt[feature] ^ shard_key)
    token = (row.astype(np.uint64) << np.uint64(32)) | position.astype(np.uint64)
    return _as_key(_mix(token ^ salt))


def silent_keys(
    seed: int, shard_key: int | UInt64[np.ndarray, " N"], row: Int32[np.ndarray, " N"] | Int64[np.ndarray, " N"]
) -> Int64[np.ndarray, " N"]:
    """The keyed hash of each context."""
    salt = np.uint64(shard_key) if isinstance(shard_key, int) else shard_key
    return _as_key(_mix(row.astype(np.uint64) ^ _mix(np.uint64(seed) ^ salt)))


def _as_key(mixed: UInt64[np.ndarray, " N"]) -> Int64[np.ndarray, " N"]:
    return np.minimum((mixed >> np.uint64(1)).astype(np.int64), NO_KEY - 1)


def _mix(x: UInt64[np.ndarray, "..."] | np.uint64) -> UInt64[np.ndarray, "..."]:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection that scatters every bit."""
    with np.errstate(over="ignore"):
        x = np.asarray(x, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(x ^ (x >> np.uint64(31)), np.uint64)
