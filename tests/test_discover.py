"""Discovery against a slow dense twin, and the laws of its sequences, rankings, spans, batches and cache."""

import itertools
import json
import math
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import LAYERS, WIDTH, MakeConfig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from sae_census.compute.numbers import stats as statistics
from sae_census.compute.numbers.stats import FeatureStats
from sae_census.config import DiscoverRequest, DiscoveryConfig, SaeConfig
from sae_census.errors import (
    ConfigError,
    CorruptError,
    DeadlineError,
    IdentityError,
    RequestError,
    ShardError,
    SourceError,
)
from sae_census.findings import Discovery, FoundFeature
from sae_census.flows.catalog.reader import Catalog
from sae_census.flows.census.analyze import analyze
from sae_census.flows.discovery.discover import open_discoverer
from sae_census.flows.discovery.rank_drift import RankDrift, rank_drift
from sae_census.io.model import generation
from sae_census.io.model.generation import Patience
from sae_census.io.model.language_model import LanguageModel
from sae_census.io.store.memo import ArrayCache
from sae_census.steps.discovery.discoverer import Discoverer
from sae_census.steps.model.sae_map import saes_named

TEXT = 'river water stone 🙂 café, def return value "list"\nfor index mother Zürich 日本 2024'
SITES = (("blocks.0.hook_resid_post", "early"), ("blocks.1.hook_resid_post", "late"))
CLOSE = 1e-4
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
GATES = ("standard", "jumprelu", "topk", "gated")
WINDOW = (16, 8)


# --- the world ---


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The tiny model with its SAEs, and whatever answers from it."""

    model: Path
    saes: tuple[SaeConfig, ...]
    catalog: Catalog | None = None

    def config(self, **fields: Any) -> DiscoveryConfig:
        return DiscoveryConfig.model_validate(
            {
                "model": {"id": str(self.model), "dtype": "float32", "device": "cpu"},
                "saes": self.saes,
                "catalog": None if self.catalog is None else str(self.catalog.folder.parent),
                "threads": 1,
                "cache_mb": 0,
            }
            | fields
        )

    def open(self, **fields: Any) -> Discoverer:
        return open_discoverer(self.config(**fields))


@pytest.fixture(scope="module")
def bench(model_dir: Path, sae_dirs: dict[str, Path]) -> Bench:
    return Bench(model=model_dir, saes=tuple(SaeConfig(path=str(sae_dirs[name])) for name in ("late", "early")))


@pytest.fixture(scope="module")
def bare(bench: Bench) -> Discoverer:
    return bench.open()


@pytest.fixture(scope="module")
def catalog_bench(bench: Bench, analyze_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """With a catalog that leaves the first token and position 5 out."""
    root = tmp_path_factory.mktemp("background")
    analyze(analyze_config(root, masks={"first_positions": 1, "positions": [5]}))
    return Bench(model=bench.model, saes=bench.saes, catalog=Catalog(root))


@pytest.fixture(scope="module")
def informed(catalog_bench: Bench) -> Discoverer:
    return catalog_bench.open()


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One SAE of 40 features of each gate; `gated` and `topk` on layer 1, the others on layer 0."""
    folder = tmp_path_factory.mktemp("gates")
    found = {}
    for number, gate in enumerate(GATES):
        generator = torch.Generator().manual_seed(number)
        w = torch.randn(WIDTH, 40, generator=generator)
        tensors = {"W_enc": w, "W_dec": w.T.contiguous(), "b_dec": torch.randn(WIDTH, generator=generator)}
        if gate == "gated":
            tensors |= {name: torch.randn(40, generator=generator) for name in ("b_gate", "b_mag", "r_mag")}
        else:
            tensors["b_enc"] = torch.randn(40, generator=generator)
        if gate == "jumprelu":
            tensors["threshold"] = torch.rand(40, generator=generator) * 4
        found[gate] = folder / gate
        found[gate].mkdir()
        save_file(tensors, found[gate] / "sae_weights.safetensors")
        layer = 1 if gate in ("topk", "gated") else 0
        config = {"architecture": gate, "d_in": WIDTH, "d_sae": 40, "dtype": "float32", "k": 5}
        config |= {"apply_b_dec_to_input": True, "metadata": {"hook_name": f"blocks.{layer}.hook_resid_post"}}
        (found[gate] / "cfg.json").write_text(json.dumps(config))
    return found


# --- the slow twin ---


def dense_code(folder: Path, x: np.ndarray) -> np.ndarray:
    """(T, F) codes of (T, D) activations, token by token in float64."""
    config = json.loads((folder / "cfg.json").read_text())
    weights = {name: t.double().numpy() for name, t in load_file(folder / "sae_weights.safetensors").items()}
    rows = []
    for v in x.astype(np.float64):
        if config.get("normalize_activations") == "layer_norm":
            centred = v - v.mean()
            v = centred / (centred.std(ddof=1) + 1e-5)
        if config["apply_b_dec_to_input"]:
            v = v - weights["b_dec"]
        pre = v @ weights["W_enc"] + weights.get("b_enc", 0.0)
        match config["architecture"]:
            case "standard":
                z = np.maximum(pre, 0)
            case "jumprelu":
                z = np.where(pre > weights["threshold"], np.maximum(pre, 0), 0)
            case "topk":
                z = np.zeros_like(pre)
                best = np.argsort(-pre, kind="stable")[: config["k"]]
                z[best] = np.maximum(pre[best], 0)
            case "gated":
                magnitude = np.maximum(pre * np.exp(weights["r_mag"]) + weights["b_mag"], 0)
                z = np.where(pre + weights["b_gate"] > 0, magnitude, 0)
        rows.append(z)
    return np.array(rows)


@dataclass(frozen=True, kw_only=True)
class Dense:
    """Everything about one sequence, with nothing left out."""

    ids: list[int]
    kept: np.ndarray
    codes: dict[tuple[str, str], np.ndarray]
    rankings: list[list[dict[str, Any]]]
    below: list[tuple[tuple[int, str, int], str, float]]
    """Key, gate and score of what stands below the gates."""
    num_scored: int
    num_gated: int


