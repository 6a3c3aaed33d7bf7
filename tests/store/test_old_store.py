"""A store that was made before records had a digest of their own is read, told of once, and gone on with."""

import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import write_corpus
from data.make_old_store import make_config

from sae_census.config import AttributeConfig, ReportConfig, SideConfig, VerifyConfig
from sae_census.errors import CorruptError, IdentityError
from sae_census.flows.catalog.attribute import attribute
from sae_census.flows.catalog.reader import Catalog
from sae_census.flows.catalog.report import write_report
from sae_census.flows.census.analyze import Analysis, analyze
from sae_census.flows.census.compact import compact
from sae_census.flows.census.identity import identify
from sae_census.flows.census.plan import make_plan
from sae_census.flows.census.snapshots import snapshots
from sae_census.flows.census.verify import Verdict, verify
from sae_census.flows.comparison.sides import Side
from sae_census.io.store.blobs import LocalBlobs
from sae_census.records import sealed, unsealed
from sae_census.steps.census import claims, plan
from sae_census.steps.discovery.background import load_backgrounds
from sae_census.steps.model.reader import load_saes
from sae_census.steps.store.identities import MEASURE_FORMAT, PREPARATION_FORMAT

SITE = ("blocks.0.hook_resid_post", "sae")
PREPARATION, MEASURE = "5ba01079ad60858c19c7b693b441a7de", "c6df3bf3ce85f5329bba04d6727f8a8f"
RANKED = {"ranking": {"score": "max"}}
"""How the newest snapshot was ranked."""


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Path]:
    """The frozen store, with the model, SAE and text that it was made of; the second text is not there yet."""
    with zipfile.ZipFile(Path(__file__).parents[1] / "data" / "old_store.zip") as archive:
        archive.extractall(tmp_path)
    (tmp_path / "texts" / "b.jsonl").rename(tmp_path / "b.jsonl")
    return tmp_path


def config_of(root: Path, **overrides):
    made = make_config(root).model_dump() | RANKED
    return type(make_config(root)).model_validate(made | overrides)


def checked(root: Path) -> Verdict:
    return verify(VerifyConfig(store={"root": str(root / "runs")}))


def run(root: Path, heard: list[str] | None = None, **overrides) -> Analysis:
    analysis = analyze(config_of(root, **overrides), (heard if heard is not None else []).append)
    assert analysis.failures == ()
    return analysis


def facts(root: Path, *kinds: str) -> dict[str, int]:
    """When files of these kinds were changed."""
    found = (path for kind in kinds for path in root.glob(f"runs/*/*/{kind}/*"))
    return {path.relative_to(root).as_posix(): path.stat().st_mtime_ns for path in found}


def test_every_reader_reads_it(old):
    catalog = Catalog(old / "runs", "old")
    assert (catalog.number, catalog.features.num_rows, catalog.slices.num_rows) == (2, 12, 12)
    strongest = int(np.argmax(catalog.features["max"]))
    assert catalog.statistics(*SITE)["maximum"].max() == catalog.spans(*SITE, strongest, ["top"])["value"][0].as_py()
    assert [one.snapshot for one in snapshots(str(old / "runs"))] == [1, 2]
    assert Side(SideConfig(root=str(old / "runs"), name="old")).shard_ids
    background = load_backgrounds(str(old / "runs/catalogs/old"), load_saes(config_of(old).saes))
    assert background.masks.attention_sinks is False
    assert compact(old / "runs", "old", say=lambda line: None).num_kept == 1
    report = write_report(
        ReportConfig(store={"root": str(old / "runs")}, catalog={"name": "old"}, out=str(old / "pages")), [].append
    )
    assert report.num_features == 12
    assert make_plan(config_of(old)).cost.num_tokens_left == 0


def test_it_is_called_unproven_once_and_gone_on_with_to_the_bit(old):
    before = checked(old)
    assert before.wrong == ()
    assert before.unproven["receipts"] == 6
    assert before.unproven["sources"] == before.unproven["nodes"] == 1
    work = facts(old, "partials", "shards")
    first = Catalog(old / "runs", "old")
    again = run(old, heard := [])
    assert any("6 receipts" in line and "before records carried a digest" in line for line in heard)
    assert "6 of 6 shards are already done" in heard
    # every number is the one of then; tokens of spans now join to their text, so the snapshot is a new one
    assert (again.is_new, again.catalog.number) == (True, 3)
    assert again.catalog.features == first.features
    assert again.catalog.slices == first.slices
    assert again.catalog.manifest.measures == first.manifest.measures
    spans = [one.table("spans.parquet").drop_columns(["text", "tokens"]) for one in (first, again.catalog)]
    assert spans[0] == spans[1]
    assert again.catalog.manifest.unproven == {"receipts": 6, "sources": 1}
    assert facts(old, "partials", "shards") == work
    identity = identify(config_of(old))
    assert (identity.preparation_id, list(identity.measure_ids.values())) == (PREPARATION, [MEASURE])
    after = checked(old)
    assert (after.wrong, after.unproven) == ((), {})
    quiet = run(old, heard := [])
    assert not any("digest of their own" in line for line in heard)
    assert (quiet.is_new, quiet.catalog.digest) == (False, again.catalog.digest)


