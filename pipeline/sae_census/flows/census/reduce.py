"""The end of every census: the partials of chosen shards become a published snapshot."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from sae_census.config import AnalyzeConfig
from sae_census.flows.catalog.reader import Catalog
from sae_census.io.loading.versions import versions
from sae_census.io.store.blobs import LocalBlobs
from sae_census.records import Receipt, ShardRecord, canonical
from sae_census.steps.census import plan, publish, ranges, tree
from sae_census.steps.census.partial import RangeTask, Unit
from sae_census.steps.cluster import run_tasks
from sae_census.steps.cluster.outcomes import in_order, result_of
from sae_census.steps.model.provenance import Provenance
from sae_census.steps.store.identities import Identity
from sae_census.steps.store.manifests import (
    Coverage,
    Facts,
    Job,
    LogitFacts,
    Making,
    Ranking,
    SliceCoverage,
    SourceCoverage,
)
from sae_census.steps.store.progress import RunLog
from sae_census.types import SiteKey

More = Callable[[publish.Draft, list[RangeTask]], LogitFacts | None]
"""Adds the files of logits to a draft before the reduce and says what they mean, or adds none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What a snapshot is made of."""

    config: AnalyzeConfig
    """Says how to reduce, and where the result goes."""
    identity: Identity
    """What the catalog stands for."""
    of: str = ""
    """The catalog that they come from, as a message names it; empty: the run that is under way made them."""
    decoder_norms: Mapping[SiteKey, np.ndarray]
    """Of every SAE, in their order."""
    receipts: plan.Receipts
    """Of the same shards for every SAE."""
    sources: Sequence[SourceCoverage]
    """What the manifest says of every source."""
    missing: Sequence[str] = ()
    """Shards that should be in it and could not be analysed."""
    weights: Mapping[str, int]
    """By slice, where they differ."""
    job: Job
    """What it says of itself in the manifest."""
    unproven: Mapping[str, int] = field(default_factory=dict)
    """How many records without a seal it was made from, by kind; beside receipts."""

    @property
    def sites(self) -> tuple[SiteKey, ...]:
        """The SAEs."""
        return tuple(self.decoder_norms)

    def sorted_receipts(self) -> tuple[tuple[Receipt, ...], ...]:
        """By site, sorted by shard."""
        return tuple(tuple(found[key] for key in sorted(found)) for found in (self.receipts[s] for s in self.sites))


def reduce(chosen: Chosen, log: RunLog, more: More = lambda draft, todo: None) -> tuple[Catalog, bool]:
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
        preparation_id=chosen.identity.preparation.preparation_id,
        model=config.model,
        planned=Provenance.of_measures(chosen.identity.measure, chosen.of),
        sampling=config.sampling,
        partial_format=chosen.identity.measure.format,
        sites=chosen.sites,
        units=tuple(units),
        weights=chosen.weights,
    )
    todo = ranges.tasks([len(norms) for norms in chosen.decoder_norms.values()])
    with publish.Draft(blobs, chosen.sites, chosen.decoder_norms) as draft:
        logits = more(draft, todo)
        with log.stage("reduce", len(todo), "features") as stage:
            make = partial(ranges.Reducer, settings)
            outcomes = run_tasks(make, todo, config.cluster, on_event=log.event, stage="reduce")

            def results() -> Iterator[ranges.RangeResult]:
                for outcome in in_order(todo, outcomes):
                    stage.advance(outcome.task.num_features)
                    yield result_of(outcome, f"features {outcome.task.start} to {outcome.task.stop}")

            with blobs.writing():
                draft.write(results(), config.ranking.score, units, chosen.weights)
        facts, making = _facts(chosen, blobs, units, logits), _making(chosen, stage.seconds)
        number, _, is_new = draft.publish(config.catalog.name, facts, making)
    log.event("done", {"snapshot": number, "is_new": is_new})
    return Catalog(config.store.root, config.catalog.name, number), is_new


def _making(chosen: Chosen, seconds: float) -> Making:
    """The part of the manifest that does not belong to the content.

    Beside what the job says: what software made the shards, set by set, and the rest; how many records were believed
    without a seal.
    """
    receipts = [receipt for found in chosen.sorted_receipts() for receipt in found]
    by_versions: dict[bytes, set[str]] = {}
    for receipt in receipts:
        by_versions.setdefault(canonical(receipt.versions), set()).add(receipt.shard.shard_id)
    sets = [{**json.loads(key), "shards": len(by_versions[key])} for key in sorted(by_versions)]
    unproven = {"receipts": sum(not receipt.is_proven for receipt in receipts), **chosen.unproven}
    told = {kind: number for kind, number in unproven.items() if number}
    said = chosen.job.content()
    said |= {"made_at": time.time(), "seconds": {**chosen.job.seconds, "reduce": seconds}}
    said |= {"versions": sets, "made_with": versions()}
    return Making.model_validate(said | ({"unproven": told} if told else {}))


def _facts(chosen: Chosen, blobs: LocalBlobs, units: Sequence[Sequence[Unit]], logits: LogitFacts | None) -> Facts:
    """The part of the manifest that belongs to the content."""
    receipts = chosen.sorted_receipts()
    shards = [receipt.shard for receipt in receipts[0]]
    dropped: Counter[str] = Counter()
    for source in chosen.sources:
        dropped.update(source.records_dropped)
    num_with_bos = sum(source.documents_with_bos for source in chosen.sources)
    fits = {
        str(site): publish.merged_fit(blobs, mine, chosen.weights).unexplained()
        for site, mine in zip(chosen.sites, units, strict=True)
    }
    coverage = Coverage(
        complete=not chosen.missing,
        missing=tuple(chosen.missing),
        shards=len(shards),
        slices=_slices(shards),
        tokens=_tokens(chosen.sites, receipts),
        records_dropped=dict(sorted(dropped.items())),
        tokens_truncated=sum(source.tokens_truncated for source in chosen.sources),
        sources=tuple(sorted(chosen.sources, key=lambda source: (source.slice, source.source_id))),
    ).with_any(documents_with_bos=num_with_bos)
    facts = Facts(
        identity=chosen.identity,
        preparation_id=chosen.identity.preparation.preparation_id,
        measures=chosen.identity.measure.ids,
        ranking=Ranking(score=chosen.config.ranking.score),
        span_groups=tuple(ranges.group_names(chosen.config.sampling)),
        shards=tuple(shards),
        coverage=coverage,
        fraction_of_variance_unexplained={k: None if np.isnan(v) else v for k, v in fits.items()},
    )
    return facts.with_any(weights=dict(chosen.weights), logits=logits)


def _slices(shards: Sequence[ShardRecord]) -> dict[str, SliceCoverage]:
    slices: dict[str, Counter[str]] = {}
    for shard in shards:
        here = slices.setdefault(shard.slice, Counter())
        here.update(shards=1, contexts=shard.num_contexts, tokens=shard.num_tokens)
    return {name: SliceCoverage(**counts) for name, counts in sorted(slices.items())}


def _tokens(sites: Sequence[SiteKey], receipts: Sequence[Sequence[Receipt]]) -> dict[str, dict[str, int]]:
    """By hook point, how many tokens count, and how many each rule excluded."""
    tokens: dict[str, dict[str, int]] = {}
    for site, mine in zip(sites, receipts, strict=True):
        books: Counter[str] = Counter()
        for receipt in mine:
            books.update(receipt.tokens)
        tokens[str(site.hook_point)] = dict(books)
    return dict(sorted(tokens.items()))
