"""Configs of the main job and of the one that proves its store.

Keys under `cluster` and `store`, `preflight` and `report` decide where and how work is done; all others can decide
numbers and are part of an identity (`sae_census.steps.census.plan`).
"""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from sae_census.config.sections import (
    EMBEDDED_SAES,
    BatchConfig,
    CatalogConfig,
    ClusterConfig,
    CorpusConfig,
    LogitsConfig,
    MasksConfig,
    ModelConfig,
    RankingConfig,
    SaeConfig,
    SamplingConfig,
    Section,
    StoreConfig,
)


class AnalyzeConfig(Section):
    """What `analyze` does: a model, SAEs and a corpus become a catalog in a store.

    Sections and keys are those of `sae-census analyze`; every one has a default.

    >>> config = AnalyzeConfig(corpus={"context_length": 64}, store={"root": "runs"})
    >>> config.model.id, config.corpus.context_length, config.corpus.packing
    ('embedded:model', 64, 'concat')

    Raises:
        pydantic.ValidationError: if a key is not known or a value is out of range; also a ValueError.
    """

    model: ModelConfig = ModelConfig()
    saes: tuple[SaeConfig, ...] = EMBEDDED_SAES
    corpus: CorpusConfig = CorpusConfig()
    masks: MasksConfig = MasksConfig()
    sampling: SamplingConfig = SamplingConfig()
    ranking: RankingConfig = RankingConfig()
    logits: LogitsConfig = LogitsConfig()
    batch: BatchConfig = BatchConfig()
    cluster: ClusterConfig = ClusterConfig()
    store: StoreConfig = StoreConfig()
    catalog: CatalogConfig = CatalogConfig()
    codes: Literal["drop", "keep"] = "drop"
    """keep: store every code of every shard beside its partial."""
    preflight: Literal["warn", "refuse", "off"] = "warn"
    """What a poor fit of model, SAE, hook point and text does, before the hours are spent."""
    report: bool = False
    """Write the catalog as pages for a browser, too (`sae-census report`)."""

    @field_validator("saes")
    @classmethod
    def _some(cls, saes: tuple[SaeConfig, ...]) -> tuple[SaeConfig, ...]:
        if not saes:
            raise ValueError("expected at least one SAE")
        return saes

    @model_validator(mode="after")
    def _positions_exist(self) -> "AnalyzeConfig":
        last = self.corpus.context_length - 1
        if self.masks.first_positions > last or any(not 0 <= p <= last for p in self.masks.positions):
            raise ValueError(f"masks name positions outside a context, which has 0 to {last}")
        return self


class VerifyConfig(Section):
    """`sae-census verify`: every receipt against its bytes."""

    store: StoreConfig = StoreConfig()
    recompute: int = Field(default=0, ge=0)
    """Also analyse this many hash-random shards of each measure again and compare digests."""
    seed: int = 0
    """Chooses those shards."""
