"""Read back what one partial, or one node, says about a range of features of one SAE.

A node is the merge of the partials of several shards, and lies as they do; its samples also say of which shard they
are. Samples lie without their keys: those are functions of the address and are made again here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32, Int64

from sae_census.compute.numbers.codes import Codes
from sae_census.compute.numbers.documents import DocumentStats
from sae_census.compute.numbers.fits import FitSums
from sae_census.compute.numbers.keys import firing_keys, silent_keys
from sae_census.compute.numbers.samples import Entries, Kept, Samples, contexts_at, first_of_each, joined
from sae_census.compute.numbers.stats import FeatureStats
from sae_census.io.store.blobs import LocalBlobs
from sae_census.io.store.partials import Partial
from sae_census.records import Node, Receipt, Stored
from sae_census.steps.census.sampling import shard_key


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
    """Codes of the contexts of kept samples of a range: pairs by feature, shard and row, codes by pair."""

    pair_feature: Int64[np.ndarray, " P"]
    """From 0 at the start of the range."""
    pair_shard: Int32[np.ndarray, " P"]
    """A place in `Unit.shards`."""
    pair_row: Int32[np.ndarray, " P"]
    code_start: Int64[np.ndarray, " Q"]
    """Where the codes of each pair start; P + 1, the first is 0."""
    position: Int32[np.ndarray, " M"]
    value: Float32[np.ndarray, " M"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What is read as one in a merge: the partial of a shard, or a node, the merge of the partials of several."""

    slice: str
    shards: tuple[str, ...]
    """Ids, ascending."""
    stored: Stored
    tokens: dict[str, int]
    contexts: int
    documents: dict[str, int]

    @classmethod
    def of_receipt(cls, receipt: Receipt) -> "Unit":
        """A partial."""
        return cls(
            slice=receipt.shard.slice,
            shards=(receipt.shard.shard_id,),
            stored=receipt.partial,
            tokens=receipt.tokens,
            contexts=receipt.contexts,
            documents=receipt.documents,
        )

    @classmethod
    def of_node(cls, node: Node) -> "Unit":
        """A node."""
        return cls(
            slice=node.slice,
            shards=node.shards,
            stored=node.merged,
            tokens=node.tokens,
            contexts=node.contexts,
            documents=node.documents,
        )


