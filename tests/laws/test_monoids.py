"""Laws of the accumulators, to the bit: sums, statistics, samples and the census do not care how work was cut."""

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_census.compute.census.census import SiteCensus
from sae_census.compute.numbers import fixed
from sae_census.compute.numbers import stats as statistics
from sae_census.compute.numbers.codes import Codes, concatenate, empty, sorted_codes
from sae_census.compute.numbers.documents import DocumentCensus, DocumentStats, document_grid
from sae_census.compute.numbers.keys import firing_keys, silent_keys
from sae_census.compute.numbers.samples import Entries, Kept, Samples, SampleSizes
from sae_census.compute.numbers.stats import NUM_BINS, QUANTILE_ERROR, FeatureStats
from sae_census.errors import ShardError

F, ROWS, T = 5, 12, 4
PARTS = 4
SEED, SHARDS = 7, (0, (1 << 64) - 1, 0x1234_5678_9ABC_DEF0)
SIZES = SampleSizes(top=3, random=2, bands=2, per_band=2, silent=4, non_activating=2)

Firings = dict[tuple[int, int, int], float]
"""(feature, row, position) -> code: the naive form of `Codes`."""

law = settings(max_examples=40)
values = st.sampled_from([0.25, 0.3, 1.0, 1.0, 1.5, 2.0, 8.0, 64.0, 1e-6, 2.0**-16, 70000.0]) | st.floats(
    2.0**-30, 2.0**18, width=32, allow_subnormal=False
)
firings_of_a_shard = st.dictionaries(
    st.tuples(st.integers(0, F - 1), st.integers(0, ROWS - 1), st.integers(0, T - 1)),
    values.map(lambda v: float(np.float32(v))),
    max_size=70,
)
parts_of_rows = st.lists(st.integers(0, PARTS - 1), min_size=ROWS, max_size=ROWS)
ways = st.lists(st.sampled_from(["add", "merge", "merge into"]), min_size=PARTS, max_size=PARTS)


def codes_of(firings: Firings) -> Codes:
    """Loose arrays, in the dictionary's order, made into codes."""
    return sorted_codes(
        np.array([f for f, _, _ in firings], np.int32),
        np.array([row * T + position for _, row, position in firings], np.int64),
        np.array(list(firings.values()), np.float32),
        num_positions=T,
    )


def of_rows(firings: Firings, rows: Iterable[int]) -> Firings:
    chosen = set(rows)
    return {address: value for address, value in firings.items() if address[1] in chosen}


def same(a: object, b: object) -> bool:
    """Whether two values of one dataclass hold the same arrays, to the bit and the dtype."""
    for name in (field.name for field in fields(a)):  # type: ignore[arg-type]
        x, y = getattr(a, name), getattr(b, name)
        equal = (
            x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
            if isinstance(x, np.ndarray)
            else (same(x, y) if isinstance(x, Kept) else x == y)
        )
        if not equal:
            return False
    return True


# --- fixed --------------------------------------------------------------------------------------------------

limbs_of = st.lists(st.integers(-(1 << 100), 1 << 100), min_size=3, max_size=3)


def limbs(totals: Iterable[int]) -> np.ndarray:
    return np.array([[total >> 62, total & ((1 << 62) - 1)] for total in totals], np.int64)


def totals_of(array: np.ndarray) -> list[int]:
    assert (array[:, 1] >= 0).all()
    assert (array[:, 1] < 1 << 62).all()
    return [(int(high) << 62) + int(low) for high, low in array]


@law
@given(
    st.lists(st.lists(st.floats(-(2.0**21), 2.0**21), min_size=1, max_size=30), max_size=5),
    st.sampled_from([fixed.SUM_SCALE, fixed.SQUARE_SCALE, 0]),
)
def test_sums_equal_exact_fractions_after_one_rounding_of_each_value(runs: list[list[float]], scale: int) -> None:
    flat = np.array([value for run in runs for value in run], np.float64)
    starts = np.cumsum([0, *map(len, runs)])[:-1].astype(np.int64)
    expected = [sum(round(Fraction(value) * (1 << scale)) for value in run) for run in runs]
    assert totals_of(fixed.segment_sums(flat, starts, scale)) == expected


