"""Laws of reading text: every format gives the same documents, and a bad record costs itself and nothing else."""

import gzip
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import zstandard

from sae_census.errors import SourceError
from sae_census.io.text.corpus import BadRecord, Document, ReadSettings, Source, find_sources, read

SETTINGS = ReadSettings(
    column="text", split="train", revision=None, streaming=False, txt_documents="line", max_record_bytes=1000
)
TEXTS = ["one", 'two, "quoted"', "three\nlines\nlong", "vier äöü 🙂"]
ONE_LINE_TEXTS = [text.replace("\n", " ") for text in TEXTS]


def records_of(source: Any, settings: ReadSettings = SETTINGS, **options: Any) -> list[Document | BadRecord]:
    units = find_sources(source, settings, **options).sources
    return [record for unit in units for record in read(unit, settings)]


def texts_of(source: Any, settings: ReadSettings = SETTINGS, **options: Any) -> list[str]:
    records = records_of(source, settings, **options)
    assert all(isinstance(record, Document) for record in records), records
    return [record.text for record in records if isinstance(record, Document)]


def ids_of(source: Any, settings: ReadSettings = SETTINGS) -> list[str]:
    return [record.document_id for record in records_of(source, settings) if isinstance(record, Document)]


def written(path: Path, body: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)
    return str(path)


# --- formats ------------------------------------------------------------------------------------------------


def jsonl(texts: list[str]) -> bytes:
    return "".join(
        json.dumps({"id": i, "text": t}, ensure_ascii=i % 2 == 0) + "\n" for i, t in enumerate(texts)
    ).encode()


def array(texts: list[str], **options: Any) -> bytes:
    return json.dumps([{"id": i, "text": text} for i, text in enumerate(texts)], **options).encode()


def csv_of(texts: list[str], end: str = "\n") -> bytes:
    quoted = ('"' + text.replace('"', '""') + '"' for text in texts)
    return ("id,text" + end + "".join(f"{i},{text}{end}" for i, text in enumerate(quoted))).encode()


def table_of(texts: list[Any], kind: Any = None) -> pa.Table:
    return pa.table({"id": list(range(len(texts))), "text": pa.array(texts, kind)})


def parquet(table: pa.Table) -> bytes:
    target = io.BytesIO()
    pq.write_table(table, target, row_group_size=3)
    return target.getvalue()


def arrow(table: pa.Table, new: Callable[..., Any]) -> bytes:
    target = io.BytesIO()
    with new(target, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return target.getvalue()


TEXT_FILES = {
    "a.jsonl": jsonl(TEXTS),
    "array.json": array(TEXTS),
    "pretty.json": array(TEXTS, indent=2),
    "object.json": b'{"version": 1, "data": ' + array(TEXTS) + b"}",
    "lines.json": jsonl(TEXTS),
    "a.csv": csv_of(TEXTS),
    "crlf.csv": csv_of(TEXTS, "\r\n"),
    "a.txt": "\n".join(ONE_LINE_TEXTS).encode(),
}
BINARY_FILES = {
    "a.parquet": parquet(table_of(TEXTS)),
    "large.parquet": parquet(table_of(TEXTS, pa.large_string())),
    "dictionary.parquet": parquet(pa.table({"text": pa.array(TEXTS).dictionary_encode()})),
    "file.arrow": arrow(table_of(TEXTS), pa.ipc.new_file),
    "stream.arrow": arrow(table_of(TEXTS), pa.ipc.new_stream),
}


@pytest.mark.parametrize("name", [*TEXT_FILES, *BINARY_FILES])
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, (TEXT_FILES | BINARY_FILES)[name])
    assert texts_of(path) == (ONE_LINE_TEXTS if name == "a.txt" else TEXTS)
    assert len(set(ids_of(path))) == len(TEXTS)


