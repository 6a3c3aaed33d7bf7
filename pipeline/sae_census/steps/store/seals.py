"""The records of a store: where they lie, whether each is what was written, and a seal for those that have none.

Proved are all that numbers rest on. Not sealed, as nothing is computed from them: events, plans of runs, quarantined
text, reservations of numbers. A ledger's runs are. Attached and ablated tables are proved by `trace.json` and their
names, and by their own page checksums when they are read.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

from sae_census.errors import CorruptError
from sae_census.io.store.blobs import LocalBlobs
from sae_census.records import Failure, Node, Receipt, Record, SourceRecord, digest_of, sealed, unsealed
from sae_census.steps.store import entries, layout
from sae_census.steps.store.manifests import open_manifest

_TYPED: dict[str, type[Record]] = {"sources": SourceRecord, "receipts": Receipt, "nodes": Node, "failures": Failure}
_SOURCE = r"[0-9a-f]{32}(-[0-9]+)?\.json"
_OF_CATALOGS = ("identity.json", "latest.json", "[0-9]*/manifest.json", "attached/*/trace.json")


def keys_of_corpora(blobs: LocalBlobs, preparation_id: str | None = None) -> Iterator[str]:
    """Records of one preparation, or of all."""
    return _keys(blobs, "corpora", preparation_id, {"sources": _SOURCE})


def keys_of_measures(blobs: LocalBlobs, measure_id: str | None = None) -> Iterator[str]:
    """Records of one measure, or of all."""
    return _keys(blobs, "measures", measure_id, dict.fromkeys(("receipts", "nodes", "failures"), entries.RECORD))


def _keys(blobs: LocalBlobs, parent: str, owner: str | None, inside: Mapping[str, str]) -> Iterator[str]:
    for one in entries.named(blobs.path(parent), entries.ID) if owner is None else [owner]:
        if blobs.exists(f"{parent}/{one}/manifest.json"):
            yield f"{parent}/{one}/manifest.json"
        for folder, pattern in inside.items():
            yield from (
                f"{parent}/{one}/{folder}/{n}" for n in entries.named(blobs.path(f"{parent}/{one}/{folder}"), pattern)
            )


def keys_of_catalogs(blobs: LocalBlobs, name: str | None = None) -> Iterator[str]:
    """Records of one catalog, or of all."""
    for one in entries.catalogs(blobs.root) if name is None else [name]:
        folder = blobs.path(layout.catalog(one))
        found = chain.from_iterable(folder.glob(pattern) for pattern in _OF_CATALOGS)
        yield from sorted(path.relative_to(blobs.root).as_posix() for path in found if path.is_file())


def prove(blobs: LocalBlobs, key: str) -> tuple[bytes, bool]:
    """The bytes of a record with its seal, and whether it had one.

    Raises:
        CorruptError: if it is not what was written, or not where it was written.
        IdentityError: if it is of a form that is newer than this program.
    """
    *above, folder, name = key.split("/")
    if above[0] == "catalogs" and name == "manifest.json":
        manifest = open_manifest(blobs.path(key).parent)
        return manifest.counted().to_bytes(), manifest.is_proven
    body = blobs.get(key)
    if folder in _TYPED:
        record = _TYPED[folder].read(body, key)
        if not _lies_at(record, key):
            raise CorruptError(f"{key} is the record of something else")
        return record.to_bytes(), record.is_proven
    content, is_proven = unsealed(body, key)
    if above[0] in ("corpora", "measures"):
        named = content if above[0] == "corpora" else content.get("fields")
        if digest_of(named) != folder:
            raise CorruptError(f"{key} does not describe its folder")
    return sealed(content), is_proven


def _lies_at(record: Record, key: str) -> bool:
    match record:
        case Receipt():
            return key == layout.receipt(record.measure_id, record.shard.shard_id)
        case Node():
            return key == layout.node(record.measure_id, record.node_id)
        case SourceRecord():
            return key.rsplit("/", 1)[-1].startswith(record.source_id)
        case Failure():
            return key.endswith(f"/{record.shard.shard_id}.json")
    return True


def seal(blobs: LocalBlobs, keys: Iterable[str]) -> Counter[str]:
    """Write records anew that have no seal; how many, by kind. Damaged ones stay as they are."""
    found: Counter[str] = Counter()
    for key in keys:
        try:
            body, is_proven = prove(blobs, key)
        except CorruptError:
            continue
        if not is_proven:
            blobs.put(key, body)
            found[kind_of(key)] += 1
    return found


def kind_of(key: str) -> str:
    """What a record is, in the plural."""
    folder, name = key.split("/")[-2:]
    return folder if folder in _TYPED else f"{name.removesuffix('.json')} records"
