"""The feature analyzer against a slow dense reference, and its laws: order, splits, masks and samples."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

import sae_census
from sae_census.compute.notebook import subsamples
from sae_census.compute.notebook.cross_layer import Crosscoder, CrossLayerTranscoder
from sae_census.compute.notebook.dense import sparse_codes
from sae_census.compute.notebook.subsamples import Context, Gatherer
from sae_census.compute.numbers.codes import Codes
from sae_census.compute.numbers.sae import JumpRelu, Relu, SparseAutoencoder, TopK
from sae_census.compute.numbers.stats import QUANTILE_ERROR
from sae_census.config import FeatureAnalyzerConfig
from sae_census.errors import ConfigError, ShardError
from sae_census.flows.notebook import post_analysis
from sae_census.flows.notebook.feature_analyzer import FeatureAnalyzer
from sae_census.io.checkpoints import load_sae

Results = list[dict[str, Any]]

T, F = 3, 4
PAD = 0
law = settings(max_examples=25)
SUBSAMPLES = {
    "strong": {"proportion": 1.0, "n_samples": 3},
    "half": {"proportion": 0.5, "n_samples": 2, "max_length": 2},
    "weak": {"proportion": 0.3, "n_samples": 3},
    "silent": {"proportion": 0.0, "n_samples": 2},
}


class Given:
    """An SAE whose codes are what it is fed."""

    def __init__(self, **cfg: Any):
        self.cfg = SimpleNamespace(**cfg)

    def encode(self, x: Tensor) -> Tensor:
        return x


def config(**changes: Any) -> FeatureAnalyzerConfig:
    return FeatureAnalyzerConfig(
        **({"total_analyzing_tokens": 10**9, "ignore_token_ids": [PAD], "subsamples": SUBSAMPLES} | changes)
    )


def analyze(stream: Any, sae: Any = None, **changes: Any) -> Results:
    return FeatureAnalyzer(config(**changes)).analyze_chunk(stream, Given() if sae is None else sae)


def stream_of(
    acts: Any, tokens: Any = None, order: Sequence[int] | None = None, size: int = 2, named: bool = True
) -> list[dict[str, Any]]:
    """Batches of contexts in some order; context i is called i, in shards of three."""
    acts = torch.as_tensor(np.asarray(acts, np.float32))
    tokens = torch.ones(acts.shape[:2], dtype=torch.long) if tokens is None else torch.as_tensor(tokens)
    order = list(range(len(acts)) if order is None else order)
    batches = []
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        batch: dict[str, Any] = {"acts": acts[rows], "tokens": tokens[rows]}
        if named:
            batch["meta"] = [{"context_idx": i % 3, "shard_idx": i // 3, "dataset_name": f"d{i % 2}"} for i in rows]
        batches.append(batch)
    return batches


def contexts_of(sampling: dict[str, Any]) -> list[int]:
    """The contexts of a sampling of `stream_of`, as they were numbered there."""
    return (3 * sampling["shard_idx"] + sampling["context_idx"]).tolist()


def rows_of(sampling: dict[str, Any], num_positions: int = T) -> np.ndarray:
    """The samples as dense rows."""
    dense = np.zeros((len(sampling["context_idx"]), num_positions), np.float32)
    sample, position = sampling["feature_acts_indices"]
    dense[sample, position] = sampling["feature_acts_values"]
    return dense


def sampling_of(results: Results, feature: int, name: str) -> dict[str, Any]:
    (found,) = [sampling for sampling in results[feature]["samplings"] if sampling["name"] == name]
    return found


def same(a: Any, b: Any) -> bool:
    """Whether two results are equal to the bit, types included."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


# --- the slow reference -------------------------------------------------------------------------------------


def check(results: Results, acts: np.ndarray, tokens: np.ndarray) -> None:
    """Everything `SUBSAMPLES` should give for these dense codes, computed one feature and context at a time."""
    kept = tokens != PAD
    for f, result in enumerate(results):
        z = np.where(kept, np.maximum(acts[:, :, f], 0), 0).astype(np.float32)
        firing = z[z > 0].astype(np.float64)
        assert result["act_times"] == len(firing)
        assert result["n_analyzed_tokens"] == kept.sum()
        assert result["max_feature_acts"] == z.max()
        assert result["context_count"] == (z > 0).any(axis=1).sum()
        assert result["frequency"] == len(firing) / max(kept.sum(), 1)
        counted = z[kept].astype(np.float64) if kept.any() else np.zeros(1)
        assert result["mean"] == pytest.approx(counted.mean(), abs=1e-9)
        assert result["std"] == pytest.approx(counted.std(), abs=1e-6)
        assert result["mean_when_firing"] == pytest.approx(firing.mean() if len(firing) else 0, abs=1e-9)
        for name, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
            exact = np.sort(firing)[max(int(np.ceil(q * len(firing))), 1) - 1] if len(firing) else 0
            assert abs(result[name] - exact) <= QUANTILE_ERROR * exact * (1 + 1e-12)
        for name, asked in SUBSAMPLES.items():
            check_sampling(sampling_of(results, f, name), z, kept, asked)


