"""Files of text to rows: every format, packed or not, one bad line costing one row.

A row is its number and either a mapping (the record) or a `Bad`. Nothing here knows columns' meaning, slices
or documents.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from sae_census.errors import SourceError
from sae_census.io.store import tables

FORMATS = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".txt")
PACKED = (".gz", ".zst")

Reason = Literal[
    "not_utf8", "not_json", "not_an_object", "missing_column", "null", "not_text", "empty", "giant", "bad_row"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadSettings:
    """How records are read; a part of every source's identity."""

    column: str
    split: str
    revision: str | None
    streaming: bool
    txt_documents: Literal["file", "line"]
    max_record_bytes: int


@dataclass(frozen=True, slots=True)
class Bad:
    """A row that cannot be used, and why."""

    reason: Reason
    detail: str = ""


Row = tuple[int, Any]
"""The line (text formats, from 1) or number (others, from 0) of a record, and the record or a `Bad`."""


def is_known(path: Path) -> bool:
    """Whether a file's name ends as one of `FORMATS`, packed or not."""
    suffix, packed = _suffixes(path)
    return suffix in FORMATS and not (packed and suffix in (".parquet", ".arrow"))


def format_of(path: Path) -> str:
    """The suffix that names a file's format, without its packing.

    Raises:
        SourceError: if it is none of `FORMATS`.
    """
    if not is_known(path):
        raise SourceError(
            f"corpus file {path} is of no known format; expected {', '.join(FORMATS)} (text formats also with "
            f"{' or '.join(PACKED)})"
        )
    return _suffixes(path)[0]


def _suffixes(path: Path) -> tuple[str, str]:
    name = path.name.lower()
    packed = next((packing for packing in PACKED if name.endswith(packing)), "")
    return Path(name.removesuffix(packed)).suffix, packed


def read_rows(path: Path, settings: ReadSettings) -> Iterator[Row]:
    """Every row of a file, in order.

    Raises:
        SourceError: if the file cannot be read as its format, or lacks the column altogether.
    """
    suffix = format_of(path)
    if suffix in (".parquet", ".arrow"):
        number = 0
        for batch in tables.column_batches(path, settings.column):
            for value in batch:
                yield number, {settings.column: value}
                number += 1
        return
    try:
        with _opened(path) as file:
            match suffix:
                case ".jsonl":
                    yield from _jsonl(file, settings)
                case ".json":
                    yield from _json(file, path, settings)
                case ".csv":
                    yield from _csv(file, path, settings)
                case _:
                    yield from _txt(file, settings)
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"corpus file {path} is damaged: {error}") from error


def _opened(path: Path) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]  # a GzipFile reads like any binary file
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(tables.zstd_stream(path))
    return path.open("rb")


def _lines(file: BinaryIO, max_bytes: int) -> Iterator[tuple[int, bytes | Bad]]:
    """Lines without their ends; a giant one is passed over in constant memory."""
    number = 0
    while line := file.readline(max_bytes + 2):
        number += 1
        if len(line) > max_bytes and not line.endswith(b"\n"):
            size = len(line)
            while line and not line.endswith(b"\n"):
                line = file.readline(1 << 20)
                size += len(line)
            yield number, Bad("giant", f"{size} bytes; corpus.max_record_bytes is {max_bytes}")
        else:
            line = line.rstrip(b"\r\n")
            yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _decoded(line: bytes) -> str | Bad:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        return Bad("not_utf8", f"byte {error.start}: {line[error.start : error.start + 4].hex()}")


def _jsonl(file: BinaryIO, settings: ReadSettings) -> Iterator[Row]:
    for number, line in _lines(file, settings.max_record_bytes):
        text = line if isinstance(line, Bad) else _decoded(line)
        yield number, _parsed(text) if isinstance(text, str) else text


def _parsed(text: str) -> Any:
    if not text.strip():
        return Bad("empty")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a bare ValueError
        return Bad("not_json", f"{error}: {text[:80]}")


def _json(file: BinaryIO, path: Path, settings: ReadSettings) -> Iterator[Row]:
    """An array of records, an object that holds one, a single record, or (as is common) JSON lines."""
    body = file.read().removeprefix(b"\xef\xbb\xbf")
    try:
        whole = json.loads(body)
    except (ValueError, RecursionError) as error:
        first = body.lstrip().split(b"\n", 1)[0].decode(errors="replace")
        if isinstance(error, ValueError) and first.startswith("[") and isinstance(_parsed(first), Bad):
            raise SourceError(f"corpus file {path} is a damaged JSON array: {error}") from error
        yield from _jsonl(io.BytesIO(body), settings)
        return
    if isinstance(whole, Mapping) and settings.column not in whole:
        lists = [
            value for value in whole.values() if isinstance(value, list) and all(isinstance(v, Mapping) for v in value)
        ]
        whole = lists[0] if len(lists) == 1 else whole
    yield from enumerate(whole if isinstance(whole, list) else [whole])


def _csv(file: BinaryIO, path: Path, settings: ReadSettings) -> Iterator[Row]:
    csv.field_size_limit((1 << 31) - 1)  # after a field too long the reader would go on in the middle of it
    with io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        if reader.fieldnames and settings.column not in reader.fieldnames:
            raise tables.missing_column(path, settings.column, reader.fieldnames)
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield reader.reader.line_num, Bad("bad_row", str(error))  # line_num is of the row before
                continue
            yield reader.line_num, row


def _txt(file: BinaryIO, settings: ReadSettings) -> Iterator[Row]:
    if settings.txt_documents == "line":
        for number, line in _lines(file, settings.max_record_bytes):
            text = line if isinstance(line, Bad) else _decoded(line)
            yield number, {settings.column: text} if isinstance(text, str) else text
        return
    body = file.read(settings.max_record_bytes + 1)
    if len(body) > settings.max_record_bytes:
        yield 0, Bad("giant", f"over {settings.max_record_bytes} bytes; set corpus.txt_documents=line?")
        return
    text = _decoded(body.removeprefix(b"\xef\xbb\xbf"))
    yield 0, {settings.column: text} if isinstance(text, str) else text