@law
@given(limbs_of, limbs_of, limbs_of)
def test_adding_totals_is_exact_associative_and_commutative(a: list[int], b: list[int], c: list[int]) -> None:
    x, y, z = limbs(a), limbs(b), limbs(c)
    assert totals_of(fixed.add(x, y)) == [i + j for i, j in zip(a, b, strict=True)]
    assert fixed.add(x, y).tobytes() == fixed.add(y, x).tobytes()
    assert fixed.add(fixed.add(x, y), z).tobytes() == fixed.add(x, fixed.add(y, z)).tobytes()
    assert fixed.add(x, fixed.zeros(3)).tobytes() == x.tobytes()


@law
@given(
    st.lists(st.lists(st.floats(0, 2.0**70), min_size=1, max_size=9), max_size=5),
    st.sampled_from([fixed.SUM_SCALE, fixed.SQUARE_SCALE, 0]),
)
def test_single_values_become_totals_and_runs_of_totals_add_up_exactly(runs: list[list[float]], scale: int) -> None:
    each = fixed.of(np.array([value for run in runs for value in run], np.float64), scale)
    exact = [[round(Fraction(value) * (1 << scale)) for value in run] for run in runs]
    assert totals_of(each) == [total for run in exact for total in run]
    starts = np.cumsum([0, *map(len, runs)])[:-1].astype(np.int64)
    assert totals_of(fixed.segment_totals(each, starts)) == list(map(sum, exact))


@pytest.mark.parametrize(
    "sign",
    [1, -1],
)
def test_a_total_reads_out_as_a_float_within_the_stated_error(sign: int) -> None:
    totals = [sign * total for total in (1, 3**20, 2**62 - 1, 2**62 + 1, 3**50, 7**33)]
    for value, total in zip(fixed.to_float(limbs(totals), fixed.SUM_SCALE), totals, strict=True):
        exact = Fraction(total, 1 << fixed.SUM_SCALE)
        assert abs(Fraction(float(value)) - exact) <= abs(exact) * Fraction(4, 10**16)


# --- statistics ---------------------------------------------------------------------------------------------


def stats_of(firings: Firings) -> FeatureStats:
    stats = FeatureStats.zero(F)
    stats.add(codes_of(firings))
    return stats


def naive_stats(firings: Firings) -> FeatureStats:
    """The slow twin: Python integers and loops."""
    edges = statistics.bin_edges().tolist()
    stats = FeatureStats.zero(F)
    sums, squares, contexts = [0] * F, [0] * F, [set[int]() for _ in range(F)]
    for (feature, row, _), value in firings.items():
        stats.count[feature] += 1
        contexts[feature].add(row)
        sums[feature] += round(Fraction(value) * (1 << fixed.SUM_SCALE))
        squares[feature] += round(Fraction(value) ** 2 * (1 << fixed.SQUARE_SCALE))
        stats.maximum[feature] = max(stats.maximum[feature], np.float32(value))
        stats.histogram[feature, min(max(bisect_right(edges, value) - 1, 0), NUM_BINS - 1)] += 1
    return replace(
        stats, context_count=np.array([len(c) for c in contexts]), total=limbs(sums), total_square=limbs(squares)
    )


@law
@given(firings_of_a_shard)
def test_statistics_equal_their_slow_twin(firings: Firings) -> None:
    stats = stats_of(firings)
    assert same(stats, naive_stats(firings))
    stats.check_books(ROWS * T)


@law
@given(firings_of_a_shard, parts_of_rows, st.permutations(range(PARTS)), ways)
def test_any_split_of_a_shard_into_adds_and_merges_gives_the_same_statistics(
    firings: Firings, part_of: list[int], order: list[int], how: list[str]
) -> None:
    whole = FeatureStats.zero(F)
    for part in order:
        mine = of_rows(firings, (row for row in range(ROWS) if part_of[row] == part))
        match how[part]:
            case "add":
                whole.add(codes_of(mine))
            case "merge":
                whole = whole.merge(stats_of(mine))
            case _:
                whole = stats_of(mine).merge(whole)
    assert same(whole, stats_of(firings))


@law
@given(firings_of_a_shard, firings_of_a_shard, firings_of_a_shard)
def test_merging_statistics_is_a_commutative_monoid(a: Firings, b: Firings, c: Firings) -> None:
    x, y, z = map(stats_of, (a, b, c))
    assert same(x.merge(y), y.merge(x))
    assert same(x.merge(y).merge(z), x.merge(y.merge(z)))
    assert same(x.merge(FeatureStats.zero(F)), x)


