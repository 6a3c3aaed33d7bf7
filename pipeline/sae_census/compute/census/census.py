"""The census of one SAE over one shard: codes come in batches, arrays of a partial go out.

Codes are buffered and counted in large blocks, because what a block costs hardly depends on its size; every
accumulator is exact, so the block size changes no bit.
"""

import numpy as np
from jaxtyping import Bool, Float, Int32, Int64

from sae_census.compute.numbers import fixed
from sae_census.compute.numbers.codes import Codes, concatenate, empty, of_pairs
from sae_census.compute.numbers.documents import DocumentCensus
from sae_census.compute.numbers.samples import Samples, SampleSizes
from sae_census.compute.numbers.stats import FeatureStats
from sae_census.errors import ShardError

BLOCK_CODES = 1 << 20
L0_BINS = 1025
"""Codes of a token: 0 to 1023, and more."""
FIT_EVERY = 16
"""Every 16th context of a shard enters the sums for the fraction of variance unexplained."""


class SiteCensus:
    """Accumulates what one partial says about one SAE."""

    def __init__(
        self,
        num_features: int,
        width: int,
        sizes: SampleSizes,
        *,
        seed: int,
        shard_key: int,
        documents: Int32[np.ndarray, "R T"],
        keep_codes: bool = False,
        block_codes: int = BLOCK_CODES,
    ):
        self._stats = FeatureStats.zero(num_features)
        self._samples = Samples.zero(num_features, sizes)
        self._documents = DocumentCensus(num_features, documents)
        self._l0 = np.zeros(L0_BINS, np.int64)
        self._fit = {"error": fixed.zeros(1), "square": fixed.zeros(1), "vector": fixed.zeros(width)}
        self._fit_tokens = 0
        self._seed, self._shard_key, self._num_positions = seed, shard_key, documents.shape[1]
        self._keep_codes, self._block_codes = keep_codes, block_codes
        self._codes: list[Codes] = []
        self._rows: list[Int64[np.ndarray, " R"]] = []
        self._num_buffered = 0
        self._evidence: list[Codes] = []
        self._evidence_limit = 8 * block_codes
        self._silent: list[Codes] = []
        self._all: list[Codes] = []

    def add(self, codes: Codes, counted: Bool[np.ndarray, "B T"], first_row: int) -> None:
        """Take the codes of a batch; those of tokens that are not counted are left out.

        Args:
            codes: of the rows first_row, first_row + 1, …; every row comes once.
            counted: which tokens count.
            first_row: the shard's row of the batch's row 0.
        """
        codes = codes.where(counted[codes.row - first_row, codes.position])
        token = (codes.row - first_row).astype(np.int64) * self._num_positions + codes.position
        l0 = np.bincount(token, minlength=counted.size)[counted.reshape(-1)]
        self._l0 += np.bincount(np.minimum(l0, L0_BINS - 1), minlength=L0_BINS)
        self._documents.see(counted, first_row)
        self._codes.append(codes)
        self._rows.append(first_row + np.flatnonzero(counted.any(axis=1)))
        self._num_buffered += len(codes)
        if self._num_buffered >= self._block_codes:
            self._flush()

    def add_fit(self, x: Float[np.ndarray, "N D"], error: Float[np.ndarray, "N D"]) -> None:
        """Add counted tokens of a context in the fit sample: activations and what reconstruction missed."""
        if not len(x):
            return
        x, error = x.astype(np.float64), error.astype(np.float64)
        self._fit_tokens += len(x)
        whole = np.zeros(1, np.int64)
        for name, values in (("error", error), ("square", x)):
            # squares of float32 need 48 bits and their sum over D a few more: a single rounding at 53
            squares = np.square(values).sum(axis=1)
            if not fixed.headroom(squares, fixed.SUM_SCALE, len(squares)):
                raise ShardError(f"activations of length {np.sqrt(squares.max()):g} are too large to be summed exactly")
            sums = fixed.segment_sums(squares, whole, fixed.SUM_SCALE)
            self._fit[name] = fixed.add(self._fit[name], sums)
        columns = fixed.segment_sums(x.T.reshape(-1), np.arange(x.shape[1]) * len(x), fixed.SUM_SCALE)
        self._fit["vector"] = fixed.add(self._fit["vector"], columns)

    @property
    def document_tokens(self) -> Int64[np.ndarray, " M"]:
        """Counted tokens of every document so far."""
        return self._documents.tokens

    def finish(self) -> dict[str, np.ndarray]:
        """The arrays of the partial; `io.store.partials` says what each is. Call once."""
        self._flush()
        samples = self._samples
        arrays = (
            self._stats.arrays()
            | self._documents.finish().arrays()
            | {
                "l0_histogram": self._l0,
                "fit_tokens": np.array([self._fit_tokens]),
                **{f"fit_{name}": limbs for name, limbs in self._fit.items()},
            }
        )
        for name in ("top", "random", "bands"):
            kept = getattr(samples, name)
            shape = (len(samples.octave), -1)
            for column in ("row", "position", "value"):
                arrays[f"{name}_{column}"] = getattr(kept, column).reshape(shape)
        arrays |= self._evidence_arrays() | self._silent_arrays()
        if self._keep_codes:
            every = concatenate(self._all, self._num_positions) if self._all else empty()
            starts = np.searchsorted(every.feature, np.arange(len(samples.octave) + 1))
            arrays |= {"codes_start": starts, "codes_row": every.row, "codes_position": every.position}
            arrays["codes_value"] = every.value
            arrays["document_tokens"] = self.document_tokens
        return arrays

    def _flush(self) -> None:
        if not self._rows:
            return
        codes = concatenate(self._codes, self._num_positions)
        rows = np.concatenate(self._rows)
        self._codes, self._rows, self._num_buffered = [], [], 0
        self._stats.add(codes)
        self._documents.add(codes)
        self._samples.add(codes, seed=self._seed, shard_key=self._shard_key, counted_rows=rows)
        if self._keep_codes:
            self._all.append(codes)
        self._evidence.append(of_pairs(codes, self._kept_pairs(since=int(rows.min(initial=(1 << 31) - 1)))))
        if sum(map(len, self._evidence)) > self._evidence_limit:
            self._compact()
            self._evidence_limit = max(self._evidence_limit, 2 * len(self._evidence[0]))
        silent = self._samples.silent.entries().row
        first = codes.context_starts()
        firsts = codes.where(first)
        self._silent.append(firsts.where(np.isin(firsts.row, silent)))

    def _kept_pairs(self, since: int = 0) -> Int64[np.ndarray, " P"]:
        """(feature, row) of every kept sample in rows from `since` on, packed and sorted, each once."""
        samples = self._samples
        pairs = []
        for kept, slots in ((samples.top, 1), (samples.random, 1), (samples.bands, samples.sizes.bands + 1)):
            group, _ = np.nonzero(kept.row >= since)
            pairs.append(((group // slots) << 32) | kept.row[kept.row >= since])
        return np.unique(np.concatenate(pairs))

    def _compact(self) -> None:
        every = concatenate(self._evidence, self._num_positions) if self._evidence else empty()
        self._evidence = [of_pairs(every, self._kept_pairs())]

    def _evidence_arrays(self) -> dict[str, np.ndarray]:
        """Codes of the contexts of kept samples: pairs by feature and row, codes by pair."""
        self._compact()
        codes = self._evidence[0]
        starts = codes.context_starts()
        features = np.arange(len(self._samples.octave) + 1)
        return {
            "pair_start": np.searchsorted(codes.feature[starts], features),
            "pair_row": codes.row[starts],
            "code_start": np.append(starts, len(codes)),
            "code_position": codes.position,
            "code_value": codes.value,
        }

    def _silent_arrays(self) -> dict[str, np.ndarray]:
        """The features that fire in each of the contexts kept for silence, and what some features need beyond those."""
        rows = self._samples.silent.entries().row
        fired = concatenate(self._silent, self._num_positions) if self._silent else empty()
        features = [fired.feature[fired.row == row] for row in rows]
        arrays = {
            "silent_row": rows,
            "silent_start": np.cumsum([0, *map(len, features)]),
            "silent_feature": np.concatenate([np.zeros(0, np.int32), *features]),
        }
        if not self._samples.sizes.non_activating:
            return arrays
        more = self._samples.further_quiet()
        return arrays | {
            "silent_more_start": np.searchsorted(more.group, np.arange(len(self._samples.octave) + 1)),
            "silent_more_row": more.row,
        }
