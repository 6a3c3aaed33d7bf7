"""Bytes under keys: the small interface that every write of the project goes through.

A put is whole or absent, never half: bytes are written under a temporary name, synced, then renamed or
linked. Nothing is ever streamed to its final key.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import CorruptError, StorageError

_DRAFT = ".draft-"


class LocalBlobs:
    """Blobs in a directory of the local file system. Keys are relative paths with `/`."""

    def __init__(self, root: str | Path):
        self.root = Path(root).expanduser().resolve()

    def path(self, key: str) -> Path:
        """Where the bytes of a key lie, for readers that want a file."""
        return self.root / key

    def exists(self, key: str) -> bool:
        """Whether the key has bytes."""
        return self.path(key).is_file()

    def get(self, key: str) -> bytes:
        """The bytes of a key.

        Raises:
            CorruptError: if the key has none.
        """
        try:
            return self.path(key).read_bytes()
        except FileNotFoundError as error:
            raise CorruptError(f"{key} is missing from {self.root}") from error

    def digest(self, key: str) -> str:
        """sha256 of the bytes of a key, in constant memory."""
        try:
            with self.path(key).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError as error:
            raise CorruptError(f"{key} is missing from {self.root}") from error

    def put(self, key: str, body: bytes) -> None:
        """Write a key, replacing what it had.

        Raises:
            StorageError: if the disk refuses.
        """
        with self._draft(key, body) as (draft, path):
            draft.replace(path)

    def put_if_absent(self, key: str, body: bytes) -> bool:
        """Write a key unless it has bytes already; whether it was written. Atomic between processes."""
        with self._draft(key, body) as (draft, path):
            try:
                os.link(draft, path)
            except FileExistsError:
                return False
        return True

    def adopt(self, key: str, file: Path) -> None:
        """Move a finished local file to a key; for outputs too large to hold in memory."""
        path = self.path(key)
        with self.writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
            file.replace(path)

    def free_bytes(self) -> int:
        """What the file system still takes."""
        there = next(path for path in (self.root, *self.root.parents) if path.exists())
        return shutil.disk_usage(there).free

    def scratch(self) -> Path:
        """A fresh directory on the same file system, for `adopt`; the caller removes it."""
        path = self.root / "scratch" / uuid.uuid4().hex
        with self.writing():
            path.mkdir(parents=True)
        return path

    def list(self, prefix: str) -> Iterator[str]:
        """All keys under a folder, sorted."""
        folder = self.path(prefix)
        files = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(_DRAFT))
        yield from sorted(p.relative_to(self.root).as_posix() for p in files)

    def delete(self, key: str) -> None:
        """Remove a key if it is there."""
        self.path(key).unlink(missing_ok=True)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turn what the disk refuses within the block into a `StorageError`."""
        try:
            yield
        except OSError as error:
            raise _refused(self.root, error) from error

    @contextlib.contextmanager
    def _draft(self, key: str, body: bytes) -> Iterator[tuple[Path, Path]]:
        path = self.path(key)
        draft = path.with_name(f"{_DRAFT}{uuid.uuid4().hex}")
        with self.writing():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with draft.open("xb") as file:
                    file.write(body)
                    file.flush()
                    os.fsync(file.fileno())
                yield draft, path
                _sync_folder(path.parent)
            finally:
                draft.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _refused(root: Path, error: OSError) -> StorageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"the disk of store.root {root} is full; free some space and run the same command again: "
            "finished shards are kept"
        )
    return StorageError(f"store.root {root} cannot be written: {error.strerror} ({error.filename})")
