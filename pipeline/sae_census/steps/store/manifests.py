"""Manifests, and the files that they list: a manifest is proved when it is read, a file before it is read.

A table is hashed once in a process, and again when the file system says that it has changed; arrays are hashed as they
are read. So what a reader computes with is what was published, whatever happened to the folder since.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sae_census.errors import CorruptError
from sae_census.io.store import tables, zarr_files
from sae_census.io.store.blobs import LocalBlobs
from sae_census.records import canonical, sealed, unsealed

_VOLATILE = ("catalog", "snapshot", "digest", "files", "made_at", "config", "numerics", "seconds", "built_from",
             "made_with", "versions", "unproven", "passed_over", "units")  # fmt: skip
"""What of a snapshot's manifest is no fact of its content."""
_ARRAYS = "statistics.zarr"
_HASHED: dict[Path, tuple[tuple[int, ...], str]] = {}
"""sha256 of files, with what the file system said of them before they were hashed."""


def facts_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that a manifest was published with: without its number, its files and what is volatile."""
    return {name: value for name, value in manifest.items() if name not in _VOLATILE}


def content_digest(files: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The digest of a snapshot."""
    return hashlib.sha256(canonical({"files": files, **facts})).hexdigest()


def open_manifest(folder: Path) -> tuple[dict[str, Any], bool]:
    """The manifest of a snapshot's folder, and whether all of it is proven.

    One without a seal proves what its digest stands for, and not its config, its times and its number.

    Raises:
        CorruptError: if it is no manifest, or not the one that was published.
        IdentityError: if it is of a form that is newer than this program.
    """
    path = folder / "manifest.json"
    advice = f"run sae-census analyze as for catalog {folder.parent.name!r} again, or remove {folder}"
    try:
        found, is_proven = unsealed(path.read_bytes(), str(path))
        files, digest = found["files"], found["digest"]
        is_same = content_digest(files, facts_of(found)) == digest and isinstance(files, dict)
    except FileNotFoundError as error:
        raise CorruptError(f"{path} is missing; {advice}") from error
    except (CorruptError, KeyError) as error:
        raise CorruptError(f"{path} is damaged: it is not the manifest that was published; {advice}") from error
    if not is_same:
        raise CorruptError(f"{path} is damaged: its content is not what its digest says; {advice}")
    if folder.name.isdigit() and found.get("snapshot") != int(folder.name):
        raise CorruptError(f"{path} is the manifest of snapshot {found.get('snapshot')}; {advice}")
    return found, is_proven


def describe(blobs: LocalBlobs, key: str, content: Mapping[str, Any]) -> None:
    """Say in the store what a preparation or measure is, unless it says so already and the record is sound."""
    if not blobs.put_if_absent(key, sealed(content)):
        try:
            unsealed(blobs.get(key), key)
        except CorruptError:
            blobs.put(key, sealed(content))


class SnapshotFiles:
    """The files of one snapshot, each proved before it is read."""

    def __init__(self, folder: Path, files: Mapping[str, Mapping[str, Any]]):
        """Take a folder and what its manifest lists."""
        self._folder, self._files = folder, files
        self._advice = f"run sae-census analyze as for catalog {folder.parent.name!r} again, which mends it"

    def path(self, name: str) -> Path:
        """Where a sound file lies.

        Raises:
            CorruptError: if it is missing, or not the one that was published.
        """
        path = self._folder / name
        if name not in self._files:
            raise CorruptError(f"{path} is not one of the files that {self._folder / 'manifest.json'} lists")
        if digest_of_file(path) != self._files[name]["sha256"]:
            raise CorruptError(f"{path} is not the file that was published; {self._advice}")
        return path

    def table(self, name: str, columns: Sequence[str] | None = None, **options: Any) -> tables.Table:
        """A table, or some of it, as `tables.read` does.

        Raises:
            CorruptError: as `path` does.
        """
        return tables.read(self.path(name), columns, **options)

    def arrays(self, group: str) -> dict[str, np.ndarray]:
        """The arrays of one group of the statistics.

        Raises:
            KeyError: if there is no such group.
            CorruptError: if a file of theirs is missing, is not the one that was published, or was not published.
        """
        inside = f"{_ARRAYS}/{group}/"
        listed = {name for name in self._files if name.startswith(inside)}
        if not listed:
            raise KeyError(f"{self._folder / _ARRAYS} has no group {group}")
        if strange := sorted(set(unlisted(self._folder, self._files, inside))):
            raise CorruptError(f"{self._folder / strange[0]} was not published with its snapshot; {self._advice}")
        above = [
            f"{_ARRAYS}/{'/'.join([*group.split('/')[:depth], 'zarr.json'])}" for depth in range(group.count("/") + 1)
        ]
        bodies = {name.removeprefix(f"{_ARRAYS}/"): self._proven(name) for name in (*above, *sorted(listed))}
        return zarr_files.read_group(bodies, group)

    def _proven(self, name: str) -> bytes:
        path = self._folder / name
        try:
            body = path.read_bytes()
        except OSError as error:
            raise CorruptError(f"{path} is missing; {self._advice}") from error
        if name not in self._files or hashlib.sha256(body).hexdigest() != self._files[name]["sha256"]:
            raise CorruptError(f"{path} is not the file that was published; {self._advice}")
        return body


def unlisted(folder: Path, files: Mapping[str, Any], inside: str = f"{_ARRAYS}/") -> list[str]:
    """Files of the statistics that a manifest does not list and any reader of Zarr might take for chunks."""
    found = (path for path in (folder / inside).rglob("*") if path.is_file() and not path.name.startswith("."))
    names = (path.relative_to(folder).as_posix() for path in found)
    return sorted(name for name in names if name not in files)


def digest_of_file(path: Path) -> str:
    """sha256 of a file, or nothing where there is none; of one that did not change, as it was found before."""
    try:
        with path.open("rb") as file:
            facts = path.stat()
            seen = (facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
            known = _HASHED.get(path)
            if known is None or known[0] != seen:
                known = _HASHED[path] = (seen, hashlib.file_digest(file, "sha256").hexdigest())
            return known[1]
    except OSError:
        return ""
