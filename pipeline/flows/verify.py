"""Prove a store: every shard, node, partial and snapshot against the digests that name them, some by recomputation."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.config import AnalyzeConfig, SaeConfig, VerifyConfig
from pipeline.errors import CensusError, ConfigError, CorruptError
from pipeline.io.blobs import LocalBlobs
from pipeline.records import Receipt
from pipeline.steps import entries, layout, plan, publish, tree
from pipeline.steps.parts import Provenance
from pipeline.steps.prepare import stored_shard_id
from pipeline.steps.reader import load_saes
from pipeline.steps.shard import Analyzer
from pipeline.types import SiteKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was proved."""

    num_checked: int
    """Files whose bytes were read and hashed."""
    num_recomputed: int
    """Shards that were analysed again."""
    wrong: tuple[str, ...]
    """One sentence for each file that is not what its record says, with what to do."""
    mixed: tuple[str, ...]
    """One sentence for each measure with shards that no recomputation here can prove, if any was asked for."""


def verify(config: VerifyConfig) -> Verdict:
    """Check a whole store.

    Raises:
        ConfigError: if there is no store.
    """
    blobs = LocalBlobs(config.store.root)
    if not (blobs.root / "measures").is_dir():
        raise ConfigError(f"store.root {blobs.root} holds no measures; is it the root of a run?")
    num_checked, num_recomputed = 0, 0
    wrong: list[str] = []
    mixed: list[str] = []
    for complaint in (*_shards(blobs), *_nodes(blobs), *_receipts(blobs), *_snapshots(blobs)):
        num_checked += 1
        wrong += [complaint] if complaint else []
    if config.recompute:
        for complaint in _recompute(blobs, config, mixed):
            num_recomputed += 1
            wrong += [complaint] if complaint else []
    return Verdict(num_checked=num_checked, num_recomputed=num_recomputed, wrong=tuple(wrong), mixed=tuple(mixed))


def _keys(blobs: LocalBlobs, parent: str, kind: str, pattern: str) -> Iterator[str]:
    """What runs wrote into the folders of one kind, sorted."""
    for owner in entries.named(blobs.path(parent), entries.ID):
        folder = f"{parent}/{owner}/{kind}"
        yield from (f"{folder}/{name}" for name in entries.named(blobs.path(folder), pattern))


def _shards(blobs: LocalBlobs) -> Iterator[str]:
    for key in _keys(blobs, "corpora", "shards", entries.SHARD):
        try:
            sound = stored_shard_id(blobs.path(key)) == key.rsplit("/", 1)[-1].removesuffix(".parquet")
        except CorruptError:
            sound = False
        yield "" if sound else f"{key} is damaged: jobs.analyze will prepare it again"


def _nodes(blobs: LocalBlobs) -> Iterator[str]:
    for key in _keys(blobs, "measures", "nodes", entries.RECORD):
        node = tree.read_node(blobs, key)
        if node is None:
            yield f"{key} cannot be trusted: remove it and compact again"
        elif tree.is_sound(blobs, node):
            yield ""
        else:
            yield (
                f"{node.merged.key} is damaged: jobs.analyze will read the partials of its {len(node.shards)} shards "
                "and recompute those that were pruned; then compact again"
            )


def _receipts(blobs: LocalBlobs) -> Iterator[str]:
    covered: dict[str, set[str]] = {}
    for key in _keys(blobs, "measures", "receipts", entries.RECORD):
        measure_id = key.split("/")[1]
        if measure_id not in covered:
            covered[measure_id] = tree.Nodes(blobs, measure_id).shards
        try:
            receipt = Receipt.model_validate_json(blobs.get(key))
            is_pruned = receipt.shard.shard_id in covered[measure_id] and not blobs.exists(receipt.partial.key)
            sound = is_pruned or blobs.digest(receipt.partial.key) == receipt.partial.sha256
        except (ValueError, CorruptError) as error:
            yield f"{key} cannot be trusted ({_first_line(error)}): jobs.analyze will recompute its shard"
            continue
        yield (
            "" if sound else f"{receipt.partial.key} is damaged: jobs.analyze will recompute {receipt.shard.shard_id}"
        )


def _snapshots(blobs: LocalBlobs) -> Iterator[str]:
    catalogs = entries.catalogs(blobs.root)
    for catalog, number in ((one, number) for one in catalogs for number in publish.snapshots(blobs, one)):
        folder = layout.snapshot(catalog, number, "")
        key = f"{folder}manifest.json"
        try:
            files = json.loads(blobs.get(key))["files"]
        except (ValueError, KeyError):
            yield f"{key} is damaged: publish again with jobs.analyze"
            continue
        for file, facts in files.items():
            try:
                sound = blobs.digest(folder + file) == facts["sha256"]
            except CorruptError:
                sound = False
            yield "" if sound else f"{folder}{file} is damaged: remove the folder and run jobs.analyze again"


def _recompute(blobs: LocalBlobs, config: VerifyConfig, mixed: list[str]) -> Iterator[str]:
    """Analyse hash-random shards of every measure again, by the manifest that made them.

    Of a mixed measure, only those of machines that compute as this one does: others go into `mixed`, as a number.
    """
    for measure_id in entries.named(blobs.path("measures"), entries.ID):
        manifest = blobs.path(layout.measure(measure_id))
        if not manifest.is_file():
            continue
        receipts = plan.all_receipts(blobs, measure_id)
        receipts.sort(key=lambda r: hashlib.sha256(f"{config.seed}{r.shard.shard_id}".encode()).digest())
        try:
            made = json.loads(manifest.read_bytes())
            how = AnalyzeConfig.model_validate(made["config"] | {"store": config.store.model_dump()})
            fields, of = made["fields"], f"measure {measure_id[:12]}"
            site, one = _site_of(fields["sae"], how)
            planned = Provenance.of_measure(fields | {"saes": {str(site): fields["sae"]["digest"]}}, of)
            alone = how.model_copy(update={"saes": (one,)})
            analyzer = Analyzer(alone, made["preparation_id"], {site: measure_id}, fields["numerics"], planned)
        except (CensusError, ValueError, LookupError, TypeError) as error:
            yield f"measures/{measure_id} cannot be recomputed here: {_first_line(error)}"
            continue
        if fields["numerics"] == plan.MIXED:
            mine = [receipt for receipt in receipts if receipt.ran["numerics"] == analyzer.numerics]
            mixed.append(
                f"measures/{measure_id} is mixed: {len(receipts) - len(mine)} of its {len(receipts)} shards come from "
                "machines that compute other bits than this one, and cannot be recomputed here to the bit"
            )
            receipts = mine
        for receipt in receipts[: config.recompute]:
            same = analyzer.digest(receipt.shard, site) == receipt.partial.sha256
            yield "" if same else f"shard {receipt.shard.shard_id} of measure {measure_id} gives other bytes today"


def _site_of(sae: dict[str, str], how: AnalyzeConfig) -> tuple[SiteKey, SaeConfig]:
    """What a config calls the SAE of a measure, and the part of the config that names it.

    Raises:
        ConfigError: if the SAE is no longer where the config names it.
    """
    for one in how.saes:
        ((site, loaded),) = load_saes([one]).items()
        if {"hook_point": str(site.hook_point), "digest": loaded.digest} == sae:
            return site, one
    raise ConfigError(f"its SAE at {sae['hook_point']} is no longer where its config names it")


def _first_line(error: Exception) -> str:
    """What an error says at first; its kind if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
