"""Is a feature different in two sets of documents? Effect sizes, intervals and p-values from mergeable sums.

Tokens of one document are alike, so documents, not tokens, are the independent units (clusters). For a set of
documents d with n_d counted tokens and a value y_d each (the count of firings, or the sum of codes), the rate
r = sum(y) / sum(n) is a ratio whose robust variance needs five sums over documents: y, n, y², y n and n². Documents
in which a feature is silent enter through n and n² alone.

Tests are score tests. With residuals e_d = y_d - r0 n_d from the rates that a hypothesis r_a - r_b = delta allows,

    z = (r_a - r_b - delta) / sqrt(f (E_a / N_a² + E_b / N_b²)),   E = sum(e²),   N = sum(n),

is compared with the normal distribution, and an interval holds every delta that is not rejected: it excludes 0
exactly where p < 1 - confidence. f = 1 / (1 - N_a N_b / N² (c_a + c_b)), with c = sum(n²) / N² of each set, makes
the variance unbiased where tokens are independent; for documents of one size in sets of one size, z² then is the
statistic of a permutation of documents between the sets. Hence no degrees of freedom: where few documents carry
the weight z cannot become large, and the interval becomes the whole line.

Each set has a variance of its own, because sets differ in the length and spread of their documents. But a set in
which a feature fires in g documents, few or none, does not show its variance. So E is g / (g + 5) of the set's own
and 5 / (g + 5) of what documents of both sets, were they alike, would give it: v ((1 - icc) N + icc sum(n²)) with the
variance v of a token and the intra-class correlation of both sets. On contexts of real text, taken for documents
and shuffled between two sets of which one is nine times as large, 4.8 % of p-values are below 0.05 and 0.09 % below
0.001; without the 5 documents, 6.9 % and 0.6 %.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64
from scipy.special import logit
from scipy.stats import false_discovery_control, norm

Column = Float64[np.ndarray, " F"]
PRIOR_DOCUMENTS = 5
"""Weight of what both sets share in the variance of one."""
_STEPS, _HALVINGS = 17, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The counted tokens of a set of documents; the same for all features."""

    documents: int
    """With at least one counted token."""
    tokens: int
    square: float
    """Sum over documents of (counted tokens)²."""

    @property
    def concentration(self) -> float:
        """Sum of the squared shares of documents: 1 / documents if all have one size, 1 if one has all tokens."""
        return self.square / self.tokens**2


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """One value y of F features, summed over the documents d, and over the tokens, of a set."""

    of: Tokens
    firing_documents: Int64[np.ndarray, " F"]
    """Documents in which the feature fires."""
    value: Column
    """Sum of y_d."""
    square: Column
    """Sum of y_d²."""
    with_tokens: Column
    """Sum of y_d n_d."""
    token_square: Column
    """Sum over tokens of the square of what a token adds to y."""

    @property
    def rate(self) -> Column:
        """What a token adds to y on average."""
        return np.asarray(self.value / self.of.tokens)

    @property
    def token_variance(self) -> Column:
        """Variance of that (population form)."""
        return np.asarray(np.maximum(self.token_square / self.of.tokens - self.rate**2, 0))

    def residual_square(self, rate: Column) -> Column:
        """Sum over documents of (y_d - rate n_d)²."""
        return np.asarray(np.maximum(self.square - 2 * rate * self.with_tokens + rate**2 * self.of.square, 0))

    @property
    def slack(self) -> Column:
        """Sum over documents of (y_d - own rate n_d) n_d."""
        return self.with_tokens - self.rate * self.of.square


