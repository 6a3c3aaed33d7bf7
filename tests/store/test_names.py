"""Laws of names: one pattern at every door, checked before any work; what no run wrote into a store is passed over."""

import shutil
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sae_census.config import AnalyzeConfig, AttributeConfig, SaeConfig, SnapshotsConfig, SweepConfig, VerifyConfig
from sae_census.errors import ConfigError
from sae_census.flows.catalog.reader import Catalog, catalog_names
from sae_census.flows.census.analyze import analyze
from sae_census.flows.census.identity import identify
from sae_census.flows.census.plan import make_plan
from sae_census.flows.census.snapshots import snapshots
from sae_census.flows.census.verify import verify
from sae_census.io.store.blobs import LocalBlobs
from sae_census.steps.census import claims
from sae_census.steps.discovery.background import snapshot_folder
from sae_census.steps.model.reader import load_saes
from sae_census.steps.store import entries
from sae_census.steps.store.identities import Identity
from sae_census.steps.store.ledger import Ledger, SweepRun
from sae_census.types import STREAMS, HookPoint, SiteKey, Stream, twins, wrong_with_name

BAD = [
    "", ".", "..", "a/b", "/a", "a\\b", ".a", "-a", "_a", "a b", " a", "a\n", "a\0", "Zürich", "日本", "x" * 201, "a:b",
    "manifest.json", "LATEST.json", "attached", "ablations", "zarr.json",
]  # fmt: skip
GOOD = ["a", "0", "A.b-c_D", "x" * 200, "SAE-Res-tiny-L0_45", "000001", "blocks.3.hook_resid_post"]


@pytest.mark.parametrize("name", BAD + GOOD)
def test_one_pattern_says_what_a_name_is(name: str) -> None:
    assert (wrong_with_name(name) is None) == (name in GOOD)


@given(st.text())
def test_a_name_is_one_folder_and_one_part_of_a_key(name: str) -> None:
    if wrong_with_name(name) is None:
        assert Path("x", name).parts == ("x", name)
        site = SiteKey(HookPoint(1, "resid_post"), name)
        assert SiteKey.parse(str(site)) == site
        assert name.isascii()
        assert name.isprintable()


@given(st.sampled_from(STREAMS), st.integers(0, 999), st.sampled_from(GOOD))
def test_a_site_is_read_back_from_what_it_is_written_as(stream: Stream, layer: int, name: str) -> None:
    site = SiteKey(HookPoint(layer, stream), name)
    assert SiteKey.parse(str(site)) == site


@pytest.mark.parametrize("given", ["", "sae", "/sae", "blocks.1.hook_resid_post", "blocks.1.hook_resid_post/", "a/b"])
def test_what_is_no_site_is_refused_with_what_was_given(given: str) -> None:
    with pytest.raises(ConfigError, match="is not known; expected"):
        SiteKey.parse(given)


def test_twins_differ_by_case_only() -> None:
    assert twins(["a", "b", "A"]) == ("a", "A")
    assert twins(["a", "a", "b"]) is None


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("door", ["catalog", "sae", "slice", "into", "attribute", "sweep"])
def test_a_name_that_does_not_fit_is_refused_at_every_door_before_any_work(
    tmp_path: Path, analyze_config: Callable[..., AnalyzeConfig], door: str, name: str
) -> None:
    def config(**overrides: Any) -> AnalyzeConfig:
        # a model and a corpus that are not there: whoever looks for them has worked already
        return analyze_config(tmp_path / "store", model={"id": str(tmp_path / "no")}, **overrides)

    doors: dict[str, Callable[[], object]] = {
        "catalog": lambda: config(catalog={"name": name}),
        "sae": lambda: identify(config(saes=[{"path": "nowhere", "name": name}])),
        "slice": lambda: identify(config(corpus={"source": {name: str(tmp_path / "*.jsonl")}})),
        "into": lambda: SnapshotsConfig(action="build", into=name),
        "attribute": lambda: AttributeConfig.model_validate({"catalog": {"name": name}}),
        "sweep": lambda: SweepConfig.model_validate({"entries": {name: {"every": "1d"}}}),
    }
    with pytest.raises((ConfigError, ValidationError), match=r"the store itself uses|expected up to 200 letters"):
        doors[door]()
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\n"])
def test_a_name_that_no_key_can_hold_is_refused_wherever_saes_are_loaded(sae_dirs: dict[str, Path], name: str) -> None:
    with pytest.raises(ConfigError, match="which no key can hold: expected up to 200 letters"):
        load_saes([SaeConfig(path="nowhere"), SaeConfig(path=str(sae_dirs["late"]), name=name)])


