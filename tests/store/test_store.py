"""Laws of what lies on disk: a put is whole or absent, equal arrays are equal bytes, and damage does not pass."""

import errno
import io
import os
import resource
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae_census.errors import CensusError, CorruptError, StorageError
from sae_census.io.store import schemas, tables, zarr_files
from sae_census.io.store.blobs import LocalBlobs

KEY, OLD, NEW = "folder/key.json", b"old bytes", b"new bytes, and more of them" * 200

# --- blobs --------------------------------------------------------------------------------------------------


def _failing(number: int) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@contextmanager
def _short_files() -> Iterator[None]:
    """The kernel itself refuses to write more than 100 bytes of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def _refusing(monkeypatch: pytest.MonkeyPatch, step: str, number: int) -> Iterator[None]:
    with monkeypatch.context() as patch:
        match step:
            case "write":
                with _short_files():
                    yield
                return
            case "fsync":
                patch.setattr(os, "fsync", _failing(number))
            case "rename":
                patch.setattr(Path, "replace", _failing(number))
            case _:
                patch.setattr(os, "link", _failing(number))
        yield


@pytest.mark.parametrize(
    ("step", "number", "message"),
    [
        ("write", errno.EFBIG, "cannot be written: File too large"),
        ("fsync", errno.ENOSPC, "is full; free some space and run the same command again: finished shards are kept"),
        ("fsync", errno.EDQUOT, "is full; free some space"),
        ("fsync", errno.EIO, "cannot be written: Input/output error"),
        ("rename", errno.EROFS, "cannot be written: Read-only file system"),
        ("link", errno.EROFS, "cannot be written: Read-only file system"),
    ],
)
def test_a_refused_write_leaves_no_draft_and_the_old_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int, message: str
) -> None:
    blobs = LocalBlobs(tmp_path)
    blobs.put(KEY, OLD)
    write = blobs.put_if_absent if step == "link" else blobs.put
    with _refusing(monkeypatch, step, number), pytest.raises(StorageError, match=message):
        write(KEY, NEW)
    with _refusing(monkeypatch, step, number), pytest.raises(StorageError, match=str(tmp_path)):
        write("other/key", NEW)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["key.json"]
    assert blobs.get(KEY) == OLD
    assert not blobs.exists("other/key")
    blobs.put(KEY, NEW)
    assert blobs.get(KEY) == NEW


def test_an_interrupt_in_the_middle_of_a_put_leaves_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    blobs = LocalBlobs(tmp_path)
    blobs.put(KEY, OLD)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            blobs.put(KEY, NEW)
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["key.json"]
    assert blobs.get(KEY) == OLD


@pytest.mark.parametrize("key", ["key", "folder/key"])
def test_a_root_that_is_a_file_is_refused_in_words(tmp_path: Path, key: str) -> None:
    (tmp_path / "root").write_text("not a folder")
    with pytest.raises(StorageError, match="cannot be written"):
        LocalBlobs(tmp_path / "root").put(key, NEW)


def test_of_eight_threads_exactly_one_creates_a_key(tmp_path: Path) -> None:
    blobs, together = LocalBlobs(tmp_path), threading.Barrier(8)
    for attempt in range(10):

        def create(i: int, key: str = f"snapshots/{attempt}.json") -> bool:
            together.wait()
            return blobs.put_if_absent(key, f"{i}".encode() * 1000)

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(create, range(8)))
        assert won.count(True) == 1
        assert blobs.get(f"snapshots/{attempt}.json") == f"{won.index(True)}".encode() * 1000
    assert not [p for p in tmp_path.rglob(".*") if p.is_file()]


def test_of_eight_processes_exactly_one_creates_each_key(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib\n"
        "from sae_census.io.store.blobs import LocalBlobs\n"
        "blobs, me = LocalBlobs(sys.argv[1]), sys.argv[2]\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "print(*(int(blobs.put_if_absent(f'k{i}', me.encode())) for i in range(30)))"
    )
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path), str(i)], **pipes) for i in range(8)]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    won = np.array([worker.communicate(timeout=60)[0].split() for worker in workers], int)
    assert won.shape == (8, 30)
    assert (won.sum(axis=0) == 1).all()
    assert [LocalBlobs(tmp_path).get(f"k{i}").decode() for i in range(30)] == [str(w) for w in won.argmax(axis=0)]


def test_a_reader_beside_a_writer_never_sees_half_a_body(tmp_path: Path) -> None:
    blobs, bodies = LocalBlobs(tmp_path), (b"a" * 300_000, b"b" * 200_000)
    blobs.put(KEY, bodies[0])
    done = threading.Event()

    def reads() -> set[bytes]:
        seen = set()
        while not done.is_set():
            seen.add(blobs.get(KEY))
        return seen

    with ThreadPoolExecutor(1) as pool:
        seen = pool.submit(reads)
        for i in range(60):
            blobs.put(KEY, bodies[i % 2])
        done.set()
        assert seen.result() <= set(bodies)


def test_drafts_are_not_listed_and_keys_come_sorted(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path)
    for key in ("b/2", "b/10", "b/1/x", "a", "c/y"):
        blobs.put(key, b"")
    (tmp_path / "b" / ".draft-0123").write_bytes(b"left by a killed writer")
    assert list(blobs.list("b")) == ["b/1/x", "b/10", "b/2"]
    assert list(blobs.list("nothing")) == []
    blobs.delete("b/2")
    blobs.delete("b/2")
    assert list(blobs.list("")) == ["a", "b/1/x", "b/10", "c/y"]


def test_keys_are_sorted_as_keys(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path)
    for key in ("r/a/b", "r/a-b"):
        blobs.put(key, b"")
    assert list(blobs.list("r")) == sorted(["r/a/b", "r/a-b"])


def test_missing_keys_are_named_and_large_files_are_adopted(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path)
    for read in (blobs.get, blobs.digest):
        with pytest.raises(CorruptError, match=f"some/key is missing from {tmp_path}"):
            read("some/key")
    scratch = blobs.scratch()
    (scratch / "large").write_bytes(NEW)
    blobs.adopt("new/place", scratch / "large")
    assert blobs.get("new/place") == NEW
    assert list(scratch.iterdir()) == []
    assert blobs.free_bytes() > 0


# --- packs --------------------------------------------------------------------------------------------------


def arrays() -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return {
        "site0": {
            "wide": rng.integers(-(2**62), 2**62, (5000, 3)),
            "flat": rng.random(300_000).astype(np.float32),
            "none": np.zeros(0, np.int32),
            "no_columns": np.zeros((5, 0), np.int32),
            "zeros": np.zeros(5000, np.int64),
        },
        "": {"root": np.arange(4, dtype=np.int32)},
    }


@pytest.fixture(scope="module")
def pack_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packs") / "pack.zarr.zip"
    path.write_bytes(zarr_files.pack(arrays(), {"format": 1, "names": ["a", "é"]}))
    return path


def test_equal_arrays_give_equal_bytes_in_any_order_layout_and_process() -> None:
    rng = np.random.default_rng(1)
    square = rng.random((40, 30)).astype(np.float32)
    body = zarr_files.pack({"a": {"x": square, "y": square[0]}, "b": {"z": square[:, 0]}}, {"k": 1, "l": 2})
    shuffled = {"b": {"z": square.T[0]}, "a": {"y": square[0].copy(), "x": np.asfortranarray(square)}}
    assert zarr_files.pack(shuffled, {"k": 1, "l": 2}) == body
    entries = zipfile.ZipFile(io.BytesIO(body)).infolist()
    assert [entry.filename for entry in entries] == sorted(entry.filename for entry in entries)
    assert {(e.date_time, e.compress_type) for e in entries} == {((1980, 1, 1, 0, 0, 0), zipfile.ZIP_STORED)}
    changed = square.copy()
    changed[3, 3] += 1
    assert zarr_files.pack({"a": {"x": changed, "y": square[0]}, "b": {"z": square[:, 0]}}, {"k": 1, "l": 2}) != body
    program = (
        "import hashlib, numpy as np; from sae_census.io.store import zarr_files\n"
        "print(hashlib.sha256(zarr_files.pack({'a': {'x': np.arange(9)}, 'b': {}}, {'k': 1})).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_arrays_and_ranges_of_a_pack_read_back_as_they_were_written(pack_path: Path) -> None:
    rng = np.random.default_rng(2)
    with zarr_files.Pack(pack_path) as pack:
        assert pack.attributes == {"format": 1, "names": ["a", "é"]}
        for group, members in arrays().items():
            for name, expected in members.items():
                found = pack.read(f"{group}/{name}".lstrip("/"))
                assert found.dtype == expected.dtype
                assert np.array_equal(found, expected)
        wide, flat = arrays()["site0"]["wide"], arrays()["site0"]["flat"]
        cuts = [(0, 0), (2047, 2049), (0, 5000), (4999, 5000), *map(tuple, np.sort(rng.integers(0, 5001, (12, 2))))]
        for start, stop in cuts:
            assert np.array_equal(pack.read("site0/wide", start, stop), wide[start:stop])
            assert np.array_equal(pack.read("site0/flat", 50 * start, 50 * stop), flat[50 * start : 50 * stop])
        with pytest.raises(CorruptError, match="has no array site0/absent"):
            pack.read("site0/absent")
        with pytest.raises(CorruptError, match=r"has no array site0$"):
            pack.read("site0")


@pytest.mark.parametrize("keep", [0, 1, 1000, -1])
def test_a_cut_pack_is_refused(pack_path: Path, tmp_path: Path, keep: int) -> None:
    (tmp_path / "cut.zip").write_bytes(pack_path.read_bytes()[:keep])
    with pytest.raises(CorruptError, match=r"cut\.zip is not a readable partial"):
        zarr_files.Pack(tmp_path / "cut.zip")
    with pytest.raises(CorruptError, match=r"absent\.zip is not a readable partial"):
        zarr_files.Pack(tmp_path / "absent.zip")


SMALL = {"s": {"ints": np.arange(300), "floats": np.linspace(0, 1, 60, dtype=np.float32).reshape(20, 3)}}


def flipped(body: bytes, positions: Iterator[int] | range | list[int]) -> Iterator[tuple[int, bytes]]:
    """The body with one bit of the byte at each position turned over."""
    for position in positions:
        yield position, body[:position] + bytes([body[position] ^ (1 << (5 * position % 8))]) + body[position + 1 :]


def outcomes(path: Path, bodies: Iterator[tuple[int, bytes]]) -> dict[str, list[int]]:
    """What reading everything does, by position: `same`, `silently wrong`, or the name of the error."""
    found: dict[str, list[int]] = {}
    for position, body in bodies:
        path.write_bytes(body)
        try:
            with zarr_files.Pack(path) as pack:
                read = {name: pack.read(f"s/{name}") for name in SMALL["s"]}
                right = pack.attributes == {"format": 1}
            for name, expected in SMALL["s"].items():
                right = right and read[name].dtype == expected.dtype and np.array_equal(read[name], expected)
            outcome = "same" if right else "silently wrong"
        except CorruptError:
            outcome = "CorruptError"
        except Exception as error:  # noqa: BLE001 - any error is a detection here
            outcome = type(error).__name__
        found.setdefault(outcome, []).append(position)
    return found


@pytest.fixture(scope="module")
def damage(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[int]]]:
    """Outcomes of flips in 200 random bytes of a pack's entries, and in every byte of its table of contents."""
    body = zarr_files.pack(SMALL, {"format": 1})
    contents = zipfile.ZipFile(io.BytesIO(body)).start_dir
    path = tmp_path_factory.mktemp("damage") / "pack.zip"
    entries = np.random.default_rng(3).choice(contents, 200, replace=False).tolist()
    return {
        "entries": outcomes(path, flipped(body, entries)),
        "contents": outcomes(path, flipped(body, range(contents, len(body)))),
    }


