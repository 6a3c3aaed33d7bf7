"""The mathematics of discovery against dense and literal references."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_census.compute import discovery
from sae_census.compute.numbers.codes import Codes, sorted_codes
from sae_census.compute.numbers.stats import QUANTILE_ERROR, FeatureStats, quantile

T, F = 24, 11
ERROR = QUANTILE_ERROR + 1e-12
MODES = (("p95", 0.0, 0.95), ("quantile", 0.2, 0.2), ("quantile", 0.5, 0.5), ("quantile", 0.999, 0.999))


def dense_codes(seed: int, num_tokens: int = T, density: float = 0.4) -> np.ndarray:
    """(tokens, F) codes: ties, a feature that always fires, one that never does, and six octaves of size."""
    rng = np.random.default_rng(seed)
    value = np.exp2(rng.integers(-12, 12, (num_tokens, F)) / 4).astype(np.float32)
    value *= rng.random((num_tokens, F)) < density
    value[:, 3] = np.float32(0.75) + np.arange(num_tokens, dtype=np.float32) % 3
    value[:, 7] = 0
    return value


def as_codes(dense: np.ndarray) -> Codes:
    token, feature = np.nonzero(dense)
    return sorted_codes(
        feature.astype(np.int32), token.astype(np.int64), dense[token, feature], num_positions=len(dense)
    )


def as_stats(dense: np.ndarray) -> FeatureStats:
    stats = FeatureStats.zero(dense.shape[1])
    stats.add(as_codes(dense))
    return stats


def nearest_rank(values: np.ndarray, q: float) -> float:
    """The value of rank ceil(q n), counted from 1; 0 of nothing."""
    ascending = sorted(float(value) for value in values)
    return ascending[max(math.ceil(q * len(ascending)), 1) - 1] if ascending else 0.0


weights = st.lists(st.tuples(st.sampled_from((0.0, 1.0, 1.5, -2.0, math.inf)), st.booleans()), min_size=1, max_size=30)


@given(weights, st.integers(1, 35))
def test_kept_tokens_are_the_heaviest_and_among_equals_the_earliest(given_tokens, k):
    weight, allowed = (np.array(column) for column in zip(*given_tokens, strict=True))
    kept = discovery.kept_tokens(weight.astype(np.float64), allowed.astype(bool), k)
    ranked = sorted((i for i in range(len(weight)) if allowed[i]), key=lambda i: (-weight[i], i))
    assert sorted(ranked[:k]) == np.flatnonzero(kept).tolist()


def test_kept_tokens_refuse_a_nan_only_where_it_could_be_kept():
    weight, allowed = np.array([math.nan, 1.0, 2.0]), np.array([False, True, True])
    assert discovery.kept_tokens(weight, allowed, 1).tolist() == [False, False, True]
    with pytest.raises(ValueError, match="NaN"):
        discovery.kept_tokens(weight, ~allowed, 1)


@pytest.mark.parametrize(("norms", "ratio", "outliers"), [
    ([1.0, 1.0, 3.1, 1.0], 3.0, [2]),
    ([1.0, 1.0, 3.0, 1.0], 3.0, []),
    ([1.0, 9.0], 5.0, [1]),  # of an even number the lower median
    ([4.0], 1.5, []),
])  # fmt: skip
def test_norm_outliers_exceed_the_lower_median(norms, ratio, outliers):
    assert np.flatnonzero(discovery.norm_outliers(np.array(norms), ratio)).tolist() == outliers


@pytest.mark.parametrize(("mode", "value", "q"), MODES)
@pytest.mark.parametrize("density", [0.02, 0.4, 1.0])
def test_tau_is_the_quantile_over_counted_tokens_with_silent_ones_as_zeros(mode, value, q, density):
    dense = dense_codes(1, 400, density)
    found = discovery.thresholds(as_stats(dense), len(dense), mode, value)
    exact = np.array([nearest_rank(column, q) for column in dense.T])
    assert ((found == 0) == (exact == 0)).all()
    np.testing.assert_allclose(found, exact, rtol=ERROR)


def test_a_feature_of_low_frequency_has_p95_zero_and_a_positive_p95_of_firing_tokens():
    dense = np.zeros((100, 2), np.float32)
    dense[:5, 0], dense[:6, 1] = 2, 2
    assert discovery.thresholds(as_stats(dense), 100, "p95", 0.0)[0] == 0
    assert discovery.thresholds(as_stats(dense), 100, "p95", 0.0)[1] > 0
    assert (discovery.thresholds(as_stats(dense), 100, "p95_nonzero", 0.0) > 0).all()


def test_tau_over_firing_tokens_leaves_zeros_out():
    dense = dense_codes(2, 300)
    found = discovery.thresholds(as_stats(dense), len(dense), "p95_nonzero", 0.0)
    np.testing.assert_allclose(found, [nearest_rank(c[c > 0], 0.95) for c in dense.T], rtol=ERROR)
    assert found[7] == 0


def test_tau_constant_is_that_number_for_every_feature():
    assert discovery.thresholds(as_stats(dense_codes(3)), T, "constant", 0.25).tolist() == [0.25] * F


@given(st.lists(st.floats(2**-10, 1024, width=32), max_size=40), st.integers(0, 60), st.floats(0.001, 0.999))
def test_quantile_over_tokens_is_the_quantile_of_the_codes_padded_with_zeros(values, num_silent, q):
    dense = np.array([*values, *[0.0] * num_silent, 0.0], np.float32)[:, None]
    found = quantile(as_stats(dense), q, len(dense))[0]
    assert found == pytest.approx(nearest_rank(dense[:, 0], q), rel=ERROR, abs=0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("own", [False, True], ids=["corpus", "own tokens"])
def test_measures_are_those_of_the_dense_codes(seed, own):
    rng = np.random.default_rng(seed)
    dense, kept = dense_codes(seed), rng.random(T) < 0.5
    tau = np.where(rng.random(F) < 0.5, 0.0, 1.0)
    others = ~kept & (rng.random(T) < 0.7)
    background = discovery.mean_over(as_codes(dense), others, F) if own else rng.random(F)
    found = discovery.measure(as_codes(dense), kept, tau, background)

    inside = dense[kept].astype(np.float64)
    mine = np.flatnonzero((inside > 0).any(axis=0))
    subtracted = dense[others].astype(np.float64).mean(axis=0) if own else background
    assert found.feature.tolist() == mine.tolist()
    np.testing.assert_allclose(found.mean, inside.mean(axis=0)[mine], rtol=1e-12)
    assert found.max.tolist() == inside.max(axis=0)[mine].tolist()
    assert found.coverage.tolist() == (inside > tau).mean(axis=0)[mine].tolist()
    assert found.fired.tolist() == (inside > 0).sum(axis=0)[mine].tolist()
    np.testing.assert_allclose(found.selectivity, (inside.mean(axis=0) - subtracted)[mine], rtol=1e-12, atol=1e-12)
    for mode, score in (
        ("mean", found.mean), ("max", found.max), ("selectivity", found.selectivity),
        ("mean×coverage", found.mean * found.coverage),
    ):  # fmt: skip
        assert found.score(mode).tolist() == score.tolist()


def test_a_code_equal_to_tau_does_not_count_for_coverage():
    dense = np.array([[1.0], [2.0], [0.5]], np.float32)
    found = discovery.measure(as_codes(dense), np.ones(3, bool), np.array([1.0]), np.zeros(1))
    assert found.coverage.tolist() == [1 / 3]


@pytest.mark.parametrize("kept", [np.zeros(T, bool), np.arange(T) == 5])
def test_nothing_is_measured_where_nothing_fires(kept):
    dense = np.zeros((T, F), np.float32)
    found = discovery.measure(as_codes(dense), kept, np.zeros(F), np.zeros(F))
    assert [len(getattr(found, name)) for name in ("feature", "mean", "max", "coverage", "fired")] == [0] * 5
    assert len(found.score("mean×coverage")) == 0


@pytest.mark.parametrize("seed", range(4))
def test_a_list_with_its_silent_features_is_the_dense_columns_of_the_list(seed):
    rng = np.random.default_rng(seed)
    dense, kept, background = dense_codes(seed), rng.random(T) < 0.3, rng.random(F)
    wanted = np.sort(rng.permutation(F)[:7]).astype(np.int64)
    codes = as_codes(dense)
    found = discovery.measure(codes.where(np.isin(codes.feature, wanted)), kept, np.zeros(F), background)
    whole = discovery.with_silent(found, wanted, background)
    inside = dense[kept][:, wanted].astype(np.float64)
    assert whole.feature.tolist() == wanted.tolist()
    np.testing.assert_allclose(whole.mean, inside.mean(axis=0), rtol=1e-12)
    assert whole.max.tolist() == inside.max(axis=0).tolist()
    assert whole.fired.tolist() == (inside > 0).sum(axis=0).tolist()
    np.testing.assert_allclose(whole.selectivity, inside.mean(axis=0) - background[wanted], atol=1e-12)


@given(
    st.lists(st.tuples(st.sampled_from([-1.0, 0.5, 1.0, 2.0]), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.booleans())),
    st.sampled_from([0.0, 0.25, 0.3, 1.0]),
    st.integers(1, 8),
)
def test_a_ranking_is_sorted_gated_cut_and_accounts_for_every_candidate(candidates, least, size):
    score, coverage, fires = (np.array(column) for column in zip(*candidates, strict=True)) if candidates else (
        np.zeros(0), np.zeros(0), np.zeros(0, bool)
    )  # fmt: skip
    found = discovery.ranked(score, coverage, fires.astype(bool), least_coverage=least, at_most=size)
    order = sorted((i for i in range(len(candidates)) if fires[i]), key=lambda i: (-score[i], i))
    passed = [i for i in order if coverage[i] >= least]
    gate = {i: "return_top_x" if i in passed else "min_coverage_pct" for i in order if i not in passed[:size]}
    gate |= {i: "silent" for i in range(len(candidates)) if not fires[i]}
    assert found.ranked.tolist() == passed[:size]
    assert list(zip(found.below.tolist(), found.gates, strict=True)) == list(gate.items())
    assert (found.num_fired, found.num_gated) == (len(order), len(order) - len(passed))
    if found.passing is None:
        assert len(passed) >= min(size, len(order))
        return

    def length(bound: float) -> int:
        return len(discovery.ranked(score, coverage, fires.astype(bool), least_coverage=bound, at_most=size).ranked)

    assert length(found.passing) == min(size, len(order)) > length(float(np.nextafter(found.passing, 2)))


def test_percentile_is_the_share_of_weaker_codes_up_to_half_a_bin():
    dense = dense_codes(5, 500, 0.6)
    stats = as_stats(dense)
    for feature in range(F):
        column = np.sort(dense[:, feature][dense[:, feature] > 0]).astype(np.float64)
        if not len(column):
            assert discovery.percentile(stats, feature, 1.0) is None
            continue
        for value in (1e-6, 0.3, float(column[0]), float(np.median(column)), float(column[-1]), 1.7):
            found = discovery.percentile(stats, feature, float(np.float32(value)))
            below, above = (column < value * 8 / 9).mean(), (column < value * 9 / 8).mean()
            assert below <= found <= above or found == 1.0 == (column < value).mean()
        assert discovery.percentile(stats, feature, float(column[-1]) * 1.001) == 1.0


def test_percentile_counts_half_of_the_bin_of_the_value():
    dense = np.array([[1.0], [1.0], [4.0], [4.0]], np.float32)
    assert discovery.percentile(as_stats(dense), 0, 1.0) == 0.25
    assert discovery.percentile(as_stats(dense), 0, 2.0) == 0.5
    assert discovery.percentile(as_stats(dense), 0, 4.0) == 0.75


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 9000), st.integers(0, 9000))
def test_log_odds_are_haldanes_with_woolfs_interval(fired, silent, background_fired, background_silent):
    ratio, low, high = discovery.log_odds(fired, fired + silent, background_fired, background_fired + background_silent)
    a, b, c, d = (n + 0.5 for n in (fired, silent, background_fired, background_silent))
    assert ratio == pytest.approx(math.log(a * d / (b * c)), abs=1e-9)
    half = 1.959963984540054 * math.sqrt(1 / a + 1 / b + 1 / c + 1 / d)
    assert (low, high) == (pytest.approx(ratio - half), pytest.approx(ratio + half))


def test_log_odds_change_sign_with_the_sides():
    there, back = discovery.log_odds(3, 10, 40, 900), discovery.log_odds(40, 900, 3, 10)
    assert there == pytest.approx((-back[0], -back[2], -back[1]))


@given(
    st.lists(st.tuples(st.integers(0, 60), st.sampled_from((0.5, 1.0, 2.0))), max_size=25, unique_by=lambda p: p[0]),
    st.tuples(st.integers(0, 6), st.integers(1, 6)),
    st.integers(1, 6),
)
def test_windows_are_greedy_ordered_and_never_overlap(peaks, width, at_most):
    position = np.array([p for p, _ in peaks], np.int64)
    value = np.array([v for _, v in peaks], np.float64)
    found = discovery.windows(position, value, 61, width=width, at_most=at_most)
    assert len(found) <= at_most

    taken: set[int] = set()
    expected = []
    for place, strength in sorted(peaks, key=lambda peak: (-peak[1], peak[0])):
        window = range(max(place - width[0], 0), min(place + width[1], 61))
        if len(expected) < at_most and not taken & set(window):
            taken |= set(window)
            expected.append((window.start, window.stop, place, strength))
    assert [(start, stop, position[i], value[i]) for start, stop, i in found] == expected
