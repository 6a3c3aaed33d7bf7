"""Laws of compaction: nodes change no bit of a catalog, whatever is chosen, pruned, grown, damaged or killed."""

import contextlib
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import write_corpus

from sae_census.cli.status import text
from sae_census.config import AnalyzeConfig, StoreConfig, VerifyConfig
from sae_census.errors import ConfigError, CorruptError, ShardError
from sae_census.flows.catalog.reader import Catalog
from sae_census.flows.census import reduce
from sae_census.flows.census.analyze import Analysis, analyze
from sae_census.flows.census.compact import Compaction, compact
from sae_census.flows.census.status import runs
from sae_census.flows.census.verify import verify
from sae_census.io.store.blobs import LocalBlobs
from sae_census.io.store.zarr_files import Pack
from sae_census.records import Node, Receipt
from sae_census.steps.census import merger, shard, tree

MakeToy = Callable[..., AnalyzeConfig]


class Killed(BaseException):
    """The process ends here: nothing may catch it."""


def run(config: AnalyzeConfig) -> Analysis:
    analysis = analyze(config, lambda line: None)
    assert analysis.failures == ()
    return analysis


def compacted(root: Path, *, prune: bool = False, name: str = "default", fan: int = tree.FAN) -> Compaction:
    return compact(root, name, prune=prune, fan=fan, say=lambda line: None)


def wrong(root: Path) -> tuple[str, ...]:
    return verify(VerifyConfig(store=StoreConfig(root=str(root)))).wrong


def nodes_of(root: Path) -> dict[str, Node]:
    """By the path of their record."""
    found = sorted(root.glob("measures/*/nodes/*.json"))
    return {str(path.relative_to(root)): Node.read(path.read_bytes(), str(path)) for path in found}


def receipts_of(root: Path) -> dict[tuple[str, str], Receipt]:
    """By measure and shard."""
    found = (Receipt.read(path.read_bytes(), str(path)) for path in root.glob("measures/*/receipts/*.json"))
    return {(receipt.measure_id, receipt.shard.shard_id): receipt for receipt in found}


def bytes_in(root: Path) -> set[str]:
    """Names of all objects of partials and nodes."""
    return {path.name for path in root.glob("measures/*/partials/*")}