def twin(bench: Bench, ids: list[int], options: dict[str, Any]) -> Dense:  # noqa: C901  # one plain account
    """The answer once more: full logits, dense codes, plain loops."""
    request = DiscoverRequest.model_validate({"text": "a"} | options)
    tokenizer = AutoTokenizer.from_pretrained(bench.model)
    model = AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32).eval()
    with torch.inference_mode():
        out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    logits = out.logits[0].double()
    p = logits.softmax(dim=1)
    entropy = -(p * p.log()).sum(dim=1).numpy()
    chosen = []
    for one in bench.saes:
        folder = Path(one.path)
        hook_point = json.loads((folder / "cfg.json").read_text())["metadata"]["hook_name"]
        layer = int(hook_point.split(".")[1])
        x = out.hidden_states[layer + 1][0].numpy()
        if request.layers in (None, [layer]) and request.sae_id in (None, folder.name):
            chosen.append((layer, folder.name, hook_point, folder, x))
    chosen.sort(key=lambda one: one[:2])

    masks = {"first_positions": 0, "positions": [], "max_norm_ratio": None, "attention_sinks": True}
    if bench.catalog is not None:
        masks |= {"first_positions": 1, "positions": [5]}
    for name in ("first_positions", "max_norm_ratio", "attention_sinks"):
        masks[name] = options.get(name, masks[name])
    most = {layer: (np.square(x.astype(np.float64)).max(axis=1)) for layer, _, _, _, x in chosen}
    norms = {layer: np.linalg.norm(x.astype(np.float64), axis=1) for layer, _, _, _, x in chosen}
    allowed = []
    for position, token in enumerate(ids):
        fine = token not in tokenizer.all_special_ids
        fine &= position >= masks["first_positions"] and position not in masks["positions"]
        for layer, norm in norms.items():
            median = sorted(norm)[(len(ids) - 1) // 2]
            ratio, by_one = norm[position] / median, most[layer][position] > norm[position] ** 2 / 2
            fine &= not (masks["attention_sinks"] and (ratio > 10 or (ratio > 2 and by_one)))
            fine &= masks["max_norm_ratio"] is None or norm[position] <= masks["max_norm_ratio"] * median
        allowed.append(bool(fine))
    weight = {"entropy": entropy, "norm": norms[max(norms)], "none": np.zeros(len(ids))}[request.token_filter]
    order = sorted((t for t in range(len(ids)) if allowed[t]), key=lambda t: (-weight[t], t))
    keep = order if request.token_filter == "none" else order[: request.topk_tokens_per_seq]
    kept = np.isin(np.arange(len(ids)), keep)

    rankings, codes, num_scored, num_gated = [], {}, 0, 0
    for layer, name, hook_point, folder, x in chosen:
        z = codes[hook_point, name] = dense_code(folder, x)
        tau, other, scale = np.zeros(z.shape[1]), z[np.array(allowed) & ~kept], 1.0
        subtracted = other.mean(axis=0) if len(other) else np.zeros(z.shape[1])
        if request.tau.mode == "constant":
            tau += request.tau.value
        if bench.catalog is not None:
            rows = bench.catalog.features.to_pylist()
            rows = [row for row in rows if (row["hook_point"], row["sae"]) == (hook_point, name)]
            rows.sort(key=lambda row: row["feature_id"])
            subtracted = np.array([row["mean"] for row in rows])
            if request.tau.mode != "constant":
                tau = _tau(bench.catalog, hook_point, name, request)
            if request.normalize == "mean_code":
                scale = sum(r["mean"] * r["tokens_counted"] for r in rows) / sum(r["count"] for r in rows)
        if request.normalize == "activation_norm":
            scale = norms[layer][kept].mean()
        ranking = []
        for feature in range(z.shape[1]):
            column = z[kept, feature]
            if feature in request.restrict_features or ((column > 0).any() and not request.restrict_features):
                fires = bool((column > 0).any())
                scores = {
                    "mean": column.mean(),
                    "max": column.max(),
                    "coverage": (column > tau[feature]).mean(),
                    "selectivity": column.mean() - subtracted[feature],
                }
                num_scored += fires
                num_gated += fires and scores["coverage"] < request.min_coverage_pct
                score = scores.get(request.score_mode, scores["mean"] * scores["coverage"]) / scale
                one = {"key": (layer, name, feature), "score": score, "scores": scores, "tau": tau[feature]}
                ranking.append(one | {"fires": fires})
        rankings.append(ranking)
    if request.merge_across_layers:
        rankings = [list(itertools.chain(*rankings))]
    below = []
    for ranking in rankings:
        ranking.sort(key=lambda one: (not one["fires"], -one["score"] if one["fires"] else 0, one["key"]))
        firing = [one for one in ranking if one["fires"]]
        low = [one for one in firing if one["scores"]["coverage"] < request.min_coverage_pct]
        passed = [one for one in firing if one not in low]
        rest = [(one, "low" if one in low else "cut" if one["fires"] else "silent") for one in ranking]
        rest = [pair for pair in rest if pair[0] not in passed[: request.return_top_x]]
        if not request.restrict_features:
            rest = [pair for pair in rest if pair[1] == "low"][: max(request.return_top_x - len(passed), 0)]
        names = {"low": "min_coverage_pct", "cut": "return_top_x", "silent": "silent"}
        below += [(one["key"], names[gate], one["score"] if one["fires"] else 0.0) for one, gate in rest]
        ranking[:] = passed[: request.return_top_x]
    return Dense(
        ids=ids,
        kept=kept,
        codes=codes,
        rankings=rankings,
        below=below,
        num_scored=num_scored,
        num_gated=int(num_gated),
    )


def _tau(catalog: Catalog, hook_point: str, sae: str, request: DiscoverRequest) -> np.ndarray:
    arrays = catalog.statistics(hook_point, sae)
    stats = FeatureStats(**{name: arrays[name] for name in FeatureStats.__dataclass_fields__})
    tokens = catalog.feature(hook_point, sae, 0)["tokens_counted"]
    q, over = {
        "p95": (0.95, tokens), "p95_nonzero": (0.95, None), "quantile": (request.tau.value, tokens)
    }[request.tau.mode]  # fmt: skip
    return statistics.quantile(stats, q, over)


def ids_of(bench: Bench, text: str) -> list[int]:
    return AutoTokenizer.from_pretrained(bench.model)(text)["input_ids"]


def of(feature: FoundFeature) -> tuple[int, str, int]:
    return feature.layer, feature.sae, feature.feature_id


def ask(discoverer: Discoverer, **fields: Any) -> Discovery:
    return discoverer.discover(DiscoverRequest.model_validate(fields))


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


# --- sequences and continuations ---


def hf_greedy(bench: Bench, prompt: str, num_tokens: int) -> list[int]:
    """Greedy continuation by whole forward passes, one token at a time, up to an end token."""
    tokenizer = AutoTokenizer.from_pretrained(bench.model)
    model = AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32).eval()
    ids = tokenizer(prompt)["input_ids"]
    new: list[int] = []
    while len(new) < num_tokens:
        with torch.inference_mode():
            token = int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        new.append(token)
    return new


