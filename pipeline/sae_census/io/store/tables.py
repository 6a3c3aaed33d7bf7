"""The door to pyarrow: Parquet with page checksums as bytes or files, and columns read back in batches."""

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet as pq

from sae_census.errors import CorruptError, SourceError

Table = pa.Table
ROWS_PER_GROUP = 4096

_OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 1,
    "write_page_checksum": True,
    "write_page_index": True,
    "store_schema": True,
}


def table(schema: pa.Schema, columns: dict[str, Any]) -> pa.Table:
    """Columns (lists, NumPy arrays or masked arrays) as a table of exactly this schema."""
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in schema}, schema=schema)


def plain(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Dicts of one shape as a table whose types are read off the values."""
    return pa.Table.from_pylist(list(rows))


def from_columns(columns: dict[str, list[Any]]) -> pa.Table:
    """Lists of equal length as a table; types are those of the values."""
    return pa.table(columns)


def from_rows(schema: pa.Schema, rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Dicts as a table of exactly this schema; what a row lacks is null, other keys are left out."""
    return pa.Table.from_pylist(list(rows), schema=schema)


def joined(schema: pa.Schema, parts: Iterable[pa.Table]) -> pa.Table:
    """Tables, one after another."""
    return pa.concat_tables([schema.empty_table(), *parts])


def csv_bytes(data: pa.Table) -> bytes:
    """A table without lists as the bytes of one CSV file with a header."""
    target = io.BytesIO()
    pyarrow.csv.write_csv(data, target)
    return target.getvalue()


def masked(values: np.ndarray) -> np.ma.MaskedArray:
    """A column in which NaN is null."""
    return np.ma.array(values, mask=np.isnan(values))


def to_bytes(data: pa.Table) -> bytes:
    """A table as the bytes of one Parquet file."""
    target = io.BytesIO()
    pq.write_table(data, target, row_group_size=ROWS_PER_GROUP, **_OPTIONS)
    return target.getvalue()


def write(path: Path, schema: pa.Schema, parts: Iterable[pa.Table]) -> int:
    """Tables, one after another, as one Parquet file; the number of rows."""
    num_rows = 0
    with pq.ParquetWriter(path, schema, **_OPTIONS) as writer:
        for part in parts:
            writer.write_table(part, row_group_size=ROWS_PER_GROUP)
            num_rows += part.num_rows
    return num_rows


def read(path: Path, columns: Sequence[str] | None = None, **options: Any) -> pa.Table:
    """A Parquet file of ours as a table, its page checksums verified; folders named `key=value` are no columns.

    Raises:
        CorruptError: if it is not readable or a checksum differs.
    """
    try:
        _check_footer(path)
        return pq.read_table(path, columns=columns, page_checksum_verification=True, partitioning=None, **options)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise CorruptError(f"{path} cannot be read: {error}") from error


def read_any(path: Path) -> pa.Table:
    """A Parquet file of anybody's as a table.

    Raises:
        ValueError: if it is none.
    """
    try:
        return pq.read_table(path, partitioning=None)
    except pa.ArrowException as error:
        raise ValueError(str(error)) from error


def _check_footer(path: Path) -> None:
    """Page checksums do not cover the footer: compare what it says twice."""
    with pq.ParquetFile(path) as file:
        facts = file.metadata
        rows = sum(facts.row_group(i).num_rows for i in range(facts.num_row_groups))
        stored = pa.ipc.read_schema(pa.py_buffer(base64.b64decode((facts.metadata or {}).get(b"ARROW:schema", b""))))
        if rows != facts.num_rows or not file.schema_arrow.equals(stored):
            raise ValueError("its footer contradicts itself")


def contains(data: pa.Table, column: str, text: str) -> pa.ChunkedArray:
    """A mask of the rows whose string holds a text."""
    return pc.match_substring(data[column], text)


def ragged(data: pa.Table, column: str) -> tuple[np.ndarray, np.ndarray]:
    """A list column as flat arrays: where each row starts (N + 1), and the values of all rows."""
    lists = data[column].combine_chunks()
    return lists.offsets.to_numpy().astype(np.int64), lists.values.to_numpy(zero_copy_only=False)


def lists(start: np.ndarray, values: np.ndarray, texts: Sequence[str] | None = None) -> pa.ListArray:
    """The list column of `ragged`; with `texts`, the values are indices into them."""
    flat = pa.array(values) if texts is None else pa.array(texts, pa.string()).take(pa.array(values))
    return pa.ListArray.from_arrays(pa.array(start, pa.int32()), flat)


def ipc_bytes(data: pa.Table) -> bytes:
    """A table as bytes that pass between processes."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, data.schema) as writer:
        writer.write_table(data)
    return sink.getvalue()


def from_ipc(body: bytes) -> pa.Table:
    """The table of `ipc_bytes`."""
    with pa.ipc.open_stream(body) as reader:
        return reader.read_all()


def column_batches(path: Path, column: str) -> Iterator[list[Any]]:
    """The values of one column of a user's Parquet or Arrow file, batch by batch.

    Raises:
        SourceError: if the file is not readable or lacks the column (the message names those it has).
    """
    try:
        if path.suffix.lower() == ".parquet":
            file = pq.ParquetFile(path)
            _require(path, column, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                yield _texts(batch.column(0))
        else:
            yield from _arrow_batches(path, column)
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{path} is not a readable {path.suffix[1:]} file: {error}") from error


def _texts(values: Any) -> list[Any]:
    try:
        return list(values.to_pylist())
    except UnicodeDecodeError:  # what is not UTF-8 becomes a lone surrogate, one bad record each
        raw = values.cast(pa.large_binary()).to_pylist()
        return [v if v is None else v.decode(errors="surrogateescape") for v in raw]


def _arrow_batches(path: Path, column: str) -> Iterator[list[Any]]:
    with pa.memory_map(str(path)) as source:
        try:
            reader: Any = pa.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pa.ArrowInvalid:  # the streaming form, which datasets writes
            source.seek(0)
            reader = batches = pa.ipc.open_stream(source)
        _require(path, column, reader.schema.names)
        for batch in batches:
            yield _texts(batch.column(column))


def _require(path: Path, column: str, names: Sequence[str]) -> None:
    if column not in names:
        raise missing_column(path, column, names)


def zstd_stream(path: Path) -> Any:
    """The decompressed bytes of a zst file; a file that was cut raises OSError instead of ending early."""
    return pa.input_stream(str(path), compression="zstd")


def missing_column(path: Path | str, column: str, names: Iterable[str]) -> SourceError:
    """The error for a source without the text column."""
    return SourceError(
        f"{path} has no column {column!r}; it has {', '.join(map(repr, sorted(names))) or 'none'}; "
        "set corpus.column to the one with the text"
    )
