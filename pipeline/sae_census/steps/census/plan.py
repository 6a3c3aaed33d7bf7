"""Identities and the plan: what decides numbers, what is done, what is left, what it will cost.

Nothing here computes a statistic. A measure is everything but the text that decides the bytes of a partial: the
model, one SAE, the settings. A catalog is one preparation and the measures of its SAEs, which share all but the SAE
(`claims` says how a catalog's name holds them).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from sae_census.compute.numbers.samples import SampleSizes
from sae_census.compute.numbers.stats import NUM_BINS
from sae_census.config import AnalyzeConfig
from sae_census.errors import CorruptError
from sae_census.io.checkpoints import LoadedSae
from sae_census.io.store.blobs import LocalBlobs
from sae_census.records import Receipt, ShardRecord
from sae_census.steps.census import tree
from sae_census.steps.census.sampling import sample_sizes
from sae_census.steps.census.shard import ShardTask
from sae_census.steps.store import entries, layout
from sae_census.steps.store.identities import MEASURE_FORMAT, MIXED, MeasuredModel, Measures
from sae_census.types import SiteKey

_SAMPLE_BYTES = 22
"""Stored bytes of a kept sample with the codes of its context, measured on the embedded SAEs."""


def default_shard_tokens(device: torch.device, num_layers: int, d_model: int) -> int:
    """Tokens of a shard: half a minute to a few minutes of one worker, by device class and model size.

    A constant, never a measurement: the same source must give the same shards on every machine of a class.
    """
    parameters = 12 * num_layers * d_model**2
    if device.type == "cuda":
        return 1 << 22 if parameters < 3e9 else 1 << 20
    return 1 << 17 if parameters < 5e8 else 1 << 14


def measures_of(
    config: AnalyzeConfig, model: MeasuredModel, saes: Mapping[SiteKey, LoadedSae], numerics: Mapping[str, str | int]
) -> Measures:
    """The measures of all SAEs of a run.

    Args:
        config: of the job, its masks settled.
        model: the one that is loaded.
        saes: by site.
        numerics: as from `io.device.configure`; versions of software are no part of a measure.
    """
    return Measures.model_validate(
        {
            "format": MEASURE_FORMAT,
            "model": model,
            "saes": {str(key): loaded.digest for key, loaded in saes.items()},
            "context_length": config.corpus.context_length,
            "masks": config.masks.model_dump(mode="json"),
            "sampling": asdict(sample_sizes(config.sampling, MEASURE_FORMAT)) | {"seed": config.sampling.seed},
            "batch_contexts": config.batch.contexts,
            "codes": config.codes,
            "numerics": MIXED if config.cluster.mixed_numerics else dict(numerics),
        }
    )


def read_receipt(blobs: LocalBlobs, measure_id: str, shard: ShardRecord) -> Receipt | None:
    """The receipt of a shard, if there is one that can be read; its partial may be damaged or gone."""
    return _receipt_at(blobs, layout.receipt(measure_id, shard.shard_id))


def all_receipts(blobs: LocalBlobs, measure_id: str) -> list[Receipt]:
    """Every receipt of a measure that can be read, by shard."""
    found = (_receipt_at(blobs, key) for key in entries.records(blobs, layout.receipts(measure_id)))
    return [receipt for receipt in found if receipt is not None]


def _receipt_at(blobs: LocalBlobs, key: str) -> Receipt | None:
    try:
        receipt = Receipt.read(blobs.get(key), key)
    except CorruptError:
        return None
    return receipt if key == layout.receipt(receipt.measure_id, receipt.shard.shard_id) else None


def has_partial(blobs: LocalBlobs, receipt: Receipt) -> bool:
    """Whether the partial that a receipt names is sound."""
    try:
        return blobs.digest(receipt.partial.key) == receipt.partial.sha256
    except CorruptError:
        return False


Receipts = dict[SiteKey, dict[str, Receipt]]
"""By SAE, then shard."""


def look(
    blobs: LocalBlobs, measure_ids: Mapping[SiteKey, str], shards: Sequence[ShardRecord]
) -> tuple[Receipts, list[ShardTask]]:
    """What is done, and what is left, in the order of shards.

    A shard is done if its partial is sound, or a node is whose shards are all among these.

    Args:
        blobs: the store.
        measure_ids: by SAE.
        shards: of the corpus.
    """
    receipts = {site: _done(blobs, measure_id, shards) for site, measure_id in measure_ids.items()}
    left = []
    for shard in shards:
        missing = tuple(site for site, found in receipts.items() if shard.shard_id not in found)
        if missing:
            left.append(ShardTask(shard=shard, sites=missing))
    return receipts, left


def _done(blobs: LocalBlobs, measure_id: str, shards: Sequence[ShardRecord]) -> dict[str, Receipt]:
    read = {shard.shard_id: read_receipt(blobs, measure_id, shard) for shard in shards}
    mine = {shard.shard_id: shard for shard in shards}
    found = {key: receipt for key, receipt in read.items() if receipt is not None and receipt.shard == mine[key]}
    # A shard that lost its receipt is analysed again; the others that its node stands for are not.
    nodes = tree.Nodes(blobs, measure_id).cover(shards)
    covered = {shard_id for node in nodes for shard_id in node.shards}
    return {key: found[key] for key in found if key in covered or has_partial(blobs, found[key])}


def lost(blobs: LocalBlobs, receipts: Receipts) -> bool:
    """Whether a shard has a receipt only: its partial was pruned, and no node stands for shards of these alone."""
    return any(
        not blobs.exists(unit.stored.key)
        for found in receipts.values()
        for unit in tree.units(tree.Nodes(blobs, next(iter(found.values())).measure_id), list(found.values()))
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a run will take, before it starts."""

    num_shards: int
    num_done: int
    num_tokens_left: int
    partial_bytes: int
    """Upper estimate for what is left."""
    bytes_per_token: float
    """Of partials, for what is left."""
    num_saes: int
    worker_bytes: int
    """Memory of one worker beside model and SAEs."""


def estimate(
    shards: Sequence[ShardRecord], left: Sequence[ShardTask], sizes: SampleSizes, num_features: Mapping[SiteKey, int]
) -> Cost:
    """Costs that do not need a measurement.

    Args:
        shards: of the corpus.
        left: those that lack a sound receipt, and for which SAEs.
        sizes: samples kept of a feature.
        num_features: by SAE.
    """
    samples = sizes.top + sizes.random + (sizes.bands + 1) * sizes.per_band
    tokens_left = sum(task.shard.num_tokens for task in left)
    partial_bytes = sum(num_features[site] for task in left for site in task.sites) * samples * _SAMPLE_BYTES
    return Cost(
        num_shards=len(shards),
        num_done=len(shards) - len(left),
        num_tokens_left=tokens_left,
        partial_bytes=partial_bytes,
        bytes_per_token=partial_bytes / max(tokens_left, 1),
        num_saes=len(num_features),
        worker_bytes=sum(num_features.values())
        * (NUM_BINS * 8 + samples * (24 + 2 * _SAMPLE_BYTES) + sizes.non_activating * 24),
    )
