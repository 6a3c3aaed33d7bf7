"""Codes: the nonzero outputs of an SAE as parallel arrays, in one fixed order.

Everything downstream reads runs of equal feature, or of equal (feature, row), off this order; nothing here
knows models, masks or files.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

_TOKEN_BITS = 40  # room for a trillion tokens in a shard beside eight million features


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """Positive codes, sorted by feature, then row, then position; no (feature, row, position) occurs twice.

    Only where `SparseAutoencoder.encode` is asked for signed codes are there negative ones among them.
    """

    feature: Int32[np.ndarray, " N"]
    row: Int32[np.ndarray, " N"]
    """Context, counted from the start of the shard."""
    position: Int32[np.ndarray, " N"]
    """Token in the context, 0 <= position < T."""
    value: Float32[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.value)

    def where(self, keep: Bool[np.ndarray, " N"] | Int64[np.ndarray, " M"]) -> "Codes":
        """The codes at `keep`, a mask or an ascending index."""
        return Codes(
            feature=self.feature[keep], row=self.row[keep], position=self.position[keep], value=self.value[keep]
        )

    def feature_starts(self) -> Int64[np.ndarray, " U"]:
        """Where each run of one feature begins."""
        return _starts(self.feature[1:] != self.feature[:-1], len(self))

    def context_starts(self) -> Int64[np.ndarray, " C"]:
        """Where each run of one (feature, row) begins."""
        return _starts((self.feature[1:] != self.feature[:-1]) | (self.row[1:] != self.row[:-1]), len(self))


def _starts(changes: Bool[np.ndarray, " M"], length: int) -> Int64[np.ndarray, " U"]:
    if length == 0:
        return np.zeros(0, np.int64)
    return np.concatenate([np.zeros(1, np.int64), np.flatnonzero(changes) + 1])


def sorted_codes(
    feature: Int32[np.ndarray, " N"],
    token: Int64[np.ndarray, " N"],
    value: Float32[np.ndarray, " N"],
    *,
    num_positions: int,
    first_row: int = 0,
) -> Codes:
    """Codes from loose arrays in any order.

    Args:
        feature: feature of each code.
        token: index of the token in the batch, row * num_positions + position.
        value: the code; not 0.
        num_positions: T.
        first_row: the shard's row that the batch's row 0 is.
    """
    token = token + first_row * num_positions
    order = np.argsort((feature.astype(np.int64) << _TOKEN_BITS) | token)
    token = token[order]
    return Codes(
        feature=feature[order],
        row=(token // num_positions).astype(np.int32),
        position=(token % num_positions).astype(np.int32),
        value=value[order],
    )


def concatenate(parts: Sequence[Codes], num_positions: int) -> Codes:
    """The codes of several batches as one, in the order that `Codes` keeps. `parts` is not empty."""
    if len(parts) == 1:
        return parts[0]
    row = np.concatenate([part.row for part in parts]).astype(np.int64)
    return sorted_codes(
        np.concatenate([part.feature for part in parts]),
        row * num_positions + np.concatenate([part.position for part in parts]),
        np.concatenate([part.value for part in parts]),
        num_positions=num_positions,
    )


def of_pairs(codes: Codes, pairs: Int64[np.ndarray, " P"]) -> Codes:
    """The codes whose (feature, row) is among `pairs`, packed as feature << 32 | row and sorted."""
    starts = codes.context_starts()
    key = (codes.feature[starts].astype(np.int64) << 32) | codes.row[starts]
    place = np.searchsorted(pairs, key)
    hit = np.zeros(len(key), bool)
    inside = place < len(pairs)
    hit[inside] = pairs[place[inside]] == key[inside]
    return codes.where(np.repeat(hit, np.diff(np.append(starts, len(codes)))))


def empty() -> Codes:
    """No codes at all."""
    ints = np.zeros(0, np.int32)
    return Codes(feature=ints, row=ints, position=ints, value=np.zeros(0, np.float32))