@law
@given(st.lists(st.floats(2.0**-16, 65535.0, width=32), min_size=1, max_size=60), st.sampled_from(["0.5", "0.95"]))
def test_a_quantile_is_within_its_error_of_the_nearest_rank(codes: list[float], q: str) -> None:
    stats = stats_of({(0, row, 0): code for row, code in enumerate(codes)})
    exact = sorted(codes)[max(math.ceil(Fraction(q) * len(codes)), 1) - 1]
    found = statistics.quantile(stats, float(q))
    assert abs(found[0] - exact) <= exact * QUANTILE_ERROR * (1 + 1e-12)
    assert found[0] <= stats.maximum[0]
    assert (found[1:] == 0).all()


@pytest.mark.parametrize(("q", "percent"), [(0.5, 50), (0.95, 95), (0.99, 99)])
def test_the_rank_of_a_published_quantile_is_exact_for_every_count(q: float, percent: int) -> None:
    count = np.concatenate([np.arange(1, 2000), 100 * np.arange(1, 2000), 10**12 + np.arange(100)])
    rank = -(-count * percent // 100)
    stats = FeatureStats.zero(len(count))
    stats.histogram[:, 8], stats.histogram[:, 80] = rank, count - rank  # the rank-th is the last of the low bin
    stats.maximum[:] = 4e4
    low = replace(stats, count=count)
    assert (statistics.quantile(low, q) < 1e-3).all()
    stats.histogram[:, 8], stats.histogram[:, 80] = rank - 1, count - rank + 1
    assert (statistics.quantile(low, q) > 1e-3).all()


def test_a_quantile_in_an_open_bin_stays_inside_what_was_seen() -> None:
    edges = statistics.bin_edges()
    huge = stats_of({(0, row, 0): 1e6 for row in range(3)})
    tiny = stats_of({(0, row, 0): 1e-7 for row in range(3)})
    assert edges[-2] <= statistics.quantile(huge, 0.5)[0] <= 1e6
    assert statistics.quantile(tiny, 0.5)[0] == np.float32(1e-7)


@law
@given(st.lists(st.floats(2.0**-20, 2.0**20, width=32), min_size=1, max_size=40))
def test_a_code_lies_between_the_edges_of_its_bin(codes: list[float]) -> None:
    edges = statistics.bin_edges()
    inside = np.concatenate([edges[1:-1], np.nextafter(edges[1:-1].astype(np.float32), np.float32(0)), codes])
    value = inside.astype(np.float32)
    found = statistics.bin_of(value)
    assert ((edges[found] <= value) | (found == 0)).all()
    assert ((value < edges[found + 1]) | (found == NUM_BINS - 1)).all()
    assert (np.diff(edges) > 0).all()


def _tamper(name: str, place: tuple[int, ...], by: int) -> Callable[[FeatureStats], None]:
    def change(stats: FeatureStats) -> None:
        getattr(stats, name)[place] += by

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_tamper("histogram", (2, 9), 1), r"sum\(histogram\) != count at feature 2"),
        (_tamper("count", (1,), 1), r"sum\(histogram\) != count at feature 1"),
        (_tamper("context_count", (3,), 99), "context_count > count at feature 3"),
        (_tamper("maximum", (4,), -2), "maximum and count disagree on silence at feature 4"),
    ],
)
def test_tampered_books_are_refused_by_law_and_feature(change: Callable[[FeatureStats], None], message: str) -> None:
    stats = stats_of({(f, row, 0): 2.0 for f in range(F) for row in range(ROWS)})
    stats.check_books(ROWS)
    change(stats)
    with pytest.raises(ValueError, match=message):
        stats.check_books(ROWS)
    with pytest.raises(ValueError, match="count > tokens counted at feature 0"):
        stats_of({(0, row, 0): 2.0 for row in range(3)}).check_books(2)


def test_codes_too_large_to_sum_exactly_are_refused_and_unequal_widths_do_not_merge() -> None:
    for value in (1e9, math.inf, math.nan):
        with pytest.raises(ShardError, match="too large to be summed exactly over 1 tokens"):
            stats_of({(0, 0, 0): value})
    with pytest.raises(ValueError, match="cannot merge statistics of 5 and 6 features"):
        FeatureStats.zero(5).merge(FeatureStats.zero(6))


