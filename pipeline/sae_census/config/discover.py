"""One discovery request: the same model validates the command line, the lines of a batch and the HTTP body."""

import sys
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from sae_census.config.sections import EMBEDDED_SAES, ModelConfig, SaeConfig, Section
from sae_census.types import Stream

ScoreName = Literal["mean", "max", "mean×coverage", "selectivity"]
Feature = Annotated[int, Field(ge=0, lt=1 << 31)]
Layer = Annotated[int, Field(ge=0, lt=1 << 16)]


def _one_name(name: object) -> object:
    return "mean×coverage" if name in ("mean*coverage", "mean_x_coverage") else name


def _just(name: str) -> dict[str, Any]:
    return {"required": [name], "properties": {name: {"type": "string"}}}


_TAU: JsonDict = {
    "allOf": [
        {
            "if": {"required": ["mode"], "properties": {"mode": {"const": "quantile"}}},
            "then": {
                "required": ["value"],
                "properties": {"value": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}},
            },
        },
        {
            "if": {"required": ["mode"], "properties": {"mode": {"const": "constant"}}},
            "then": {"required": ["value"], "properties": {"value": {"type": "number"}}},
        },
        {
            "if": {"properties": {"mode": {"enum": ["p95", "p95_nonzero"]}}},
            "then": {"properties": {"value": {"type": "null"}}},
        },
    ]
}


_REQUEST: JsonDict = {
    "oneOf": [_just("text"), _just("prompt")],
    "allOf": [
        {
            "if": {"properties": {"do_sample": {"const": False}}},
            "then": {"properties": {"temperature": {"const": 1}, "top_p": {"const": 1}}},
        }
    ],
}


