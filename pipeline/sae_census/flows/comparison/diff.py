"""What changed between two snapshots of a catalog: which features appeared, died and moved, and how surely.

Whether a feature moved is asked of the text that the snapshots do not share, against what stood there before: one
text against another, with the statistics of `sae-census compare`, so that growth alone moves nothing.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from sae_census.compute.comparison import Tokens
from sae_census.compute.numbers import drift
from sae_census.compute.numbers.documents import DocumentStats
from sae_census.compute.numbers.stats import FeatureStats
from sae_census.config import SnapshotsConfig
from sae_census.errors import ConfigError
from sae_census.flows.catalog.reader import Catalog
from sae_census.io.store import schemas, tables
from sae_census.io.store.blobs import LocalBlobs
from sae_census.records import Receipt, canonical
from sae_census.steps.census import publish, ranges, tree
from sae_census.steps.census.partial import opened
from sae_census.steps.comparison import contrast
from sae_census.steps.comparison.contrast import Columns, SiteSums
from sae_census.steps.store import layout
from sae_census.types import SiteKey

CHANGES = ("appeared", "died", "moved", "same", "dead")
_OVERLAPS = (10, 100, 1000)
_OF_SNAPSHOTS = ("rank", "score", "frequency", "mean")


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What the job gave."""

    old: Catalog
    new: Catalog
    sites: dict[SiteKey, Columns]
    """By SAE, what `diff.parquet` says about its features; NaN for null."""
    summary: dict[str, Any]
    """What `diff.json` says."""
    folder: Path
    """Where both lie."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Texts:
    """The shards that are tested against each other."""

    kind: str
    """grown, shrunk, exchanged: text came, went, or both; same: neither."""
    before: frozenset[str]
    after: frozenset[str]


def diff(config: SnapshotsConfig) -> Difference:
    """Tell which features appeared, died and moved between two snapshots of a catalog.

    Args:
        config: with `action=diff`.

    Returns:
        Both snapshots; for each SAE what changed, a column of each statistic; and the folder where the files lie.

    Raises:
        ConfigError: if there are no two snapshots, or partials of what only one of them has are gone.
        CorruptError: if a partial is damaged.
    """
    old, new = _snapshots(config)
    texts = _texts(*({shard.shard_id for shard in one.manifest.shards} for one in (old, new)))
    blobs = LocalBlobs(config.store.root)
    ids = new.measure.ids
    sites: dict[SiteKey, Columns] = {}
    for name in new.saes:
        site = SiteKey.parse(name)
        columns = _of_snapshots(old, new, site)
        if texts.kind != "same":
            num_features = len(columns["rank_old"])
            before, after = (_sums(blobs, ids[name], keys, num_features) for keys in (texts.before, texts.after))
            columns |= contrast.columns(
                after, before, None, confidence=config.confidence, min_documents=config.min_documents
            )
        sites[site] = columns
    if texts.kind != "same":
        contrast.add_false_discovery_rates(list(sites.values()))
        for columns in sites.values():
            contrast.add_ranks(columns, config.rank_by)
    for columns in sites.values():
        columns["change"] = _changes(columns, config.false_discovery_rate)
    summary = {
        "catalog": config.catalog.name,
        "old": _about(old),
        "new": _about(new),
        "texts": {"kind": texts.kind, "before": len(texts.before), "after": len(texts.after)},
        "settings": config.model_dump(
            mode="json", include={"min_documents", "confidence", "false_discovery_rate", "rank_by"}
        ),
        "sites": {str(site): _verdict(config, old, new, site, columns) for site, columns in sites.items()},
    }
    out = LocalBlobs(config.out)
    found = tables.joined(schemas.DIFF, [_table(*item) for item in sites.items()])
    out.put("diff.parquet", tables.to_bytes(found))
    out.put("diff.json", canonical(summary))
    return Difference(old=old, new=new, sites=sites, summary=summary, folder=out.root)


def _snapshots(config: SnapshotsConfig) -> tuple[Catalog, Catalog]:
    name = config.catalog.name
    new = Catalog(config.store.root, name, config.snapshot)
    numbers = publish.snapshots(LocalBlobs(config.store.root), name)
    earlier = [number for number in numbers if number < new.number]
    if config.against is None and not earlier:
        raise ConfigError(f"catalog {name!r} has no snapshot before {new.number}; it has {numbers}")
    return Catalog(config.store.root, name, config.against or earlier[-1]), new


def _texts(old: set[str], new: set[str]) -> _Texts:
    came, went = frozenset(new - old), frozenset(old - new)
    if came and went:
        return _Texts(kind="exchanged", before=went, after=came)
    if came:
        return _Texts(kind="grown", before=frozenset(old), after=came)
    if went:
        return _Texts(kind="shrunk", before=went, after=frozenset(new))
    return _Texts(kind="same", before=frozenset(old), after=frozenset(new))


def _of_snapshots(old: Catalog, new: Catalog, site: SiteKey) -> Columns:
    """What the two snapshots say themselves."""
    columns: Columns = {}
    for when, catalog in (("old", old), ("new", new)):
        rows = catalog.of_sae(str(site.hook_point), site.sae)
        columns |= {f"{name}_{when}": np.asarray(rows[name]) for name in _OF_SNAPSHOTS}
        columns[f"dead_{when}"] = np.asarray(rows["dead"])
    return columns


def _sums(blobs: LocalBlobs, measure_id: str, shard_ids: Iterable[str], num_features: int) -> SiteSums:
    """Sums over the documents of some shards."""
    keys = [layout.receipt(measure_id, shard_id) for shard_id in sorted(shard_ids)]
    receipts = [Receipt.read(blobs.get(key), key) for key in keys]
    units = tree.units(tree.Nodes(blobs, measure_id), receipts)
    tree.check_there(blobs, units)
    parts: list[dict[str, np.ndarray]] = []
    for task in ranges.tasks([num_features]):
        stats, documents = [], []
        for unit in units:
            with opened(blobs, unit, task) as partial:
                stats.append(partial.stats())
                documents.append(partial.documents())
        whole = reduce(FeatureStats.merge, stats).arrays()
        parts.append(whole | reduce(DocumentStats.merge, documents).arrays())
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    of = Tokens(
        documents=sum(receipt.documents["counted"] for receipt in receipts),
        tokens=sum(receipt.tokens["counted"] for receipt in receipts),
        square=float(sum(receipt.documents["tokens_square"] for receipt in receipts)),
    )
    if not of.tokens:
        raise ConfigError(f"{len(receipts)} shards that one snapshot has and the other has not hold no counted token")
    return contrast.site_sums(of, arrays, arrays["histogram"])


def _changes(columns: Columns, rate: float) -> np.ndarray:
    """One word for every feature."""
    fires_old, fires_new = ~columns["dead_old"], ~columns["dead_new"]
    moved = np.zeros(len(fires_old), bool)
    for name in contrast.TESTED:
        moved |= columns.get(f"{name}_q", np.full(len(moved), np.nan)) <= rate
    cases = [fires_new & ~fires_old, fires_old & ~fires_new, moved, fires_old]
    return np.select(cases, CHANGES[:4], default=CHANGES[4])


def _about(catalog: Catalog) -> dict[str, Any]:
    coverage = catalog.manifest.coverage
    return {
        "snapshot": catalog.number,
        "digest": catalog.digest,
        "complete": coverage.complete,
        "shards": coverage.shards,
        "tokens": {name: facts.tokens for name, facts in coverage.slices.items()},
        "weights": catalog.manifest.weights,
    }


def _verdict(config: SnapshotsConfig, old: Catalog, new: Catalog, site: SiteKey, columns: Columns) -> dict[str, Any]:
    """Numbers of features by change, the surest of both directions, and how far the ranking moved."""
    scores = columns["score_old"], columns["score_new"]
    tested = columns.get("frequency_p", np.full(len(scores[0]), np.nan))
    best: Mapping[str, Any] = {"more": [], "less": []}
    if "rank_a" in columns:
        best = {
            word: contrast.best(columns, side, config.rank_by, config.false_discovery_rate)[: config.show].tolist()
            for word, side in (("more", "a"), ("less", "b"))
        }
    return {
        "changes": {word: int((columns["change"] == word).sum()) for word in CHANGES},
        "tested": int((~np.isnan(tested)).sum()),
        **best,
        "ranking": old.manifest.ranking.score,
        "rank_correlation": drift.rank_correlation(*scores),
        "overlap": drift.overlap(*scores, _OVERLAPS),
        "fraction_of_variance_unexplained": {
            when: one.manifest.fraction_of_variance_unexplained[str(site)] for when, one in (("old", old), ("new", new))
        },
    }


def _table(site: SiteKey, columns: Columns) -> tables.Table:
    num_features = len(columns["change"])
    key = {
        "hook_point": [str(site.hook_point)] * num_features,
        "sae": [site.sae] * num_features,
        "feature_id": np.arange(num_features),
    }
    absent = np.full(num_features, np.nan)
    given = {field.name: columns.get(field.name, absent) for field in schemas.DIFF if field.name not in key}
    plain = ("change", "dead_old", "dead_new")
    return tables.table(
        schemas.DIFF, key | {name: c if name in plain else tables.masked(c) for name, c in given.items()}
    )