def test_a_prompt_is_continued_greedily_and_both_are_analysed(bench, bare):
    options = {"gen_tokens": 20, "min_coverage_pct": 0.05, "topk_tokens_per_seq": 10}
    new = hf_greedy(bench, "river water", 20)
    answer = ask(bare, prompt="river water", **options)
    ids = ids_of(bench, "river water") + new
    expected = twin(bench, ids, options)
    assert answer.analyzed.mode == "prompt+gen"
    assert (answer.analyzed.tokens, answer.analyzed.tokens_generated) == (len(ids), len(new))
    assert answer.analyzed.generation == "greedy"
    assert [of(f) for f in answer.features] == [one["key"] for one in expected.rankings[0]]
    decoded = AutoTokenizer.from_pretrained(bench.model).decode(ids[1:])
    assert answer.analyzed.text == decoded
    assert answer.analyzed.text.startswith("river water")
    for feature in answer.features:
        for span in feature.top_spans:
            assert span.text == answer.analyzed.text[slice(*span.char)]
            assert span.char[0] <= span.char[1]


def test_a_prompt_that_is_not_continued_is_as_the_text(bare):
    text, prompt = ask(bare, text=TEXT), ask(bare, prompt=TEXT, generate=False)
    assert prompt.analyzed.mode == "prompt"
    assert prompt.analyzed.generation is None
    assert prompt.features == text.features


def test_sampling_is_reproducible_and_hangs_on_its_seed(bare):
    def text(**fields: Any) -> str:
        return ask(bare, prompt="river", gen_tokens=24, do_sample=True, **fields).analyzed.text

    assert text(seed=1) == text(seed=1)
    assert len({text(seed=seed) for seed in range(4)}) == 4
    assert text(seed=1, temperature=1e-4) == ask(bare, prompt="river", gen_tokens=24).analyzed.text
    assert text(seed=2, top_p=1e-9) == ask(bare, prompt="river", gen_tokens=24).analyzed.text
    assert len({ask(bare, prompt="river", gen_tokens=24, seed=seed).analyzed.text for seed in range(3)}) == 1


def test_sampling_follows_the_probabilities_of_the_model(bench, bare):
    ids = ids_of(bench, "river")
    model = AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32).eval()
    with torch.inference_mode():
        p = model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(dim=0).numpy()
    likely = np.argsort(-p)[:3]
    loaded = LanguageModel(str(bench.model), dtype=torch.float32, device=torch.device("cpu"))
    num = 400
    first = [
        generation.generate(loaded, [ids], pad_id=0, max_new_tokens=1, do_sample=True, seed=seed) for seed in range(num)
    ]
    drawn = np.bincount([new[0][0] if new[0] else 2 for new in first], minlength=len(p))
    for token in likely:
        assert abs(drawn[token] - num * p[token]) < 5 * math.sqrt(num * p[token] * (1 - p[token]))


@pytest.mark.parametrize(
    "own",
    [
        {"do_sample": True, "temperature": 0.5, "top_p": 0.5, "top_k": 2},
        {"repetition_penalty": 9.0},
        {"num_beams": 3},
        {"suppress_tokens": list(range(3, 250))},
        {"max_time": 1e-9},
        {"stop_strings": ["a"]},
    ],
    ids=lambda own: next(iter(own)),
)
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_checkpoints_own_generation_settings_change_nothing(own, do_sample, bench, bare, tmp_path):
    shutil.copytree(bench.model, tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    other = Bench(model=tmp_path / "model", saes=bench.saes).open()
    fields = {"prompt": "river water", "gen_tokens": 16, "do_sample": do_sample}
    assert ask(other, **fields).analyzed.text == ask(bare, **fields).analyzed.text


def test_generation_stops_at_every_end_token_of_the_checkpoint(bench, bare, tmp_path):
    free = hf_greedy(bench, "river water", 12)
    shutil.copytree(bench.model, tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [2, free[5]]}))
    other = Bench(model=tmp_path / "model", saes=bench.saes).open()
    many = other.discover_many(
        [DiscoverRequest(prompt=prompt, gen_tokens=12) for prompt in ("river water", "stone", "mother bread")]
    )
    assert many[0].analyzed.tokens_generated == free.index(free[5])
    assert ask(other, prompt="river water", gen_tokens=12).analyzed.tokens_generated == free.index(free[5])