@law
@given(firings_of_a_shard, parts_of_rows, st.permutations(range(PARTS)))
def test_codes_of_batches_join_into_the_codes_of_the_whole(
    firings: Firings, part_of: list[int], order: list[int]
) -> None:
    parts = [codes_of(of_rows(firings, (r for r in range(ROWS) if part_of[r] == part))) for part in order]
    assert same(concatenate(parts, T), codes_of(firings))
    assert same(concatenate([empty(), codes_of(firings), empty()], T), codes_of(firings))


# --- samples ------------------------------------------------------------------------------------------------

KINDS = ("top", "random", "bands", "silent", "quiet")


def samples_of(
    firings: Firings, sizes: SampleSizes = SIZES, ordinal: int = 0, rows: Iterable[int] = range(ROWS)
) -> Samples:
    """Samples of some rows of the shard that stands at `ordinal`."""
    rows = list(rows)
    samples = Samples.zero(F, sizes)
    counted = np.array(rows, np.int64)
    samples.add(codes_of(of_rows(firings, rows)), seed=SEED, shard_key=SHARDS[ordinal], counted_rows=counted)
    for kept in (getattr(samples, kind) for kind in KINDS):
        kept.shard[kept.row >= 0] = ordinal
    return samples


def mix(x: int) -> int:
    """splitmix64 in Python's integers."""
    mask = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def naive_key(shard: int, feature: int, row: int, position: int) -> int:
    salt = mix(mix(feature ^ mix(SEED)) ^ SHARDS[shard])
    return min(mix(((row << 32) | position) ^ salt) >> 1, (1 << 63) - 2)


Sample = tuple[int, int, int, int, int, float]
"""Group, key, shard, row, position, value: sorted as `Kept` must keep them."""


def naive_samples(shards: list[Firings], sizes: SampleSizes) -> dict[str, list[Sample]]:
    """The slow twin: sort everything there is, keep the first K of each group."""
    found: dict[str, list[Sample]] = {kind: [] for kind in KINDS}
    octaves = [(f, math.frexp(value)[1]) for firings in shards for (f, _, _), value in firings.items()]
    top_octave = dict(sorted(octaves))  # the last of a feature, its greatest, stays
    for shard, firings in enumerate(shards):
        best: dict[tuple[int, int], tuple[float, int]] = {}
        for (feature, row, position), value in firings.items():
            best[feature, row] = min(best.get((feature, row), (0.0, 0)), (-value, position))
            sample = (naive_key(shard, feature, row, position), shard, row, position, value)
            found["random"].append((feature, *sample))
            below = min(top_octave[feature] - math.frexp(value)[1], sizes.bands)
            found["bands"].append((feature * (sizes.bands + 1) + below, *sample))
        for (feature, row), (negated, position) in best.items():
            bits = int(np.float32(-negated).view(np.int32))
            found["top"].append((feature, -bits, shard, row, position, -negated))
        for row in range(ROWS):
            place = (mix(row ^ mix(SEED ^ SHARDS[shard])) >> 1, shard, row, 0, 0.0)
            found["silent"].append((0, *place))
            fired = {feature for feature, fired_row, _ in firings if fired_row == row}
            found["quiet"] += [(feature, *place) for feature in range(F) if feature not in fired]
    limits = {"top": sizes.top, "random": sizes.random, "bands": sizes.per_band, "silent": sizes.silent}
    limits["quiet"] = sizes.non_activating
    kept: dict[str, list[Sample]] = {}
    for kind, entries in found.items():
        groups = defaultdict[int, list[Sample]](list)
        for sample in sorted(entries):
            groups[sample[0]].append(sample)
        kept[kind] = [sample for group in sorted(groups) for sample in groups[group][: limits[kind]]]
    return kept


def as_tuples(entries: Entries) -> list[Sample]:
    return list(zip(*(getattr(entries, name).tolist() for name in Entries.__dataclass_fields__), strict=True))


@pytest.mark.parametrize(
    "sizes",
    [
        SIZES,
        SampleSizes(top=1, random=1, bands=0, per_band=3, silent=1, non_activating=1),
        SampleSizes(top=0, random=0, bands=3, per_band=1, silent=0, non_activating=3),
        SampleSizes(top=99, random=99, bands=1, per_band=99, silent=99, non_activating=99),
    ],
    ids=str,
)
@law
@given(firings_of_a_shard, firings_of_a_shard, st.booleans())
def test_samples_equal_what_sorting_everything_would_keep(
    sizes: SampleSizes, a: Firings, b: Firings, backwards: bool
) -> None:
    parts = [samples_of(a, sizes, 0), samples_of(b, sizes, 1)]
    merged = parts[1].merge(parts[0]) if backwards else parts[0].merge(parts[1])
    expected = naive_samples([a, b], sizes)
    for kind in KINDS:
        assert as_tuples(getattr(merged, kind).entries()) == expected[kind], kind
    for feature in range(F):
        for index in range(sizes.bands + 1):
            group = feature * (sizes.bands + 1) + index
            assert as_tuples(merged.band(feature, index)) == [s for s in expected["bands"] if s[0] == group]


