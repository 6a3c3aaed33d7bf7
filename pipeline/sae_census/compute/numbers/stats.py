"""Per-feature statistics of codes as a commutative monoid: zero, add, merge, to the bit.

Integers, maxima and fixed-point sums only, so any split of a corpus, in any order, gives the same arrays.
"""

from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Float32, Float64, Int64

from sae_census.compute.numbers import fixed
from sae_census.compute.numbers.codes import Codes
from sae_census.errors import ShardError

OCTAVES = (-16, 16)
"""Codes in [2**-16, 2**16) have bins of their own; the outermost bins are open."""
BINS_PER_OCTAVE = 8
NUM_BINS = (OCTAVES[1] - OCTAVES[0]) * BINS_PER_OCTAVE
QUANTILE_ERROR = 1 / 17
"""Greatest relative error of a quantile read from the histogram, outside the open bins."""

_MANTISSA_BITS = 23
_SHIFT = _MANTISSA_BITS - 3
_FIRST = (127 + OCTAVES[0]) << 3


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureStats:
    """Statistics of F features over counted tokens; fires means code > 0."""

    count: Int64[np.ndarray, " F"]
    """Tokens on which the feature fires."""
    context_count: Int64[np.ndarray, " F"]
    """Contexts in which it fires at least once."""
    total: fixed.Limbs
    """Sum of codes, fixed point with `fixed.SUM_SCALE`."""
    total_square: fixed.Limbs
    """Sum of squared codes, fixed point with `fixed.SQUARE_SCALE`."""
    maximum: Float32[np.ndarray, " F"]
    """Largest code; 0 if it never fires."""
    histogram: Int64[np.ndarray, "F H"]
    """Codes by size: 8 bins an octave, cut from the bits of the float."""

    @classmethod
    def zero(cls, num_features: int) -> "FeatureStats":
        """Statistics of no tokens."""
        return cls(
            count=np.zeros(num_features, np.int64),
            context_count=np.zeros(num_features, np.int64),
            total=fixed.zeros(num_features),
            total_square=fixed.zeros(num_features),
            maximum=np.zeros(num_features, np.float32),
            histogram=np.zeros((num_features, NUM_BINS), np.int64),
        )

    def add(self, codes: Codes) -> None:
        """Count more codes, in place. No (feature, row) may be split between two calls.

        Raises:
            ShardError: if a code is too large to be summed exactly.
        """
        if not len(codes):
            return
        value = codes.value.astype(np.float64)
        starts = codes.feature_starts()
        feature = codes.feature[starts]
        count = np.diff(np.append(starts, len(codes)))
        if not fixed.headroom(value * value, fixed.SQUARE_SCALE, int(count.max())):
            raise ShardError(
                f"a code of {value.max():g} is too large to be summed exactly over {count.max()} tokens; "
                "does this SAE belong to this model and hook point?"
            )
        self.count[feature] += count
        contexts = codes.feature[codes.context_starts()]
        self.context_count[:] += np.bincount(contexts, minlength=len(self.count))
        for limbs, values, scale in (
            (self.total, value, fixed.SUM_SCALE),
            (self.total_square, value * value, fixed.SQUARE_SCALE),
        ):
            limbs[feature] = fixed.add(limbs[feature], fixed.segment_sums(values, starts, scale))
        self.maximum[feature] = np.maximum(self.maximum[feature], np.maximum.reduceat(codes.value, starts))
        bins = codes.feature.astype(np.int64) * NUM_BINS + bin_of(codes.value)
        np.add.at(self.histogram.reshape(-1), bins, 1)

    def merge(self, other: "FeatureStats") -> "FeatureStats":
        """Statistics of both sets of tokens; they share no token.

        Raises:
            ValueError: if the number of features differs.
        """
        if len(self.count) != len(other.count):
            raise ValueError(f"cannot merge statistics of {len(self.count)} and {len(other.count)} features")
        return FeatureStats(
            count=self.count + other.count,
            context_count=self.context_count + other.context_count,
            total=fixed.add(self.total, other.total),
            total_square=fixed.add(self.total_square, other.total_square),
            maximum=np.maximum(self.maximum, other.maximum),
            histogram=self.histogram + other.histogram,
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """The fields by name, for storage."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def check_books(self, tokens_counted: int) -> None:
        """Prove what must hold of any sound statistics.

        Raises:
            ValueError: naming the first feature for which it does not.
        """
        wrong = {
            "sum(histogram) != count": self.histogram.sum(axis=1) != self.count,
            "count > tokens counted": self.count > tokens_counted,
            "context_count > count": self.context_count > self.count,
            "maximum and count disagree on silence": (self.maximum > 0) != (self.count > 0),
        }
        for law, broken in wrong.items():
            if broken.any():
                raise ValueError(f"books do not balance: {law} at feature {int(np.argmax(broken))}")


def bin_of(value: Float32[np.ndarray, " N"]) -> Int64[np.ndarray, " N"]:
    """The histogram bin of each positive code: exponent and three bits of mantissa, clipped to the range."""
    bits = value.view(np.int32).astype(np.int64) >> _SHIFT
    return np.asarray(np.clip(bits - _FIRST, 0, NUM_BINS - 1))


def bin_edges() -> Float64[np.ndarray, " E"]:
    """The H + 1 edges of the bins, ascending: bin i holds edges[i] <= code < edges[i + 1]; both ends are open."""
    step = np.arange(NUM_BINS + 1)
    return np.ldexp(1 + (step % BINS_PER_OCTAVE) / BINS_PER_OCTAVE, OCTAVES[0] + step // BINS_PER_OCTAVE)


def mean(stats: FeatureStats, num_tokens: Int64[np.ndarray, " F"] | int) -> Float64[np.ndarray, " F"]:
    """Sum of codes over `num_tokens`, 0 where that is 0. With counted tokens, silent tokens weigh in as zeros."""
    return fixed.to_float(stats.total, fixed.SUM_SCALE) / np.maximum(num_tokens, 1)


def deviation(stats: FeatureStats, num_tokens: int) -> Float64[np.ndarray, " F"]:
    """Standard deviation of a code over `num_tokens` tokens, silent ones as zeros; population form (no n - 1)."""
    square = fixed.to_float(stats.total_square, fixed.SQUARE_SCALE) / max(num_tokens, 1)
    return np.asarray(np.sqrt(np.maximum(square - mean(stats, num_tokens) ** 2, 0)))


def quantile(stats: FeatureStats, q: float, num_tokens: int | None = None) -> Float64[np.ndarray, " F"]:
    """The q-quantile of codes by nearest rank, over firing tokens, or over `num_tokens` tokens with silent ones as 0.

    It is the harmonic middle of the bin that holds the code of rank ceil(q * tokens), never above the maximum:
    off by at most `QUANTILE_ERROR` relative, unless it falls into an open bin. 0 where the feature never fires.
    """
    edges = bin_edges()
    middle = 2 * edges[:-1] * edges[1:] / (edges[:-1] + edges[1:])
    tokens = stats.count if num_tokens is None else np.full_like(stats.count, num_tokens)
    rank = np.maximum(np.ceil(q * tokens), 1) - (tokens - stats.count)  # among the firing tokens
    chosen = (np.cumsum(stats.histogram, axis=1) >= rank[:, None]).argmax(axis=1)
    return np.where((stats.count > 0) & (rank > 0), np.minimum(middle[chosen], stats.maximum), 0.0)
