"""What SAEs are called, whose labels go where, and catalogs that do not fit."""

import json
import shutil
from pathlib import Path

import pytest
from discovery_bench import SITES, TEXT, Bench, ask, bench, catalog_bench, gates

from sae_census.config import SaeConfig
from sae_census.errors import ConfigError, CorruptError, IdentityError
from sae_census.flows.discovery.discover import open_discoverer
from sae_census.steps.model.sae_map import saes_named


def test_a_folder_of_saes_is_all_of_them(sae_dirs):
    found = saes_named(str(sae_dirs["early"].parent))
    assert [one.path for one in found] == sorted(str(path) for path in sae_dirs.values())
    assert [one.path for one in saes_named(str(sae_dirs["late"]))] == [str(sae_dirs["late"])]
    assert [one.path for one in saes_named("org/repo/folder")] == ["org/repo/folder"]


@pytest.mark.parametrize(
    "content",
    [
        "0/resid_post: {early}\n1/resid_post: {late}",
        "blocks.0.hook_resid_post: {early}\nblocks.1.hook_resid_post: {late}",
        "0: {{resid_post: {early}}}\n1: {{resid_post: {late}}}",
        "0:\n  resid_post: early\n1:\n  resid_post: late",
    ],
)
def test_a_mapping_puts_each_sae_where_it_says(content, sae_dirs, tmp_path):
    for name, path in sae_dirs.items():
        (tmp_path / name).symlink_to(path)
    file = tmp_path / "map.yaml"
    file.write_text(content.format(**sae_dirs))
    found = saes_named(str(file))
    assert [one.hook_point for one in found] == [hook_point for hook_point, _ in SITES]
    assert [Path(one.path).name for one in found] == ["early", "late"]
    assert all(Path(one.path).is_dir() for one in found)


def test_a_mapping_may_name_the_same_sae_at_two_places(bench, sae_dirs, tmp_path):
    file = tmp_path / "map.yaml"
    file.write_text(f"1/resid_pre: {sae_dirs['late']}\n1/resid_post: {sae_dirs['late']}\n")
    discoverer = Bench(model=bench.model, saes=tuple(saes_named(str(file)))).open()
    answer = ask(discoverer, text="river water", layers=[1], streams=["resid_pre"], min_coverage_pct=0.0)
    assert {feature.hook_point for feature in answer.features} == {"blocks.1.hook_resid_pre"}
    both = ask(discoverer, text="river water", min_coverage_pct=0.0, sae_id="late")
    assert both.analyzed.streams == ["resid_pre", "resid_post"]


@pytest.mark.parametrize(
    "content",
    ["", "[]", "a", "22: path", "22/resid: path", "22/resid_pre: 5", "22: {resid_pre: [a]}", "0/resid_post: ''",
     "{unclosed", "\x00", "blocks.x.hook_resid_post: path", "-1/resid_pre: path", "null: path", "22: {}", "22:"],
)  # fmt: skip
def test_a_mapping_that_is_none_is_refused(content, tmp_path):
    file = tmp_path / "map.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"map\.yaml"):
        saes_named(str(file))


def test_a_mapping_that_is_missing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        saes_named(str(tmp_path / "none.yaml"))


LABEL_ROWS = [
    {"feature_id": 51, "label": "everywhere"},
    {"feature_id": 3, "label": "only early", "sae": "early"},
    {"feature_id": 4, "label": "only layer 1", "layer": 1, "stream": "resid_post"},
    {"feature_id": 5, "label": None},
    {"feature_id": 9, "label": "nowhere", "hook_point": "blocks.2.hook_resid_post"},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_labels_of_a_table_go_where_they_belong(suffix, bench, catalog_bench, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / f"labels{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(LABEL_ROWS, schema=pa.schema(
            [("feature_id", pa.int64()), ("label", pa.string()), ("sae", pa.string()), ("layer", pa.int32()),
             ("stream", pa.string()), ("hook_point", pa.string())])), file)  # fmt: skip
    else:
        file.write_text("\n".join(map(json.dumps, LABEL_ROWS)) + "\n\n")
    options = {"text": TEXT, "min_coverage_pct": 0.0, "return_top_x": 500}
    for mine in (bench, catalog_bench):
        answer = ask(mine.open(labels=str(file)), **options)
        assert {51, 3, 4} <= {feature.feature_id for feature in answer.features}
        for feature in answer.features:
            expected = {51: "everywhere"}.get(feature.feature_id)
            if feature.sae == "early" and feature.feature_id == 3:
                expected = "only early"
            if feature.layer == 1 and feature.feature_id == 4:
                expected = "only layer 1"
            if expected is not None:
                assert (feature.proto_label, feature.label_source) == (expected, "table")
            elif mine.catalog is None:
                assert (feature.proto_label, feature.label_source) == (None, None)
            else:
                row = mine.catalog.feature(feature.hook_point, feature.sae, feature.feature_id)
                assert feature.proto_label == (row["label"] or row["proto_label"])
                assert feature.label_source == ("proto" if row["proto_label"] else None)
        bare_labels = ask(mine.open(labels=str(file)), **options, attach_proto_labels=False)
        assert {feature.proto_label for feature in bare_labels.features} == {None}


@pytest.mark.parametrize(
    "content",
    ["{", "[1]", '{"feature_id": "a", "label": "b"}', '{"feature_id": 1}', "\ud800"],
)
def test_a_label_table_that_is_none_is_refused(content, bench, tmp_path):
    file = tmp_path / "labels.jsonl"
    file.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError, match=r"labels\.jsonl"):
        bench.open(labels=str(file))


@pytest.mark.parametrize("damage", ["manifest", "manifest_list", "statistics", "features"])
def test_a_damaged_catalog_is_named(damage, catalog_bench, tmp_path):
    shutil.copytree(catalog_bench.catalog.folder, tmp_path / "catalog" / "000001")
    folder = tmp_path / "catalog" / "000001"
    if damage == "manifest":
        (folder / "manifest.json").write_text("{}")
    elif damage == "manifest_list":
        (folder / "manifest.json").write_text("[]")
    elif damage == "statistics":
        shutil.rmtree(folder / "statistics.zarr")
    else:
        (folder / "features.parquet").write_bytes(b"PAR1")
    with pytest.raises(CorruptError):
        open_discoverer(catalog_bench.config(catalog=str(tmp_path / "catalog")))


def test_a_catalog_of_other_saes_is_refused(catalog_bench, gates, tmp_path):
    other = Bench(model=catalog_bench.model, saes=(SaeConfig(path=str(gates["topk"])),), catalog=catalog_bench.catalog)
    with pytest.raises(IdentityError, match=r"was not made with SAE .*/topk, but with"):
        other.open()
    with pytest.raises(ConfigError, match="there is no catalog at"):
        open_discoverer(catalog_bench.config(catalog=str(tmp_path)))