def test_a_folder_whose_name_does_not_fit_needs_a_name_that_does(
    tmp_path: Path, analyze_config: Callable[..., AnalyzeConfig], sae_dirs: dict[str, Path]
) -> None:
    folder = str(shutil.copytree(sae_dirs["late"], tmp_path / "my sae"))
    message = "would be called 'my sae', as its folder is: expected .*; give it a saes.*name"
    with pytest.raises(ConfigError, match=message):
        make_plan(analyze_config(tmp_path / "store", saes=[{"path": folder}]))
    (site,) = identify(analyze_config(tmp_path / "store", saes=[{"path": folder, "name": "mine"}])).saes
    assert site.sae == "mine"
    assert not (tmp_path / "store").exists()


def test_names_that_differ_by_case_only_are_refused(
    tmp_path: Path, analyze_config: Callable[..., AnalyzeConfig], sae_dirs: dict[str, Path]
) -> None:
    path = str(sae_dirs["late"])
    for overrides, message in (
        ({"saes": [{"path": path, "name": name} for name in "Aa"]}, "called 'A' and 'a', which differ by case"),
        ({"corpus": {"source": {"A": "x", "a": "y"}}}, "slices 'A' and 'a' differ by case only"),
        ({"catalog": {"name": "Demo"}}, "has a catalog 'demo', which differs by case only"),
    ):  # fmt: skip
        (tmp_path / "store" / "catalogs" / "demo").mkdir(parents=True, exist_ok=True)
        with pytest.raises(ConfigError, match=message):
            identify(analyze_config(tmp_path / "store", **overrides))
    with pytest.raises(ValidationError, match="entries 'A' and 'a' differ by case only"):
        SweepConfig.model_validate({"entries": {"A": {"every": "1d"}, "a": {"every": "1d"}}})


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, analyze_config: Callable[..., AnalyzeConfig], sae_dirs: dict[str, Path]
) -> AnalyzeConfig:
    """A catalog that is there already, with names that are older than the pattern."""
    tmp_path = tmp_path_factory.mktemp("old")
    folder = shutil.copytree(sae_dirs["late"], tmp_path / "my sae ü")
    source = analyze_config(tmp_path).corpus.source
    assert isinstance(source, dict)
    corpus = {"source": {"old slice": source["notes"]}}
    config = analyze_config(tmp_path / "store", saes=[{"path": str(folder)}], corpus=corpus)
    corpus_of_none = config.corpus.model_copy(update={"source": "x"})
    named = config.model_copy(update={"saes": (SaeConfig(path=str(folder), name="x"),), "corpus": corpus_of_none})
    known = identify(named).identity.content()
    known["measure"]["saes"] = {k.replace("/x", "/my sae ü"): v for k, v in known["measure"]["saes"].items()}
    claims.claim(LocalBlobs(tmp_path / "store"), "default", Identity.model_validate(known))
    analyze(config, lambda line: None)
    return config


def test_names_inside_a_store_that_is_there_are_read_and_it_grows(world: AnalyzeConfig) -> None:
    catalog = Catalog(world.store.root)
    assert catalog.saes == ["blocks.1.hook_resid_post/my sae ü"]
    assert catalog.feature("blocks.1.hook_resid_post", "my sae ü", 3)["feature_id"] == 3
    assert catalog.in_slice("old slice").num_rows
    assert not analyze(world, lambda line: None).is_new
    assert verify(VerifyConfig(store=world.store, recompute=1)).wrong == ()


