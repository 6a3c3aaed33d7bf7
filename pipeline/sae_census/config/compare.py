"""Config of the job that compares two sets of text, or two models on the same text."""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from sae_census.config.analyze import AnalyzeConfig
from sae_census.config.sections import CatalogConfig, CorpusConfig, Section

RankBy = Literal["log_odds", "effect_size", "frequency", "mean"]


class SideConfig(Section):
    """One side: a catalog, or some of its slices."""

    root: str = "runs"
    """Its store."""
    name: str = "demo"
    """Its name under <root>/catalogs."""
    snapshot: PositiveInt | None = None
    """null: the newest."""
    slices: tuple[str, ...] = ()
    """Slices of it; empty: all."""


class PromptsConfig(Section):
    """Two files of prompts to compare instead of catalogs: a line of .txt, or a record, is a prompt."""

    a: str | None = None
    b: str | None = None

    @model_validator(mode="after")
    def _both(self) -> "PromptsConfig":
        if (self.a is None) != (self.b is None):
            raise ValueError("expected both prompts.a and prompts.b, or neither")
        return self


class TestedSection(Section):
    """How differences are tested, ordered and shown."""

    min_documents: PositiveInt = 5
    """Features that fire in fewer documents of both sides are not tested."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Of every interval."""
    false_discovery_rate: float = Field(default=0.05, gt=0, lt=1)
    """Share of false discoveries among those that are counted and shown."""
    rank_by: RankBy = "log_odds"
    """Features are ordered by the end of this interval that is nearer to no difference: what is sure of it."""
    show: PositiveInt = 10
    """Features of each direction in the printed tables and the summary."""


class CompareConfig(TestedSection):
    """What `compare` holds against each other: side a and side b, each some slices of a catalog, or sets of prompts.

    >>> config = CompareConfig(a={"root": "runs", "name": "first"}, b={"root": "runs", "name": "second"})
    >>> config.rank_by, config.false_discovery_rate
    ('log_odds', 0.05)

    Raises:
        pydantic.ValidationError: if a key is not known or a value is out of range; also a ValueError.
    """

    a: SideConfig = SideConfig()
    b: SideConfig = SideConfig()
    prompts: PromptsConfig = PromptsConfig()
    analyze: AnalyzeConfig = AnalyzeConfig(
        corpus=CorpusConfig(txt_documents="line"), catalog=CatalogConfig(name="prompts"), preflight="off"
    )
    """How prompts are analysed, as slices a and b of this catalog; nothing else looks at it."""
    out: str = "comparison"
    """A directory for comparison.parquet and comparison.json."""
