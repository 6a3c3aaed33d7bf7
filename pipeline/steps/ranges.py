"""Reduce a range of features: read that slice of every partial, merge in shard order, check the books.

The unit of the reduce. Its memory depends on the range and the samples kept, not on the number of shards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int64

from pipeline.compute.documents import DocumentStats
from pipeline.compute.labels import Tally
from pipeline.compute.samples import Entries, Kept, Samples, exponent_of, joined
from pipeline.compute.stats import FeatureStats
from pipeline.compute.weights import copies
from pipeline.config import ModelConfig, SamplingConfig
from pipeline.errors import CorruptError
from pipeline.io import tables
from pipeline.io.blobs import LocalBlobs
from pipeline.io.model import Tokenizer
from pipeline.io.store import FEATURE_CHUNK
from pipeline.records import Receipt
from pipeline.steps import labels, layout
from pipeline.steps.columns import feature_columns, slice_arrays, slice_rows
from pipeline.steps.partial import RangeTask, opened
from pipeline.steps.shard import LOW_OCTAVES, sample_sizes
from pipeline.steps.spans import Ragged, SpanAddresses, attach, take_ranges
from pipeline.types import SiteKey


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
    sampling: SamplingConfig
    sites: tuple[SiteKey, ...]
    receipts: tuple[tuple[Receipt, ...], ...]
    """By site, the same shards sorted by id: their order is the meaning of shard ordinals."""
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
        model = settings.model
        self._tokenizer = Tokenizer(model.id, model.revision, trust_remote_code=model.trust_remote_code)
        self._shard_ids = [receipt.shard.shard_id for receipt in settings.receipts[0]]
        self._lengths: dict[int, Int64[np.ndarray, " C"]] = {}

    def run(self, task: RangeTask) -> RangeResult:
        """Reduce one range.

        Raises:
            CorruptError: if the books of the merged statistics do not balance.
        """
        site = self._settings.sites[task.site]
        receipts = self._settings.receipts[task.site]
        by_slice: dict[str, FeatureStats] = {}
        documents: dict[str, DocumentStats] = {}
        counted: dict[str, int] = {}
        samples = Samples.zero(task.num_features, sample_sizes(self._settings.sampling))
        for ordinal, receipt in enumerate(receipts):
            with opened(self._blobs, receipt, task) as partial:
                part, clusters = partial.stats(), partial.documents()
                partial.put_samples(samples, ordinal, self._settings.sampling.seed)
            name = receipt.shard.slice
            by_slice[name] = by_slice[name].merge(part) if name in by_slice else part
            documents[name] = documents[name].merge(clusters) if name in documents else clusters
            counted[name] = counted.get(name, 0) + receipt.tokens["counted"]
        weights = {name: self._settings.weights.get(name, 1) for name in by_slice}
        whole = FeatureStats.zero(task.num_features)
        for name in sorted(by_slice):
            whole = whole.merge(copies(by_slice[name], weights[name], FeatureStats.merge))
        num_tokens = sum(counted[name] * weights[name] for name in counted)
        num_contexts = sum(receipt.contexts * weights[receipt.shard.slice] for receipt in receipts)
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
        codes, positions = self._codes(task, addresses)
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
        """For every feature of the range, the kept contexts in which it never fires, in an order of its own.

        The position shown is drawn by the same hash from the real tokens of the context.
        """
        found = [Kept.zero(0, 0).entries()]
        kept = samples.silent.entries()
        for ordinal, row in zip(kept.shard, kept.row, strict=True):
            with opened(self._blobs, self._settings.receipts[task.site][ordinal], task) as partial:
                feature = np.setdiff1d(np.arange(task.num_features), partial.firing_in(int(row)))
                key = partial.silent_keys_of(feature, int(row), self._settings.sampling.seed)
            length = self._context_lengths(int(ordinal))[row]
            found.append(
                Entries(
                    group=feature,
                    key=key,
                    shard=np.full(len(feature), ordinal, np.int32),
                    row=np.full(len(feature), row, np.int32),
                    position=(key % length).astype(np.int32),
                    value=np.zeros(len(feature), np.float32),
                )
            )
        return joined(found)

    def _context_lengths(self, ordinal: int) -> Int64[np.ndarray, " C"]:
        if ordinal not in self._lengths:
            path = self._blobs.path(layout.shard(self._settings.preparation_id, self._shard_ids[ordinal]))
            start, _ = tables.ragged(tables.read(path, ["input_ids"]), "input_ids")
            self._lengths[ordinal] = np.diff(start)
        return self._lengths[ordinal]

    def _codes(self, task: RangeTask, addresses: SpanAddresses) -> tuple[Ragged, np.ndarray]:
        """The codes of each address's context, from the partial that kept them; none for silent contexts."""
        num = len(addresses.row)
        begin, end = np.zeros(num, np.int64), np.zeros(num, np.int64)
        values, positions, offset = [np.zeros(0, np.float32)], [np.zeros(0, np.int32)], 0
        fired = addresses.value > 0
        for ordinal in np.unique(addresses.shard[fired]):
            mine = np.flatnonzero(fired & (addresses.shard == ordinal))
            with opened(self._blobs, self._settings.receipts[task.site][ordinal], task) as partial:
                kept = partial.evidence()
            values.append(kept.value)
            positions.append(kept.position)
            keys = (kept.pair_feature << 32) | kept.pair_row
            wanted = (addresses.feature[mine] << 32) | addresses.row[mine]
            place = np.searchsorted(keys, wanted)
            if not np.array_equal(keys[np.minimum(place, len(keys) - 1)], wanted):
                raise CorruptError(f"the partial of shard {self._shard_ids[ordinal]} lacks codes of a kept sample")
            begin[mine] = kept.code_start[place] + offset
            end[mine] = kept.code_start[place + 1] + offset
            offset += len(kept.value)
        flat, start = take_ranges(begin, end)
        return Ragged(start=start, values=np.concatenate(values)[flat]), np.concatenate(positions)[flat]


def _of_feature(entries: Entries, slots: int) -> Entries:
    return entries.regrouped(entries.group // slots)


def _first(entries: Entries, k: int) -> Entries:
    """The k entries of smallest key of every group."""
    kept = Kept.zero(int(entries.group.max(initial=-1)) + 1, k)
    kept.put(entries)
    return kept.entries()
