"""Config of `FeatureAnalyzer`: how much of a stream is read, and which contexts of every feature are kept."""

from pydantic import Field, PositiveInt, field_validator

from sae_census.config.sections import Section

Subsamples = dict[str, dict[str, int | float]]


class FeatureAnalyzerConfig(Section):
    """How many tokens `FeatureAnalyzer` reads of a stream, which of them count, and what it keeps of every feature.

    >>> kept = {"top": {"proportion": 1.0, "n_samples": 2}}
    >>> FeatureAnalyzerConfig(total_analyzing_tokens=1000, subsamples=kept).seed
    0

    Raises:
        pydantic.ValidationError: if a key is not known or a value is out of range; also a ValueError.
    """

    total_analyzing_tokens: PositiveInt
    """Stop after the batch that reaches this many tokens, ignored ones included."""
    ignore_token_ids: list[int] | None = None
    """Tokens that are not counted; null: what the batches' own `mask` leaves out, if they have one."""
    subsamples: Subsamples = {  # noqa: RUF012  # pydantic copies it
        "top_activations": {"proportion": 1.0, "n_samples": 10},
        "non_activating": {"proportion": 0.3, "n_samples": 20, "max_length": 50},
    }
    """What is kept of every feature, by a name of your choice:
    - `proportion`: only contexts whose largest code is at most this times the feature's final maximum. 1: the
      strongest of all. Between: the strongest of the weak (`low_activating`; the default `non_activating` is of
      this kind, its name is kept for those who read it). 0: contexts in which the feature stays silent, drawn by
      a hash (truly non-activating);
    - `n_samples`: at most this many contexts;
    - `max_length` (optional): at most this many tokens of each, around the largest code.
    """
    clt_layer: int | None = Field(default=None, ge=0)
    """The layer to analyse of a cross-layer transcoder; only for one."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Key of the hash that draws silent contexts."""

    @field_validator("subsamples")
    @classmethod
    def _well_formed(cls, subsamples: Subsamples) -> Subsamples:
        for name, parameters in subsamples.items():
            known = {"proportion", "n_samples", "max_length"}
            if not {"proportion", "n_samples"} <= set(parameters) <= known:
                raise ValueError(
                    f"{name} has {', '.join(sorted(parameters)) or 'nothing'}; expected proportion, n_samples and, "
                    "if contexts are to be cropped, max_length"
                )
            if not 0 <= parameters["proportion"] <= 1:
                raise ValueError(f"{name}: proportion is {parameters['proportion']}; expected 0 to 1")
            for key in ("n_samples", "max_length"):
                number = parameters.get(key, 1)
                if number < 1 or number != int(number):
                    raise ValueError(f"{name}: {key} is {number}; expected a whole number from 1 on")
        return subsamples