@law
@given(firings_of_a_shard, parts_of_rows, st.permutations(range(PARTS)), ways)
def test_any_split_of_a_shard_into_adds_and_merges_gives_the_same_samples(
    firings: Firings, part_of: list[int], order: list[int], how: list[str]
) -> None:
    whole = Samples.zero(F, SIZES)
    for part in order:
        rows = [row for row in range(ROWS) if part_of[row] == part]
        match how[part]:
            case "add":
                codes, counted = codes_of(of_rows(firings, rows)), np.array(rows, np.int64)
                whole.add(codes, seed=SEED, shard_key=SHARDS[0], counted_rows=counted)
            case "merge":
                whole = whole.merge(samples_of(firings, rows=rows))
            case _:
                whole = samples_of(firings, rows=rows).merge(whole)
    assert same(whole, samples_of(firings))


@settings(law, max_examples=20)
@given(firings_of_a_shard, firings_of_a_shard, firings_of_a_shard)
def test_merging_samples_is_a_commutative_monoid_with_ties(a: Firings, b: Firings, c: Firings) -> None:
    x, y, z = (samples_of(dict.fromkeys(s, 1.5) | s, ordinal=i) for i, s in enumerate((a, b, c)))
    tied = [samples_of(dict.fromkeys(s, 1.5), ordinal=i) for i, s in enumerate((a, b, c))]
    for p, q, r in ((x, y, z), tied):
        assert same(p.merge(q), q.merge(p))
        assert same(p.merge(q).merge(r), p.merge(q.merge(r)))
        assert same(p.merge(Samples.zero(F, SIZES)), p)


def test_merging_with_nothing_keeps_the_top_octave_when_no_bands_are_kept() -> None:
    sizes = replace(SIZES, per_band=0)
    samples = samples_of({(0, 0, 0): 8.0}, sizes)
    assert same(samples.merge(Samples.zero(F, sizes)), samples)


@law
@given(
    st.sets(st.tuples(*(st.integers(0, n) for n in (2, 2, 1, 3, 3))), max_size=40).map(sorted),
    st.integers(0, 4),
    st.data(),
)
def test_kept_entries_are_the_smallest_under_the_whole_order(
    addresses: list[tuple[int, ...]], k: int, data: st.DataObject
) -> None:
    addresses = list({(g, s, r, p): (g, key, s, r, p) for g, key, s, r, p in addresses}.values())
    shuffled = data.draw(st.permutations(addresses))
    kept = Kept.zero(3, k)
    cut = data.draw(st.integers(0, len(shuffled)))
    for part in (shuffled[:cut], shuffled[cut:]):
        group, key, shard, row, position = np.array(part, np.int64).reshape(-1, 5).T
        ints = {"shard": shard, "row": row, "position": position}
        columns = {name: column.astype(np.int32) for name, column in ints.items()}
        kept.put(Entries(group=group, key=key, value=key.astype(np.float32), **columns))
    expected = [a for g in range(3) for a in sorted(a for a in addresses if a[0] == g)[:k]]
    assert [entry[:5] for entry in as_tuples(kept.entries())] == expected


def test_old_samples_sink_by_octaves_when_the_top_octave_rises() -> None:
    samples = samples_of({(1, row, 0): 2.0 ** -(row % 3) for row in range(6)})  # octaves 0, -1 and -2
    assert [len(samples.band(1, i).row) for i in range(3)] == [2, 2, 2]
    louder = codes_of({(1, 11, 3): 3.0})  # octave 1
    samples.add(louder, seed=SEED, shard_key=SHARDS[0], counted_rows=np.zeros(0, np.int64))
    assert samples.octave.tolist() == [-(1 << 20), 1, *[-(1 << 20)] * 3]
    assert sorted(samples.band(1, 0).row.tolist()) == [11]
    assert sorted(samples.band(1, 1).row.tolist()) == [0, 3]
    assert set(samples.band(1, 2).row.tolist()) < {1, 2, 4, 5}


