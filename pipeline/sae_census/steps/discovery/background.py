"""A catalog as background: what each feature does on a corpus, and what it is called."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64

from sae_census.compute.discovery import TauMode, thresholds
from sae_census.compute.numbers import fixed
from sae_census.compute.numbers import stats as statistics
from sae_census.compute.numbers.stats import FeatureStats
from sae_census.config import MasksConfig
from sae_census.errors import ConfigError
from sae_census.io.checkpoints import LoadedSae
from sae_census.io.store import json_lines, tables
from sae_census.steps.census.claims import masks_of
from sae_census.steps.model.provenance import Provenance
from sae_census.steps.store import entries
from sae_census.steps.store.manifests import open_manifest
from sae_census.steps.store.snapshot_files import SnapshotFiles
from sae_census.types import SiteKey

LabelSource = Literal["table", "catalog", "proto"]


class Background:
    """Statistics of one SAE over the corpus of a catalog."""

    def __init__(
        self, arrays: Mapping[str, np.ndarray], num_tokens: int, labels: Mapping[int, tuple[str, LabelSource]]
    ):
        """Take the arrays of `statistics.zarr`, the counted tokens, and the labels of features that have one."""
        fields = FeatureStats.__dataclass_fields__
        self.stats = FeatureStats(**{name: arrays[name] for name in fields})
        self.num_tokens, self.labels = num_tokens, labels
        self.mean: Float64[np.ndarray, " F"] = statistics.mean(self.stats, num_tokens)
        total = float(fixed.to_float(self.stats.total, fixed.SUM_SCALE).sum())
        self.mean_code = total / max(int(self.stats.count.sum()), 1)
        """Over all features, where they fire."""
        self._tau: dict[tuple[TauMode, float], Float64[np.ndarray, " F"]] = {}

    def tau(self, mode: TauMode, value: float) -> Float64[np.ndarray, " F"]:
        """The threshold of every feature; computed once for a rule."""
        if (mode, value) not in self._tau:
            if len(self._tau) >= 8:
                self._tau.clear()
            self._tau[mode, value] = thresholds(self.stats, self.num_tokens, mode, value)
        return self._tau[mode, value]


@dataclass(frozen=True, slots=True, kw_only=True)
class Backgrounds:
    """What is known of every SAE from one snapshot."""

    digest: str
    sites: dict[SiteKey, Background]
    model_digest: str
    masks: MasksConfig
    """Which tokens it counted."""


def snapshot_folder(path: str) -> Path:
    """The newest snapshot of a catalog's folder, or the snapshot's folder itself.

    Raises:
        ConfigError: if there is none.
    """
    folder = Path(path).expanduser()
    if (folder / "manifest.json").is_file():
        return folder
    numbers = entries.snapshots(folder)
    if not numbers:
        raise ConfigError(f"there is no catalog at {path}; expected the folder <store.root>/catalogs/<catalog.name>")
    return folder / f"{numbers[-1]:06d}"


def load_backgrounds(path: str, saes: Mapping[SiteKey, LoadedSae]) -> Backgrounds:
    """Read what a catalog says about some SAEs.

    Args:
        path: as for `snapshot_folder`.
        saes: matched by hook point and digest; names may differ.

    Raises:
        ConfigError: if there is no catalog.
        IdentityError: if it was not made with one of them.
        CorruptError: if it is damaged.
    """
    folder = snapshot_folder(path)
    manifest = open_manifest(folder)
    files = SnapshotFiles(folder, manifest.files)
    measure = manifest.identity.measure
    made_with = Provenance.of_measures(measure, f"the catalog {path}")
    sites = {}
    for key, loaded in saes.items():
        name = made_with.name_of(key, loaded)
        sites[key] = _background(files, SiteKey.parse(name))
    return Backgrounds(
        digest=manifest.digest,
        sites=sites,
        model_digest=measure.model.digest,
        masks=masks_of(measure),
    )


def _background(files: SnapshotFiles, site: SiteKey) -> Background:
    arrays = files.arrays(str(site))
    key = [("hook_point", "=", str(site.hook_point)), ("sae", "=", site.sae)]
    columns = ["feature_id", "tokens_counted", "proto_label", "label"]
    rows = files.table("features.parquet", columns, filters=key).to_pylist()
    labels: dict[int, tuple[str, LabelSource]] = {}
    for row in rows:
        if row["label"]:
            labels[row["feature_id"]] = (row["label"], "catalog")
        elif row["proto_label"]:
            labels[row["feature_id"]] = (row["proto_label"], "proto")
    return Background(arrays, rows[0]["tokens_counted"] if rows else 0, labels)


def read_labels(path: str, saes: Mapping[SiteKey, Any]) -> dict[SiteKey, dict[int, str]]:
    """A label table: Parquet or JSON lines with `feature_id`, `label`, and what tells SAEs apart.

    A row counts for every SAE that its `hook_point`, `sae`, `layer` and `stream` (those it has) fit.

    Raises:
        ConfigError: if the table is not readable as that.
    """
    found: dict[SiteKey, dict[int, str]] = {site: {} for site in saes}
    for number, row in enumerate(_label_rows(Path(path).expanduser()), 1):
        if not isinstance(row, dict) or not isinstance(row.get("feature_id"), int) or "label" not in row:
            raise ConfigError(f"{path}, row {number}: expected feature_id (a whole number) and label, got {row!r:.80}")
        for site in saes:
            mine = {
                "hook_point": str(site.hook_point),
                "sae": site.sae,
                "layer": site.hook_point.layer,
                "stream": site.hook_point.stream,
            }
            if row["label"] and all(row.get(name) in (None, value) for name, value in mine.items()):
                found[site][row["feature_id"]] = str(row["label"])
    return found


def _label_rows(path: Path) -> list[Any]:
    try:
        if path.suffix == ".parquet":
            rows: list[Any] = tables.read_any(path).to_pylist()
            return rows
        return [json.loads(line) for line in json_lines.lines(path.read_bytes()) if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"the label table {path} cannot be read as .parquet or .jsonl: {error}") from error
