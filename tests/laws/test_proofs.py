"""What is stored is proved when it is read: a changed record or file is refused by name, told of, and mended alone."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_corpus

from sae_census.config import AnalyzeConfig, VerifyConfig
from sae_census.errors import CorruptError, IdentityError, NumericsError
from sae_census.flows.catalog.reader import Catalog
from sae_census.flows.catalog.report_data import overview
from sae_census.flows.census.analyze import analyze
from sae_census.flows.census.compact import compact
from sae_census.flows.census.verify import verify
from sae_census.io.loading.versions import versions
from sae_census.io.model.device import configure
from sae_census.io.store.blobs import LocalBlobs
from sae_census.records import RECORD_FORMAT, Receipt, canonical, sealed, unsealed
from sae_census.steps.census.shard import Analyzer, Machine
from sae_census.steps.discovery.background import load_backgrounds
from sae_census.steps.model.provenance import Provenance
from sae_census.steps.model.reader import load_saes

SITE = ("blocks.0.hook_resid_post", "early")


@pytest.fixture(scope="module")
def make(analyze_config, sae_dirs, tmp_path_factory) -> Callable[[Path], AnalyzeConfig]:
    """Makes a config of a handful of shards in two slices."""
    texts = tmp_path_factory.mktemp("texts")
    for seed, name in enumerate(("a", "b")):
        write_corpus(texts / f"{name}.jsonl", seed=seed, num_documents=7)
    source = {name: str(texts / f"{name}.jsonl") for name in ("a", "b")}
    saes = [{"path": str(sae_dirs["early"])}]
    return lambda root: analyze_config(root, saes=saes, corpus={"source": source, "shard_tokens": 80})


@pytest.fixture(scope="module")
def sound(make, tmp_path_factory) -> Path:
    """The root of a store with one catalog, compacted."""
    root = tmp_path_factory.mktemp("sound") / "runs"
    analyze(make(root), lambda line: None)
    compact(root, "default", say=lambda line: None)
    return root


@pytest.fixture
def root(sound, tmp_path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(sound, tmp_path / "runs")


def wrong(root: Path) -> list[str]:
    return list(verify(VerifyConfig(store={"root": str(root)})).wrong)


def digit(path: Path, after: str) -> None:
    """Change the first digit that follows a text."""
    text = path.read_text()
    start = text.index(after) + len(after)
    place = start + re.search(r"\d", text[start:]).start()
    path.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])


def test_a_changed_digit_anywhere_in_a_sealed_record_is_refused():
    content = {"a": 12.5, "b": {"c": [1, 2, 30], "d": "x7"}, "e": None}
    body = sealed(content)
    assert unsealed(body, "key") == (content, True)
    assert unsealed(canonical(content), "key") == (content, False)
    for place, byte in enumerate(body):
        if chr(byte).isdigit():
            spoilt = body[:place] + str((int(chr(byte)) + 1) % 10).encode() + body[place + 1 :]
            with pytest.raises((CorruptError, IdentityError)):
                unsealed(spoilt, "key")
    for spoilt in (b"", b"[]", b"{", b'"x"', b'{"a": "\\ud800", "record_sha256": "0"}', body[:-3], b"[" * 100_000):
        with pytest.raises(CorruptError, match="key is damaged"):
            unsealed(spoilt, "key")


def test_a_record_of_a_newer_form_is_refused_by_its_number(root, make):
    path = min(root.glob("measures/*/receipts/*.json"))
    text = path.read_text().replace(f'"record_format": {RECORD_FORMAT}', '"record_format": 9')
    path.write_text(text)
    for door in (lambda: Receipt.read(path.read_bytes(), path.name), lambda: analyze(make(root), lambda line: None)):
        with pytest.raises(IdentityError, match=rf"{path.name} was written by a newer SAE Census \(record format 9"):
            door()
    assert any(path.name in line and "newer" in line for line in wrong(root))


def test_whatever_is_damaged_is_named_and_the_next_run_mends_just_that(root, make):
    before = Catalog(root, "default")
    assert wrong(root) == []
    receipts = sorted(root.glob("measures/*/receipts/*.json"))
    assert len(receipts) >= 4
    spoilt = [*receipts[:4], *sorted(root.glob("corpora/*/sources/*.json"))[:1], root / "catalogs/default/latest.json"]
    for path, field in zip(receipts, ('"counted"', '"contexts"', '"tokens_square"', '"num_tokens"'), strict=False):
        digit(path, field)
    digit(spoilt[4], '"num_documents"')
    digit(spoilt[5], '"snapshot"')
    for path in (root / "catalogs/default/identity.json", *root.glob("*/*/manifest.json")):
        digit(path, "{")
        spoilt.append(path)
    arrays = before.folder / "statistics.zarr" / SITE[0] / SITE[1]
    (arrays / "count/c/0").unlink()
    digit(arrays / "histogram/zarr.json", '"shape"')
    (arrays / "maximum/c/7").write_bytes(b"not ours")
    (before.folder / "slices.parquet").write_bytes((before.folder / "features.parquet").read_bytes())
    spoilt += [arrays / "count/c/0", arrays / "histogram/zarr.json", arrays / "maximum/c/7"]
    spoilt.append(before.folder / "slices.parquet")
    named = wrong(root)
    for path in spoilt:
        assert any(path.relative_to(root).as_posix() in line for line in named), path
    assert len(named) == len(spoilt)
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    again = analyze(make(root), lambda line: None)
    assert (again.is_new, again.catalog.digest, again.catalog.number) == (False, before.digest, before.number)
    assert wrong(root) == []
    changed = {path for path, time in times.items() if not path.exists() or path.stat().st_mtime_ns != time}
    mended = {path for path in changed if path.parts[-2] not in ("partials", "shards")}  # put back with equal bytes
    assert mended == {path for path in spoilt if path in times}
    assert sum(path.parts[-2] == "partials" for path in changed) == 4
    assert again.catalog.statistics(*SITE).keys() == before.statistics(*SITE).keys()


def test_a_changed_manifest_is_refused_by_every_reader_and_put_back_under_its_number(root, make, tmp_path):
    path = root / "catalogs/default/000001/manifest.json"
    digest = Catalog(root, "default").digest
    for field in ('"counted"', '"made_at"', '"contexts"'):
        sound = path.read_bytes()
        digit(path, field)
        for door in (lambda: Catalog(root, "default"), lambda: load_backgrounds(str(path.parents[1]), {})):
            with pytest.raises(CorruptError, match=r"default/000001/manifest\.json is damaged"):
                door()
        assert any("000001/manifest.json" in line for line in wrong(root))
        path.write_bytes(sound)
    digit(path, '"counted"')
    again = analyze(make(root), lambda line: None)
    assert (again.is_new, again.catalog.number, again.catalog.digest) == (False, 1, digest)
    assert wrong(root) == []
    shutil.copytree(path.parent, path.parents[1] / "000002")
    with pytest.raises(CorruptError, match="is the manifest of snapshot 1"):
        Catalog(root, "default")


@pytest.mark.parametrize("damage", ["a chunk is gone", "a chunk is another", "a shape", "a root", "a chunk too many"])
def test_spoilt_arrays_are_refused_by_name_at_every_door(root, make, damage):
    catalog = Catalog(root, "default")
    tree = catalog.folder / "statistics.zarr"
    arrays = tree / SITE[0] / SITE[1]
    match damage:
        case "a chunk is gone":
            path = arrays / "count/c/0"
            path.unlink()
        case "a chunk is another":
            path = arrays / "count/c/0"
            path.write_bytes((arrays / "context_count/c/0").read_bytes())
        case "a shape":
            path = arrays / "count/zarr.json"
            path.write_text(path.read_text().replace("64", "32"))
        case "a root":
            path = tree / "zarr.json"
            digit(path, '"sum_scale_bits"')
        case _:
            path = arrays / "count/c/1"
            path.write_bytes(b"")
    doors = (
        lambda: catalog.statistics(*SITE),
        lambda: Catalog(root, "default").statistics(*SITE),
        lambda: load_backgrounds(str(root / "catalogs/default"), load_saes(make(root).saes)),
        lambda: overview(catalog, None),
    )
    for door in doors:
        with pytest.raises(CorruptError, match=re.escape(str(path.relative_to(root)))):
            door()
    assert [path.relative_to(root).as_posix() in line for line in wrong(root)] == [True]


@pytest.mark.parametrize("name", ["features.parquet", "slices.parquet", "spans.parquet"])
def test_a_table_that_was_exchanged_or_cut_after_it_was_read_is_refused_by_name(root, name):
    catalog = Catalog(root, "default")
    path = catalog.folder / name
    assert catalog.table(name).num_rows
    other = "slices.parquet" if name != "slices.parquet" else "spans.parquet"
    for body in ((catalog.folder / other).read_bytes(), path.read_bytes()[:-20]):
        path.write_bytes(body)
        for one in (catalog, Catalog(root, "default")):
            with pytest.raises(CorruptError, match=rf"{name} is not the file that was published"):
                one.table(name)


def test_a_receipt_says_what_software_made_it_and_a_worker_with_other_software_is_refused(root, make):
    config = make(root)
    receipt = Receipt.read(min(root.glob("measures/*/receipts/*.json")).read_bytes(), "receipt")
    assert receipt.versions == versions() | {"attention": "sdpa"}
    told = Catalog(root, "default").manifest
    assert told.made_with == versions()
    assert told.versions == (receipt.versions | {"shards": len(told.shards)},)
    numerics = configure(1, torch.device("cpu"))
    planned = Machine(numerics=numerics, versions=versions() | {"torch": "1.0.0"})
    with pytest.raises(NumericsError, match=r"torch .* and 1\.0\.0"):
        Analyzer(config, "", {}, planned, 4, Provenance(model="", tokenizer="", saes={}))
    assert "torch" not in told.identity.measure.numerics


def test_books_that_were_changed_never_reach_a_catalog(root, make):
    """Without seals, the digit of `contexts` made every share of contexts wrong."""
    before = np.asarray(Catalog(root, "default").features["context_frequency"])
    path = min(root.glob("measures/*/receipts/*.json"))
    digit(path, '"contexts"')
    with pytest.raises(CorruptError, match=rf"{path.name} is damaged"):
        Receipt.read(path.read_bytes(), path.name)
    after = analyze(make(root), lambda line: None).catalog
    assert np.array_equal(np.asarray(after.features["context_frequency"]), before)
    assert LocalBlobs(root).exists(f"measures/{path.parts[-3]}/receipts/{path.name}")
