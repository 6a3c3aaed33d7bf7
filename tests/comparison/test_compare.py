"""Comparisons say what the formulas say, are right as often as they claim, and find what was planted."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TOPICS, rewrite_manifest, write_corpus
from reference import Twin
from scipy import stats
from scipy.special import expit, logit
from transformers import AutoModelForCausalLM

from sae_census.compute import comparison as tests
from sae_census.compute.comparison import Products, Sums, Tokens
from sae_census.compute.numbers import drift
from sae_census.compute.numbers.stats import NUM_BINS
from sae_census.config import AnalyzeConfig, CompareConfig
from sae_census.errors import ConfigError, IdentityError, UserError
from sae_census.flows.census.analyze import analyze
from sae_census.flows.comparison.compare import Comparison, compare

MakeConfig = Callable[..., AnalyzeConfig]
Z = stats.norm.isf(0.025)

# --- documents made up ---------------------------------------------------------------------------------------


def sums_of(values: np.ndarray, num_tokens: np.ndarray, token_square: np.ndarray | None = None) -> Sums:
    """From (features, documents) values; counts of firings unless the squares of tokens are given."""
    values = values.astype(np.float64)
    return Sums(
        of=Tokens(
            documents=len(num_tokens), tokens=int(num_tokens.sum()), square=float((num_tokens.astype(float) ** 2).sum())
        ),
        firing_documents=(values > 0).sum(axis=1),
        value=values.sum(axis=1),
        square=(values**2).sum(axis=1),
        with_tokens=values @ num_tokens.astype(np.float64),
        token_square=values.sum(axis=1) if token_square is None else token_square,
    )


def products_of(values_a: np.ndarray, tokens_a: np.ndarray, values_b: np.ndarray, tokens_b: np.ndarray) -> Products:
    return Products(
        values=(values_a * values_b).sum(axis=1).astype(np.float64),
        a_with_tokens=values_a @ tokens_b.astype(np.float64),
        b_with_tokens=values_b @ tokens_a.astype(np.float64),
        tokens=float(tokens_a @ tokens_b),
    )


def lengths(rng: np.random.Generator, num_documents: int, spread: float = 0.5) -> np.ndarray:
    return np.maximum(1, rng.lognormal(np.log(200), spread, num_documents).round()).astype(np.int64)


def firings(
    rng: np.random.Generator, rate: np.ndarray | float, num_tokens: np.ndarray, num_features: int
) -> np.ndarray:
    """Counts of firings (features, documents) with a rate of its own in every document: tokens are alike."""
    rate = np.broadcast_to(rate, num_features)[:, None]
    alikeness = 1 / 0.03 - 1
    own = rng.beta(rate * alikeness, (1 - rate) * alikeness, size=(num_features, len(num_tokens)))
    return rng.binomial(num_tokens, own)


def brute_spread(ks: list[np.ndarray], ns: list[np.ndarray]) -> tuple[float, list[float], list[float]]:
    """Of one feature: squared residuals of both sets, (1 - icc) sum(n) + icc sum(n²) of each, weight of its own."""
    rates = [k.sum() / n.sum() for k, n in zip(ks, ns)]
    total = sum(float((y - r * m) ** 2) for k, n, r in zip(ks, ns, rates) for y, m in zip(k, n))
    variances = [r * (1 - r) for r in rates]
    alone = sum(v * n.sum() for v, n in zip(variances, ns))
    alike = sum(v * (n**2).sum() for v, n in zip(variances, ns))
    icc = min(max((total - alone) / (alike - alone), 0), 1)
    sizes = [(1 - icc) * n.sum() + icc * (n**2).sum() for n in ns]
    return total, sizes, [(k > 0).sum() / ((k > 0).sum() + 5) for k in ks]


def brute_z(ks: list[np.ndarray], ns: list[np.ndarray], delta: float) -> float:
    """The statistic of the difference of rates, one document after another."""
    nums = [n.sum() for n in ns]
    shares = [num / sum(nums) for num in nums]
    rates = [k.sum() / n.sum() for k, n in zip(ks, ns)]
    x = rates[0] - rates[1] - delta
    hypothesis = [rates[0] - shares[1] * x, rates[1] + shares[0] * x]
    total, sizes, weights = brute_spread(ks, ns)
    variance = 0.0
    for k, n, rate, size, weight in zip(ks, ns, hypothesis, sizes, weights):
        own = sum((y - rate * m) ** 2 for y, m in zip(k, n))
        variance += (weight * own + (1 - weight) * total * size / sum(sizes)) / n.sum() ** 2
    h = shares[0] * shares[1] * sum((n**2).sum() / n.sum() ** 2 for n in ns)
    return float(x / np.sqrt(variance / (1 - h)))


def brute_odds_z(ks: list[np.ndarray], ns: list[np.ndarray], u: float) -> float:
    """The statistic when u firings are moved from the first set to the second."""
    nums = [n.sum() for n in ns]
    own_rates = [k.sum() / num for k, num in zip(ks, nums)]
    rates = [(ks[0].sum() - u) / nums[0], (ks[1].sum() + u) / nums[1]]
    total, sizes, weights = brute_spread(ks, ns)
    unit = total / sum(r * (1 - r) * size for r, size in zip(own_rates, sizes))
    variances = [r * (1 - r) for r in rates]
    squares = [
        w * sum((y - r * m) ** 2 for y, m in zip(k, n)) + (1 - w) * unit * v * size
        for k, n, r, v, w, size in zip(ks, ns, rates, variances, weights, sizes)
    ]
    share = variances[0] * nums[0] / (variances[0] * nums[0] + variances[1] * nums[1])
    return float(u / np.sqrt((1 - share) ** 2 * squares[0] + share**2 * squares[1]))


@pytest.fixture(scope="module")
def pair() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Counts of 30 features in 12 and 25 documents: dense, sparse, silent on either side."""
    rng = np.random.default_rng(0)
    ns = [lengths(rng, 12), lengths(rng, 25)]
    rate = np.geomspace(0.001, 0.6, 30)
    ks = [firings(rng, rate, ns[0], 30), firings(rng, rate[::-1].copy(), ns[1], 30)]
    ks[0][3] = ks[1][5] = 0
    ks[0][7] = ks[1][7] = 0
    return ks, ns


