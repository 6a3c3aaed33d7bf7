"""Which features does one sequence use: token filter, scores over kept tokens, gates, windows around peaks.

K is the set of kept tokens and a(t) a feature's code. Over K, silent tokens included as zeros:
mean = sum of a(t) / |K|; max; coverage = |{t in K: a(t) > tau}| / |K|, between 0 and 1; selectivity = mean minus
the mean of a background. Only features that fire on a kept token are candidates.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64, Int64

from sae_census.compute.census import masks
from sae_census.compute.numbers import stats as statistics
from sae_census.compute.numbers.codes import Codes
from sae_census.compute.numbers.stats import FeatureStats

TauMode = Literal["p95", "p95_nonzero", "quantile", "constant"]
ScoreMode = Literal["mean", "max", "mean×coverage", "selectivity"]
_NORMAL_95 = 1.959963984540054


def norm_outliers(norm: Float64[np.ndarray, " T"], ratio: float) -> Bool[np.ndarray, " T"]:
    """Tokens whose norm exceeds `ratio` times the (lower) median, as `masks.norm_outliers` for one sequence."""
    with np.errstate(over="ignore"):  # what exceeds infinity is none
        return np.asarray(norm > ratio * np.sort(norm)[(len(norm) - 1) // 2])


def attention_sinks(norm: Float64[np.ndarray, " T"], peak: Float64[np.ndarray, " T"]) -> Bool[np.ndarray, " T"]:
    """Tokens that `masks.attention_sinks` finds in one sequence."""
    found: np.ndarray = masks.attention_sinks(norm[None], peak[None], np.ones((1, len(norm)), bool))[0]
    return found


def kept_tokens(weight: Float64[np.ndarray, " T"], allowed: Bool[np.ndarray, " T"], k: int) -> Bool[np.ndarray, " T"]:
    """The k allowed tokens of greatest weight; among equals the earlier one. All of them if there are no more.

    Raises:
        ValueError: if an allowed weight is NaN.
    """
    places = np.flatnonzero(allowed)
    if np.isnan(weight[places]).any():
        raise ValueError("a token's weight is NaN")
    best = places[np.argsort(-weight[places], kind="stable")[:k]]
    kept = np.zeros(len(weight), bool)
    kept[best] = True
    return kept


def thresholds(stats: FeatureStats, num_tokens: int, mode: TauMode, value: float) -> Float64[np.ndarray, " F"]:
    """Tau of every feature from its background histogram.

    `p95`: the 0.95-quantile over all counted tokens, zeros included, so 0 for a feature that fires on less than
    5 % of them; `p95_nonzero`: over firing tokens; `quantile`: as p95 with q = `value`; `constant`: `value`.
    Quantiles are off by at most `stats.QUANTILE_ERROR`, relative.
    """
    match mode:
        case "p95":
            return statistics.quantile(stats, 0.95, num_tokens)
        case "p95_nonzero":
            return statistics.quantile(stats, 0.95)
        case "quantile":
            return statistics.quantile(stats, value, num_tokens)
        case "constant":
            return np.full(len(stats.count), value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """The features of one SAE that fire on kept tokens, ascending, with what was measured of each."""

    feature: Int64[np.ndarray, " N"]
    mean: Float64[np.ndarray, " N"]
    max: Float64[np.ndarray, " N"]
    coverage: Float64[np.ndarray, " N"]
    selectivity: Float64[np.ndarray, " N"]
    fired: Int64[np.ndarray, " N"]
    """Kept tokens with a code above 0."""

    def score(self, mode: ScoreMode) -> Float64[np.ndarray, " N"]:
        """The score that ranks."""
        match mode:
            case "mean×coverage":
                return np.asarray(self.mean * self.coverage)
            case _:
                return np.asarray(getattr(self, mode))


def measure(
    codes: Codes,
    kept: Bool[np.ndarray, " T"],
    tau: Float64[np.ndarray, " F"],
    background: Float64[np.ndarray, " F"],
) -> Candidates:
    """Measure every feature that fires on a kept token.

    Args:
        codes: of one sequence; the row is ignored.
        kept: K.
        tau: of every feature.
        background: what selectivity subtracts: the mean of every feature somewhere else.
    """
    inside = codes.where(kept[codes.position])
    num_kept = max(int(kept.sum()), 1)
    starts = inside.feature_starts()
    feature = inside.feature[starts].astype(np.int64)
    value = inside.value.astype(np.float64)
    if not len(starts):
        none = np.zeros(0)
        return Candidates(
            feature=feature, mean=none, max=none, coverage=none, selectivity=none, fired=np.zeros(0, np.int64)
        )
    mean = np.add.reduceat(value, starts) / num_kept
    above = np.add.reduceat((value > tau[inside.feature]).astype(np.int64), starts)
    return Candidates(
        feature=feature,
        mean=mean,
        max=np.maximum.reduceat(value, starts),
        coverage=above / num_kept,
        selectivity=mean - background[feature],
        fired=np.diff(np.append(starts, len(inside))),
    )


def mean_over(codes: Codes, tokens: Bool[np.ndarray, " T"], num_features: int) -> Float64[np.ndarray, " F"]:
    """The mean code of every feature over some tokens of one sequence; 0 if there are none."""
    inside = codes.where(tokens[codes.position])
    total = np.bincount(inside.feature, inside.value.astype(np.float64), minlength=num_features)
    return np.asarray(total / max(int(tokens.sum()), 1))


def with_silent(
    found: Candidates, wanted: Int64[np.ndarray, " W"], background: Float64[np.ndarray, " F"]
) -> Candidates:
    """The candidates, and of the wanted features (ascending, distinct) those that fire on no kept token.

    Of a silent one all is zero but selectivity, which is 0 minus its background. Ascending by feature.
    """
    silent = np.setdiff1d(wanted, found.feature)
    feature = np.concatenate([found.feature, silent])
    order = np.argsort(feature)

    def both(measured: np.ndarray, missing: np.ndarray) -> np.ndarray:
        return np.asarray(np.concatenate([measured, missing])[order])

    zeros = np.zeros(len(silent))
    return Candidates(
        feature=feature[order],
        mean=both(found.mean, zeros),
        max=both(found.max, zeros),
        coverage=both(found.coverage, zeros),
        selectivity=both(found.selectivity, zeros - background[silent]),
        fired=both(found.fired, np.zeros(len(silent), np.int64)),
    )


Gate = Literal["min_coverage_pct", "return_top_x", "silent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Candidates in order, after the gates. Candidates are named by their places in the arrays that were given."""

    ranked: Int64[np.ndarray, " R"]
    """Those that pass, best first, at most as many as were asked for."""
    below: Int64[np.ndarray, " B"]
    """The others: best first, those that never fire last."""
    gates: tuple[Gate, ...]
    """What kept each of `below` out."""
    num_fired: int
    num_gated: int
    """Of those that fire, with less than the least coverage."""
    passing: float | None
    """The greatest least coverage that leaves no place of the ranking empty which a feature that fires could take;
    None if the gate leaves none empty."""


