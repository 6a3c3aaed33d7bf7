"""Reduce a range of features: read that slice of every partial or node, merge, check the books.

The unit of the reduce. Its memory depends on the range and the samples kept, not on the number of shards.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int64

from sae_census.compute.census.labels import Tally
from sae_census.compute.numbers.documents import DocumentStats
from sae_census.compute.numbers.keys import firing_keys
from sae_census.compute.numbers.samples import Entries, Kept, Samples, exponent_of, joined
from sae_census.compute.numbers.stats import FeatureStats
from sae_census.compute.numbers.weights import copies
from sae_census.config import ModelConfig, SamplingConfig
from sae_census.errors import CorruptError
from sae_census.io.store import tables
from sae_census.io.store.blobs import LocalBlobs
from sae_census.io.store.zarr_files import FEATURE_CHUNK
from sae_census.steps.census import labels
from sae_census.steps.census.columns import feature_columns, slice_arrays, slice_rows
from sae_census.steps.census.partial import RangeTask, Unit
from sae_census.steps.census.sampling import LOW_OCTAVES, sample_sizes, shard_key
from sae_census.steps.census.spans import SpanAddresses, attach
from sae_census.steps.census.units import Units
from sae_census.steps.model.parts import tokenizer_of
from sae_census.steps.model.provenance import Provenance
from sae_census.steps.store import layout
from sae_census.types import SiteKey


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeResult:
    """What the catalog says about a range, but for ranks, which need all features."""

    task: RangeTask
    features: dict[str, np.ndarray]
    """Columns of `features.parquet` that the reduce knows."""
    slices: bytes
    """Rows of `slices.parquet`."""
    spans: bytes
    """Rows of `spans.parquet`."""
    arrays: dict[str, np.ndarray]
    """For `statistics.zarr`."""
    words: Tally
    """For proto-labels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReduceSettings:
    """What a worker needs to reduce any range."""

    root: str
    preparation_id: str
    model: ModelConfig
    planned: Provenance
    sampling: SamplingConfig
    partial_format: int
    """Of the measures."""
    sites: tuple[SiteKey, ...]
    units: tuple[tuple[Unit, ...], ...]
    """By site; of the same shards, whose order by id is the meaning of shard ordinals."""
    weights: Mapping[str, int]
    """Copies of each slice that the statistics of the whole count; empty if one of each."""


def group_names(sampling: SamplingConfig) -> list[str]:
    """The span groups of a catalog, in the order they are listed."""
    return ["top", "random", *(f"band_{i}" for i in range(sampling.bands)), "low_activating", "non_activating"]


def tasks(num_features: Sequence[int]) -> list[RangeTask]:
    """All ranges of all sites, aligned to the chunks of the stored arrays."""
    return [
        RangeTask(site=site, start=start, stop=min(start + FEATURE_CHUNK, total))
        for site, total in enumerate(num_features)
        for start in range(0, total, FEATURE_CHUNK)
    ]


