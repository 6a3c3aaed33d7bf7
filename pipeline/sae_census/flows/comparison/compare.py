"""Which features tell two sets of text, or two models, apart: from published catalogs, without model or GPU.

open both sides -> prove that they can be compared -> per SAE: effect sizes, intervals, p-values -> false discovery
rates over all features -> rank both ways -> write. Prompts are first analysed as a small catalog of two slices.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sae_census.compute.comparison import Tokens
from sae_census.compute.numbers import drift
from sae_census.config import CompareConfig, SideConfig
from sae_census.flows.census.analyze import analyze
from sae_census.flows.comparison.sides import Side, relate
from sae_census.io.store import schemas, tables
from sae_census.io.store.blobs import LocalBlobs
from sae_census.records import canonical
from sae_census.steps.comparison import contrast, pairs
from sae_census.steps.comparison.contrast import TESTED, Columns, Pairing, SiteSums
from sae_census.types import SiteKey

_OVERLAPS = (10, 100, 1000)
_LABEL = 16
_SETTINGS = {"prompts", "min_documents", "confidence", "false_discovery_rate", "rank_by"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What the job gave."""

    a: Side
    b: Side
    labels: tuple[str, str]
    """What to call the sides."""
    sites: dict[SiteKey, Columns]
    """By SAE, what `comparison.parquet` says about its features; NaN for null."""
    summary: dict[str, Any]
    """What `comparison.json` says."""
    folder: Path
    """Where both lie."""


def compare(config: CompareConfig, say: Callable[[str], None] | None = None) -> Comparison:
    """Find the features that tell two sets of text, or two models on the same text, apart.

    Args:
        config: both sides, and how features are ranked.
        say: hears what is said while prompts are analysed; by default that goes to stderr.

    Returns:
        For each SAE a column of each statistic, one entry a feature: firing rates (0 to 1), log odds, effect sizes,
        intervals and adjusted p values, as in `comparison.parquet`; the summary; and the folder where both lie.

    >>> from sae_census import CompareConfig
    >>> sides = [{"root": root, "name": "default", "slices": (name,)} for name in ("notes", "prose")]
    >>> found = compare(CompareConfig(a=sides[0], b=sides[1], min_documents=1, out=str(folder)))
    >>> sorted(map(str, found.sites))
    ['blocks.0.hook_resid_post/early', 'blocks.1.hook_resid_post/late']

    Raises:
        UserError: if the user must change something.
    """
    a, b = _sides(config, say)
    relation = relate(a, b)
    is_drift = relation.kind == "drift"
    sums = {site: (a.sums(site), b.sums(site)) for site in relation.sites}
    sites = {
        site: contrast.columns(
            *both,
            _pairing(a, b, site, both[0]) if is_drift else None,
            confidence=config.confidence,
            min_documents=config.min_documents,
        )
        for site, both in sums.items()
    }
    contrast.add_false_discovery_rates(list(sites.values()))
    for columns in sites.values():
        contrast.add_ranks(columns, config.rank_by)
    labels = _labels(config, a, b)
    summary = {
        "kind": relation.kind,
        "labels": dict(zip("ab", labels, strict=True)),
        "a": _about(a, {site: one.counts.of for site, (one, _) in sums.items()}),
        "b": _about(b, {site: other.counts.of for site, (_, other) in sums.items()}),
        "paired": _is_paired(a, b) if is_drift else None,
        "settings": config.model_dump(mode="json", include=_SETTINGS),
        "differences": {field: list(values) for field, values in relation.indifferent.items()},
        "sites_left_out": list(relation.left_out),
        "tests": {name: sum(_num_tested(columns) for columns in sites.values()) for name in TESTED},
        "sites": {str(site): _verdict(config, columns) for site, columns in sites.items()},
        "drift": {str(site): _drift(a, b, site, sums[site], sites[site]) for site in sites} if is_drift else None,
    }
    out = LocalBlobs(config.out)
    out.put(
        "comparison.parquet",
        tables.to_bytes(tables.joined(schemas.COMPARISON, [_table(*item) for item in sites.items()])),
    )
    out.put("comparison.json", canonical(summary))
    return Comparison(a=a, b=b, labels=labels, sites=sites, summary=summary, folder=out.root)


def _sides(config: CompareConfig, say: Callable[[str], None] | None) -> tuple[Side, Side]:
    if config.prompts.a is None or config.prompts.b is None:
        return Side(config.a), Side(config.b)
    source = {"a": config.prompts.a, "b": config.prompts.b}
    corpus = config.analyze.corpus.model_copy(update={"source": source, "packing": "document"})
    catalog = analyze(config.analyze.model_copy(update={"corpus": corpus}), say).catalog
    how = SideConfig(root=config.analyze.store.root, name=config.analyze.catalog.name, snapshot=catalog.number)
    a, b = (Side(how.model_copy(update={"slices": (name,)})) for name in source)
    return a, b


