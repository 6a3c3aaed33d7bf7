"""Make a node: merge the partials, or smaller nodes, of some shards of one slice, and commit what is left.

What does not survive the merge is not kept: of samples the best, of codes those in the contexts of these samples. A
node is the same to the bit whatever it was merged from.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sae_census.compute.numbers.samples import Samples, SampleSizes
from sae_census.errors import CorruptError
from sae_census.io.store import partials, zarr_files
from sae_census.io.store.blobs import LocalBlobs
from sae_census.records import Node, Stored
from sae_census.steps.census.partial import RangeTask, Unit
from sae_census.steps.census.units import Units
from sae_census.steps.store import layout


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeTask:
    """A node to make."""

    measure_id: str
    num_features: int
    units: tuple[Unit, ...]
    """Of one slice; what it is made from."""

    @property
    def shards(self) -> tuple[str, ...]:
        """Ids, ascending."""
        return tuple(sorted(shard_id for unit in self.units for shard_id in unit.shards))


class Merger:
    """Makes nodes one by one; holds one range of samples beside the arrays of the node, however many its shards."""

    def __init__(self, root: str, sampling: Mapping[str, int]):
        """Open the store.

        Args:
            root: of the store.
            sampling: of the measure: sizes of samples, and the seed.
        """
        self._blobs = LocalBlobs(root)
        known = SampleSizes.__dataclass_fields__.keys() & sampling.keys()  # older measures lack the newest
        self._sizes = SampleSizes(**{name: sampling[name] for name in known})
        self._seed = sampling["seed"]

    def run(self, task: NodeTask) -> Node:
        """Merge and commit: the bytes first, then the record.

        Raises:
            CorruptError: if what it is made from is damaged.
        """
        for unit in task.units:
            if self._blobs.digest(unit.stored.key) != unit.stored.sha256:
                raise CorruptError(
                    f"{unit.stored.key} is damaged; run sae-census analyze again, which mends it, then compact"
                )
        units = Units(self._blobs, task.units)
        ranges = [
            RangeTask(site=0, start=start, stop=min(start + zarr_files.FEATURE_CHUNK, task.num_features))
            for start in range(0, task.num_features, zarr_files.FEATURE_CHUNK)
        ]
        of_ranges = [self._range(units, wanted) for wanted in ranges]
        arrays = {name: np.concatenate([part[name] for part, _ in of_ranges]) for name in of_ranges[0][0]}
        for start, counts in (
            ("pair_start", "pair_count"),
            ("code_start", "code_count"),
            ("silent_more_start", "silent_more_count"),
        ):
            arrays[start] = np.cumsum(np.append(0, arrays.pop(counts)))
        arrays |= units.fits().arrays() | self._silent(units, task.num_features, of_ranges[0][1])
        return self._commit(task, arrays)

    def _range(self, units: Units, task: RangeTask) -> tuple[dict[str, np.ndarray], Samples]:
        """The arrays of a range, with counts in place of starts, and its samples."""
        merged = units.merged(task, self._sizes, self._seed)
        (stats,), (documents,) = merged.by_slice.values(), merged.documents.values()
        arrays = stats.arrays() | documents.arrays()
        for name in ("top", "random", "bands"):
            kept = getattr(merged.samples, name)
            for column in ("shard", "row", "position", "value"):
                arrays[f"{name}_{column}"] = getattr(kept, column).reshape(task.num_features, -1)
        pairs = merged.samples.contexts()
        more = merged.samples.further_quiet()
        codes, positions = units.codes(task, pairs.group, pairs.shard, pairs.row)
        arrays |= {
            "pair_count": np.bincount(pairs.group, minlength=task.num_features),
            "pair_shard": pairs.shard,
            "pair_row": pairs.row,
            "code_count": np.diff(codes.start),
            "code_position": positions,
            "code_value": codes.values,
            "silent_more_count": np.bincount(more.group, minlength=task.num_features),
            "silent_more_shard": more.shard,
            "silent_more_row": more.row,
        }
        return arrays, merged.samples

    def _silent(self, units: Units, num_features: int, samples: Samples) -> dict[str, np.ndarray]:
        """The features that fire in each of the contexts kept for silence."""
        kept, whole = samples.silent.entries(), RangeTask(site=0, start=0, stop=num_features)
        features = [firing.astype(np.int32) for firing in units.firing_in(whole, kept.shard, kept.row)]
        return {
            "silent_shard": kept.shard,
            "silent_row": kept.row,
            "silent_start": np.cumsum([0, *map(len, features)]),
            "silent_feature": np.concatenate([np.zeros(0, np.int32), *features]),
        }

    def _commit(self, task: NodeTask, arrays: Mapping[str, np.ndarray]) -> Node:
        body = partials.pack(arrays, {"measure_id": task.measure_id, "shards": list(task.shards)}, is_node=True)
        sha256 = hashlib.sha256(body).hexdigest()
        node = Node(
            measure_id=task.measure_id,
            slice=task.units[0].slice,
            shards=task.shards,
            merged=Stored(key=layout.partial(task.measure_id, sha256), sha256=sha256, num_bytes=len(body)),
            tokens=_sums([unit.tokens for unit in task.units]),
            contexts=sum(unit.contexts for unit in task.units),
            documents=_sums([unit.documents for unit in task.units]),
        )
        self._blobs.put(node.merged.key, body)
        self._blobs.put(layout.node(node.measure_id, node.node_id), node.to_bytes())
        return node


def _sums(books: Sequence[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for book in books:
        total.update(book)
    return dict(total)
