"""Prove a store: every record against its seal, and what records name against them; some shards by recomputation."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain

from sae_census.config import AnalyzeConfig, SaeConfig, VerifyConfig
from sae_census.errors import CensusError, ConfigError, CorruptError, IdentityError
from sae_census.io.loading.versions import others
from sae_census.io.store.blobs import LocalBlobs
from sae_census.records import unsealed
from sae_census.steps.census import claims, plan, publish, tree
from sae_census.steps.census.prepare import stored_shard_id
from sae_census.steps.census.shard import Analyzer, Machine
from sae_census.steps.model.provenance import Provenance
from sae_census.steps.model.reader import load_saes
from sae_census.steps.store import entries, layout, seals
from sae_census.steps.store.identities import MIXED, Measure, MeasuredSae, MeasureRecord, Numerics
from sae_census.steps.store.ledger import Ledger
from sae_census.steps.store.manifests import open_manifest
from sae_census.steps.store.snapshot_files import unlisted
from sae_census.types import SiteKey

_ANEW = "sae-census analyze writes it anew"
_MENDS = {
    "sources": "sae-census analyze will prepare its source again",
    "receipts": "sae-census analyze will recompute its shard",
    "nodes": "compact again, which makes it anew",
    "failures": "sae-census analyze writes it anew, or removes it",
    "trace records": "run sae-census trace again",
}
"""What mends a damaged record, by its kind."""


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
    unproven: dict[str, int]
    """How many records have no digest of their own, by kind: they were written before records had one."""


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
    unproven: Counter[str] = Counter()
    parts = (
        _shards(blobs),
        _records(blobs, unproven),
        _nodes(blobs),
        _partials(blobs),
        _snapshots(blobs),
        _tables(blobs),
    )
    for complaint in chain.from_iterable(parts):
        num_checked += 1
        wrong += [complaint] if complaint else []
    if config.recompute:
        for complaint in _recompute(blobs, config, mixed):
            num_recomputed += 1
            wrong += [complaint] if complaint else []
    return Verdict(
        num_checked=num_checked,
        num_recomputed=num_recomputed,
        wrong=tuple(wrong),
        mixed=tuple(mixed),
        unproven=dict(unproven),
    )


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
        yield "" if sound else f"{key} is damaged: sae-census analyze will prepare it again"


def _records(blobs: LocalBlobs, unproven: Counter[str]) -> Iterator[str]:
    """Every record against its own digest; those that have none are counted."""
    groups = (seals.keys_of_corpora(blobs), seals.keys_of_measures(blobs), seals.keys_of_catalogs(blobs))
    for key in chain.from_iterable(groups):
        try:
            _, is_proven = seals.prove(blobs, key)
        except CensusError as error:
            yield f"{key} cannot be trusted ({_first_line(error)}): {_MENDS.get(seals.kind_of(key), _ANEW)}"
            continue
        unproven.update([] if is_proven else [seals.kind_of(key)])
        yield ""
    ledger = Ledger(blobs)
    for key in ledger.records():
        try:
            ledger.read(key)
        except CensusError as error:
            yield _first_line(error)
            continue
        yield ""


def _nodes(blobs: LocalBlobs) -> Iterator[str]:
    for key in _keys(blobs, "measures", "nodes", entries.RECORD):
        try:
            node = tree.read_node(blobs, key)
        except IdentityError:  # as below
            continue
        if node is None:  # which was told with the other records
            continue
        if tree.is_sound(blobs, node):
            yield ""
        else:
            yield (
                f"{node.merged.key} is damaged: sae-census analyze will read the partials of its "
                f"{len(node.shards)} shards and recompute those that were pruned; then compact again"
            )


def _partials(blobs: LocalBlobs) -> Iterator[str]:
    """The partial of every receipt that can be read."""
    for measure_id in entries.named(blobs.path("measures"), entries.ID):
        try:
            covered = tree.Nodes(blobs, measure_id).shards
            receipts = plan.all_receipts(blobs, measure_id)
        except IdentityError:  # a record of a newer form, which was told with the others
            continue
        for receipt in receipts:
            is_pruned = receipt.shard.shard_id in covered and not blobs.exists(receipt.partial.key)
            sound = is_pruned or plan.has_partial(blobs, receipt)
            shard_id = receipt.shard.shard_id
            yield "" if sound else f"{receipt.partial.key} is damaged: sae-census analyze will recompute {shard_id}"


def _snapshots(blobs: LocalBlobs) -> Iterator[str]:
    """The files of every snapshot whose manifest can be read."""
    catalogs = entries.catalogs(blobs.root)
    for catalog, number in ((one, number) for one in catalogs for number in publish.snapshots(blobs, one)):
        folder = publish.folder_of(blobs, catalog, number)
        try:
            files = open_manifest(folder).files
        except CensusError:  # which was told with the other records
            continue
        name = folder.relative_to(blobs.root).as_posix()
        mends = "sae-census analyze puts it back if this is still what it would publish; else remove the folder"
        for file, facts in files.items():
            with (folder / file).open("rb") if (folder / file).is_file() else nullcontext() as body:
                sound = body is not None and hashlib.file_digest(body, "sha256").hexdigest() == facts.sha256
            yield "" if sound else f"{name}/{file} is damaged: {mends}"
        for file in unlisted(folder, files):
            yield f"{name}/{file} was not published with its snapshot: remove it"


def _tables(blobs: LocalBlobs) -> Iterator[str]:
    """Tables beside the snapshots: ablations carry their digest in their names, what was traced in `trace.json`."""
    for path in sorted(blobs.path("catalogs").glob("*/ablations/*.parquet")):
        key = path.relative_to(blobs.root).as_posix()
        sound = blobs.digest(key).startswith(path.stem.rsplit("-", 1)[-1])
        yield "" if sound else f"{key} is damaged: run sae-census ablate again"
    for path in sorted(blobs.path("catalogs").glob("*/attached/*/trace.json")):
        folder = path.parent.relative_to(blobs.root).as_posix()
        try:
            files = unsealed(path.read_bytes(), str(path))[0]["files"]
        except (CensusError, KeyError):  # which was told with the other records
            continue
        for name, sha256 in files.items():
            sound = blobs.exists(f"{folder}/{name}") and blobs.digest(f"{folder}/{name}") == sha256
            yield "" if sound else f"{folder}/{name} is damaged: run sae-census trace again"


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
            made = MeasureRecord.read(manifest.read_bytes(), str(manifest))
            how = AnalyzeConfig.model_validate(made.config | {"store": config.store.model_dump()})
            measure = made.fields
            site, one = _site_of(measure.sae, how)
            planned = Provenance(
                model=measure.model.digest,
                tokenizer=measure.model.tokenizer,
                saes={str(site): measure.sae.digest},
                of=f"measure {measure_id[:12]}",
            )
            alone = how.model_copy(update={"saes": (one,), "masks": claims.masks_of(measure)})
            machine, ids = _machine(measure), {site: measure_id}
            analyzer = Analyzer(alone, made.preparation_id, ids, machine, measure.format, planned)
        except (CensusError, ValueError, LookupError, TypeError) as error:
            yield f"measures/{measure_id} cannot be recomputed here: {_first_line(error)}"
            continue
        if measure.numerics == MIXED:
            mine = [receipt for receipt in receipts if _numerics(receipt.ran["numerics"]) == analyzer.machine.numerics]
            mixed.append(
                f"measures/{measure_id} is mixed: {len(receipts) - len(mine)} of its {len(receipts)} shards come from "
                "machines that compute other bits than this one, and cannot be recomputed here to the bit"
            )
            receipts = mine
        for receipt in receipts[: config.recompute]:
            same = analyzer.digest(receipt.shard, site) == receipt.partial.sha256
            under = others(receipt.versions, analyzer.machine.versions)
            yield (
                ""
                if same
                else f"shard {receipt.shard.shard_id} of measure {measure_id} gives other bytes today"
                + (f", under other versions ({under} here)" if under else "")
            )


def _machine(measure: Measure) -> Machine:
    """The machine that a measure asks for; versions are told, and refuse nothing here."""
    asked = {} if measure.numerics == MIXED else _numerics(measure.numerics)
    return Machine(numerics=asked, versions={})


def _numerics(told: Numerics) -> Numerics:
    """Measures of format 3, and their receipts, held the version of torch among numerics."""
    return {name: value for name, value in told.items() if name != "torch"}


def _site_of(sae: MeasuredSae, how: AnalyzeConfig) -> tuple[SiteKey, SaeConfig]:
    """What a config calls the SAE of a measure, and the part of the config that names it.

    Raises:
        IdentityError: if the SAE is no longer where the config names it.
    """
    for one in how.saes:
        ((site, loaded),) = load_saes([one]).items()
        if (str(site.hook_point), loaded.digest) == (sae.hook_point, sae.digest):
            return site, one
    raise IdentityError(f"its SAE at {sae.hook_point} is no longer where its config names it")


def _first_line(error: Exception) -> str:
    """What an error says at first; its kind if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
