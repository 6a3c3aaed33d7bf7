"""Discovery against a slow dense twin: kept tokens, scores, rankings, spans and what stands beside a catalog."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from dense_discovery import Dense, twin
from discovery_bench import CLOSE, GATES, TEXT, Bench, ask, bare, bench, catalog_bench, gates, ids_of, informed, of

from sae_census.config import SaeConfig
from sae_census.errors import RequestError
from sae_census.findings import Discovery, FoundFeature
from sae_census.flows.catalog.reader import Catalog
from sae_census.io.store.memo import ArrayCache
from sae_census.steps.discovery.discoverer import Discoverer

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "open": {"min_coverage_pct": 0.0, "return_top_x": 200},
    "entropy": {"topk_tokens_per_seq": 7, "min_coverage_pct": 0.1, "return_top_x": 200},
    "norm": {"token_filter": "norm", "topk_tokens_per_seq": 7, "min_coverage_pct": 0.0},
    "no_filter": {"token_filter": "none", "topk_tokens_per_seq": 3, "min_coverage_pct": 0.2},
    "mean": {"score_mode": "mean", "min_coverage_pct": 0.3, "return_top_x": 7},
    "max": {"score_mode": "max", "min_coverage_pct": 0.05, "return_top_x": 9},
    "selectivity": {"score_mode": "selectivity", "topk_tokens_per_seq": 9, "min_coverage_pct": 0.1},
    "gate_before_truncation": {"score_mode": "max", "min_coverage_pct": 0.6, "return_top_x": 3},
    "not_merged": {"merge_across_layers": False, "return_top_x": 4, "min_coverage_pct": 0.1},
    "masked": {"first_positions": 4, "max_norm_ratio": 1.05, "min_coverage_pct": 0.0, "return_top_x": 200},
    "tau_constant": {"tau": {"mode": "constant", "value": 0.7}, "min_coverage_pct": 0.01, "return_top_x": 200},
    "tau_nonzero": {"tau": {"mode": "p95_nonzero"}, "min_coverage_pct": 0.01, "return_top_x": 200},
    "tau_quantile": {"tau": {"mode": "quantile", "value": 0.7}, "min_coverage_pct": 0.01, "return_top_x": 200},
    "one_layer": {"layers": [1], "streams": ["resid_post"], "min_coverage_pct": 0.0},
    "one_sae": {"sae_id": "early", "min_coverage_pct": 0.0},
    "restricted": {"restrict_features": [1, 2, 3, 5, 40, 51, 90], "min_coverage_pct": 0.0},
    "restricted_gated": {"restrict_features": [*range(20), 5, 40, 90], "min_coverage_pct": 0.2, "return_top_x": 3},
    "restricted_apart": {
        "restrict_features": [2, 6, 9, 70],
        "merge_across_layers": False,
        "score_mode": "selectivity",
        "min_coverage_pct": 0.05,
    },
    "by_norm": {"normalize": "activation_norm", "min_coverage_pct": 0.0, "topk_tokens_per_seq": 11},
    "by_mean_code": {"normalize": "mean_code", "min_coverage_pct": 0.0},
    "no_evidence": {"attach_examples": False, "attach_proto_labels": False, "min_coverage_pct": 0.0},
    "one_span": {"num_spans": 1, "min_coverage_pct": 0.0},
}
WINDOW = (16, 8)


def split_by_list(answer: Discovery) -> list[list[FoundFeature]]:
    lists: list[list[FoundFeature]] = []
    for feature in answer.features:
        if feature.rank == 1:
            lists.append([])
        lists[-1].append(feature)
    return lists


def test_attention_sinks_are_left_out_without_a_catalog_unless_they_are_asked_for(bench, sinky_dir, tmp_path):
    sinky = Bench(model=sinky_dir, saes=bench.saes)
    discoverer, text = sinky.open(), "river water. stone bridge, def return value."
    for options in ({}, {"attention_sinks": False}):
        expected = twin(sinky, ids_of(sinky, text), options | {"min_coverage_pct": 0.0})
        answer = ask(discoverer, text=text, min_coverage_pct=0.0, **options)
        analyzed = answer.analyzed
        assert analyzed.attention_sinks is not bool(options)
        assert analyzed.tokens_kept == expected.kept.sum() == analyzed.tokens - 1 - analyzed.tokens_sinks  # BOS
        assert [of(one) for one in answer.features] == [one["key"] for one in expected.rankings[0]]
        notes = [note for note in analyzed.notes if "look like attention sinks" in note]
        assert bool(notes) is bool(options)
        assert analyzed.tokens_sinks == (0 if options else 3)
    cached = Discoverer(discoverer._loaded, ArrayCache(tmp_path, 1 << 24))
    first, second = (ask(cached, text=text).analyzed for _ in range(2))
    assert first == second
    assert second.tokens_sinks == 3


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("with_catalog", [False, True], ids=["bare", "catalog"])
def test_the_answer_is_that_of_the_dense_twin(case, with_catalog, bench, catalog_bench, bare, informed):
    options = CASES[case]
    if case == "by_mean_code" and not with_catalog:
        with pytest.raises(RequestError, match="needs a catalog"):
            ask(bare, text=TEXT, **options)
        return
    mine, discoverer = (catalog_bench, informed) if with_catalog else (bench, bare)
    expected = twin(mine, ids_of(mine, TEXT), options)
    answer = ask(discoverer, text=TEXT, **options)
    analyzed = answer.analyzed
    assert (analyzed.mode, analyzed.text, analyzed.tokens) == ("text", TEXT, len(expected.ids))
    assert analyzed.tokens_kept == expected.kept.sum() > 0
    assert (analyzed.features_scored, analyzed.features_gated) == (expected.num_scored, expected.num_gated)
    assert with_catalog or expected.num_scored > expected.num_gated, "a case without features tests nothing"

    lists = split_by_list(answer)
    rankings = [r for r in expected.rankings if r]
    assert [[of(f) for f in found] for found in lists] == [[one["key"] for one in r] for r in rankings]
    assert [(of(f), f.gate) for f in answer.below_gate] == [(key, gate) for key, gate, _ in expected.below]
    assert [f.score for f in answer.below_gate] == pytest.approx([score for *_, score in expected.below], abs=CLOSE)
    for feature, one in zip(answer.features, itertools.chain(*expected.rankings), strict=True):
        assert feature.score == pytest.approx(one["score"], rel=CLOSE, abs=CLOSE)
        assert feature.scores.model_dump() == pytest.approx(one["scores"], rel=CLOSE, abs=CLOSE)
        assert feature.tau == pytest.approx(one["tau"], rel=1e-12)
        assert feature.hook_point == f"blocks.{feature.layer}.hook_resid_post"
        assert feature.stream == "resid_post"
        dense = expected.codes[feature.hook_point, feature.sae][:, feature.feature_id]
        assert_spans(answer, feature, dense, expected, options)
        if with_catalog:
            assert_beside_catalog(feature, mine.catalog, int((dense[expected.kept] > 0).sum()), expected)
        else:
            assert feature.catalog is None
    for found in lists:
        assert [feature.rank for feature in found] == list(range(1, len(found) + 1))


def assert_spans(
    answer: Discovery, feature: FoundFeature, dense: np.ndarray, expected: Dense, options: dict[str, Any]
) -> None:
    """Windows are greedy, apart from each other, and say what stands in them."""
    taken: set[int] = set()
    wanted = []
    order = [t for t in np.argsort(-dense, kind="stable") if expected.kept[t] and dense[t] > 0]
    for peak in order if options.get("attach_examples", True) else []:
        window = range(max(peak - WINDOW[0], 0), min(peak + WINDOW[1], len(dense)))
        if len(wanted) < options.get("num_spans", 3) and not taken & set(window):
            taken |= set(window)
            wanted.append((window.start, window.stop, peak))
    assert [(*span.position, span.peak) for span in feature.top_spans] == wanted
    for span in feature.top_spans:
        start, stop = span.position
        assert span.text == answer.analyzed.text[span.char[0] : span.char[1]]
        assert len(span.tokens) == len(span.values) == stop - start
        np.testing.assert_allclose(span.values, dense[start:stop], rtol=CLOSE, atol=CLOSE)
        assert span.act == span.values[span.peak - start] > 0
    acts = [span.act for span in feature.top_spans]
    assert acts == sorted(acts, reverse=True)
    assert not acts or acts[0] == feature.scores.max


def assert_beside_catalog(feature: FoundFeature, catalog: Catalog, fired: int, expected: Dense) -> None:
    row = catalog.feature(feature.hook_point, feature.sae, feature.feature_id)
    beside = feature.catalog
    assert (beside.frequency, beside.max) == (row["frequency"], row["max"])
    assert beside.mean == pytest.approx(row["mean"], rel=1e-12)
    cells = [fired, int(expected.kept.sum()) - fired, row["count"], row["tokens_counted"] - row["count"]]
    a, b, c, d = (n + 0.5 for n in cells)
    assert beside.log_odds == pytest.approx(math.log(a * d / b / c), abs=1e-9)
    assert beside.log_odds_low < beside.log_odds < beside.log_odds_high
    assert (beside.percentile is None) == (row["count"] == 0)
    if feature.scores.max > row["max"]:
        assert beside.percentile == 1.0


def test_every_feature_of_a_list_is_ranked_or_told_why_not(bare, informed):
    wanted = [159, 258, 345, 375, 116, 402, 417, 423, 518, 612, 705, 711, 802, 809, 900]
    wanted = [feature % 64 for feature in wanted]
    for discoverer in (bare, informed):
        answer = ask(discoverer, prompt="river water", gen_tokens=8, restrict_features=wanted)
        told = [(f.layer, f.feature_id) for f in (*answer.features, *answer.below_gate)]
        assert sorted(told) == sorted({(layer, feature) for layer in (0, 1) for feature in wanted})
        assert {f.score for f in answer.below_gate if f.gate == "silent"} == {0.0}


def test_the_documents_own_request_is_answered(bare, informed):
    """Its defaults gate nearly everything; what they gate is told, and the value that would pass fills the ranking."""
    for discoverer in (bare, informed):
        answer = ask(discoverer, prompt="river water stone", gen_tokens=16)
        assert len(answer.features) + len(answer.below_gate) == min(25, answer.analyzed.features_scored)
        assert {f.gate for f in answer.below_gate} == {"min_coverage_pct"}
        would_pass = answer.analyzed.passing_min_coverage
        assert any(f"min_coverage_pct={math.floor(would_pass * 1e4) / 1e4:g}" in n for n in answer.analyzed.notes)
        opened = ask(discoverer, prompt="river water stone", gen_tokens=16, min_coverage_pct=would_pass)
        assert len(opened.features) == min(25, answer.analyzed.features_scored)
        assert opened.analyzed.passing_min_coverage is None


@pytest.mark.parametrize("gate", GATES)
def test_restricting_changes_no_number_for_any_gate(gate, bench, gates):
    mine = Bench(model=bench.model, saes=(SaeConfig(path=str(gates[gate])),))
    discoverer = mine.open()
    options = {"min_coverage_pct": 0.0, "topk_tokens_per_seq": 12, "return_top_x": 40}
    whole = ask(discoverer, text=TEXT, **options)
    expected = twin(mine, ids_of(mine, TEXT), options)
    assert [of(f) for f in whole.features] == [one["key"] for one in expected.rankings[0]]
    assert len(whole.features) > 6
    for few in ([whole.features[2].feature_id], [f.feature_id for f in whole.features[1::3]]):
        part = ask(discoverer, text=TEXT, restrict_features=few, **options)
        same = [f for f in whole.features if f.feature_id in few]
        assert [f.model_dump(exclude={"rank"}) for f in part.features] == [f.model_dump(exclude={"rank"}) for f in same]
