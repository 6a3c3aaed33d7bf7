"""Laws of the whole: however a run is cut, killed, moved or grown, the same text gives the same catalog."""

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import write_corpus

from sae_census.compute.census.census import SiteCensus
from sae_census.config import AnalyzeConfig
from sae_census.errors import IdentityError
from sae_census.flows.census.analyze import Analysis, analyze
from sae_census.io.store.blobs import LocalBlobs
from sae_census.records import unsealed
from sae_census.steps.census import ranges, shard

MakeToy = Callable[..., AnalyzeConfig]
SITES = (("blocks.0.hook_resid_post", "early"), ("blocks.1.hook_resid_post", "late"))


class Killed(BaseException):
    """The process ends here: nothing may catch it."""


def run(config: AnalyzeConfig) -> Analysis:
    analysis = analyze(config, lambda line: None)
    assert analysis.failures == ()
    return analysis


@pytest.fixture(scope="module")
def toy_corpus(tmp_path_factory) -> Path:
    """Two files of a few documents: a handful of shards."""
    folder = tmp_path_factory.mktemp("toy")
    write_corpus(folder / "b.jsonl", seed=5, num_documents=4)
    write_corpus(folder / "d.jsonl", seed=6, num_documents=5)
    return folder


@pytest.fixture(scope="module")
def toy(analyze_config, toy_corpus) -> MakeToy:
    """Makes a config of the toy corpus, or of another folder."""

    def make(root: Path, folder: Path = toy_corpus, **overrides) -> AnalyzeConfig:
        corpus = {"source": str(folder / "*.jsonl"), "shard_tokens": 80} | overrides.pop("corpus", {})
        return analyze_config(root, corpus=corpus, **overrides)

    return make


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory) -> Analysis:
    """The catalog of an undisturbed run."""
    return run(toy(tmp_path_factory.mktemp("whole")))


