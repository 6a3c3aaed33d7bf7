"""Config of the job that lists, builds, compares and compacts snapshots of what is already analysed."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from sae_census.config.compare import TestedSection
from sae_census.config.sections import CatalogConfig, ClusterConfig, Name, StoreConfig

_KEYS_OF = {
    "build": {"also", "slices", "drop", "since", "until", "weights", "into"},
    "compact": {"prune"},
    "diff": {"against", "out", *TestedSection.model_fields},
}


class SnapshotsConfig(TestedSection):
    """`sae-census catalog`: snapshots of a store, without analysing anything."""

    action: Literal["list", "build", "diff", "compact"] = "list"
    """list: what the store has; build: a snapshot of chosen shards; diff: what changed between two snapshots;
    compact: partials merged into a tree, so that a reduce reads little."""
    store: StoreConfig = StoreConfig()
    catalog: CatalogConfig = CatalogConfig()
    """The catalog to begin with."""
    snapshot: PositiveInt | None = None
    """null: its newest."""
    also: tuple[str, ...] = ()
    """build: more catalogs of the same model, SAEs and settings, as name or name@snapshot; their shards join."""
    slices: tuple[str, ...] = ()
    """build: take these slices alone; * and ? stand for other characters. Empty: all."""
    drop: tuple[str, ...] = ()
    """build: leave these slices out."""
    since: datetime | None = None
    """build: only shards that were analysed at or after this time (UTC unless it names a zone)."""
    until: datetime | None = None
    """build: only shards that were analysed before this time."""
    weights: dict[str, Annotated[int, Field(ge=1, le=1_000_000)]] = Field(default={})
    """build: how often a slice counts in the statistics of the whole, by its exact name; 1 where none is said."""
    into: Name | None = None
    """build: the catalog that gets the snapshot."""
    against: PositiveInt | None = None
    """diff: the earlier snapshot; null: the one before."""
    out: str = "diff"
    """diff: a directory for diff.parquet and diff.json."""
    prune: bool = False
    """compact: then delete what the roots of the tree stand for. Nothing else may use the store meanwhile."""
    cluster: ClusterConfig = ClusterConfig()

    @field_validator("weights", mode="before")
    @classmethod
    def _no_zero(cls, weights: Any) -> Any:
        if isinstance(weights, dict) and any(weight == 0 for weight in weights.values()):
            raise ValueError("a weight is at least 1; to leave a slice out, drop it")
        return weights

    @model_validator(mode="after")
    def _belongs(self) -> "SnapshotsConfig":
        plain = type(self).model_fields
        for action, keys in _KEYS_OF.items():
            said = sorted(key for key in keys if getattr(self, key) != plain[key].default)
            if said and action != self.action:
                raise ValueError(f"{said[0]} is a key of action={action}, and action is {self.action}")
        if self.action == "build" and self.into is None:
            raise ValueError("action=build needs into=<name of the catalog that gets the snapshot>")
        return self
