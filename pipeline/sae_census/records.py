"""What the store says in JSON: sources, shards, receipts, nodes, failures, and the seal of every record.

A sealed record carries the number of its form and a digest of all its other content, and is proved when it is read:
a digit that changed is refused by the name of the file. Records of the first form have no seal; they are read, and
known as not proven.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError

from sae_census.errors import CorruptError, IdentityError

RECORD_FORMAT = 2
"""Raise it when records are sealed in another way, or their fields change; the first form had no seal."""
_FORMAT, _SEAL = "record_format", "record_sha256"
_ADVICE = "sae-census verify names what is, and what mends it"


def canonical(value: Any) -> bytes:
    """JSON with sorted keys, indented for readers, ending in a newline."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def digest_of(value: Any) -> str:
    """A 128-bit name for a JSON value."""
    return hashlib.sha256(canonical(value)).hexdigest()[:32]


def sealed(content: Mapping[str, Any]) -> bytes:
    """The bytes of a record: canonical JSON of its content, its form, and the digest of both."""
    body = {**content, _FORMAT: RECORD_FORMAT}
    return canonical({**body, _SEAL: hashlib.sha256(canonical(body)).hexdigest()})


def unsealed(body: bytes, key: str) -> tuple[dict[str, Any], bool]:
    """The content of a record, and whether it is proven: False for one of the form that had no seal.

    Args:
        body: its bytes.
        key: its file, for messages.

    Raises:
        CorruptError: if the bytes are no record, or not those that were written.
        IdentityError: if it is of a form that is newer than this program.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{key} is damaged: it is no JSON; {_ADVICE}") from error
    if not isinstance(content, dict):
        raise CorruptError(f"{key} is damaged: it holds no record; {_ADVICE}")
    seal, form = content.pop(_SEAL, None), content.get(_FORMAT)
    if isinstance(form, int) and form > RECORD_FORMAT:
        raise IdentityError(
            f"{key} was written by a newer SAE Census (record format {form}, this one knows {RECORD_FORMAT}); use that"
        )
    if seal is None and form is None:
        return content, False
    try:
        is_same = seal == hashlib.sha256(canonical(content)).hexdigest()
    except UnicodeEncodeError:  # half a surrogate pair, which nobody wrote
        is_same = False
    if not is_same:
        raise CorruptError(f"{key} is damaged: its content is not what its digest says; {_ADVICE}")
    del content[_FORMAT]
    return content, True


class Part(BaseModel):
    """A part of a record, or all that it says."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def content(self) -> dict[str, Any]:
        """As JSON has it, with every field."""
        return self.model_dump(mode="json")


class AsGiven(Part):
    """A part that says just the fields that it was made of: those of an older form stay away, and digests the same.

    Make one from plain JSON values, or from parts that were made so: a default is no field that was given.
    """

    def with_any(self, **fields: Any) -> Self:
        """The same, with those of some fields that are not empty."""
        return self.model_copy(update={name: value for name, value in fields.items() if value})

    def content(self) -> dict[str, Any]:
        """As JSON has it, with the fields that were given."""
        return self.model_dump(mode="json", exclude_unset=True)


class Record(Part):
    """A typed record."""

    _is_proven: bool = PrivateAttr(default=True)

    @property
    def is_proven(self) -> bool:
        """False if it was read from the form that had no seal."""
        return self._is_proven

    @classmethod
    def read(cls, body: bytes, key: str) -> Self:
        """The record of a key.

        Raises:
            CorruptError: if its bytes are none, or not those that were written.
            IdentityError: if it is of a form that is newer than this program.
        """
        content, is_proven = unsealed(body, key)
        try:
            record = cls.model_validate(content)
        except ValidationError as error:
            unknown = [".".join(map(str, one["loc"])) for one in error.errors() if one["type"] == "extra_forbidden"]
            if is_proven and unknown:
                raise IdentityError(
                    f"{key} was written by a newer SAE Census: this one does not know {', '.join(unknown)}; use that"
                ) from error
            raise CorruptError(f"{key} is damaged: it is no {cls.__name__}; {_ADVICE}") from error
        record._is_proven = is_proven
        return record

    def to_bytes(self) -> bytes:
        """Sealed: one form for one content."""
        return sealed(self.content())


class ShardRecord(Record):
    """A run of contexts, named by the digest of its content."""

    shard_id: str
    slice: str
    num_contexts: int
    num_tokens: int
    num_documents: int
    """Documents with at least one token in it."""


class SourceRecord(Record):
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


class Stored(Record):
    """An object of the store."""

    key: str
    sha256: str
    num_bytes: int


class Receipt(Record):
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
    """Host, time, seconds, the machine's numerics and versions; decides nothing."""

    @property
    def versions(self) -> dict[str, str]:
        """Of the software that made it, by name; of receipts from before it was noted, torch alone."""
        numerics = self.ran.get("numerics", {})
        return dict(self.ran.get("versions") or {name: numerics[name] for name in ("torch",) if name in numerics})


class Node(Record):
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


class Failure(Record):
    """Why a shard is not in a catalog."""

    shard: ShardRecord
    kind: str
    message: str
    attempts: int
    details: str
