"""Publish a snapshot of a catalog: all files first, its manifest last, under a number that nobody else has.

The digest of a snapshot covers what readers compute with (tables and arrays), so equal catalogs have equal
digests whoever made them; a run that changes nothing publishes nothing, and mends what was damaged since.
"""

import hashlib
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sae_census.compute.census import labels
from sae_census.compute.numbers import fixed, scores, stats
from sae_census.compute.numbers.fits import FitSums
from sae_census.compute.numbers.weights import copies
from sae_census.errors import CorruptError
from sae_census.io.store import schemas, tables, zarr_files
from sae_census.io.store.blobs import LocalBlobs
from sae_census.records import canonical, sealed
from sae_census.steps.census.logits import says
from sae_census.steps.census.partial import Unit
from sae_census.steps.census.ranges import RangeResult
from sae_census.steps.census.units import Units
from sae_census.steps.store import entries, layout, snapshot_files
from sae_census.steps.store.manifests import Facts, Making, Manifest, PublishedFile, open_manifest
from sae_census.types import SiteKey

_DIMENSIONS = {
    "count": ("feature",),
    "context_count": ("feature",),
    "maximum": ("feature",),
    "total": ("feature", "limb"),
    "total_square": ("feature", "limb"),
    "histogram": ("feature", "bin"),
    "histogram_edges": ("edge",),
    "spans_collapsed": ("feature", "group"),
    "l0_histogram": ("codes_of_a_token",),
    **dict.fromkeys(("slice_documents", "slice_tokens", "slice_tokens_square"), ("slice",)),
    **dict.fromkeys(("slice_count", "slice_context_count", "slice_maximum"), ("feature", "slice")),
    **dict.fromkeys(("slice_total", "slice_total_square"), ("feature", "slice", "limb")),
    "slice_document_count": ("feature", "slice"),
    "slice_document_count_square": ("feature", "slice"),
    "slice_document_count_tokens": ("feature", "slice"),
    "slice_document_total_square": ("feature", "slice", "limb"),
    "slice_document_total_tokens": ("feature", "slice", "limb"),
}


