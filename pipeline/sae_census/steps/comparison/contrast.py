"""The columns of a comparison: effect sizes, intervals, p-values and ranks of the features of one SAE.

NaN stands for no answer: a quotient of nothing, or a test that was not made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from sae_census.compute import comparison as tests
from sae_census.compute.comparison import Interval, Products, Sums, Tokens
from sae_census.compute.numbers import drift, fixed
from sae_census.config import RankBy

Columns = dict[str, np.ndarray]
TESTED = ("frequency", "mean")
"""What has p-values; each is a family of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteSums:
    """What one side says about one SAE."""

    counts: Sums
    """Of firings."""
    codes: Sums
    """Of codes."""
    histogram: Int64[np.ndarray, "F H"] | None
    """Of codes; None if the side is a part of its catalog."""


def site_sums(of: Tokens, arrays: Mapping[str, np.ndarray], histogram: Int64[np.ndarray, "F H"] | None) -> SiteSums:
    """What the arrays of statistics and documents say about one side.

    Args:
        of: the side's tokens.
        arrays: fields of `FeatureStats` and `DocumentStats`.
        histogram: of codes, if it is known.
    """
    count, documents = arrays["count"].astype(np.float64), arrays["document_count"]
    return SiteSums(
        counts=Sums(
            of=of,
            firing_documents=documents,
            value=count,
            square=arrays["document_count_square"].astype(np.float64),
            with_tokens=arrays["document_count_tokens"].astype(np.float64),
            token_square=count,
        ),
        codes=Sums(
            of=of,
            firing_documents=documents,
            value=fixed.to_float(arrays["total"], fixed.SUM_SCALE),
            square=fixed.to_float(arrays["document_total_square"], fixed.SQUARE_SCALE),
            with_tokens=fixed.to_float(arrays["document_total_tokens"], fixed.SUM_SCALE),
            token_square=fixed.to_float(arrays["total_square"], fixed.SQUARE_SCALE),
        ),
        histogram=histogram,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairing:
    """Both sides hold the same documents."""

    counts: Products | None
    """None if partials do not keep codes: then intervals and p-values are those of unpaired sides, too cautious."""
    codes: Products | None


def columns(a: SiteSums, b: SiteSums, pairing: Pairing | None, *, confidence: float, min_documents: int) -> Columns:
    """The columns of `comparison.parquet` that one SAE's features need no others for.

    Args:
        a: one side.
        b: the other.
        pairing: None if the sides share no documents.
        confidence: of the intervals.
        min_documents: features that fire in fewer are not tested.
    """
    of_counts, of_codes = (pairing.counts, pairing.codes) if pairing is not None else (None, None)
    frequency, frequency_p = tests.rate_difference(a.counts, b.counts, confidence=confidence, products=of_counts)
    mean, mean_p = tests.rate_difference(a.codes, b.codes, confidence=confidence, products=of_codes)
    odds = tests.log_odds(a.counts, b.counts, confidence=confidence, products=of_counts)
    deviation = tests.pooled_deviation(a.codes, b.codes)
    effect = mean.times(np.divide(1, deviation, out=np.zeros_like(deviation), where=deviation > 0))
    testable = tests.is_testable(a.counts, b.counts, min_documents, same_documents=pairing is not None)
    found: Columns = {
        "frequency_p": np.where(testable, frequency_p, np.nan),
        "mean_p": np.where(testable, mean_p, np.nan),
    }
    intervals: dict[str, tuple[str, Interval]] = {
        "frequency": ("frequency_difference", frequency),
        "mean": ("mean_difference", mean),
        "log_odds": ("log_odds", odds),
        "effect_size": ("effect_size", effect),
    }
    for name, (estimate, interval) in intervals.items():
        found[estimate] = interval.estimate
        found[f"{name}_low"] = np.where(testable, interval.low, np.nan)
        found[f"{name}_high"] = np.where(testable, interval.high, np.nan)
    for side, sums in (("a", a), ("b", b)):
        count = sums.counts.value
        found |= {
            f"count_{side}": count.astype(np.int64),
            f"documents_{side}": sums.counts.firing_documents,
            f"frequency_{side}": sums.counts.rate,
            f"mean_{side}": sums.codes.rate,
            f"mean_when_firing_{side}": np.divide(sums.codes.value, count, out=np.zeros_like(count), where=count > 0),
        }
    nothing = np.full(len(deviation), np.nan)
    found |= {"histogram_distance": nothing, "histogram_shift": nothing}
    if a.histogram is not None and b.histogram is not None:
        found["histogram_distance"] = drift.histogram_distance(a.histogram, b.histogram)
        found["histogram_shift"] = drift.histogram_shift(a.histogram, b.histogram)
    return found


def add_false_discovery_rates(sites: Sequence[Columns]) -> None:
    """Give every site its columns of q: each of `TESTED` is one family over all tested features of all sites."""
    bounds = np.cumsum([len(site["count_a"]) for site in sites])[:-1]
    for name in TESTED:
        q = tests.false_discovery_rates(np.concatenate([site[f"{name}_p"] for site in sites]))
        for site, part in zip(sites, np.split(q, bounds), strict=True):
            site[f"{name}_q"] = part


def add_ranks(site: Columns, by: RankBy) -> None:
    """Give a site its ranks in both directions, 1 for the best; NaN where a feature is not tested.

    The order is that of the interval's end nearer to no difference: how much more there is at least. Among equal
    ends that of the estimate, then that of the id.
    """
    estimate = site[by if by in site else f"{by}_difference"]
    tested = np.flatnonzero(~np.isnan(site["frequency_p"]))
    for side, sign, end in (("a", 1, "low"), ("b", -1, "high")):
        assured = sign * site[f"{by}_{end}"][tested]
        order = np.lexsort((tested, -sign * estimate[tested], -assured))
        rank = np.full(len(estimate), np.nan)
        rank[tested[order]] = np.arange(1, len(tested) + 1)
        site[f"rank_{side}"] = rank


def test_behind(by: RankBy) -> str:
    """What is tested where features are ranked: the mean code for `mean` and `effect_size`, else the frequency."""
    return "mean" if by in ("mean", "effect_size") else "frequency"


def best(site: Columns, side: str, by: RankBy, rate: float) -> Int64[np.ndarray, " K"]:
    """The features with more on one side at a false discovery rate, best rank first."""
    of = test_behind(by)
    more = site[f"{of}_difference"] * (1 if side == "a" else -1) > 0
    found = np.flatnonzero(more & (site[f"{of}_q"] <= rate))
    return found[np.argsort(site[f"rank_{side}"][found])]