def test_a_test_and_its_interval_equal_the_formula_document_by_document(pair):
    ks, ns = pair
    a, b = (sums_of(k, n) for k, n in zip(ks, ns))
    interval, p = tests.rate_difference(a, b, confidence=0.95)
    for feature in set(range(30)) - {7}:
        mine = [k[feature] for k in ks]
        assert interval.estimate[feature] == pytest.approx(mine[0].sum() / ns[0].sum() - mine[1].sum() / ns[1].sum())
        assert p[feature] == pytest.approx(2 * stats.norm.sf(abs(brute_z(mine, ns, 0))), rel=1e-6)
        if np.isfinite(interval.low[feature]):
            assert brute_z(mine, ns, interval.low[feature]) == pytest.approx(Z, rel=1e-6)
            assert brute_z(mine, ns, interval.high[feature]) == pytest.approx(-Z, rel=1e-6)
        assert (p[feature] < 0.05) == (not interval.low[feature] <= 0 <= interval.high[feature])
    assert p[7] == 1


def test_the_interval_of_log_odds_equals_the_formula_document_by_document(pair):
    ks, ns = pair
    a, b = (sums_of(k, n) for k, n in zip(ks, ns))
    odds = tests.log_odds(a, b, confidence=0.95)
    assert np.isnan([odds.estimate[7], odds.low[7], odds.high[7]]).all()
    assert (odds.estimate[3], odds.low[3], odds.estimate[5], odds.high[5]) == (-np.inf, -np.inf, np.inf, np.inf)
    assert np.isfinite([odds.high[3], odds.low[5]]).all()
    finite = 0
    for feature in set(range(30)) - {3, 5, 7}:
        mine, nums = [k[feature] for k in ks], [n.sum() for n in ns]
        total = [k.sum() for k in mine]
        assert odds.estimate[feature] == pytest.approx(logit(total[0] / nums[0]) - logit(total[1] / nums[1]))
        for end, sign in ((odds.low[feature], 1), (odds.high[feature], -1)):
            if np.isfinite(end):
                finite += 1
                u = _moved(total, nums, end)
                assert brute_odds_z(mine, ns, u) == pytest.approx(sign * Z, rel=1e-5)
    assert finite > 40


def _moved(total: list[int], nums: list[int], odds: float) -> float:
    """By bisection, how many firings must move for this difference of log-odds."""
    low, high = -float(min(total[1], nums[0] - total[0])), float(min(total[0], nums[1] - total[1]))
    for _ in range(200):
        u = (low + high) / 2
        here = logit((total[0] - u) / nums[0]) - logit((total[1] + u) / nums[1])
        low, high = (u, high) if here > odds else (low, u)
    return u


def test_without_a_prior_and_with_equal_documents_z_is_the_statistic_of_a_permutation():
    rng = np.random.default_rng(1)
    num_tokens, k = np.full(16, 50), rng.integers(0, 9, (1, 16)) + 1
    halves = (sums_of(k[:, i::2], num_tokens[i::2]) for i in (0, 1))
    _, p = tests.rate_difference(*halves, confidence=0.95, prior=0)
    e = k[0] - k[0].mean()
    z = e[0::2].sum() / np.sqrt(8 * 8 / (16 * 15) * (e**2).sum())
    assert p[0] == pytest.approx(2 * stats.norm.sf(abs(z)))