def test_a_continuation_keeps_the_space_before_its_first_word(tmp_path, bench, gates):
    """Of a tokenizer whose decoder strips the space at the start of a text, as those of Llama 2 do."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    inner.train_from_iterator(["▁river▁water▁stone"] * 5, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(tmp_path / "model")
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    new = fast.convert_tokens_to_ids(["▁", *"water", "▁", "<0xC3>", "<0xA9>", "▁", *"stone"])
    assert fast.unk_token_id not in new

    def generate(*_: Any, **__: Any) -> list[list[int]]:
        return [new]

    discoverer = Bench(model=tmp_path / "model", saes=(SaeConfig(path=str(gates["standard"])),)).open()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "generate", generate)
        answer = ask(discoverer, prompt="river", gen_tokens=30, min_coverage_pct=0.0)
    assert answer.analyzed.text == "river water é stone"


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "é",
        "🙂",
        "👩‍👩‍👧 and 日本",
        "שלום עולם",
        "a\0b",
        "\n\n\t",
        "e\u0301\u0301",
        "\ufeffx",
        "\u202eabc",
        "x" * 60,
    ],
)
def test_positions_and_characters_point_at_the_text_whatever_it_is(text, bare, bench):
    answer = ask(bare, text=text, min_coverage_pct=0.0, return_top_x=200)
    assert answer.analyzed.text == text
    assert answer.analyzed.tokens == len(ids_of(bench, text))
    assert answer.features
    for feature in answer.features:
        for span in feature.top_spans:
            start, stop = span.position
            assert 0 <= start <= span.peak < stop <= answer.analyzed.tokens
            assert text[slice(*span.char)] == span.text


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), st.booleans())
def test_any_text_has_an_answer_that_is_valid_json(bare, text, is_prompt):
    fields = {"prompt": text, "gen_tokens": 4} if is_prompt else {"text": text}
    answer = ask(bare, min_coverage_pct=0.0, **fields)
    assert answer.analyzed.text.startswith(text)
    again = json.loads(json.dumps(answer.model_dump(), allow_nan=False))
    assert Discovery.model_validate(again) == answer
    assert all(span.text == answer.analyzed.text[slice(*span.char)] for f in answer.features for span in f.top_spans)


def test_special_tokens_are_never_kept(bare):
    answer = ask(bare, text="river<s></s><pad>", token_filter="none", min_coverage_pct=0.0, return_top_x=200)
    assert answer.analyzed.tokens_kept == answer.analyzed.tokens - 4
    peaks = {span.peak for feature in answer.features for span in feature.top_spans}
    assert max(peaks) == answer.analyzed.tokens - 4
    assert 0 not in peaks

    nothing = ask(bare, text="</s>", min_coverage_pct=0.0)
    assert nothing.features == []
    assert any("no token was kept" in note for note in nothing.analyzed.notes)


def test_a_long_text_is_refused_or_cut_and_counted(bare, bench):
    long = "river 🙂 water " * 40
    num_tokens = len(ids_of(bench, long))
    with pytest.raises(RequestError, match=f"text has {num_tokens} tokens, and there is room for 64") as caught:
        ask(bare, text=long)
    assert caught.value.field == "text"
    cut = ask(bare, text=long, truncate=True, min_coverage_pct=0.0)
    assert (cut.analyzed.tokens, cut.analyzed.tokens_truncated) == (64, num_tokens - 64)
    assert long.startswith(cut.analyzed.text)
    assert all(span.text == long[slice(*span.char)] for f in cut.features for span in f.top_spans)
    both = ask(bare, prompt=long, truncate=True, gen_tokens=60)
    assert both.analyzed.tokens - both.analyzed.tokens_generated == 4
    with pytest.raises(RequestError, match="room for 0"):
        ask(bare, prompt=long, truncate=True, gen_tokens=64)
    assert ask(bare, text="x" * 63).analyzed.tokens == 64
    with pytest.raises(RequestError):
        ask(bare, text="x" * 64)


def test_a_chat_template_wraps_the_prompt(bench, bare, tmp_path):
    shutil.copytree(bench.model, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(
        "{{ bos_token }}user: {{ messages[0].content }}{% if add_generation_prompt %} bot:{% endif %}"
    )
    other = Bench(model=tmp_path / "model", saes=bench.saes).open()
    wrapped = ask(other, prompt="river", generate=False, chat_template=True)
    assert wrapped.analyzed.text == "<s>user: river bot:"
    assert wrapped.analyzed.tokens == len(ids_of(bench, "user: river bot:")), "one BOS, not two"
    for discoverer, fields in ((bare, {"prompt": "river"}), (other, {"text": "river"})):
        with pytest.raises(RequestError) as caught:
            ask(discoverer, chat_template=True, gen_tokens=4, **fields)
        assert caught.value.field == "chat_template"


# --- errors ---


@pytest.mark.parametrize(
    ("fields", "field", "unknown"),
    [
        ({"model_id": "another"}, "model_id", True),
        ({"sae_id": "another"}, "sae_id", True),
        ({"layers": [0, 7]}, "layers", False),
        ({"layers": [0], "sae_id": "late"}, "layers", False),
        ({"streams": ["mlp_out"]}, "streams", False),
        ({"restrict_features": [3, 96]}, "restrict_features", False),
        ({"sae_id": "early", "restrict_features": [64]}, "restrict_features", False),
        ({"normalize": "mean_code"}, "normalize", False),
    ],
)
def test_what_is_not_there_is_refused_by_its_field(fields, field, unknown, bare):
    with pytest.raises(RequestError) as caught:
        ask(bare, text="river", **fields)
    assert (caught.value.field, caught.value.unknown) == (field, unknown)
    many = bare.discover_many([DiscoverRequest(text="river", **fields), DiscoverRequest(text="river")])
    assert isinstance(many[0], RequestError)
    assert isinstance(many[1], Discovery)


def test_a_layer_without_an_sae_is_told_which_layers_have_one(bare):
    with pytest.raises(RequestError, match=r"layer 0 resid_post, layer 1 resid_post"):
        ask(bare, text="river", layers=[2])


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({}, ""), ({"text": "a", "prompt": "b"}, ""), ({"text": None, "prompt": None}, ""),
        ({"text": ""}, "text"), ({"text": 3}, "text"), ({"text": "\ud800"}, "text"),
        ({"text": "a", "model_id": "\ud800"}, "model_id"), ({"text": "a", "sae_id": "\ud800"}, "sae_id"),
        ({"text": "a", "min_coverage_pct": 50}, "min_coverage_pct"),
        ({"text": "a", "min_coverage_pct": math.nan}, "min_coverage_pct"),
        ({"text": "a", "min_coverage": 0.1, "min_coverage_pct": 0.1}, ""),
        ({"text": "a", "generate": "true"}, "generate"), ({"text": "a", "layers": "22"}, "layers"),
        ({"text": "a", "layers": []}, "layers"), ({"text": "a", "layers": [True]}, "layers.0"),
        ({"text": "a", "gen_tokens": 0}, "gen_tokens"), ({"text": "a", "gen_tokens": "9"}, "gen_tokens"),
        ({"text": "a", "score_mode": "sum"}, "score_mode"), ({"text": "a", "score_mode": ["mean"]}, "score_mode"),
        ({"text": "a", "restrict_features": [-1]}, "restrict_features.0"), ({"text": "a", "seed": -1}, "seed"),
        ({"text": "a", "tau": {"mode": "quantile"}}, "tau"), ({"text": "a", "tau": {"mode": "p50"}}, "tau.mode"),
        ({"text": "a", "tau": {"mode": "constant", "value": math.inf}}, "tau.value"),
        ({"text": "a", "temperature": math.nan}, "temperature"), ({"text": "a", "temperature": 0}, "temperature"),
        ({"prompt": "a", "do_sample": True, "temperature": 1e-300}, "temperature"),
        ({"prompt": "a", "temperature": 0.7}, ""), ({"prompt": "a", "top_p": 0.9}, ""),
        ({"text": "a", "tau": {"value": 3}}, "tau"), ({"text": "a", "tau": {"mode": "p95", "value": 0.0}}, "tau"),
        ({"text": "a", "tau": {"mode": "constant"}}, "tau"),
        ({"text": "a", "return_top_X": 3}, "return_top_X"),
        ({"text": "a", "topk_tokens_per_seq": 0}, "topk_tokens_per_seq"),
    ],
)  # fmt: skip
def test_a_malformed_request_is_refused_by_its_field(fields, where):
    with pytest.raises(ValidationError) as caught:
        DiscoverRequest.model_validate(fields)
    assert ".".join(map(str, caught.value.errors()[0]["loc"])) == where


def test_defaults_and_other_names():
    request = DiscoverRequest(prompt="a")
    assert request.model_dump(include={
        "generate", "gen_tokens", "topk_tokens_per_seq", "return_top_x", "score_mode", "min_coverage_pct",
        "merge_across_layers", "attach_examples", "attach_proto_labels", "seed", "restrict_features", "do_sample",
    }) == {
        "generate": True, "gen_tokens": 128, "topk_tokens_per_seq": 64, "return_top_x": 25,
        "score_mode": "mean×coverage", "min_coverage_pct": 0.5, "merge_across_layers": True,
        "attach_examples": True, "attach_proto_labels": True, "seed": 42, "restrict_features": [], "do_sample": False,
    }  # fmt: skip
    for name in ("mean*coverage", "mean_x_coverage", "mean×coverage"):
        assert DiscoverRequest(prompt="a", score_mode=name).score_mode == "mean×coverage"
    assert DiscoverRequest.model_validate({"prompt": "a", "min_coverage": 0.25}).min_coverage_pct == 0.25


def test_all_gated_and_missing_backgrounds_are_noted(bare, informed):
    answer = ask(bare, text="river water", tau={"mode": "constant", "value": 1e9})
    assert answer.features == []
    assert answer.analyzed.features_gated == answer.analyzed.features_scored > 0
    assert any("below min_coverage_pct=0.5" in note for note in answer.analyzed.notes)
    assert not any("needs a catalog" in note for note in answer.analyzed.notes)
    assert (ask(bare, text="a").analyzed.tau, ask(informed, text="a").analyzed.tau) == ("constant 0", "p95")
    assert any("needs a catalog" in note for note in ask(bare, text="a").analyzed.notes)
    one = {"return_top_x": 1, "min_coverage_pct": 0.0}
    (units,) = ask(informed, text="a river", **one).analyzed.notes
    assert "several units (activations after a layer norm, token by token; raw activations)" in units
    assert ask(informed, text="a river", merge_across_layers=False, **one).analyzed.notes == []
    assert ask(informed, text="a river", normalize="mean_code", **one).analyzed.notes == []
    assert [one.unit for one in ask(informed, text="a river").analyzed.saes] == [
        "activations after a layer norm, token by token",
        "raw activations",
    ]


def broken(bench: Bench, name: str) -> Discoverer:
    """With a weight that turned into NaN after it was loaded: files with such weights do not load."""
    discoverer = bench.open()
    discoverer._loaded.reader.model.inner.get_parameter(name).fill_(math.nan)
    return discoverer


@pytest.mark.parametrize("weight", ["model.layers.0.mlp.down_proj.weight", "model.norm.weight"])
def test_numbers_that_are_none_end_one_request_and_not_its_neighbours(weight, bench):
    discoverer = broken(bench, weight)
    fields = {"text": TEXT, "topk_tokens_per_seq": 4}
    with pytest.raises(ShardError, match="dtype"):
        ask(discoverer, **fields)
    many = discoverer.discover_many([DiscoverRequest(**fields), DiscoverRequest(text="a", layers=[7])])
    assert isinstance(many[0], ShardError)
    assert isinstance(many[1], RequestError)


def test_an_infinite_code_is_an_error_and_never_an_answer(bench, sae_dirs, tmp_path):
    shutil.copytree(sae_dirs["late"], tmp_path / "sae")
    weights = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    weights["W_enc"] *= 3e38 / weights["W_enc"].abs().max()
    save_file(weights, tmp_path / "sae" / "sae_weights.safetensors")
    discoverer = Bench(model=bench.model, saes=(SaeConfig(path=str(tmp_path / "sae")),)).open()
    with pytest.raises(ShardError):
        ask(discoverer, text=TEXT, min_coverage_pct=0.0)


def test_a_deadline_ends_generation(bare):
    with pytest.raises(DeadlineError, match="not done in time"):
        bare.discover(DiscoverRequest(prompt="river", gen_tokens=32), Patience(until=0.0))


def test_generation_ends_with_the_token_at_which_nobody_waits_any_more(bare):
    patience, model, num_passes = Patience(until=math.inf), bare._loaded.reader.model.inner, 0

    def leave(*_: Any) -> None:
        nonlocal num_passes
        num_passes += 1
        if num_passes == 3:
            patience.gone.set()

    hook = model.register_forward_hook(leave)
    try:
        with pytest.raises(DeadlineError, match="nobody waits"):
            bare.discover(DiscoverRequest(prompt="river", gen_tokens=32), patience)
    finally:
        hook.remove()
    assert num_passes == 3


# --- batches ---


def assert_alike(one: Discovery, other: Discovery) -> None:
    assert one.analyzed == other.analyzed
    first, second = ({of(f): f for f in answer.features} for answer in (one, other))
    assert first.keys() == second.keys()
    for key, feature in first.items():
        assert feature.scores.model_dump() == pytest.approx(second[key].scores.model_dump(), rel=CLOSE, abs=CLOSE)
        assert [s.position for s in feature.top_spans] == [s.position for s in second[key].top_spans]


def many_requests() -> list[DiscoverRequest]:
    rng = random.Random(3)
    words = TEXT.split()
    fields: list[dict[str, Any]] = []
    for number in range(14):
        text = " ".join(rng.choices(words, k=rng.choice((1, 2, 4, 6))))
        kind = number % 4
        common = {"min_coverage_pct": 0.0, "return_top_x": 500, "topk_tokens_per_seq": (64, 5)[number % 2]}
        fields.append(
            common
            | [
                {"text": text},
                {"prompt": text, "gen_tokens": 6},
                {"prompt": text, "generate": False, "layers": [1]},
                {"prompt": text, "gen_tokens": 6, "do_sample": True, "seed": number},
            ][kind]
        )
    return [DiscoverRequest.model_validate(one) for one in fields]


def test_a_batch_answers_as_single_requests_do(bare):
    requests = many_requests()
    together = bare.discover_many(requests)
    for request, answer in zip(requests, together, strict=True):
        assert_alike(answer, bare.discover(request))
    assert [a.model_dump_json() for a in bare.discover_many(requests)] == [a.model_dump_json() for a in together]
    backwards = bare.discover_many(requests[::-1])[::-1]
    for one, other in zip(together, backwards, strict=True):
        assert_alike(one, other)


def test_the_same_request_gives_the_same_bytes(informed):
    request = DiscoverRequest(prompt="river water", gen_tokens=12, do_sample=True, min_coverage_pct=0.0)
    assert informed.discover(request).model_dump_json() == informed.discover(request).model_dump_json()


# --- the cache ---


class Spy:
    """Counts forward passes and continuations."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.passes = self.continuations = 0

        def counted(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                setattr(self, name, getattr(self, name) + 1)
                return inner(*args, **options)

            return call

        for method in ("run", "run_whole"):
            patch.setattr(LanguageModel, method, counted("passes", getattr(LanguageModel, method)))
        patch.setattr(generation, "generate", counted("continuations", generation.generate))

    def taken(self) -> tuple[int, int]:
        """(forward passes, continuations) since the last call."""
        counts = self.passes, self.continuations
        self.passes = self.continuations = 0
        return counts


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Spy:
    """With an empty cache of its own."""
    monkeypatch.setenv("SAE_CENSUS_CACHE", str(tmp_path / "cache"))
    return Spy(monkeypatch)


ASKED: dict[str, Any] = {
    "prompt": "river water stone", "gen_tokens": 10, "topk_tokens_per_seq": 5, "min_coverage_pct": 0.0,
    "do_sample": True, "seed": 5,
}  # fmt: skip


def test_a_hit_runs_nothing_and_gives_the_same_bytes(bench, spy):
    without = ask(bench.open(), **ASKED).model_dump_json()
    discoverer = bench.open(cache_mb=8)
    spy.taken()
    assert ask(discoverer, **ASKED).model_dump_json() == without
    assert spy.taken() == (1, 1)
    assert ask(discoverer, **ASKED).model_dump_json() == without
    assert spy.taken() == (0, 0)
    again = bench.open(cache_mb=8)
    spy.taken()
    assert ask(again, **ASKED).model_dump_json() == without
    ask(again, **ASKED | {"score_mode": "max", "return_top_x": 3, "layers": [1], "token_filter": "norm"})
    assert spy.taken() == (0, 0)


@pytest.mark.parametrize(
    ("change", "passes", "continuations"),
    [({"seed": 6}, 1, 1), ({"temperature": 0.7}, 1, 1), ({"do_sample": False}, 1, 1), ({"gen_tokens": 9}, 1, 1),
     ({"prompt": "river water ston"}, 1, 1)],
    ids=str,
)  # fmt: skip
def test_whatever_decides_tokens_is_part_of_the_key(change, passes, continuations, bench, bare, spy):
    discoverer = bench.open(cache_mb=8)
    ask(discoverer, **ASKED)
    spy.taken()
    changed = ask(discoverer, **ASKED | change)
    assert spy.taken() == (passes, continuations)
    assert changed == ask(bare, **ASKED | change)


def test_another_sae_under_the_same_name_is_a_miss_of_codes_only(bench, spy, sae_dirs, tmp_path):
    other = tmp_path / "other" / "late"
    shutil.copytree(sae_dirs["late"], other)
    weights = load_file(other / "sae_weights.safetensors")
    weights["W_enc"] = weights["W_enc"].flip(1).contiguous()
    save_file(weights, other / "sae_weights.safetensors")
    first = Bench(model=bench.model, saes=(SaeConfig(path=str(sae_dirs["late"])),))
    second = Bench(model=bench.model, saes=(SaeConfig(path=str(other)),))
    old = ask(first.open(cache_mb=8), **ASKED)
    cached = second.open(cache_mb=8)
    spy.taken()
    new = ask(cached, **ASKED)
    assert spy.taken() == (0, 0)
    assert new == ask(second.open(), **ASKED)
    assert new.features != old.features


@pytest.mark.parametrize("change", ["weights", "dtype"])
def test_another_model_or_dtype_is_a_miss(change, bench, spy, tmp_path):
    ask(bench.open(cache_mb=8), **ASKED)
    if change == "dtype":
        model = {"id": str(bench.model), "dtype": "bfloat16", "device": "cpu"}
    else:
        shutil.copytree(bench.model, tmp_path / "model")
        weights = load_file(tmp_path / "model" / "model.safetensors")
        weights["model.layers.0.mlp.down_proj.weight"] *= 1.5
        save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
        model = {"id": str(tmp_path / "model"), "dtype": "float32", "device": "cpu"}
    other = bench.open(cache_mb=8, model=model)
    spy.taken()
    answer = ask(other, **ASKED)
    assert spy.taken() == (1, 1)
    assert answer == ask(bench.open(model=model), **ASKED)


@pytest.mark.parametrize("damage", [
    lambda body: b"", lambda body: body[:20], lambda body: body[:-1], lambda body: body + b"x",
    lambda body: body[:50] + bytes([body[50] ^ 1]) + body[51:],
], ids=["empty", "head", "short", "long", "flipped"])  # fmt: skip
def test_a_damaged_entry_is_computed_again(damage, bench, spy, tmp_path):
    discoverer = bench.open(cache_mb=8)
    sound = ask(discoverer, **ASKED)
    files = sorted((tmp_path / "cache" / "discover").iterdir())
    bodies = [file.read_bytes() for file in files]
    for file, body in zip(files, bodies, strict=True):
        file.write_bytes(damage(body))
    spy.taken()
    assert ask(discoverer, **ASKED) == sound
    assert spy.taken() == (1, 1)
    assert ask(discoverer, **ASKED) == sound
    assert spy.taken() == (0, 0)
    assert [file.read_bytes() for file in files] == bodies


@pytest.mark.parametrize("place", ["file", "below_file", "read_only"])
def test_a_cache_that_cannot_be_written_is_no_cache(place, bench, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "read_only").mkdir(mode=0o500)
    where = {"file": "", "below_file": "file", "read_only": "read_only"}[place]
    monkeypatch.setenv("SAE_CENSUS_CACHE", str(tmp_path / where))
    if place == "file":
        (tmp_path / "discover").write_text("in the way")
    discoverer = bench.open(cache_mb=8)
    assert ask(discoverer, **ASKED) == ask(bench.open(), **ASKED)


def test_the_cache_keeps_its_bound_and_what_was_used_last(tmp_path):
    cache = ArrayCache(tmp_path / "cache", 20_000)
    for number in range(60):
        cache.put(number, {"x": np.full(100, number)})
        assert cache.get(0) is not None or number > 40, "used all the time"
        cache.get(0)
        assert sum(file.stat().st_size for file in (tmp_path / "cache").iterdir()) <= 20_000
    assert cache.get(59)["x"].tolist() == [59] * 100
    assert cache.get(3) is None
    cache.put("large", {"x": np.zeros(3000)})
    assert cache.get("large") is None
    assert (cache.hits, cache.misses) > (0, 0)


def test_a_cache_that_was_emptied_by_another_process_goes_on(tmp_path):
    cache = ArrayCache(tmp_path / "cache", 4_000)
    for number in range(10):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        cache.put(number, {"x": np.zeros(50)})
        assert cache.get(number) is not None


WRITER = """
import sys, numpy as np
from pathlib import Path
from sae_census.io.store.memo import ArrayCache
cache = ArrayCache(Path(sys.argv[1]), 60_000)
for number in range(300):
    cache.put(number % 40, {"x": np.full(200, number % 40)})
    found = cache.get((number * 7) % 40)
    assert found is None or (found["x"] == (number * 7) % 40).all()
"""


def test_processes_share_a_cache(tmp_path):
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "cache")], cwd=Path(__file__).parent.parent)
        for _ in range(2)
    ]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    cache = ArrayCache(tmp_path / "cache", 60_000)
    cache.put("one more", {"x": np.zeros(1)})
    files = list((tmp_path / "cache").iterdir())
    assert sum(file.stat().st_size for file in files) <= 60_000
    assert all(len(file.name) == 64 for file in files), "no draft is left"
    entries = [cache.get(number) for number in range(40)]
    assert any(entry is not None for entry in entries)