def _labels(config: CompareConfig, a: Side, b: Side) -> tuple[str, str]:
    """What readers know the sides by: the files of prompts, the slices, or the catalogs."""
    files = Path(config.prompts.a or "").stem, Path(config.prompts.b or "").stem
    for first, second in (files, ("+".join(a.slices), "+".join(b.slices)), (a.name, b.name)):
        if first != second and max(len(first), len(second)) <= _LABEL:
            return first, second
    return "a", "b"


def _is_paired(a: Side, b: Side) -> bool:
    return all(side.identity.measure.codes == "keep" for side in (a, b))


def _pairing(a: Side, b: Side, site: SiteKey, sums: SiteSums) -> Pairing:
    if not _is_paired(a, b):
        return Pairing(counts=None, codes=None)
    counts, codes = pairs.products(
        a.measured(site),
        b.measured(site),
        preparation_id=a.catalog.manifest.preparation_id,
        shard_ids=a.shard_ids,
        num_features=len(sums.counts.value),
        num_positions=a.identity.measure.context_length,
    )
    return Pairing(counts=counts, codes=codes)


def _table(site: SiteKey, columns: Columns) -> tables.Table:
    num_features = len(columns["count_a"])
    key = {
        "hook_point": [str(site.hook_point)] * num_features,
        "sae": [site.sae] * num_features,
        "feature_id": np.arange(num_features),
    }
    return tables.table(schemas.COMPARISON, key | {name: tables.masked(column) for name, column in columns.items()})


def _about(side: Side, of: Mapping[SiteKey, Tokens]) -> dict[str, Any]:
    """Which text a side is, and how much of it counted."""
    tokens = {str(site.hook_point): each for site, each in of.items()}
    return {
        "catalog": side.name,
        "snapshot": side.catalog.number,
        "digest": side.catalog.digest,
        "dtype": side.identity.measure.model.dtype,
        "complete": side.catalog.manifest.coverage.complete,
        "slices": side.slices,
        "shards": len(side.shard_ids),
        "documents": {point: each.documents for point, each in tokens.items()},
        "documents_of_one_size": {point: round(1 / each.concentration, 2) for point, each in tokens.items()},
        "tokens_counted": {point: each.tokens for point, each in tokens.items()},
    }


def _num_tested(columns: Columns) -> int:
    return int((~np.isnan(columns["frequency_p"])).sum())


def _verdict(config: CompareConfig, columns: Columns) -> dict[str, Any]:
    """Numbers of features by outcome, and the best of both directions."""
    silent = columns["count_a"] + columns["count_b"] == 0
    num_tested = _num_tested(columns)
    verdict: dict[str, Any] = {
        "features": len(silent),
        "tested": num_tested,
        "not_tested": {"silent": int(silent.sum()), "few_documents": len(silent) - num_tested - int(silent.sum())},
    }
    for name in TESTED:
        found = columns[f"{name}_q"] <= config.false_discovery_rate
        more = columns[f"{name}_difference"] > 0
        verdict[name] = {"more_in_a": int((found & more).sum()), "more_in_b": int((found & ~more).sum())}
    for side in "ab":
        found = contrast.best(columns, side, config.rank_by, config.false_discovery_rate)
        verdict[f"best_{side}"] = found[: config.show].tolist()
    return verdict


def _drift(a: Side, b: Side, site: SiteKey, sums: tuple[SiteSums, SiteSums], columns: Columns) -> dict[str, Any]:
    """How far the features of one SAE have moved as a whole, and how well it still fits."""
    of_a, of_b = sums
    rankings = {"frequency": (of_a.counts.rate, of_b.counts.rate), "mean": (of_a.codes.rate, of_b.codes.rate)}
    is_whole = a.is_whole and b.is_whole
    score = a.catalog.manifest.ranking.score
    if is_whole and score == b.catalog.manifest.ranking.score:
        rankings[score] = a.scores(site), b.scores(site)
    fires_a, fires_b = of_a.counts.value > 0, of_b.counts.value > 0
    moved = columns["histogram_distance"][~np.isnan(columns["histogram_distance"])]
    return {
        "fraction_of_variance_unexplained": {
            name: side.catalog.manifest.fraction_of_variance_unexplained[str(site)] if is_whole else None
            for name, side in (("a", a), ("b", b))
        },
        "codes_a_token": {"a": float(of_a.counts.rate.sum()), "b": float(of_b.counts.rate.sum())},
        "silent_in_a_only": int((~fires_a & fires_b).sum()),
        "silent_in_b_only": int((fires_a & ~fires_b).sum()),
        "histogram_distance": {
            name: float(np.quantile(moved, q)) if len(moved) else None for name, q in (("median", 0.5), ("p95", 0.95))
        },
        "rankings": {
            name: {"rank_correlation": drift.rank_correlation(*both), "overlap": drift.overlap(*both, _OVERLAPS)}
            for name, both in rankings.items()
        },
    }