def test_exchanging_the_sides_turns_every_sign(pair):
    ks, ns = pair
    a, b = (sums_of(k, n) for k, n in zip(ks, ns))
    products = products_of(ks[0], ns[0], ks[1][:, :12], ns[1][:12])
    swapped = products_of(ks[1][:, :12], ns[1][:12], ks[0], ns[0])
    one, p = tests.rate_difference(a, b, confidence=0.9)
    other, q = tests.rate_difference(b, a, confidence=0.9)
    c = sums_of(ks[1][:, :12], ns[1][:12])
    two, r = tests.rate_difference(a, c, confidence=0.9, products=products)
    swap, s = tests.rate_difference(c, a, confidence=0.9, products=swapped)
    both = [(one, other), (tests.log_odds(a, b, confidence=0.9), tests.log_odds(b, a, confidence=0.9)), (two, swap)]
    both.append(
        (
            tests.log_odds(a, c, confidence=0.9, products=products),
            tests.log_odds(c, a, confidence=0.9, products=swapped),
        )
    )
    for x, y in both:
        for here, there in ((x.estimate, y.estimate), (x.low, y.high), (x.high, y.low)):
            np.testing.assert_allclose(here, -there, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(p, q, rtol=1e-9)
    np.testing.assert_allclose(r, s, rtol=1e-9)
    np.testing.assert_allclose(tests.pooled_deviation(a, b), tests.pooled_deviation(b, a))


F = 2000
"""Features of a simulation."""


@pytest.mark.parametrize(("num_a", "num_b", "rate"), [(60, 60, 0.2), (60, 60, 0.01), (200, 50, 0.1), (300, 300, 0.003)])
def test_p_values_of_equal_sets_are_uniform_and_intervals_hold_the_truth(num_a, num_b, rate):
    rng = np.random.default_rng(2)
    ns = [lengths(rng, num_a), lengths(rng, num_b)]
    a, b = (sums_of(firings(rng, rate, n, F), n) for n in ns)
    interval, p = tests.rate_difference(a, b, confidence=0.95)
    assert tests.is_testable(a, b, 5, same_documents=False).all()
    assert stats.kstest(p, "uniform").statistic < 0.06
    assert 0.03 < (p < 0.05).mean() < 0.065
    assert (p < 0.001).mean() < 0.004
    odds = tests.log_odds(a, b, confidence=0.95)
    for low, high in ((interval.low, interval.high), (odds.low, odds.high)):
        assert 0.935 < ((low <= 0) & (high >= 0)).mean() < 0.97


def test_tokens_taken_for_independent_would_have_found_differences_in_nothing():
    rng = np.random.default_rng(3)
    ns = [lengths(rng, 60), lengths(rng, 60)]
    ks = [firings(rng, 0.1, n, F) for n in ns]
    alone = [sums_of(k.sum(axis=1, keepdims=True), n.sum(keepdims=True)) for k, n in zip(ks, ns)]
    rate = [s.rate for s in alone]
    z = (rate[0] - rate[1]) / np.sqrt(sum(r * (1 - r) / s.of.tokens for r, s in zip(rate, alone)))
    assert (2 * stats.norm.sf(abs(z)) < 0.05).mean() > 0.3
    _, p = tests.rate_difference(*(sums_of(k, n) for k, n in zip(ks, ns)), confidence=0.95)
    assert (p < 0.05).mean() < 0.07


@pytest.mark.parametrize(("rate_a", "rate_b"), [(0.2, 0.05), (0.02, 0.004), (0.6, 0.3)])
def test_intervals_of_a_true_difference_hold_it(rate_a, rate_b):
    rng = np.random.default_rng(4)
    ns = [lengths(rng, 80), lengths(rng, 160)]
    a, b = (sums_of(firings(rng, rate, n, F), n) for rate, n in zip((rate_a, rate_b), ns))
    interval, _ = tests.rate_difference(a, b, confidence=0.95)
    odds, truth = tests.log_odds(a, b, confidence=0.95), logit(rate_a) - logit(rate_b)
    assert 0.925 < ((interval.low <= rate_a - rate_b) & (rate_a - rate_b <= interval.high)).mean() < 0.97
    assert 0.925 < ((odds.low <= truth) & (truth <= odds.high)).mean() < 0.985


def test_planted_differences_are_found_both_ways_and_little_else():
    rng = np.random.default_rng(5)
    ns = [lengths(rng, 80), lengths(rng, 120)]
    rate = np.exp(rng.uniform(np.log(0.005), np.log(0.3), F))
    shift = np.zeros(F)
    shift[:100], shift[100:200] = 2, -2
    a, b = (sums_of(firings(rng, expit(logit(rate) + s), n, F), n) for s, n in zip((shift, np.zeros(F)), ns))
    interval, p = tests.rate_difference(a, b, confidence=0.95)
    found = tests.false_discovery_rates(p) <= 0.05
    assert found[:200].mean() > 0.95
    assert np.array_equal(np.sign(interval.estimate[:200][found[:200]]), np.sign(shift[:200][found[:200]]))
    assert found[200:].sum() / found.sum() < 0.1


def test_the_mean_code_has_uniform_p_values_too():
    rng = np.random.default_rng(6)
    sides = []
    for num in (70, 90):
        n = lengths(rng, num)
        k = firings(rng, 0.05, n, F)
        size = rng.lognormal(0, 0.3, k.shape)  # codes of a document are alike in size
        sides.append(sums_of(k * size, n, token_square=(k * size**2).sum(axis=1)))
    _, p = tests.rate_difference(*sides, confidence=0.95)
    assert stats.kstest(p, "uniform").statistic < 0.06
    assert 0.03 < (p < 0.05).mean() < 0.065


def test_pairs_of_documents_are_tested_by_their_differences():
    rng = np.random.default_rng(7)
    n = lengths(rng, 60)
    own = rng.beta(2, 18, (F, 60))
    ks = [rng.binomial(n, own) for _ in range(2)]
    a, b = (sums_of(k, n) for k in ks)
    interval, p = tests.rate_difference(a, b, confidence=0.95, products=products_of(ks[0], n, ks[1], n))
    difference = ks[0] - ks[1]
    z = difference.sum(axis=1) / np.sqrt((difference**2).sum(axis=1))  # of flipping signs
    np.testing.assert_allclose(p, 2 * stats.norm.sf(abs(z)), rtol=1e-6)
    assert stats.kstest(p, "uniform").statistic < 0.05
    unpaired, cautious = tests.rate_difference(a, b, confidence=0.95)
    assert np.median((unpaired.high - unpaired.low) / (interval.high - interval.low)) > 2
    assert (cautious < 0.05).mean() < 0.001
    odds = tests.log_odds(a, b, confidence=0.95, products=products_of(ks[0], n, ks[1], n))
    assert 0.935 < ((odds.low <= 0) & (odds.high >= 0)).mean() < 0.99


def test_few_documents_get_wide_intervals_and_no_certainty():
    n = np.array([10_000, 10, 10, 10])
    k = np.array([[500, 0, 1, 0]])
    interval, p = tests.rate_difference(sums_of(k, n), sums_of(k * 0 + [[0, 1, 0, 1]], n), confidence=0.95)
    assert (interval.low[0], interval.high[0]) == (-np.inf, np.inf)  # one document holds nearly all tokens
    assert p[0] > 0.05
    a, b = sums_of(np.array([[1, 1, 0, 0]]), np.full(4, 10)), sums_of(np.array([[1, 1, 0, 0]]), np.full(4, 10))
    assert [tests.is_testable(a, b, least, same_documents=False)[0] for least in (4, 5)] == [True, False]
    assert [tests.is_testable(a, b, least, same_documents=True)[0] for least in (2, 3)] == [True, False]


def test_false_discovery_rates_are_those_of_benjamini_and_hochberg():
    p = np.array([0.01, np.nan, 0.04, 0.03, 0.5, np.nan, 0.01])
    known = sorted(x for x in p if not np.isnan(x))
    expected = [
        np.nan if np.isnan(x) else min(q * len(known) / rank for rank, q in enumerate(known, 1) if q >= x) for x in p
    ]
    np.testing.assert_allclose(tests.false_discovery_rates(p), expected)
    assert np.isnan(tests.false_discovery_rates(np.full(3, np.nan))).all()


# --- drift -----------------------------------------------------------------------------------------------------


def test_distances_between_histograms_are_those_by_hand():
    a, b = np.zeros((3, NUM_BINS), np.int64), np.zeros((3, NUM_BINS), np.int64)
    a[0, 10], b[0, 26] = 5, 50  # 16 bins are two octaves
    a[1, [4, 5]], b[1, [5, 6]] = (1, 3), (3, 1)
    a[2, 7] = 1
    np.testing.assert_allclose(drift.histogram_distance(a, b), [1, 0.25, np.nan])
    np.testing.assert_allclose(drift.histogram_shift(a, b), [2, 0.5 / 8, np.nan])
    assert not np.isnan(drift.histogram_distance(a, a)).any()


def test_rankings_are_compared_by_correlation_and_by_what_their_best_share():
    rng = np.random.default_rng(8)
    a = rng.integers(0, 6, 40).astype(np.float64)
    b = a + rng.integers(0, 4, 40)
    assert drift.rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert drift.rank_correlation(a, np.zeros(40)) is None
    assert drift.rank_correlation(np.zeros(0), np.zeros(0)) is None
    assert drift.overlap(np.array([5.0, 4, 3, 2, 1]), np.array([5.0, 1, 4, 2, 3]), (1, 2, 3, 9)) == {
        1: 1,
        2: 0.5,
        3: 2 / 3,
    }


# --- whole jobs on the tiny world ------------------------------------------------------------------------------

SITES = (("blocks.0.hook_resid_post", "early"), ("blocks.1.hook_resid_post", "late"))


def quiet(line: str) -> None:
    pass


def side(root: Path, name: str, *slices: str) -> dict[str, Any]:
    return {"root": str(root), "name": name, "slices": slices}


def config_of(tmp_path: Path, a: dict[str, Any], b: dict[str, Any], **settings: Any) -> CompareConfig:
    return CompareConfig.model_validate({"a": a, "b": b, "out": str(tmp_path / "out"), **settings})


def rows_of(comparison: Comparison, site: tuple[str, str]) -> dict[str, np.ndarray]:
    """The columns of the written table for one SAE; null as NaN."""
    table = pq.read_table(comparison.folder / "comparison.parquet").to_pandas()
    mine = table[(table["hook_point"] == site[0]) & (table["sae"] == site[1])]
    assert mine["feature_id"].tolist() == list(range(len(mine)))
    return {name: mine[name].to_numpy() for name in mine}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, analyze_config: MakeConfig) -> Path:
    """A store with the catalogs `world` (slices notes and prose) and `later` (other text)."""
    root = tmp_path_factory.mktemp("compare")
    analyze(analyze_config(root, catalog={"name": "world"}), quiet)
    write_corpus(root / "later.jsonl", seed=9, num_documents=30)
    source = {"later": str(root / "later.jsonl")}
    analyze(analyze_config(root, catalog={"name": "later"}, corpus={"source": source}), quiet)
    return root


