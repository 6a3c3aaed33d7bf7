"""What lies in a folder of a store: the entries that runs write, and foreign ones, which are passed over by name."""

import re
import warnings
from pathlib import Path

from sae_census.io.store.blobs import LocalBlobs
from sae_census.steps.store import layout

RECORD = r"[0-9a-f]{32}\.json"
"""A receipt, a node or a source record."""
SHARD = r"[0-9a-f]{32}\.parquet"
PARTIAL = r"[0-9a-f]{64}\.zarr\.zip"
SWEPT = r"[0-9]{8}T[0-9]{12}\.json"
"""A run of a sweep."""
ENTRY = r"[A-Za-z0-9].*"
"""The folder of an entry of a sweep."""
ID = r"[0-9a-f]{32}"
"""The folder of a preparation or a measure."""
_SNAPSHOT = r"[0-9]{6}|[1-9][0-9]{6,}"
_BESIDE = r"identity\.json|latest\.json|attached|ablations"
_DRAFT = ".draft-"
_NAMED = 5


def named(folder: Path, pattern: str, beside: str = r"(?!)") -> list[str]:
    """The names in a folder that a pattern matches as a whole, sorted; none if there is no folder.

    What neither this pattern nor the one of its neighbours (`beside`) matches was written by no run: a copy, a backup,
    what a file manager leaves. A warning names it once, and nobody reads it.
    """
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    known = [name for name in found if re.fullmatch(pattern, name)]
    foreign = [name for name in found if name not in known and not re.fullmatch(beside, name)]
    warn(folder, [name for name in foreign if not name.startswith(_DRAFT)])
    return known


def warn(folder: Path, foreign: list[str]) -> None:
    """Say what is passed over in a folder, if anything is; Python shows equal warnings once."""
    if foreign:
        more = f" and {len(foreign) - _NAMED} more" if len(foreign) > _NAMED else ""
        told = ", ".join(map(ascii, foreign[:_NAMED]))
        warnings.warn(f"{folder} holds what no run wrote; it is passed over: {told}{more}", UserWarning, stacklevel=3)


def records(blobs: LocalBlobs, folder: str) -> list[str]:
    """The keys of the records in a folder of receipts, nodes or sources, sorted."""
    return [f"{folder}/{name}" for name in named(blobs.path(folder), RECORD)]


def snapshots(folder: Path) -> list[int]:
    """The numbers of the published snapshots in a catalog's folder, ascending."""
    manifests = [folder / name / "manifest.json" for name in named(folder, _SNAPSHOT, _BESIDE)]
    warn(folder, [f"{path.parent.name}/{path.name}" for path in manifests if path.is_dir()])
    return sorted(int(path.parent.name) for path in manifests if path.is_file())


def catalogs(root: Path) -> list[str]:
    """The names of the catalogs of a store that have a snapshot, sorted."""
    folder = root / layout.catalogs()
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    ours = [path for path in inside if path.is_dir() and ((path / "identity.json").is_file() or _has_snapshot(path))]
    warn(folder, [path.name for path in inside if path not in ours])
    return [path.name for path in ours if snapshots(path)]


def _has_snapshot(folder: Path) -> bool:
    """Catalogs that are older than their identities have none."""
    return any((path / "manifest.json").is_file() for path in folder.iterdir() if re.fullmatch(_SNAPSHOT, path.name))