@pytest.mark.parametrize("name", TEXT_FILES)
def test_packed_files_give_the_same_documents_even_in_several_frames(tmp_path: Path, name: str) -> None:
    body = TEXT_FILES[name]
    expected = texts_of(written(tmp_path / name, body))
    for suffix, pack in ((".gz", gzip.compress), (".zst", zstandard.ZstdCompressor(write_checksum=True).compress)):
        for cut in (0, len(body) // 2):
            packed = pack(body[:cut]) + pack(body[cut:]) if cut else pack(body)
            assert texts_of(written(tmp_path / (name + suffix), packed)) == expected


@pytest.mark.parametrize(
    "name",
    [
        "A.JSONL",
        "A.PARQUET",
        "A.JSONL.GZ",
    ],
)
def test_names_in_capitals_are_read_as_the_formats_they_name(tmp_path: Path, name: str) -> None:
    body = {"A.JSONL": jsonl(TEXTS), "A.PARQUET": BINARY_FILES["a.parquet"], "A.JSONL.GZ": gzip.compress(jsonl(TEXTS))}
    assert texts_of(written(tmp_path / name, body[name])) == TEXTS


def test_a_single_json_object_is_a_document_and_a_txt_file_may_be_one(tmp_path: Path) -> None:
    assert texts_of(written(tmp_path / "a.json", b'{"text": "one", "tags": ["x"]}')) == ["one"]
    whole = replace(SETTINGS, txt_documents="file")
    assert texts_of(written(tmp_path / "a.txt", b"\xef\xbb\xbfone\n\ntwo\r\n"), whole) == ["one\n\ntwo\r\n"]
    path = written(tmp_path / "a.txt.gz", gzip.compress(b"x" * 1001))
    assert [r.reason for r in records_of(path, whole) if isinstance(r, BadRecord)] == ["giant"]


# --- places -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """a.jsonl, b.csv.gz and deep/c.txt, one document each."""
    root = tmp_path / "data"
    written(root / "a.jsonl", jsonl(["A"]))
    written(root / "b.csv.gz", gzip.compress(csv_of(["B"])))
    written(root / "deep" / "c.txt", b"C")
    return root


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ("*.jsonl", ["A"]),
        ("*.*", ["A", "B"]),
        ("**/*.*", ["A", "B", "C"]),
        ("[ab].*", ["A", "B"]),
        ("dee?/*", ["C"]),
        (["*.jsonl", "deep/*.txt"], ["A", "C"]),
        (["*.jsonl", "a.jsonl", "*"], ["A", "B"]),
        (["deep/c.txt", "a.jsonl"], ["A", "C"]),
    ],
)
def test_globs_and_lists_find_files_sorted_and_each_once(
    folder: Path, parts: str | list[str], expected: list[str]
) -> None:
    source = str(folder / parts) if isinstance(parts, str) else [str(folder / part) for part in parts]
    assert texts_of(source) == expected
    if isinstance(source, list):
        assert texts_of(source[::-1]) == expected


@pytest.mark.parametrize("group_files", [1, 1000])
@pytest.mark.parametrize(
    ("twice", "expected"),
    [
        (["*.jsonl", "**/*.jsonl"], ["A"]),
        (["d*/c.txt", "deep/c.txt"], ["C"]),
    ],
)
def test_a_file_found_in_two_ways_is_read_once(
    folder: Path, twice: list[str], expected: list[str], group_files: int
) -> None:
    assert texts_of([str(folder / part) for part in twice], group_files=group_files) == expected


def test_documents_of_two_files_with_one_name_have_two_ids(tmp_path: Path) -> None:
    source = [written(tmp_path / part / "part-0.jsonl", jsonl([part])) for part in ("x", "y")]
    assert len(set(ids_of(source))) == 2


def test_a_mapping_names_slices_and_a_document_belongs_to_its_slice(folder: Path) -> None:
    source = {"z": str(folder / "a.jsonl"), "m": [str(folder / "b.csv.gz"), str(folder / "deep/c.txt")]}
    units = find_sources(source, SETTINGS).sources
    assert [(unit.slice, unit.names) for unit in units] == [
        ("m", ("b.csv.gz",)),
        ("m", ("c.txt",)),
        ("z", ("a.jsonl",)),
    ]
    assert set(ids_of(source)).isdisjoint(ids_of({"other": list(source["m"]), "another": source["z"]}))


