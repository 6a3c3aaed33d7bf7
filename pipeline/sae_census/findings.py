"""What discovery answers: the shape of its JSON, of a batch's lines and of the HTTP response."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from sae_census.types import Stream

Pair = Annotated[list[int], Field(min_length=2, max_length=2)]


class _Finding(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Span(_Finding):
    """A window of text around a token where the feature is strong."""

    text: str
    position: Pair
    """Half-open range of tokens in the analysed sequence, from 0."""
    char: Pair
    """Half-open range of characters in analyzed.text."""
    act: float
    """The code at the peak."""
    peak: int
    """Token of the peak in the sequence."""
    tokens: list[str]
    """Of the window; joined, they are its text. A character of several tokens stands at the last, the others are empty,
    and so is a BOS that was put before the text."""
    values: list[float]
    """The code at each of them."""


class Scores(_Finding):
    """All four scores, whatever ranks; over kept tokens, silent ones as zeros."""

    mean: float
    coverage: float
    """Share of kept tokens with a code above tau."""
    max: float
    selectivity: float


class AgainstCatalog(_Finding):
    """The feature here beside the feature in the catalog's corpus."""

    frequency: float
    mean: float
    max: float
    percentile: float | None
    """Share of the corpus' firing codes below this max; null if it never fired there."""
    log_odds: float
    """Log-odds ratio of firing on a kept token, to firing on a token of the corpus."""
    log_odds_low: float
    log_odds_high: float
    """95 % interval, tokens taken as independent."""


class MeasuredFeature(_Finding):
    """One feature with what was measured of it, and the evidence."""

    feature_id: int
    layer: int
    stream: Stream
    hook_point: str
    sae: str
    score: float
    scores: Scores
    tau: float
    proto_label: str | None
    label_source: Literal["table", "catalog", "proto"] | None
    catalog: AgainstCatalog | None
    top_spans: list[Span]


class FoundFeature(MeasuredFeature):
    """One feature of the ranking."""

    rank: int
    """From 1; by itself for each hook point unless the layers are merged."""


class GatedFeature(MeasuredFeature):
    """A feature that the ranking leaves out, and the gate that kept it out."""

    gate: Literal["min_coverage_pct", "return_top_x", "silent"]
    """min_coverage_pct: its coverage is too small; return_top_x: others filled the ranking; silent: it fires on no
    kept token, and its score is 0."""


class UsedSae(_Finding):
    """An SAE that was looked through."""

    hook_point: str
    sae: str
    num_features: int
    digest: str
    scale: float
    """Its scores were divided by this."""
    unit: str
    """What its codes are measured in."""


class Analyzed(_Finding):
    """What was looked at, and how."""

    mode: Literal["text", "prompt", "prompt+gen"]
    tokens: int
    """Of the sequence, BOS and generation included."""
    tokens_kept: int
    tokens_generated: int
    tokens_truncated: int
    layers: list[int]
    streams: list[Stream]
    saes: list[UsedSae]
    given: str
    """The text or prompt as it was asked for: before a chat template, truncation and the continuation."""
    text: str
    """All of it: what positions refer to."""
    token_filter: Literal["entropy", "norm", "none"]
    topk_tokens_per_seq: int
    first_positions: int
    """Of which no token is kept."""
    max_norm_ratio: float | None
    """Tokens above this multiple of the median norm are not kept."""
    attention_sinks: bool
    """Whether attention sinks are not kept: more than 10 times the median norm, or more than 2 times with over half
    of the energy in one dimension."""
    tokens_sinks: int
    """That only this rule took."""
    tau: str
    """The rule that set tau."""
    selectivity_background: str
    """What selectivity subtracts."""
    score_mode: str
    normalize: str
    merge_across_layers: bool
    return_top_x: int
    min_coverage: float
    """A fraction, as coverage."""
    features_scored: int
    """That fire on a kept token."""
    features_gated: int
    """Of these, below min_coverage."""
    passing_min_coverage: float | None
    """The greatest min_coverage_pct that leaves no place empty that a feature could fill; null if min_coverage leaves
    none."""
    generation: str | None
    """How the continuation was made."""
    chat_template: bool
    catalog: str | None
    """Digest of the snapshot."""
    model_digest: str
    dtype: str
    version: str
    notes: list[str]
    """What the reader should know."""


class Discovery(_Finding):
    """The answer to one request."""

    model_id: str
    sae_id: str
    analyzed: Analyzed
    features: list[FoundFeature]
    below_gate: list[GatedFeature]
    """With restrict_features: every feature of the list, at every hook point, that is not in `features`. Without:
    the best of those below min_coverage_pct, as many as the ranking lacks. By score, as the ranking."""