@pytest.fixture(scope="module")
def tuned_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, its weights a little disturbed."""
    folder = shutil.copytree(model_dir, tmp_path_factory.mktemp("tuned") / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * weight.std() * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    # Whoever tuned it saved the tokenizer again: other bytes, and another template, for the same rules.
    rules = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(dict(reversed(rules.items()))))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return folder


def dense(twin: Twin, site: Any, slices: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Counted tokens (documents), firings and sums of codes (features, documents), sums of squares of tokens."""
    parts = [twin.documents(site)[name] for name in slices]
    tokens, counts, totals = (np.concatenate([part[i] for part in parts]) for i in range(3))
    mine = np.array([context.slice in slices for context in twin.contexts])
    return tokens, counts.T, totals.T, (site.codes[mine].astype(np.float64) ** 2).sum(axis=(0, 1))


def test_slices_are_compared_as_their_documents_are_one_by_one(root, analyze_config, tmp_path):
    comparison = compare(config_of(tmp_path, side(root, "world", "notes"), side(root, "world", "prose")))
    assert (comparison.summary["kind"], comparison.labels) == ("slices", ("notes", "prose"))
    twin = Twin(analyze_config(root))
    for site in twin.sites:
        found = rows_of(comparison, (site.hook_point, site.sae))
        (tokens_a, counts_a, totals_a, square_a), (tokens_b, counts_b, totals_b, square_b) = (
            dense(twin, site, (name,)) for name in ("notes", "prose")
        )
        a, b = sums_of(counts_a, tokens_a), sums_of(counts_b, tokens_b)
        tested = (counts_a > 0).sum(axis=1) + (counts_b > 0).sum(axis=1) >= 5
        assert 0 < (~tested).sum() < len(tested)
        frequency, p = tests.rate_difference(a, b, confidence=0.95)
        codes_a, codes_b = sums_of(totals_a, tokens_a, square_a), sums_of(totals_b, tokens_b, square_b)
        mean, mean_p = tests.rate_difference(codes_a, codes_b, confidence=0.95)
        odds = tests.log_odds(a, b, confidence=0.95)
        num_a, num_b = tokens_a.sum(), tokens_b.sum()
        within = square_a - totals_a.sum(axis=1) ** 2 / num_a + square_b - totals_b.sum(axis=1) ** 2 / num_b
        effect = np.divide(mean.estimate, np.sqrt(within / (num_a + num_b - 2)), where=within > 0, out=0 * within)
        expected = {
            "count_a": counts_a.sum(axis=1),
            "documents_b": (counts_b > 0).sum(axis=1),
            "frequency_a": counts_a.sum(axis=1) / num_a,
            "mean_b": totals_b.sum(axis=1) / num_b,
            "frequency_difference": frequency.estimate,
            "mean_difference": mean.estimate,
            "log_odds": odds.estimate,
            "effect_size": effect,
        }
        where_tested = {
            "frequency_p": p,
            "frequency_low": frequency.low,
            "frequency_high": frequency.high,
            "mean_p": mean_p,
            "mean_high": mean.high,
            "log_odds_low": odds.low,
            "log_odds_high": odds.high,
        }
        expected |= {name: np.where(tested, column, np.nan) for name, column in where_tested.items()}
        for name, column in expected.items():
            np.testing.assert_allclose(found[name], column, rtol=1e-5, atol=1e-12, err_msg=name)
        assert np.isnan(found["histogram_distance"]).all()


