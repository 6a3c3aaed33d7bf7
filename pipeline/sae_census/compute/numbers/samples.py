"""Samples of each feature as a commutative monoid: strongest contexts and hash-random firings.

A sample is an address and a value. Every group keeps the K smallest entries under the total order (key, shard,
row, position); the key is the negated code for `top` and a keyed hash of the address otherwise. The K smallest
of a union are among the K smallest of its parts, so merging is exact, in any order, ties included, and nothing
is drawn from a generator whose state would depend on the order of work.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from sae_census.compute.numbers.codes import Codes
from sae_census.compute.numbers.keys import NO_KEY, firing_keys, silent_keys

_NO_OCTAVE = -(1 << 20)
_PAIRS = 1 << 20
"""Of a feature and a context, looked at together: 16 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """Samples as parallel arrays, each in a group; the loose form of `Kept`."""

    group: Int64[np.ndarray, " N"]
    key: Int64[np.ndarray, " N"]
    shard: Int32[np.ndarray, " N"]
    """Ordinal of the shard among the shards at hand, sorted by id; 0 inside one shard."""
    row: Int32[np.ndarray, " N"]
    position: Int32[np.ndarray, " N"]
    value: Float32[np.ndarray, " N"]

    def where(self, keep: Bool[np.ndarray, " N"] | Int64[np.ndarray, " M"]) -> "Entries":
        """The entries at `keep`, a mask or an index."""
        return Entries(**{name: getattr(self, name)[keep] for name in self.__dataclass_fields__})

    def regrouped(self, group: Int64[np.ndarray, " N"]) -> "Entries":
        """The same entries in other groups."""
        columns = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return Entries(**(columns | {"group": group}))


