"""How far two censuses of the same features lie apart: histograms of codes, and rankings."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64
from scipy.stats import spearmanr

from sae_census.compute.numbers.stats import BINS_PER_OCTAVE


def histogram_distance(a: Int64[np.ndarray, "F H"], b: Int64[np.ndarray, "F H"]) -> Float64[np.ndarray, " F"]:
    """Total variation between the codes of firing tokens: 0 if alike, 1 if no bin is shared; NaN if one is empty."""
    return np.asarray(np.abs(_shares(a) - _shares(b)).sum(axis=1) / 2)


def histogram_shift(a: Int64[np.ndarray, "F H"], b: Int64[np.ndarray, "F H"]) -> Float64[np.ndarray, " F"]:
    """Octaves by which codes of firing tokens must be moved on average to turn one histogram into the other.

    The Wasserstein-1 distance on the scale of log2(code); NaN if a histogram is empty.
    """
    return np.asarray(np.abs(np.cumsum(_shares(a) - _shares(b), axis=1)).sum(axis=1) / BINS_PER_OCTAVE)


def _shares(histogram: Int64[np.ndarray, "F H"]) -> Float64[np.ndarray, "F H"]:
    count = histogram.sum(axis=1, keepdims=True)
    return np.asarray(np.divide(histogram, count, out=np.full(histogram.shape, np.nan), where=count > 0))


def rank_correlation(a: Float64[np.ndarray, " F"], b: Float64[np.ndarray, " F"]) -> float | None:
    """Spearman's: the correlation of ranks, ties sharing their mean rank; None where a side is constant or empty."""
    if any(len(np.unique(scores)) < 2 for scores in (a, b)):
        return None
    return float(spearmanr(a, b).statistic)


def overlap(a: Float64[np.ndarray, " F"], b: Float64[np.ndarray, " F"], sizes: Sequence[int]) -> dict[int, float]:
    """Of the best n features on either side, the share that is among the best n of the other; for sizes up to F.

    Among equal scores the lowest id comes first.
    """
    first, second = (np.argsort(-scores, kind="stable") for scores in (a, b))
    return {n: len(np.intersect1d(first[:n], second[:n])) / n for n in sizes if n <= len(a)}
