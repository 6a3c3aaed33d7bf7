"""Config of the job that traces features upstream."""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from sae_census.config.sections import CatalogConfig, ClusterConfig, Section, StoreConfig


class TraceConfig(Section):
    """`sae-census trace`: where features of a catalog come from, at their spans.

    Model, SAEs and text are those that the catalog names.
    """

    store: StoreConfig = StoreConfig()
    catalog: CatalogConfig = CatalogConfig()
    snapshot: PositiveInt | None = None
    """Its number; null: the newest."""
    hook_point: str | None = None
    """Only SAEs at this hook point."""
    sae: str | None = None
    """Only the SAE of this name."""
    features: tuple[int, ...] = ()
    """Feature ids of one SAE; without any, the best ranked of every SAE."""
    best: PositiveInt = 5
    """How many of those, if no features are named."""
    group: str = "top"
    """The span group whose spans are traced at their peaks."""
    spans: PositiveInt = 5
    """Spans of each feature, best first."""
    pairs: int = Field(default=20, ge=0)
    """The strongest pairs of head and source token that are listed one by one, for each span."""
    dtype: Literal["float32", "float64"] = "float32"
    """That the model computes in, whatever the catalog's: parts add up to a pre-activation only where little is
    rounded, so half precision is none of the choices."""
    device: str = "auto"
    """auto: the GPU where there is one, else cpu."""
    cluster: ClusterConfig = ClusterConfig()
    out: str | None = None
    """A directory for the results; null: beside the snapshot, where `Catalog.sources` finds them."""

    @model_validator(mode="after")
    def _ids(self) -> "TraceConfig":
        if any(feature < 0 for feature in self.features) or len(set(self.features)) != len(self.features):
            raise ValueError(f"features is {list(self.features)}; expected different ids from 0 on")
        return self