@dataclass(frozen=True, slots=True, kw_only=True)
class Products:
    """Sums over documents that both sets hold, of products of what a document has in each."""

    values: Column
    """Sum of y_d(a) y_d(b)."""
    a_with_tokens: Column
    """Sum of y_d(a) n_d(b)."""
    b_with_tokens: Column
    """Sum of n_d(a) y_d(b)."""
    tokens: float
    """Sum of n_d(a) n_d(b)."""

    def residual_product(self, rate_a: Column, rate_b: Column) -> Column:
        """Sum of (y_d(a) - rate_a n_d(a)) (y_d(b) - rate_b n_d(b))."""
        product = self.values - rate_b * self.a_with_tokens - rate_a * self.b_with_tokens
        return np.asarray(product + rate_a * rate_b * self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate of a minus b and the interval around it; an infinite end is one that the data do not show."""

    estimate: Column
    low: Column
    high: Column

    def times(self, unit: Column) -> "Interval":
        """The same in other units, which are taken as known."""
        return Interval(estimate=self.estimate * unit, low=self.low * unit, high=self.high * unit)


def is_testable(a: Sums, b: Sums, least: int, *, same_documents: bool) -> Bool[np.ndarray, " F"]:
    """Whether a feature fires in at least `least` documents of both sets together.

    What both sets say together decides, so that the choice cannot favour a difference. 5 documents that all fall
    into one of two equal sets have p = 0.06 in a test of permutations: fewer could hardly show anything. Features
    that fire in a few documents more are tested, and their p-values err on the side of caution.

    Args:
        a: one set.
        b: the other.
        least: documents.
        same_documents: whether both sets hold the same documents.
    """
    together = np.maximum if same_documents else np.add
    return np.asarray(together(a.firing_documents, b.firing_documents) >= least)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shared:
    """What documents of both sets together say of the variance of each."""

    weight_a: Column
    """Of the set's own residuals; the rest is the weight of the shared ones."""
    weight_b: Column
    total: Column
    """Sum of squared residuals of both sets about their own rates; of paired sets, of the residuals' differences."""
    size_a: Column
    """(1 - icc) sum(n) + icc sum(n²): times the variance of a token, that of the set's sum of y."""
    size_b: Column


def _shared(a: Sums, b: Sums, products: Products | None = None, prior: int = PRIOR_DOCUMENTS) -> _Shared:
    total = a.residual_square(a.rate) + b.residual_square(b.rate)
    alone = a.token_variance * a.of.tokens + b.token_variance * b.of.tokens
    alike = a.token_variance * a.of.square + b.token_variance * b.of.square
    icc = np.clip(_ratio(total - alone, alike - alone), 0, 1)
    size_a, size_b = ((1 - icc) * s.of.tokens + icc * s.of.square for s in (a, b))
    weight_a, weight_b = (s.firing_documents / (s.firing_documents + prior) for s in (a, b))
    if products is not None:
        total = np.maximum(total - 2 * products.residual_product(a.rate, b.rate), 0)
    return _Shared(weight_a=weight_a, weight_b=weight_b, total=total, size_a=size_a, size_b=size_b)


def _ratio(x: Column, y: Column) -> Column:
    """The quotient, 0 where y is 0."""
    return np.asarray(np.divide(x, y, out=np.zeros_like(x), where=y != 0))


def rate_difference(
    a: Sums, b: Sums, *, confidence: float, products: Products | None = None, prior: int = PRIOR_DOCUMENTS
) -> tuple[Interval, Column]:
    """The difference of two rates with its interval, and the p-value of no difference (two-sided).

    Args:
        a: one set.
        b: the other; it shares no document with `a`, unless `products` are given.
        confidence: of the interval, as 0.95.
        products: of sets that hold the same documents. What a document has in both then cancels, f is 1, the
            variance is the sets' own, and z² at delta = 0 is the statistic of flipping the signs of documents.
            Without them the test of such sets is conservative where a document is alike in both.
        prior: how many documents what both sets share weighs in the variance of one.
    """
    num_a, num_b = a.of.tokens, b.of.tokens
    share_a, share_b = num_a / (num_a + num_b), num_b / (num_a + num_b)
    # Under r_a - r_b = delta the rates are r_a - share_b x and r_b + share_a x, with x = estimate - delta. So the
    # variance is a quadratic in x: c0 + c1 x + c2 x².
    unit_a, unit_b = np.full_like(a.value, num_a**-2.0), np.full_like(b.value, num_b**-2.0)
    c0 = np.zeros_like(a.value)
    factor = 1.0
    if products is None:
        both = _shared(a, b, prior=prior)
        c0 = (1 - both.weight_a) * unit_a * both.size_a + (1 - both.weight_b) * unit_b * both.size_b
        c0 *= _ratio(both.total, both.size_a + both.size_b)
        unit_a, unit_b = both.weight_a * unit_a, both.weight_b * unit_b
        factor = 1 / (1 - share_a * share_b * (a.of.concentration + b.of.concentration))
    c0 = c0 + unit_a * a.residual_square(a.rate) + unit_b * b.residual_square(b.rate)
    c1 = 2 * (share_b * unit_a * a.slack - share_a * unit_b * b.slack)
    c2 = share_b**2 * unit_a * a.of.square + share_a**2 * unit_b * b.of.square
    if products is not None:
        unit = 2 / (num_a * num_b)
        c0 = np.maximum(c0 - unit * products.residual_product(a.rate, b.rate), 0)
        a_slack = products.a_with_tokens - a.rate * products.tokens
        b_slack = products.b_with_tokens - b.rate * products.tokens
        c1 = c1 - unit * (share_b * b_slack - share_a * a_slack)
        c2 = c2 + unit * share_a * share_b * products.tokens
    estimate = a.rate - b.rate
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.abs(estimate) / np.sqrt(factor * np.maximum(c0 + c1 * estimate + c2 * estimate**2, 0))
        p = np.where(estimate == 0, 1.0, 2 * norm.sf(z))
        k = factor * norm.isf((1 - confidence) / 2) ** 2  # the interval: x² <= k (c0 + c1 x + c2 x²)
        lead = 1 - k * c2
        middle, half = k * c1 / (2 * lead), np.sqrt((k * c1) ** 2 + 4 * lead * k * c0) / (2 * lead)
    low = np.where(lead > 0, estimate - middle - half, -np.inf)
    high = np.where(lead > 0, estimate - middle + half, np.inf)
    return Interval(estimate=estimate, low=low, high=high), p


def log_odds(a: Sums, b: Sums, *, confidence: float, products: Products | None = None) -> Interval:
    """The difference of the log-odds of firing; infinite where one set is silent, NaN where both are.

    The interval is that of the score test: u firings are moved from set to set, which keeps their sum and changes
    the log-odds, as long as u² <= z² V. V is the variance of sum_a(e) once the common rate is estimated: the
    residuals of each set count by the other's share of v_a N_a + v_b N_b, with v = r (1 - r).

    Args:
        a: counts of firings in one set.
        b: in the other.
        confidence: of the interval.
        products: of sets that hold the same documents.
    """
    num_a, num_b = a.of.tokens, b.of.tokens
    both = _shared(a, b, products)
    unit = _ratio(both.total, a.token_variance * both.size_a + b.token_variance * both.size_b)
    quantile = norm.isf((1 - confidence) / 2) ** 2

    def rates(u: Column) -> tuple[Column, Column]:
        return np.clip((a.value - u) / num_a, 0, 1), np.clip((b.value + u) / num_b, 0, 1)

    def difference(u: Column) -> Column:
        rate_a, rate_b = rates(u)
        with np.errstate(invalid="ignore"):  # both silent
            return np.asarray(logit(rate_a) - logit(rate_b))

    def is_allowed(u: Column) -> Bool[np.ndarray, " F"]:
        rate_a, rate_b = rates(u)
        v_a, v_b = rate_a * (1 - rate_a), rate_b * (1 - rate_b)
        share_a = _ratio(v_a * num_a, v_a * num_a + v_b * num_b)
        square_a = both.weight_a * a.residual_square(rate_a) + (1 - both.weight_a) * unit * v_a * both.size_a
        square_b = both.weight_b * b.residual_square(rate_b) + (1 - both.weight_b) * unit * v_b * both.size_b
        variance = (1 - share_a) ** 2 * square_a + share_a**2 * square_b
        if products is not None:
            common = np.sqrt(both.weight_a * both.weight_b) * products.residual_product(rate_a, rate_b)
            variance = variance - 2 * share_a * (1 - share_a) * common
        return np.asarray(u**2 <= quantile * variance)

    def end(most: Column) -> Column:
        """The log-odds where a move towards `most` first stops to be allowed; infinite if it never does."""
        inside, outside = np.zeros_like(most), np.full_like(most, np.nan)
        for step in np.linspace(0, 1, _STEPS)[1:]:
            allowed, is_open = is_allowed(step * most), np.isnan(outside)
            inside = np.where(is_open & allowed, step * most, inside)
            outside = np.where(is_open & ~allowed, step * most, outside)
        outside = np.where(np.isnan(outside), most, outside)
        for _ in range(_HALVINGS):
            middle = (inside + outside) / 2
            allowed = is_allowed(middle)
            inside, outside = np.where(allowed, middle, inside), np.where(allowed, outside, middle)
        return difference(inside)

    low = end(np.minimum(a.value, num_b - b.value))
    high = end(-np.minimum(b.value, num_a - a.value))
    return Interval(estimate=difference(np.zeros_like(a.value)), low=low, high=high)


def pooled_deviation(a: Sums, b: Sums) -> Column:
    """Standard deviation of what a token adds to y, within sets, both sets' tokens weighing alike."""
    num_a, num_b = a.of.tokens, b.of.tokens
    return np.asarray(np.sqrt((a.token_variance * num_a + b.token_variance * num_b) / max(num_a + num_b - 2, 1)))


def false_discovery_rates(p: Column) -> Column:
    """Benjamini-Hochberg: the least false discovery rate at which each test would count; NaN stays NaN."""
    q = np.full_like(p, np.nan)
    tested = ~np.isnan(p)
    q[tested] = false_discovery_control(p[tested])
    return q
