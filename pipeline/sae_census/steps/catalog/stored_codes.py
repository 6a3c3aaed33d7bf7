"""Codes that were kept with the partials (`codes: keep`): read back by feature, and counted together by context."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32, Int64

from sae_census.io.store.blobs import LocalBlobs
from sae_census.io.store.partials import Partial
from sae_census.records import Receipt, ShardRecord
from sae_census.steps.store import layout


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardCodes:
    """Codes of one shard, by feature, then context, then position."""

    shard_id: str
    feature: Int64[np.ndarray, " N"]
    row: Int32[np.ndarray, " N"]
    position: Int32[np.ndarray, " N"]
    value: Float32[np.ndarray, " N"]


class StoredCodes:
    """The codes of one SAE over the shards of a snapshot, made with `codes: keep`."""

    def __init__(self, blobs: LocalBlobs, measure_id: str, shards: Sequence[ShardRecord]):
        self._blobs, self._measure_id, self._shards = blobs, measure_id, shards

    def of(self, features: Sequence[int] | None = None) -> Iterator[ShardCodes]:
        """The codes of some features, shard by shard; of all, if none are named."""
        for shard in self._shards:
            key = layout.receipt(self._measure_id, shard.shard_id)
            receipt = Receipt.read(self._blobs.get(key), key)
            with Partial(self._blobs.path(receipt.partial.key)) as partial:
                start = partial.read("codes_start")
                wanted = range(len(start) - 1) if features is None else features
                runs = [(int(start[f]), int(start[f + 1])) for f in wanted]
                if features is None:
                    runs = [(0, int(start[-1]))]
                columns = {
                    name: np.concatenate([partial.read(f"codes_{name}", a, b) for a, b in runs])
                    for name in ("row", "position", "value")
                }
                feature = np.repeat(np.array(wanted, np.int64), [int(start[f + 1] - start[f]) for f in wanted])
            yield ShardCodes(shard_id=shard.shard_id, feature=feature, **columns)


def coactive(
    codes: StoredCodes, feature: int, num_features: int
) -> tuple[Int64[np.ndarray, " F"], Int64[np.ndarray, " F"]]:
    """In how many contexts each feature fires at all, and in how many together with `feature`."""
    alone, together = np.zeros(num_features, np.int64), np.zeros(num_features, np.int64)
    for shard in codes.of():
        fresh = np.ones(len(shard.feature), bool)
        fresh[1:] = (shard.feature[1:] != shard.feature[:-1]) | (shard.row[1:] != shard.row[:-1])
        firing, row = shard.feature[fresh], shard.row[fresh]
        alone += np.bincount(firing, minlength=num_features)
        mine = np.isin(row, row[firing == feature])
        together += np.bincount(firing[mine], minlength=num_features)
    return alone, together
