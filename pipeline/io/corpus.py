"""The door to text: files, URLs and datasets as sources of documents, one bad record costing one record.

A source is the unit that is prepared, resumed and identified: one file (or a group of small ones) or one
split of a dataset. Its identity is its content, its name inside the pattern that found it, and its slice;
never the folder it happens to lie in.
"""

import glob
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import SourceError
from pipeline.io import embedded, tables
from pipeline.io.rows import FORMATS, PACKED, Bad, ReadSettings, Reason, Row, format_of, read_rows


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
        files: list[tuple[str, Path]] = []
        for part in [parts] if isinstance(parts, str) else parts:
            located = _locate(part, embedded_chars)
            if isinstance(located, str):
                unit = _dataset_source(slice_name, located, settings)
                found[unit.identity(settings)] = unit
            else:
                files += located
        for group in _groups(_distinct(files), group_files):
            unit = Source(
                slice=slice_name,
                names=tuple(name for name, _ in group),
                paths=tuple(str(path) for _, path in group),
                dataset=None,
                digest=_digest(path for _, path in group),
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
    if _digest(map(Path, source.paths)) != source.digest:
        raise SourceError(f"{', '.join(source.paths)} changed while it was being prepared; run the command again")
    for name, path in zip(source.names, map(Path, source.paths), strict=True):
        yield from _records(source, name, read_rows(path, settings), settings)


# --- finding ----------------------------------------------------------------------------------------------


def _locate(part: str, embedded_chars: int) -> list[tuple[str, Path]] | str:
    """Files with their names, or the id of a dataset."""
    if part.startswith(embedded.PREFIX):
        path = embedded.corpus_path(part, embedded_chars)
        return [(path.name, path)]
    if "://" in part:
        return [_download(part)]
    path = Path(part).expanduser()
    if path.is_file():
        format_of(path)
        return [(path.name, path)]
    if path.is_dir():
        return part
    if glob.has_magic(part):
        base = Path(*_before_magic(path.parts))
        pattern = Path(*path.parts[len(base.parts) :])
        files = [file for file in base.glob(str(pattern)) if file.is_file()]
        if not files:
            raise SourceError(f"corpus.source {part} matches no file")
        for file in files:
            format_of(file)
        return [(file.relative_to(base).as_posix(), file) for file in files]
    looks_local = path.is_absolute() or part.startswith((".", "~")) or part.count("/") > 1
    if looks_local or any(part.endswith(suffix) for suffix in FORMATS + PACKED):
        raise SourceError(f"corpus.source {part} does not exist; expected a file, a glob, a URL or a dataset")
    return part


def _before_magic(parts: tuple[str, ...]) -> list[str]:
    fixed = []
    for part in parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return fixed


def _download(url: str) -> tuple[str, Path]:
    import fsspec

    name = urlsplit(url).path.rstrip("/").rsplit("/", 1)[-1]
    format_of(Path(name))
    target = embedded.cache_dir() / "downloads" / hashlib.sha256(url.encode()).hexdigest()[:16] / name
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{name}.draft")
    try:
        with fsspec.open(url, "rb") as remote, draft.open("wb") as local:
            while block := remote.read(1 << 20):
                local.write(block)
    except Exception as error:  # every protocol has errors of its own
        raise SourceError(f"corpus.source {url} could not be fetched: {error}") from error
    draft.replace(target)
    return name, target


def _distinct(files: Iterable[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """Files by name, each once; a digest of its content sets apart those of one name in several folders."""
    once = {path.resolve(): (name, path) for name, path in sorted(files, reverse=True)}
    shared = Counter(name for name, _ in once.values())
    seen: Counter[str] = Counter()
    named = []
    for name, path in sorted(once.values()):
        if shared[name] > 1:
            name = f"{name}#{_digest([path])[:16]}"
            seen[name] += 1
            name += f"#{seen[name]}" if seen[name] > 1 else ""
        named.append((name, path))
    return named


def _groups(files: list[tuple[str, Path]], size: int) -> Iterator[list[tuple[str, Path]]]:
    group: list[tuple[str, Path]] = []
    for name, path in files:
        group.append((name, path))
        if int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % size == 0:
            yield group
            group = []
    if group:
        yield group


def _digest(paths: Iterable[Path]) -> str:
    whole = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise SourceError(f"corpus file {path} cannot be read: {error.strerror}") from error
    return whole.hexdigest()


# --- datasets -----------------------------------------------------------------------------------------------


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


# --- records ------------------------------------------------------------------------------------------------


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
