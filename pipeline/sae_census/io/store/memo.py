"""A bounded cache of arrays on disk, safe between processes: what cannot be read is as if it had never been kept.

An entry is one file, named by the hash of its key and headed by the digest of its body; it appears by a rename.
The entries used longest ago make room.
"""

import contextlib
import hashlib
import io
import json
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np

_KEEP = 0.8
"""Of the bound, after making room."""


class ArrayCache:
    """Arrays under keys (JSON values) in a folder."""

    def __init__(self, folder: Path, max_bytes: int):
        self._folder, self._max_bytes = folder, max_bytes
        self._num_bytes: int | None = None
        self.hits = self.misses = 0

    def get(self, key: Any) -> dict[str, np.ndarray] | None:
        """The arrays of a key, or None; a damaged entry is removed."""
        path = self._path(key)
        try:
            body = path.read_bytes()
        except OSError:
            self.misses += 1
            return None
        if hashlib.sha256(body[32:]).digest() != body[:32]:
            with contextlib.suppress(OSError):
                path.unlink()
            self.misses += 1
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        self.hits += 1
        with np.load(io.BytesIO(body[32:]), allow_pickle=False) as entry:
            return {name: entry[name] for name in entry.files}

    def put(self, key: Any, arrays: dict[str, np.ndarray]) -> None:
        """Keep arrays under a key, if the disk takes them."""
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        body = buffer.getvalue()
        if len(body) + 32 > self._max_bytes:
            return
        path = self._path(key)
        draft = path.with_name(f".{uuid.uuid4().hex}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(hashlib.sha256(body).digest() + body)
            draft.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                draft.unlink()
            return
        self._make_room(len(body) + 32)

    def _path(self, key: Any) -> Path:
        return self._folder / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()

    def _make_room(self, added: int) -> None:
        """Other processes add, too: the folder is counted afresh whenever the bound seems to be reached."""
        if self._num_bytes is not None and self._num_bytes + added <= self._max_bytes:
            self._num_bytes += added
            return
        entries = []
        for path in self._folder.glob("*"):
            with contextlib.suppress(OSError):
                stat = path.stat()
                entries.append((stat.st_mtime_ns, stat.st_size, path))
        self._num_bytes = sum(size for _, size, _ in entries)
        if self._num_bytes <= self._max_bytes:
            return
        for _, size, path in sorted(entries):
            with contextlib.suppress(OSError):
                path.unlink()
            self._num_bytes -= size
            if self._num_bytes <= _KEEP * self._max_bytes:
                return