def test_grown_by_a_file_it_keeps_what_it_had_and_adds_what_the_file_gives_under_the_same_name(old, tmp_path_factory):
    fresh = shutil.copytree(old, tmp_path_factory.mktemp("fresh") / "old")
    shutil.rmtree(fresh / "runs" / "measures")
    shutil.rmtree(fresh / "runs" / "corpora")
    for root in (old, fresh):
        shutil.copy(root / "b.jsonl", root / "texts")
    for path in old.glob("runs/measures/*/receipts/*.json"):
        path.write_text(re.sub(r'"torch": "[^"]*"', '"torch": "2.0.0"', path.read_text()))
    work, first = facts(old, "partials", "shards"), Catalog(old / "runs", "old")
    grown, scratch = run(old, heard := []), run(fresh)
    assert facts(old, "partials", "shards").items() > work.items()
    told = next(line for line in heard if "grows under other versions" in line)
    assert "6 of its 6 shards were computed under torch 2.0.0 and" in told
    assert {"torch": "2.0.0", "shards": 6} in grown.catalog.manifest.versions
    assert (grown.is_new, grown.catalog.number) == (True, 3)
    assert grown.catalog.manifest.measures == first.manifest.measures
    assert grown.catalog.manifest.coverage == scratch.catalog.manifest.coverage
    assert grown.catalog.manifest.shards == scratch.catalog.manifest.shards
    new = {shard.shard_id for shard in grown.catalog.manifest.shards} - {
        shard.shard_id for shard in first.manifest.shards
    }
    partials = [
        {
            receipt.shard.shard_id: receipt.partial.sha256
            for receipt in plan.all_receipts(LocalBlobs(root / "runs"), MEASURE)
            if receipt.shard.shard_id in new
        }
        for root in (old, fresh)
    ]
    assert partials[0] == partials[1]
    assert len(partials[0]) == len(new) > 0
    # another machine may have made the old shards, whose last bits may differ
    for name in ("mean", "max"):
        np.testing.assert_allclose(grown.catalog.features[name], scratch.catalog.features[name], rtol=1e-3, atol=1e-6)
    assert len(grown.catalog.manifest.versions) == 2
    assert sum(one["shards"] for one in grown.catalog.manifest.versions) == len(grown.catalog.manifest.shards)


def test_what_a_name_was_claimed_with_stands_for_keys_that_are_null(old):
    assert identify(config_of(old)).config.masks.attention_sinks is False
    new = identify(config_of(old, catalog={"name": "new"}))
    assert new.config.masks.attention_sinks is True
    assert (new.identity.measure.format, new.identity.preparation.format) == (MEASURE_FORMAT, PREPARATION_FORMAT)
    asked = config_of(old, masks={"attention_sinks": True})
    with pytest.raises(IdentityError, match=r"measure\.masks\.attention_sinks was None, now True"):
        analyze(asked, lambda line: None)
    said = identify(config_of(old, masks={"attention_sinks": False}))
    assert list(said.measure_ids.values()) == [MEASURE]


def test_numerics_of_then_hold_the_torch_of_then(old):
    """The frozen store is a mixed one; any other names the version of torch in its identity."""
    blobs, config = LocalBlobs(old / "runs"), config_of(old, cluster={"threads_per_worker": 1, "executor": "inline"})
    today = identify(config.model_copy(update={"catalog": config.catalog.model_copy(update={"name": "new"})}))
    key = "catalogs/one/identity.json"
    there = claims.claimed(blobs, "old").content()
    there["measure"]["numerics"] = {**today.numerics, "torch": "2.0.0"}
    blobs.put(key, sealed(there))
    named = config.model_copy(update={"catalog": config.catalog.model_copy(update={"name": "one"})})
    found = identify(named)
    assert found.identity.content() == there
    assert "torch" not in today.identity.measure.numerics
    assert analyze(named, lambda line: None).catalog.manifest.identity.content() == there
    with pytest.raises(IdentityError, match=r"measure\.numerics\.threads was 1, now 2"):
        analyze(named.model_copy(update={"cluster": named.cluster.model_copy(update={"threads_per_worker": 2})}))


def test_logits_are_attributed_to_it_by_the_tokenizer_that_it_names(old):
    asked = AttributeConfig(
        store={"root": str(old / "runs")},
        catalog={"name": "old"},
        model={"id": str(old / "model"), "dtype": "float32", "device": "cpu"},
        saes=[{"path": str(old / "sae")}],
        logits={"top_k": 2},
        cluster={"executor": "inline", "threads_per_worker": 1},
    )
    assert attribute(asked, lambda line: None).is_new
    assert Catalog(old / "runs", "old").logits(*SITE, 0).num_rows == 4


def test_a_name_that_a_newer_version_claimed_is_refused_by_the_number(old):
    blobs = LocalBlobs(old / "runs")
    for part, message in (("measure", "measure format 5, this one knows 4"), ("preparation", "preparation format 9")):
        there = unsealed(blobs.get("catalogs/old/identity.json"), "identity.json")[0]
        there[part]["format"] = 5 if part == "measure" else 9
        blobs.put("catalogs/new/identity.json", sealed(there))
        with pytest.raises(IdentityError, match=message):
            identify(config_of(old, catalog={"name": "new"}))


def test_a_manifest_without_a_seal_is_proved_by_the_digest_of_its_snapshot(old):
    path = old / "runs/catalogs/old/000002/manifest.json"
    path.write_text(re.sub(r'"counted": \d', '"counted": 9', path.read_text(), count=1))
    with pytest.raises(CorruptError, match=r"old/000002/manifest\.json is damaged: its content"):
        Catalog(old / "runs", "old")


def test_an_unsealed_record_that_contradicts_its_manifest_is_not_believed(old):
    write_corpus(old / "texts" / "c.jsonl", seed=9, num_documents=1)
    path = next(old.glob("runs/measures/*/receipts/*.json"))
    path.write_text(path.read_text().replace('"num_contexts": 8', '"num_contexts": 7'))
    left = {task.shard.shard_id for task in look(old)}
    assert left == {path.stem}


def look(root: Path):
    config = config_of(root)
    blobs = LocalBlobs(config.store.root)
    identity = identify(config)
    return plan.look(blobs, identity.measure_ids, Catalog(root / "runs", "old").manifest.shards)[1]