def ranked(
    score: Float64[np.ndarray, " N"],
    coverage: Float64[np.ndarray, " N"],
    fires: Bool[np.ndarray, " N"],
    *,
    least_coverage: float,
    at_most: int,
) -> Ranking:
    """Sort by score, then gate by coverage, then cut.

    Args:
        score: of every candidate; among equals the first given comes first.
        coverage: of every candidate.
        fires: whether it fires on a kept token; one that does not is never ranked, and counts as score 0.
        least_coverage: of what is ranked.
        at_most: so many are ranked.
    """
    order = np.argsort(np.where(fires, -score, np.inf), kind="stable")
    passes = fires & (coverage >= least_coverage)
    passed = order[passes[order]]
    below = order[~np.isin(order, passed[:at_most])]
    num_fired, num_places = int(fires.sum()), min(at_most, int(fires.sum()))
    binds = len(passed) < num_places
    return Ranking(
        ranked=passed[:at_most],
        below=below,
        gates=tuple("silent" if not fires[i] else "return_top_x" if passes[i] else "min_coverage_pct" for i in below),
        num_fired=num_fired,
        num_gated=num_fired - len(passed),
        passing=float(np.sort(coverage[fires])[-num_places]) if binds else None,
    )


def percentile(stats: FeatureStats, feature: int, value: float) -> float | None:
    """The share of the feature's background codes below `value`, half of its own bin counted as below.

    1 above the greatest code ever seen; None if the feature never fired there.
    """
    count = int(stats.count[feature])
    if not count:
        return None
    if value > stats.maximum[feature]:
        return 1.0
    mine = int(statistics.bin_of(np.array([value], np.float32))[0])
    bins = stats.histogram[feature]
    return float((bins[:mine].sum() + bins[mine] / 2) / count)


def log_odds(fired: int, tokens: int, background_fired: int, background_tokens: int) -> tuple[float, float, float]:
    """How surprising it is to fire on `fired` of `tokens` tokens: natural log of the odds ratio to the background.

    With 0.5 added to every cell (Haldane and Anscombe), and a 95 % interval by the normal approximation (Woolf),
    which takes tokens as independent: neighbours are not, so the interval is narrower than it ought to be.

    Returns:
        The log-odds ratio, and the interval's low and high end.
    """
    cells = [fired + 0.5, tokens - fired + 0.5, background_fired + 0.5, background_tokens - background_fired + 0.5]
    ratio = math.log(cells[0] / cells[1]) - math.log(cells[2] / cells[3])
    half = _NORMAL_95 * math.sqrt(sum(1 / cell for cell in cells))
    return ratio, ratio - half, ratio + half


def windows(
    position: Int64[np.ndarray, " N"],
    value: Float64[np.ndarray, " N"],
    num_tokens: int,
    *,
    width: tuple[int, int],
    at_most: int,
) -> list[tuple[int, int, int]]:
    """Windows (start, stop, index of the peak in the arrays) around the strongest tokens; no two overlap.

    Greedy: strongest first, among equals the earliest; a peak whose window would touch an earlier one is left out.

    Args:
        position: of the codes.
        value: the codes.
        num_tokens: of the sequence; windows are cut at its ends.
        width: tokens before the peak, and from the peak on.
        at_most: this many.
    """
    found: list[tuple[int, int, int]] = []
    for i in np.lexsort((position, -value)):
        start, stop = max(int(position[i]) - width[0], 0), min(int(position[i]) + width[1], num_tokens)
        if all(stop <= a or start >= b for a, b, _ in found):
            found.append((start, stop, int(i)))
            if len(found) == at_most:
                break
    return found
