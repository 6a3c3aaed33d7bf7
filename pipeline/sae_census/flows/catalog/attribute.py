"""Attribute logits to the features of SAEs: into a folder, or as a new snapshot of the catalog they belong to.

A published snapshot never changes. The new one takes over its files, proved by their digests, adds the two
tables, and equals what `sae-census analyze` publishes under the same `logits` keys.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sae_census.config import AttributeConfig, ClusterConfig, ModelConfig
from sae_census.config.sections import EMBEDDED_SAES
from sae_census.errors import CensusError, ConfigError
from sae_census.flows.catalog.reader import Catalog
from sae_census.io.model.device import choose_device, choose_dtype
from sae_census.io.model.hooks import check_point
from sae_census.io.store.blobs import LocalBlobs
from sae_census.steps.census import publish, ranges
from sae_census.steps.census.logits import (
    LOGITS,
    MOMENTS,
    LogitResult,
    LogitSettings,
    LogitWorker,
    check_request,
    write_tables,
)
from sae_census.steps.census.partial import RangeTask
from sae_census.steps.cluster import run_tasks
from sae_census.steps.cluster.outcomes import in_order, result_of
from sae_census.steps.model.parts import facts_of, tokenizer_of
from sae_census.steps.model.provenance import Provenance
from sae_census.steps.model.reader import load_saes
from sae_census.steps.store import layout
from sae_census.steps.store.identities import MeasuredModel
from sae_census.steps.store.manifests import AttributionRecord, LogitFacts, Making
from sae_census.steps.store.progress import RunLog, new_run


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribution:
    """What a run of the job gave."""

    folder: Path
    """Where `logits.parquet` and `logit_moments.parquet` lie, beside a manifest."""
    is_new: bool
    """False if the catalog already said the same."""
    dtype: str
    """Of the model's weights: the unembedding, and the norm before it."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What decides the logits, and the work."""

    model: MeasuredModel
    digests: dict[str, str]
    """Of the SAEs, by site."""
    ranges: list[RangeTask]
    """Of features, in the order of sites."""


def write_logits(
    folder: Path, settings: LogitSettings, todo: list[RangeTask], cluster: ClusterConfig, log: RunLog
) -> tuple[LogitFacts, float]:
    """Attribute all ranges and write the tables; what they mean, and seconds.

    Args:
        folder: gets the tables.
        settings: of the workers.
        todo: ranges in the order of sites and features.
        cluster: who does the work.
        log: of the run.
    """
    outcomes = run_tasks(
        partial(LogitWorker, settings),
        todo,
        cluster,
        needs_gpu=choose_device(settings.model.device).type == "cuda",
        on_event=log.event,
    )
    with log.stage("logits", len(todo), "features") as stage:

        def results() -> Iterator[LogitResult]:
            for outcome in in_order(todo, outcomes):
                stage.advance(outcome.task.num_features)
                yield result_of(outcome, f"logits of features {outcome.task.start} to {outcome.task.stop}")

        facts = write_tables(folder, results(), settings.logits)
    return facts, stage.seconds


def attribute(config: AttributeConfig, say: Callable[[str], None] | None = None) -> Attribution:
    """Write the tokens that every feature promotes and suppresses most, by the direct path to the logits.

    Args:
        config: model, SAEs, number of tokens, and the catalog or folder.
        say: hears every line that is meant for people; by default they go to stderr.

    Returns:
        Where the tables were written, a folder or a new snapshot of a catalog, and what they hold.

    Raises:
        UserError: if the user must change something.
    """
    return _to_folder(config, say) if config.catalog.name is None else _to_catalog(config, config.catalog.name, say)


def _to_folder(config: AttributeConfig, say: Callable[[str], None] | None) -> Attribution:
    blobs = LocalBlobs(config.out or Path(config.store.root) / "logits")
    parts = _identify(config)
    with publish.Draft(blobs, (), {}) as draft:
        log = RunLog(blobs, "events.jsonl", say)
        with blobs.writing():
            facts, seconds = write_logits(draft.folder, _settings(config, parts), parts.ranges, config.cluster, log)
        files = publish.digests(draft.folder)
        blobs.delete("manifest.json")
        blobs.sync()
        for name in files:
            blobs.adopt(name, draft.folder / name)
        record = AttributionRecord(files=files, model=parts.model, saes=parts.digests, logits=facts)
        blobs.put("manifest.json", record.to_bytes())
    return Attribution(folder=blobs.root, is_new=True, dtype=parts.model.dtype, seconds=seconds)


