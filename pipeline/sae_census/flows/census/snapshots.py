"""Snapshots of a store: list them, and build new ones from partials that are there, without analysing anything."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase

import numpy as np

from sae_census.compute.numbers.weights import normal
from sae_census.config import SnapshotsConfig
from sae_census.errors import ConfigError, IdentityError
from sae_census.flows.catalog.reader import Catalog, catalog_names
from sae_census.flows.census.reduce import Chosen, reduce
from sae_census.io.store.blobs import LocalBlobs
from sae_census.steps.census import claims, plan, publish
from sae_census.steps.census.logits import LOGITS, MOMENTS
from sae_census.steps.census.partial import RangeTask
from sae_census.steps.cluster import connected
from sae_census.steps.store import layout
from sae_census.steps.store.manifests import Job, LogitFacts, SourceCoverage
from sae_census.steps.store.progress import RunLog, new_run
from sae_census.types import SiteKey


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotFacts:
    """One published snapshot."""

    catalog: str
    snapshot: int
    digest: str
    made_at: float
    """Unix time."""
    shards: int
    slices: dict[str, int]
    """Tokens by slice; all, counted or not."""
    saes: int
    complete: bool
    weights: dict[str, int]
    """Empty if every slice counts once."""


def snapshots(root: str) -> Iterator[SnapshotFacts]:
    """All snapshots of a store, by catalog and number."""
    for name in catalog_names(root):
        for number in publish.snapshots(LocalBlobs(root), name):
            manifest = Catalog(root, name, number).manifest
            coverage = manifest.coverage
            yield SnapshotFacts(
                catalog=name,
                snapshot=number,
                digest=manifest.digest,
                made_at=manifest.made_at,
                shards=coverage.shards,
                slices={slice_name: facts.tokens for slice_name, facts in coverage.slices.items()},
                saes=len(manifest.identity.measure.saes),
                complete=coverage.complete,
                weights=manifest.weights,
            )


def build(config: SnapshotsConfig, say: Callable[[str], None] | None = None) -> tuple[Catalog, bool]:
    """Publish a snapshot of chosen shards; equal to the bit to what an analysis of just that text would publish.

    Args:
        config: with `action=build`.
        say: hears every line that is meant for people; by default they go to stderr.

    Returns:
        The snapshot, and whether it is new: the newest of its catalog may say the same.

    Raises:
        IdentityError: if the catalogs differ in model, SAEs or settings.
        ConfigError: if nothing is chosen, or a chosen shard has no sound partial any more.
    """
    blobs = LocalBlobs(config.store.root)
    bases = _bases(config)
    base, identity = bases[0], bases[0].manifest.identity
    slices = _slices(config, bases)
    shards = {shard.shard_id: shard for catalog in bases for shard in catalog.manifest.shards if shard.slice in slices}
    sites = _sites(base)
    ids = base.measure.ids
    receipts, left = plan.look(blobs, {site: ids[str(site)] for site in sites}, [shards[key] for key in sorted(shards)])
    if left:
        raise ConfigError(
            f"{len(left)} of {len(shards)} chosen shards have no sound partials any more, the first is "
            f"{left[0].shard.shard_id}; run sae-census analyze as for catalog {base.manifest.catalog!r} again"
        )
    receipts = _in_time(config, receipts)
    chosen_ids = set(receipts[sites[0]])
    if not chosen_ids:
        raise ConfigError("no shard is chosen; sae-census catalog lists slices, and manifests say when they were made")
    sources = _sources(bases, slices, None if config.since is None and config.until is None else chosen_ids)
    expected = {shard_id for source in sources for shard_id in source.shards}
    made = base.config
    settings = made.model_copy(
        update={
            "store": config.store,
            "cluster": config.cluster,
            "catalog": made.catalog.model_copy(update={"name": config.into}),
        }
    )
    chosen = Chosen(
        config=settings,
        identity=identity,
        of=f"catalog {base.manifest.catalog!r}",
        decoder_norms={site: np.asarray(base.of_sae(str(site.hook_point), site.sae)["decoder_norm"]) for site in sites},
        receipts=receipts,
        sources=sources,
        missing=sorted(expected & {shard for one in bases for shard in one.manifest.coverage.missing}),
        weights=normal(config.weights, sorted({shards[key].slice for key in chosen_ids})),
        job=Job(
            config=settings.model_dump(mode="json"),
            numerics=base.manifest.numerics,
            seconds={},
            units=base.units,
            built_from=config.model_dump(mode="json", exclude={"store", "cluster"}),
        ),
    )
    claims.claim(blobs, settings.catalog.name, identity)
    log = RunLog(blobs, layout.events(new_run()), say)
    about = {"catalog": config.into, "workers": config.cluster.num_workers, "address": config.cluster.address}
    with log.running(about), connected(config.cluster):
        return reduce(chosen, log, lambda draft, todo: _copy_logits(base, draft, todo))


def _bases(config: SnapshotsConfig) -> list[Catalog]:
    """The catalogs whose shards are chosen from, proved to be of one identity."""
    bases = [Catalog(config.store.root, config.catalog.name, config.snapshot)]
    for named in config.also:
        name, _, number = named.partition("@")
        if number and not number.isdecimal():
            raise ConfigError(f"also names {named!r}; expected a catalog, or catalog@snapshot")
        bases.append(Catalog(config.store.root, name, int(number) if number else None))
        found = claims.differences(bases[0].manifest.identity, bases[-1].manifest.identity)
        if found:
            what = "; ".join(f"{field} is {here!r} and {there!r}" for field, (here, there) in found.items())
            raise IdentityError(f"catalogs {config.catalog.name!r} and {name!r} cannot be joined: {what}")
    return bases


def _slices(config: SnapshotsConfig, bases: Sequence[Catalog]) -> set[str]:
    """The names of the chosen slices; every pattern and every weight must mean one."""
    known = {name for catalog in bases for name in catalog.manifest.coverage.slices}
    for pattern in (*config.slices, *config.drop):
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ConfigError(f"no slice is called {pattern!r}; there are {', '.join(sorted(known))}")
    kept = {name for name in known if not config.slices or any(fnmatchcase(name, p) for p in config.slices)}
    kept -= {name for name in kept if any(fnmatchcase(name, pattern) for pattern in config.drop)}
    for name in config.weights:
        if name not in kept:
            raise ConfigError(f"weights names {name!r}; the chosen slices are {', '.join(sorted(kept)) or 'none'}")
    return kept


def _sites(catalog: Catalog) -> list[SiteKey]:
    """The SAEs in the order of a catalog."""
    sites = map(SiteKey.parse, catalog.saes)
    return sorted(sites, key=lambda site: (str(site.hook_point), site.sae))


def _in_time(config: SnapshotsConfig, receipts: plan.Receipts) -> plan.Receipts:
    """The receipts of shards that were analysed in the chosen time, for the last SAE."""
    low, high = (_unix(moment) for moment in (config.since, config.until))
    latest: dict[str, float] = {}
    for found in receipts.values():
        for key, receipt in found.items():
            latest[key] = max(latest.get(key, 0.0), receipt.ran["at"])
    kept = {key for key, at in latest.items() if (low is None or at >= low) and (high is None or at < high)}
    return {site: {key: found[key] for key in found if key in kept} for site, found in receipts.items()}


def _unix(moment: datetime | None) -> float | None:
    if moment is None:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _sources(bases: Sequence[Catalog], slices: set[str], shards: set[str] | None) -> list[SourceCoverage]:
    """The sources of the chosen slices; of those only that have some of the shards, if shards are named."""
    found: dict[str, SourceCoverage] = {}
    for catalog in bases:
        for source in catalog.manifest.coverage.sources:
            if source.slice in slices and (shards is None or shards & set(source.shards)):
                found[source.source_id] = source
    return list(found.values())


def _copy_logits(base: Catalog, draft: publish.Draft, todo: list[RangeTask]) -> LogitFacts | None:
    """Logits are of SAE and model, whatever the text."""
    if base.manifest.logits is None:
        return None
    draft.copy(base.folder, {name: base.manifest.files[name] for name in (LOGITS, MOMENTS)})
    return base.manifest.logits