def test_a_url_is_fetched_and_named_by_its_last_part(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAE_CENSUS_CACHE", str(folder.parent / "cache"))
    url = f"file://{folder}/a.jsonl"
    assert texts_of(url) == ["A"]
    assert ids_of(url) == ids_of(str(folder / "a.jsonl"))
    assert [p.name for p in (folder.parent / "cache").rglob("*") if p.is_file()] == ["a.jsonl"]
    with pytest.raises(SourceError, match=r"absent\.jsonl could not be fetched: "):
        find_sources(f"file://{folder}/absent.jsonl", SETTINGS)


@pytest.fixture
def dataset_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for a dataset; the library's cache lies beside it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "dataset").mkdir()
    return tmp_path / "dataset"


@pytest.mark.parametrize("kind", ["split folder", "shards", "card", "saved", "saved splits"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_directory_gives_documents_and_books_null_and_blank_rows(
    dataset_dir: Path, kind: str, streaming: bool
) -> None:
    rows = {"text": ["one", None, "two\nlines", " "], "n": [1, 2, 3, 4]}
    match kind:
        case "saved":
            datasets.Dataset.from_dict(rows).save_to_disk(dataset_dir)
        case "saved splits":
            datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows)}).save_to_disk(dataset_dir)
        case _:
            lines = [json.dumps({"text": t, "n": n}) + "\n" for t, n in zip(rows["text"], rows["n"], strict=True)]
            names = {"split folder": "train/a.jsonl", "shards": "data/train-00000-of-00001.jsonl", "card": "a.jsonl"}
            written(dataset_dir / names[kind], "".join(lines).encode())
            if kind == "card":
                written(dataset_dir / "README.md", b"---\nlicense: mit\n---\n# A dataset\n")
    settings = replace(SETTINGS, streaming=streaming)
    records = records_of(str(dataset_dir), settings)
    assert [r.text for r in records if isinstance(r, Document)] == ["one", "two\nlines"]
    assert [(r.file, r.line, r.reason) for r in records if isinstance(r, BadRecord)] == [
        ("dataset", 1, "null"),
        ("dataset", 3, "empty"),
    ]
    (unit,) = find_sources(str(dataset_dir), settings).sources
    (other,) = find_sources(str(dataset_dir), replace(SETTINGS, streaming=not streaming)).sources
    assert unit.identity(settings) == other.identity(SETTINGS), "streaming is how, not what"
    assert unit.identity(settings) != unit.identity(replace(settings, split="test"))
    moved = dataset_dir.rename(dataset_dir.parent.parent / f"moved-{dataset_dir.parent.name}")
    (moved / "dataset").mkdir()
    for file in [p for p in moved.iterdir() if p.name != "dataset"]:
        file.rename(moved / "dataset" / file.name)
    (unit_moved,) = find_sources(str(moved / "dataset"), settings).sources
    assert unit_moved.identity(settings) == unit.identity(settings)
    with pytest.raises(SourceError, match=r"has no column 'body'; it has .*'text'.*set corpus\.column"):
        find_sources(str(moved / "dataset"), replace(settings, column="body"))
    with pytest.raises(SourceError, match="neither a file nor a dataset with split 'no': "):
        find_sources(str(moved / "dataset"), replace(settings, split="no"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_dataset_is_refused_in_words(dataset_dir: Path, streaming: bool) -> None:
    written(dataset_dir / "train" / "a.jsonl", b'{"text": "one"}\n{"text": "tw')
    with pytest.raises(SourceError, match=r"corpus\.source .*dataset"):
        records_of(str(dataset_dir), replace(SETTINGS, streaming=streaming))


# --- bad records --------------------------------------------------------------------------------------------

GOOD = b'{"text": "good"}\n'
BAD_LINES = [
    (b'{"text": "\xff\xfe"}', "not_utf8"),
    (b'{"text": null}', "null"),
    (b'{"text": 5}', "not_text"),
    (b'{"text": ["a"]}', "not_text"),
    (b'{"text": {"a": "b"}}', "not_text"),
    (b'{"text": true}', "not_text"),
    (b'{"text": "trunca', "not_json"),
    (b'{"text": ""}', "empty"),
    (b'{"text": " \\n\\t "}', "empty"),
    (b"", "empty"),
    (b"   ", "empty"),
    (b'{"text": "' + b"x" * 990 + b'"}', "giant"),
    (b'{"text": "' + b"x" * 5_000_000 + b'"}', "giant"),
    (b'{"body": "x"}', "missing_column"),
    (b'["x"]', "not_an_object"),
    (b'"x"', "not_an_object"),
    (b"null", "not_an_object"),
    (b'{"text": "\\ud800"}', "not_utf8"),
    (b"garbage", "not_json"),
    (b'{"text": "a"}{"text": "b"}', "not_json"),
    (b"\x00\x01\x02", "not_json"),
    (b'{"text": "a\x00"}', "not_json"),
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=lambda value: repr(value)[:30])
def test_a_bad_line_is_one_bad_record_with_its_line_and_costs_no_other(
    tmp_path: Path, name: str, line: bytes, reason: str
) -> None:
    for before, after in ((2, 2), (2, 0)):
        end = b"\n" if after else b""  # at the end of the file, a line that was cut has no end
        body = GOOD * before + line + end + GOOD * after
        path = written(tmp_path / name, gzip.compress(body) if name.endswith("gz") else body)
        records = records_of(path)
        bad = [r for r in records if isinstance(r, BadRecord)]
        expected = [] if not line and not after else [(name, before + 1, reason)]
        assert [(r.file, r.line, r.reason) for r in bad] == expected
        assert len(records) - len(bad) == before + after
        assert all(len(r.detail) < 300 for r in bad)


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b'{"text": "x", "n": ' + b"1" * 5000 + b"}",
    ],
    ids=["deep", "long number"],
)
def test_a_line_that_the_parser_gives_up_on_is_a_bad_record(tmp_path: Path, line: bytes) -> None:
    path = written(tmp_path / "a.jsonl", GOOD + line + b"\n" + GOOD)
    records = records_of(path, replace(SETTINGS, max_record_bytes=1 << 20))
    assert [r.reason if isinstance(r, BadRecord) else r.text for r in records] == ["good", "not_json", "good"]


