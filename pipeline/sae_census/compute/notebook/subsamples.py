"""Contexts kept for every feature: those where it is strongest at or below a limit, or silent ones at random.

What `samples` is for shards of a corpus, this is for a stream of contexts that somebody else numbered. The order
is total and knows nothing of the stream's: score descending, then shard_idx, context_idx and the digest of the
context; for silent contexts the digest alone, which is a keyed hash. The n best of a union are among the n best
of its parts, so `add` and `merge` give the same contexts in any order and any grouping, ties included.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from sae_census.compute.numbers.codes import Codes, concatenate, empty, of_pairs
from sae_census.compute.numbers.samples import Entries, Kept, joined, strongest

BLOCK = 1 << 20
"""This many candidates, entries and codes together, wait before they are sorted in."""
_OVERHEAD = 1 << 10
"""A waiting batch weighs as much as this many of them, so that batches with few candidates do not pile up."""


class Context(NamedTuple):
    """A context of the stream; the first three fields are its address, and their order that of ties."""

    shard_idx: int
    context_idx: int
    digest: int
    """Keyed hash of tokens and metadata, 0 <= digest < 2**63 - 1. Contexts of one address are the same context."""
    num_positions: int
    """T of its batch."""
    metadata: Mapping[str, Any]
    """What the stream says of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The kept contexts of all features, best first; codes outside a sample's window are left out."""

    feature_start: Int64[np.ndarray, " F1"]
    """Samples of feature f are feature_start[f] to feature_start[f + 1]."""
    context: Int32[np.ndarray, " S"]
    """Of each sample, the index into `contexts`."""
    start: Int64[np.ndarray, " S"]
    """First position of the sample's window."""
    stop: Int64[np.ndarray, " S"]
    """One past its last."""
    code_start: Int64[np.ndarray, " S1"]
    """Codes of sample i are code_start[i] to code_start[i + 1]."""
    position: Int32[np.ndarray, " N"]
    """Positions count from the start of the context, not of the window."""
    value: Float32[np.ndarray, " N"]
    contexts: Sequence[Context]