# --- what SAEs are called, and labels ---


def test_a_folder_of_saes_is_all_of_them(sae_dirs):
    found = saes_named(str(sae_dirs["early"].parent))
    assert [one.path for one in found] == sorted(str(path) for path in sae_dirs.values())
    assert [one.path for one in saes_named(str(sae_dirs["late"]))] == [str(sae_dirs["late"])]
    assert [one.path for one in saes_named("org/repo/folder")] == ["org/repo/folder"]


@pytest.mark.parametrize(
    "content",
    [
        "0/resid_post: {early}\n1/resid_post: {late}",
        "blocks.0.hook_resid_post: {early}\nblocks.1.hook_resid_post: {late}",
        "0: {{resid_post: {early}}}\n1: {{resid_post: {late}}}",
        "0:\n  resid_post: early\n1:\n  resid_post: late",
    ],
)
def test_a_mapping_puts_each_sae_where_it_says(content, sae_dirs, tmp_path):
    for name, path in sae_dirs.items():
        (tmp_path / name).symlink_to(path)
    file = tmp_path / "map.yaml"
    file.write_text(content.format(**sae_dirs))
    found = saes_named(str(file))
    assert [one.hook_point for one in found] == [hook_point for hook_point, _ in SITES]
    assert [Path(one.path).name for one in found] == ["early", "late"]
    assert all(Path(one.path).is_dir() for one in found)