@pytest.mark.parametrize(
    "part",
    [
        "entries",
        "contents",
    ],
)
def test_no_flipped_bit_of_a_pack_reads_as_other_numbers(damage: dict[str, dict[str, list[int]]], part: str) -> None:
    assert damage[part].get("silently wrong", []) == []
    assert sum(len(positions) for name, positions in damage[part].items() if name != "same") > 100


def test_a_flipped_bit_of_a_pack_is_reported_as_corruption(damage: dict[str, dict[str, list[int]]]) -> None:
    assert set(damage["entries"]) <= {"same", "CorruptError"}


# --- tables -------------------------------------------------------------------------------------------------

_KEY = "hook_point: string, sae: string, feature_id: int32, "
SCHEMAS = {
    "FEATURES": _KEY + "layer: int32, stream: string, rank: int32, score: double, count: int64, "
    "tokens_counted: int64, frequency: double, context_count: int64, context_frequency: double, mean: double, "
    "mean_when_firing: double, std: double, max: double, p50: double, p95: double, p99: double, dead: bool, "
    "proto_label: string, label: string, decoder_norm: double",
    "SLICES": _KEY + "slice: string, count: int64, tokens_counted: int64, frequency: double, sum: double, "
    "mean_when_firing: double, max: double",
    "SPANS": _KEY + "group: string, sample_rank: int32, shard_id: string, context_id: int32, document_id: string, "
    "slice: string, position: int32, start: int32, stop: int32, value: float, text: string, "
    "tokens: list<string>, token_ids: list<int32>, values: list<float>",
    "SHARD": "input_ids: list<int32>, document_id: list<string>, document_start: list<int32>, slice: string",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_tables_have_the_columns_that_the_design_binds(name: str) -> None:
    schema = getattr(schemas, name)
    found = ", ".join(f"{field.name}: {field.type}" for field in schema)
    assert found.replace("element: ", "").replace("item: ", "") == SCHEMAS[name]


def shard_table(num_rows: int) -> pa.Table:
    rng = np.random.default_rng(4)
    columns = {
        "input_ids": [rng.integers(0, 300, 6).tolist() for _ in range(num_rows)],
        "document_id": [[f"d{i}", f"d{i + 1}"] for i in range(num_rows)],
        "document_start": [[0, 3]] * num_rows,
        "slice": ["all"] * num_rows,
    }
    return tables.table(schemas.SHARD, columns)


def test_tables_come_back_from_bytes_files_and_messages_in_bounded_row_groups(tmp_path: Path) -> None:
    whole = shard_table(9000)
    assert tables.to_bytes(whole) == tables.to_bytes(shard_table(9000))
    (tmp_path / "a.parquet").write_bytes(tables.to_bytes(whole))
    num_rows = tables.write(tmp_path / "b.parquet", schemas.SHARD, [whole.slice(0, 5), whole.slice(5)])
    assert num_rows == 9000
    for path in (tmp_path / "a.parquet", tmp_path / "b.parquet"):
        assert tables.read(path).equals(whole)
        groups = pq.ParquetFile(path).metadata
        sizes = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
        assert max(sizes) <= tables.ROWS_PER_GROUP
        assert groups.row_group(0).column(0).is_stats_set
    assert tables.from_ipc(tables.ipc_bytes(whole)).equals(whole)
    start, values = tables.ragged(whole, "input_ids")
    assert tables.lists(start, values).equals(whole["input_ids"].combine_chunks())
    ids, place = np.unique(tables.ragged(whole, "document_id")[1], return_inverse=True)
    start, _ = tables.ragged(whole, "document_id")
    assert tables.lists(start, place, ids.tolist()).equals(whole["document_id"].combine_chunks())
    with pytest.raises(CorruptError, match=r"absent\.parquet cannot be read"):
        tables.read(tmp_path / "absent.parquet")


@pytest.mark.parametrize(
    "part",
    [
        "pages",
        "footer",
    ],
)
def test_no_flipped_bit_of_a_table_reads_as_other_values(tmp_path: Path, part: str) -> None:
    table, path = shard_table(20), tmp_path / "shard.parquet"
    body = tables.to_bytes(table)
    footer = len(body) - 8 - int.from_bytes(body[-8:-4], "little")
    positions = range(footer) if part == "pages" else range(footer, len(body))
    silent, detected = [], 0
    for position, damaged in flipped(body, positions):
        path.write_bytes(damaged)
        try:
            found = tables.read(path, table.column_names)
            columns = {name: found[name] for name in table.column_names}  # as every reader does: by name
        except (CensusError, KeyError, UnicodeDecodeError):  # a damaged name is no column of ours
            detected += 1
            continue
        if any(columns[name].to_pylist() != table[name].to_pylist() for name in columns):
            silent.append(position)
    assert silent == []
    assert detected > len(positions) // 2