def _to_catalog(config: AttributeConfig, name: str, say: Callable[[str], None] | None) -> Attribution:
    blobs, old = LocalBlobs(config.store.root), Catalog(config.store.root, name)
    config = _with_parts_of(old, config)
    parts = _identify(config, old.provenance)
    kept = {file: facts for file, facts in old.manifest.files.items() if file not in (LOGITS, MOMENTS)}
    with publish.Draft(blobs, (), {}) as draft:
        draft.copy(old.folder, kept)
        log = RunLog(blobs, layout.events(new_run()), say)
        with blobs.writing():
            facts, seconds = write_logits(draft.folder, _settings(config, parts), parts.ranges, config.cluster, log)
        if publish.snapshots(blobs, name)[-1] != old.number:
            raise CensusError(f"catalog {name!r} has got a new snapshot meanwhile; run the same command again")
        said = {field: value for field, value in old.manifest.making.content().items() if field != "built_from"}
        making = Making.model_validate(
            said
            | {
                "made_at": time.time(),
                "config": old.manifest.config | {"logits": config.logits.model_dump(mode="json")},
                "units": old.units,
                "seconds": old.manifest.seconds | {"logits": seconds},
                "passed_over": old.manifest.passed_over,
            }
        )
        number, _, is_new = draft.publish(name, old.manifest.facts.model_copy(update={"logits": facts}), making)
    folder = publish.folder_of(blobs, name, number)
    return Attribution(folder=folder, is_new=is_new, dtype=parts.model.dtype, seconds=seconds)


def _settings(config: AttributeConfig, parts: _Parts) -> LogitSettings:
    return LogitSettings(
        model=config.model,
        saes=config.saes,
        logits=config.logits,
        threads=config.cluster.threads_per_worker,
        planned=Provenance(model=parts.model.digest, tokenizer=parts.model.tokenizer, saes=parts.digests),
    )


def _with_parts_of(catalog: Catalog, config: AttributeConfig) -> AttributeConfig:
    """The config with the catalog's own model and SAEs where it names none.

    The dtype is the catalog's. Device and trust are never read from a catalog.

    Raises:
        ConfigError: if it asks for another dtype.
    """
    made = catalog.config
    dtype = catalog.measure.model.dtype
    asked = config.model
    if asked.dtype not in ("auto", dtype):
        raise ConfigError(f"model.dtype is {asked.dtype}, but the catalog was made in {dtype}; leave model.dtype out")
    model = made.model if asked.id == ModelConfig().id else asked
    mine = {"dtype": dtype, "device": asked.device, "trust_remote_code": asked.trust_remote_code}
    saes = made.saes if config.saes == EMBEDDED_SAES else config.saes
    return config.model_copy(update={"model": model.model_copy(update=mine), "saes": saes})


def _identify(config: AttributeConfig, made_with: Provenance | None = None) -> _Parts:
    """What decides the logits, checked before any work.

    Args:
        config: of the job.
        made_with: the parts of the catalog that the logits are for.

    Raises:
        UserError: if model and SAEs do not belong together, cannot be read, or are not the catalog's.
    """
    model = config.model
    facts, tokenizer = facts_of(model), tokenizer_of(model)
    saes = load_saes(config.saes)
    for key in saes:
        check_point(key.hook_point, facts.taps, facts.num_layers)
    check_request(config.logits, (key.hook_point for key in saes), tokenizer)
    dtype = str(choose_dtype(model.dtype, choose_device(model.device))).removeprefix("torch.")
    if made_with is not None:
        made_with.prove(model.id, facts.digest, tokenizer, saes)
    known = tokenizer.digest if made_with is None else made_with.tokenizer
    return _Parts(
        model=MeasuredModel(digest=facts.digest, family=facts.family, dtype=dtype, tokenizer=known),
        digests={str(key): loaded.digest for key, loaded in saes.items()},
        ranges=ranges.tasks([loaded.sae.num_features for loaded in saes.values()]),
    )
