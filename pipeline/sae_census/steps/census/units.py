"""Units merged over a range of features: statistics by slice, samples, and the codes of what is kept.

The same for the reduce, which reads what all chosen shards say, and for a node, which reads what some do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64

from sae_census.compute.numbers.documents import DocumentStats
from sae_census.compute.numbers.fits import FitSums
from sae_census.compute.numbers.samples import Samples, SampleSizes
from sae_census.compute.numbers.stats import FeatureStats
from sae_census.errors import CorruptError
from sae_census.io.store.blobs import LocalBlobs
from sae_census.steps.census.partial import RangeTask, Unit, opened
from sae_census.steps.census.spans import Ragged, take_ranges


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What the shards of some units say of a range together."""

    by_slice: dict[str, FeatureStats]
    documents: dict[str, DocumentStats]
    """By slice."""
    samples: Samples
    """With ordinals of shards."""


class Units:
    """The units of a merge; an ordinal is the place of a shard among all of theirs, sorted by id."""

    def __init__(self, blobs: LocalBlobs, units: Sequence[Unit]):
        self._blobs, self._units = blobs, units
        every = np.array([shard_id for unit in units for shard_id in unit.shards])
        order = np.argsort(every)
        self.shard_ids: list[str] = every[order].tolist()
        ordinal = np.empty(len(every), np.int32)
        ordinal[order] = np.arange(len(every), dtype=np.int32)
        sizes = [len(unit.shards) for unit in units]
        self._ordinals = np.split(ordinal, np.cumsum(sizes)[:-1])
        self._unit_of = np.repeat(np.arange(len(units)), sizes)[order]
        self._place_of = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])[order]

    def merged(self, task: RangeTask, sizes: SampleSizes, seed: int) -> Merged:
        """Merge a range, one unit after another.

        Args:
            task: the range.
            sizes: samples kept of a feature.
            seed: of the measure.
        """
        by_slice: dict[str, FeatureStats] = {}
        documents: dict[str, DocumentStats] = {}
        samples = Samples.zero(task.num_features, sizes)
        for unit, ordinals in zip(self._units, self._ordinals, strict=True):
            with opened(self._blobs, unit, task) as partial:
                part, clusters = partial.stats(), partial.documents()
                partial.put_samples(samples, ordinals, seed)
            name = unit.slice
            by_slice[name] = by_slice[name].merge(part) if name in by_slice else part
            documents[name] = documents[name].merge(clusters) if name in documents else clusters
        return Merged(by_slice=by_slice, documents=documents, samples=samples)

    def fits(self) -> FitSums:
        """What all features share, of all units."""
        whole = RangeTask(site=0, start=0, stop=0)
        total = None
        for unit in self._units:
            with opened(self._blobs, unit, whole) as partial:
                part = partial.fits()
            total = total.merge(part) if total else part
        assert total is not None
        return total

    def firing_in(
        self, task: RangeTask, shard: Int32[np.ndarray, " N"], row: Int32[np.ndarray, " N"]
    ) -> list[Int64[np.ndarray, " U"]]:
        """Of contexts kept for silence, the features of the range that fire in each.

        Args:
            task: the range.
            shard: ordinals.
            row: contexts.
        """
        found = [np.zeros(0, np.int64)] * len(row)
        for index in np.unique(self._unit_of[shard]):
            mine = np.flatnonzero(self._unit_of[shard] == index)
            with opened(self._blobs, self._units[index], task) as partial:
                firing = partial.firing_in(self._place_of[shard[mine]], row[mine])
            for i, features in zip(mine, firing, strict=True):
                found[i] = features
        return found

    def codes(
        self,
        task: RangeTask,
        feature: Int64[np.ndarray, " N"],
        shard: Int32[np.ndarray, " N"],
        row: Int32[np.ndarray, " N"],
    ) -> tuple[Ragged, Int32[np.ndarray, " M"]]:
        """The codes of each kept context, from the unit that has them, and the positions of those codes.

        Args:
            task: the range.
            feature: of each, from 0 at the start of the range.
            shard: ordinals; -1 where no codes are wanted.
            row: contexts.

        Raises:
            CorruptError: if a unit lacks what it must have kept.
        """
        begin, end = np.zeros(len(row), np.int64), np.zeros(len(row), np.int64)
        values, positions, offset = [np.zeros(0, np.float32)], [np.zeros(0, np.int32)], 0
        unit_of = np.where(shard < 0, -1, self._unit_of[shard])
        for index in np.unique(unit_of[unit_of >= 0]):
            mine = np.flatnonzero(unit_of == index)
            unit = self._units[index]
            with opened(self._blobs, unit, task) as partial:
                kept = partial.evidence()
            keys = _keys(kept.pair_feature, kept.pair_shard, kept.pair_row, len(unit.shards))
            wanted = _keys(feature[mine], self._place_of[shard[mine]], row[mine], len(unit.shards))
            place = np.searchsorted(keys, wanted)
            if not len(keys) or not np.array_equal(keys[np.minimum(place, len(keys) - 1)], wanted):
                raise CorruptError(f"{unit.stored.key} lacks codes of a kept sample")
            flat, start = take_ranges(kept.code_start[place], kept.code_start[place + 1])
            values.append(kept.value[flat])
            positions.append(kept.position[flat])
            begin[mine], end[mine] = start[:-1] + offset, start[1:] + offset
            offset += len(flat)
        flat, start = take_ranges(begin, end)
        return Ragged(start=start, values=np.concatenate(values)[flat]), np.concatenate(positions)[flat]


def _keys(
    feature: Int64[np.ndarray, " N"], shard: Int32[np.ndarray, " N"], row: Int32[np.ndarray, " N"], num_shards: int
) -> Int64[np.ndarray, " N"]:
    """Sorts as (feature, shard, row) do; a range has few enough features that a million shards still fit."""
    return np.asarray(((feature * num_shards + shard) << 32) | row)