class Reducer:
    """Reduces ranges one by one."""

    def __init__(self, settings: ReduceSettings):
        self._settings = settings
        self._blobs = LocalBlobs(settings.root)
        self._tokenizer = tokenizer_of(settings.model)
        settings.planned.prove_tokenizer(settings.model.id, self._tokenizer)
        self._units = [Units(self._blobs, units) for units in settings.units]
        self._shard_ids = self._units[0].shard_ids
        self._lengths: dict[int, Int64[np.ndarray, " C"]] = {}

    def run(self, task: RangeTask) -> RangeResult:
        """Reduce one range.

        Raises:
            CorruptError: if the books of the merged statistics do not balance.
        """
        site, units = self._settings.sites[task.site], self._settings.units[task.site]
        sampling = self._settings.sampling
        merged = self._units[task.site].merged(
            task, sample_sizes(sampling, self._settings.partial_format), sampling.seed
        )
        by_slice, documents, samples = merged.by_slice, merged.documents, merged.samples
        counted: Counter[str] = Counter()
        for unit in units:
            counted[unit.slice] += unit.tokens["counted"]
        weights = {name: self._settings.weights.get(name, 1) for name in by_slice}
        whole = FeatureStats.zero(task.num_features)
        for name in sorted(by_slice):
            whole = whole.merge(copies(by_slice[name], weights[name], FeatureStats.merge))
        num_tokens = sum(counted[name] * weights[name] for name in counted)
        num_contexts = sum(unit.contexts * weights[unit.slice] for unit in units)
        self._check(task, whole, samples, num_tokens)
        self._check_documents(task, by_slice, documents)
        spans, collapsed, words = self._spans(task, site, samples)
        return RangeResult(
            task=task,
            features=feature_columns(whole, num_tokens, num_contexts),
            slices=slice_rows(site, task.start, by_slice, counted),
            spans=spans,
            arrays=whole.arrays() | slice_arrays(by_slice, documents) | {"spans_collapsed": collapsed},
            words=words,
        )

    def _check(self, task: RangeTask, whole: FeatureStats, samples: Samples, num_tokens: int) -> None:
        try:
            whole.check_books(num_tokens)
            if self._settings.sampling.top and not np.array_equal(samples.top.value[:, 0], whole.maximum):
                raise ValueError("maximum != strongest sample")
        except ValueError as error:
            site = self._settings.sites[task.site]
            raise CorruptError(f"{error} (features from {task.start} of {site})") from error

    def _check_documents(
        self, task: RangeTask, by_slice: Mapping[str, FeatureStats], documents: Mapping[str, DocumentStats]
    ) -> None:
        for name, stats in by_slice.items():
            try:
                documents[name].check_books(stats.count)
            except ValueError as error:
                site = self._settings.sites[task.site]
                raise CorruptError(f"{error} (features from {task.start} of {site}, slice {name})") from error

    def _spans(self, task: RangeTask, site: SiteKey, samples: Samples) -> tuple[bytes, Int64[np.ndarray, "F G"], Tally]:
        """Span rows of the range, how many near duplicates each group of each feature lost, and words of the rest."""
        names = group_names(self._settings.sampling)
        addresses = self._addresses(task, samples)
        fired = np.where(addresses.value > 0, addresses.shard, np.int32(-1))
        codes, positions = self._units[task.site].codes(task, addresses.feature, fired, addresses.row)
        table, dropped = attach(
            replace(addresses, feature=addresses.feature + task.start),
            codes,
            positions,
            blobs=self._blobs,
            preparation_id=self._settings.preparation_id,
            shard_ids=self._shard_ids,
            tokenizer=self._tokenizer,
            before=self._settings.sampling.before,
            after=self._settings.sampling.after,
            group_names=names,
            hook_point=str(site.hook_point),
            sae=site.sae,
        )
        collapsed = np.zeros((task.num_features, len(names)), np.int64)
        np.add.at(collapsed, (addresses.feature[dropped], addresses.group[dropped]), 1)
        rest = addresses.where(np.delete(np.arange(len(addresses.row)), dropped))
        words = labels.tally(rest, table, self._tokenizer, names.index("low_activating"), task.num_features)
        return tables.ipc_bytes(table), collapsed, words

    def _addresses(self, task: RangeTask, samples: Samples) -> SpanAddresses:
        """All spans of the range by feature (from 0), group and rank."""
        sampling = self._settings.sampling
        slots = samples.sizes.bands + 1
        bands = samples.bands.entries()
        band, feature = bands.group % slots, bands.group // slots
        low = bands.where(samples.octave[feature] - exponent_of(bands.value) >= LOW_OCTAVES)
        groups = [samples.top.entries(), samples.random.entries()]
        for i in range(sampling.bands):
            groups.append(_first(_of_feature(bands.where(band == i), slots), sampling.per_band))
        groups += [
            _first(_of_feature(low, slots), sampling.low_activating),
            _first(self._silent(task, samples), sampling.non_activating),
        ]
        every = joined(groups)
        group = np.repeat(np.arange(len(groups)), [len(g.key) for g in groups])
        order = np.lexsort((every.position, every.row, every.shard, every.key, group, every.group))
        every, group = every.where(order), group[order]
        changes = np.flatnonzero(np.diff(every.group * len(groups) + group, prepend=-1))
        rank = np.arange(len(group)) - np.repeat(changes, np.diff(np.append(changes, len(group))))
        return SpanAddresses(
            feature=every.group,
            group=group,
            rank=rank,
            shard=every.shard,
            row=every.row,
            position=every.position,
            value=every.value,
        )

    def _silent(self, task: RangeTask, samples: Samples) -> Entries:
        """For every feature of the range, contexts in which it never fires, in an order of its own.

        They are drawn from those kept for all features; a feature that fires in too many of these has its own. The
        position shown is drawn by the same hash from the real tokens of the context.
        """
        kept = samples.silent.entries()
        is_silent = np.ones((task.num_features, len(kept.row)), bool)
        for column, fired in enumerate(self._units[task.site].firing_in(task, kept.shard, kept.row)):
            is_silent[fired, column] = False
        is_enough = is_silent.sum(axis=1) >= samples.sizes.non_activating
        feature, place = np.nonzero(is_silent & is_enough[:, None])
        own = samples.quiet.entries(np.flatnonzero(~is_enough))
        found = joined([kept.where(place).regrouped(feature), own])
        salts = np.array([shard_key(shard_id) for shard_id in self._shard_ids], np.uint64)[found.shard]
        key = firing_keys(
            self._settings.sampling.seed, salts, found.group + task.start, found.row, np.zeros_like(found.row)
        )
        lengths = {ordinal: self._context_lengths(ordinal) for ordinal in np.unique(found.shard).tolist()}
        length = [lengths[ordinal][row] for ordinal, row in zip(found.shard.tolist(), found.row.tolist(), strict=True)]
        return replace(found, key=key, position=(key % np.array(length, np.int64)).astype(np.int32))

    def _context_lengths(self, ordinal: int) -> Int64[np.ndarray, " C"]:
        if ordinal not in self._lengths:
            path = self._blobs.path(layout.shard(self._settings.preparation_id, self._shard_ids[ordinal]))
            start, _ = tables.ragged(tables.read(path, ["input_ids"]), "input_ids")
            self._lengths[ordinal] = np.diff(start)
        return self._lengths[ordinal]


def _of_feature(entries: Entries, slots: int) -> Entries:
    return entries.regrouped(entries.group // slots)


def _first(entries: Entries, k: int) -> Entries:
    """The k entries of smallest key of every group."""
    kept = Kept.zero(int(entries.group.max(initial=-1)) + 1, k)
    kept.put(entries)
    return kept.entries()