def test_a_mapping_may_name_the_same_sae_at_two_places(bench, sae_dirs, tmp_path):
    file = tmp_path / "map.yaml"
    file.write_text(f"1/resid_pre: {sae_dirs['late']}\n1/resid_post: {sae_dirs['late']}\n")
    discoverer = Bench(model=bench.model, saes=tuple(saes_named(str(file)))).open()
    answer = ask(discoverer, text="river water", layers=[1], streams=["resid_pre"], min_coverage_pct=0.0)
    assert {feature.hook_point for feature in answer.features} == {"blocks.1.hook_resid_pre"}
    both = ask(discoverer, text="river water", min_coverage_pct=0.0, sae_id="late")
    assert both.analyzed.streams == ["resid_pre", "resid_post"]


@pytest.mark.parametrize(
    "content",
    ["", "[]", "a", "22: path", "22/resid: path", "22/resid_pre: 5", "22: {resid_pre: [a]}", "0/resid_post: ''",
     "{unclosed", "\x00", "blocks.x.hook_resid_post: path", "-1/resid_pre: path", "null: path", "22: {}", "22:"],
)  # fmt: skip
def test_a_mapping_that_is_none_is_refused(content, tmp_path):
    file = tmp_path / "map.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"map\.yaml"):
        saes_named(str(file))


