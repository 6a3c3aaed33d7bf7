"""New snapshots of what is analysed equal those made from scratch, and what changed is what comparing would say."""

import json
import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Cli, MakeConfig, write_corpus
from hypothesis import given
from hypothesis import strategies as st

from sae_census.compute.numbers.weights import copies, normal
from sae_census.config import CompareConfig, SideConfig, SnapshotsConfig
from sae_census.errors import ConfigError, CorruptError, IdentityError
from sae_census.flows.catalog.reader import Catalog
from sae_census.flows.census.analyze import analyze
from sae_census.flows.census.snapshots import build, snapshots
from sae_census.flows.comparison.compare import compare
from sae_census.flows.comparison.diff import Difference, diff
from sae_census.flows.comparison.sides import Side
from sae_census.io.store import tables

SITE = ("blocks.1.hook_resid_post", "late")
Analyze = Callable[..., Catalog]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three slices, of which one has two files."""
    folder = tmp_path_factory.mktemp("texts")
    for seed, name in enumerate(("notes_1", "notes_2", "prose_1", "web_1")):
        write_corpus(folder / f"{name}.jsonl", seed=40 + seed, num_documents=12, bad_lines=("{oops",))
    return folder


@pytest.fixture(scope="module")
def analyzed(analyze_config: MakeConfig, texts: Path, sae_dirs: dict[str, Path]) -> Analyze:
    """Analyses some files of the texts, each slice by its pattern, into a catalog."""

    def make(root: Path, name: str, *patterns: str, **overrides: Any) -> Catalog:
        source = {pattern.partition("_")[0]: str(texts / f"{pattern}.jsonl") for pattern in patterns}
        corpus = {"source": source, "shard_tokens": 80}
        saes = [{"path": str(sae_dirs["late"])}]
        config = analyze_config(root, corpus=corpus, catalog={"name": name}, saes=saes, **overrides)
        return analyze(config, lambda line: None).catalog

    return make


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, analyzed: Analyze) -> Path:
    """A store with `whole` (two snapshots: the second has more notes) and `web`."""
    folder = tmp_path_factory.mktemp("store")
    analyzed(folder, "whole", "notes_1", "prose_*", logits={"top_k": 3})
    analyzed(folder, "whole", "notes_*", "prose_*", logits={"top_k": 3})
    analyzed(folder, "web", "web_*")
    return folder


def config_of(root: Path, action: str, name: str = "whole", **keys: Any) -> SnapshotsConfig:
    return SnapshotsConfig(action=action, store={"root": str(root)}, catalog={"name": name}, **keys)


def built(root: Path, into: str, name: str = "whole", **keys: Any) -> Catalog:
    return build(config_of(root, "build", name, into=into, **keys), lambda line: None)[0]


# --- building ---


@pytest.mark.parametrize(
    ("keys", "patterns"),
    [
        ({"slices": ["notes"]}, ["notes_*"]),
        ({"drop": ["n?tes"]}, ["prose_*"]),
        ({"snapshot": 1}, ["notes_1", "prose_*"]),
        ({"also": ["web"]}, ["notes_*", "prose_*", "web_*"]),
        ({"also": ["web@1"], "slices": ["[pw]*"]}, ["prose_*", "web_*"]),
    ],
)
def test_a_chosen_part_is_what_an_analysis_of_that_part_alone_gives(
    root: Path, tmp_path: Path, analyzed: Analyze, keys: dict[str, Any], patterns: Sequence[str]
) -> None:
    mine = built(root, "part", **keys)
    scratch = analyzed(tmp_path, "part", *patterns, logits={"top_k": 3})
    assert mine.digest == scratch.digest
    assert mine.manifest.coverage == scratch.manifest.coverage
    for file in mine.manifest.files:
        assert (mine.folder / file).read_bytes() == (scratch.folder / file).read_bytes()


def test_what_the_newest_snapshot_says_already_is_not_published_again(root: Path) -> None:
    assert built(root, "twice", slices=["notes"]).number == built(root, "twice", slices=["notes"]).number == 1


def test_a_time_range_takes_what_was_analysed_in_it(root: Path) -> None:
    one, two = Catalog(root, "whole", 1), Catalog(root, "whole", 2)
    late = {shard.shard_id for shard in two.manifest.shards} - {s.shard_id for s in one.manifest.shards}
    between = datetime.fromtimestamp(one.manifest.made_at, UTC)
    since = built(root, "since", since=between)
    assert {shard.shard_id for shard in since.manifest.shards} == late
    (source,) = since.manifest.coverage.sources
    assert source.names == ("notes_2.jsonl",)
    zone = between.astimezone().replace(tzinfo=None) - (datetime.now() - datetime.now(UTC).replace(tzinfo=None))
    assert built(root, "until", until=between).digest == one.digest
    assert built(root, "until", until=zone).digest == one.digest, "a time without a zone is UTC"
    with pytest.raises(ConfigError, match="no shard is chosen"):
        built(root, "never", since=between + timedelta(days=1))


def test_weights_count_a_slice_more_than_once_and_change_no_slice(root: Path) -> None:
    plain = Catalog(root, "whole", 2)
    mine = built(root, "weighted", weights={"notes": 6, "prose": 4})
    assert mine.manifest.weights == {"notes": 3, "prose": 2}
    assert mine.slices.equals(plain.slices)
    rows = mine.of_sae(*SITE)
    names = mine.slices["slice"].to_pylist()
    parts = {name: mine.slices.filter([one == name for one in names]) for name in ("notes", "prose")}

    def whole(column: str) -> np.ndarray:
        return 3 * np.asarray(parts["notes"][column]) + 2 * np.asarray(parts["prose"][column])

    assert np.array_equal(rows["count"], whole("count"))
    assert np.array_equal(rows["tokens_counted"], whole("tokens_counted"))
    np.testing.assert_allclose(rows["mean"], whole("sum") / whole("tokens_counted"), rtol=1e-12)
    assert np.array_equal(rows["max"], plain.of_sae(*SITE)["max"])
    arrays, others = mine.statistics(*SITE), plain.statistics(*SITE)
    assert np.array_equal(arrays["histogram"].sum(axis=1), whole("count"))
    for name in arrays:
        assert np.array_equal(arrays[name], others[name]) or not name.startswith("slice_")
    assert built(root, "even", weights={"notes": 2, "prose": 2}).digest == plain.digest


def test_a_weighted_catalog_is_compared_slice_by_slice_only(root: Path) -> None:
    built(root, "heavy", weights={"notes": 2})
    with pytest.raises(ConfigError, match="weighs its slices"):
        Side(SideConfig(root=str(root), name="heavy"))
    assert Side(SideConfig(root=str(root), name="heavy", slices=("notes",))).slices == ["notes"]


@given(st.integers(1, 200))
def test_copies_are_repeated_merges(number: int) -> None:
    calls = []

    def merge(a: int, b: int) -> int:
        calls.append((a, b))
        return a + b

    assert copies(7, number, merge) == 7 * number
    assert len(calls) <= 2 * number.bit_length()


def test_no_copies_are_an_error_and_equal_weights_are_none() -> None:
    with pytest.raises(ValueError, match="cannot take 0 copies"):
        copies(1, 0, max)
    assert normal({"a": 4, "b": 6}, ["b", "a", "c"]) == {"a": 4, "b": 6, "c": 1}
    assert normal({"a": 4, "b": 6}, ["b", "a"]) == {"a": 2, "b": 3}
    assert normal({"a": 5}, ["a"]) == {}


def test_shards_without_partials_other_settings_and_unknown_names_are_refused(
    root: Path, tmp_path: Path, analyzed: Analyze
) -> None:
    with pytest.raises(ConfigError, match="no slice is called 'poems'; there are notes, prose"):
        built(root, "x", slices=["poems"])
    with pytest.raises(ConfigError, match="weights names 'prose'; the chosen slices are notes"):
        built(root, "x", slices=["notes"], weights={"prose": 2})
    with pytest.raises(ConfigError, match="also names 'web@last'"):
        built(root, "x", also=["web@last"])
    analyzed(tmp_path, "mine", "web_*")
    analyzed(tmp_path, "other", "web_*", masks={"first_positions": 2})
    with pytest.raises(IdentityError, match=r"cannot be joined: measure\.masks\.first_positions is 0 and 2"):
        built(tmp_path, "x", "mine", also=["other"])
    with pytest.raises(IdentityError, match="was made under other settings"):
        built(tmp_path, "other", "mine")
    for partial in tmp_path.glob("measures/*/partials/*"):
        partial.unlink()
    with pytest.raises(ConfigError, match="chosen shards have no sound partials any more"):
        built(tmp_path, "x", "mine")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"action": "build"}, "needs into"),
        ({"action": "build", "into": "../x"}, "into"),
        ({"action": "build", "into": "x", "weights": {"a": 0}}, "to leave a slice out, drop it"),
        ({"action": "build", "into": "x", "weights": {"a": 10**9}}, "less than or equal to 1000000"),
        ({"action": "list", "into": "x"}, "into is a key of action=build"),
        ({"action": "build", "into": "x", "against": 2}, "against is a key of action=diff"),
    ],
)
def test_keys_that_an_action_would_pass_over_are_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SnapshotsConfig.model_validate(keys)


# --- what changed ---


def changed(root: Path, out: Path, name: str = "whole", **keys: Any) -> Difference:
    return diff(config_of(root, "diff", name, out=str(out), **keys))


def test_growth_is_tested_as_the_new_text_against_the_old(root: Path, tmp_path: Path, analyzed: Analyze) -> None:
    """The same as comparing two catalogs of those texts, which goes by their published sums instead of partials."""
    found = changed(root, tmp_path / "diff", min_documents=2)
    assert found.summary["texts"]["kind"] == "grown"
    analyzed(tmp_path / "store", "came", "notes_2")
    sides = {
        "a": {"root": str(tmp_path / "store"), "name": "came"},
        "b": {"root": str(root), "name": "whole", "snapshot": 1},
    }
    other = compare(CompareConfig.model_validate(sides | {"out": str(tmp_path / "compare"), "min_documents": 2}))
    some = 0
    for site, columns in other.sites.items():
        for name, column in columns.items():
            np.testing.assert_array_equal(found.sites[site][name], column, err_msg=name)
        some += int((~np.isnan(columns["frequency_p"])).sum())
        verdict = found.summary["sites"][str(site)]
        assert (verdict["more"], verdict["less"]) == tuple(other.summary["sites"][str(site)][f"best_{s}"] for s in "ab")
    assert some > 20
    table = tables.read(found.folder / "diff.parquet")
    assert table.num_rows == sum(len(columns["change"]) for columns in found.sites.values())
    assert json.loads((found.folder / "diff.json").read_text()) == json.loads(json.dumps(found.summary))


def test_every_feature_has_one_word_for_what_became_of_it(root: Path, tmp_path: Path) -> None:
    built(root, "story", slices=["prose"])
    built(root, "story", snapshot=2)
    built(root, "story", "web")
    built(root, "story")
    built(root, "story", slices=["notes"])
    words: dict[str, int] = {}
    for number, kind in ((2, "grown"), (3, "exchanged"), (4, "exchanged"), (5, "shrunk")):
        found = changed(
            root, tmp_path / str(number), "story", snapshot=number, min_documents=2, false_discovery_rate=0.5
        )
        assert found.summary["texts"]["kind"] == kind
        for site, columns in found.sites.items():
            old, new = (one.of_sae(*str(site).rsplit("/", 1)) for one in (found.old, found.new))
            dead = [np.asarray(one["dead"]) for one in (old, new)]
            tests = [columns[f"{name}_q"] <= 0.5 for name in ("frequency", "mean")]
            for feature, word in enumerate(columns["change"]):
                gone = [bool(one[feature]) for one in dead]
                moved = bool(tests[0][feature] | tests[1][feature])
                expected = {
                    (True, True): "dead", (True, False): "appeared", (False, True): "died",
                    (False, False): "moved" if moved else "same",
                }[(gone[0], gone[1])]  # fmt: skip
                assert word == expected
                words[word] = words.get(word, 0) + 1
            assert np.array_equal(columns["rank_old"], old["rank"])
            assert np.array_equal(columns["score_new"], new["score"])
    assert set(words) == {"appeared", "died", "moved", "same", "dead"}


def test_snapshots_of_one_text_differ_in_nothing_but_their_ranks(root: Path, tmp_path: Path) -> None:
    built(root, "same")
    built(root, "same", weights={"notes": 9})
    found = changed(root, tmp_path, "same")
    assert found.summary["texts"]["kind"] == "same"
    for columns in found.sites.values():
        assert set(columns["change"]) <= {"same", "dead"}
        assert not np.array_equal(columns["frequency_old"], columns["frequency_new"])
    assert set(tables.read(tmp_path / "diff.parquet")["frequency_p"].to_pylist()) == {None}


def test_a_first_snapshot_and_missing_partials_are_said(root: Path, tmp_path: Path, analyzed: Analyze) -> None:
    with pytest.raises(ConfigError, match="has no snapshot before 1"):
        changed(root, tmp_path, "web")
    analyzed(tmp_path, "mine", "web_*")
    analyzed(tmp_path, "mine", "web_*", "prose_*")
    receipt = next(tmp_path.glob("measures/*/receipts/*"))
    whole = receipt.read_bytes()
    receipt.write_text("{")
    with pytest.raises(CorruptError, match=rf"receipts/{receipt.name} is damaged"):
        changed(tmp_path, tmp_path / "out", "mine")
    receipt.write_bytes(whole)
    next(tmp_path.glob("measures/*/partials/*")).unlink()
    with pytest.raises(ConfigError, match="the partials of 1 chosen shards are gone"):
        changed(tmp_path, tmp_path / "out", "mine")


@pytest.mark.parametrize("body", ["{", "[]", "{}", "\0"])
def test_a_damaged_manifest_is_named_and_put_back(root: Path, body: str) -> None:
    mine = built(root, "damaged", slices=["notes"])
    (mine.folder / "manifest.json").write_text(body)
    with pytest.raises(CorruptError, match=r"catalogs/damaged/00000\d/manifest\.json is damaged"):
        Catalog(root, "damaged")
    again = built(root, "damaged", slices=["notes"])
    assert (again.number, again.digest) == (mine.number, mine.digest)
    shutil.rmtree(mine.folder)


# --- the command ---


# Hydra leaves the handling of its log files to the garbage collector
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_command_lists_builds_and_shows_what_changed(root: Path, tmp_path: Path, cli: Cli) -> None:
    def catalog(*overrides: str) -> str:
        code, out, err = cli("catalog", f"store.root={root}", *overrides)
        assert code == 0, err
        return out

    listed = catalog()
    assert len(list(snapshots(str(root)))) == sum("│" in line for line in listed.splitlines())
    assert Catalog(root, "whole", 1).digest[:12] in listed
    out = catalog("action=build", "catalog.name=whole", "into=typed", "snapshot=2", "weights={notes: 2}")
    assert Catalog(root, "typed").digest in out
    assert "counted 2 times" in out
    out = catalog("action=compact", "catalog.name=whole", "snapshot=2")
    assert "made, 0 there already, 0 not needed" in out
    out = catalog("action=diff", "catalog.name=whole", "snapshot=2", f"out={tmp_path}", "min_documents=2")
    assert "new text (" in out
    assert "0 died" in out