def test_false_discovery_rates_are_over_all_saes_and_ranks_by_what_is_sure(root, tmp_path):
    comparison = compare(config_of(tmp_path, side(root, "world", "notes"), side(root, "world", "prose")))
    both = [rows_of(comparison, site) for site in SITES]
    for name in ("frequency", "mean"):
        p = np.concatenate([found[f"{name}_p"] for found in both])
        q = np.concatenate([found[f"{name}_q"] for found in both])
        assert comparison.summary["tests"][name] == (~np.isnan(p)).sum()
        np.testing.assert_allclose(q[~np.isnan(p)], stats.false_discovery_control(p[~np.isnan(p)]))
        assert np.isnan(q[np.isnan(p)]).all()
    for found, site in zip(both, SITES):
        verdict = comparison.summary["sites"]["/".join(site)]
        tested = np.flatnonzero(~np.isnan(found["frequency_p"]))
        silent = found["count_a"] + found["count_b"] == 0
        assert verdict["not_tested"] == {
            "silent": silent.sum(),
            "few_documents": len(silent) - len(tested) - silent.sum(),
        }
        by_a = sorted(tested, key=lambda f: (-found["log_odds_low"][f], -found["log_odds"][f], f))
        by_b = sorted(tested, key=lambda f: (found["log_odds_high"][f], found["log_odds"][f], f))
        for name, order in (("rank_a", by_a), ("rank_b", by_b)):
            assert found[name][order].tolist() == list(range(1, len(tested) + 1))
            assert np.isnan(np.delete(found[name], tested)).all()
        for name, sign, order in (("best_a", 1, by_a), ("best_b", -1, by_b)):
            sure = [f for f in order if found["frequency_q"][f] <= 0.05 and sign * found["frequency_difference"][f] > 0]
            assert verdict[name] == sure[:10]


