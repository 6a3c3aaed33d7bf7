"""What the store says of identities and snapshots is read into records, and written as it was read, to the byte."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import rewrite_manifest

from sae_census.config import AnalyzeConfig, SnapshotsConfig
from sae_census.errors import CorruptError, IdentityError
from sae_census.flows.catalog.reader import Catalog
from sae_census.flows.census.analyze import analyze
from sae_census.flows.census.snapshots import build
from sae_census.records import Record, sealed, unsealed
from sae_census.steps.store.identities import Identity, MeasureRecord, Preparation
from sae_census.steps.store.manifests import Manifest, open_manifest

KINDS: dict[str, type[Record]] = {
    "catalogs/*/[0-9]*/manifest.json": Manifest,
    "catalogs/*/identity.json": Identity,
    "corpora/*/manifest.json": Preparation,
    "measures/*/manifest.json": MeasureRecord,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, analyze_config: Callable[..., AnalyzeConfig]) -> Path:
    """A store of today: a catalog with logits, and one that was built of it with weights."""
    root = tmp_path_factory.mktemp("store")
    analyze(analyze_config(root, logits={"top_k": 2}), lambda line: None)
    config = SnapshotsConfig(action="build", store={"root": str(root)}, into="weighed", weights={"notes": 3})
    build(config, lambda line: None)
    return root


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of before records had seals."""
    root = tmp_path_factory.mktemp("old")
    with zipfile.ZipFile(Path(__file__).parents[1] / "data" / "old_store.zip") as archive:
        archive.extractall(root)
    return root / "runs"


def records(root: Path) -> list[tuple[Path, type[Record]]]:
    return [(path, kind) for pattern, kind in KINDS.items() for path in sorted(root.glob(pattern))]


def test_a_record_is_written_as_it_was_read(store: Path) -> None:
    found = records(store)
    assert {kind for _, kind in found} == set(KINDS.values())
    for path, kind in found:
        assert kind.read(path.read_bytes(), str(path)).to_bytes() == path.read_bytes()


def test_a_record_of_an_older_form_says_no_more_than_it_did(old: Path) -> None:
    found = records(old)
    assert {kind for _, kind in found} == set(KINDS.values())
    for path, kind in found:
        record = kind.read(path.read_bytes(), str(path))
        assert record.content() == json.loads(path.read_text())
        assert record.to_bytes() == sealed(json.loads(path.read_text()))


def test_ids_name_the_folders(store: Path, old: Path) -> None:
    for root in (store, old):
        for path in root.glob("corpora/*/manifest.json"):
            assert Preparation.read(path.read_bytes(), str(path)).preparation_id == path.parent.name
        for path in root.glob("measures/*/manifest.json"):
            assert MeasureRecord.read(path.read_bytes(), str(path)).fields.measure_id == path.parent.name
        for path in root.glob("catalogs/*/[0-9]*/manifest.json"):
            manifest = open_manifest(path.parent)
            assert manifest.measures == manifest.identity.measure.ids
            assert manifest.preparation_id == manifest.identity.preparation.preparation_id


def test_a_manifest_says_of_which_kind_its_snapshot_is(store: Path) -> None:
    plain, weighed = (Catalog(store, name).manifest for name in ("default", "weighed"))
    assert (plain.weights, plain.built_from) == ({}, None)
    assert weighed.weights == {"notes": 3, "prose": 1}
    assert weighed.built_from is not None
    assert plain.logits is not None
    assert plain.logits == weighed.logits


@pytest.mark.parametrize(
    ("part", "number", "message"),
    [
        ("measure", 5, r"catalog 'default' was made by a newer SAE Census \(measure format 5, this one knows 4\)"),
        ("preparation", 3, r"was made by a newer SAE Census \(preparation format 3, this one knows 2\)"),
        ("measure", 2, r"catalog 'default' was made from partials of format 2, expected 3 or 4"),
    ],
)
def test_a_manifest_of_an_unknown_format_is_refused_by_the_number(
    store: Path, part: str, number: int, message: str
) -> None:
    path = store / "catalogs/default/000001/manifest.json"
    sound = path.read_bytes()
    rewrite_manifest(path, lambda content: content["identity"][part].update(format=number))
    try:
        with pytest.raises(IdentityError, match=message):
            Catalog(store)
    finally:
        path.write_bytes(sound)


def test_a_field_that_is_not_known_is_of_a_newer_version_if_it_is_sealed_and_damage_if_not(store: Path) -> None:
    path = store / "catalogs/default/000001/manifest.json"
    content = unsealed(path.read_bytes(), str(path))[0]
    content["coverage"]["languages"] = ["en"]
    with pytest.raises(IdentityError, match=r"newer SAE Census: this one does not know coverage\.languages; use that"):
        Manifest.read(sealed(content), str(path))
    with pytest.raises(CorruptError, match="it is no Manifest"):
        Manifest.read(json.dumps(content).encode(), str(path))