class PartialRange:
    """One partial or node, opened for one range. Its shards are numbered by their places in `Unit.shards`."""

    def __init__(self, partial: Partial, unit: Unit, task: RangeTask):
        self._partial, self._task = partial, task
        self._salts = np.array([shard_key(shard_id) for shard_id in unit.shards], np.uint64)

    def _of_range(self, name: str) -> np.ndarray:
        return self._partial.read(name, self._task.start, self._task.stop)

    def stats(self) -> FeatureStats:
        """The statistics of the range."""
        return FeatureStats(**{name: self._of_range(name) for name in FeatureStats.__dataclass_fields__})

    def documents(self) -> DocumentStats:
        """The sums over documents of the range."""
        return DocumentStats(**{name: self._of_range(name) for name in DocumentStats.__dataclass_fields__})

    def codes(self) -> Codes:
        """All codes of the range, features from 0; for partials that keep them."""
        starts = self._partial.read("codes_start", self._task.start, self._task.stop + 1)
        first, last = int(starts[0]), int(starts[-1])
        return Codes(
            feature=np.repeat(np.arange(self._task.num_features, dtype=np.int32), np.diff(starts)),
            row=self._partial.read("codes_row", first, last),
            position=self._partial.read("codes_position", first, last),
            value=self._partial.read("codes_value", first, last),
        )

    def document_tokens(self) -> Int64[np.ndarray, " M"]:
        """Counted tokens of every document of the shard; for partials that keep codes."""
        return self._partial.read("document_tokens")

    def fits(self) -> FitSums:
        """What all features share, whatever the range."""
        return FitSums(**{name: self._partial.read(name) for name in FitSums.__dataclass_fields__})

    def _shards(self, name: str, start: int, stop: int) -> Int32[np.ndarray, "..."]:
        """The shards of a range of samples; those of a partial are all of its one."""
        if self._partial.has(f"{name}_shard"):
            return self._partial.read(f"{name}_shard", start, stop)
        return np.zeros_like(self._partial.read(f"{name}_row", start, stop))

    def put_samples(self, samples: Samples, ordinals: Int32[np.ndarray, " S"], seed: int) -> None:
        """Add the samples of the range to `samples`.

        Args:
            samples: of the range; changed in place.
            ordinals: of the unit's shards, among all shards of the merge.
            seed: of the measure.
        """
        for name in ("top", "random", "bands"):
            row, position, value = (self._of_range(f"{name}_{column}") for column in ("row", "position", "value"))
            feature, slot = np.nonzero(row >= 0)
            place = (feature, slot)
            shard = self._shards(name, self._task.start, self._task.stop)[place]
            if name == "top":
                key = -value[place].view(np.int32).astype(np.int64)
            else:
                key = firing_keys(seed, self._salts[shard], feature + self._task.start, row[place], position[place])
            entries = Entries(
                group=feature,
                key=key,
                shard=ordinals[shard],
                row=row[place],
                position=position[place],
                value=value[place],
            )
            if name == "bands":
                samples.put_bands(entries)
            else:
                getattr(samples, name).put(entries)
        self._put_silent(samples, ordinals, seed)

    def _put_silent(self, samples: Samples, ordinals: Int32[np.ndarray, " S"], seed: int) -> None:
        rows = self._partial.read("silent_row")
        shard = self._shards("silent", 0, len(rows))
        silent = contexts_at(silent_keys(seed, self._salts[shard], rows), rows, ordinals[shard])
        samples.silent.put(silent)
        if not samples.sizes.non_activating:
            return
        is_silent = np.ones((self._task.num_features, len(rows)), bool)
        for column, fired in enumerate(self.firing_in(shard, rows)):
            is_silent[fired, column] = False
        order = np.argsort(silent.key)
        feature, place = first_of_each(is_silent[:, order], samples.sizes.non_activating)
        samples.quiet.put(joined([silent.where(order[place]).regrouped(feature), self._further_quiet(ordinals, seed)]))

    def _further_quiet(self, ordinals: Int32[np.ndarray, " S"], seed: int) -> Entries:
        """Silent contexts of features that need more than those kept for all; partials of format 3 have none."""
        if not self._partial.has("silent_more_start"):
            return Kept.zero(0, 0).entries()
        start = self._partial.read("silent_more_start", self._task.start, self._task.stop + 1)
        first, last = int(start[0]), int(start[-1])
        rows, shard = self._partial.read("silent_more_row", first, last), self._shards("silent_more", first, last)
        found = contexts_at(silent_keys(seed, self._salts[shard], rows), rows, ordinals[shard])
        return found.regrouped(np.repeat(np.arange(self._task.num_features), np.diff(start)))

    def firing_in(
        self, shards: Int32[np.ndarray, " N"], rows: Int32[np.ndarray, " N"]
    ) -> list[Int64[np.ndarray, " U"]]:
        """Of contexts kept for silence, the features of the range (from 0) that fire in each."""
        kept = self._partial.read("silent_row")
        places = {key: i for i, key in enumerate(zip(self._shards("silent", 0, len(kept)), kept, strict=True))}
        start = self._partial.read("silent_start")
        every = self._partial.read("silent_feature").astype(np.int64) - self._task.start
        found = []
        for key in zip(shards, rows, strict=True):
            feature = every[start[places[key]] : start[places[key] + 1]]
            found.append(feature[(feature >= 0) & (feature < self._task.num_features)])
        return found

    def evidence(self) -> Evidence:
        """The codes that were kept with the samples of the range."""
        pair_start = self._partial.read("pair_start", self._task.start, self._task.stop + 1)
        first, last = int(pair_start[0]), int(pair_start[-1])
        code_start = self._partial.read("code_start", first, last + 1)
        low, high = int(code_start[0]), int(code_start[-1])
        return Evidence(
            pair_feature=np.repeat(np.arange(self._task.num_features), np.diff(pair_start)),
            pair_shard=self._shards("pair", first, last),
            pair_row=self._partial.read("pair_row", first, last),
            code_start=code_start - low,
            position=self._partial.read("code_position", low, high),
            value=self._partial.read("code_value", low, high),
        )


@contextmanager
def opened(blobs: LocalBlobs, unit: Unit, task: RangeTask) -> Iterator[PartialRange]:
    """A partial or node, for one range."""
    with Partial(blobs.path(unit.stored.key)) as partial:
        yield PartialRange(partial, unit, task)
