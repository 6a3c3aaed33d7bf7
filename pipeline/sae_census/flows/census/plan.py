"""What `sae-census analyze` would do under the same config: work, disk, memory and time. Nothing is run or written."""

from dataclasses import dataclass
from pathlib import Path

from sae_census.config import AnalyzeConfig
from sae_census.flows.census.identity import find_config_sources, identify
from sae_census.io.store.blobs import LocalBlobs
from sae_census.io.text.folders import PassedOver
from sae_census.steps.census import claims, plan
from sae_census.steps.census.prepare import choose_shards, find_source, read_settings
from sae_census.steps.census.sampling import sample_sizes

_BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The work ahead."""

    num_sources: int
    passed_over: tuple[PassedOver, ...]
    """What corpus.source comes upon and does not read, or names twice."""
    num_prepared: int
    """Sources whose shards are already there."""
    unprepared_tokens: int
    """Of the other sources: bytes / 4, a rough guess; compressed text is counted as it lies."""
    cost: plan.Cost
    """Of the shards that are already prepared."""
    tokens_per_second: float | None
    """Of one worker, from the receipts of the first SAE; None before there are any."""
    free_bytes: int
    """On the disk of the store."""


def make_plan(config: AnalyzeConfig) -> Plan:
    """Look at model, SAEs, sources and store.

    Raises:
        UserError: as `sae-census analyze` would.
    """
    identity = identify(config)
    blobs = LocalBlobs(config.store.root)
    claims.check_claim(blobs, config.catalog.name, identity.identity)
    how = read_settings(config.corpus)
    found_sources = find_config_sources(config)
    records, unprepared = [], 0
    for source in found_sources.sources:
        found = find_source(blobs, identity.preparation_id, source.identity(how), config.corpus.max_tokens)
        if found is None:
            unprepared += sum(Path(path).stat().st_size for path in source.paths) // _BYTES_PER_TOKEN
        else:
            records.append(found)
    shards = choose_shards(records, config.corpus.max_tokens)
    receipts, left = plan.look(blobs, identity.measure_ids, shards)
    done = list(next(iter(receipts.values())).values())
    num_features = {site: loaded.sae.num_features for site, loaded in identity.saes.items()}
    seconds = sum(receipt.ran["seconds"] for receipt in done)
    rate = sum(receipt.shard.num_tokens for receipt in done) / seconds if seconds else None
    return Plan(
        num_sources=len(found_sources.sources),
        passed_over=found_sources.passed_over,
        num_prepared=len(records),
        unprepared_tokens=unprepared,
        cost=plan.estimate(shards, left, sample_sizes(config.sampling, identity.identity.measure.format), num_features),
        tokens_per_second=rate,
        free_bytes=blobs.free_bytes(),
    )