def test_exchanged_sides_and_repeated_runs_give_the_same_answer(root, tmp_path):
    a, b = side(root, "world", "notes"), side(root, "world", "prose")
    one, two, other = (
        compare(config_of(tmp_path / str(i), *sides)) for i, sides in enumerate(((a, b), (a, b), (b, a)))
    )
    for file in ("comparison.parquet", "comparison.json"):
        assert (one.folder / file).read_bytes() == (two.folder / file).read_bytes()
    for site in SITES:
        here, there = rows_of(one, site), rows_of(other, site)
        for name in ("frequency_p", "mean_p", "frequency_q"):
            np.testing.assert_allclose(here[name], there[name], rtol=1e-9)
        np.testing.assert_allclose(here["log_odds_low"], -there["log_odds_high"], rtol=1e-6)
        assert np.array_equal(here["rank_a"], there["rank_b"], equal_nan=True)


def test_other_text_under_the_same_model_is_compared_with_all_of_a_catalog(root, tmp_path):
    comparison = compare(config_of(tmp_path, side(root, "world"), side(root, "later")))
    assert (comparison.summary["kind"], comparison.labels) == ("corpora", ("notes+prose", "later"))
    assert comparison.summary["drift"] is None
    for site in SITES:
        found = rows_of(comparison, site)
        there = (found["count_a"] > 0) & (found["count_b"] > 0)
        assert np.array_equal(~np.isnan(found["histogram_distance"]), there)
        assert (found["histogram_distance"][there] <= 1).all()


@pytest.fixture(scope="module")
def drifted(analyze_config, tuned_dir, tmp_path_factory) -> dict[str, Any]:
    """Stores of the tiny model and the disturbed one, with codes kept; configs by name."""
    found = {}
    for name, codes, model in (("base", "keep", {}), ("base", "drop", {}), ("tuned", "keep", {"id": str(tuned_dir)})):
        config = analyze_config(tmp_path_factory.mktemp(name), catalog={"name": name}, codes=codes, model=model)
        analyze(config, quiet)
        found[f"{name} {codes}"] = config
    return found