def test_a_mapping_that_is_missing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        saes_named(str(tmp_path / "none.yaml"))


LABEL_ROWS = [
    {"feature_id": 51, "label": "everywhere"},
    {"feature_id": 3, "label": "only early", "sae": "early"},
    {"feature_id": 4, "label": "only layer 1", "layer": 1, "stream": "resid_post"},
    {"feature_id": 5, "label": None},
    {"feature_id": 9, "label": "nowhere", "hook_point": "blocks.2.hook_resid_post"},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_labels_of_a_table_go_where_they_belong(suffix, bench, catalog_bench, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / f"labels{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(LABEL_ROWS, schema=pa.schema(
            [("feature_id", pa.int64()), ("label", pa.string()), ("sae", pa.string()), ("layer", pa.int32()),
             ("stream", pa.string()), ("hook_point", pa.string())])), file)  # fmt: skip
    else:
        file.write_text("\n".join(map(json.dumps, LABEL_ROWS)) + "\n\n")
    options = {"text": TEXT, "min_coverage_pct": 0.0, "return_top_x": 500}
    for mine in (bench, catalog_bench):
        answer = ask(mine.open(labels=str(file)), **options)
        assert {51, 3, 4} <= {feature.feature_id for feature in answer.features}
        for feature in answer.features:
            expected = {51: "everywhere"}.get(feature.feature_id)
            if feature.sae == "early" and feature.feature_id == 3:
                expected = "only early"
            if feature.layer == 1 and feature.feature_id == 4:
                expected = "only layer 1"
            if expected is not None:
                assert (feature.proto_label, feature.label_source) == (expected, "table")
            elif mine.catalog is None:
                assert (feature.proto_label, feature.label_source) == (None, None)
            else:
                row = mine.catalog.feature(feature.hook_point, feature.sae, feature.feature_id)
                assert feature.proto_label == (row["label"] or row["proto_label"])
                assert feature.label_source == ("proto" if row["proto_label"] else None)
        bare_labels = ask(mine.open(labels=str(file)), **options, attach_proto_labels=False)
        assert {feature.proto_label for feature in bare_labels.features} == {None}


