"""Config of the job that steers."""

from typing import Literal

from pydantic import Field, PositiveInt, field_validator

from sae_census.config.sections import EMBEDDED_SAES, ModelConfig, SaeConfig, Section, StoreConfig


class EditConfig(Section):
    """One edit of a feature's code."""

    hook_point: str | None = None
    """As blocks.15.hook_resid_post; null where there is only one SAE."""
    feature: int = Field(ge=0)
    """Of that hook point's SAE."""
    mode: Literal["scale", "add", "set"] = "scale"
    """The new code: value x code, code + value, or value."""
    value: float = Field(allow_inf_nan=False)
    """scale 1 and add 0 change nothing; set 0 switches the feature off."""


class GenerateConfig(Section):
    """How text is continued."""

    max_new_tokens: PositiveInt = 40
    """At most this many."""
    temperature: float = Field(default=0, ge=0)
    """0: always the likeliest token."""
    seed: int = Field(default=0, ge=0)
    """Of the draws; both texts start from it."""


class KnownCatalog(Section):
    """A catalog that knows the features."""

    name: str | None = None
    """null: none is asked."""
    snapshot: PositiveInt | None = None
    """null: the newest."""


class SteerConfig(Section):
    """What `steer` edits, where, and how it continues the prompt.

    >>> config = SteerConfig(edits=[{"hook_point": "blocks.15.hook_resid_post", "feature": 654, "value": 0}])
    >>> config.edits[0].mode, config.model.id
    ('scale', 'embedded:model')

    Raises:
        pydantic.ValidationError: if a key is not known or a value is out of range; also a ValueError.
    """

    model: ModelConfig = ModelConfig()
    saes: tuple[SaeConfig, ...] = EMBEDDED_SAES
    """At most one for a hook point."""
    prompt: str = "class Circle:\n    def __init__(self, r):\n        self.r = r\n\n    @"
    edits: tuple[EditConfig, ...] = (
        EditConfig(hook_point="blocks.15.hook_resid_post", feature=654, mode="scale", value=0),
    )
    """Of the embedded SAE this one fires on the @ of a decorator."""
    positions: str = Field(
        default="counted", pattern=r"^(all|counted|prompt|generated|[0-9]+:[0-9]*(,[0-9]+:[0-9]*)*)$"
    )
    """Where edits act. counted: at the tokens that a census counts: no special tokens, no attention sinks, and what
    the catalog's masks leave out; all; prompt; generated; or ranges of positions such as 3:10 or 0:1,5:, the end left
    out, counted with the BOS token."""
    error_term: Literal["keep", "drop"] = "keep"
    """drop: activations become the SAE's reconstruction, which changes the text by itself."""
    generate: GenerateConfig = GenerateConfig()
    changed: int = Field(default=5, ge=0)
    """Show this many features of each hook point whose codes changed most."""
    store: StoreConfig = StoreConfig()
    catalog: KnownCatalog = KnownCatalog()
    """Features that are dead in it are refused."""
    allow_dead: bool = False
    """Steer them all the same."""
    threads: PositiveInt = 2
    """Of the processor."""

    @field_validator("edits")
    @classmethod
    def _some(cls, edits: tuple[EditConfig, ...]) -> tuple[EditConfig, ...]:
        if not edits:
            raise ValueError("expected at least one edit, as {feature: 654, mode: scale, value: 0}")
        return edits