def test_samples_of_other_sizes_do_not_merge() -> None:
    with pytest.raises(ValueError, match=r"cannot merge samples of .*top=3.* and .*top=4"):
        Samples.zero(F, SIZES).merge(Samples.zero(F, replace(SIZES, top=4)))


def test_keys_are_uniform_and_depend_on_seed_shard_feature_row_and_position() -> None:
    n = 20_000
    row, position = np.divmod(np.arange(n, dtype=np.int32), np.int32(128))
    feature, zero = np.zeros(n, np.int32), np.zeros(n, np.int32)
    keys = {
        "by token": firing_keys(0, 5, feature, row, position),
        "by feature": firing_keys(0, 5, np.arange(1, n + 1, dtype=np.int32), zero, zero),
        "next seed": firing_keys(1, 5, feature, row, position),
        "next shard": firing_keys(0, 6, feature, row, position),
        "contexts": silent_keys(0, 5, np.arange(n)),
        "difference": firing_keys(0, 5, feature, row, position) ^ firing_keys(1, 5, feature, row, position),
    }
    for name, key in keys.items():
        assert (key >= 0).all()
        for bits in (key >> 57, key & 63):  # 64 cells: chi-square of 63 degrees passes 118 once in 30,000 times
            counts = np.bincount(bits, minlength=64)
            assert ((counts - n / 64) ** 2 / (n / 64)).sum() < 118, name
    assert len(np.unique(np.concatenate(list(keys.values())))) == n * len(keys)


# --- census -------------------------------------------------------------------------------------------------

counted_tokens = st.lists(st.booleans(), min_size=ROWS * T, max_size=ROWS * T).map(
    lambda flags: np.array(flags).reshape(ROWS, T)
)


