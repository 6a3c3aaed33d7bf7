"""Discovery once more, slowly: full logits, dense codes and plain loops, with nothing left out."""

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from discovery_bench import Bench
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_census.config import DiscoverRequest
from sae_census.flows.catalog.reader import Catalog


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
    """The quantile of each feature's codes by nearest rank: its bin is counted up to, one code after the other."""
    arrays = catalog.statistics(hook_point, sae)
    tokens = catalog.feature(hook_point, sae, 0)["tokens_counted"]
    q = request.tau.value if request.tau.mode == "quantile" else 0.95
    found = []
    for histogram, most in zip(arrays["histogram"].tolist(), arrays["maximum"].tolist(), strict=True):
        fires = sum(histogram)
        silent = 0 if request.tau.mode == "p95_nonzero" else tokens - fires
        rank = max(math.ceil(q * (fires + silent)), 1)
        bins = [None] * silent + [size for size, count in enumerate(histogram) for _ in range(count)]
        size = bins[rank - 1] if fires else None
        if size is None:
            found.append(0.0)
        else:
            low, high = (2.0 ** (n // 8 - 16) * (1 + n % 8 / 8) for n in (size, size + 1))
            found.append(min(2 / (1 / low + 1 / high), most))
    return np.array(found)