def test_a_model_and_its_descendant_are_compared_document_by_document(drifted, tmp_path):
    base, tuned = drifted["base keep"], drifted["tuned keep"]
    comparison = compare(config_of(tmp_path, side(base.store.root, "base"), side(tuned.store.root, "tuned")))
    assert (comparison.summary["kind"], comparison.labels) == ("drift", ("base", "tuned"))
    assert comparison.summary["paired"]
    twins = [Twin(config) for config in (base, tuned)]
    for one, other in zip(*(twin.sites for twin in twins)):
        slices = ("notes", "prose")
        a, b = (dense(twin, site, slices) for twin, site in zip(twins, (one, other)))
        found = rows_of(comparison, (one.hook_point, one.sae))
        tested = ~np.isnan(found["frequency_p"])
        for name, i, square in (("frequency", 1, False), ("mean", 2, True)):
            products = products_of(a[i], a[0], b[i], b[0])
            sums = (sums_of(x[i], x[0], x[3] if square else None) for x in (a, b))
            interval, p = tests.rate_difference(*sums, confidence=0.95, products=products)
            np.testing.assert_allclose(found[f"{name}_p"][tested], p[tested], rtol=1e-4)
            np.testing.assert_allclose(found[f"{name}_low"][tested], interval.low[tested], rtol=1e-4, atol=1e-9)
        assert tested.sum() > 30
        report = comparison.summary["drift"][f"{one.hook_point}/{one.sae}"]
        for name, site, (tokens, counts, *_) in (("a", one, a), ("b", other, b)):
            assert report["fraction_of_variance_unexplained"][name] == pytest.approx(site.unexplained, rel=1e-5)
            assert report["codes_a_token"][name] == pytest.approx(counts.sum() / tokens.sum())
        scores = [twin.features(site)["score"] for twin, site in zip(twins, (one, other))]
        ranking = report["rankings"]["mean_x_coverage"]
        assert ranking["rank_correlation"] == pytest.approx(stats.spearmanr(*scores).statistic, abs=1e-3)
        assert 0.5 < ranking["overlap"][10] <= 1


def test_without_codes_drift_has_the_same_estimates_and_wider_intervals(drifted, tmp_path):
    tuned = side(drifted["tuned keep"].store.root, "tuned")
    kept, dropped = (
        compare(config_of(tmp_path / codes, side(drifted[f"base {codes}"].store.root, "base"), tuned))
        for codes in ("keep", "drop")
    )
    assert not dropped.summary["paired"]
    for site in SITES:
        paired, unpaired = rows_of(kept, site), rows_of(dropped, site)
        for name in ("frequency_difference", "mean_difference", "log_odds", "histogram_shift"):
            np.testing.assert_allclose(paired[name], unpaired[name])
        width = [found["mean_high"] - found["mean_low"] for found in (unpaired, paired)]
        finite = np.isfinite(width[0]) & np.isfinite(width[1]) & (width[1] > 0)
        assert np.median(width[0][finite] / width[1][finite]) > 2


def prompts_of(path: Path, topics: list[str], seed: int) -> str:
    rng = np.random.default_rng(seed)
    lines = [" ".join(rng.choice(rng.choice(topics).split(), 8)) for _ in range(40)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def compare_prompts(tmp_path, analyze_config) -> Callable[[str, str], Comparison]:
    how = analyze_config(tmp_path / "runs", catalog={"name": "prompts"}).model_dump(mode="json")
    how["corpus"] |= {"txt_documents": "line", "shard_tokens": None}

    def run(a: str, b: str) -> Comparison:
        values = {"prompts": {"a": a, "b": b}, "analyze": how, "out": str(tmp_path / "out")}
        return compare(CompareConfig.model_validate(values), quiet)

    return run


def test_prompts_are_documents_and_prompts_of_two_topics_differ(compare_prompts, tmp_path):
    a = prompts_of(tmp_path / "river.txt", list(TOPICS[:1]), seed=1)
    b = prompts_of(tmp_path / "code.txt", list(TOPICS[1:2]), seed=2)
    comparison = compare_prompts(a, b)
    assert comparison.labels == ("river", "code")
    for verdict in comparison.summary["sites"].values():
        assert verdict["frequency"]["more_in_a"] > 5
        assert verdict["frequency"]["more_in_b"] > 5
    assert comparison.summary["a"]["documents"]["blocks.0.hook_resid_post"] == 40


def test_prompts_of_the_same_topics_do_not_differ(compare_prompts, tmp_path):
    a, b = (prompts_of(tmp_path / f"{name}.txt", list(TOPICS), seed) for name, seed in (("a", 1), ("b", 2)))
    comparison = compare_prompts(a, b)
    for verdict in comparison.summary["sites"].values():
        assert verdict["tested"] > 30
        assert verdict["frequency"] == verdict["mean"] == {"more_in_a": 0, "more_in_b": 0}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"masks": {"first_positions": 1}}, "measure.masks.first_positions is 0 in a and 1 in b"),
        ({"corpus": {"bos": "never"}}, "preparation.bos is True in a and False in b"),
        ({"corpus": {"packing": "document"}}, "preparation.packing is 'concat' in a and 'document' in b"),
        ({"saes": "other early"}, "measure.saes.blocks.0.hook_resid_post/early is '"),
        ({"model": "tuned"}, "the models of a and b differ (measure.model.digest) and so does their text"),
        ({"saes": "another name"}, "a and b have no SAE in common: a has blocks.0.hook_resid_post/early, blocks.1."),
    ],
)
def test_what_would_make_a_difference_meaningless_is_refused_by_its_field(
    root, analyze_config, sae_dirs, tuned_dir, tmp_path, overrides, message
):
    match overrides:
        case {"saes": "other early"}:
            saes = [{"path": str(sae_dirs["late"]), "hook_point": "blocks.0.hook_resid_post", "name": "early"}]
            overrides = {"saes": saes}
        case {"saes": "another name"}:
            overrides = {"saes": [{"path": str(sae_dirs["late"]), "name": "stranger"}]}
        case {"model": "tuned"}:
            overrides = {"model": {"id": str(tuned_dir)}}
    write_corpus(tmp_path / "few.jsonl", seed=9, num_documents=3)
    overrides["corpus"] = {"source": {"few": str(tmp_path / "few.jsonl")}} | overrides.get("corpus", {})
    analyze(analyze_config(tmp_path / "runs", catalog={"name": "other"}, **overrides), quiet)
    with pytest.raises(UserError) as refused:
        compare(config_of(tmp_path, side(root, "world"), side(tmp_path / "runs", "other")))
    assert message in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_settings_that_change_no_expectation_are_listed_and_an_sae_of_one_side_is_left_out(
    root, analyze_config, sae_dirs, tmp_path
):
    overrides = {
        "saes": [{"path": str(sae_dirs["late"])}],
        "sampling": {"top": 3},
        "corpus": {"source": {"later": str(root / "later.jsonl")}, "shard_tokens": 99},
    }
    analyze(analyze_config(tmp_path / "runs", **overrides), quiet)
    comparison = compare(config_of(tmp_path, side(root, "world"), side(tmp_path / "runs", "default")))
    assert comparison.summary["sites_left_out"] == ["blocks.0.hook_resid_post/early"]
    assert [str(site) for site in comparison.sites] == ["blocks.1.hook_resid_post/late"]
    assert comparison.summary["differences"] == {"measure.sampling.top": [6, 3], "preparation.shard_tokens": [160, 99]}


