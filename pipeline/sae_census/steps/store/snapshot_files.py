"""The files of a snapshot: each is proved against its manifest before it is read.

A table is hashed once in a process, and again when the file system says that it has changed; arrays are hashed as they
are read. So what a reader computes with is what was published, whatever happened to the folder since.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sae_census.errors import CorruptError
from sae_census.io.store import tables, zarr_files
from sae_census.steps.store.manifests import PublishedFile

_ARRAYS = "statistics.zarr"
_HASHED: dict[Path, tuple[tuple[int, ...], str]] = {}
"""sha256 of files, with what the file system said of them before they were hashed."""


class SnapshotFiles:
    """The files of one snapshot, each proved before it is read."""

    def __init__(self, folder: Path, files: Mapping[str, PublishedFile]):
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
        if digest_of_file(path) != self._files[name].sha256:
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
        if name not in self._files or hashlib.sha256(body).hexdigest() != self._files[name].sha256:
            raise CorruptError(f"{path} is not the file that was published; {self._advice}")
        return body


def unlisted(folder: Path, files: Iterable[str], inside: str = f"{_ARRAYS}/") -> list[str]:
    """Files of the statistics that a manifest does not list and any reader of Zarr might take for chunks."""
    found = (path for path in (folder / inside).rglob("*") if path.is_file() and not path.name.startswith("."))
    return sorted({path.relative_to(folder).as_posix() for path in found} - set(files))


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
