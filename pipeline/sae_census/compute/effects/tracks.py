"""Codes of one running sequence, collected forward by forward, and read as one sparse tensor.

A cached generation gives a context in pieces: a piece that begins `past` tokens after the start of the cache
goes on there, and replaces what was collected from that place on.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sae_census.compute.numbers.codes import Codes, concatenate, empty
from sae_census.errors import ArgumentError


class TopFeatures(NamedTuple):
    """The strongest features of every token, strongest first; among equals the lowest id."""

    indices: Int64[Tensor, "B T k"]
    """-1 where fewer than k features fire."""
    values: Float[Tensor, "B T k"]
    """0 there."""


@dataclass(slots=True, kw_only=True)
class Track:
    """The codes of B contexts at one hook point, from the first piece to the last."""

    num_features: int
    first: int
    """Tokens that the cache held before the first piece; they are not part of the track."""
    num_rows: int = 0
    num_positions: int = 0
    _parts: list[Codes] = field(default_factory=list)

    @property
    def end(self) -> int:
        """Tokens of the sequence up to the end of the track, those before its first piece included."""
        return self.first + self.num_positions

    def extend(self, codes: Codes, num_rows: int, num_positions: int, past: int) -> None:
        """Add the codes of the next piece, whose rows and positions count from 0.

        Args:
            codes: of the piece.
            num_rows: of the piece; several rows may go on where one stopped, and all of them began as it did.
            num_positions: of the piece.
            past: tokens before the piece, from `first` to `end`.

        Raises:
            ArgumentError: if the piece has another number of rows, and the track has not just one.
        """
        self.cut(past)
        if self.num_rows not in (0, 1, num_rows):
            raise ArgumentError(
                f"a forward with {num_rows} rows goes on where one with {self.num_rows} stopped; expected equal rows, "
                "or several that all go on where one row stopped; give rows that will part ways as rows from the start"
            )
        if self.num_rows == 1 < num_rows:
            self._parts = [_for_all_rows(part, num_rows) for part in self._parts]
        self.num_rows = num_rows
        start = self.num_positions
        self._parts.append(replace(codes, position=codes.position + np.int32(start)))
        self.num_positions = start + num_positions

    def cut(self, past: int) -> None:
        """Drop what comes after the first `past` tokens of the sequence."""
        keep = max(past - self.first, 0)
        if keep < self.num_positions:
            self._parts = [part.where(part.position < keep) for part in self._parts]
            self.num_positions = keep

    def copy(self) -> "Track":
        """The same codes, to go on by themselves."""
        return replace(self, _parts=list(self._parts))

    def sparse(self) -> Float[Tensor, "B T F"]:
        """The codes as a coalesced sparse COO tensor on the CPU; `.to_dense()` spells out the zeros."""
        codes = self._codes()
        where = torch.from_numpy(np.stack([codes.row, codes.position, codes.feature]).astype(np.int64))
        shape = (self.num_rows, self.num_positions, self.num_features)
        tensor = torch.sparse_coo_tensor(where, torch.from_numpy(codes.value), shape, check_invariants=True)
        return tensor.coalesce()

    def top(self, k: int) -> TopFeatures:
        """The min(k, F) strongest features of every token."""
        codes, k = self._codes(), min(k, self.num_features)
        token = codes.row.astype(np.int64) * self.num_positions + codes.position
        order = np.lexsort((codes.feature, -codes.value, token))
        token = token[order]
        place = np.arange(len(token)) - np.searchsorted(token, token)  # among the codes of its token
        keep = place < k
        indices = np.full((self.num_rows * self.num_positions, k), -1, np.int64)
        values = np.zeros(indices.shape, np.float32)
        indices[token[keep], place[keep]] = codes.feature[order][keep]
        values[token[keep], place[keep]] = codes.value[order][keep]
        shape = (self.num_rows, self.num_positions, k)
        return TopFeatures(torch.from_numpy(indices).view(shape), torch.from_numpy(values).view(shape))

    def _codes(self) -> Codes:
        return concatenate(self._parts, self.num_positions) if self._parts else empty()


def _for_all_rows(codes: Codes, num_rows: int) -> Codes:
    """The codes of one row in each of several."""
    repeated = [replace(codes, row=codes.row + np.int32(row)) for row in range(num_rows)]
    return concatenate(repeated, int(codes.position.max(initial=0)) + 1)
