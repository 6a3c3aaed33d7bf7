"""The main job: a model, SAEs and a corpus become a catalog.

Fill the store with partials -> reduce ranges of features -> publish -> write the report, if it is wanted.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from sae_census.compute.census import masks
from sae_census.config import AnalyzeConfig, ReportConfig
from sae_census.errors import CensusError
from sae_census.flows.catalog.attribute import write_logits
from sae_census.flows.catalog.reader import Catalog
from sae_census.flows.catalog.report import Report, write_report
from sae_census.flows.census.fill import Filling
from sae_census.flows.census.reduce import Chosen, reduce
from sae_census.records import Failure, SourceRecord
from sae_census.steps.census import claims, plan, publish
from sae_census.steps.census.logits import LogitSettings
from sae_census.steps.census.partial import RangeTask
from sae_census.steps.store import seals
from sae_census.steps.store.manifests import Job, LogitFacts, SourceCoverage


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """What a run of the job gave."""

    catalog: Catalog
    is_new: bool
    """False if the catalog already said the same."""
    failures: tuple[Failure, ...]
    """Shards that are not in it."""
    seconds: dict[str, float]
    """By stage."""
    report: Report | None
    """If it was asked for."""


def analyze(config: AnalyzeConfig, say: Callable[[str], None] | None = None) -> Analysis:
    """Count, measure and sample every feature of the SAEs over the corpus, and publish a snapshot of the catalog.

    Shards that the store already holds are not analysed again.

    Args:
        config: model, SAEs, corpus, samples, store and workers.
        say: hears every line that is meant for people; by default they go to stderr.

    Returns:
        The published snapshot as a `Catalog`, whether it says anything new, the shards that failed, and seconds by
        stage.

    >>> done = analyze(config, say=lambda line: None)
    >>> done.catalog.saes, done.is_new, done.failures
    (['blocks.1.hook_resid_post/late'], True, ())

    Raises:
        UserError: if the user must change something; nothing that was finished is lost.
    """
    filling = Filling(config, say)
    claims.check_claim(filling.blobs, config.catalog.name, filling.identity.identity)
    with filling.running(config.catalog.name):
        records, receipts, failures = filling.run()
        claims.claim(filling.blobs, config.catalog.name, filling.identity.identity)
        analysis = _publish(filling, records, receipts, failures)
        _seal(filling)
        return analysis


def _publish(
    filling: Filling, records: list[SourceRecord], receipts: plan.Receipts, failures: list[Failure]
) -> Analysis:
    """Merge the partials into a published snapshot."""
    if not all(receipts.values()):
        reasons = sorted({f"{f.kind}: {f.message}" for f in failures})
        more = f" (and {len(reasons) - 3} more reasons)" if len(reasons) > 3 else ""
        raise CensusError(f"none of {len(failures)} shards could be analysed: {'; '.join(reasons[:3])}{more}")
    config, identity = filling.config, filling.identity
    chosen = Chosen(
        config=config,
        identity=identity.identity,
        decoder_norms={site: loaded.sae.decoder_norms().numpy() for site, loaded in identity.saes.items()},
        receipts=receipts,
        sources=[_about_source(record) for record in records],
        missing=[failure.shard.shard_id for failure in failures],
        weights={},
        unproven={"sources": sum(not record.is_proven for record in records)},
        job=Job(
            config=config.model_dump(mode="json"),
            numerics=identity.numerics_of(each for found in receipts.values() for each in found.values()),
            seconds=filling.seconds,
            passed_over=tuple(asdict(one) for one in filling.passed_over),
            units={str(site): str(loaded.unit) for site, loaded in identity.saes.items()},
        ),
    )
    began = time.monotonic()
    catalog, is_new = reduce(chosen, filling.log, lambda draft, todo: _attribute(filling, draft, todo))
    filling.seconds["reduce"] = time.monotonic() - began - filling.seconds.get("logits", 0)
    for point, books in catalog.manifest.coverage.tokens.items():
        if sentence := masks.many_sinks(books):
            filling.log.say(f"warning: {point}: {sentence}")
    return Analysis(
        catalog=catalog,
        is_new=is_new,
        failures=tuple(failures),
        seconds=filling.seconds,
        report=_report(filling, catalog) if config.report else None,
    )


def _seal(filling: Filling) -> None:
    """Give a seal to what was written before records had one, and say so."""
    blobs, identity = filling.blobs, filling.identity
    keys = [*seals.keys_of_corpora(blobs, identity.preparation_id)]
    for measure_id in sorted(set(identity.measure_ids.values())):
        keys += seals.keys_of_measures(blobs, measure_id)
    found = seals.seal(blobs, [*keys, *seals.keys_of_catalogs(blobs, filling.config.catalog.name)])
    if found:
        told = ", ".join(f"{number} {kind}" for kind, number in sorted(found.items()))
        filling.log.say(
            f"{told} were written before records carried a digest of their own: they were read as they are, and have "
            "one now"
        )


def _report(filling: Filling, catalog: Catalog) -> Report:
    config = filling.config
    wanted = ReportConfig(store=config.store, catalog=config.catalog, snapshot=catalog.number)
    found = write_report(wanted, filling.log.say)
    filling.seconds["report"] = found.seconds
    return found


def _attribute(filling: Filling, draft: publish.Draft, todo: list[RangeTask]) -> LogitFacts | None:
    """Write the logits of all ranges to the draft, if they are wanted, and say what they mean."""
    config = filling.config
    if not config.logits.top_k:
        return None
    threads = config.cluster.threads_per_worker
    settings = LogitSettings(
        model=config.model,
        saes=config.saes,
        logits=config.logits,
        threads=threads,
        planned=filling.identity.provenance,
    )
    with filling.blobs.writing():
        written = write_logits(draft.folder, settings, todo, config.cluster, filling.log)
    facts, filling.seconds["logits"] = written
    return facts


def _about_source(record: SourceRecord) -> SourceCoverage:
    """What a manifest says of a source."""
    found = SourceCoverage(
        source_id=record.source_id,
        slice=record.slice,
        names=record.names,
        shards=tuple(shard.shard_id for shard in record.shards),
        records_dropped=record.dropped,
        tokens_truncated=record.tokens_truncated,
    )
    return found.with_any(documents_with_bos=record.num_with_bos, unused_files=record.files_without_use)
