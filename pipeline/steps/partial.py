"""Read back what one partial says about a range of features of one SAE.

Samples lie in a partial without their keys: those are functions of the address and are made again here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32, Int64

from pipeline.compute.codes import Codes
from pipeline.compute.documents import DocumentStats
from pipeline.compute.samples import Entries, Samples, firing_keys, silent_keys
from pipeline.compute.stats import FeatureStats
from pipeline.io.blobs import LocalBlobs
from pipeline.io.store import Pack
from pipeline.records import Receipt
from pipeline.steps.shard import shard_key


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeTask:
    """A half-open range of features of one site."""

    site: int
    start: int
    stop: int

    @property
    def num_features(self) -> int:
        """How many features it has."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Codes of the contexts of kept samples of a range: pairs by feature and row, codes by pair."""

    pair_feature: Int64[np.ndarray, " P"]
    """From 0 at the start of the range."""
    pair_row: Int32[np.ndarray, " P"]
    code_start: Int64[np.ndarray, " Q"]
    """Where the codes of each pair start; P + 1, the first is 0."""
    position: Int32[np.ndarray, " M"]
    value: Float32[np.ndarray, " M"]


class PartialRange:
    """One partial, opened for one range."""

    def __init__(self, pack: Pack, receipt: Receipt, task: RangeTask):
        self._pack, self._task = pack, task
        self._salt = shard_key(receipt.shard.shard_id)

    def _read(self, name: str, start: int | None = None, stop: int | None = None) -> np.ndarray:
        return self._pack.read(name, start, stop)

    def _of_range(self, name: str) -> np.ndarray:
        return self._read(name, self._task.start, self._task.stop)

    def stats(self) -> FeatureStats:
        """The statistics of the range."""
        return FeatureStats(**{name: self._of_range(name) for name in FeatureStats.__dataclass_fields__})

    def documents(self) -> DocumentStats:
        """The sums over documents of the range."""
        return DocumentStats(**{name: self._of_range(name) for name in DocumentStats.__dataclass_fields__})

    def codes(self) -> Codes:
        """All codes of the range, features from 0; for partials that keep them."""
        starts = self._read("codes_start", self._task.start, self._task.stop + 1)
        first, last = int(starts[0]), int(starts[-1])
        return Codes(
            feature=np.repeat(np.arange(self._task.num_features, dtype=np.int32), np.diff(starts)),
            row=self._read("codes_row", first, last),
            position=self._read("codes_position", first, last),
            value=self._read("codes_value", first, last),
        )

    def document_tokens(self) -> Int64[np.ndarray, " M"]:
        """Counted tokens of every document of the shard; for partials that keep codes."""
        return self._read("document_tokens")

    def put_samples(self, samples: Samples, ordinal: int, seed: int) -> None:
        """Add the samples of the range to `samples`.

        Args:
            samples: of the range; changed in place.
            ordinal: of the shard, among the shards of the catalog.
            seed: of the measure.
        """
        for name in ("top", "random", "bands"):
            row, position, value = (self._of_range(f"{name}_{column}") for column in ("row", "position", "value"))
            feature, slot = np.nonzero(row >= 0)
            place = (feature, slot)
            if name == "top":
                key = -value[place].view(np.int32).astype(np.int64)
            else:
                key = firing_keys(seed, self._salt, feature + self._task.start, row[place], position[place])
            entries = Entries(
                group=feature,
                key=key,
                shard=np.full(len(feature), ordinal, np.int32),
                row=row[place],
                position=position[place],
                value=value[place],
            )
            if name == "bands":
                samples.put_bands(entries)
            else:
                getattr(samples, name).put(entries)
        rows = self._read("silent_row")
        nowhere = np.zeros(len(rows), np.int32)
        samples.silent.put(
            Entries(
                group=nowhere.astype(np.int64),
                key=silent_keys(seed, self._salt, rows),
                shard=np.full(len(rows), ordinal, np.int32),
                row=rows,
                position=nowhere,
                value=nowhere.astype(np.float32),
            )
        )

    def firing_in(self, row: int) -> Int64[np.ndarray, " U"]:
        """The features of the range (from 0) that fire in a context kept for silence."""
        place = int(np.flatnonzero(self._read("silent_row") == row)[0])
        start, stop = self._read("silent_start", place, place + 2)
        feature = self._read("silent_feature", int(start), int(stop)).astype(np.int64) - self._task.start
        return feature[(feature >= 0) & (feature < self._task.num_features)]

    def silent_keys_of(self, features: Int64[np.ndarray, " N"], row: int, seed: int) -> Int64[np.ndarray, " N"]:
        """For each feature of the range, a key of its own for a context in which it is silent."""
        rows = np.full(len(features), row, np.int32)
        return firing_keys(seed, self._salt, features + self._task.start, rows, np.zeros(len(features), np.int32))

    def evidence(self) -> Evidence:
        """The codes that were kept with the samples of the range."""
        pair_start = self._read("pair_start", self._task.start, self._task.stop + 1)
        first, last = int(pair_start[0]), int(pair_start[-1])
        code_start = self._read("code_start", first, last + 1)
        low, high = int(code_start[0]), int(code_start[-1])
        return Evidence(
            pair_feature=np.repeat(np.arange(self._task.num_features), np.diff(pair_start)),
            pair_row=self._read("pair_row", first, last),
            code_start=code_start - low,
            position=self._read("code_position", low, high),
            value=self._read("code_value", low, high),
        )


@contextmanager
def opened(blobs: LocalBlobs, receipt: Receipt, task: RangeTask) -> Iterator[PartialRange]:
    """The partial that a receipt names, for one range."""
    with Pack(blobs.path(receipt.partial.key)) as pack:
        yield PartialRange(pack, receipt, task)