def files_of(root: Path, kind: str) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every file of a kind ('shards', 'partials', …), by path."""
    paths = [path for path in root.glob(f"*/*/{kind}/*") if path.is_file()]
    return {str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def same_content(one: Analysis, other: Analysis) -> None:
    """Equal tables and arrays, whatever the layout of their files."""
    for table in ("features", "slices"):
        assert getattr(one.catalog, table).equals(getattr(other.catalog, table))
    for site in SITES:
        arrays, others = one.catalog.statistics(*site), other.catalog.statistics(*site)
        assert arrays.keys() == others.keys()
        assert all(np.array_equal(arrays[name], others[name]) for name in arrays)
    for row in one.catalog.features.select(["hook_point", "sae", "feature_id"]).to_pylist():
        assert one.catalog.spans(*row.values()).equals(other.catalog.spans(*row.values()))


def test_split_codes_counted_in_blocks_of_any_size_give_the_same_catalog(toy, whole, tmp_path, monkeypatch):
    for block_codes in (1, 300):
        monkeypatch.setattr(shard, "SiteCensus", functools.partial(SiteCensus, block_codes=block_codes))
        assert run(toy(tmp_path / str(block_codes))).catalog.digest == whole.catalog.digest


def test_split_shards_of_any_size_give_the_same_statistics(toy, whole, tmp_path):
    for shard_tokens in (16, 10_000):
        other = run(toy(tmp_path / str(shard_tokens), corpus={"shard_tokens": shard_tokens}))
        # labels are read off samples, and those are drawn by a hash of the shard
        numbers, others = (made.catalog.features.drop_columns("proto_label") for made in (whole, other))
        assert others.equals(numbers)
        assert other.catalog.slices.equals(whole.catalog.slices)
        for site in SITES:  # but not documents, which the edges of shards cut
            arrays, others = whole.catalog.statistics(*site), other.catalog.statistics(*site)
            for name in ("count", "context_count", "maximum", "total", "total_square"):
                assert np.array_equal(arrays[f"slice_{name}"], others[f"slice_{name}"])


def test_padding_batches_that_do_not_divide_the_contexts_change_no_count(toy, whole, tmp_path):
    for contexts in (1, 5):
        other = run(toy(tmp_path / str(contexts), batch={"contexts": contexts})).catalog.features
        for name in ("count", "context_count", "tokens_counted"):
            assert other[name].equals(whole.catalog.features[name])
        np.testing.assert_allclose(other["mean"], whole.catalog.features["mean"], rtol=1e-4)


def test_range_a_reduce_in_ranges_equals_one_at_once(toy, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(ranges, "FEATURE_CHUNK", 40)
    same_content(run(toy(tmp_path)), whole)


@contextlib.contextmanager
def killed_after(num_writes: int, monkeypatch) -> Iterator[list[str]]:
    """The process dies when it tries to write once more; yields the keys as they are written."""
    written: list[str] = []

    def counting(inner):
        def write(self, key, *args):
            if len(written) >= num_writes:
                raise Killed(key)
            written.append(key)
            return inner(self, key, *args)

        return write

    with monkeypatch.context() as patch:
        for name in ("put", "put_if_absent", "adopt"):
            patch.setattr(LocalBlobs, name, counting(getattr(LocalBlobs, name)))
        yield written


def test_resume_a_run_killed_at_any_write_and_run_again_gives_the_same_catalog(toy, sae_dirs, tmp_path, monkeypatch):
    make = functools.partial(toy, saes=[{"path": str(sae_dirs["early"])}])
    with killed_after(1 << 30, monkeypatch) as journal:
        whole = run(make(tmp_path / "whole"))
    arrays = [i for i, key in enumerate(journal) if "statistics.zarr" in key]
    points = sorted(set(range(len(journal))) - set(arrays[1:-1]))  # of the many files of arrays the first and last
    assert len(points) > 20
    for point in points:
        config = make(tmp_path / str(point))
        with killed_after(point, monkeypatch), pytest.raises(Killed):
            run(config)
        again = run(config)
        assert again.catalog.digest == whole.catalog.digest, journal[point]
        same_bytes(again, whole)
        latest, _ = unsealed((again.catalog.folder.parent / "latest.json").read_bytes(), "latest.json")
        assert latest == {"snapshot": again.catalog.number, "digest": again.catalog.digest}


def same_bytes(one: Analysis, other: Analysis) -> None:
    """The files that the manifest names are there, with equal bytes."""
    for file in one.catalog.manifest.files:
        assert (one.catalog.folder / file).read_bytes() == (other.catalog.folder / file).read_bytes()


def test_resume_lost_receipts_and_partials_are_made_again_the_same(toy, whole, tmp_path):
    config = toy(tmp_path)
    run(config)
    before = files_of(tmp_path, "partials")
    for kind in ("receipts", "partials"):
        for path in sorted(tmp_path.glob(f"*/*/{kind}/*"))[::2]:
            path.unlink()
    again = run(config)
    assert (again.catalog.digest, again.is_new) == (whole.catalog.digest, False)
    assert {k: v[0] for k, v in files_of(tmp_path, "partials").items()} == {k: v[0] for k, v in before.items()}


@pytest.mark.parametrize("kind", ["partials", "receipts", "sources"])
def test_resume_a_file_with_a_flipped_byte_is_made_again_the_same(toy, whole, tmp_path, kind):
    config = toy(tmp_path)
    run(config)
    path = min(tmp_path.glob(f"*/*/{kind}/*"))
    sound = path.read_bytes()
    broken = bytearray(sound)
    broken[len(sound) // 2] ^= 0xFF
    path.write_bytes(broken)
    again = run(config)
    assert again.catalog.digest == whole.catalog.digest
    if kind != "receipts":  # a receipt also says when and where it was made
        assert path.read_bytes() == sound


NEAR_WINDOW = {"before": 8, "after": 3}
"""Spans of just the tokens by which near duplicates are told: equal spans are near duplicates, and the other way."""


def drawn(analysis: Analysis, site: tuple[str, str], feature: int, shards: set[str]) -> set[tuple]:
    """The hash-random firings of a feature in some shards; a larger corpus may push some out, and draw no others."""
    rows = analysis.catalog.spans(*site, feature, ["random"]).to_pylist()
    return {(*row["token_ids"], row["position"] - row["start"]) for row in rows if row["shard_id"] in shards}


def test_grown_a_new_file_adds_shards_and_changes_none(toy, toy_corpus, tmp_path):
    corpus = shutil.copytree(toy_corpus, tmp_path / "corpus")
    config = toy(tmp_path / "runs", corpus, sampling=NEAR_WINDOW)
    first = run(config)
    assert first.is_new
    assert not run(config).is_new
    before = {kind: files_of(tmp_path / "runs", kind) for kind in ("shards", "partials", "receipts")}
    write_corpus(corpus / "c.jsonl", seed=7, num_documents=6)  # between the two in the order of names
    grown = run(config)
    for kind, files in before.items():
        after = files_of(tmp_path / "runs", kind)
        assert files.items() < after.items(), kind
    assert (grown.is_new, grown.catalog.number) == (True, first.catalog.number + 1)
    scratch = run(toy(tmp_path / "elsewhere", corpus, sampling=NEAR_WINDOW))
    assert grown.catalog.digest == scratch.catalog.digest != first.catalog.digest
    same_bytes(grown, scratch)
    for site in SITES:
        for feature in range(64):
            shards = {shard.shard_id for shard in first.catalog.manifest.shards}
            assert drawn(grown, site, feature, shards) <= drawn(first, site, feature, shards)
    (corpus / "c.jsonl").unlink()
    assert run(config).catalog.digest == first.catalog.digest


def test_moving_the_corpus_the_model_and_the_saes_changes_nothing(toy, toy_corpus, sae_dirs, model_dir, tmp_path):
    first = run(toy(tmp_path / "runs"))
    before = {kind: files_of(tmp_path / "runs", kind) for kind in ("sources", "shards", "partials", "receipts")}
    corpus = shutil.copytree(toy_corpus, tmp_path / "moved" / "corpus")
    saes = [{"path": str(shutil.copytree(sae_dirs[name], tmp_path / "moved" / name))} for name in ("early", "late")]
    model = {"id": str(shutil.copytree(model_dir, tmp_path / "moved" / "model"))}
    for root in (tmp_path / "runs", tmp_path / "elsewhere"):
        moved = run(toy(root, corpus, model=model, saes=saes))
        assert moved.catalog.digest == first.catalog.digest
    assert {kind: files_of(tmp_path / "runs", kind) for kind in before} == before


def test_saes_another_one_costs_only_itself_and_each_alone_is_what_it_is_among_others(toy, sae_dirs, tmp_path):
    def only(*names: str, root: str = "runs", name: str = "one") -> AnalyzeConfig:
        saes = [{"path": str(sae_dirs[sae])} for sae in names]
        return toy(tmp_path / root, saes=saes, catalog={"name": name})

    run(only("late"))
    before = {kind: files_of(tmp_path / "runs", kind) for kind in ("shards", "partials", "receipts")}
    both = run(only("early", "late", name="both"))
    after = {kind: files_of(tmp_path / "runs", kind) for kind in before}
    assert after["shards"] == before["shards"]
    for kind in ("partials", "receipts"):
        assert before[kind].items() < after[kind].items()
        assert len(after[kind]) == 2 * len(before[kind])
    early = run(only("early", name="early"))
    assert {kind: files_of(tmp_path / "runs", kind) for kind in before} == after
    assert early.catalog.digest == run(only("early", root="alone", name="early")).catalog.digest
    assert both.catalog.digest == run(only("late", "early", root="scratch", name="both")).catalog.digest


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"masks": {"first_positions": 1}}, "measure.masks.first_positions was 0, now 1"),
        ({"sampling": {"seed": 9}}, "measure.sampling.seed was 0, now 9"),
        ({"batch": {"contexts": 3}}, "measure.batch_contexts was 4, now 3"),
        ({"corpus": {"packing": "document"}}, "preparation.packing was 'concat', now 'document'"),
        ({"corpus": {"bos": "never"}}, "preparation.bos was True, now False"),
        ({"saes": None}, "measure.saes.blocks.0.hook_resid_post/early"),
    ],
)
def test_another_setting_under_the_same_name_is_refused_by_its_field(toy, whole, sae_dirs, overrides, field):
    root = whole.catalog.folder.parents[2]
    if "saes" in overrides:
        overrides = {"saes": [{"path": str(sae_dirs["late"])}]}
    before = sorted(root.rglob("*"))
    with pytest.raises(IdentityError) as refused:
        run(toy(root, **overrides))
    assert field in str(refused.value)
    assert "choose another catalog.name" in str(refused.value)
    assert sorted(root.rglob("*")) == before


def test_another_setting_under_another_name_stands_beside_the_first(toy, whole):
    root = whole.catalog.folder.parents[2]
    other = run(toy(root, ranking={"score": "frequency"}, catalog={"name": "other"}))
    assert other.catalog.digest != whole.catalog.digest
    assert not run(toy(root)).is_new


def test_masks_never_change_by_default_under_a_name_that_exists(toy, tmp_path, sinky_dir):
    sinky = {"id": str(sinky_dir)}
    new = run(toy(tmp_path, model=sinky, catalog={"name": "new"}))
    assert new.catalog.measure.masks.attention_sinks is True
    assert new.catalog.manifest.config["masks"]["attention_sinks"] is True
    off = run(toy(tmp_path, model=sinky, catalog={"name": "off"}, masks={"attention_sinks": False}))
    counted = [one.catalog.manifest.coverage.tokens[SITES[0][0]]["counted"] for one in (new, off)]
    assert counted[0] < counted[1]
    for name, first in (("new", new), ("off", off)):  # said by nobody, it stays as it was
        again = run(toy(tmp_path, model=sinky, catalog={"name": name}))
        assert (again.is_new, again.catalog.digest) == (False, first.catalog.digest)
    with pytest.raises(IdentityError, match=r"measure\.masks\.attention_sinks was False, now True"):
        run(toy(tmp_path, model=sinky, catalog={"name": "off"}, masks={"attention_sinks": True}))


def test_what_the_reduce_alone_decides_makes_a_new_snapshot_without_new_partials(toy, tmp_path):
    first = run(toy(tmp_path))
    before = files_of(tmp_path, "partials")
    other = run(toy(tmp_path, ranking={"score": "max"}))
    assert (other.is_new, other.catalog.number) == (True, first.catalog.number + 1)
    assert files_of(tmp_path, "partials") == before
    assert first.catalog.features["rank"] != other.catalog.features["rank"]
