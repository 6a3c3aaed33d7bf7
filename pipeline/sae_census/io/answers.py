"""Answers of discovery as files: the extension chooses JSON, JSON lines, CSV or Parquet."""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sae_census.errors import ConfigError, StorageError
from sae_census.io.store import json_lines, schemas, tables
from sae_census.io.store.blobs import LocalBlobs

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
CSV_COLUMNS = (
    "feature_id", "layer", "stream", "score", "mean", "coverage", "max", "selectivity", "proto_label", "top_span_text",
)  # fmt: skip
_ROWS = 4096


def check_suffix(path: Path) -> None:
    """Raises ConfigError if the extension is none of those that can be written."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--out {path} ends in {path.suffix or 'nothing'}; expected one of {', '.join(SUFFIXES)}")


def write(path: Path, records: Iterable[dict[str, Any]], *, many: bool) -> None:
    """Write answers whole, or not at all.

    CSV and Parquet have a row for each feature. CSV has exactly `CSV_COLUMNS`, and `line` and `id` after them where
    there are many; errors have no rows there.

    Args:
        path: what to write; its folder is made.
        records: answers as dicts; in a batch with `line`, perhaps `id`, perhaps `error`.
        many: whether they are of a batch: then .json is a list.

    Raises:
        StorageError: if the disk refuses.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            tables.write(draft, schemas.FOUND, _tables(records))
        else:
            with draft.open("w", encoding="utf-8", newline="") as target:
                target.writelines(_text(path.suffix, records, many=many))
        blobs = LocalBlobs(path.parent)
        blobs.adopt(path.name, draft)
        blobs.sync()  # the parts of a batch are removed next
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        draft.unlink(missing_ok=True)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Plain rows of one shape as .jsonl, .csv or .parquet, whole or not at all.

    Raises:
        StorageError: if the disk refuses.
    """
    if path.suffix == ".parquet":
        body = tables.to_bytes(tables.plain(rows))
    elif path.suffix == ".csv":
        columns = list(rows[0]) if rows else []
        body = "".join(map(_csv_line, [columns, *([row[name] for name in columns] for row in rows)])).encode()
    else:
        body = "".join(map(json_lines.line, rows)).encode()
    LocalBlobs(path.parent).put(path.name, body)


def _text(suffix: str, records: Iterable[dict[str, Any]], *, many: bool) -> Iterator[str]:
    if suffix == ".jsonl":
        yield from map(json_lines.line, records)
    elif suffix == ".csv":
        columns = [*CSV_COLUMNS, *(("line", "id") if many else ())]
        yield _csv_line(columns)
        for row in _rows(records):
            yield _csv_line([row[name] for name in columns])
    elif many:
        for number, record in enumerate(records):
            yield ("[" if number == 0 else ",\n") + json_lines.dumps(record)
        yield "]\n"
    else:
        yield from (json_lines.dumps(record, indent=1) + "\n" for record in records)


def _csv_line(cells: Iterable[Any]) -> str:
    """A row that ends in a line feed."""
    line = io.StringIO()  # the writer quotes what its own end of a line holds, and readers split at a lone \r, too
    csv.writer(line, lineterminator="\r\n").writerow(cells)
    return line.getvalue().removesuffix("\r\n") + "\n"


def _rows(records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for record in records:
        name = record.get("id")
        for feature in record.get("features", ()):
            spans = feature["top_spans"]
            yield (
                feature
                | feature["scores"]
                | {
                    "top_span_text": spans[0]["text"] if spans else None,
                    "line": record.get("line"),
                    "id": name if name is None or isinstance(name, str) else json.dumps(name),
                }
            )


def _tables(records: Iterable[dict[str, Any]]) -> Iterator[tables.Table]:
    waiting: list[dict[str, Any]] = []
    for row in _rows(records):
        waiting.append(row)
        if len(waiting) == _ROWS:
            yield tables.from_rows(schemas.FOUND, waiting)
            waiting = []
    yield tables.from_rows(schemas.FOUND, waiting)