def test_a_deeply_nested_json_file_is_a_bad_record(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", b"[" * 100_000 + b"]" * 100_000)
    (record,) = records_of(path, replace(SETTINGS, max_record_bytes=1 << 20))
    assert isinstance(record, BadRecord)


@pytest.mark.parametrize(
    ("name", "body", "expected"),
    [
        ("bom.jsonl", b"\xef\xbb\xbf" + GOOD, ["good"]),
        ("bom.json", b"\xef\xbb\xbf[" + GOOD + b"]", ["good"]),
        ("bom.csv", b"\xef\xbb\xbftext\ngood\n", ["good"]),
        ("bom.txt", b"\xef\xbb\xbfgood\n", ["good"]),
        ("nul.jsonl", b'{"text": "a\\u0000b"}\n', ["a\0b"]),
        ("nul.csv", b"text\na\0b\n", ["a\0b"]),
        ("nul.txt", b"a\0b\n", ["a\0b"]),
        ("crlf.jsonl", GOOD.strip() + b"\r\n" + GOOD.strip() + b"\r\n", ["good", "good"]),
        ("crlf.txt", b"one\r\ntwo\r\n", ["one", "two"]),
        ("keys.jsonl", b'{"text": "first", "text": "last"}\n', ["last"]),
        ("nan.jsonl", b'{"text": "a", "n": NaN}\n', ["a"]),
        ("separators.jsonl", '{"text": "a\u2028b\x85c"}\n'.encode(), ["a\u2028b\x85c"]),
        ("separators.txt", "a\u2028b\x0bc\n".encode(), ["a\u2028b\x0bc"]),
        ("pair.jsonl", b'{"text": "\\ud83d\\ude42"}\n', ["🙂"]),
        ("just.jsonl", b'{"text": "' + b"x" * 900 + b'"}\n', ["x" * 900]),
    ],
)
def test_odd_but_sound_records_are_read(tmp_path: Path, name: str, body: bytes, expected: list[str]) -> None:
    assert texts_of(written(tmp_path / name, body)) == expected


def outline(records: list[Document | BadRecord]) -> list[object]:
    return [r.text if isinstance(r, Document) else (r.line, r.reason) for r in records]


NOT_UTF8 = pa.Array.from_buffers(
    pa.string(), 3, [None, pa.py_buffer(np.array([0, 1, 3, 4], np.int32)), pa.py_buffer(b"a\xff\xfeb")]
)


@pytest.mark.parametrize(
    ("name", "body", "expected"),
    [
        ("a.csv", b"id,text\n1,a\n2\n3,c\n", ["a", (3, "null"), "c"]),
        ("a.csv", b"id,text\n1,a\n2,\n3,c\n", ["a", (3, "empty"), "c"]),
        ("a.csv", b"id,text\n1,a\n2,\xff\n3,c\n", ["a", (3, "not_utf8"), "c"]),
        ("a.csv", b'id,text\n1,"a\nb"\n2,\xff\n3,c,d\n', ["a\nb", (4, "not_utf8"), "c"]),
        ("a.csv", b"id,text\n1,a\n2," + b"x" * 1001 + b"\n3,c\n", ["a", (3, "giant"), "c"]),
        ("a.csv", b'id,text\n1,a\n2,"cut', ["a", (3, "bad_row")]),
        ("a.txt", b"a\n\n\xff\n" + b"x" * 1001 + b"\nb", ["a", (2, "empty"), (3, "not_utf8"), (4, "giant"), "b"]),
        ("a.json", array(["a", "b"])[:-1] + b', {"text": null}, 7]', ["a", "b", (2, "null"), (3, "not_an_object")]),
        ("a.json", b"{", [(1, "not_json")]),
        ("a.parquet", parquet(table_of(["a", None, " ", "b"])), ["a", (1, "null"), (2, "empty"), "b"]),
        ("a.parquet", parquet(table_of(["a", "x" * 1001, "b"])), ["a", (1, "giant"), "b"]),
        ("a.parquet", parquet(table_of([1, 2], pa.int64())), [(0, "not_text"), (1, "not_text")]),
        ("a.parquet", parquet(table_of([b"a"], pa.binary())), [(0, "not_text")]),
        ("a.arrow", arrow(table_of(["a", None, "b"]), pa.ipc.new_stream), ["a", (1, "null"), "b"]),
        ("a.parquet",
            parquet(pa.table({"text": NOT_UTF8})),
            ["a", (1, "not_utf8"), "b"]),
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_bad_rows_of_other_formats_are_booked_one_by_one(
    tmp_path: Path, name: str, body: bytes, expected: list[object]
) -> None:
    assert outline(records_of(written(tmp_path / name, body))) == expected


@pytest.mark.parametrize(
    "field",
    [
        b"x" * 200_000,
        b'"' + b"x,yy\n" * 30_000 + b'"',
    ],
    ids=["one line", "many lines"],
)
def test_a_giant_field_of_a_csv_is_one_bad_record_at_its_own_line(tmp_path: Path, field: bytes) -> None:
    records = records_of(written(tmp_path / "a.csv", b"id,text\n1,a\n2," + field + b"\n3,c\n"))
    (bad,) = [r for r in records if isinstance(r, BadRecord)]
    assert [r.text for r in records if isinstance(r, Document)] == ["a", "c"]
    assert bad.reason in ("giant", "bad_row")
    assert 3 <= bad.line <= 3 + field.count(b"\n")


# --- bad sources --------------------------------------------------------------------------------------------

RANDOM = np.random.default_rng(0).integers(97, 122, 30_000).astype(np.uint8).tobytes()
LINES = b"".join(b'{"text": "%s"}\n' % RANDOM[i : i + 30] for i in range(0, 30_000, 30))


def damaged(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes(byte ^ 0xFF for byte in body[middle : middle + 20]) + body[middle + 20 :]


GZ = gzip.compress(LINES, mtime=0)
ZST = zstandard.ZstdCompressor(write_checksum=True).compress(LINES)


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("a.jsonl", b'{"body": "x", "id": 1}\n{"title": "y"}\n', "no column 'text'; it has 'body', 'id', 'title'"),
        ("a.jsonl", b'{"body": "x"}\n\n', "no column 'text'; it has 'body'"),
        ("a.jsonl", b'oops\n{"body": "x"}\n', "no column 'text'; it has 'body'"),
        ("a.json", b'[{"body": "x"}]', "no column 'text'; it has 'body'"),
        ("a.json", b"{}", "no column 'text'; it has none"),
        ("a.json", b'{"body": "x", "tags": ["a"]}', "no column 'text'"),
        ("a.csv", b"id,body\n1,x\n", "no column 'text'; it has 'body', 'id'; set corpus.column"),
        ("a.csv", b"x" * 200_000 + b",body\n1,2\n", "a.csv"),
        ("a.parquet", parquet(pa.table({"body": ["x"]})), "no column 'text'; it has 'body'"),
        ("a.arrow", arrow(pa.table({"body": ["x"]}), pa.ipc.new_stream), "no column 'text'; it has 'body'"),
        ("a.parquet", b"", "is not a readable parquet file"),
        ("a.parquet", damaged(BINARY_FILES["a.parquet"]), "is not a readable parquet file"),
        ("a.parquet", BINARY_FILES["a.parquet"][:-9], "is not a readable parquet file"),
        ("a.arrow", b"garbage", "is not a readable arrow file"),
        ("a.jsonl.gz", GZ[:-9], "is damaged: Compressed file ended"),
        ("a.jsonl.gz", b"not gzip", "is damaged: Not a gzipped file"),
        ("a.jsonl.gz", GZ[:-8] + bytes(8), "is damaged: CRC check failed"),
        ("a.jsonl.gz", GZ[:10] + b"\xff" + GZ[11:], "is damaged"),
        ("a.jsonl.zst", b"not zstd at all", "is damaged"),
        ("a.jsonl.zst", damaged(ZST), "is damaged"),
        ("a.jsonl.zst", ZST[: len(ZST) // 2], "is damaged"),
        ("a.jsonl.zst", ZST[:-1], "is damaged"),
        ("a.json", b"[\n" + GOOD[:-1] + b",\n" + GOOD, "a.json"),
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_a_source_that_is_not_what_it_claims_is_refused_in_words(
    tmp_path: Path, name: str, body: bytes, message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        records_of(written(tmp_path / name, body))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("absent.jsonl", r"absent\.jsonl does not exist; expected a file, a glob, a URL or a dataset"),
        ("absent", "absent does not exist"),
        ("*.jsonl", r"\*\.jsonl matches no file"),
        ("a.pdf", r"a\.pdf is of no known format; expected \.jsonl, \.json, \.csv, .* also with \.gz or \.zst"),
        ("a.parquet.gz", r"a\.parquet\.gz is of no known format"),
        ("*", "is of no known format"),
        ("noformat", "noformat is of no known format"),
    ],
)
def test_a_source_that_names_nothing_readable_is_refused_in_words(tmp_path: Path, part: str, message: str) -> None:
    for name in ("a.pdf", "a.parquet.gz", "noformat"):
        written(tmp_path / name, b"x")
    with pytest.raises(SourceError, match=message):
        find_sources(str(tmp_path / part), SETTINGS)
    with pytest.raises(SourceError, match="does not exist"):
        find_sources({"a": str(tmp_path / "absent.csv")}, SETTINGS)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.jsonl.gz", "header.csv", "list.json"])
def test_an_empty_file_is_a_source_without_documents(tmp_path: Path, name: str) -> None:
    body = {"header.csv": b"id,text\n", "list.json": b"[]"}.get(name, b"")
    path = written(tmp_path / name, body)
    assert len(find_sources(path, SETTINGS).sources) == 1
    assert records_of(path) == []


def test_a_file_that_changed_or_went_since_it_was_found_is_refused(tmp_path: Path) -> None:
    path = Path(written(tmp_path / "a.jsonl", GOOD))
    (unit,) = find_sources(str(path), SETTINGS).sources
    path.write_bytes(GOOD * 2)
    with pytest.raises(SourceError, match=r"a\.jsonl changed while it was being prepared; run the command again"):
        list(read(unit, SETTINGS))
    path.unlink()
    with pytest.raises(SourceError, match=r"a\.jsonl cannot be read: No such file"):
        list(read(unit, SETTINGS))


# --- identity -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TEXT_FILES, *BINARY_FILES])
def test_document_ids_stay_when_the_folder_moves(tmp_path: Path, name: str) -> None:
    body = (TEXT_FILES | BINARY_FILES)[name]
    here, there = (written(tmp_path / place / "x" / name, body) for place in ("here", "there"))
    assert ids_of(here) == ids_of(there) == ids_of(str(tmp_path / "here" / "x" / "*"))
    assert ids_of(str(tmp_path / "here" / "*" / "*")) == ids_of(str(tmp_path / "there" / "*" / "*"))
    units = [find_sources(path, SETTINGS).sources[0] for path in (here, there)]
    assert units[0].identity(SETTINGS) == units[1].identity(SETTINGS)


@pytest.mark.parametrize(
    "body_of",
    [jsonl, array, csv_of, lambda t: parquet(table_of(t)), lambda t: "\n".join(t).encode()],
    ids=["a.jsonl", "a.json", "a.csv", "a.parquet", "a.txt"],
)
def test_document_ids_stay_when_rows_are_appended_or_turn_bad(
    tmp_path: Path, body_of: Callable[[list[str]], bytes], request: pytest.FixtureRequest
) -> None:
    path = tmp_path / request.node.callspec.id
    before = ids_of(written(path, body_of(ONE_LINE_TEXTS)))
    assert ids_of(written(path, body_of([*ONE_LINE_TEXTS, "new", "newer"])))[: len(before)] == before
    assert ids_of(written(path, body_of(["one", " ", *ONE_LINE_TEXTS[2:]]))) == [before[0], *before[2:]]


def test_identities_change_with_whatever_changes_documents_and_with_nothing_else(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", jsonl(TEXTS))
    (unit,) = find_sources(path, SETTINGS).sources

    def identities() -> Iterator[tuple[str, str]]:
        yield "as it is", unit.identity(SETTINGS)
        for key, value in {"column": "body", "txt_documents": "file", "max_record_bytes": 2000}.items():
            yield key, unit.identity(replace(SETTINGS, **{key: value}))
        for key, value in {"slice": "other", "names": ("b.jsonl",), "digest": "0" * 64}.items():
            yield key, replace(unit, **{key: value}).identity(SETTINGS)

    found = dict(identities())
    assert len(set(found.values())) == len(found)
    for key, value in {"streaming": True, "split": "test", "revision": "main"}.items():
        assert unit.identity(replace(SETTINGS, **{key: value})) == found["as it is"], f"{key} is for datasets"
    assert replace(unit, paths=("elsewhere",)).identity(SETTINGS) == found["as it is"]


def test_a_new_file_changes_one_group_of_files_only(tmp_path: Path) -> None:
    for i in range(40):
        written(tmp_path / f"f{i:02}.txt", f"text {i}".encode())

    def groups() -> list[Source]:
        return list(find_sources(str(tmp_path / "*.txt"), SETTINGS, group_files=5).sources)

    before = groups()
    assert 4 <= len(before) <= 16
    assert [name for unit in before for name in unit.names] == [f"f{i:02}.txt" for i in range(40)]
    for i in range(40):
        new = tmp_path / f"f{i:02}x.txt"
        written(new, b"new")
        after = groups()
        gone = [unit for unit in before if unit not in after]
        assert len(gone) <= 1
        assert sum(len(unit.names) for unit in after) == 41
        new.unlink()
    assert groups() == before
    written(tmp_path / "f07.txt", b"changed")
    assert len([unit for unit in before if unit not in groups()]) == 1
