"""Config of the job that ablates."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from sae_census.config.sections import CatalogConfig, ClusterConfig, Section, StoreConfig


class AblateConfig(Section):
    """What `ablate` zeroes: which features of which catalog, and over how many of their spans.

    >>> config = AblateConfig(features=(3, 5), hook_point="blocks.1.hook_resid_post", spans=8)
    >>> config.group, config.confidence
    ('random', 0.95)

    Raises:
        pydantic.ValidationError: if a key is not known or a value is out of range; also a ValueError.
    """

    store: StoreConfig = StoreConfig()
    catalog: CatalogConfig = CatalogConfig()
    snapshot: PositiveInt | None = None
    """null: the newest."""
    hook_point: str | None = None
    """Only SAEs at this hook point."""
    sae: str | None = None
    """Only the SAE of this name."""
    features: tuple[NonNegativeInt, ...] = ()
    """Feature ids of one SAE; without any, the best ranked of every SAE."""
    best: PositiveInt = 5
    """How many of those, if no features are named."""
    group: str = "random"
    """The spans to sample from: random speaks of a typical firing, top of the strongest."""
    spans: int = Field(default=20, ge=2)
    """At most so many spans of a feature, by rank."""
    top_tokens: Literal["measured", "catalog"] = "measured"
    """Whose logits are followed. measured: the tokens that zeroing makes less likely on the even spans, followed
    on the odd ones; catalog: the positive tokens of its logits.parquet."""
    num_tokens: PositiveInt = 5
    """How many of them."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Of the intervals."""
    contexts: PositiveInt = 8
    """Of one forward pass, which gives logits over the whole vocabulary."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """That the model computes in; auto: the catalog's."""
    seed: int = Field(default=0, ge=0)
    """Of the control's random directions."""
    cluster: ClusterConfig = ClusterConfig()
