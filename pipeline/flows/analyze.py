"""The main job: a model, SAEs and a corpus become a catalog.

identify -> prepare -> preflight -> map shards to partials -> reduce ranges -> publish. Every stage leaves its
work in the store under names made of content, so a run that died is resumed by running the same again.
"""

import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np

from pipeline.config import AnalyzeConfig
from pipeline.errors import CensusError, CheckpointError, SourceError
from pipeline.flows.attribute import write_logits
from pipeline.flows.catalog import Catalog
from pipeline.flows.identity import find_config_sources, identify
from pipeline.io.blobs import LocalBlobs
from pipeline.io.model import choose_device
from pipeline.records import Failure, Receipt, ShardRecord, SourceRecord, canonical
from pipeline.steps import layout, plan, preflight, publish, ranges
from pipeline.steps.cluster import connected, run_tasks
from pipeline.steps.logits import LogitSettings
from pipeline.steps.outcomes import Outcome, in_order, result_of
from pipeline.steps.partial import RangeTask
from pipeline.steps.preflight import FitProbe
from pipeline.steps.prepare import Preparer, PrepareSettings, choose_shards, read_settings
from pipeline.steps.progress import Voice
from pipeline.steps.session import AnalysisSession
from pipeline.steps.shard import sample_sizes


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


def analyze(config: AnalyzeConfig, say: Callable[[str], None] | None = None) -> Analysis:
    """Run the job.

    Args:
        config: of the job.
        say: hears every line that is meant for people; by default they go to stderr.

    Raises:
        UserError: if the user must change something; nothing that was finished is lost.
    """
    run = _Run(config, say)
    with run.voice.running(run.about()), connected(config.cluster):
        records = run.prepare()
        shards = choose_shards(records, config.corpus.max_tokens)
        receipts, failures = run.map(shards)
        return run.reduce(records, receipts, failures)