def joined(parts: Iterable[Entries]) -> Entries:
    """All entries of the parts, one after another."""
    parts = list(parts)
    return Entries(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in Entries.__dataclass_fields__})


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The K smallest entries of each of G groups, ascending; empty slots come last and have row -1."""

    key: Int64[np.ndarray, "G K"]
    shard: Int32[np.ndarray, "G K"]
    row: Int32[np.ndarray, "G K"]
    position: Int32[np.ndarray, "G K"]
    value: Float32[np.ndarray, "G K"]

    @classmethod
    def zero(cls, num_groups: int, k: int) -> "Kept":
        """No entries."""
        shape = (num_groups, k)
        return cls(
            key=np.full(shape, NO_KEY),
            shard=np.zeros(shape, np.int32),
            row=np.full(shape, -1, np.int32),
            position=np.zeros(shape, np.int32),
            value=np.zeros(shape, np.float32),
        )

    def entries(self, groups: Int64[np.ndarray, " U"] | None = None) -> Entries:
        """The entries that are there, of all groups or of some."""
        groups = np.arange(len(self.key)) if groups is None else groups
        there = self.row[groups] >= 0
        group = np.broadcast_to(groups[:, None], there.shape)[there]
        columns = {name: getattr(self, name)[groups][there] for name in self.__dataclass_fields__}
        return Entries(group=group, **columns)

    def put(self, candidates: Entries) -> None:
        """Take what belongs among the smallest, in place. No address may come twice to the same group."""
        if self.key.shape[1] == 0:
            return
        candidates = candidates.where(candidates.key <= self.key[candidates.group, -1])
        if not len(candidates.key):
            return
        is_touched = np.zeros(len(self.key), bool)
        is_touched[candidates.group] = True
        touched = np.flatnonzero(is_touched)
        every = joined([self.entries(touched), candidates])
        self.replace(touched, every)

    def replace(self, groups: Int64[np.ndarray, " U"], entries: Entries) -> None:
        """Make these groups hold the smallest of `entries`, and nothing else."""
        if len(entries.key):
            entries = entries.where(_front_runners(entries, self.key.shape[1]))
        order = np.lexsort((entries.position, entries.row, entries.shard, entries.key, entries.group))
        entries = entries.where(order)
        first = np.searchsorted(entries.group, entries.group, side="left")
        rank = np.arange(len(entries.group)) - first
        chosen = rank < self.key.shape[1]
        entries, rank = entries.where(chosen), rank[chosen]
        empty = Kept.zero(1, self.key.shape[1])
        for name in self.__dataclass_fields__:
            getattr(self, name)[groups] = getattr(empty, name)
            getattr(self, name)[entries.group, rank] = getattr(entries, name)


def _front_runners(entries: Entries, k: int) -> Int64[np.ndarray, " M"]:
    """Indices of a few entries that surely hold the k smallest of every group.

    One sort by group and the leading 32 bits of the key is several times cheaper than the full order, and
    leaves little for it to do.
    """
    least, largest = int(entries.key.min()), int(entries.key.max())
    shift = max(0, (largest - least).bit_length() - 32)
    coarse = (entries.group << 32) | ((entries.key - least) >> shift)
    order = np.argsort(coarse)
    coarse, group = coarse[order], entries.group[order]
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    lengths = np.diff(np.append(starts, len(group)))
    limit = coarse[starts + np.minimum(k, lengths) - 1]
    return order[coarse <= np.repeat(limit, lengths)]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSizes:
    """How many samples are kept."""

    top: int
    """Strongest contexts of a feature."""
    random: int
    """Hash-random firings of a feature."""
    bands: int
    """Octaves below and including the maximum's that are sampled one by one; weaker codes share one more."""
    per_band: int
    """Hash-random firings in each of those."""
    silent: int
    """Hash-random contexts, kept with the features that fire there: most features draw their silent contexts here."""
    non_activating: int = 0
    """Hash-random silent contexts of a feature, wherever they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """What is kept of F features. Groups of `bands` are feature * (sizes.bands + 1) + octaves below the top one."""

    sizes: SampleSizes
    top: Kept
    random: Kept
    bands: Kept
    octave: Int32[np.ndarray, " F"]
    """Exponent of the largest code seen; very low if none was."""
    silent: Kept
    """One group."""
    quiet: Kept
    """The contexts of smallest key in which a feature is silent."""

    @classmethod
    def zero(cls, num_features: int, sizes: SampleSizes) -> "Samples":
        """Samples of no tokens."""
        return cls(
            sizes=sizes,
            top=Kept.zero(num_features, sizes.top),
            random=Kept.zero(num_features, sizes.random),
            bands=Kept.zero(num_features * (sizes.bands + 1), sizes.per_band),
            octave=np.full(num_features, _NO_OCTAVE, np.int32),
            silent=Kept.zero(1, sizes.silent),
            quiet=Kept.zero(num_features, sizes.non_activating),
        )

    def add(self, codes: Codes, *, seed: int, shard_key: int, counted_rows: Int64[np.ndarray, " R"]) -> None:
        """Consider more codes of one shard, in place. No (feature, row) may be split between two calls.

        Args:
            codes: codes of counted tokens.
            seed: of the keyed hash.
            shard_key: 64 bits of the shard's id, so that a hash does not depend on where the shard stands.
            counted_rows: the contexts of this call that have counted tokens.
        """
        places = contexts_at(silent_keys(seed, shard_key, counted_rows), counted_rows)
        self.silent.put(places)
        self._put_quiet(codes, places)
        if not len(codes):
            return
        self.top.put(strongest(codes))
        firings = Entries(
            group=codes.feature.astype(np.int64),
            key=firing_keys(seed, shard_key, codes.feature, codes.row, codes.position),
            shard=np.zeros(len(codes), np.int32),
            row=codes.row,
            position=codes.position,
            value=codes.value,
        )
        self.random.put(firings)
        self.put_bands(firings)

    def merge(self, other: "Samples") -> "Samples":
        """Samples of both; they share no token, and shard ordinals mean the same shards in both.

        Raises:
            ValueError: if sizes or the number of features differ.
        """
        if self.sizes != other.sizes or len(self.octave) != len(other.octave):
            raise ValueError(f"cannot merge samples of {self.sizes} and {other.sizes}")
        merged = Samples.zero(len(self.octave), self.sizes)
        merged.octave[:] = np.maximum(self.octave, other.octave)
        for part in (self, other):
            merged.top.put(part.top.entries())
            merged.random.put(part.random.entries())
            merged.silent.put(part.silent.entries())
            merged.quiet.put(part.quiet.entries())
            entries = part.bands.entries()
            merged.put_bands(entries.regrouped(entries.group // (self.sizes.bands + 1)))
        return merged

    def _put_quiet(self, codes: Codes, places: Entries) -> None:
        """Consider contexts for every feature that is silent there.

        It looks at every pair of a feature and a context, a few features at a time, but for contexts that come after
        what these features have: once they have their contexts, that is nearly all.
        """
        k = self.sizes.non_activating
        if not k or not len(places.key):
            return
        places = places.where(np.argsort(places.key))
        column_of = np.zeros(int(places.row.max()) + 1, np.int64)
        column_of[places.row] = np.arange(len(places.row))
        column = column_of[codes.row]
        step = max(1, _PAIRS // len(places.row))
        for start in range(0, len(self.octave), step):
            limits = self.quiet.key[start : start + step, -1]
            num_columns = int(np.searchsorted(places.key, limits.max(), side="right"))
            low, high = np.searchsorted(codes.feature, (start, start + len(limits)))
            near = low + np.flatnonzero(column[low:high] < num_columns)
            is_silent = np.ones((len(limits), num_columns), bool)
            is_silent[codes.feature[near] - start, column[near]] = False
            feature, found = first_of_each(is_silent, k)
            self.quiet.put(places.where(found).regrouped(start + feature))

    def further_quiet(self) -> Entries:
        """Of the contexts in which a feature is silent, those that are not among the ones kept for all features."""
        quiet, silent = self.quiet.entries(), self.silent.entries()
        known = (silent.shard.astype(np.int64) << 32) | silent.row
        return quiet.where(~np.isin((quiet.shard.astype(np.int64) << 32) | quiet.row, known))

    def put_bands(self, firings: Entries) -> None:
        """Sort firings (grouped by feature) into bands under the top octave, which they may raise."""
        slots = self.sizes.bands + 1
        octave = exponent_of(firings.value)
        raised = self.octave.copy()
        np.maximum.at(raised, firings.group, octave)
        moved = np.flatnonzero(raised > self.octave)
        self.octave[:] = raised
        if len(moved):  # what was kept under the old top octave sinks; the lowest band takes what falls out
            groups = (moved[:, None] * slots + np.arange(slots)).reshape(-1)
            old = self.bands.entries(groups)
            below = raised[old.group // slots] - exponent_of(old.value)
            self.bands.replace(groups, old.regrouped(old.group // slots * slots + np.minimum(below, slots - 1)))
        below = np.minimum(raised[firings.group] - octave, slots - 1)
        self.bands.put(firings.regrouped(firings.group * slots + below))

    def contexts(self) -> Entries:
        """Where the kept firings are: each context of a feature once, by feature (the group), shard and row."""
        slots = self.sizes.bands + 1
        bands = self.bands.entries()
        every = joined([self.top.entries(), self.random.entries(), bands.regrouped(bands.group // slots)])
        order = np.lexsort((every.row, every.shard, every.group))
        every = every.where(order)
        parts = (every.group, every.shard, every.row)
        is_new = np.any([np.diff(part, prepend=-1) != 0 for part in parts], axis=0)
        return every.where(is_new)

    def band(self, feature: int, index: int) -> Entries:
        """The kept firings of one feature in one band; the index `sizes.bands` is all that is weaker."""
        return self.bands.entries(np.array([feature * (self.sizes.bands + 1) + index]))


def contexts_at(
    key: Int64[np.ndarray, " R"],
    row: Int32[np.ndarray, " R"] | Int64[np.ndarray, " R"],
    shard: Int32[np.ndarray, " R"] | None = None,
) -> Entries:
    """Contexts as entries of one group; of shard 0, if none is named."""
    nowhere = np.zeros(len(row), np.int32)
    return Entries(
        group=nowhere.astype(np.int64),
        key=key,
        shard=nowhere if shard is None else shard,
        row=row.astype(np.int32),
        position=nowhere,
        value=nowhere.astype(np.float32),
    )


def first_of_each(wanted: Bool[np.ndarray, "F R"], k: int) -> tuple[Int64[np.ndarray, " N"], Int64[np.ndarray, " N"]]:
    """Row and column of the first k that are set in every row."""
    feature, place = np.nonzero(wanted)
    rank = np.arange(len(feature)) - np.searchsorted(feature, feature, side="left")
    return feature[rank < k], place[rank < k]


def strongest(codes: Codes) -> Entries:
    """The largest code of every (feature, row), at its first position; the stronger the smaller its key."""
    starts = codes.context_starts()
    bits = codes.value.view(np.int32).astype(np.int64)  # positive floats sort as their bits do
    packed = (bits << 24) | ((1 << 24) - 1 - codes.position)
    best = np.maximum.reduceat(packed, starts)
    bits = best >> 24
    return Entries(
        group=codes.feature[starts].astype(np.int64),
        key=-bits,
        shard=np.zeros(len(starts), np.int32),
        row=codes.row[starts],
        position=((1 << 24) - 1 - (best & ((1 << 24) - 1))).astype(np.int32),
        value=bits.astype(np.int32).view(np.float32),
    )


def exponent_of(value: Float32[np.ndarray, " N"]) -> Int32[np.ndarray, " N"]:
    """The octave of a positive normal code: e with 2**e <= code < 2**(e + 1)."""
    return (value.view(np.int32) >> 23) - 127
