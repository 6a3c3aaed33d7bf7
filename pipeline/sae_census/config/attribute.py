"""Configs of logit attribution: of the job, and of the class for notebooks."""

from typing import Literal

from pydantic import PositiveInt, model_validator

from sae_census.config.sections import (
    EMBEDDED_SAES,
    ClusterConfig,
    LogitsConfig,
    ModelConfig,
    Name,
    SaeConfig,
    Section,
    StoreConfig,
)


class AttributedCatalog(Section):
    """The catalog that gets the logits."""

    name: Name | None = None
    """Its folder under <root>/catalogs; null: the tables are written to `out`."""


class AttributeConfig(Section):
    """`sae-census attribute`: the tokens that every feature promotes and suppresses, without a corpus."""

    model: ModelConfig = ModelConfig()
    """With a catalog: left out, the catalog's own; else it must be the same model."""
    saes: tuple[SaeConfig, ...] = EMBEDDED_SAES
    """With a catalog: left out, the catalog's own; else they must be the same SAEs."""
    logits: LogitsConfig = LogitsConfig(top_k=10)
    cluster: ClusterConfig = ClusterConfig()
    store: StoreConfig = StoreConfig()
    catalog: AttributedCatalog = AttributedCatalog()
    out: str | None = None
    """A folder for the tables if there is no catalog; null: <store.root>/logits."""

    @model_validator(mode="after")
    def _one_place(self) -> "AttributeConfig":
        if self.catalog.name is not None and self.out is not None:
            raise ValueError("catalog.name and out are two places for one result; expected one of them")
        if not self.logits.top_k:
            raise ValueError("logits.top_k is 0; expected at least 1")
        if not self.saes:
            raise ValueError("expected at least one SAE")
        return self


class DirectLogitAttributorConfig(Section):
    """How `DirectLogitAttributor` projects decoder rows, and how many tokens it keeps of each sign.

    >>> DirectLogitAttributorConfig(top_k=3).mode
    'direction'

    Raises:
        pydantic.ValidationError: if a key is not known or a value is out of range; also a ValueError.
    """

    top_k: PositiveInt = 10
    """Tokens of each sign."""
    clt_layer: int | None = None
    """Layer of a cross-layer transcoder; of any other SAE null, or the layer where it is."""
    mode: Literal["direction", "ln_final"] = "direction"
    """As `logits.mode`; `ln_final` gives the numbers of lm_saes."""
