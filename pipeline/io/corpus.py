"""The door to text: files, URLs and datasets as sources of documents, one bad record costing one record.

A source is the unit that is prepared, resumed and identified: one file (or a group of small ones) or one
split of a dataset. Its identity is its content, its name inside the pattern that found it, and its slice;
never the folder it happens to lie in.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import SourceError
from pipeline.io import files, tables
from pipeline.io.rows import Bad, ReadSettings, Reason, Row, read_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One unit of preparation."""

    slice: str
    names: tuple[str, ...]
    """Of its files, inside the pattern that found them; or the dataset's name."""
    paths: tuple[str, ...]
    """Where the files lie; empty for a dataset."""
    dataset: str | None
    digest: str
    """sha256 of the content."""

    def identity(self, settings: ReadSettings) -> str:
        """The name under which what was prepared is filed."""
        how = [settings.column, settings.txt_documents, settings.max_record_bytes]
        if self.dataset is not None:
            how += [settings.split]
        return hashlib.sha256(json.dumps([self.slice, self.names, self.digest, how]).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Document:
    """A usable record."""

    document_id: str
    """Stable: a hash of slice, file name and record number."""
    text: str


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that is not used, and why."""

    file: str
    line: int
    """Line of a text file, counted from 1; else the record's number."""
    reason: Reason
    detail: str


def find_sources(
    source: str | Sequence[str] | Mapping[str, str | Sequence[str]],
    settings: ReadSettings,
    *,
    group_files: int = 1,
    embedded_chars: int = 0,
) -> list[Source]:
    """Everything a `corpus.source` names, sorted by slice and name.

    Args:
        source: a file, glob, URL, dataset directory or dataset id; several; or a mapping slice -> those.
        settings: how it will be read.
        group_files: about how many files share one source; the cut falls after a file whose name hashes to a
            multiple of it, so that a new file changes one group only.
        embedded_chars: length of an embedded text.

    Raises:
        SourceError: if a part names nothing that can be read.
    """
    by_slice = source if isinstance(source, Mapping) else {"all": source}
    found: dict[str, Source] = {}
    for slice_name, parts in by_slice.items():
        mine: list[tuple[str, Path]] = []
        for part in [parts] if isinstance(parts, str) else parts:
            located = files.locate(part, embedded_chars)
            if isinstance(located, str):
                unit = _dataset_source(slice_name, located, settings)
                found[unit.identity(settings)] = unit
            else:
                mine += located
        for group in files.groups(files.distinct(mine), group_files):
            unit = Source(
                slice=slice_name,
                names=tuple(name for name, _ in group),
                paths=tuple(str(path) for _, path in group),
                dataset=None,
                digest=files.digest(path for _, path in group),
            )
            found[unit.identity(settings)] = unit
    return sorted(found.values(), key=lambda unit: (unit.slice, unit.names, unit.digest))


def read(source: Source, settings: ReadSettings) -> Iterator[Document | BadRecord]:
    """Every record of a source in its order, good or bad.

    Raises:
        SourceError: if a file changed since it was found, cannot be read as its format, or no record at all
            has the text column.
    """
    if source.dataset is not None:
        rows = ((number, row) for number, row in enumerate(_dataset_rows(source.dataset, settings)))
        yield from _records(source, source.names[0], rows, settings)
        return
    if files.digest(map(Path, source.paths)) != source.digest:
        raise SourceError(f"{', '.join(source.paths)} changed while it was being prepared; run the command again")
    for name, path in zip(source.names, map(Path, source.paths), strict=True):
        yield from _records(source, name, read_rows(path, settings), settings)


def _dataset(name: str, settings: ReadSettings) -> Any:
    import datasets

    datasets.disable_progress_bars()
    path = Path(name).expanduser()
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            stored = datasets.load_from_disk(str(path))
            return stored[settings.split] if isinstance(stored, datasets.DatasetDict) else stored
        return datasets.load_dataset(
            str(path) if path.is_dir() else name,
            split=settings.split,
            revision=settings.revision,
            streaming=settings.streaming,
        )
    except Exception as error:  # the library raises a dozen kinds for one cause: this is no such dataset
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SourceError(
            f"corpus.source {name} is neither a file nor a dataset with split {settings.split!r}: {reason}"
        ) from error


def _dataset_rows(name: str, settings: ReadSettings) -> Iterator[Any]:
    loaded = _dataset(name, settings)
    names = loaded.column_names
    if names is not None and settings.column not in names:
        raise tables.missing_column(name, settings.column, names)
    try:
        yield from loaded if names is None else loaded.select_columns([settings.column])
    except Exception as error:  # streaming reads the files only here
        raise SourceError(f"corpus.source {name} cannot be read as a dataset: {error}") from error


def _dataset_source(slice_name: str, name: str, settings: ReadSettings) -> Source:
    """A split of a dataset. Its digest is over the texts themselves, so a move or a re-download changes nothing."""
    whole = hashlib.sha256()
    for row in _dataset_rows(name, settings):
        text = row.get(settings.column)
        whole.update(json.dumps(text, default=str).encode() + b"\n")
    label = Path(name).name if Path(name).expanduser().is_dir() else name
    return Source(slice=slice_name, names=(label,), paths=(), dataset=name, digest=whole.hexdigest())


def _records(source: Source, name: str, rows: Iterable[Row], settings: ReadSettings) -> Iterator[Document | BadRecord]:
    keys: set[str] = set()
    num_missing = num_with = 0
    for line, row in rows:
        text = _text(row, settings)
        num_with += isinstance(row, Mapping) and settings.column in row
        if isinstance(text, str):
            digest = hashlib.sha256(f"{source.slice}\0{name}\0{line}".encode())
            yield Document(digest.hexdigest()[:24], text)
            continue
        if text.reason == "missing_column":
            num_missing += 1
            keys.update(map(str, row))
        yield BadRecord(name, line, text.reason, text.detail)
    if num_missing and not num_with:
        raise tables.missing_column(name, settings.column, keys)


def _text(row: Any, settings: ReadSettings) -> str | Bad:
    if isinstance(row, Bad):
        return row
    if not isinstance(row, Mapping):
        return Bad("not_an_object", type(row).__name__)
    if settings.column not in row:
        return Bad("missing_column", ", ".join(map(str, row))[:200])
    text = row[settings.column]
    if text is None:
        return Bad("null")
    if not isinstance(text, str):
        return Bad("not_text", type(text).__name__)
    if not text.strip():
        return Bad("empty")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return Bad("not_utf8", "a lone surrogate")
    if size > settings.max_record_bytes:
        return Bad("giant", f"{size} bytes; corpus.max_record_bytes is {settings.max_record_bytes}")
    return text