def check_sampling(sampling: dict[str, Any], z: np.ndarray, kept: np.ndarray, asked: dict[str, Any]) -> None:
    score, chosen = z.max(axis=1), contexts_of(sampling)
    if score.max() == 0:
        assert chosen == []
    elif asked["proportion"] == 0:
        silent = [i for i in range(len(z)) if score[i] == 0 and kept[i].any()]
        assert len(set(chosen)) == len(chosen) == min(len(silent), asked["n_samples"])
        assert set(chosen) <= set(silent)
    else:
        limit = score.max() * np.float32(asked["proportion"])
        eligible = [i for i in range(len(z)) if 0 < score[i] <= limit]
        assert chosen == sorted(eligible, key=lambda i: (-score[i], i))[: asked["n_samples"]]
    for i, start, stop, row in zip(chosen, sampling["start"], sampling["stop"], rows_of(sampling, z.shape[1])):
        assert 0 <= start <= z[i].argmax() < stop <= z.shape[1]
        assert stop - start == min(asked.get("max_length", z.shape[1]), z.shape[1])
        expected = np.zeros_like(row)
        expected[start:stop] = z[i, start:stop]
        assert (row == expected).all()


contexts = st.integers(1, 9)
few_values = st.sampled_from([0.0, 0.0, 0.0, -1.0, 0.1, 0.3, 0.5, 0.5, 0.6, 1.0, 2.0])


@st.composite
def worlds(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[int], int]:
    """Dense codes with many ties, tokens with pads, an order of contexts and a batch size."""
    n = draw(contexts)
    acts = draw(st.lists(few_values, min_size=n * T * F, max_size=n * T * F))
    tokens = draw(st.lists(st.sampled_from([PAD, 1, 2]), min_size=n * T, max_size=n * T))
    order = draw(st.permutations(range(n)))
    return np.reshape(acts, (n, T, F)).astype(np.float32), np.reshape(tokens, (n, T)), order, draw(st.integers(1, 4))


@law
@given(worlds())
def test_statistics_and_samples_equal_the_slow_reference(world: Any) -> None:
    acts, tokens, order, size = world
    check(analyze(stream_of(acts, tokens, order, size)), acts, tokens)


@law
@given(worlds())
def test_permuting_and_rebatching_the_stream_changes_nothing(world: Any) -> None:
    acts, tokens, order, size = world
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subsamples, "BLOCK", 1)  # sort in after every batch
        permuted = analyze(stream_of(acts, tokens, order, size))
    assert same(permuted, analyze(stream_of(acts, tokens)))


def test_what_waits_is_sorted_in_time_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    acts = np.maximum(rng.normal(size=(60, T, F)), 0).astype(np.float32)
    tokens = np.ones((60, T), np.int64)
    whole = analyze(stream_of(acts, tokens))
    check(whole, acts, tokens)
    settled: list[int] = []
    settle = Gatherer._settle

    def watched(self: Gatherer) -> None:
        settle(self)
        settled.append(len(self._contexts))

    monkeypatch.setattr(subsamples, "BLOCK", 1)
    monkeypatch.setattr(Gatherer, "_settle", watched)
    assert same(analyze(stream_of(acts, tokens)), whole)
    assert len(settled) > 40
    assert max(settled) <= F * 3  # contexts that nothing keeps are forgotten


def test_a_context_is_judged_against_the_final_maximum_wherever_it_stands() -> None:
    # 0.9 is the maximum at first, so a running maximum would reject it for good and keep 0.2 alone
    acts = np.zeros((3, 1, 1))
    acts[:, 0, 0] = 0.9, 0.2, 2.0
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        half = sampling_of(analyze(stream_of(acts, order=order, size=1)), 0, "half")
        assert contexts_of(half) == [0, 1]


def test_the_golden_case() -> None:
    acts = np.array(
        [[[1, 0.2], [0.3, 0.8]], [[0.2, 0.9], [0.4, 0.1]], [[0.7, 0.3], [0.2, 0.2]], [[0.9, 0.4], [0.1, 0.6]]]
    )
    asked = {"top": {"proportion": 1.0, "n_samples": 2}, "mid": {"proportion": 0.5, "n_samples": 2}}
    results = analyze(stream_of(acts), subsamples=asked)
    assert [result["max_feature_acts"] for result in results] == [1.0, np.float32(0.9)]
    expected = {
        (0, "top"): ([0, 3], [[1.0, 0.3], [0.9, 0.1]]),
        (1, "top"): ([1, 0], [[0.9, 0.1], [0.2, 0.8]]),
        (0, "mid"): ([1], [[0.2, 0.4]]),
        (1, "mid"): ([2], [[0.3, 0.2]]),
    }
    for (feature, name), (chosen, rows) in expected.items():
        sampling = sampling_of(results, feature, name)
        assert contexts_of(sampling) == chosen
        assert (rows_of(sampling, 2) == np.array(rows, np.float32)).all()