def _with_integers(value: object, depth: int = 2) -> object:
    """1.0 as 1: JSON does not tell them apart, and its schema calls both integers.

    A request is no deeper than that; whatever is, however deep, is left to be refused.
    """
    if isinstance(value, dict) and depth:
        return {key: _with_integers(inner, depth - 1) for key, inner in value.items()}
    if isinstance(value, list) and depth:
        return [_with_integers(inner, depth - 1) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


class TauConfig(Section):
    """The threshold above which a token counts for coverage."""

    model_config = ConfigDict(strict=True, json_schema_extra=_TAU)

    mode: Literal["p95", "p95_nonzero", "quantile", "constant"] = "p95"
    """Quantile of the feature's codes in the catalog: p95 over all counted tokens, p95_nonzero over firing ones,
    quantile like p95 with q = value; constant: value. Without a catalog the quantiles fall back to 0, and say so."""
    value: float | None = Field(default=None, ge=0, le=sys.float_info.max)
    """q, between 0 and 1, or the constant; the other modes have none."""

    @model_validator(mode="after")
    def _of_mode(self) -> "TauConfig":
        takes_value = self.mode in ("quantile", "constant")
        if takes_value and self.value is None:
            raise PydanticCustomError("tau", "tau.mode {mode} needs tau.value", {"mode": self.mode})
        if not takes_value and self.value is not None:
            raise PydanticCustomError(
                "tau",
                "tau.value is given, but tau.mode is {mode}, which has none; expected mode quantile or constant",
                {"mode": self.mode},
            )
        if self.mode == "quantile" and not 0 < (self.value or 0) < 1:
            raise PydanticCustomError("quantile", "tau.value is the quantile q, expected between 0 and 1")
        return self


class DiscoverRequest(Section):
    """Find the features that a prompt or text uses."""

    model_config = ConfigDict(strict=True, json_schema_extra=_REQUEST)

    model_id: str | None = Field(default=None, max_length=4096)
    """The language model; null: the one that is loaded."""
    sae_id: str | None = Field(default=None, max_length=4096)
    """The SAE or set of SAEs; null: all that are loaded."""
    text: str | None = Field(default=None, min_length=1, max_length=1 << 20)
    """Raw text to analyse. Give this or prompt."""
    prompt: str | None = Field(default=None, min_length=1, max_length=1 << 20)
    """A prompt: analysed with its continuation, or by itself if generate is false."""
    generate: bool = True
    """Continue the prompt and analyse both."""
    gen_tokens: int = Field(default=128, ge=1, le=1 << 16)
    """At most this many new tokens."""
    layers: list[Layer] | None = Field(default=None, min_length=1, max_length=1024)
    """Layers to analyse; null: all that the SAEs have."""
    streams: list[Stream] | None = Field(default=None, min_length=1, max_length=16)
    """Streams to analyse; null: all that the SAEs have at those layers."""
    restrict_features: list[Feature] = Field(default=[], max_length=1 << 17)
    """Score only these feature ids; empty: all."""
    topk_tokens_per_seq: int = Field(default=64, ge=1, le=1 << 20)
    """Keep this many tokens, the most informative by token_filter."""
    token_filter: Literal["entropy", "norm", "none"] = "entropy"
    """entropy of the next-token distribution, norm of the activation at the deepest hook point, or keep all tokens.
    Special tokens are never kept."""
    first_positions: int | None = Field(default=None, ge=0, le=1 << 20)
    """Keep none of this many tokens at the start; null: as the catalog's masks, 0 without one."""
    max_norm_ratio: float | None = Field(default=None, gt=1, le=sys.float_info.max)
    """Keep no token whose activation norm exceeds this many times the median; null: as the catalog's masks, none
    without one."""
    attention_sinks: bool | None = None
    """Keep no attention sink, as masks.attention_sinks of an analysis defines them; null: as the catalog's masks, true
    without one."""
    return_top_x: int = Field(default=25, ge=1, le=1 << 17)
    """This many features of the ranking."""
    score_mode: Annotated[ScoreName, BeforeValidator(_one_name)] = "mean×coverage"
    """What ranks; all four are always reported. mean*coverage and mean_x_coverage are the same as mean×coverage."""
    min_coverage_pct: float = Field(default=0.5, ge=0, le=1)
    """Least coverage of a returned feature, a fraction between 0 and 1 like coverage itself."""
    tau: TauConfig = TauConfig()
    """When a token counts for coverage: its code is greater than tau."""
    normalize: Literal["none", "activation_norm", "mean_code"] = "none"
    """Divide the scores of each SAE by one number so that SAEs compare: the mean norm of its input here, or the mean
    firing code of all its features in the catalog."""
    merge_across_layers: bool = True
    """One ranking over all hook points, or one of return_top_x for each. Equal ids at two hook points are
    unrelated features and are never added up."""
    attach_examples: bool = True
    """Attach the strongest windows of text."""
    num_spans: int = Field(default=3, ge=1, le=100)
    """At most this many a feature."""
    attach_proto_labels: bool = True
    """Attach labels from the label table or the catalog, where there are any."""
    chat_template: bool = False
    """Wrap the prompt as a user's turn in the model's chat template."""
    do_sample: bool = False
    """Sample the continuation instead of taking the likeliest token."""
    temperature: float = Field(default=1.0, ge=1e-6, le=100)
    """Of sampling; near the low end it takes the likeliest token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Of sampling: the smallest set of tokens with this probability."""
    seed: int = Field(default=42, ge=0, lt=1 << 63)
    """Of sampling."""
    truncate: bool = False
    """Drop the end of a text that does not fit, and say how much, instead of refusing it."""

    @model_validator(mode="before")
    @classmethod
    def _alias(cls, given: object) -> object:
        given = _with_integers(given)
        if isinstance(given, dict) and "min_coverage" in given:
            if "min_coverage_pct" in given:
                raise PydanticCustomError("twice", "min_coverage is another name of min_coverage_pct; give one of them")
            given = given | {"min_coverage_pct": given["min_coverage"]}
            del given["min_coverage"]
        return given

    @model_validator(mode="after")
    def _sampling(self) -> "DiscoverRequest":
        for name, value in (("temperature", self.temperature), ("top_p", self.top_p)):
            if value != 1 and not self.do_sample:
                raise PydanticCustomError(
                    "sampling", "{name} is of sampling, and do_sample is false; set do_sample=true", {"name": name}
                )
        return self

    @model_validator(mode="after")
    def _one_input(self) -> "DiscoverRequest":
        if (self.text is None) == (self.prompt is None):
            raise PydanticCustomError("one_input", "expected either prompt or text, not both and not neither")
        return self


class DiscoveryConfig(Section):
    """What answers discovery requests: a model, its SAEs, and what is known of their features."""

    model: ModelConfig = ModelConfig()
    model_name: str | None = None
    """What requests and answers call the model; null: model.id."""
    saes: tuple[SaeConfig, ...] = Field(default=EMBEDDED_SAES, min_length=1)
    sae_id: str | None = None
    """One name for all of the SAEs, beside the name and path of each."""
    catalog: str | None = None
    """Folder of a catalog or snapshot of these SAEs: the background of scores, and labels."""
    labels: str | None = None
    """Label table (.parquet or .jsonl: feature_id, label, and what tells SAEs apart); goes before the catalog's."""
    threads: int = Field(default=2, ge=1)
    """Of this process."""
    cache_mb: int = Field(default=256, ge=0)
    """Bound of the cache on disk; 0: none."""
    max_tokens: int = Field(default=4096, ge=2)
    """Of a sequence, generation included; the model's own bound may be lower."""