def test_the_same_text_unknown_slices_and_old_catalogs_are_refused(root, tmp_path):
    with pytest.raises(ConfigError, match="a and b are the same model on the same text: 7 of 13 and 7 shards"):
        compare(config_of(tmp_path, side(root, "world"), side(root, "world", "prose")))
    with pytest.raises(ConfigError, match="catalog 'world' has no slice 'poems'; it has notes, prose"):
        compare(config_of(tmp_path, side(root, "world", "poems"), side(root, "world", "prose")))
    old = shutil.copytree(root, tmp_path / "old")
    path = old / "catalogs/world/000001/manifest.json"
    rewrite_manifest(path, lambda manifest: manifest["identity"]["measure"].update(format=1))
    with pytest.raises(IdentityError, match="'world' was made from partials of format 1, expected 3 or 4"):
        compare(config_of(tmp_path, side(old, "world", "notes"), side(root, "later")))


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_job_prints_both_directions_with_spans_and_ends_in_two_for_a_mistake(root, drifted, tmp_path, cli):
    run = partial(cli, "compare", f"out={tmp_path / 'out'}")
    world = (f"a.root={root}", f"b.root={root}", "a.name=world", "b.name=world")
    code, out, err = run(*world, "a.slices=[notes]", "b.slices=[prose]", "false_discovery_rate=0.9")
    assert (code, err) == (0, "")
    for text in (
        "early  more in notes than in prose",
        "late  more in prose than in notes",
        "strongest span",
        "«",
    ):
        assert text in out
    summary = json.loads((tmp_path / "out/comparison.json").read_text())
    assert summary["labels"] == {"a": "notes", "b": "prose"}
    num_documents = summary["a"]["documents"]["blocks.1.hook_resid_post"]
    assert f"tokens counted at blocks.1.hook_resid_post, in {num_documents} documents that weigh as" in out
    code, out, _ = run(
        *(f"{s}.root={drifted[name].store.root}" for s, name in (("a", "base drop"), ("b", "tuned keep"))),
        *("a.name=base", "b.name=tuned", "rank_by=mean"),
    )
    assert code == 0
    assert "fraction of variance unexplained" in out
    assert "by mean_x_coverage: rank correlation" in out
    assert "codes=keep in both catalogs would pair documents" in out
    for overrides, sentence in (
        (world, "a and b are the same model on the same text"),
        (("prompts.a=x.txt",), "expected both prompts.a and prompts.b, or neither"),
        (("a.slice=[x]",), "config key a.slice is not known; did you mean a.slices?"),
    ):
        code, _, err = run(*overrides)
        assert (code, sentence in err, "Traceback" in err) == (2, True, False), err
