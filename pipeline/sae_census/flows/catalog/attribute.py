"""Attribute logits to the features of SAEs: into a folder, or as a new snapshot of the catalog they belong to.

A published snapshot never changes. The new one takes over its files, proved by their digests, adds the two
tables, and equals what `sae-census analyze` publishes under the same `logits` keys.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sae_census.config import AnalyzeConfig, AttributeConfig, ClusterConfig, ModelConfig
from sae_census.config.sections import EMBEDDED_SAES
from sae_census.errors import CensusError, ConfigError, IdentityError
from sae_census.flows.catalog.reader import Catalog
from sae_census.io.model.device import choose_device, choose_dtype
from sae_census.io.model.hooks import check_point
from sae_census.io.store.blobs import LocalBlobs
from sae_census.records import sealed
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
from sae_census.steps.model.parts import Provenance, facts_of, tokenizer_of
from sae_census.steps.model.reader import load_saes
from sae_census.steps.store import layout, manifests
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


def write_logits(
    folder: Path, settings: LogitSettings, todo: list[RangeTask], cluster: ClusterConfig, log: RunLog
) -> tuple[dict[str, Any], float]:
    """Attribute all ranges and write the tables; facts for the manifest, and seconds.

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
    """Run the job.

    Args:
        config: of the job.
        say: hears every line that is meant for people; by default they go to stderr.

    Raises:
        UserError: if the user must change something.
    """
    return _to_folder(config, say) if config.catalog.name is None else _to_catalog(config, config.catalog.name, say)


def _to_folder(config: AttributeConfig, say: Callable[[str], None] | None) -> Attribution:
    blobs = LocalBlobs(config.out or Path(config.store.root) / "logits")
    about, todo = _identify(config, None)
    with publish.Draft(blobs, (), {}) as draft:
        log = RunLog(blobs, "events.jsonl", say)
        with blobs.writing():
            facts, seconds = write_logits(draft.folder, _settings(config, about), todo, config.cluster, log)
        files = publish.digests(draft.folder)
        blobs.delete("manifest.json")
        blobs.sync()
        for name in files:
            blobs.adopt(name, draft.folder / name)
        blobs.put("manifest.json", sealed({"files": files, **about, "logits": facts}))
    return Attribution(folder=blobs.root, is_new=True, dtype=about["model"]["dtype"], seconds=seconds)


def _to_catalog(config: AttributeConfig, name: str, say: Callable[[str], None] | None) -> Attribution:
    blobs, old = LocalBlobs(config.store.root), Catalog(config.store.root, name)
    config = _with_parts_of(old, config)
    about, todo = _identify(config, old.measure["model"].get("tokenizer"))
    _prove(about, old)
    kept = {file: facts for file, facts in old.manifest["files"].items() if file not in (LOGITS, MOMENTS)}
    with publish.Draft(blobs, (), {}) as draft:
        draft.copy(old.folder, kept)
        log = RunLog(blobs, layout.events(new_run()), say)
        with blobs.writing():
            facts, seconds = write_logits(draft.folder, _settings(config, about), todo, config.cluster, log)
        if publish.snapshots(blobs, name)[-1] != old.number:
            raise CensusError(f"catalog {name!r} has got a new snapshot meanwhile; run the same command again")
        volatile = {
            "made_at": time.time(),
            "config": old.manifest["config"] | {"logits": config.logits.model_dump(mode="json")},
            "numerics": old.manifest["numerics"],
            "units": old.units,
            "seconds": old.manifest["seconds"] | {"logits": seconds},
            "passed_over": old.manifest.get("passed_over", []),
        }
        volatile |= {key: old.manifest[key] for key in ("made_with", "versions", "unproven") if key in old.manifest}
        number, _, is_new = draft.publish(name, manifests.facts_of(old.manifest) | {"logits": facts}, volatile)
    folder = publish.folder_of(blobs, name, number)
    return Attribution(folder=folder, is_new=is_new, dtype=about["model"]["dtype"], seconds=seconds)


def _settings(config: AttributeConfig, about: dict[str, Any]) -> LogitSettings:
    return LogitSettings(
        model=config.model,
        saes=config.saes,
        logits=config.logits,
        threads=config.cluster.threads_per_worker,
        planned=Provenance.of_measure(about),
    )


def _with_parts_of(catalog: Catalog, config: AttributeConfig) -> AttributeConfig:
    """The config with the catalog's own model and SAEs where it names none.

    The dtype is the catalog's. Device and trust are never read from a catalog.

    Raises:
        ConfigError: if it asks for another dtype.
    """
    made = AnalyzeConfig.model_validate(catalog.manifest["config"])
    dtype = catalog.manifest["identity"]["measure"]["model"]["dtype"]
    asked = config.model
    if asked.dtype not in ("auto", dtype):
        raise ConfigError(f"model.dtype is {asked.dtype}, but the catalog was made in {dtype}; leave model.dtype out")
    model = made.model if asked.id == ModelConfig().id else asked
    mine = {"dtype": dtype, "device": asked.device, "trust_remote_code": asked.trust_remote_code}
    saes = made.saes if config.saes == EMBEDDED_SAES else config.saes
    return config.model_copy(update={"model": model.model_copy(update=mine), "saes": saes})


def _identify(config: AttributeConfig, tokenizer_as: str | None = None) -> tuple[dict[str, Any], list[RangeTask]]:
    """What decides the logits, checked before any work, and the ranges of features.

    Args:
        config: of the job.
        tokenizer_as: the digest by which a catalog knows its tokenizer.

    Raises:
        UserError: if model and SAEs do not belong together, or cannot be read.
    """
    model = config.model
    facts, tokenizer = facts_of(model), tokenizer_of(model)
    saes = load_saes(config.saes)
    for key in saes:
        check_point(key.hook_point, facts.taps, facts.num_layers)
    check_request(config.logits, (key.hook_point for key in saes), tokenizer)
    dtype = str(choose_dtype(model.dtype, choose_device(model.device))).removeprefix("torch.")
    known = tokenizer.digest_as(tokenizer_as)
    about = {
        "model": {"digest": facts.digest, "family": facts.family, "dtype": dtype, "tokenizer": known},
        "saes": {str(key): loaded.digest for key, loaded in saes.items()},
    }
    return about, ranges.tasks([loaded.sae.num_features for loaded in saes.values()])


def _prove(about: dict[str, Any], catalog: Catalog) -> None:
    """Raises IdentityError unless model and SAEs are those that the catalog was made with."""
    there = catalog.manifest["identity"]["measure"]
    for part, found in about.items():
        differing = sorted(k for k in found.keys() | there[part].keys() if found.get(k) != there[part].get(k))
        if differing:
            raise IdentityError(
                f"catalog {catalog.manifest['catalog']!r} was made with other {part}: {', '.join(differing)} differ; "
                f"leave {part} out to take the catalog's own, or name those that it was made with"
            )