@pytest.mark.parametrize("name", ["..", ".", "", "a/../default", "../catalogs/default", "default/", "a\0", "nothing"])
def test_a_path_is_no_catalog(world: AnalyzeConfig, name: str) -> None:
    with pytest.raises(ConfigError, match=r"there is no catalog .*; there are default"):
        Catalog(world.store.root, name)


# --- foreign files and folders ------------------------------------------------------------------------------


def test_what_no_run_wrote_is_passed_over_by_name(world: AnalyzeConfig, tmp_path: Path) -> None:
    root = shutil.copytree(world.store.root, tmp_path / "store")
    world = world.model_copy(update={"store": world.store.model_copy(update={"root": str(root)})})
    (receipts,) = root.glob("measures/*/receipts")
    (shards,) = root.glob("corpora/*/shards")
    catalogs = root / "catalogs"
    shutil.copytree(catalogs / "default" / "000001", catalogs / "default" / "000001.bak")
    shutil.copy(min(receipts.iterdir()), receipts / "copy of a receipt.json")
    for folder in ("000002/manifest.json", "manifest.json", "1", "0000001", "lost+found"):
        (catalogs / "default" / folder).mkdir(parents=True)
    for folder in ("lost+found", "empty"):
        (catalogs / folder).mkdir()
    (root / "measures" / "notes").mkdir()
    for folder in (catalogs, catalogs / "default", receipts, shards, root / "measures", root / "corpora"):
        (folder / ".DS_Store").write_bytes(b"\0")
    (receipts / "x.json~").write_bytes(b"{}")
    (shards / "a.parquet").write_bytes(b"")
    (catalogs / "default" / ".draft-1").write_bytes(b"")  # of a run that died

    with pytest.warns(UserWarning, match="it is passed over") as heard:  # noqa: PT031  # all doors, one set of warnings
        assert catalog_names(root) == ["default"]
        assert Catalog(root).number == 1
        assert [one.snapshot for one in snapshots(str(root))] == [1]
        assert snapshot_folder(str(catalogs / "default")) == catalogs / "default" / "000001"
        assert verify(VerifyConfig(store=world.store, recompute=1)).wrong == ()
        assert not analyze(world, lambda line: None).is_new
    told = {str(one.message) for one in heard}
    home = LocalBlobs(root).root / "catalogs"
    over = "holds what no run wrote; it is passed over:"
    assert f"{home} {over} '.DS_Store', 'empty', 'lost+found'" in told
    assert f"{home / 'default'} {over} '.DS_Store', '0000001', '000001.bak', '1', 'lost+found' and 1 more" in told
    assert f"{home / 'default'} {over} '000002/manifest.json'" in told
    assert any("'copy of a receipt.json', 'x.json~'" in line for line in told)
    assert len(told) == 7, "one warning for a folder, and one for a manifest that is none"

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        more = analyze(world.model_copy(update={"corpus": world.corpus.model_copy(update={"max_tokens": 160})}), str)
    assert (more.is_new, more.catalog.number) == (True, 3), "a number that a foreign folder has is not used"


def test_a_ledger_passes_over_what_no_tick_wrote(tmp_path: Path) -> None:
    moment = datetime(2026, 1, 2, tzinfo=UTC)
    run = SweepRun(
        entry="a", catalog="a", started_at=moment, finished_at=moment, status="done",
        snapshot=None, digest=None, message="", statistics={}, alerts=[],
    )  # fmt: skip
    ledger = Ledger(LocalBlobs(tmp_path))
    ledger.add(run)
    (tmp_path / "sweeps" / "runs" / ".DS_Store").write_bytes(b"\0")
    (tmp_path / "sweeps" / "runs" / "a" / "old.json").write_bytes(b"{}")
    with pytest.warns(UserWarning, match=r"runs holds .*: '\.DS_Store'|a holds .*: 'old\.json'"):
        assert ledger.runs() == [run]
    with pytest.warns(UserWarning, match=r"a holds .*: 'old\.json'"):
        assert ledger.runs("a") == [run]
    assert ledger.runs("b") == []


def test_many_foreign_names_are_counted(tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / f"{number}\n").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"over: '0\\n', '1\\n', '2\\n', '3\\n', '4\\n' and 4 more$"):
        assert entries.snapshots(tmp_path) == []