@pytest.mark.parametrize(
    "content",
    ["{", "[1]", '{"feature_id": "a", "label": "b"}', '{"feature_id": 1}', "\ud800"],
)
def test_a_label_table_that_is_none_is_refused(content, bench, tmp_path):
    file = tmp_path / "labels.jsonl"
    file.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError, match=r"labels\.jsonl"):
        bench.open(labels=str(file))


@pytest.mark.parametrize("damage", ["manifest", "manifest_list", "statistics", "features"])
def test_a_damaged_catalog_is_named(damage, catalog_bench, tmp_path):
    shutil.copytree(catalog_bench.catalog.folder, tmp_path / "catalog" / "000001")
    folder = tmp_path / "catalog" / "000001"
    if damage == "manifest":
        (folder / "manifest.json").write_text("{}")
    elif damage == "manifest_list":
        (folder / "manifest.json").write_text("[]")
    elif damage == "statistics":
        shutil.rmtree(folder / "statistics.zarr")
    else:
        (folder / "features.parquet").write_bytes(b"PAR1")
    with pytest.raises(CorruptError):
        open_discoverer(catalog_bench.config(catalog=str(tmp_path / "catalog")))


def test_a_catalog_of_other_saes_is_refused(catalog_bench, gates, tmp_path):
    other = Bench(model=catalog_bench.model, saes=(SaeConfig(path=str(gates["topk"])),), catalog=catalog_bench.catalog)
    with pytest.raises(IdentityError, match=r"was not made with SAE .*/topk, but with"):
        other.open()
    with pytest.raises(ConfigError, match="there is no catalog at"):
        open_discoverer(catalog_bench.config(catalog=str(tmp_path)))


def ranking_of(given: str = "a", digest: str = "d", **scores: float) -> dict[str, Any]:
    """An answer as `sae_discover` writes it, as far as a comparison reads it."""
    rows = [
        {"hook_point": "blocks.1.hook_resid_post", "sae": "s", "feature_id": int(name[1:]), "score": score}
        | {"layer": 1, "stream": "resid_post"}
        for name, score in scores.items()
    ]
    saes = [{"hook_point": "blocks.1.hook_resid_post", "sae": "s", "digest": digest}]
    analyzed = {"given": given, "saes": saes, "merge_across_layers": True, "score_mode": "mean", "tau": "p95"}
    return {"analyzed": analyzed, "features": rows}


def drift_of(folder: Path, first: list[dict[str, Any]], second: list[dict[str, Any]]) -> RankDrift:
    files = [folder / "a.jsonl", folder / "b.jsonl"]
    for file, answers in zip(files, (first, second), strict=True):
        file.write_text("".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers), "utf-8")
    return rank_drift(*files)


def test_rank_drift_compares_what_both_answers_rank(tmp_path: Path) -> None:
    first = [ranking_of(f1=5.0, f2=4.0, f3=3.0, f4=2.0, f5=1.0), ranking_of("b\u2028c", f1=1.0), ranking_of("d")]
    second = [
        ranking_of(f2=5.0, f1=4.0, f3=3.0, f4=2.0, f9=1.0), ranking_of("b\u2028c", f1=2.0), {"line": 3, "error": {}},
    ]  # fmt: skip
    drift = drift_of(tmp_path, first, second)
    a, b = [5, 4, 3, 2, 1], [4, 5, 3, 2, 2]
    assert (drift.num_prompts, drift.num_failed, drift.num_common, drift.num_only) == (2, 1, 5, (1, 1))
    assert drift.rank_correlation == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    assert drift.overlap == {5: 0.8}
    assert drift.notes == ()


def test_an_answer_with_nothing_in_it_agrees_with_none(tmp_path: Path) -> None:
    many = {f"f{i}": float(100 - i) for i in range(25)}
    drift = drift_of(tmp_path, [ranking_of(**many)], [ranking_of()])
    assert (drift.rank_correlation, drift.overlap, drift.num_only) == (None, {}, (25, 0))
    drift = drift_of(tmp_path, [ranking_of(**many)], [ranking_of(f0=3.0, f1=2.0, f2=1.0, f3=0.5, f99=0.4)])
    assert drift.overlap == {5: 0.8}


def test_two_saes_at_one_hook_point_are_two_sets_of_features(tmp_path: Path) -> None:
    both, other = ranking_of(f1=2.0, f2=1.0), ranking_of(f1=1.0, f2=2.0)
    both["features"] += [row | {"sae": "t", "score": 9.0} for row in other["features"]]
    both["analyzed"]["saes"] += [both["analyzed"]["saes"][0] | {"sae": "t", "digest": "e"}]
    assert drift_of(tmp_path, [both], [both]).num_common == 4


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ([], "expected the same prompts"),
        ([ranking_of("other", f1=1.0)], "are not the same: 'a' and 'other'"),
        ([ranking_of(digest="e", f1=1.0)], "different SAEs"),
    ],
)
def test_answers_that_say_nothing_about_each_other_are_not_compared(second, says, tmp_path):
    with pytest.raises(SourceError, match=says):
        drift_of(tmp_path, [ranking_of(f1=1.0)], second)


def test_settings_that_differ_are_told_or_refused(tmp_path: Path) -> None:
    mine, other = ranking_of(f1=1.0), ranking_of(f1=1.0)
    other["analyzed"]["tau"] = "constant 0"
    assert drift_of(tmp_path, [mine], [other]).notes == ("tau differs: p95 and constant 0",)
    other["analyzed"]["score_mode"] = "max"
    with pytest.raises(SourceError, match="ranked by mean and max"):
        drift_of(tmp_path, [mine], [other])
    with pytest.raises(SourceError, match=r"is not a \.json or \.jsonl file"):
        rank_drift(tmp_path / "a.jsonl", tmp_path / "missing.json")
