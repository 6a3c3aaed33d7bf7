"""Config of questions to a catalog."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from sae_census.config.sections import CatalogConfig, Section, StoreConfig

Ask = Literal["best", "feature", "spans", "search", "firing_on", "slice", "codes", "nearest", "coactive"]


class QueryConfig(Section):
    """`sae-census query`: one question to a catalog."""

    store: StoreConfig = StoreConfig()
    catalog: CatalogConfig = CatalogConfig()
    snapshot: int | None = Field(default=None, ge=1)
    """null: the newest."""
    ask: Ask = "best"
    """best: features by rank; feature, spans, codes, nearest, coactive: of one feature; search: labels and peak
    tokens; firing_on: features that fire on a text; slice: features of a slice. codes and coactive need codes=keep."""
    hook_point: str | None = None
    """Of the SAE; not needed if the name tells it apart."""
    sae: str | None = None
    """Its name; not needed if the catalog has one."""
    feature: int | None = Field(default=None, ge=0)
    """A feature id."""
    text: str | None = Field(default=None, min_length=1)
    """What to search for, or the name of a slice."""
    by: str = "frequency"
    """Column of slices.parquet that orders the features of a slice."""
    limit: int = Field(default=20, ge=1)
    """Rows at most, but for codes."""
    out: str | None = None
    """A .jsonl, .csv or .parquet file; null: a table here."""

    @field_validator("out")
    @classmethod
    def _known(cls, out: str | None) -> str | None:
        if out is not None and Path(out).suffix not in (".jsonl", ".csv", ".parquet"):
            raise ValueError("expected a name that ends in .jsonl, .csv or .parquet")
        return out
