"""Compact the partials of a catalog: a tree of nodes, each the merge of the partials of many shards of a slice.

A reduce that finds nodes reads them in place of partials, and publishes the same bytes. Pruning gives the space of
the partials back and keeps of every slice the root: a corpus that grows is then reduced from the roots and the new
partials, while any other choice of shards is analysed again.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path

from sae_census.config import ClusterConfig
from sae_census.errors import ConfigError, CorruptError
from sae_census.flows.catalog.reader import Catalog
from sae_census.io.store.blobs import LocalBlobs
from sae_census.records import Node, Receipt, ShardRecord
from sae_census.steps.census import plan, tree
from sae_census.steps.census.merger import Merger, NodeTask
from sae_census.steps.cluster import connected, run_tasks
from sae_census.steps.cluster.outcomes import result_of
from sae_census.steps.store import entries, layout
from sae_census.steps.store.progress import RunLog, Stage, new_run
from sae_census.types import SiteKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Compaction:
    """What a run gave."""

    num_made: int
    """Nodes."""
    num_kept: int
    """Nodes that were there already."""
    num_skipped: int
    """Nodes that cannot be made, because partials below them were pruned, and are not needed: a root stands above."""
    num_pruned: int
    """Partials and nodes whose bytes were deleted, with those that no record names: runs that died left them."""
    bytes_before: int
    """Of all that lies under the catalog's measures."""
    bytes_after: int


def compact(
    root: str | Path,
    name: str,
    snapshot: int | None = None,
    *,
    prune: bool = False,
    fan: int = tree.FAN,
    cluster: ClusterConfig | None = None,
    say: Callable[[str], None] | None = None,
) -> Compaction:
    """Make all nodes over the shards of a snapshot, for every SAE. What is there and sound is not made again.

    Args:
        root: of the store.
        name: of the catalog.
        snapshot: its number; the newest, if none is named.
        prune: then delete what the roots stand for: partials and smaller nodes. Nothing else may use the store.
        fan: a node of at most so many shards is made of their partials, any other of the nodes below it.
        cluster: who does the work; this process, if nothing is said.
        say: hears every line that is meant for people; by default they go to stderr.

    Raises:
        ConfigError: if there is no such snapshot, or it keeps codes and is to be pruned.
        IdentityError: if it was made from partials of another format.
        CorruptError: if partials are damaged or gone and no node stands for them.
    """
    cluster = cluster or ClusterConfig()
    catalog = Catalog(root, name, snapshot)
    if prune and catalog.measure.codes == "keep":
        raise ConfigError(
            f"catalog {name!r} keeps all codes, which only its partials hold: they cannot be pruned; compact it without"
        )
    blobs = LocalBlobs(root)
    measures = _measures(blobs, catalog, fan)
    bytes_before = _bytes(blobs, measures)
    log = RunLog(blobs, layout.events(new_run()), say)
    with (
        log.running({"catalog": name, "workers": cluster.num_workers, "address": cluster.address}),
        connected(cluster),
    ):
        run = _Run(blobs, measures, partial(Merger, str(blobs.root), catalog.measure.sampling), cluster, log)
        run.make(roots_suffice=prune)
        num_pruned = run.prune() if prune else 0
        log.event("done", {"snapshot": None, "is_new": False})
    return Compaction(
        num_made=run.num_made,
        num_kept=run.num_kept,
        num_skipped=run.num_skipped,
        num_pruned=num_pruned,
        bytes_before=bytes_before,
        bytes_after=_bytes(blobs, measures),
    )


class _Measure:
    """One SAE of a snapshot: what of its shards is there."""

    def __init__(self, blobs: LocalBlobs, measure_id: str, num_features: int, shards: Sequence[ShardRecord], fan: int):
        self._blobs = blobs
        self.measure_id, self.num_features = measure_id, num_features
        self.nodes = tree.Nodes(blobs, measure_id)
        found = (plan.read_receipt(blobs, measure_id, shard) for shard in shards)
        self.receipts: dict[str, Receipt] = {receipt.shard.shard_id: receipt for receipt in found if receipt}
        by_slice: dict[str, list[str]] = {}
        for shard in shards:
            by_slice.setdefault(shard.slice, []).append(shard.shard_id)
        self._trees = {name: tree.levels(by_slice[name], fan) for name in sorted(by_slice)}

    def levels(self) -> list[list[tuple[str, tuple[str, ...]]]]:
        """Slice and shards of every node, those of all slices level by level, the deepest first and all roots last."""
        by_depth = zip_longest(*(
            [[(name, shards) for shards in level] for level in reversed(levels)] for name, levels in self._trees.items()
        ), fillvalue=())  # fmt: skip
        return [[node for level in depth for node in level] for depth in by_depth][::-1]

    def root(self, slice_name: str) -> tuple[str, ...]:
        """The shards of a slice, if they are more than one; else none."""
        levels = self._trees[slice_name]
        return levels[-1][0] if levels else ()

    def roots(self) -> Iterator[Node | None]:
        """The root of every slice that has one, None where it is not there."""
        for name in self._trees:
            if shards := self.root(name):
                yield self.nodes.find(self.measure_id, name, shards)

    def task(self, shards: tuple[str, ...]) -> NodeTask | None:
        """How to make a node of what is there; None if something of it is gone."""
        if not self.receipts.keys() >= set(shards):
            return None
        units = tree.units(self.nodes, [self.receipts[shard_id] for shard_id in shards])
        if not all(self._blobs.exists(unit.stored.key) for unit in units):
            return None
        return NodeTask(measure_id=self.measure_id, num_features=self.num_features, units=units)


