"""The door to text: files, URLs and datasets as sources of documents, one bad record costing one record.

A source is the unit that is prepared, resumed and identified: one file (or a group of small ones) or one
split of a dataset. Its identity is its content, its name inside the pattern that found it, and its slice;
never the folder it happens to lie in. What is a dataset and what is a directory of files, `folders` says.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sae_census.errors import SourceError
from sae_census.io.store import tables
from sae_census.io.text import files, folders
from sae_census.io.text.folders import PassedOver
from sae_census.io.text.rows import Bad, ReadSettings, Reason, Row, read_rows


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
    file: str
    """The name of its file, or of the dataset."""


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that is not used, and why."""

    file: str
    line: int
    """Line of a text file, counted from 1; else the record's number."""
    reason: Reason
    detail: str


class Found(NamedTuple):
    """Everything that a `corpus.source` names."""

    sources: tuple[Source, ...]
    """Sorted by slice and name."""
    passed_over: tuple[PassedOver, ...]
    """What it comes upon and does not read, or names twice."""


def find_sources(
    source: str | Sequence[str] | Mapping[str, str | Sequence[str]],
    settings: ReadSettings,
    *,
    group_files: int = 1,
    embedded_chars: int = 0,
) -> Found:
    """Everything a `corpus.source` names.

    Args:
        source: a file, glob, directory, URL or dataset; several; or a mapping slice -> those.
        settings: how it will be read.
        group_files: about how many files share one source; the cut falls after a file whose name hashes to a
            multiple of it, so that a new file changes one group only.
        embedded_chars: length of an embedded text.

    Raises:
        SourceError: if a part names nothing that can be read, or a split is asked for that files do not have.
    """
    by_slice = source if isinstance(source, Mapping) else {"all": source}
    found: dict[str, Source] = {}
    books: list[PassedOver] = []
    places: dict[Path, tuple[str, set[str]]] = {}
    for slice_name, parts in by_slice.items():
        mine: list[tuple[str, Path]] = []
        twice: list[str] = []
        for part in [parts] if isinstance(parts, str) else parts:
            located = files.locate(part, embedded_chars)
            books += located.passed_over
            if located.is_directory:
                _check_split(part, settings)
            if located.dataset is not None:
                unit, left_out = _dataset_source(slice_name, located.dataset, settings)
                twice += [located.dataset] if unit.identity(settings) in found else []
                found[unit.identity(settings)] = unit
                books += left_out
            mine += located.files
        twice += files.repeated(mine)
        if twice:
            books.append(folders.book(f"(slice {slice_name})", "twice", twice))
        named = files.distinct(mine)
        for name, path in named:
            places.setdefault(path.resolve(), (name, set()))[1].add(slice_name)
        for group in files.groups(named, group_files):
            unit = Source(
                slice=slice_name,
                names=tuple(name for name, _ in group),
                paths=tuple(str(path) for _, path in group),
                dataset=None,
                digest=files.digest(path for _, path in group),
            )
            found[unit.identity(settings)] = unit
    if shared := [name for name, slices in places.values() if len(slices) > 1]:
        books.append(folders.book("(several slices)", "several_slices", shared))
    if not any(unit.dataset for unit in found.values()):
        _check_split(str(source), settings)
    units = sorted(found.values(), key=lambda unit: (unit.slice, unit.names, unit.digest))
    return Found(tuple(units), tuple(dict.fromkeys(books)))


def _check_split(part: str, settings: ReadSettings) -> None:
    if settings.split != "train":
        raise SourceError(
            f"corpus.split is {settings.split!r}, but corpus.source {part} is files, which have no splits: leave "
            "corpus.split out, or name the files of the split by a glob (a dataset has a card or a layout of its own)"
        )


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


def _dataset(name: str, settings: ReadSettings) -> tuple[Any, list[PassedOver]]:
    """A split, and the files of its directory that are in none."""
    import datasets

    datasets.disable_progress_bars()
    path = Path(name).expanduser()
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _saved(path, datasets.load_from_disk(str(path)), settings)
        place = str(path) if path.is_dir() else name
        left_out = []
        if path.is_dir():
            splits = datasets.load_dataset_builder(place).config.data_files or {}
            left_out = folders.left_out(path, (str(file) for listed in splits.values() for file in listed))
        split = datasets.load_dataset(
            place, split=settings.split, revision=settings.revision, streaming=settings.streaming
        )
    except Exception as error:  # the library raises a dozen kinds for one cause: this is no such dataset
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SourceError(
            f"corpus.source {name} is neither a file nor a dataset with split {settings.split!r}: {reason}"
            + (f"; to read it as files, name them by a glob: {path / '**'}" if path.is_dir() else "")
        ) from error
    return split, left_out


def _saved(path: Path, stored: Any, settings: ReadSettings) -> tuple[Any, list[PassedOver]]:
    """What `save_to_disk` wrote: splits by name, or one of which only its own name is known, if any."""
    splits = stored if isinstance(stored, dict) else {str(stored.split or "train"): stored}
    left_out = folders.left_out(path, (file["filename"] for one in splits.values() for file in one.cache_files))
    if isinstance(stored, dict) or settings.split != "train":
        return splits[settings.split], left_out
    return stored, left_out


def _dataset_rows(name: str, settings: ReadSettings) -> Iterator[Any]:
    yield from _rows(name, _dataset(name, settings)[0], settings)


def _rows(name: str, loaded: Any, settings: ReadSettings) -> Iterator[Any]:
    names = loaded.column_names
    if names is not None and settings.column not in names:
        raise tables.missing_column(name, settings.column, names)
    try:
        yield from loaded if names is None else loaded.select_columns([settings.column])
    except Exception as error:  # streaming reads the files only here
        raise SourceError(f"corpus.source {name} cannot be read as a dataset: {error}") from error


def _dataset_source(slice_name: str, name: str, settings: ReadSettings) -> tuple[Source, list[PassedOver]]:
    """A split of a dataset, and the files that it leaves out.

    Its digest is over the texts themselves, so a move or a re-download changes nothing.
    """
    loaded, left_out = _dataset(name, settings)
    whole = hashlib.sha256()
    for row in _rows(name, loaded, settings):
        text = row.get(settings.column)
        whole.update(json.dumps(text, default=str).encode() + b"\n")
    label = Path(name).name if Path(name).expanduser().is_dir() else name
    unit = Source(slice=slice_name, names=(label,), paths=(), dataset=name, digest=whole.hexdigest())
    return unit, left_out


def _records(source: Source, name: str, rows: Iterable[Row], settings: ReadSettings) -> Iterator[Document | BadRecord]:
    keys: set[str] = set()
    num_missing = num_with = 0
    for line, row in rows:
        text = _text(row, settings)
        num_with += isinstance(row, Mapping) and settings.column in row
        if isinstance(text, str):
            digest = hashlib.sha256(f"{source.slice}\0{name}\0{line}".encode())
            yield Document(digest.hexdigest()[:24], text, name)
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
