"""Config of a look at runs."""

from typing import Literal

from pydantic import Field

from sae_census.config.sections import Section, StoreConfig


class StatusConfig(Section):
    """`sae-census status`: what runs are doing or did, from their store alone."""

    store: StoreConfig = StoreConfig()
    catalog: str | None = None
    """Only runs for the catalog of this name."""
    last: int = Field(default=1, ge=1)
    """So many runs, newest first."""
    format: Literal["text", "json"] = "text"