def arrays_of(root: Path, key: str) -> dict[str, np.ndarray]:
    with Pack(root / key) as pack:
        names = {path.removesuffix("/zarr.json") for path in pack._names if path.endswith("/zarr.json")}
        return {name: pack.read(name) for name in sorted(names)}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Two files of slice `a` and one of `b`."""
    folder = tmp_path_factory.mktemp("texts")
    write_corpus(folder / "a1.jsonl", seed=5, num_documents=5)
    write_corpus(folder / "a2.jsonl", seed=6, num_documents=3)
    write_corpus(folder / "b1.jsonl", seed=7, num_documents=4)
    return folder


@pytest.fixture(scope="module")
def toy(analyze_config, texts) -> MakeToy:
    """Makes a config of both slices, or of others, in shards of a few contexts."""

    def make(root: Path, folder: Path = texts, slices: str = "ab", **overrides) -> AnalyzeConfig:
        corpus = {"source": {name: str(folder / f"{name}*.jsonl") for name in slices}, "shard_tokens": 64}
        return analyze_config(root, corpus=corpus | overrides.pop("corpus", {}), **overrides)

    return make


@pytest.fixture(scope="module")
def plain(toy, tmp_path_factory) -> Analysis:
    """A catalog without nodes."""
    return run(toy(tmp_path_factory.mktemp("plain")))


@pytest.fixture
def root(plain, tmp_path) -> Path:
    """A copy of its store."""
    return shutil.copytree(plain.catalog.folder.parents[2], tmp_path / "runs")


@contextlib.contextmanager
def units_read(monkeypatch) -> Iterator[list[int]]:
    """How many units each SAE of a reduce reads."""
    sizes: list[int] = []
    inner = tree.units

    def watched(*args):
        found = inner(*args)
        sizes.append(len(found))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(reduce.tree, "units", watched)
        yield sizes


def test_tree_every_level_is_a_partition_of_the_shards_that_depends_on_their_list_alone():
    ids = [f"{number * 2654435761 % 2**32:08x}" for number in range(300)]
    levels = tree.levels(ids)
    assert levels == tree.levels(reversed(ids + ids[:7]))
    assert levels[-1] == [tuple(sorted(ids))]
    every = [set(members) for level in levels for members in level]
    for one, other in itertools.combinations(every, 2):
        assert one.isdisjoint(other) or one < other or other < one
    for members in every:
        below = [other for other in every if other < members]
        largest = [one for one in below if not any(one < other for other in below)]
        assert len(largest) <= tree.FAN
        assert bool(largest) == (len(members) > tree.FAN)
    assert tree.levels([]) == tree.levels(ids[:1]) == []


def test_tree_one_shard_more_changes_only_the_nodes_above_it():
    ids = [f"{number * 2654435761 % 2**32:08x}" for number in range(400)]
    before = {members for level in tree.levels(ids[1:]) for members in level}
    for level in tree.levels(ids):
        assert len([members for members in level if members not in before]) <= 1


def test_tree_ids_that_begin_alike_make_no_node_twice():
    ids = [f"00{digits}" for digits in ("00", "01", "02", "ff")]
    assert tree.levels(ids, fan=2) == [[("0000", "0001", "0002")], [("0000", "0001", "0002", "00ff")]]


def test_compacted_a_catalog_is_the_same_and_is_reduced_from_one_node_a_slice(toy, plain, root, monkeypatch):
    made = compacted(root, fan=2)
    assert made.num_made == len(nodes_of(root)) > 4
    assert (made.num_kept, made.num_skipped, made.num_pruned) == (0, 0, 0)
    with units_read(monkeypatch) as sizes:
        again = run(toy(root))
    assert (again.is_new, again.catalog.digest) == (False, plain.catalog.digest)
    assert sizes == [2, 2]  # one of each slice, for each of two SAEs
    assert wrong(root) == ()
    once_more = compacted(root, fan=2)
    assert (once_more.num_made, once_more.num_kept) == (0, made.num_made)


def test_compacted_in_ranges_or_at_once_nodes_are_the_same(root, tmp_path, monkeypatch):
    other = shutil.copytree(root, tmp_path / "other")
    compacted(root, fan=2)
    monkeypatch.setattr(merger.zarr_files, "FEATURE_CHUNK", 40)
    # the chunks of the stored arrays differ, what they hold does not
    compacted(other, fan=2)
    for key, node in nodes_of(root).items():
        one, two = arrays_of(root, node.merged.key), arrays_of(other, nodes_of(other)[key].merged.key)
        assert one.keys() == two.keys()
        assert all(np.array_equal(one[name], two[name]) and one[name].dtype == two[name].dtype for name in one)


def test_node_is_the_same_to_the_bit_from_partials_and_from_smaller_nodes(root, tmp_path):
    other = shutil.copytree(root, tmp_path / "other")
    compacted(root, fan=2)
    compacted(other, fan=1000)
    few, many = nodes_of(other), nodes_of(root)
    assert len(few) == 4 < len(many)
    assert few.items() <= many.items()


def test_node_says_of_every_feature_what_the_partials_of_its_shards_say_together(root):
    compacted(root, fan=2)
    receipts = receipts_of(root)
    for node in nodes_of(root).values():
        found = arrays_of(root, node.merged.key)
        mine = [receipts[node.measure_id, shard_id] for shard_id in node.shards]
        parts = [arrays_of(root, receipt.partial.key) for receipt in mine]
        assert node.tokens == {rule: sum(r.tokens.get(rule, 0) for r in mine) for rule in node.tokens}
        assert node.contexts == sum(receipt.contexts for receipt in mine)
        for name in ("count", "context_count", "histogram", "document_count", "l0_histogram", "fit_tokens"):
            assert np.array_equal(found[name], sum(part[name] for part in parts))
        assert np.array_equal(found["maximum"], np.max([part["maximum"] for part in parts], axis=0))
        slow_samples(found, parts)


def slow_samples(found: dict[str, np.ndarray], parts: list[dict[str, np.ndarray]]) -> None:
    """Samples and codes of a node, address by address, against all that its partials kept."""
    num_features = len(found["count"])
    every = [codes_by_context(part) for part in parts]
    wanted = set()
    for feature in range(num_features):
        strongest = sorted(
            (-float(value), ordinal, int(row), int(position))
            for ordinal, part in enumerate(parts)
            for value, row, position in zip(
                *(part[f"top_{c}"][feature] for c in ("value", "row", "position")), strict=True
            )
            if row >= 0
        )
        columns = (found[f"top_{c}"][feature] for c in ("value", "shard", "row", "position"))
        kept = [(-float(v), int(s), int(r), int(p)) for v, s, r, p in zip(*columns, strict=True) if r >= 0]
        assert kept == strongest[: found["top_row"].shape[1]]
        for name in ("top", "random", "bands"):
            places = zip(found[f"{name}_shard"][feature], found[f"{name}_row"][feature], strict=True)
            wanted |= {(feature, int(s), int(r)) for s, r in places if r >= 0}
    assert codes_by_context(found) == {key: every[key[1]][key[0], 0, key[2]] for key in wanted}
    silent = list(zip(found["silent_shard"].tolist(), found["silent_row"].tolist(), strict=True))
    assert len(silent) == min(len(set(silent)), sum(len(part["silent_row"]) for part in parts))
    for index, (ordinal, row) in enumerate(silent):
        fired = found["silent_feature"][found["silent_start"][index] : found["silent_start"][index + 1]]
        place = parts[ordinal]["silent_row"].tolist().index(row)
        start = parts[ordinal]["silent_start"]
        assert np.array_equal(fired, parts[ordinal]["silent_feature"][start[place] : start[place + 1]])


def codes_by_context(arrays: dict[str, np.ndarray]) -> dict[tuple[int, int, int], tuple[list[int], list[float]]]:
    """Positions and codes of every kept context, by feature, shard and row."""
    feature = np.repeat(np.arange(len(arrays["pair_start"]) - 1), np.diff(arrays["pair_start"])).tolist()
    row = arrays["pair_row"].tolist()
    ordinal = arrays.get("pair_shard", np.zeros(len(row), int)).tolist()
    runs = itertools.pairwise(arrays["code_start"].tolist())
    codes = [(arrays["code_position"][a:b].tolist(), arrays["code_value"][a:b].tolist()) for a, b in runs]
    return dict(zip(zip(feature, ordinal, row, strict=True), codes, strict=True))


def test_a_compaction_is_told_among_the_runs(root):
    compacted(root)
    told = next(runs(LocalBlobs(root)))
    assert (told.state, told.stage, told.snapshot) == ("finished", "compact", None)
    assert "no snapshot was to be made" in text(told, told.seen_at)


def test_pruned_a_catalog_is_the_same_from_its_roots_and_nothing_is_analysed_again(toy, plain, root):
    made = compacted(root, prune=True, fan=2)
    roots = nodes_of(root)
    assert len(roots) == 4
    assert bytes_in(root) == {Path(node.merged.key).name for node in roots.values()}
    assert made.num_pruned == len(receipts_of(root)) + made.num_made - 4
    assert made.bytes_after < made.bytes_before
    again = run(toy(root))
    assert (again.is_new, again.catalog.digest) == (False, plain.catalog.digest)
    assert len(bytes_in(root)) == 4
    assert wrong(root) == ()
    assert run(toy(root, ranking={"score": "max"})).is_new  # a reduce that must write all anew
    assert len(bytes_in(root)) == 4


@pytest.mark.parametrize("prune", [False, True])
def test_slices_alone_are_reduced_from_their_own_nodes(toy, root, tmp_path, prune, monkeypatch):
    compacted(root, prune=prune)
    before = bytes_in(root)
    for name in "ab":
        with units_read(monkeypatch) as sizes:
            part = run(toy(root, slices=name, catalog={"name": name}))
        assert sizes == [1, 1]
        assert part.catalog.digest == run(toy(tmp_path / name, slices=name)).catalog.digest
    assert bytes_in(root) == before


@pytest.mark.parametrize("prune", [False, True])
def test_subset_of_a_slice_is_the_same_from_smaller_nodes_or_analysed_again(toy, texts, root, tmp_path, prune):
    compacted(root, prune=prune, fan=2)
    before = bytes_in(root)
    fewer = shutil.copytree(texts, tmp_path / "fewer")
    (fewer / "a2.jsonl").unlink()
    part = run(toy(root, fewer, catalog={"name": "fewer"}))
    assert part.catalog.digest == run(toy(tmp_path / "scratch", fewer)).catalog.digest
    shards = [one for one in part.catalog.manifest.shards if one.slice == "a"]
    again = {receipts_of(root)[m, one.shard_id].partial.key for m in measures(root) for one in shards}
    assert {Path(key).name for key in again} == bytes_in(root) - before if prune else bytes_in(root) == before
    assert wrong(root) == ()


def test_subset_that_was_pruned_is_refused_where_nothing_can_be_analysed(root):
    compacted(root, prune=True)
    blobs, measure_id = LocalBlobs(root), measures(root)[0]
    every = [receipt for (mine, _), receipt in receipts_of(root).items() if mine == measure_id]
    tree.check_there(blobs, tree.units(tree.Nodes(blobs, measure_id), every))
    with pytest.raises(ConfigError, match="chosen shards are gone, the first is"):
        tree.check_there(blobs, tree.units(tree.Nodes(blobs, measure_id), every[1:]))


def measures(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "measures").iterdir())


def test_grown_after_pruning_and_compacted_again_equals_a_catalog_from_scratch(toy, texts, root, tmp_path):
    compacted(root, prune=True, fan=2)
    grown = shutil.copytree(texts, tmp_path / "grown")
    write_corpus(grown / "a3.jsonl", seed=8, num_documents=6)
    before = bytes_in(root)
    scratch = run(toy(tmp_path / "scratch", grown)).catalog
    one = run(toy(root, grown)).catalog
    assert one.digest == scratch.digest
    new = {shard.shard_id for shard in scratch.manifest.shards} - {s for _, s in _old(root, before)}
    assert len(bytes_in(root) - before) == 2 * len(new) > 0  # only what is new was analysed, for two SAEs
    for prune in (False, True):
        again = compacted(root, prune=prune, fan=2)
        assert again.num_skipped > 0
        analysis = run(toy(root, grown))
        assert (analysis.is_new, analysis.catalog.digest) == (False, scratch.digest)
        assert wrong(root) == ()
    assert len(bytes_in(root)) == 4
    compacted(tmp_path / "scratch", prune=True, fan=2)
    assert nodes_of(root) == nodes_of(tmp_path / "scratch")


def _old(root: Path, before: set[str]) -> list[tuple[str, str]]:
    """Measure and shard of the receipts whose shards nodes of that time stand for."""
    old = {shard for node in nodes_of(root).values() if Path(node.merged.key).name in before for shard in node.shards}
    return [key for key in receipts_of(root) if key[1] in old]


@pytest.mark.parametrize("prune", [False, True])
def test_damaged_node_is_named_and_not_used(toy, plain, root, prune):
    compacted(root, prune=prune)
    node = max(nodes_of(root).values(), key=lambda node: len(node.shards))
    path = root / node.merged.key
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 0xFF
    path.write_bytes(body)
    named = wrong(root)
    assert f"{node.merged.key} is damaged" in named[0]
    assert len(named) == 1 + (len(node.shards) if prune else 0)
    if prune:
        with pytest.raises(CorruptError, match="run sae-census analyze again"):
            compacted(root)
    heard: list[str] = []
    again = analyze(toy(root), heard.append)
    assert (again.is_new, again.catalog.digest) == (False, plain.catalog.digest)
    assert any(f"node {node.node_id} of" in line and "damaged" in line for line in heard)
    assert compacted(root).num_made == 1
    assert wrong(root) == ()


def test_damaged_record_of_a_node_is_named_and_the_node_is_not_used(toy, plain, root):
    compacted(root)
    key, node = min(nodes_of(root).items())
    lie = node.model_copy(update={"shards": node.shards[:-1]})
    (root / key).write_bytes(lie.to_bytes())
    assert [line.split(" cannot")[0] for line in wrong(root)] == [key]
    assert run(toy(root)).catalog.digest == plain.catalog.digest
    compacted(root)
    assert wrong(root) == ()


def test_damaged_partial_is_not_merged(root, monkeypatch):
    path = root / min(receipt.partial.key for receipt in receipts_of(root).values())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Exception, match=f"{path.name} is damaged; run sae-census analyze again"):
        compacted(root, prune=True)
    assert path.exists()


def test_kept_codes_are_never_pruned(toy, sae_dirs, tmp_path):
    config = toy(tmp_path / "runs", codes="keep", slices="b", saes=[{"path": str(sae_dirs["early"])}])
    first = run(config)
    before = bytes_in(tmp_path / "runs")
    with pytest.raises(ConfigError, match="keeps all codes, which only its partials hold"):
        compacted(tmp_path / "runs", prune=True)
    assert bytes_in(tmp_path / "runs") == before
    compacted(tmp_path / "runs")
    again = run(config)
    assert (again.is_new, again.catalog.digest) == (False, first.catalog.digest)


def test_pruned_a_catalog_says_that_its_codes_were_not_kept(root):
    compacted(root, prune=True)
    with pytest.raises(ConfigError, match="codes were not kept"):
        next(Catalog(root).codes("blocks.1.hook_resid_post", "late", 0))


def test_pruned_what_a_shard_that_fails_for_another_sae_took_along_is_analysed_again(
    toy, sae_dirs, tmp_path, monkeypatch
):
    def only(*names: str, root: str, name: str) -> AnalyzeConfig:
        saes = [{"path": str(sae_dirs[sae])} for sae in names]
        return toy(tmp_path / root, saes=saes, slices="b", catalog={"name": name})

    first = run(only("late", root="runs", name="one"))
    compacted(tmp_path / "runs", prune=True, name="one")
    victim = first.catalog.manifest.shards[0].shard_id
    inner = shard.Analyzer.contexts

    def contexts(self, shard_id):
        if shard_id == victim:
            raise ShardError("never")
        return inner(self, shard_id)

    monkeypatch.setattr(shard.Analyzer, "contexts", contexts)
    both = analyze(only("early", "late", root="runs", name="both"), lambda line: None)
    scratch = analyze(only("early", "late", root="scratch", name="both"), lambda line: None)
    assert [failure.shard.shard_id for failure in both.failures] == [victim]
    assert both.catalog.digest == scratch.catalog.digest


@contextlib.contextmanager
def killed_after(num_steps: int, monkeypatch) -> Iterator[list[str]]:
    """The process dies when it tries to write or delete once more; yields what it did, but for its events."""
    done: list[str] = []

    def counting(inner):
        def step(self, key, *args):
            if not key.startswith("events/"):
                if len(done) >= num_steps:
                    raise Killed(key)
                done.append(key)
            return inner(self, key, *args)

        return step

    with monkeypatch.context() as patch:
        for name in ("put", "delete"):
            patch.setattr(LocalBlobs, name, counting(getattr(LocalBlobs, name)))
        yield done


def test_killed_at_any_write_or_delete_the_store_is_usable_and_the_same_command_finishes(
    toy, sae_dirs, tmp_path, monkeypatch
):
    def make(root: Path) -> AnalyzeConfig:
        return toy(root, slices="b", saes=[{"path": str(sae_dirs["early"])}], corpus={"shard_tokens": 48})

    first = run(make(tmp_path / "first"))
    whole = shutil.copytree(tmp_path / "first", tmp_path / "whole")
    with killed_after(1 << 30, monkeypatch) as journal:
        compacted(whole, prune=True, fan=2)
    deletes = [i for i, key in enumerate(journal) if key in journal[:i] or key in _partials(tmp_path / "first")]
    assert len(journal) > 10
    assert {key for key in journal if "/nodes/" in key} > set(nodes_of(whole))  # there were inner nodes
    assert min(deletes) > max(i for i in range(len(journal)) if i not in deletes)  # all is made before any is pruned
    for point in range(len(journal)):
        root = shutil.copytree(tmp_path / "first", tmp_path / str(point))
        with killed_after(point, monkeypatch), pytest.raises(Killed):
            compacted(root, prune=True, fan=2)
        assert wrong(root) == (), journal[point]
        before = bytes_in(root)
        again = run(make(root))
        assert (again.is_new, again.catalog.digest) == (False, first.catalog.digest), journal[point]
        assert bytes_in(root) == before  # nothing had to be analysed again
        compacted(root, prune=True, fan=2)
        assert (nodes_of(root), bytes_in(root)) == (nodes_of(whole), bytes_in(whole)), journal[point]


def _partials(root: Path) -> set[str]:
    return {receipt.partial.key for receipt in receipts_of(root).values()}
