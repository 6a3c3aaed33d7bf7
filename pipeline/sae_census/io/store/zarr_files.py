"""The door to Zarr: groups of arrays packed into one deterministic zip, and read back by slices.

A pack is a Zarr v3 group in an uncompressed zip with sorted names and a fixed date, so equal arrays give
equal bytes. Every chunk carries a checksum, and empty chunks are written: a missing chunk would read as
zeros without an error.
"""

import io
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import LocalStore, MemoryStore, ZipStore

from sae_census.errors import CorruptError

FEATURE_CHUNK = 2048
"""Features in one chunk of an array over features; the grain of the reduce."""
FLAT_CHUNK = 1 << 18
_EPOCH = (1980, 1, 1, 0, 0, 0)


def _write(store: Store, groups: Mapping[str, Mapping[str, np.ndarray]], attributes: Mapping[str, Any],
           dimensions: Mapping[str, tuple[str, ...]]) -> None:  # fmt: skip
    root = zarr.create_group(store=store, zarr_format=3, attributes=dict(attributes))
    for name, arrays in sorted(groups.items()):
        group = root.require_group(name) if name else root
        for key, value in sorted(arrays.items()):
            first = FLAT_CHUNK if value.ndim == 1 else FEATURE_CHUNK
            group.create_array(
                key,
                data=np.ascontiguousarray(value),
                chunks=(max(1, min(first, len(value))), *(max(1, n) for n in value.shape[1:])),
                compressors=[BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"), Crc32cCodec()],
                dimension_names=dimensions.get(key),
                config={"write_empty_chunks": True},
            )


def pack(groups: Mapping[str, Mapping[str, np.ndarray]], attributes: Mapping[str, Any]) -> bytes:
    """Groups of arrays as the bytes of one zip. Equal input gives equal bytes."""
    entries: dict[str, Any] = {}
    _write(MemoryStore(entries), groups, attributes, {})
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(entries):
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), entries[name].to_bytes())
    return target.getvalue()


def write_tree(path: Path, groups: Mapping[str, Mapping[str, np.ndarray]], attributes: Mapping[str, Any],
               dimensions: Mapping[str, tuple[str, ...]]) -> None:  # fmt: skip
    """Groups of arrays as a directory that any Zarr reader opens, axes named."""
    _write(LocalStore(path), groups, attributes, dimensions)


class Pack:
    """A pack on disk, open for reading; use with `with`."""

    def __init__(self, path: Path):
        try:
            with zipfile.ZipFile(path) as archive:
                self._names = set(archive.namelist())
            self._store = ZipStore(path, mode="r")
            self._root = zarr.open_group(self._store, mode="r", zarr_format=3)
        except (OSError, zipfile.BadZipFile, EOFError, KeyError, ValueError, RuntimeError) as error:
            raise CorruptError(f"{path} is not a readable partial: {error}") from error

    def __enter__(self) -> "Pack":
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()

    @property
    def attributes(self) -> dict[str, Any]:
        """What was written beside the arrays."""
        return dict(self._root.attrs)

    def has(self, name: str) -> bool:
        """Whether there is an array `group/name`."""
        return f"{name}/zarr.json" in self._names

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> np.ndarray:
        """An array `group/name`, or the half-open range of its first axis."""
        try:
            found = self._root.get(name)
            if isinstance(found, zarr.Array):
                _check_whole(name, found, self._names)
                return np.asarray(found[start:stop])
        except (OSError, zipfile.BadZipFile, EOFError, KeyError, ValueError, RuntimeError, CorruptError) as error:
            raise CorruptError(f"the partial {self._store.path} is damaged at {name}: {error}") from error
        raise CorruptError(f"the partial {self._store.path} has no array {name}")


def read_group(bodies: Mapping[str, bytes], group: str) -> dict[str, np.ndarray]:
    """All arrays of one group of `write_tree`.

    Args:
        bodies: its files by their paths in the tree, with the `zarr.json` of every group above.
        group: its path.

    Raises:
        CorruptError: if they are no such group, or chunks are missing.
    """
    buffer = default_buffer_prototype().buffer
    entries = {name: buffer.from_bytes(body) for name, body in bodies.items()}
    try:
        found = zarr.open_group(MemoryStore(entries, read_only=True), path=group, mode="r", zarr_format=3)
        arrays = dict(sorted(found.arrays()))
        for name, array in arrays.items():
            _check_whole(f"{group}/{name}", array, entries.keys())
        return {name: np.asarray(array[...]) for name, array in arrays.items()}
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise CorruptError(f"the arrays of {group} cannot be read: {error}") from error


def _check_whole(name: str, array: zarr.Array, entries: Collection[str]) -> None:
    """Zarr reads a missing chunk as zeros."""
    for index in np.ndindex(*array.cdata_shape):
        if f"{name}/c/{'/'.join(map(str, index))}" not in entries:
            raise CorruptError(f"chunks of the array {name} are missing")
