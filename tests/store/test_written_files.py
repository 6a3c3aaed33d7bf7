"""Laws of the files that are written: any text goes out and comes back, whoever reads it."""

import csv
import gzip
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_census.io import answers
from sae_census.io.store import json_lines, tables
from sae_census.io.text.corpus import Document, ReadSettings, find_sources, read
from sae_census.steps.discovery.background import _label_rows

ENDS = "\r\n\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
"""What Python's splitlines splits at."""
TEXTS = st.text(st.sampled_from(ENDS + "\",; \t\\ab'é🙂\ufeff") | st.characters(exclude_categories=["Cs"]))
EACH = [f"a{mark}b" for mark in ENDS] + [ENDS, "\r", "a\r\nb", '"\r"', "'", " a ", "\ufeffx", "🙂,é"]


def csv_of(folder: Path, texts: list[str], writer: str) -> Path:
    path = folder / "a.csv"
    rows = [{"text": text, "n": n} for n, text in enumerate(texts)]
    if writer == "rows":
        answers.write_rows(path, rows)
    elif writer == "table":
        path.write_bytes(tables.csv_bytes(tables.plain(rows)))
    else:
        features = [FEATURE | {"feature_id": n, "top_spans": [{"text": text}]} for n, text in enumerate(texts)]
        answers.write(path, [{"features": features}], many=False)
    return path


FEATURE: dict[str, Any] = {
    "layer": 0, "stream": "resid_post", "score": 1.0, "proto_label": None,
    "scores": {"mean": 1.0, "coverage": 1.0, "max": 1.0, "selectivity": 1.0},
}  # fmt: skip
COLUMN = {"rows": "text", "table": "text", "answers": "top_span_text"}


@pytest.mark.parametrize("writer", COLUMN)
def test_every_reader_of_csv_gives_the_text_that_was_written(tmp_path: Path, writer: str) -> None:
    path, column = csv_of(tmp_path, EACH, writer), COLUMN[writer]
    with path.open(encoding="utf-8", newline="") as file:
        assert [row[column] for row in csv.DictReader(file, strict=True)] == EACH
    for engine in ("c", "python"):
        assert list(pd.read_csv(path, engine=engine, keep_default_na=False)[column]) == EACH
    options = pyarrow.csv.ParseOptions(newlines_in_values=True)
    assert pyarrow.csv.read_csv(path, parse_options=options)[column].to_pylist() == EACH
    found = duckdb.sql(f"SELECT {column} FROM read_csv('{path}', header=true, quote='\"', escape='\"', delim=',')")
    assert [row[0] for row in found.fetchall()] == EACH


@given(st.lists(TEXTS.filter(str.strip), min_size=1))
def test_any_text_goes_out_as_csv_and_comes_back_as_a_document(tmp_path_factory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("csv")
    settings = replace(SETTINGS, max_record_bytes=1 << 20)
    for writer in ("rows", "table"):
        (source,) = find_sources(str(csv_of(folder, texts, writer)), settings).sources
        assert [record.text for record in read(source, settings) if isinstance(record, Document)] == texts


SETTINGS = ReadSettings(
    column="text", split="train", revision=None, streaming=False, txt_documents="line", max_record_bytes=1000
)


@given(st.lists(TEXTS, min_size=1))
def test_any_text_is_one_json_line_and_comes_back(texts: list[str]) -> None:
    body = "".join(json_lines.line({"text": text}) for text in texts)
    assert [json.loads(line)["text"] for line in json_lines.lines(body.encode())] == texts
    assert [json.loads(line)["text"] for line in body.splitlines()] == texts, "those who split at more split there, too"


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("many", [False, True])
def test_answers_are_read_line_by_line_by_those_who_split_at_every_end(tmp_path: Path, suffix: str, many: bool) -> None:
    records = [{"line": n, "text": text} for n, text in enumerate(EACH)][: None if many else 1]
    answers.write(tmp_path / f"a{suffix}", records, many=many)
    text = (tmp_path / f"a{suffix}").read_text(encoding="utf-8")
    assert ([json.loads(one) for one in text.splitlines()] if suffix == ".jsonl" else json.loads(text)) == (
        records if many or suffix == ".jsonl" else records[0]
    )
    assert not set("\x85\u2028\u2029") & set(text)


@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_lines_of_a_corpus_end_at_line_feeds_only(tmp_path: Path, name: str, ascii_only: bool) -> None:
    body = "".join(json.dumps({"text": text}, ensure_ascii=ascii_only) + "\n" for text in EACH if text.strip())
    body = body.replace('{"text"', '{\r"text"')  # JSON's own white space
    (tmp_path / name).write_bytes(gzip.compress(body.encode()) if name.endswith("gz") else body.encode())
    (source,) = find_sources(str(tmp_path / name), SETTINGS).sources
    texts = [record.text for record in read(source, SETTINGS) if isinstance(record, Document)]
    assert texts == [text for text in EACH if text.strip()]


def test_lines_of_a_txt_file_end_at_line_feeds_only(tmp_path: Path) -> None:
    kept = ["a\rb", *(f"a{mark}b" for mark in ENDS[2:])]
    (tmp_path / "a.txt").write_bytes("\r\n".join(kept).encode())
    (source,) = find_sources(str(tmp_path / "a.txt"), SETTINGS).sources
    assert [record.text for record in read(source, SETTINGS) if isinstance(record, Document)] == kept


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_labels_may_hold_every_end_of_a_line(tmp_path: Path, mark: bytes) -> None:
    rows = [{"feature_id": n, "label": text} for n, text in enumerate(EACH)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "a.jsonl").write_bytes(mark + "\n".join([*lines, "", ""]).encode())
    assert _label_rows(tmp_path / "a.jsonl") == rows


# --- tables -------------------------------------------------------------------------------------------------


def test_folders_named_as_columns_are_none_for_our_readers(tmp_path: Path) -> None:
    folder = tmp_path / "layer=12" / "sae=x"
    folder.mkdir(parents=True)
    whole = pa.table({"layer": [3], "sae": ["late"], "text": ["a"]})
    (folder / "a.parquet").write_bytes(tables.to_bytes(whole))
    assert tables.read(folder / "a.parquet").equals(whole)
    assert tables.read(folder / "a.parquet", ["sae", "layer"]).equals(whole.select(["sae", "layer"]))
    assert tables.read(folder / "a.parquet", filters=[("sae", "=", "late")]).equals(whole)
    assert tables.read_any(folder / "a.parquet").equals(whole)
    assert list(tables.column_batches(folder / "a.parquet", "text")) == [["a"]]
    target = io.BytesIO()
    pq.write_table(pa.table({"text": ["a"]}), target)
    (folder / "b.parquet").write_bytes(target.getvalue())
    assert tables.read_any(folder / "b.parquet").column_names == ["text"]
