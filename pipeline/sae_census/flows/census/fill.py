"""Filling a store: every source becomes shards, and every shard a partial of each SAE that lacks one.

identify -> prepare -> preflight -> map. Every stage leaves its work in the store under names made of content, so a
run that died is resumed by running the same again.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from sae_census.config import AnalyzeConfig
from sae_census.errors import CheckpointError, SourceError
from sae_census.flows.census.identity import find_config_sources, identify
from sae_census.io.loading.versions import others
from sae_census.io.model.device import choose_device
from sae_census.io.store.blobs import LocalBlobs
from sae_census.io.text.folders import PassedOver
from sae_census.records import Failure, ShardRecord, SourceRecord, canonical
from sae_census.steps.census import plan, preflight
from sae_census.steps.census.preflight import FitProbe
from sae_census.steps.census.prepare import Preparer, PrepareSettings, choose_shards, read_settings
from sae_census.steps.census.sampling import sample_sizes
from sae_census.steps.census.session import AnalysisSession
from sae_census.steps.census.shard import Machine, ShardTask
from sae_census.steps.cluster import connected, run_tasks
from sae_census.steps.cluster.outcomes import Outcome, result_of
from sae_census.steps.model.demands import Run
from sae_census.steps.store import layout
from sae_census.steps.store.identities import MeasureRecord
from sae_census.steps.store.manifests import describe
from sae_census.steps.store.progress import RunLog, new_run

_NAMED = 10
"""Files that a line for people names; the manifest has all."""


def fill(config: AnalyzeConfig, names: Sequence[str], say: Callable[[str], None] | None = None) -> None:
    """Analyse all shards and publish nothing: whoever asks for one of these SAEs finds its partials done.

    Args:
        config: with the SAEs of all who share the model, the corpus and the settings.
        names: of the catalogs that this is for.
        say: as for `analyze`.

    Raises:
        UserError: if the user must change something.
    """
    filling = Filling(config, say)
    with filling.running("+".join(names)):
        filling.run()
        filling.log.event("done", {"snapshot": None, "is_new": False})


class Filling:
    """One run: the stages share identity, store and log."""

    def __init__(self, config: AnalyzeConfig, say: Callable[[str], None] | None):
        """Identify all that decides numbers; nothing is written yet.

        Raises:
            UserError: if parts do not belong together, or cannot be read.
        """
        self.identity = identify(config)
        self.config = config = self.identity.config
        self.blobs = LocalBlobs(config.store.root)
        self.run_id = new_run()
        self.log = RunLog(self.blobs, layout.events(self.run_id), say)
        self.seconds: dict[str, float] = {}
        self.passed_over: tuple[PassedOver, ...] = ()

    @contextmanager
    def running(self, catalog: str) -> Iterator[None]:
        """The time of the run; `sae-census status` is told of it."""
        self._describe()
        cluster = self.config.cluster
        about = {"catalog": catalog, "workers": cluster.num_workers, "address": cluster.address}
        with self.log.running(about), connected(cluster):
            yield

    def _describe(self) -> None:
        """Write what preparation and measures are, for whoever finds them."""
        config, identity = self.config, self.identity
        preparation, measures = identity.identity.preparation, identity.identity.measure
        describe(self.blobs, layout.preparation(preparation.preparation_id), preparation)
        made = {"preparation_id": preparation.preparation_id, "config": config.model_dump(mode="json")}
        for site in identity.saes:
            measure = measures.of(str(site))
            describe(
                self.blobs,
                layout.measure(measure.measure_id),
                MeasureRecord.model_validate({"fields": measure, **made}),
            )

    def run(self) -> tuple[list[SourceRecord], plan.Receipts, list[Failure]]:
        """Prepare and map: what of every source, the receipts of all whole shards, and what failed."""
        records = self._prepare()
        return records, *self._map(choose_shards(records, self.config.corpus.max_tokens))

    def _prepare(self) -> list[SourceRecord]:
        """Every source as shards, in the order of sources."""
        config = self.config
        sources, self.passed_over = find_config_sources(config)
        for one in self.passed_over:
            self.log.say(f"warning: {one}")
        settings = PrepareSettings(
            root=config.store.root,
            model=config.model,
            corpus=config.corpus,
            preparation=self.identity.identity.preparation,
            num_embeddings=self.identity.facts.num_embeddings,
            planned=self.identity.provenance,
        )
        found: dict[str, SourceRecord] = {}
        with self.log.stage("prepare", len(sources), "tokens") as stage:
            for outcome in run_tasks(
                partial(Preparer, settings), sources, config.cluster, on_event=self.log.event, stage="prepare"
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
        unused = [(record.slice, name) for record in records for name in record.files_without_use]
        if unused:
            named = ", ".join(f"{name} of slice {slice_name}" for slice_name, name in unused[:_NAMED])
            more = f" and {len(unused) - _NAMED} more" if len(unused) > _NAMED else ""
            self.log.say(f"warning: {len(unused)} files have no usable record: {named}{more}; the manifest names all")
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
            self.log.say(f"{dropped.total()} records are not used ({reasons}); they are listed in {where}")
        if brought := sum(record.num_with_bos for record in records):
            documents = f"{brought:,} of {sum(record.num_documents for record in records):,} documents"
            gets = "get a second" if self.identity.identity.preparation.format == 1 else "get no second"
            self.log.say(f"{documents} begin with a BOS of their own (a chat template writes one) and {gets}")

    def _map(self, shards: list[ShardRecord]) -> tuple[plan.Receipts, list[Failure]]:
        """The receipts of all shards that have one for every SAE, from earlier runs or this one; and what failed."""
        identity, cluster = self.identity, self.config.cluster
        receipts, left = plan.look(self.blobs, identity.measure_ids, shards)
        self._tell_plan(shards, left)
        self._tell_versions(receipts, left)
        make = partial(
            AnalysisSession,
            self.config,
            identity.preparation_id,
            identity.measure_ids,
            Machine(numerics=identity.numerics, versions=identity.versions),
            identity.identity.measure.format,
            identity.provenance,
        )
        asked = self.config.preflight != "off" and bool(left)
        outcomes: Iterator[Outcome[Any, Any]] = run_tasks(
            make,
            left,
            cluster,
            probe=preflight.probe([task.shard for task in left]) if asked else None,
            judge=self._judge,
            needs_gpu=choose_device(self.config.model.device).type == "cuda",
            on_event=self.log.event,
            describe=_about_task,
            stage="analyze",
        )
        failures = []
        with self.log.stage("analyze", len(left), "tokens") as stage:
            for outcome in outcomes:
                task: ShardTask = outcome.task
                if outcome.result is None:
                    failures.append(self._quarantine(outcome))
                else:
                    for site, receipt in zip(task.sites, outcome.result, strict=True):
                        receipts[site][task.shard.shard_id] = receipt
                        self.blobs.delete(layout.failure(receipt.measure_id, task.shard.shard_id))
                    self.log.event("shard_done", {"shard_id": task.shard.shard_id, **outcome.result[0].ran})
                stage.advance(task.shard.num_tokens)
        self.seconds["analyze"] = stage.seconds
        for failure in failures:
            for found in receipts.values():
                found.pop(failure.shard.shard_id, None)
        if failures and all(receipts.values()) and plan.lost(self.blobs, receipts):
            # a node stood for a shard that failed for another SAE, and the partials of the rest were pruned
            failed = {failure.shard.shard_id for failure in failures}
            receipts, more = self._map([shard for shard in shards if shard.shard_id not in failed])
            failures += more
        return receipts, failures

    def _tell_plan(self, shards: list[ShardRecord], left: list[ShardTask]) -> None:
        """Say what is done already, what is left, and whether there is room for it."""
        if len(left) < len(shards):
            self.log.say(f"{len(shards) - len(left)} of {len(shards)} shards are already done")
        num_features = {site: loaded.sae.num_features for site, loaded in self.identity.saes.items()}
        sizes = sample_sizes(self.config.sampling, self.identity.identity.measure.format)
        cost = plan.estimate(shards, left, sizes, num_features)
        if cost.partial_bytes > self.blobs.free_bytes():
            self.log.say(
                f"warning: the partials may need {cost.partial_bytes >> 20} MiB, and {self.blobs.root} has "
                f"{self.blobs.free_bytes() >> 20} MiB left"
            )
        tokens = {task.shard.shard_id: task.shard.num_tokens for task in left}
        intent = {"left": tokens, "measures": sorted(self.identity.measure_ids.values())}
        self.blobs.put(layout.run_plan(self.run_id), canonical(intent))
        done_tokens = sum(shard.num_tokens for shard in shards) - sum(tokens.values())
        self.log.event("plan", {"done": cost.num_done, "done_tokens": done_tokens})

    def _tell_versions(self, receipts: plan.Receipts, left: list[ShardTask]) -> None:
        """Say if what is left will be computed by other software than what is done."""
        done = {receipt.shard.shard_id: receipt for found in receipts.values() for receipt in found.values()}
        told = {key: others(receipt.versions, self.identity.versions) for key, receipt in done.items()}
        differing = sorted(set(filter(None, told.values())))
        if left and differing:
            self.log.say(
                f"this catalog grows under other versions: {sum(map(bool, told.values()))} of its {len(done)} shards "
                f"were computed under {'; '.join(differing)} here; last bits may differ, and its manifest names all"
            )

    def _judge(self, outcome: Outcome[Any, Any]) -> None:
        """Say how well the SAEs fit, and refuse if asked to."""
        if outcome.result is None:
            raise CheckpointError(f"preflight failed: {outcome.message}")
        for fit in outcome.result:
            self.log.say(f"preflight {preflight.describe(fit)}")
        found = preflight.complaints(outcome.result, self.identity.saes, self._about_run())
        if self.config.preflight == "refuse":
            preflight.refuse(found)
        for complaint in found:
            self.log.say(f"warning: {complaint.text}")

    def _about_run(self) -> Run:
        config, identity = self.config, self.identity
        given = config.corpus.source
        return Run(
            model_id=config.model.id,
            family=identity.facts.family,
            dtype=identity.identity.measure.model.dtype,
            is_centred=config.model.center_writing_weights,
            bos=identity.identity.preparation.bos,
            context_length=config.corpus.context_length,
            sources=tuple(str(one) for one in (given.values() if isinstance(given, dict) else [given])),
            special_ids=frozenset(identity.special_ids),
            special_tokens=config.masks.special_tokens,
            first_positions=config.masks.first_positions,
            positions=config.masks.positions,
        )

    def _quarantine(self, outcome: Outcome[Any, Any]) -> Failure:
        task: ShardTask = outcome.task
        failure = Failure(
            shard=task.shard,
            kind=outcome.kind,
            message=outcome.message,
            attempts=outcome.attempts,
            details=outcome.details,
        )
        for site in task.sites:
            key = layout.failure(self.identity.measure_ids[site], failure.shard.shard_id)
            self.blobs.put(key, failure.to_bytes())
        self.log.quarantined += 1
        why = {"kind": failure.kind, "message": failure.message, "attempts": failure.attempts}
        self.log.event("quarantined", {"shard_id": failure.shard.shard_id, **why})
        self.log.say(f"shard {failure.shard.shard_id} is left out: {failure.kind}: {failure.message}")
        return failure


def _about_task(task: ShardTask | FitProbe) -> dict[str, Any]:
    return {} if isinstance(task, FitProbe) else {"shard_id": task.shard.shard_id, "tokens": task.shard.num_tokens}
