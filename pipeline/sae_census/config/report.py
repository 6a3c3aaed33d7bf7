"""Config of the job that writes a catalog as pages for a browser."""

from pydantic import Field, PositiveInt

from sae_census.config.sections import CatalogConfig, Section, StoreConfig


class ReportConfig(Section):
    """`sae-census report`: a catalog as files that a browser opens from disk."""

    store: StoreConfig = StoreConfig()
    catalog: CatalogConfig = CatalogConfig()
    snapshot: PositiveInt | None = None
    """Its number; null: the newest."""
    features: int | None = Field(default=None, ge=0)
    """How many features of each SAE, best ranked first, get spans; null: all. Numbers are shown of every feature."""
    out: str | None = None
    """A directory for the report; null: beside the snapshot."""