# A document may end anywhere: in a context, at its edge, or many contexts later.
grids = st.lists(st.integers(0, 9).map(lambda n: n == 0), min_size=ROWS * T, max_size=ROWS * T).map(
    lambda ends: np.cumsum([0, *ends[:-1]], dtype=np.int32).reshape(ROWS, T)
)
GRID = (np.arange(ROWS * T, dtype=np.int32) // 7).reshape(ROWS, T)


def census_of(
    firings: Firings,
    counted: np.ndarray,
    grid: np.ndarray = GRID,
    *,
    block_codes: int = 1 << 20,
    batch: int = 3,
    backwards: bool = False,
) -> dict[str, np.ndarray]:
    census = SiteCensus(
        F, 2, SIZES, seed=SEED, shard_key=SHARDS[1], documents=grid, keep_codes=True, block_codes=block_codes
    )
    first_rows = range(0, ROWS, batch)
    for first in reversed(first_rows) if backwards else first_rows:
        rows = range(first, min(first + batch, ROWS))
        census.add(codes_of(of_rows(firings, rows)), counted[rows.start : rows.stop], first)
    return census.finish()


def equal_arrays(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


@law
@given(firings_of_a_shard, counted_tokens, grids, st.integers(1, 40), st.integers(1, ROWS))
def test_the_size_of_blocks_and_batches_changes_no_array_of_the_census(
    firings: Firings, counted: np.ndarray, grid: np.ndarray, block_codes: int, batch: int
) -> None:
    assert equal_arrays(
        census_of(firings, counted, grid, block_codes=block_codes, batch=batch),
        census_of(firings, counted, grid, batch=ROWS),
    )


def test_the_order_of_batches_changes_no_array_of_the_census() -> None:
    firings = {(f, row, 0): 1.0 + row for f in range(F) for row in range(ROWS)}
    counted = np.ones((ROWS, T), bool)
    backwards = census_of(firings, counted, block_codes=1, batch=1, backwards=True)
    assert equal_arrays(backwards, census_of(firings, counted))


@law
@given(firings_of_a_shard, counted_tokens, st.integers(1, 20))
def test_the_census_equals_its_slow_twin(firings: Firings, counted: np.ndarray, block_codes: int) -> None:
    arrays = census_of(firings, counted, block_codes=block_codes)
    firings = {address: value for address, value in firings.items() if counted[address[1:]]}
    stats, samples = (
        stats_of(firings),
        samples_of(firings, ordinal=1, rows=np.flatnonzero(counted.any(axis=1)).tolist()),
    )
    for name, expected in stats.arrays().items():
        assert np.array_equal(arrays[name], expected), name
    for kind in KINDS[:3]:
        for column in ("row", "position", "value"):
            assert np.array_equal(arrays[f"{kind}_{column}"].reshape(-1), getattr(getattr(samples, kind), column).flat)

    l0 = np.zeros((ROWS, T), np.int64)
    for _, row, position in firings:
        l0[row, position] += 1
    assert np.array_equal(arrays["l0_histogram"][: F + 1], np.bincount(l0[counted], minlength=F + 1))
    assert arrays["l0_histogram"].sum() == counted.sum()

    slots = {"top": 1, "random": 1, "bands": SIZES.bands + 1}
    pairs = {
        (group // n, row)
        for kind, n in slots.items()
        for group, row in zip(*(getattr(getattr(samples, kind).entries(), c).tolist() for c in ("group", "row")))
    }
    expected_codes = {(f, r, p): v for (f, r, p), v in sorted(firings.items()) if (f, r) in pairs}
    feature = np.repeat(np.arange(F), np.diff(arrays["pair_start"])).tolist()
    pair_of = np.repeat(np.arange(len(feature)), np.diff(arrays["code_start"])).tolist()
    row = arrays["pair_row"].tolist()
    addresses = [(feature[i], row[i], p) for i, p in zip(pair_of, arrays["code_position"].tolist(), strict=True)]
    assert list(zip(addresses, arrays["code_value"].tolist(), strict=True)) == list(expected_codes.items())

    assert arrays["silent_row"].tolist() == samples.silent.entries().row.tolist()
    for i, silent in enumerate(arrays["silent_row"]):
        found = arrays["silent_feature"][arrays["silent_start"][i] : arrays["silent_start"][i + 1]]
        assert found.tolist() == sorted({f for f, r, _ in firings if r == silent})
    more = np.repeat(np.arange(F), np.diff(arrays["silent_more_start"])).tolist()
    quiet = as_tuples(samples.quiet.entries())
    expected_more = [(f, row) for f, _, _, row, _, _ in quiet if row not in arrays["silent_row"]]
    assert list(zip(more, arrays["silent_more_row"].tolist(), strict=True)) == expected_more

    codes_row, every = arrays["codes_row"].tolist(), np.repeat(np.arange(F), np.diff(arrays["codes_start"])).tolist()
    everything = zip(every, codes_row, arrays["codes_position"].tolist(), strict=True)
    assert dict(zip(everything, arrays["codes_value"].tolist(), strict=True)) == firings


def test_evidence_that_outgrows_its_limit_is_cut_to_what_is_still_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes_at_cut: list[tuple[int, int]] = []
    compact = SiteCensus._compact

    def watched(self: SiteCensus) -> None:
        before = sum(map(len, self._evidence))
        compact(self)
        sizes_at_cut.append((before, len(self._evidence[0])))

    monkeypatch.setattr(SiteCensus, "_compact", watched)
    # rising codes: every context displaces an earlier one from `top`
    firings = {(f, row, p): 1.0 + row for f in range(F) for row in range(ROWS) for p in range(T)}
    arrays = census_of(firings, np.ones((ROWS, T), bool), block_codes=2, batch=1)
    assert len(sizes_at_cut) >= 2
    assert any(after < before for before, after in sizes_at_cut[:-1])
    assert equal_arrays(arrays, census_of(firings, np.ones((ROWS, T), bool)))


@law
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_sums_for_the_fit_do_not_depend_on_how_tokens_were_grouped(lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = (100 * rng.standard_normal((sum(lengths), 3))).astype(np.float32)
    error = rng.standard_normal(x.shape).astype(np.float32)
    whole, parts = (SiteCensus(F, 3, SIZES, seed=0, shard_key=0, documents=GRID) for _ in range(2))
    whole.add_fit(x, error)
    bounds = np.cumsum([0, *lengths])
    for start, stop in pairwise(bounds):
        parts.add_fit(x[start:stop], error[start:stop])
    parts.add_fit(x[:0], error[:0])
    arrays = whole.finish()
    assert equal_arrays(arrays, parts.finish())
    exact = [sum(round(Fraction(float(v)) * (1 << fixed.SUM_SCALE)) for v in column) for column in x.T]
    assert totals_of(arrays["fit_vector"]) == exact
    assert arrays["fit_tokens"].tolist() == [len(x)]


# --- documents ----------------------------------------------------------------------------------------------


def documents_of(firings: Firings, counted: np.ndarray, grid: np.ndarray) -> DocumentStats:
    census = DocumentCensus(F, grid)
    census.see(counted, 0)
    census.add(codes_of({address: value for address, value in firings.items() if counted[address[1:]]}))
    return census.finish()


@law
@given(firings_of_a_shard, counted_tokens, grids)
def test_sums_over_documents_equal_their_slow_twin(firings: Firings, counted: np.ndarray, grid: np.ndarray) -> None:
    num_tokens = np.bincount(grid[counted], minlength=int(grid.max()) + 1).tolist()
    counts, totals = defaultdict[tuple[int, int], int](int), defaultdict[tuple[int, int], int](int)
    for (feature, row, position), value in firings.items():
        if counted[row, position]:
            counts[feature, grid[row, position]] += 1
            totals[feature, grid[row, position]] += round(Fraction(value) * (1 << fixed.SUM_SCALE))
    expected: dict[str, list[int]] = {name: [0] * F for name in DocumentStats.__dataclass_fields__}
    for (feature, document), count in counts.items():
        total = math.ldexp(totals[feature, document], -fixed.SUM_SCALE)
        expected["document_count"][feature] += 1
        expected["document_count_square"][feature] += count**2
        expected["document_count_tokens"][feature] += count * num_tokens[document]
        square, tokens = Fraction(total * total), Fraction(total * num_tokens[document])
        expected["document_total_square"][feature] += round(square * (1 << fixed.SQUARE_SCALE))
        expected["document_total_tokens"][feature] += round(tokens * (1 << fixed.SUM_SCALE))
    found = documents_of(firings, counted, grid)
    for name, array in found.arrays().items():
        assert (totals_of(array) if array.ndim == 2 else array.tolist()) == expected[name], name
    arrays = census_of(firings, counted, grid, block_codes=5, batch=2)
    assert equal_arrays(found.arrays(), {name: arrays[name] for name in expected})
    assert arrays["document_tokens"].tolist() == num_tokens
    found.check_books(arrays["count"])


@law
@given(st.lists(firings_of_a_shard, min_size=3, max_size=3), grids)
def test_merging_sums_over_documents_is_a_commutative_monoid(shards: list[Firings], grid: np.ndarray) -> None:
    x, y, z = (documents_of(firings, np.ones((ROWS, T), bool), grid) for firings in shards)
    assert same(x.merge(y), y.merge(x))
    assert same(x.merge(y).merge(z), x.merge(y.merge(z)))
    assert same(x.merge(DocumentStats.zero(F)), x)
    with pytest.raises(ValueError, match="cannot merge documents of 5 and 6 features"):
        x.merge(DocumentStats.zero(6))


def test_a_document_that_lacks_contexts_is_no_document() -> None:
    census = DocumentCensus(F, np.zeros((ROWS, T), np.int32))
    census.see(np.ones((3, T), bool), 0)
    census.add(codes_of({(0, 1, 1): 1.0}))
    with pytest.raises(ValueError, match="document 0 lacks contexts"):
        census.finish()


@pytest.mark.parametrize(
    ("name", "by", "message"),
    [
        ("document_count", 99, "document_count > count at feature 2"),
        ("document_count", -7, "disagree on silence at feature 2"),
        ("document_count_square", -99, "document_count_square < count at feature 2"),
        ("document_count_tokens", -99, "document_count_tokens < document_count_square at feature 2"),
    ],
)
def test_tampered_books_of_documents_are_refused_by_law_and_feature(name: str, by: int, message: str) -> None:
    firings = {(f, row, 0): 2.0 for f in range(F) for row in range(ROWS)}
    stats, count = documents_of(firings, np.ones((ROWS, T), bool), GRID), np.full(F, ROWS)
    stats.check_books(count)
    getattr(stats, name)[2] += by
    with pytest.raises(ValueError, match=message):
        stats.check_books(count)


def test_the_grid_of_documents_follows_runs_over_contexts_and_padding() -> None:
    run_row, run_start = np.array([0, 0, 1, 2, 3]), np.array([0, 3, 0, 0, 0])
    is_new = np.array([True, True, False, True, True])
    grid = document_grid(run_row, run_start, is_new, num_rows=4, num_positions=4)
    assert grid.tolist() == [[0, 0, 0, 1], [1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3]]
