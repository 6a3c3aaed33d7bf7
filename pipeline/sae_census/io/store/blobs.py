"""Bytes under keys: the small interface that every write of the project goes through.

A put is whole or absent, never half: bytes are written under a temporary name, synced, then renamed or
linked. Nothing is ever streamed to its final key.

A put also comes last: whatever the same blobs wrote or deleted before is on the disk before the new key is there, with
all folders above it. So a record never survives a power cut that takes what it names. Adopted files and deletions
wait for the next put, or for `sync`, so that a folder of many files is synced once.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

from sae_census.errors import CorruptError, StorageError

_DRAFT = ".draft-"
_CANNOT = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM}
_NO_FOLDERS = _CANNOT | {errno.EACCES, errno.EBADF, errno.EISDIR}
_NO_LINKS = _CANNOT | {errno.EMLINK}
_SYNCING = threading.RLock()
"""Held while folders are synced: another thread that is to write a record waits until they are."""
_WEAKER: dict[Path, dict[str, str]] = {}
"""What file systems refused in this process, by root, in words."""


class LocalBlobs:
    """Blobs in a directory of the local file system. Keys are relative paths with `/`."""

    def __init__(self, root: str | Path):
        self.root = Path(root).expanduser().resolve()
        self._ready: set[Path] = set()
        self._unsynced: set[Path] = set()

    @property
    def weaker(self) -> list[str]:
        """What the file system refused to promise, one sentence each; every one was told once on stderr."""
        return list(_WEAKER.get(self.root, {}).values())

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
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                self._tell(
                    "links",
                    f"has no hard links ({error.strerror}): a key that only one may write is claimed by an empty file "
                    "first, which a run that dies in that moment leaves behind",
                )
                return _claim(draft, path)
        return True

    def adopt(self, key: str, file: Path) -> None:
        """Move a finished local file to a key, for outputs too large to hold in memory; it waits for the next put."""
        path = self.path(key)
        with self.writing():
            self._make(path.parent)
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
            file.replace(path)
            self._unsynced.add(path.parent)

    def sync(self) -> None:
        """Wait until the disk has all that was adopted and deleted so far."""
        with self.writing(), _SYNCING:
            while self._unsynced:
                folder = self._unsynced.pop()  # first: what gets there from now on waits for the next time
                try:
                    self._sync_folder(folder)
                except BaseException:
                    self._unsynced.add(folder)
                    raise

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
        """Remove a key if it is there; what is to be gone before something else happens needs a `sync`."""
        path = self.path(key)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
            self._unsynced.add(path.parent)

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
                self._make(path.parent)
                with draft.open("xb") as file:
                    file.write(body)
                    file.flush()
                    os.fsync(file.fileno())
                self.sync()
                yield draft, path
                self._sync_folder(path.parent)
            finally:
                draft.unlink(missing_ok=True)

    def _make(self, folder: Path) -> None:
        """See that a folder is there, and that it will be synced, with every folder that leads to it.

        Folders that were found are synced as well, once in a process: who made them may have died before.
        """
        if folder not in self._ready or not folder.is_dir():
            levels = (folder, *folder.parents)
            missing = {level for level in levels if not level.exists()}
            folder.mkdir(parents=True, exist_ok=True)
            held = (level for level in levels if level in missing or level.is_relative_to(self.root))
            self._unsynced.update(level.parent for level in held)
            self._ready.add(folder)

    def _sync_folder(self, folder: Path) -> None:
        try:
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        except FileNotFoundError:  # it went since, with what it held
            return
        except OSError as error:
            if error.errno not in _NO_FOLDERS:
                raise
            self._tell(
                "folders",
                f"does not sync folders ({error.strerror}): a power cut may take files that records name; "
                "sae-census verify then says which, and sae-census analyze makes them again",
            )

    def _tell(self, kind: str, what: str) -> None:
        """Say once in a process what the file system does not promise."""
        told = _WEAKER.setdefault(self.root, {})
        if kind not in told:
            told[kind] = f"the file system of {self.root} {what}"
            sys.stderr.write(f"warning: {told[kind]}\n")


def _claim(draft: Path, path: Path) -> bool:
    """Put a draft at a path that nobody else has claimed; whether it was so."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        return False
    draft.replace(path)
    return True


def _refused(root: Path, error: OSError) -> StorageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"the disk of store.root {root} is full; free some space and run the same command again: "
            "finished shards are kept"
        )
    return StorageError(f"store.root {root} cannot be written: {error.strerror} ({error.filename})")