class Gatherer:
    """Keeps at most `num_samples` contexts of each feature, with the feature's codes in them.

    Its memory depends on the features and samples, not on the length of the stream: candidates that cannot stay
    are dropped at once, the others wait until they are as many as what is kept.
    """

    def __init__(self, num_features: int, num_samples: int):
        self._kept = Kept.zero(num_features, num_samples)  # rows index _contexts, which are sorted by address
        self._contexts: list[Context] = []
        self._codes = empty()
        self._waiting: list[tuple[Entries, Codes, Sequence[Context]]] = []
        self._num_waiting = 0

    def add_strongest(self, codes: Codes, contexts: Sequence[Context], limit: Float32[np.ndarray, " F"] | None) -> None:
        """Consider contexts in which features fire, by their largest code.

        Args:
            codes: of counted tokens; rows index `contexts`.
            contexts: of one batch; none comes in two calls.
            limit: a context is eligible for feature f if its largest code is at most limit[f]; None: always.
        """
        if not len(codes):
            return
        entries = strongest(codes)
        fits = entries.key <= self._kept.key[entries.group, -1]
        if limit is not None:
            fits &= entries.value <= limit[entries.group]
        length = np.diff(np.append(codes.context_starts(), len(codes)))
        self._wait(entries.where(fits), codes.where(np.repeat(fits, length)), contexts)

    def add_silent(self, codes: Codes, contexts: Sequence[Context], counted: Bool[np.ndarray, " B"]) -> None:
        """Consider contexts in which features do not fire, by the digest.

        Args:
            codes: of counted tokens; rows index `contexts`.
            contexts: of one batch; none comes in two calls.
            counted: which contexts have counted tokens; in the others nothing can be said to be silent.
        """
        key = np.array([context.digest for context in contexts], np.int64)
        # B x F comparisons, the one place that looks at silent features; few pass once the samples are full
        candidate = counted[:, None] & (key[:, None] <= self._kept.key[:, -1])
        firing = codes.where(codes.context_starts())
        candidate[firing.row, firing.feature] = False
        row, feature = np.nonzero(candidate)
        nothing = np.zeros(len(row), np.int32)
        entries = Entries(
            group=feature,
            key=key[row],
            shard=nothing,
            row=row.astype(np.int32),
            position=nothing,
            value=nothing.astype(np.float32),
        )
        self._wait(entries, empty(), contexts)

    def merge(self, other: "Gatherer") -> None:
        """Take in what another has kept of other contexts under the same rule.

        Raises:
            ValueError: if the number of features or samples differs.
        """
        if self._kept.key.shape != other._kept.key.shape:
            raise ValueError(f"cannot merge samples of shape {self._kept.key.shape} and {other._kept.key.shape}")
        other._settle()
        self._wait(other._kept.entries(), other._codes, other._contexts)

    def chosen(self, max_length: int | None, features: Bool[np.ndarray, " F"]) -> Chosen:
        """What is kept.

        Args:
            max_length: longest window; it lies around the largest code (in a silent context, at the start) and
                inside the context. None: the whole context.
            features: those that are to have samples at all.
        """
        self._settle()
        entries = self._kept.entries(np.flatnonzero(features))
        total = np.array([context.num_positions for context in self._contexts], np.int64)[entries.row]
        length = total if max_length is None else np.minimum(total, max_length)
        start = np.clip(entries.position - length // 2, 0, total - length)
        begin, end = self._ranges(entries)
        sample = np.repeat(np.arange(len(begin)), end - begin)
        offset = np.cumsum(end - begin) - (end - begin)
        index = np.arange(len(sample)) + (begin - offset)[sample]
        position = self._codes.position[index]
        inside = (position >= start[sample]) & (position < (start + length)[sample])
        return Chosen(
            feature_start=np.searchsorted(entries.group, np.arange(len(features) + 1)),
            context=entries.row,
            start=start,
            stop=start + length,
            code_start=np.searchsorted(sample[inside], np.arange(len(begin) + 1)),
            position=position[inside],
            value=self._codes.value[index][inside],
            contexts=self._contexts,
        )

    def _ranges(self, entries: Entries) -> tuple[Int64[np.ndarray, " S"], Int64[np.ndarray, " S"]]:
        """Where the codes of each sample begin and end; nowhere for silent ones."""
        starts = self._codes.context_starts()
        if not len(starts):
            nowhere = np.zeros(len(entries.row), np.int64)
            return nowhere, nowhere
        pairs = _packed(self._codes.feature[starts], self._codes.row[starts])
        place = np.searchsorted(pairs, _packed(entries.group, entries.row))
        return starts[place], np.append(starts, len(self._codes))[place + 1]

    def _wait(self, entries: Entries, codes: Codes, contexts: Sequence[Context]) -> None:
        if not len(entries.row):
            return
        used, row = np.unique(entries.row, return_inverse=True)
        entries = replace(entries, row=row.astype(np.int32))
        codes = replace(codes, row=np.searchsorted(used, codes.row).astype(np.int32))
        self._waiting.append((entries, codes, [contexts[i] for i in used]))
        self._num_waiting += len(entries.row) + len(codes) + _OVERHEAD
        if self._num_waiting >= max(BLOCK, len(self._codes)):  # so that sorting stays linear in what was seen
            self._settle()

    def _settle(self) -> None:
        """Sort in what waits, and forget contexts and codes that nothing refers to any more."""
        if not self._waiting:
            return
        contexts = self._contexts + [context for *_, more in self._waiting for context in more]
        order = sorted(range(len(contexts)), key=lambda i: contexts[i][:3])
        rank = np.empty(len(order), np.int32)
        rank[order] = np.arange(len(order), dtype=np.int32)
        first = len(self._contexts)
        self._renumber(rank[:first])  # ranks keep the order of what is kept
        candidates, codes = [], [self._codes]
        for entries, firing, more in self._waiting:
            ranks = rank[first : first + len(more)]
            candidates.append(replace(entries, row=ranks[entries.row]))
            codes.append(replace(firing, row=ranks[firing.row]))
            first += len(more)
        self._kept.put(joined(candidates))
        there = self._kept.row >= 0
        group, _ = np.nonzero(there)
        pairs = np.unique(_packed(group, self._kept.row[there]))
        longest = max(context.num_positions for context in contexts)
        self._codes = of_pairs(concatenate(codes, longest), pairs)
        used = np.unique(self._kept.row[there])
        self._contexts = [contexts[order[i]] for i in used]
        place = np.zeros(len(contexts), np.int32)
        place[used] = np.arange(len(used))
        self._renumber(place)
        self._waiting, self._num_waiting = [], 0

    def _renumber(self, number: Int32[np.ndarray, " C"]) -> None:
        there = self._kept.row >= 0
        self._kept.row[there] = number[self._kept.row[there]]
        self._codes = replace(self._codes, row=number[self._codes.row])


def _packed(
    feature: Int32[np.ndarray, " N"] | Int64[np.ndarray, " N"], row: Int32[np.ndarray, " N"]
) -> Int64[np.ndarray, " N"]:
    """(feature, row) as one number that sorts as they do."""
    return np.asarray((feature.astype(np.int64) << 32) | row)
