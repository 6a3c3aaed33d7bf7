"""The tree of nodes over the shards of a slice: which nodes there should be, which there are, what they stand for.

Ids of shards are uniformly distributed, so a trie over their digits is balanced, and a function of the list of
shards alone: one shard more changes only the nodes above it. A node is believed if its record names itself and its
bytes are those that the record names; any other is as good as none.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from sae_census.errors import ConfigError, CorruptError
from sae_census.io.store.blobs import LocalBlobs
from sae_census.records import Node, Receipt, ShardRecord, node_id
from sae_census.steps.census.partial import Unit
from sae_census.steps.store import entries, layout

FAN = 16
"""A node of at most so many shards is made of their partials, any other of the nodes below it."""


def levels(shard_ids: Iterable[str], fan: int = FAN) -> list[list[tuple[str, ...]]]:
    """The shards of every node of a tree, deepest nodes first; the last is the root, of all shards.

    One shard makes no node: its partial is all that there is to say.

    Args:
        shard_ids: of one slice, in any order.
        fan: a node of at most so many shards has no nodes below it.
    """
    found: dict[int, list[tuple[str, ...]]] = {}

    def grow(members: tuple[str, ...], depth: int) -> None:
        if len(members) < 2:
            return
        found.setdefault(depth, []).append(members)
        if len(members) > fan:
            digit = next(i for i in range(len(members[0])) if len({shard_id[i] for shard_id in members}) > 1)
            for _, below in groupby(members, key=lambda shard_id: shard_id[digit]):
                grow(tuple(below), depth + 1)

    grow(tuple(sorted(set(shard_ids))), 0)
    return [found[depth] for depth in sorted(found, reverse=True)]


class Nodes:
    """The nodes of one measure in a store, as they were when it was opened."""

    def __init__(self, blobs: LocalBlobs, measure_id: str):
        self._blobs = blobs
        self._found: dict[str, Node] = {}
        self._sound: dict[str, bool] = {}
        for key in entries.records(blobs, layout.nodes(measure_id)):
            node = read_node(blobs, key)
            if node is not None:
                self._found[node.node_id] = node

    def __iter__(self) -> Iterator[Node]:
        return iter(self._found.values())

    def add(self, node: Node) -> None:
        """Take in a node that was just made."""
        self._found[node.node_id] = node
        self._sound[node.node_id] = True

    def find(self, measure_id: str, slice_name: str, shards: Sequence[str]) -> Node | None:
        """The node of exactly these shards (sorted by id), if it is sound."""
        node = self._found.get(node_id(measure_id, slice_name, shards))
        return node if node is not None and self._is_sound(node) else None

    def inside(self, node: Node) -> list[Node]:
        """Nodes of some of a node's shards, sound or not."""
        others = (other for other in self._found.values() if other.slice == node.slice)
        return [other for other in others if set(other.shards) < set(node.shards)]

    def cover(self, shards: Iterable[ShardRecord]) -> list[Node]:
        """The largest sound nodes that stand for some of these shards and for no other; they share none.

        The same nodes give the same answer: of equal size, the one of smaller first shards comes first.
        """
        free: dict[str, set[str]] = {}
        for shard in shards:
            free.setdefault(shard.slice, set()).add(shard.shard_id)
        chosen = []
        for node in sorted(self._found.values(), key=lambda node: (-len(node.shards), node.shards)):
            mine = free.get(node.slice, set())
            if mine.issuperset(node.shards) and self._is_sound(node):
                mine.difference_update(node.shards)
                chosen.append(node)
        return chosen

    @property
    def shards(self) -> set[str]:
        """Those that sound nodes stand for."""
        return {shard_id for node in self._found.values() if self._is_sound(node) for shard_id in node.shards}

    @property
    def damaged(self) -> list[Node]:
        """Nodes that were looked at and are not sound."""
        return [self._found[key] for key, sound in self._sound.items() if not sound]

    def _is_sound(self, node: Node) -> bool:
        if node.node_id not in self._sound:
            self._sound[node.node_id] = is_sound(self._blobs, node)
        return self._sound[node.node_id]


def units(nodes: Nodes, receipts: Sequence[Receipt]) -> tuple[Unit, ...]:
    """What to read for some shards: the largest nodes of theirs, and for the rest their partials, by first shard."""
    chosen = nodes.cover(receipt.shard for receipt in receipts)
    covered = {shard_id for node in chosen for shard_id in node.shards}
    rest = (Unit.of_receipt(receipt) for receipt in receipts if receipt.shard.shard_id not in covered)
    return tuple(sorted([*map(Unit.of_node, chosen), *rest], key=lambda unit: unit.shards[0]))


def check_there(blobs: LocalBlobs, units: Iterable[Unit]) -> None:
    """Prove that there is something to read for every shard.

    Raises:
        ConfigError: if partials are gone, as those that were pruned, and their nodes also stand for other shards.
    """
    if gone := [unit.shards[0] for unit in units if not blobs.exists(unit.stored.key)]:
        raise ConfigError(
            f"the partials of {len(gone)} chosen shards are gone, the first is {gone[0]}, and no node stands for "
            "chosen shards alone; choose all that were compacted together, or run "
            "sae-census analyze on the chosen text alone"
        )


def read_node(blobs: LocalBlobs, key: str) -> Node | None:
    """The node of a record, if it can be read and lies under its own name; its bytes may be damaged or gone."""
    try:
        node = Node.read(blobs.get(key), key)
    except CorruptError:
        return None
    return node if key == layout.node(node.measure_id, node.node_id) else None


def is_sound(blobs: LocalBlobs, node: Node) -> bool:
    """Whether the bytes of a node are those that its record names."""
    try:
        return blobs.digest(node.merged.key) == node.merged.sha256
    except CorruptError:
        return False