class _Run:
    """One run: the stages share identity, store and voice."""

    def __init__(self, config: AnalyzeConfig, say: Callable[[str], None] | None):
        self.config = config
        self.identity = identify(config)
        self.blobs = LocalBlobs(config.store.root)
        plan.check_claim(self.blobs, config.catalog.name, self.identity.fields)
        self.run_id = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:6]}"
        self.voice = Voice(self.blobs, layout.events(self.identity.measure_id, self.run_id), say)
        self.seconds: dict[str, float] = {}
        preparation_id, measure_id = self.identity.preparation_id, self.identity.measure_id
        self.blobs.put_if_absent(layout.preparation(preparation_id), canonical(self.identity.preparation))
        self.blobs.put_if_absent(layout.measure(measure_id), canonical(self.manifest()))

    def about(self) -> dict[str, Any]:
        """What `jobs.status` tells of a run that has just begun."""
        cluster = self.config.cluster
        return {"catalog": self.config.catalog.name, "workers": cluster.num_workers, "address": cluster.address}

    def manifest(self) -> dict[str, Any]:
        """What `jobs.verify` needs to recompute a shard."""
        return {
            "fields": self.identity.measure,
            "preparation_id": self.identity.preparation_id,
            "config": self.config.model_dump(mode="json"),
        }

    def prepare(self) -> list[SourceRecord]:
        """Every source as shards, in the order of sources."""
        config = self.config
        sources = find_config_sources(config)
        settings = PrepareSettings(
            root=config.store.root, model=config.model, corpus=config.corpus, fields=self.identity.preparation
        )
        found: dict[str, SourceRecord] = {}
        with self.voice.stage("prepare", len(sources), "tokens") as stage:
            for outcome in run_tasks(
                partial(Preparer, settings), sources, config.cluster, on_event=self.voice.event, stage="prepare"
            ):
                record = result_of(outcome, f"source {', '.join(outcome.task.names)}")
                found[record.source_id] = record
                stage.advance(sum(shard.num_tokens for shard in record.shards))
        self.seconds["prepare"] = stage.seconds
        how = read_settings(config.corpus)
        records = [found[unit.identity(how)] for unit in sources]
        self._check_records(records)
        return records

    def _check_records(self, records: list[SourceRecord]) -> None:
        dropped: Counter[str] = Counter()
        for record in records:
            dropped.update(record.dropped)
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(dropped.items()))
        where = self.blobs.path(layout.quarantine(self.identity.preparation_id, "x")).parent
        if dropped.total() > self.config.corpus.max_bad_records:
            raise SourceError(
                f"{dropped.total()} records cannot be used ({reasons}), more than corpus.max_bad_records="
                f"{self.config.corpus.max_bad_records}; they are listed in {where}: mend them or raise the bound"
            )
        if not any(record.shards for record in records):
            raise SourceError(
                f"corpus.source has no usable text: {len(records)} sources, {reasons or 'no records at all'}"
            )
        if dropped:
            self.voice.say(f"{dropped.total()} records are not used ({reasons}); they are listed in {where}")

    def map(self, shards: list[ShardRecord]) -> tuple[list[Receipt], list[Failure]]:
        """A receipt for every shard, from an earlier run or this one, sorted by shard; and what failed."""
        measure_id = self.identity.measure_id
        known = {s.shard_id: plan.find_receipt(self.blobs, measure_id, s) for s in shards}
        receipts = {shard_id: receipt for shard_id, receipt in known.items() if receipt is not None}
        left = [shard for shard in shards if shard.shard_id not in receipts]
        if receipts:
            self.voice.say(f"{len(receipts)} of {len(shards)} shards are already done")
        num_features = [loaded.sae.num_features for loaded in self.identity.saes.values()]
        cost = plan.estimate(shards, len(receipts), left, sample_sizes(self.config.sampling), num_features)
        if cost.partial_bytes > self.blobs.free_bytes():
            self.voice.say(
                f"warning: the partials may need {cost.partial_bytes >> 20} MiB, and {self.blobs.root} has "
                f"{self.blobs.free_bytes() >> 20} MiB left"
            )
        intent = {"left": {s.shard_id: s.num_tokens for s in left}}
        self.blobs.put(layout.run_plan(measure_id, self.run_id), canonical(intent))
        done_tokens = sum(receipt.shard.num_tokens for receipt in receipts.values())
        self.voice.event("plan", {"done": len(receipts), "done_tokens": done_tokens})
        make = partial(AnalysisSession, self.config, self.identity.preparation_id, measure_id, self.identity.numerics)
        asked = self.config.preflight != "off" and bool(left)
        failures = []
        probe = FitProbe(shards=_spread(left)) if asked else None
        outcomes: Iterator[Outcome[Any, Any]] = run_tasks(
            make,
            left,
            self.config.cluster,
            probe=probe,
            judge=self._judge,
            needs_gpu=choose_device(self.config.model.device).type == "cuda",
            on_event=self.voice.event,
            describe=_about_task,
            stage="analyze",
        )
        with self.voice.stage("analyze", len(left), "tokens") as stage:
            for outcome in outcomes:
                if isinstance(outcome.result, Receipt):
                    receipts[outcome.task.shard_id] = outcome.result
                    ran = outcome.result.ran
                    self.voice.event("shard_done", {"shard_id": outcome.task.shard_id, **ran})
                else:
                    failures.append(self._quarantine(outcome))
                stage.advance(outcome.task.num_tokens)
        self.seconds["analyze"] = stage.seconds
        plan.claim(self.blobs, self.config.catalog.name, self.identity.fields)
        for shard_id in receipts:
            self.blobs.delete(layout.failure(measure_id, shard_id))
        return [receipts[key] for key in sorted(receipts)], failures

    def _judge(self, outcome: Outcome[Any, Any]) -> None:
        """Say how well the SAEs fit, and refuse if asked to."""
        if outcome.result is None:
            raise CheckpointError(f"preflight failed: {outcome.message}")
        for fit in outcome.result:
            self.voice.say(f"preflight {preflight.describe(fit)}")
        bos = bool(self.identity.preparation["bos"])
        found = preflight.complaints(outcome.result, self.identity.saes, bos)
        if self.config.preflight == "refuse":
            preflight.refuse(found)
        for complaint in found:
            self.voice.say(f"warning: {complaint}")

    def _quarantine(self, outcome: Outcome[Any, Any]) -> Failure:
        failure = Failure(
            shard=outcome.task,
            kind=outcome.kind,
            message=outcome.message,
            attempts=outcome.attempts,
            details=outcome.details,
        )
        self.blobs.put(layout.failure(self.identity.measure_id, failure.shard.shard_id), failure.to_bytes())
        self.voice.quarantined += 1
        why = {"kind": failure.kind, "message": failure.message, "attempts": failure.attempts}
        self.voice.event("quarantined", {"shard_id": failure.shard.shard_id, **why})
        self.voice.say(f"shard {failure.shard.shard_id} is left out: {failure.kind}: {failure.message}")
        return failure

    def reduce(self, records: list[SourceRecord], receipts: list[Receipt], failures: list[Failure]) -> Analysis:
        """Merge the partials into a published snapshot."""
        if not receipts:
            reasons = sorted({f"{f.kind}: {f.message}" for f in failures})
            more = f" (and {len(reasons) - 3} more reasons)" if len(reasons) > 3 else ""
            raise CensusError(f"none of {len(failures)} shards could be analysed: {'; '.join(reasons[:3])}{more}")
        config, identity = self.config, self.identity
        sites = tuple(identity.saes)
        settings = ranges.ReduceSettings(
            root=config.store.root,
            preparation_id=identity.preparation_id,
            model=config.model,
            sampling=config.sampling,
            sites=sites,
            receipts=tuple(receipts),
        )
        todo = ranges.tasks([identity.saes[site].sae.num_features for site in sites])
        norms = {site: loaded.sae.decoder_norms().numpy() for site, loaded in identity.saes.items()}
        with publish.Draft(self.blobs, sites, norms) as draft:
            attributed = self._attribute(draft, todo)
            with self.voice.stage("reduce", len(todo), "features") as stage:
                outcomes = run_tasks(
                    partial(ranges.Reducer, settings), todo, config.cluster, on_event=self.voice.event, stage="reduce"
                )

                def results() -> Iterator[ranges.RangeResult]:
                    for outcome in in_order(todo, outcomes):
                        stage.advance(outcome.task.num_features)
                        yield result_of(outcome, f"features {outcome.task.start} to {outcome.task.stop}")

                with self.blobs.writing():
                    draft.write(results(), config.ranking.score, receipts)
            facts = self._facts(records, receipts, failures) | attributed
            volatile = {
                "made_at": time.time(),
                "config": config.model_dump(mode="json"),
                "numerics": identity.numerics_of(receipts),
                "seconds": self.seconds,
            }
            number, _, is_new = draft.publish(config.catalog.name, facts, volatile)
        self.seconds["reduce"] = stage.seconds
        self.voice.event("done", {"snapshot": number, "is_new": is_new})
        catalog = Catalog(config.store.root, config.catalog.name, number)
        return Analysis(catalog=catalog, is_new=is_new, failures=tuple(failures), seconds=self.seconds)

    def _attribute(self, draft: publish.Draft, todo: list[RangeTask]) -> dict[str, Any]:
        """Write the logits of all ranges to the draft, if they are wanted; facts for the manifest."""
        config = self.config
        if not config.logits.top_k:
            return {}
        threads = config.cluster.threads_per_worker
        settings = LogitSettings(model=config.model, saes=config.saes, logits=config.logits, threads=threads)
        with self.blobs.writing():
            facts, self.seconds["logits"] = write_logits(draft.folder, settings, todo, config.cluster, self.voice)
        return {"logits": facts}

    def _facts(self, records: list[SourceRecord], receipts: list[Receipt], failures: list[Failure]) -> dict[str, Any]:
        """The part of the manifest that belongs to the content."""
        config = self.config
        tokens: dict[str, Counter[str]] = {}
        slices: dict[str, Counter[str]] = {}
        for receipt in receipts:
            for point, books in receipt.tokens.items():
                tokens.setdefault(point, Counter()).update(books)
            here = slices.setdefault(receipt.shard.slice, Counter())
            here.update(
                shards=1,
                contexts=receipt.shard.num_contexts,
                tokens=receipt.shard.num_tokens,
            )
        dropped: Counter[str] = Counter()
        for record in records:
            dropped.update(record.dropped)
        fits = {
            str(site): publish.merged_fit(self.blobs, index, receipts)[1]
            for index, site in enumerate(self.identity.saes)
        }
        return {
            "identity": self.identity.fields,
            "measure_id": self.identity.measure_id,
            "preparation_id": self.identity.preparation_id,
            "ranking": config.ranking.model_dump(mode="json"),
            "span_groups": ranges.group_names(config.sampling),
            "shards": [receipt.shard.model_dump(mode="json") for receipt in receipts],
            "coverage": {
                "complete": not failures,
                "missing": [failure.shard.shard_id for failure in failures],
                "shards": len(receipts),
                "slices": {name: dict(counts) for name, counts in sorted(slices.items())},
                "tokens": {point: dict(books) for point, books in sorted(tokens.items())},
                "records_dropped": dict(sorted(dropped.items())),
                "tokens_truncated": sum(record.tokens_truncated for record in records),
                "sources": [record.names for record in records],
            },
            "fraction_of_variance_unexplained": {k: None if np.isnan(v) else v for k, v in fits.items()},
        }


def _spread(shards: list[ShardRecord]) -> tuple[ShardRecord, ...]:
    """Shards for the preflight: of every slice in turn, until they hold enough tokens."""
    by_slice: dict[str, list[ShardRecord]] = {}
    for shard in shards:
        by_slice.setdefault(shard.slice, []).append(shard)
    chosen: list[ShardRecord] = []
    for turn in zip_longest(*by_slice.values()):
        chosen += [shard for shard in turn if shard is not None]
        if sum(shard.num_tokens for shard in chosen) >= preflight.NUM_TOKENS:
            break
    return tuple(chosen)


def _about_task(task: ShardRecord | FitProbe) -> dict[str, Any]:
    return {"shard_id": task.shard_id, "tokens": task.num_tokens} if isinstance(task, ShardRecord) else {}
