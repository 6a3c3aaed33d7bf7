"""Read a catalog: features, spans and statistics of a published snapshot, in memory or by key."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sae_census.config import AnalyzeConfig
from sae_census.errors import ConfigError
from sae_census.io.store import tables
from sae_census.io.store.blobs import LocalBlobs
from sae_census.steps.catalog import finding
from sae_census.steps.catalog.stored_codes import StoredCodes, coactive
from sae_census.steps.census import publish
from sae_census.steps.census.logits import LOGITS, MOMENTS
from sae_census.steps.model.provenance import Provenance
from sae_census.steps.model.reader import load_saes
from sae_census.steps.store import entries, layout
from sae_census.steps.store.identities import Measures
from sae_census.steps.store.snapshot_files import SnapshotFiles
from sae_census.types import HookPoint, SiteKey


def catalog_names(root: str | Path) -> list[str]:
    """The catalogs of a store, sorted."""
    return entries.catalogs(LocalBlobs(root).root)


class Catalog:
    """A published snapshot: features, spans and statistics, read from a store without model or GPU.

    Tables are pyarrow tables; `.to_pandas()` or polars' `from_arrow` take them on.

    >>> catalog = Catalog(root)
    >>> catalog.saes
    ['blocks.0.hook_resid_post/early', 'blocks.1.hook_resid_post/late']
    >>> catalog.features.num_rows  # 64 + 96
    160
    >>> best = catalog.best(1, hook_point="blocks.1.hook_resid_post", sae="late").to_pylist()[0]
    >>> spans = catalog.spans(best["hook_point"], best["sae"], best["feature_id"], ["top"])
    >>> spans["value"].to_pylist() == sorted(spans["value"].to_pylist(), reverse=True)
    True
    """

    def __init__(self, root: str | Path, name: str = "default", snapshot: int | None = None):
        """Open the newest snapshot, or a numbered one.

        Args:
            root: the store's folder, `store.root` of `analyze`.
            name: of the catalog.
            snapshot: its number, from 1 on; None: the newest.

        Raises:
            ConfigError: if there is none.
        """
        self._blobs = blobs = LocalBlobs(root)
        is_plain = (
            name not in ("", "..") and name == Path(name).name and name.isprintable()
        )  # a path is no name, whatever lies there
        numbers = publish.snapshots(blobs, name) if is_plain else []
        if not numbers or (snapshot is not None and snapshot not in numbers):
            raise ConfigError(
                f"there is no catalog {name!r}{f' with snapshot {snapshot}' if snapshot else ''} in {blobs.root}; "
                f"there are {', '.join(catalog_names(root)) or 'none'}"
            )
        self.number = numbers[-1] if snapshot is None else snapshot
        self.folder = publish.folder_of(blobs, name, self.number)
        self.attached = blobs.path(layout.attached(name, self.number, ""))
        self.manifest = publish.read_manifest(blobs, name, self.number)
        self._files = SnapshotFiles(self.folder, self.manifest.files)

    @property
    def digest(self) -> str:
        """Equal for equal catalogs."""
        return self.manifest.digest

    @property
    def measure(self) -> Measures:
        """What of its identity says how its text was looked at."""
        return self.manifest.identity.measure

    @property
    def config(self) -> AnalyzeConfig:
        """Of the job that made it, in today's form: keys that came later have their defaults."""
        return AnalyzeConfig.model_validate(self.manifest.config)

    @property
    def provenance(self) -> Provenance:
        """The model, tokenizer and SAEs that it was made with."""
        return Provenance.of_measures(self.measure, f"catalog {self.manifest.catalog!r}")

    @property
    def saes(self) -> list[str]:
        """`hook_point/sae` of every SAE."""
        return sorted(self.measure.saes)

    def table(self, name: str, columns: Sequence[str] | None = None, **options: Any) -> tables.Table:
        """A table of the snapshot, or some of it, as `io.tables.read` does.

        Raises:
            CorruptError: if its file is missing, or not the one that was published.
        """
        return self._files.table(name, columns, **options)

    @cached_property
    def features(self) -> tables.Table:
        """All of `features.parquet`, sorted by hook point, SAE and feature."""
        return self.table("features.parquet")

    @cached_property
    def slices(self) -> tables.Table:
        """All of `slices.parquet`."""
        return self.table("slices.parquet")

    @property
    def units(self) -> dict[str, str]:
        """What the codes of each SAE are measured in, by site; empty in catalogs that were made before it was noted."""
        return self.manifest.units

    def of_sae(self, hook_point: str, sae: str) -> tables.Table:
        """Rows of `features` of one SAE, by feature id."""
        key = [("hook_point", "=", hook_point), ("sae", "=", sae)]
        return self.table("features.parquet", filters=key)

    def feature(self, hook_point: str, sae: str, feature_id: int) -> dict[str, Any]:
        """The row of one feature.

        Raises:
            KeyError: if there is none.
        """
        rows = self._of_key("features.parquet", hook_point, sae, feature_id).to_pylist()
        if not rows:
            raise KeyError(f"no feature {feature_id} of {sae} at {hook_point} in {self.folder}")
        found: dict[str, Any] = rows[0]
        return found

    def spans(self, hook_point: str, sae: str, feature_id: int, groups: Sequence[str] | None = None) -> tables.Table:
        """The spans of one feature, by group and rank; one row group is read, not the table."""
        found = self._of_key("spans.parquet", hook_point, sae, feature_id)
        if groups is None:
            return found
        keep = [group in groups for group in found["group"].to_pylist()]
        return found.filter(keep)

    def best(self, num_features: int, hook_point: str | None = None, sae: str | None = None) -> tables.Table:
        """The best ranked features of every SAE, or of one, by rank."""
        table = self.features
        keep = np.asarray(table["rank"]) <= num_features
        for column, wanted in (("hook_point", hook_point), ("sae", sae)):
            if wanted is not None:
                keep &= np.asarray(table[column].to_pylist()) == wanted
        return table.filter(keep).sort_by([("hook_point", "ascending"), ("sae", "ascending"), ("rank", "ascending")])

    def page(
        self, start: int, num_features: int, hook_point: str | None = None, sae: str | None = None
    ) -> list[dict[str, Any]]:
        """Rows of `features` by rank, from `start`; among equal ranks by hook point and SAE."""
        table = self.features
        keep = np.ones(table.num_rows, bool)
        for column, wanted in (("hook_point", hook_point), ("sae", sae)):
            if wanted is not None:
                keep &= np.asarray(table[column].to_pylist()) == wanted
        order = [("rank", "ascending"), ("hook_point", "ascending"), ("sae", "ascending")]
        rows: list[dict[str, Any]] = table.filter(keep).sort_by(order).slice(start, num_features).to_pylist()
        return rows

    def search(self, text: str, num_features: int = 50) -> list[dict[str, Any]]:
        """Features whose label contains a text, or whose strongest spans peak on a token that does.

        Case does not count. Matches of the label come first, then those with the most such spans, then by rank.

        Returns:
            Rows with the key, `rank`, `label`, `in_label`, `num_spans` (of the top group, that match).
        """
        rows = self.features.select(["hook_point", "sae", "feature_id", "rank", "label", "proto_label"]).to_pylist()
        return finding.by_label_or_peak(rows, self._peaks, text)[:num_features]

    @cached_property
    def _peaks(self) -> finding.Peaks:
        columns = ["hook_point", "sae", "feature_id", "position", "start", "tokens"]
        return finding.peaks(self.table("spans.parquet", columns, filters=[("group", "=", "top")]))

    def firing_on(self, text: str, num_features: int = 50) -> list[dict[str, Any]]:
        """Features that fire on a text in their kept spans: on any token of a place where it stands, as written.

        A search of samples, not of the corpus: a feature without such a span may still fire on the text.

        Returns:
            Rows with the key, `num_spans`, `max` (strongest code there) and `text` (of the strongest such span),
            by number of spans, then `max`.
        """
        columns = ["hook_point", "sae", "feature_id", "shard_id", "context_id", "start", "text", "tokens", "values"]
        table = self.table("spans.parquet", columns, filters=[("value", ">", 0)])
        return finding.by_text(table.filter(tables.contains(table, "text", text)).to_pylist(), text)[:num_features]

    def in_slice(self, name: str, num_features: int = 50, by: str = "frequency") -> tables.Table:
        """Rows of `slices` for one slice, by a column of theirs, the greatest first.

        Raises:
            ConfigError: if there is no such slice or column.
        """
        known = sorted(set(self.slices["slice"].to_pylist()))
        if name not in known:
            raise ConfigError(f"there is no slice {name!r}; the catalog has {', '.join(known)}")
        if by not in self.slices.column_names[4:]:
            raise ConfigError(f"slices have no number {by!r}; they have {', '.join(self.slices.column_names[4:])}")
        mine = self.slices.filter([one == name for one in self.slices["slice"].to_pylist()])
        order = [(by, "descending"), ("hook_point", "ascending"), ("sae", "ascending"), ("feature_id", "ascending")]
        return mine.sort_by(order).slice(0, num_features)

    def codes(self, hook_point: str, sae: str, feature_id: int) -> Iterator[dict[str, Any]]:
        """Every stored code of a feature with its address, by shard, context and position (needs `codes: keep`).

        Raises:
            ConfigError: if codes were not kept.
        """
        for shard in self._stored(hook_point, sae).of([feature_id]):
            for row, position, value in zip(shard.row, shard.position, shard.value, strict=True):
                yield {
                    "shard_id": shard.shard_id,
                    "context_id": int(row),
                    "position": int(position),
                    "value": float(value),
                }

    def coactive(self, hook_point: str, sae: str, feature_id: int, num_features: int = 20) -> list[dict[str, Any]]:
        """The features of the same SAE that fire most surely in the same contexts (needs `codes: keep`).

        Returns:
            Rows with `feature_id`, `contexts` (where both fire), `context_count` (where it fires) and `jaccard`
            (both / either), by `jaccard`, then id.
        """
        alone, together = coactive(self._stored(hook_point, sae), feature_id, self.of_sae(hook_point, sae).num_rows)
        either = alone[feature_id] + alone - together
        jaccard = together / np.maximum(either, 1)
        order = [i for i in np.argsort(-jaccard, kind="stable") if i != feature_id and together[i]]
        return [
            {
                "feature_id": int(i),
                "contexts": int(together[i]),
                "context_count": int(alone[i]),
                "jaccard": float(jaccard[i]),
            }
            for i in order[:num_features]
        ]

    def nearest(self, hook_point: str, sae: str, feature_id: int, num_features: int = 20) -> list[dict[str, Any]]:
        """The features of the same SAE whose decoder rows point most nearly the same way, with the cosine.

        The SAE is read from where the catalog's config names it.

        Raises:
            IdentityError: if another SAE lies there now.
        """
        site = SiteKey(HookPoint.parse(hook_point), sae)
        loaded = {key: one for key, one in load_saes(self.config.saes).items() if key == site}
        self.provenance.only([site]).prove_saes(loaded)
        rows = loaded[site].sae.w_dec.numpy()
        lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(rows[feature_id])
        cosine = (rows @ rows[feature_id]) / np.maximum(lengths, np.finfo(np.float32).tiny)
        order = [i for i in np.argsort(-cosine, kind="stable") if i != feature_id]
        return [{"feature_id": int(i), "cosine": float(cosine[i])} for i in order[:num_features]]

    def _stored(self, hook_point: str, sae: str) -> StoredCodes:
        if self.measure.codes != "keep":
            raise ConfigError("this catalog's codes were not kept; analyze with codes=keep to ask for them")
        measure_id = self.measure.of(f"{hook_point}/{sae}").measure_id
        return StoredCodes(self._blobs, measure_id, self.manifest.shards)

    def statistics(self, hook_point: str, sae: str) -> dict[str, np.ndarray]:
        """The arrays of one SAE: counts, fixed-point sums, histogram with its edges.

        Those named `slice_…` say the same of every slice, and sum over its documents; slices lie in the order of
        their names, on the first axis after features, if there are features.
        """
        return self._files.arrays(f"{hook_point}/{sae}")

    def logits(self, hook_point: str, sae: str, feature_id: int) -> tables.Table:
        """The tokens that one feature suppresses and promotes most, by sign and rank.

        Raises:
            ConfigError: if the snapshot has no logits.
        """
        self._require_logits()
        return self._of_key(LOGITS, hook_point, sae, feature_id)

    @cached_property
    def logit_moments(self) -> tables.Table:
        """All of `logit_moments.parquet`: how each feature's logits are spread over the vocabulary.

        Raises:
            ConfigError: if the snapshot has no logits.
        """
        self._require_logits()
        return self.table(MOMENTS)

    def _require_logits(self) -> None:
        if self.manifest.logits is None:
            name = self.manifest.catalog
            raise ConfigError(
                f"snapshot {self.number} of catalog {name!r} has no logits; run sae-census attribute store.root=… "
                f"catalog.name={name}, or sae-census analyze with logits.top_k=10"
            )

    def sources(self, hook_point: str, sae: str, feature_id: int) -> tables.Table:
        """Where one feature came from at its traced spans, part by part.

        Raises:
            ConfigError: if nothing of this snapshot was traced.
        """
        if not (self.attached / "sources.parquet").is_file():
            raise ConfigError(f"{self.attached} holds no sources.parquet; run sae-census trace on this catalog first")
        return tables.read(self.attached / "sources.parquet", filters=_of_feature(hook_point, sae, feature_id))

    def _of_key(self, file: str, hook_point: str, sae: str, feature_id: int) -> tables.Table:
        return self.table(file, filters=_of_feature(hook_point, sae, feature_id))


def _of_feature(hook_point: str, sae: str, feature_id: int) -> list[tuple[str, str, Any]]:
    return [("hook_point", "=", hook_point), ("sae", "=", sae), ("feature_id", "=", feature_id)]