def test_a_context_at_exactly_the_proportion_is_eligible() -> None:
    acts = np.zeros((3, 1, 1))
    acts[:, 0, 0] = 1.0, 0.3, np.nextafter(np.float32(0.3), np.float32(1))
    assert contexts_of(sampling_of(analyze(stream_of(acts)), 0, "weak")) == [1]


def test_equal_scores_are_ordered_by_shard_context_and_then_whatever_else_tells_them_apart() -> None:
    acts = np.ones((7, 1, 1))
    assert contexts_of(sampling_of(analyze(stream_of(acts, order=[6, 5, 3, 1, 0, 2, 4])), 0, "strong")) == [0, 1, 2]
    twin = {"acts": torch.ones(1, 1, 1), "tokens": torch.ones(1, 1)}
    twins = [twin | {"meta": [{"context_idx": 4, "dataset_name": name}]} for name in "abcdefg"]
    forth, back = analyze(twins), analyze(twins[::-1])
    assert same(forth, back)
    assert len(set(sampling_of(forth, 0, "strong")["dataset_name"])) == 3


# --- config and masks ---------------------------------------------------------------------------------------


def test_the_config_has_the_documented_fields_and_defaults() -> None:
    with pytest.raises(ValidationError, match="total_analyzing_tokens"):
        FeatureAnalyzerConfig()  # type: ignore[call-arg]
    default = sae_census.FeatureAnalyzerConfig(total_analyzing_tokens=5)
    assert (default.ignore_token_ids, default.clt_layer) == (None, None)
    assert default.subsamples == {
        "top_activations": {"proportion": 1.0, "n_samples": 10},
        "non_activating": {"proportion": 0.3, "n_samples": 20, "max_length": 50},
    }
    assert FeatureAnalyzerConfig.model_validate_json(default.model_dump_json()) == default


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"proportion": 1.0}, "x has proportion; expected proportion, n_samples"),
        ({}, "x has nothing"),
        ({"proportion": 1.0, "n_samples": 1, "lenght": 3}, "x has lenght, n_samples, proportion"),
        ({"proportion": 1.5, "n_samples": 1}, "x: proportion is 1.5; expected 0 to 1"),
        ({"proportion": 1.0, "n_samples": 0}, "x: n_samples is 0"),
        ({"proportion": 1.0, "n_samples": 1, "max_length": 1.5}, "x: max_length is 1.5"),
    ],
)
def test_a_subsample_that_means_nothing_is_refused(parameters: dict[str, float], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(subsamples={"x": parameters})


def test_masks_keep_every_token_that_is_none_of_the_ignored() -> None:
    analyzer, tokens = FeatureAnalyzer(config()), torch.tensor([[1, 2, 3], [2, 2, 4]])
    for ids, expected in (
        ([2], [[1, 0, 1], [0, 0, 1]]),
        ([2, 4, 9], [[1, 0, 1], [0, 0, 0]]),
        ([], [[1, 1, 1], [1, 1, 1]]),
    ):
        mask = analyzer.compute_ignore_token_masks(tokens, ids)
        assert mask.dtype == torch.bool
        assert mask.tolist() == [[bool(kept) for kept in row] for row in expected]
    with pytest.warns(UserWarning, match="every token counts, padding included"):
        assert analyzer.compute_ignore_token_masks(tokens).all()


def test_ignored_tokens_change_nothing_but_count_to_the_stop() -> None:
    rng = np.random.default_rng(1)
    acts = np.maximum(rng.normal(size=(6, T, F)), 0)
    tokens = np.tile([1, PAD, 2], (6, 1))
    loud = acts.copy()
    loud[:, 1] = 99
    assert same(analyze(stream_of(loud, tokens)), analyze(stream_of(acts, tokens)))
    results = analyze(
        stream_of(acts, tokens), total_analyzing_tokens=2 * 2 * T - 1
    )  # ends in the second of three batches
    assert {result["n_analyzed_tokens"] for result in results} == {8}
    assert {i for f in range(F) for i in contexts_of(sampling_of(results, f, "strong"))} <= {0, 1, 2, 3}


def test_the_mask_of_the_batch_is_used_unless_ids_are_given_and_without_either_pads_count() -> None:
    batch = stream_of(np.ones((2, T, 1)), [[1, PAD, PAD], [1, 2, PAD]])[0]
    masked = batch | {"mask": torch.tensor([[1, 0, 0], [1, 1, 0]])}
    assert analyze([masked], ignore_token_ids=None)[0]["act_times"] == 3
    assert analyze([masked], ignore_token_ids=[])[0]["act_times"] == 6
    with pytest.warns(UserWarning, match="padding included"):
        assert analyze([batch], ignore_token_ids=None)[0]["act_times"] == 6


def test_nan_at_masked_positions_is_harmless_and_the_callers_tensors_stay_as_they_are() -> None:
    acts = np.maximum(np.random.default_rng(2).normal(size=(4, T, F)), 0).astype(np.float32)
    tokens = np.tile([1, 2, PAD], (4, 1))
    broken = acts.copy()
    broken[:2, 2], broken[2:, 2] = np.nan, np.inf
    stream = stream_of(broken, tokens)
    before = [batch["acts"].clone() for batch in stream]
    assert same(analyze(stream), analyze(stream_of(acts, tokens)))
    for batch, was in zip(stream, before, strict=True):
        assert torch.equal(batch["acts"].isnan(), was.isnan())
        assert torch.equal(batch["acts"].nan_to_num(), was.nan_to_num())


def test_nan_at_a_counted_position_is_an_error_with_its_address() -> None:
    acts = np.ones((2, T, F), np.float32)
    acts[1, 2, 0] = np.nan
    with pytest.raises(ShardError, match="NaN or infinite in context 1 of a batch, at position 2"):
        analyze(stream_of(acts))
    explodes = SimpleNamespace(encode=lambda x: x / 0)
    with pytest.raises(ShardError, match="codes are NaN or infinite in context 0"):
        analyze(stream_of(np.ones((2, T, F))), explodes)


# --- results ------------------------------------------------------------------------------------------------


def test_a_result_has_the_documented_fields_and_integers_stay_exact() -> None:
    big = (1 << 24) + 1  # the first integer that float32 cannot hold
    meta = {
        "context_idx": big,
        "dataset_name": "web",
        "model_name": "m",
        "url_length": torch.tensor(2.5),
        "tags": ["a"],
    }
    batch = {
        "acts": torch.tensor([[[0.5], [0.0], [2.0]]]),
        "tokens": torch.ones(1, 3, dtype=torch.long),
        "meta": [meta],
    }
    (result,) = analyze([batch])
    assert [type(result[key]) for key in ("act_times", "n_analyzed_tokens", "max_feature_acts")] == [int, int, float]
    top = sampling_of([result], 0, "strong")
    assert (top["name"], top["group"]) == ("strong", "top")
    assert top["feature_acts_indices"].dtype == np.int64
    assert top["feature_acts_indices"].tolist() == [[0, 0], [0, 2]]
    assert top["feature_acts_values"].dtype == np.float32
    assert top["feature_acts_values"].tolist() == [0.5, 2.0]
    assert [top[key].tolist() for key in ("context_idx", "shard_idx", "n_shards")] == [[big], [0], [1]]
    assert all(top[key].dtype == np.int64 for key in ("context_idx", "shard_idx", "n_shards", "start", "stop"))
    assert (top["dataset_name"], top["model_name"], top["tags"]) == (["web"], ["m"], [["a"]])
    assert top["url_length"].tolist() == [2.5]


def test_groups_say_what_a_subsample_is_whatever_its_name() -> None:
    asked = {"non_activating": SUBSAMPLES["weak"], "low_activating": SUBSAMPLES["weak"], "never": SUBSAMPLES["silent"]}
    acts = np.zeros((4, 1, 1))
    acts[:, 0, 0] = 1.0, 0.2, 0.0, 0.0
    old, new, never = analyze(stream_of(acts), subsamples=asked)[0]["samplings"]
    assert (old["group"], new["group"], never["group"]) == ("low_activating", "low_activating", "non_activating")
    assert contexts_of(old) == contexts_of(new) == [1]
    assert sorted(contexts_of(never)) == [2, 3]


def test_silent_contexts_are_drawn_evenly_and_by_the_seed() -> None:
    acts = np.zeros((8, 1, 1))
    acts[0] = 1
    asked = {"silent": {"proportion": 0, "n_samples": 1}}
    drawn = [
        contexts_of(analyze(stream_of(acts), subsamples=asked, seed=seed)[0]["samplings"][0])[0] for seed in range(70)
    ]
    assert sorted(set(drawn)) == [1, 2, 3, 4, 5, 6, 7]
    assert min(map(drawn.count, range(1, 8))) >= 4  # 10 expected


def test_features_have_samples_of_their_own_number_and_dead_ones_none() -> None:
    acts = np.zeros((5, T, 3))
    acts[:, 0, 0] = 1, 2, 3, 4, 5
    acts[4, 1, 1] = 1  # fires once, in the last batch
    results = analyze(stream_of(acts, size=1))
    assert [len(contexts_of(sampling_of(results, f, "strong"))) for f in range(3)] == [3, 1, 0]
    assert all(len(sampling["start"]) == 0 for sampling in results[2]["samplings"])
    assert [sampling["name"] for sampling in results[2]["samplings"]] == list(SUBSAMPLES)
    assert results[2]["act_times"] == results[2]["max_feature_acts"] == results[2]["p50"] == 0


def test_a_subsample_that_was_empty_fills_up_later() -> None:
    acts = np.zeros((3, 1, 1))
    acts[:, 0, 0] = 1.0, 1.0, 0.1
    assert contexts_of(sampling_of(analyze(stream_of(acts, size=1)), 0, "weak")) == [2]


@pytest.mark.parametrize(("peak", "window"), [(0, (0, 3)), (4, (3, 6)), (9, (7, 10))])
def test_a_long_context_is_cropped_around_its_peak_and_positions_stay_those_of_the_context(peak, window) -> None:
    acts = np.full((1, 10, 1), 0.5)
    acts[0, peak] = 2
    asked = {"top": {"proportion": 1, "n_samples": 1, "max_length": 3}}
    (top,) = analyze(stream_of(acts), subsamples=asked)[0]["samplings"]
    assert (top["start"].item(), top["stop"].item()) == window
    assert top["feature_acts_indices"][1].tolist() == list(range(*window))
    assert top["feature_acts_values"].max() == 2


def test_batches_may_differ_in_length() -> None:
    acts = np.maximum(np.random.default_rng(3).normal(size=(4, 6, F)), 0).astype(np.float32)
    acts[2:, 4:] = 0
    even = stream_of(acts)
    short = [even[0], {key: value[:, :4] if key != "meta" else value for key, value in even[1].items()}]
    for whole, cut in zip(analyze(even, ignore_token_ids=[]), analyze(short, ignore_token_ids=[]), strict=True):
        assert whole["act_times"] == cut["act_times"]
        for a, b in zip(whole["samplings"], cut["samplings"], strict=True):
            if a["name"] != "silent":
                assert (rows_of(a, 6) == rows_of(b, 6)).all()
                assert same(a["context_idx"], b["context_idx"])


# --- splitting the work -------------------------------------------------------------------------------------


@law
@given(worlds(), st.integers(0, 9))
def test_results_of_shards_merge_into_those_of_the_whole(world: Any, cut: int) -> None:
    acts, tokens, order, size = world
    cut = min(max(cut, 1), len(acts))
    parts = [part for part in (order[:cut], order[cut:]) if part]
    whole = analyze(stream_of(acts, tokens))
    shards = [analyze(stream_of(acts, tokens, part, size)) for part in parts]
    for f, result in enumerate(whole):
        mine = [shard[f] for shard in shards]
        assert result["act_times"] == sum(one["act_times"] for one in mine)
        assert result["n_analyzed_tokens"] == sum(one["n_analyzed_tokens"] for one in mine)
        assert result["max_feature_acts"] == max(one["max_feature_acts"] for one in mine)
        strong = [sampling_of(shard, f, "strong") for shard in shards]
        union = [(-row.max(), i, row.tolist()) for one in strong for i, row in zip(contexts_of(one), rows_of(one))]
        best = sorted(union)[:3]
        merged = sampling_of(whole, f, "strong")
        assert contexts_of(merged) == [i for _, i, _ in best]
        assert rows_of(merged).tolist() == [row for *_, row in best]


@law
@given(worlds(), st.integers(0, 9), st.booleans())
def test_gatherers_that_know_the_maximum_merge_into_one_for_every_rule(world: Any, cut: int, swap: bool) -> None:
    acts, _, order, _ = world
    maximum = np.maximum(acts, 0).max(axis=(0, 1))

    def gathered(rows: Sequence[int], limit: np.ndarray | None, silent: bool) -> Gatherer:
        gatherer = Gatherer(F, 2)
        if len(rows):
            codes = codes_of(acts[list(rows)])
            names = [Context(0, i, (i * 7) % 11, T, {}) for i in rows]
            if silent:
                gatherer.add_silent(codes, names, np.ones(len(rows), bool))
            else:
                gatherer.add_strongest(codes, names, limit)
        return gatherer

    for limit, silent in ((None, False), (maximum * np.float32(0.5), False), (None, True)):
        parts = [gathered(order[:cut], limit, silent), gathered(order[cut:], limit, silent)]
        merged, other = parts[::-1] if swap else parts
        merged.merge(other)
        every = np.ones(F, bool)
        a, b = merged.chosen(2, every), gathered(range(len(acts)), limit, silent).chosen(2, every)
        for name in ("feature_start", "context", "start", "stop", "code_start", "position", "value"):
            assert same(getattr(a, name), getattr(b, name))
        assert a.contexts == b.contexts
    with pytest.raises(ValueError, match="cannot merge"):
        Gatherer(F, 2).merge(Gatherer(F, 3))


def codes_of(acts: np.ndarray) -> Codes:
    return sparse_codes(torch.from_numpy(acts), torch.ones(acts.shape[:2], dtype=torch.bool))


def random_sae(gate: Any, num_features: int = 24, width: int = 6) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(5)
    w_enc, w_dec = (
        torch.randn(*shape, generator=generator) for shape in ((width, num_features), (num_features, width))
    )
    b_enc = torch.randn(num_features, generator=generator)
    return SparseAutoencoder(w_enc=w_enc, b_enc=b_enc, w_dec=w_dec, b_dec=torch.zeros(width), gate=gate)


def features(sae: SparseAutoencoder, part: slice) -> SparseAutoencoder:
    gate = JumpRelu(sae.gate.threshold[part]) if isinstance(sae.gate, JumpRelu) else sae.gate
    return SparseAutoencoder(
        w_enc=sae.w_enc[:, part].contiguous(), b_enc=sae.b_enc[part], w_dec=sae.w_dec[part], b_dec=sae.b_dec, gate=gate
    )


ACTIVATIONS = np.random.default_rng(4).normal(size=(7, 5, 6))


def close(a: Results, b: Results) -> bool:
    """Equal but for the last bits of codes."""
    for x, y in zip(a, b, strict=True):
        assert x["act_times"] == y["act_times"]
        assert x["max_feature_acts"] == pytest.approx(y["max_feature_acts"], rel=1e-5)
        for one, other in zip(x["samplings"], y["samplings"], strict=True):
            assert contexts_of(one) == contexts_of(other)
            np.testing.assert_allclose(rows_of(one, 5), rows_of(other, 5), rtol=1e-4, atol=1e-6)
    return True


@pytest.mark.parametrize("gate", [Relu(), JumpRelu(torch.linspace(0, 1, 24))], ids=["relu", "jumprelu"])
def test_features_analysed_in_parts_equal_the_whole_but_a_top_k_is_chosen_among_all(gate: Any) -> None:
    stream = stream_of(ACTIVATIONS)
    sae = random_sae(gate)
    parts = [analyze(stream, features(sae, part)) for part in (slice(0, 10), slice(10, 24))]
    assert close(parts[0] + parts[1], analyze(stream, sae))
    sae = random_sae(TopK(3))
    halves = [analyze(stream, features(sae, part)) for part in (slice(0, 10), slice(10, 24))]
    assert sum(r["act_times"] for part in halves for r in part) > sum(r["act_times"] for r in analyze(stream, sae))


# --- SAEs ---------------------------------------------------------------------------------------------------


def dense_codes(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    codes = sae.encode(x)
    dense = torch.zeros(*x.shape[:2], sae.num_features)
    dense[codes.row.tolist(), codes.position.tolist(), codes.feature.tolist()] = torch.from_numpy(codes.value)
    return dense


@pytest.mark.parametrize("gate", [Relu(), TopK(3)], ids=["relu", "topk"])
def test_an_sae_of_ours_and_an_object_that_encodes_densely_give_the_same(gate: Any) -> None:
    sae = random_sae(gate)
    stream = stream_of(ACTIVATIONS, np.tile([1, 1, PAD, 1, 1], (7, 1)))
    dense = SimpleNamespace(encode=lambda x: dense_codes(sae, x), cfg=SimpleNamespace(sae_type="sae", d_sae=24))
    results = analyze(stream, sae)
    assert same(results, analyze(stream, dense))
    for batch in stream:
        batch["acts"][:, 2] = torch.nan
    assert same(results, analyze(stream, sae))


def test_what_a_factory_a_function_and_a_list_give_is_the_same() -> None:
    acts = np.maximum(ACTIVATIONS, 0)
    batches = stream_of(acts)
    factory = Mock(spec=["process"])
    factory.process.side_effect = lambda size: iter(stream_of(acts, size=size))
    sae = Given(hook_point_in="acts", sae_type="sae", d_sae=6)
    found = FeatureAnalyzer(config()).analyze_chunk(factory, sae, None, {"size": 3})
    assert factory.process.call_count == 2
    assert same(found, analyze(batches))
    assert same(found, analyze(lambda: (batch for batch in batches)))


def test_a_stream_that_can_be_read_once_is_enough_where_no_maximum_is_needed() -> None:
    simple = {name: SUBSAMPLES[name] for name in ("strong", "silent")}
    batches = stream_of(np.maximum(ACTIVATIONS, 0))
    assert same(analyze(iter(batches), subsamples=simple), analyze(batches, subsamples=simple))
    taken: list[int] = []

    def once() -> Iterator[Any]:
        taken.append(1)
        yield from batches

    with pytest.raises(ConfigError, match=r"generator, which can be read only once.*give the function"):
        analyze(once())
    assert taken == []
    exhausted = iter(batches)
    with pytest.raises(ConfigError, match="second pass gave 0 contexts, the first 7"):
        analyze(lambda: exhausted)
    shrinking = [batches, stream_of(np.maximum(ACTIVATIONS, 0), tokens=np.full((7, 5), 2))]
    with pytest.raises(ConfigError, match="gave 7 contexts, the first 7, or others than before"):
        analyze(lambda: shrinking.pop())


def heads(x: Tensor, w_enc: Tensor, b_enc: Tensor) -> Tensor:
    return torch.einsum("bthd,hdf->btf", x, w_enc) + b_enc.sum(dim=0)


def test_a_crosscoder_sums_its_heads_and_says_how_its_decoders_lie() -> None:
    generator = torch.Generator().manual_seed(6)
    w_enc, b_enc, w_dec = (torch.randn(*s, generator=generator) for s in ((2, 6, 9), (2, 9), (2, 9, 6)))
    w_dec[1, 4] = 0
    x = torch.randn(7, 5, 2, 6, generator=generator)
    ours = Crosscoder.of(w_enc=w_enc, b_enc=b_enc, w_dec=w_dec, b_dec=torch.zeros(2, 6), gate=Relu())
    assert torch.equal(ours.w_dec, w_dec)
    cfg = SimpleNamespace(sae_type="crosscoder", hook_points=["b", "a"], d_sae=9)

    def encode(x: Tensor) -> Tensor:  # a head may stay silent where another fires
        codes = heads(x, w_enc, b_enc).relu()
        return torch.stack([codes * (codes > 1), codes], dim=2)

    theirs = SimpleNamespace(encode=encode, cfg=cfg, W_D=torch.nn.Parameter(w_dec))
    stream = stream_of(x)
    split = [
        {"a": b["acts"][:, :, 1], "b": b["acts"][:, :, 0], "tokens": b["tokens"], "meta": b["meta"]} for b in stream
    ]
    results = analyze(stream, ours)
    assert close(results, analyze(split, theirs))
    assert close(results, analyze(stream_of(heads(x, w_enc, b_enc).relu())))
    for found in (results, analyze(split, theirs)):
        for f, result in enumerate(found):
            rows = w_dec[:, f].numpy()
            norms = np.array([np.sqrt((row**2).sum()) for row in rows])
            inner = np.array([[sum(a * b) for b in rows] for a in rows])
            safe = np.where(norms > 0, norms, 1)
            np.testing.assert_allclose(result["decoder_norms"], norms, rtol=1e-6)
            np.testing.assert_allclose(result["decoder_inner_product_matrices"], inner, rtol=1e-5, atol=1e-6)
            cosines = inner / safe[:, None] / safe
            np.testing.assert_allclose(result["decoder_similarity_matrices"], cosines, rtol=1e-5, atol=1e-6)


def test_a_cross_layer_transcoder_is_analysed_layer_by_layer() -> None:
    generator = torch.Generator().manual_seed(7)
    w_enc, b_enc = torch.randn(3, 6, 9, generator=generator), torch.randn(3, 9, generator=generator)
    w_dec = tuple(torch.randn(i + 1, 9, 6, generator=generator) for i in range(3))
    gates = (Relu(), TopK(2), JumpRelu(torch.full((9,), 0.5)))
    ours = CrossLayerTranscoder(w_enc=w_enc, b_enc=b_enc, w_dec=w_dec, b_dec=torch.zeros(3, 6), gates=gates)
    stream = stream_of(ACTIVATIONS)
    results = analyze(stream, ours, clt_layer=1)
    alone = SparseAutoencoder(w_enc=w_enc[1], b_enc=b_enc[1], w_dec=w_dec[1][1], b_dec=torch.zeros(6), gate=TopK(2))
    assert close(results, analyze(stream, alone))
    for f, result in enumerate(results):
        expected = [0, w_dec[1][1, f].norm(), w_dec[2][1, f].norm()]
        np.testing.assert_allclose(result["decoder_norms"], expected, rtol=1e-6)
    cfg = SimpleNamespace(sae_type="clt", hook_points_in=["l0", "l1", "l2"])
    theirs = SimpleNamespace(
        encode_single_layer=lambda x, layer: dense_codes(ours.encoder(layer), x), cfg=cfg, W_D=list(w_dec)
    )
    elsewhere = [
        {"l0": torch.zeros_like(b["acts"]), "l1": b["acts"], **{k: b[k] for k in ("tokens", "meta")}} for b in stream
    ]
    assert same(analyze(elsewhere, theirs, clt_layer=1), results)
    for sae in (ours, theirs):
        with pytest.raises(ConfigError, match="clt_layer is 3, but the transcoder has layers 0 to 2"):
            analyze(stream, sae, clt_layer=3)
    with pytest.raises(ConfigError, match="clt_layer is not given"):
        analyze(stream, ours)
    with pytest.raises(ConfigError, match="clt_layer is 1, but this SAE is of type sae"):
        analyze(stream, alone, clt_layer=1)


def test_processors_are_found_by_type_with_a_generic_one_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post_analysis, "_REGISTRY", dict(post_analysis._REGISTRY))
    find = FeatureAnalyzer(config()).get_post_analysis_func
    assert find("sae") is find("generic") is find("never heard of") is post_analysis.nothing
    assert find("crosscoder") is not find("clt")
    stream = stream_of(np.ones((2, T, F)))
    lorsa = Given(sae_type="lorsa")
    with pytest.raises(NotImplementedError, match="lorsa needs z patterns"):
        analyze(stream, lorsa)
    post_analysis.register_post_analysis("lorsa", lambda sae, config: {"number": np.arange(F)})
    assert [result["number"] for result in analyze(stream, lorsa)] == [0, 1, 2, 3]
    post_analysis.register_post_analysis("lorsa", lambda sae, config: {"number": np.arange(F + 1)})
    with pytest.raises(ConfigError, match="number for 5 features; expected 4"):
        analyze(stream, lorsa)
    with pytest.raises(ConfigError, match="neither w_dec nor W_D"):
        analyze(stream, Given(sae_type="crosscoder"))


@pytest.mark.parametrize("architecture", ["jumprelu", "standard", "batchtopk"])
def test_a_folded_input_scale_gives_the_codes_of_scaled_activations(architecture: str, tmp_path: Path) -> None:
    scale, generator = 2.5, torch.Generator().manual_seed(8)
    names = {"W_enc": (6, 24), "W_dec": (24, 6), "b_enc": (24,), "b_dec": (6,)}
    tensors = {name: torch.randn(*shape, generator=generator) for name, shape in names.items()}
    sizes: dict[str, Any] = {"d_in": 6, "d_sae": 24, "metadata": {"hook_name": "blocks.0.hook_resid_post"}}
    match architecture:
        case "jumprelu":
            tensors["threshold"] = 2 * torch.rand(24, generator=generator)
        case "batchtopk":
            tensors["topk_threshold"] = torch.tensor(1.5)
            sizes |= {"k": 4, "rescale_acts_by_decoder_norm": True}
    raw = {"architecture": architecture, "apply_b_dec_to_input": False, **sizes}
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(raw | {"normalize_activations": "expected_average_only_in"}))
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale}))
    loaded = load_sae(str(tmp_path))
    theirs = load_file(tmp_path / "sae_weights.safetensors")
    norm = theirs["W_dec"].norm(dim=1)

    def encode(x: Tensor) -> Tensor:  # the definition: scale the input, then encode
        pre = scale * x @ theirs["W_enc"] + theirs["b_enc"]
        match architecture:
            case "jumprelu":
                return torch.where(pre > theirs["threshold"], pre, 0)
            case "batchtopk":  # gated on code times length of its own decoder, reported in units of the folded one
                return torch.where(pre * norm > 1.5, pre, 0) * norm / scale
            case _:
                return pre.relu()

    point = "blocks.0.hook_resid_post"
    stream = stream_of(ACTIVATIONS)
    named = [
        {point: batch["acts"], "other": batch["acts"], **{k: batch[k] for k in ("tokens", "meta")}} for batch in stream
    ]
    results = analyze(named, loaded)
    assert close(results, analyze(stream, SimpleNamespace(encode=encode)))
    assert 0 < sum(result["act_times"] for result in results) < 24 * 35


