"""Prepare one source: records to documents to tokens to contexts to shard files, named by their content.

A unit of work that can be killed and repeated: shard files come first, the source's record last, and the
same source always gives the same names and bytes.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sae_census.compute.census.packing import Context, Packer
from sae_census.config import CorpusConfig, ModelConfig
from sae_census.errors import CorruptError
from sae_census.io.loading.soundness import check_ids
from sae_census.io.store import schemas, tables
from sae_census.io.store.blobs import LocalBlobs
from sae_census.io.text.corpus import BadRecord, Document, Source, read
from sae_census.io.text.rows import ReadSettings
from sae_census.io.tokens.tokenizer import Tokenizer
from sae_census.records import ShardRecord, SourceRecord
from sae_census.steps.model.parts import tokenizer_of
from sae_census.steps.model.provenance import Provenance
from sae_census.steps.store import layout
from sae_census.steps.store.identities import PREPARATION_FORMAT, Preparation

_BATCH_CHARS = 1 << 20


def read_settings(corpus: CorpusConfig) -> ReadSettings:
    """The part of the config that decides how records are read."""
    return ReadSettings(
        column=corpus.column,
        split=corpus.split,
        revision=corpus.revision,
        streaming=corpus.streaming,
        txt_documents=corpus.txt_documents,
        max_record_bytes=corpus.max_record_bytes,
    )


def preparation_of(corpus: CorpusConfig, tokenizer: Tokenizer, shard_tokens: int) -> Preparation:
    """Everything that decides which tokens stand in which context."""
    return Preparation(
        format=PREPARATION_FORMAT,
        tokenizer=tokenizer.digest,
        context_length=corpus.context_length,
        packing=corpus.packing,
        long_documents=corpus.long_documents if corpus.packing == "document" else None,
        bos=corpus.bos == "always" or (corpus.bos == "auto" and tokenizer.adds_bos),
        shard_tokens=min(shard_tokens, corpus.max_tokens or shard_tokens),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareSettings:
    """What a worker needs to prepare sources."""

    root: str
    model: ModelConfig
    corpus: CorpusConfig
    preparation: Preparation
    num_embeddings: int
    """Token ids of the model are below."""
    planned: Provenance


class Preparer:
    """Prepares sources one by one; holds the tokenizer."""

    def __init__(self, settings: PrepareSettings):
        """Load the tokenizer.

        Raises:
            IdentityError: if it is not what was planned.
        """
        self._settings = settings
        self._blobs = LocalBlobs(settings.root)
        self._tokenizer = tokenizer_of(settings.model)
        settings.planned.prove_tokenizer(settings.model.id, self._tokenizer)

    def run(self, source: Source) -> SourceRecord:
        """Prepare a source, or return what an earlier run left.

        Raises:
            SourceError: if it cannot be read at all.
            ConfigError: if the text has a token that the model does not know.
        """
        corpus, preparation_id = self._settings.corpus, self._settings.preparation.preparation_id
        source_id = source.identity(read_settings(corpus))
        done = find_source(self._blobs, preparation_id, source_id, corpus.max_tokens)
        if done is not None:
            return done
        packer = self._packer()
        books = _Books()
        shards: list[ShardRecord] = []
        digests: dict[str, str] = {}
        num_tokens, complete = 0, True
        for contexts in self._shards(packer.pack(self._encoded(source, books))):
            shard, sha256 = self._write_shard(source.slice, contexts)
            shards.append(shard)
            digests[shard.shard_id] = sha256
            num_tokens += shard.num_tokens
            if corpus.max_tokens is not None and num_tokens >= corpus.max_tokens:
                complete = False
                break
        if bad := books.bad:
            lines = (json.dumps({"file": b.file, "line": b.line, "reason": b.reason, "detail": b.detail}) for b in bad)
            self._blobs.put(layout.quarantine(preparation_id, source_id), ("\n".join(lines) + "\n").encode())
        record = SourceRecord(
            source_id=source_id,
            slice=source.slice,
            names=source.names,
            content_sha256=source.digest,
            complete=complete,
            shards=tuple(shards),
            files_sha256=digests,
            num_documents=books.documents.total(),
            num_with_bos=books.num_with_bos,
            tokens_truncated=packer.tokens_truncated,
            dropped=dict(sorted(Counter(b.reason for b in bad).items())),
            unused_files=books.unused(source.names, complete=complete),
        )
        key = source_id if complete else f"{source_id}-{corpus.max_tokens}"
        self._blobs.put(layout.source(preparation_id, key), record.to_bytes())
        return record

    def _packer(self) -> Packer:
        corpus, preparation = self._settings.corpus, self._settings.preparation
        bos_id = self._tokenizer.bos_id if preparation.bos else None
        return Packer(
            context_length=corpus.context_length,
            packing=corpus.packing,
            long_documents=corpus.long_documents,
            bos_id=bos_id,
            doubles_bos=preparation.format == 1,
        )

    def _encoded(self, source: Source, books: "_Books") -> Iterator[tuple[str, list[int]]]:
        """Documents as token ids, tokenised in batches; bad records and documents are booked on the way."""
        batch: list[Document] = []
        size = 0
        for record in read(source, read_settings(self._settings.corpus)):
            if isinstance(record, BadRecord):
                books.bad.append(record)
                continue
            batch.append(record)
            size += len(record.text)
            if size >= _BATCH_CHARS:
                yield from self._tokenised(batch, books)
                batch, size = [], 0
        yield from self._tokenised(batch, books)

    def _tokenised(self, batch: list[Document], books: "_Books") -> Iterator[tuple[str, list[int]]]:
        if batch:
            for document, ids in zip(batch, self._tokenizer.encode([d.text for d in batch]), strict=True):
                books.documents[document.file] += 1
                books.num_with_bos += ids[:1] == [self._tokenizer.bos_id] and not self._tokenizer.encodes_bos
                yield document.document_id, ids

    def _shards(self, contexts: Iterator[Context]) -> Iterator[list[Context]]:
        budget = self._settings.preparation.shard_tokens
        size = max(1, budget // self._settings.corpus.context_length)
        shard: list[Context] = []
        for context in contexts:
            self._check_ids(context)
            shard.append(context)
            if len(shard) == size:
                yield shard
                shard = []
        if shard:
            yield shard

    def _check_ids(self, context: Context) -> None:
        tokenizer = self._tokenizer
        check_ids(
            max(context.input_ids),
            self._settings.num_embeddings,
            lambda: tokenizer.size,
            lambda token: tokenizer.tokens([token])[0],
        )

    def _write_shard(self, slice_name: str, contexts: list[Context]) -> tuple[ShardRecord, str]:
        columns = {
            "input_ids": [c.input_ids for c in contexts],
            "document_id": [c.document_ids for c in contexts],
            "document_start": [c.document_starts for c in contexts],
            "slice": [slice_name] * len(contexts),
        }
        shard_id = _content_id(columns)
        body = tables.to_bytes(tables.table(schemas.SHARD, columns))
        self._blobs.put(layout.shard(self._settings.preparation.preparation_id, shard_id), body)
        record = ShardRecord(
            shard_id=shard_id,
            slice=slice_name,
            num_contexts=len(contexts),
            num_tokens=sum(len(c.input_ids) for c in contexts),
            num_documents=len({d for c in contexts for d in c.document_ids}),
        )
        return record, hashlib.sha256(body).hexdigest()


@dataclass(slots=True)
class _Books:
    """What reading a source gave."""

    bad: list[BadRecord] = field(default_factory=list)
    documents: Counter[str] = field(default_factory=Counter)
    """By file, in the order of reading."""
    num_with_bos: int = 0
    """Documents that bring a BOS of their own."""

    def unused(self, names: tuple[str, ...], *, complete: bool) -> tuple[str, ...]:
        """The files without a usable record, of those that were read to their end."""
        read_through = names if complete else names[: names.index(list(self.documents)[-1])]
        return tuple(name for name in read_through if not self.documents[name])


def _content_id(columns: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(columns).encode()).hexdigest()[:32]


def stored_shard_id(path: Path) -> str:
    """The id that the content of a shard file gives today.

    Raises:
        CorruptError: if it cannot be read.
    """
    return _content_id(tables.read(path).to_pydict())


def find_source(blobs: LocalBlobs, preparation_id: str, source_id: str, max_tokens: int | None) -> SourceRecord | None:
    """The record of an earlier preparation whose files are all sound, complete or cut at the same length."""
    for name in (source_id, f"{source_id}-{max_tokens}"):
        key = layout.source(preparation_id, name)
        if not blobs.exists(key):
            continue
        try:
            record = SourceRecord.read(blobs.get(key), key)
            files = record.files_sha256.items()
            sound = all(blobs.digest(layout.shard(preparation_id, shard)) == sha256 for shard, sha256 in files)
            if sound and record.source_id == source_id:
                return record
        except CorruptError:  # what is damaged is prepared again
            continue
    return None


def choose_shards(records: list[SourceRecord], max_tokens: int | None) -> list[ShardRecord]:
    """The shards of a corpus, sorted by id: all, or of each slice the first that reach `max_tokens`."""
    chosen: dict[str, ShardRecord] = {}
    taken: Counter[str] = Counter()
    for record in records:
        for shard in record.shards:
            if max_tokens is None or taken[shard.slice] < max_tokens:
                chosen[shard.shard_id] = shard
                taken[shard.slice] += shard.num_tokens
    return sorted(chosen.values(), key=lambda shard: shard.shard_id)