def _measures(blobs: LocalBlobs, catalog: Catalog, fan: int) -> list[_Measure]:
    """Of every SAE of a snapshot; SAEs that are equal share one."""
    shards = catalog.manifest.shards
    sites = {}
    for site, measure_id in catalog.measure.ids.items():
        sites[measure_id] = SiteKey.parse(site)
    return [
        _Measure(blobs, key, catalog.of_sae(str(site.hook_point), site.sae).num_rows, shards, fan)
        for key, site in sites.items()
    ]


class _Run:
    """Makes the nodes of all measures level by level, then may prune."""

    def __init__(
        self,
        blobs: LocalBlobs,
        measures: list[_Measure],
        make: Callable[[], Merger],
        cluster: ClusterConfig,
        log: RunLog,
    ):
        self._blobs, self._measures, self._make, self._cluster, self._log = blobs, measures, make, cluster, log
        self.num_made = self.num_kept = self.num_skipped = 0

    def make(self, *, roots_suffice: bool) -> None:
        """Make what is not there."""
        levels = self._measures[0].levels()
        total = sum(map(len, levels)) * len(self._measures)
        with self._log.stage("compact", total, "shards") as stage:
            for level in levels:
                todo = {}
                for measure in self._measures:
                    for slice_name, shards in level:
                        task = self._task(measure, slice_name, shards, roots_suffice=roots_suffice)
                        if task is None:
                            stage.advance()
                        else:
                            todo[measure.measure_id, task.shards] = task
                self._merge(list(todo.values()), stage)

    def _task(
        self, measure: _Measure, slice_name: str, shards: tuple[str, ...], *, roots_suffice: bool
    ) -> NodeTask | None:
        if measure.nodes.find(measure.measure_id, slice_name, shards):
            self.num_kept += 1
            return None
        root = measure.root(slice_name)
        if roots_suffice and shards != root and measure.nodes.find(measure.measure_id, slice_name, root):
            self.num_skipped += 1
            return None
        task = measure.task(shards)
        if task is None:
            if shards == root:
                raise CorruptError(
                    f"partials of measure {measure.measure_id} are gone and no node stands for them alone; run "
                    "sae-census analyze again, which recomputes them, then compact"
                )
            self.num_skipped += 1
        return task

    def _merge(self, todo: list[NodeTask], stage: Stage) -> None:
        nodes = {measure.measure_id: measure.nodes for measure in self._measures}
        for outcome in run_tasks(self._make, todo, self._cluster, on_event=self._log.event, stage="compact"):
            node = result_of(outcome, f"the node of {len(outcome.task.shards)} shards")
            nodes[node.measure_id].add(node)
            self.num_made += 1
            stage.advance(len(node.shards))

    def prune(self) -> int:
        """Delete what the roots stand for, once all of them are proved by their bytes; how many partials and nodes."""
        roots = [(measure, root) for measure in self._measures for root in measure.roots()]
        for _, root in roots:
            if root is None or not tree.is_sound(self._blobs, root):
                raise CorruptError("a root is damaged or gone, so nothing was pruned; compact again")
        with self._log.stage("prune", len(self._measures), "files") as stage:
            num_pruned = 0
            for measure in self._measures:
                pruned = self._prune(measure, [root for mine, root in roots if mine is measure and root is not None])
                stage.advance(pruned)
                num_pruned += pruned
        return num_pruned

    def _prune(self, measure: _Measure, roots: list[Node]) -> int:
        """Delete the records of smaller nodes, then all bytes but those that a record says are still to be read."""
        inner = [node for root in roots for node in measure.nodes.inside(root)]
        for node in inner:
            self._blobs.delete(layout.node(node.measure_id, node.node_id))
        self._blobs.sync()
        stood_for = {shard_id for root in roots for shard_id in root.shards}
        receipts = plan.all_receipts(self._blobs, measure.measure_id)
        keep = {receipt.partial.key for receipt in receipts if receipt.shard.shard_id not in stood_for}
        keep |= {node.merged.key for node in measure.nodes if node not in inner}
        folder = layout.partials(measure.measure_id)
        there = [f"{folder}/{name}" for name in entries.named(self._blobs.path(folder), entries.PARTIAL)]
        pruned = [key for key in there if key not in keep]
        for key in pruned:
            self._blobs.delete(key)
        return len(pruned)


def _bytes(blobs: LocalBlobs, measures: list[_Measure]) -> int:
    """Of all that lies under measures."""
    return sum(blobs.path(key).stat().st_size for one in measures for key in blobs.list(f"measures/{one.measure_id}"))
