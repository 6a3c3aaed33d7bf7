"""A store is what docs/store.md says: read here with json, zarr, pyarrow and hashlib alone, and none of our readers."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from zarr.storage import ZipStore

from sae_census.flows.census.analyze import analyze


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, analyze_config: Callable[..., Any]) -> Path:
    root = tmp_path_factory.mktemp("format")
    analyze(analyze_config(root, catalog={"name": "tiny"}, codes="keep"))
    return root


def canonical(value: Any) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def records(root: Path, pattern: str) -> dict[Path, dict[str, Any]]:
    found = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(root.glob(pattern))}
    assert found
    return found


def exact(limbs: np.ndarray, scale: int) -> np.ndarray:
    return np.array([(int(high) * 2**62 + int(low)) / 2**scale for high, low in limbs])


@pytest.mark.parametrize(
    "pattern",
    [
        "corpora/*/manifest.json",
        "corpora/*/sources/*.json",
        "measures/*/manifest.json",
        "measures/*/receipts/*.json",
        "catalogs/*/identity.json",
        "catalogs/*/latest.json",
        "catalogs/*/[0-9]*/manifest.json",
    ],
)
def test_a_record_is_sealed_by_the_digest_of_the_rest_of_it(root: Path, pattern: str) -> None:
    for record in records(root, pattern).values():
        seal = record.pop("record_sha256")
        assert record["record_format"] == 2
        assert hashlib.sha256(canonical(record)).hexdigest() == seal


def test_folders_and_shards_are_named_by_hashes_of_their_content(root: Path) -> None:
    for path, fields in records(root, "corpora/*/manifest.json").items():
        del fields["record_format"], fields["record_sha256"]
        assert hashlib.sha256(canonical(fields)).hexdigest()[:32] == path.parent.name
    for path, record in records(root, "measures/*/manifest.json").items():
        assert hashlib.sha256(canonical(record["fields"])).hexdigest()[:32] == path.parent.name
    for path in root.glob("corpora/*/shards/*.parquet"):
        table = pq.read_table(path)
        columns = {name: table[name].to_pylist() for name in table.column_names}
        assert hashlib.sha256(json.dumps(columns).encode()).hexdigest()[:32] == path.stem


def test_a_partial_holds_the_statistics_of_the_codes_beside_them(root: Path) -> None:
    for receipt in records(root, "measures/*/receipts/*.json").values():
        path = root / receipt["partial"]["key"]
        body = path.read_bytes()
        assert (hashlib.sha256(body).hexdigest(), len(body)) == (
            receipt["partial"]["sha256"],
            receipt["partial"]["num_bytes"],
        )
        group = zarr.open_group(ZipStore(path, mode="r"), mode="r")
        read = {name: np.asarray(array[...]) for name, array in group.arrays()}
        assert group.attrs["shard_id"] == receipt["shard"]["shard_id"]
        start, row, value = read["codes_start"], read["codes_row"], read["codes_value"]
        for feature in range(len(start) - 1):
            inside = slice(start[feature], start[feature + 1])
            codes, rows = value[inside], row[inside]
            assert read["count"][feature] == len(codes)
            assert read["context_count"][feature] == len(set(rows.tolist()))
            assert read["maximum"][feature] == codes.max(initial=0)
            bins = np.clip((codes.view(np.int32) >> 20) - 888, 0, 255)
            assert np.array_equal(read["histogram"][feature], np.bincount(bins, minlength=256))
            top = read["top_value"][feature][read["top_row"][feature] >= 0]
            best = sorted((codes[rows == one].max() for one in set(rows.tolist())), reverse=True)
            assert top.tolist() == best[: len(top)]
            assert len(top) == min(len(best), read["top_value"].shape[1])
        sums = np.add.reduceat(np.append(value.astype(np.float64), 0), start[:-1]) * (np.diff(start) > 0)
        squares = np.add.reduceat(np.append(np.square(value, dtype=np.float64), 0), start[:-1]) * (np.diff(start) > 0)
        np.testing.assert_allclose(exact(read["total"], 40), sums, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(exact(read["total_square"], 48), squares, rtol=1e-9, atol=1e-9)
        assert read["l0_histogram"].sum() == receipt["tokens"]["counted"]
        assert (read["l0_histogram"] * np.arange(1025)).sum() == len(value)


def test_a_manifest_lists_every_file_of_its_snapshot(root: Path) -> None:
    for path, manifest in records(root, "catalogs/*/[0-9]*/manifest.json").items():
        files = {p.relative_to(path.parent).as_posix() for p in path.parent.rglob("*") if p.is_file()}
        assert files - {"manifest.json", "reserved.json"} == set(manifest["files"])
        for name, facts in manifest["files"].items():
            body = (path.parent / name).read_bytes()
            assert (hashlib.sha256(body).hexdigest(), len(body)) == (facts["sha256"], facts["num_bytes"])
        for site in manifest["measures"]:
            hook_point, sae = site.split("/")
            group = zarr.open_group(path.parent / "statistics.zarr", mode="r")[f"{hook_point}/{sae}"]
            counts = sum(
                np.asarray(
                    zarr.open_group(ZipStore(root / receipt["partial"]["key"], mode="r"), mode="r")["count"][...]
                )
                for receipt in records(root, f"measures/{manifest['measures'][site]}/receipts/*.json").values()
            )
            assert np.array_equal(group["count"][...], counts)
