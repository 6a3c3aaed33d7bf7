"""The same documents under two models: per-document products, from partials that keep all codes.

What a document has in common with itself cancels only if both sides are known document by document, and that only
stored codes can say.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from sae_census.compute.comparison import Products
from sae_census.compute.numbers import fixed
from sae_census.compute.numbers.documents import Pieces
from sae_census.io.store.blobs import LocalBlobs
from sae_census.io.store.zarr_files import FEATURE_CHUNK
from sae_census.records import Receipt
from sae_census.steps.census.partial import RangeTask, Unit, opened
from sae_census.steps.census.shard import read_documents
from sae_census.steps.store import layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Where the partials of one side's SAE lie."""

    blobs: LocalBlobs
    measure_id: str

    def receipt(self, shard_id: str) -> Receipt:
        """The receipt of one of its shards.

        Raises:
            CorruptError: if it is missing or damaged.
        """
        key = layout.receipt(self.measure_id, shard_id)
        return Receipt.read(self.blobs.get(key), key)


class _Sums:
    """Products over documents of one value, as they grow."""

    def __init__(self, num_features: int):
        self.values, self.a_with_tokens, self.b_with_tokens = (np.zeros(num_features) for _ in range(3))

    def add(self, start: int, a: "_Side", b: "_Side", y_a: np.ndarray, y_b: np.ndarray) -> None:
        _, in_a, in_b = np.intersect1d(a.key, b.key, assume_unique=True, return_indices=True)
        np.add.at(self.values, start + a.pieces.feature[in_a], y_a[in_a] * y_b[in_b])
        np.add.at(self.a_with_tokens, start + a.pieces.feature, y_a * b.tokens[a.pieces.document])
        np.add.at(self.b_with_tokens, start + b.pieces.feature, y_b * a.tokens[b.pieces.document])

    def finish(self, tokens: float) -> Products:
        return Products(
            values=self.values, a_with_tokens=self.a_with_tokens, b_with_tokens=self.b_with_tokens, tokens=tokens
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """One side's pieces of a shard, for a range of features."""

    pieces: Pieces
    tokens: Int64[np.ndarray, " M"]

    @property
    def key(self) -> Int64[np.ndarray, " N"]:
        return np.asarray(self.pieces.feature.astype(np.int64) * len(self.tokens) + self.pieces.document)

    @property
    def total(self) -> Float64[np.ndarray, " N"]:
        return fixed.to_float(self.pieces.total, fixed.SUM_SCALE)


def products(
    a: Measured,
    b: Measured,
    *,
    preparation_id: str,
    shard_ids: list[str],
    num_features: int,
    num_positions: int,
) -> tuple[Products, Products]:
    """The products of firing counts and of sums of codes, over the documents of some shards.

    Args:
        a: the side whose store also holds the shards.
        b: the other.
        preparation_id: names the shards' folder.
        shard_ids: of shards that both sides have analysed; their order is that of the sums.
        num_features: of the SAE.
        num_positions: tokens of a context.
    """
    counts, codes = _Sums(num_features), _Sums(num_features)
    num_tokens = 0.0
    for shard_id in shard_ids:
        receipts = [side.receipt(shard_id) for side in (a, b)]
        document = read_documents(a.blobs, preparation_id, receipts[0].shard, num_positions)
        for start in range(0, num_features, FEATURE_CHUNK):
            sides = []
            task = RangeTask(site=0, start=start, stop=min(start + FEATURE_CHUNK, num_features))
            for side, receipt in zip((a, b), receipts, strict=True):
                with opened(side.blobs, Unit.of_receipt(receipt), task) as partial:
                    pieces = Pieces.of(partial.codes(), document)
                    sides.append(_Side(pieces=pieces, tokens=partial.document_tokens()))
            one, other = sides
            counts.add(start, one, other, one.pieces.count, other.pieces.count)
            codes.add(start, one, other, one.total, other.total)
        num_tokens += float(one.tokens @ other.tokens)
    return counts.finish(num_tokens), codes.finish(num_tokens)
