"""The end of every census: the partials of chosen shards become a published snapshot."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from sae_census.config import AnalyzeConfig
from sae_census.flows.catalog.reader import Catalog
from sae_census.io.loading.versions import versions
from sae_census.io.store.blobs import LocalBlobs
from sae_census.records import Receipt, ShardRecord, canonical, digest_of
from sae_census.steps.census import plan, publish, ranges, tree
from sae_census.steps.census.partial import RangeTask, Unit
from sae_census.steps.cluster import run_tasks
from sae_census.steps.cluster.outcomes import in_order, result_of
from sae_census.steps.model.parts import Provenance
from sae_census.steps.store.progress import RunLog
from sae_census.types import SiteKey

More = Callable[[publish.Draft, list[RangeTask]], dict[str, Any]]
"""Adds files to a draft before the reduce; returns facts for the manifest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What a snapshot is made of."""

    config: AnalyzeConfig
    """Says how to reduce, and where the result goes."""
    identity: Mapping[str, Any]
    """The fields of preparation and measure that the catalog stands for."""
    of: str = ""
    """The catalog that they come from, as a message names it; empty: the run that is under way made them."""
    decoder_norms: Mapping[SiteKey, np.ndarray]
    """Of every SAE, in their order."""
    receipts: plan.Receipts
    """Of the same shards for every SAE."""
    sources: Sequence[Mapping[str, Any]]
    """What the manifest says of every source: its id, slice, names, shards, records dropped, tokens truncated, and
    documents with a BOS of their own."""
    missing: Sequence[str] = ()
    """Shards that should be in it and could not be analysed."""
    weights: Mapping[str, int]
    """By slice, where they differ."""
    volatile: Mapping[str, Any]
    """For the manifest, beside the content."""
    unproven: Mapping[str, int] = field(default_factory=dict)
    """How many records without a seal it was made from, by kind; beside receipts."""

    @property
    def sites(self) -> tuple[SiteKey, ...]:
        """The SAEs."""
        return tuple(self.decoder_norms)

    def sorted_receipts(self) -> tuple[tuple[Receipt, ...], ...]:
        """By site, sorted by shard."""
        return tuple(tuple(found[key] for key in sorted(found)) for found in (self.receipts[s] for s in self.sites))


def reduce(chosen: Chosen, log: RunLog, more: More = lambda draft, todo: {}) -> tuple[Catalog, bool]:
    """Merge the chosen shards and publish them, unless the newest snapshot says the same.

    Nodes that stand for chosen shards alone are read in place of their partials; the result is the same to the bit.

    Args:
        chosen: at least one shard.
        log: of the run.
        more: adds to the snapshot.

    Returns:
        The snapshot, and whether it is new.

    Raises:
        ConfigError: if partials were pruned, and no node stands for chosen shards alone.
        CorruptError: if the books of the merged statistics do not balance.
    """
    config, blobs, receipts = chosen.config, LocalBlobs(chosen.config.store.root), chosen.sorted_receipts()
    units = []
    for site, mine in zip(chosen.sites, receipts, strict=True):
        nodes = tree.Nodes(blobs, mine[0].measure_id)
        units.append(tree.units(nodes, mine))
        tree.check_there(blobs, units[-1])
        for node in nodes.damaged:
            log.say(f"warning: node {node.node_id} of {site} is damaged: it is not used; compact the catalog again")
    settings = ranges.ReduceSettings(
        root=config.store.root,
        preparation_id=digest_of(chosen.identity["preparation"]),
        model=config.model,
        planned=Provenance.of_measure(chosen.identity["measure"], chosen.of),
        sampling=config.sampling,
        partial_format=chosen.identity["measure"]["format"],
        sites=chosen.sites,
        units=tuple(units),
        weights=chosen.weights,
    )
    todo = ranges.tasks([len(norms) for norms in chosen.decoder_norms.values()])
    with publish.Draft(blobs, chosen.sites, chosen.decoder_norms) as draft:
        added = more(draft, todo)
        with log.stage("reduce", len(todo), "features") as stage:
            make = partial(ranges.Reducer, settings)
            outcomes = run_tasks(make, todo, config.cluster, on_event=log.event, stage="reduce")

            def results() -> Iterator[ranges.RangeResult]:
                for outcome in in_order(todo, outcomes):
                    stage.advance(outcome.task.num_features)
                    yield result_of(outcome, f"features {outcome.task.start} to {outcome.task.stop}")

            with blobs.writing():
                draft.write(results(), config.ranking.score, units, chosen.weights)
        volatile = {**chosen.volatile, **_origin(chosen), "made_at": time.time()}
        volatile["seconds"] = {**chosen.volatile["seconds"], "reduce": stage.seconds}
        number, _, is_new = draft.publish(config.catalog.name, _facts(chosen, blobs, units) | added, volatile)
    log.event("done", {"snapshot": number, "is_new": is_new})
    return Catalog(config.store.root, config.catalog.name, number), is_new


def _origin(chosen: Chosen) -> dict[str, Any]:
    """What software made the shards, set by set, and the rest; how many records were believed without a seal."""
    receipts = [receipt for found in chosen.sorted_receipts() for receipt in found]
    by_versions: dict[bytes, set[str]] = {}
    for receipt in receipts:
        by_versions.setdefault(canonical(receipt.versions), set()).add(receipt.shard.shard_id)
    sets = [{**json.loads(key), "shards": len(by_versions[key])} for key in sorted(by_versions)]
    unproven = {"receipts": sum(not receipt.is_proven for receipt in receipts), **chosen.unproven}
    told = {kind: number for kind, number in unproven.items() if number}
    return {"versions": sets, "made_with": versions()} | ({"unproven": told} if told else {})


def _facts(chosen: Chosen, blobs: LocalBlobs, units: Sequence[Sequence[Unit]]) -> dict[str, Any]:
    """The part of the manifest that belongs to the content."""
    receipts = chosen.sorted_receipts()
    shards = [receipt.shard for receipt in receipts[0]]
    dropped: Counter[str] = Counter()
    for source in chosen.sources:
        dropped.update(source["records_dropped"])
    num_with_bos = sum(source.get("documents_with_bos", 0) for source in chosen.sources)
    fits = {
        str(site): publish.merged_fit(blobs, mine, chosen.weights).unexplained()
        for site, mine in zip(chosen.sites, units, strict=True)
    }
    facts = {
        "identity": chosen.identity,
        "preparation_id": digest_of(chosen.identity["preparation"]),
        "measures": plan.measure_ids(chosen.identity["measure"]),
        "ranking": chosen.config.ranking.model_dump(mode="json"),
        "span_groups": ranges.group_names(chosen.config.sampling),
        "shards": [shard.model_dump(mode="json") for shard in shards],
        "coverage": {
            "complete": not chosen.missing,
            "missing": list(chosen.missing),
            "shards": len(shards),
            "slices": _slices(shards),
            "tokens": _tokens(chosen.sites, receipts),
            "records_dropped": dict(sorted(dropped.items())),
            "tokens_truncated": sum(source["tokens_truncated"] for source in chosen.sources),
            **({"documents_with_bos": num_with_bos} if num_with_bos else {}),
            "sources": sorted(chosen.sources, key=lambda source: (source["slice"], source["source_id"])),
        },
        "fraction_of_variance_unexplained": {k: None if np.isnan(v) else v for k, v in fits.items()},
    }
    return facts | ({"weights": dict(chosen.weights)} if chosen.weights else {})


def _slices(shards: Sequence[ShardRecord]) -> dict[str, dict[str, int]]:
    slices: dict[str, Counter[str]] = {}
    for shard in shards:
        here = slices.setdefault(shard.slice, Counter())
        here.update(shards=1, contexts=shard.num_contexts, tokens=shard.num_tokens)
    return {name: dict(counts) for name, counts in sorted(slices.items())}


def _tokens(sites: Sequence[SiteKey], receipts: Sequence[Sequence[Receipt]]) -> dict[str, dict[str, int]]:
    """By hook point, how many tokens count, and how many each rule excluded."""
    tokens: dict[str, dict[str, int]] = {}
    for site, mine in zip(sites, receipts, strict=True):
        books: Counter[str] = Counter()
        for receipt in mine:
            books.update(receipt.tokens)
        tokens[str(site.hook_point)] = dict(books)
    return dict(sorted(tokens.items()))