class Draft:
    """A snapshot in the making: ranges are added in order, then it is published or thrown away."""

    def __init__(self, blobs: LocalBlobs, sites: Sequence[SiteKey], decoder_norms: Mapping[SiteKey, np.ndarray]):
        self._blobs, self._sites, self._norms = blobs, sites, decoder_norms
        self._folder = blobs.scratch()
        self._results: list[RangeResult] = []

    def __enter__(self) -> "Draft":
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def folder(self) -> Path:
        """Where its files lie until it is published; every file there becomes part of the snapshot."""
        return self._folder

    def copy(self, folder: Path, files: Mapping[str, PublishedFile]) -> None:
        """Take files of a published snapshot over.

        Args:
            folder: of the snapshot.
            files: their names and facts, as in its manifest.

        Raises:
            CorruptError: if one is not what the manifest says.
        """
        for name in files:
            target = self._folder / name
            if not (folder / name).is_file():
                raise CorruptError(
                    f"{folder / name} is missing: run sae-census analyze again, it publishes the files anew"
                )
            with self._blobs.writing():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, target)
        found = digests(self._folder)
        for name, facts in files.items():
            if found[name] != facts:
                raise CorruptError(
                    f"{folder / name} is damaged: run sae-census analyze again, it publishes the files anew"
                )

    def write(
        self,
        results: Iterator[RangeResult],
        score: scores.Score,
        units: Sequence[Sequence[Unit]],
        weights: Mapping[str, int],
    ) -> None:
        """Write every file of the snapshot.

        Args:
            results: of all ranges, in the order of sites and features.
            score: ranks the features.
            units: that stand for the shards in the snapshot, by site.
            weights: of slices, as in `ReduceSettings`.
        """
        slices: list[tables.Table] = []

        def spans() -> Iterator[tables.Table]:
            for result in results:
                slices.append(tables.from_ipc(result.slices))
                self._results.append(result)
                yield tables.from_ipc(result.spans)

        tables.write(self._folder / "spans.parquet", schemas.SPANS, spans())
        tables.write(self._folder / "slices.parquet", schemas.SLICES, slices)
        tables.write(self._folder / "features.parquet", schemas.FEATURES, self._features(score))
        self._write_arrays(units, weights)

    def _features(self, score: scores.Score) -> Iterator[tables.Table]:
        for index, site in enumerate(self._sites):
            columns = self._joined(index, lambda result: result.features)
            scored = scores.score(columns, score)
            num_features = len(scored)
            words = [result.words for result in self._results if result.task.site == index]
            yield tables.table(
                schemas.FEATURES,
                columns
                | {
                    "hook_point": [str(site.hook_point)] * num_features,
                    "sae": [site.sae] * num_features,
                    "feature_id": np.arange(num_features),
                    "layer": np.full(num_features, site.hook_point.layer),
                    "stream": [site.hook_point.stream] * num_features,
                    "rank": scores.ranks(scored),
                    "score": scored,
                    "proto_label": labels.proto_labels(labels.joined(words), says(self._folder, site, num_features)),
                    "label": [None] * num_features,
                    "decoder_norm": self._norms[site].astype(np.float64),
                },
            )

    def _joined(self, site: int, part: Any) -> dict[str, np.ndarray]:
        """The arrays of all ranges of a site, end to end."""
        mine = [part(result) for result in self._results if result.task.site == site]
        return {name: np.concatenate([arrays[name] for arrays in mine]) for name in mine[0]}

    def _write_arrays(self, units: Sequence[Sequence[Unit]], weights: Mapping[str, int]) -> None:
        groups = {}
        for index, site in enumerate(self._sites):
            arrays = self._joined(index, lambda result: result.arrays)
            arrays |= _slice_books(units[index])
            arrays["histogram_edges"] = stats.bin_edges()
            arrays["l0_histogram"] = merged_fit(self._blobs, units[index], weights).l0_histogram
            groups[str(site)] = arrays
        scales = {"sum_scale_bits": fixed.SUM_SCALE, "square_scale_bits": fixed.SQUARE_SCALE, "low_limb_bits": 62}
        zarr_files.write_tree(self._folder / "statistics.zarr", groups, scales, _DIMENSIONS)

    def publish(self, name: str, facts: Facts, making: Making) -> tuple[int, str, bool]:
        """Give the snapshot a number, unless the newest one is the same; then files of it that were damaged are mended.

        Args:
            name: of the catalog.
            facts: of the manifest, which belong to the content.
            making: of the manifest, which does not.

        Returns:
            The number, the digest, and whether it is new.
        """
        files = digests(self._folder)
        newest = snapshots(self._blobs, name)[-1:]
        manifest = Manifest.of(name, newest[0] if newest else 0, files, facts, making)
        if newest and self._is(manifest):
            self._mend(manifest)
            self._point_at(manifest)  # the run that published it may have died before it could
            return manifest.snapshot, manifest.digest, False
        number = self._reserve(name)
        for written in files:
            self._blobs.adopt(layout.snapshot(name, number, written), self._folder / written)
        manifest = manifest.model_copy(update={"snapshot": number})
        self._put(manifest)
        self._point_at(manifest)
        return number, manifest.digest, True

    def _is(self, manifest: Manifest) -> bool:
        """Whether a published snapshot is this one; where its manifest is damaged, its files tell."""
        folder = folder_of(self._blobs, manifest.catalog, manifest.snapshot)
        try:
            return open_manifest(folder).digest == manifest.digest
        except CorruptError:
            there = digests(folder)
            records = ("manifest.json", "reserved.json")
            return {file: facts for file, facts in there.items() if file not in records} == manifest.files

    def _mend(self, manifest: Manifest) -> None:
        """Put back what is not as it was published; a manifest without a seal gets one, and says that it had none."""
        name, number = manifest.catalog, manifest.snapshot
        folder = folder_of(self._blobs, name, number)
        for file, facts in manifest.files.items():
            if snapshot_files.digest_of_file(folder / file) != facts.sha256:
                self._blobs.adopt(layout.snapshot(name, number, file), self._folder / file)
        for file in snapshot_files.unlisted(folder, manifest.files):
            self._blobs.delete(layout.snapshot(name, number, file))
        try:
            there = open_manifest(folder)
        except CorruptError:
            self._put(manifest)
        else:
            if not there.is_proven:
                self._put(there.model_copy(update={"unproven": {**manifest.unproven, "manifests": 1}}))
        self._blobs.sync()

    def _put(self, manifest: Manifest) -> None:
        self._blobs.put(layout.snapshot(manifest.catalog, manifest.snapshot, "manifest.json"), manifest.to_bytes())

    def _point_at(self, manifest: Manifest) -> None:
        about = {"snapshot": manifest.snapshot, "digest": manifest.digest}
        self._blobs.put(layout.latest(manifest.catalog), sealed(about))

    def _reserve(self, name: str) -> int:
        """A number that no other run can get: numbers of runs that died are not used again."""
        number = max(snapshots(self._blobs, name), default=0)
        owner = {"owner": uuid.uuid4().hex, "at": time.time()}
        while True:
            number += 1
            is_free = not self._blobs.path(layout.snapshot(name, number, "manifest.json")).exists()
            if is_free and self._blobs.put_if_absent(layout.snapshot(name, number, "reserved.json"), canonical(owner)):
                return number


def digests(folder: Path) -> dict[str, PublishedFile]:
    """Digest and size of every file in a folder, by its path in it."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        name = path.relative_to(folder).as_posix()
        files[name] = PublishedFile(sha256=sha256, num_bytes=path.stat().st_size)
    return files


def read_manifest(blobs: LocalBlobs, name: str, number: int) -> Manifest:
    """The manifest of a snapshot; raises what `open_manifest` does."""
    return open_manifest(folder_of(blobs, name, number))


def _slice_books(units: Sequence[Unit]) -> dict[str, np.ndarray]:
    """Documents, counted tokens, and the sum over documents of their squares, of every slice in the order of names."""
    names = sorted({unit.slice for unit in units})
    books = np.zeros((3, len(names)), np.int64)
    for unit in units:
        found = unit.documents["counted"], unit.tokens["counted"], unit.documents["tokens_square"]
        books[:, names.index(unit.slice)] += found
    return {f"slice_{name}": row for name, row in zip(("documents", "tokens", "tokens_square"), books, strict=True)}


def snapshots(blobs: LocalBlobs, name: str) -> list[int]:
    """The numbers of the published snapshots of a catalog, ascending."""
    return entries.snapshots(blobs.path(layout.catalog(name)))


def merged_fit(blobs: LocalBlobs, units: Sequence[Unit], weights: Mapping[str, int]) -> FitSums:
    """What all features share over all shards, so many copies of each slice."""
    total = None
    for name in sorted({unit.slice for unit in units}):
        part = Units(blobs, [unit for unit in units if unit.slice == name]).fits()
        part = copies(part, weights.get(name, 1), FitSums.merge)
        total = total.merge(part) if total else part
    assert total is not None
    return total


def folder_of(blobs: LocalBlobs, name: str, number: int) -> Path:
    """Where a snapshot lies."""
    return blobs.path(layout.snapshot(name, number, "manifest.json")).parent