@pytest.mark.parametrize(
    ("change", "sae", "message"),
    [
        (lambda b: b.pop("tokens"), Given(), "a batch has no tokens"),
        (lambda b: b.pop("acts"), Given(), "has activations of nothing, and this SAE does not say which"),
        (lambda b: b.update(more=b["acts"]), Given(), "activations of acts, more, and this SAE does not say which"),
        (lambda b: None, Given(hook_point_in="mlp"), "a batch has no activations of mlp; it has acts"),
        (
            lambda b: b.update(tokens=b["tokens"][:, :2]),
            Given(),
            r"activations are \(2, 3, 4\), but tokens are \(2, 2\)",
        ),
        (lambda b: b.update(mask=torch.ones(2, 4)), Given(), r"tokens are \(2, 3\), mask \(2, 4\)"),
        (lambda b: b["meta"].pop(), Given(), "has 2 contexts and meta of 1"),
        (lambda b: b["meta"][0].update(start=3), Given(), "meta of a context has start"),
        (lambda b: b["meta"][0].update(context_idx="x"), Given(), "context_idx 'x'; expected whole numbers"),
        (
            lambda b: None,
            random_sae(Relu()),
            r"activations are \(2, 3, 4\), but this SAE reads \(B, T\) tokens of \(6,\)",
        ),
        (lambda b: None, Given(d_sae=5), "codes have 4 features; expected 5"),
        (lambda b: None, SimpleNamespace(encode=lambda x: x[:, 0]), r"encode returned \(2, 4\); expected \(2, 3\)"),
        (lambda b: None, object(), "SAE of type object has no method encode"),
        (
            lambda b: None,
            Given(norm_activation="dataset-wise"),
            r"normalises its input \(dataset-wise\) outside of encode",
        ),
        (lambda b: None, Given(normalize_activations="expected_average_only_in"), "fold the scale into its weights"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(change: Callable[[Any], Any], sae: Any, message: str) -> None:
    (batch,) = stream_of(np.ones((2, T, F)))
    change(batch)
    with pytest.raises(ConfigError, match=message):
        analyze([batch], sae, ignore_token_ids=None if "mask" in batch else [PAD])


def test_streams_and_meshes_that_cannot_be_used_are_refused() -> None:
    analyzer = FeatureAnalyzer(config())
    with pytest.raises(ConfigError, match="the stream gave no batches"):
        analyze([])
    with pytest.raises(ConfigError, match="the stream is a int; expected"):
        analyze(3)
    with pytest.raises(ConfigError, match=r"the stream is a list with arguments \{'size': 1\}"):
        analyzer.analyze_chunk([], Given(), None, {"size": 1})
    with pytest.raises(ConfigError, match="device_mesh is given"):
        analyzer.analyze_chunk([], Given(), "mesh")  # type: ignore[arg-type]


def test_contexts_without_metadata_are_numbered_as_they_come() -> None:
    acts = np.zeros((5, 1, 1))
    acts[:, 0, 0] = 1, 5, 2, 4, 3
    top = sampling_of(analyze(stream_of(acts, named=False)), 0, "strong")
    assert top["context_idx"].tolist() == [1, 3, 4]
    assert (top["shard_idx"].tolist(), top["n_shards"].tolist()) == ([0, 0, 0], [1, 1, 1])
