"""What the store says in JSON: sources, shards, receipts, nodes, failures. Frozen, validated on reading."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import CorruptError


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def read(cls, body: bytes, key: str) -> Self:
        """The record of a key.

        Raises:
            CorruptError: if its bytes are none.
        """
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            raise CorruptError(f"{key} is damaged; jobs.verify names what is, and what mends it") from error

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, one form for one content."""
        return canonical(self.model_dump(mode="json"))


def canonical(value: Any) -> bytes:
    """JSON with sorted keys, indented for readers, ending in a newline."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def digest_of(value: Any) -> str:
    """A 128-bit name for a JSON value."""
    return hashlib.sha256(canonical(value)).hexdigest()[:32]


class ShardRecord(_Record):
    """A run of contexts, named by the digest of its content."""

    shard_id: str
    slice: str
    num_contexts: int
    num_tokens: int
    num_documents: int
    """Documents with at least one token in it."""


class SourceRecord(_Record):
    """What preparing one source gave."""

    source_id: str
    slice: str
    names: tuple[str, ...]
    content_sha256: str
    complete: bool
    """False if corpus.max_tokens ended it early."""
    shards: tuple[ShardRecord, ...]
    files_sha256: dict[str, str]
    """Of each shard's file, by shard id."""
    num_documents: int
    num_with_bos: int = 0
    """Documents whose text brought a BOS of its own; 0 in records from before they were counted."""
    tokens_truncated: int
    dropped: dict[str, int]
    """Bad records by reason."""
    unused_files: tuple[str, ...] = ()
    """Names of those read in which no record could be used."""

    @property
    def files_without_use(self) -> tuple[str, ...]:
        """The same; an older record names none, but one without documents has no other files."""
        return self.unused_files or (() if self.num_documents else self.names)


class Stored(_Record):
    """An object of the store."""

    key: str
    sha256: str
    num_bytes: int


class Receipt(_Record):
    """The commit record of a partial, one shard under one measure: written last, names its bytes."""

    shard: ShardRecord
    measure_id: str
    partial: Stored
    tokens: dict[str, int]
    """Counted tokens, and those that each mask rule excluded; padding included."""
    contexts: int
    """With at least one counted token."""
    documents: dict[str, int]
    """Documents with at least one counted token, and the sum over documents of (counted tokens)²."""
    ran: dict[str, Any]
    """Host, time, seconds and the machine's numerics; decides nothing."""


class Node(_Record):
    """The commit record of a node, the merge of partials of one slice under one measure: written last."""

    measure_id: str
    slice: str
    shards: tuple[str, ...]
    """Ids, ascending: the ordinal of a sample's shard in a node is a place among these."""
    merged: Stored
    tokens: dict[str, int]
    """Sums of what the receipts say, as the next two."""
    contexts: int
    documents: dict[str, int]

    @property
    def node_id(self) -> str:
        """Says of what it is the merge."""
        return node_id(self.measure_id, self.slice, self.shards)


def node_id(measure_id: str, slice_name: str, shards: Sequence[str]) -> str:
    """The name of the merge of some shards.

    Args:
        measure_id: of the partials.
        slice_name: of all the shards.
        shards: ids, ascending.
    """
    return digest_of({"measure_id": measure_id, "slice": slice_name, "shards": list(shards)})


class Failure(_Record):
    """Why a shard is not in a catalog."""

    shard: ShardRecord
    kind: str
    message: str
    attempts: int
    details: str
