"""What a user says of a checkpoint that its folder does not say."""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from sae_census.compute.numbers.sae import SparseAutoencoder, folded
from sae_census.errors import CheckpointError

Normalization = Literal["none", "constant_norm_rescale", "layer_norm", "expected_average_only_in"]
"""SAELens' names: of each token's activation, its length or its layer norm; of all, times one factor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stated:
    """None where nothing was said."""

    k: int | None = None
    normalize_activations: Normalization | None = None
    norm_scaling_factor: float | None = None

    def __post_init__(self) -> None:
        """Raises CheckpointError if something cannot be meant."""
        if self.normalize_activations not in (None, *get_args(Normalization)):
            raise CheckpointError(
                f"saes[].normalize_activations is {self.normalize_activations!r}; expected one of "
                f"{', '.join(get_args(Normalization))}"
            )
        if self.norm_scaling_factor is not None and not 0 < self.norm_scaling_factor < math.inf:
            raise CheckpointError(
                f"saes[].norm_scaling_factor is {self.norm_scaling_factor}; expected a number above 0"
            )
        if self.norm_scaling_factor is not None and self.normalize_activations not in (
            None,
            "expected_average_only_in",
        ):
            raise CheckpointError(
                f"saes[].norm_scaling_factor is given, but saes[].normalize_activations is "
                f"{self.normalize_activations}; a factor belongs to expected_average_only_in"
            )

    def applied(self, sae: SparseAutoencoder, format_name: str) -> tuple[SparseAutoencoder, dict[str, object]]:
        """The SAE of a format that says nothing of normalisation, and what was changed.

        Raises:
            CheckpointError: if the format does say it, or a factor is missing.
        """
        how = self.normalize_activations or ("expected_average_only_in" if self.norm_scaling_factor else "none")
        if how == "none":
            return sae, {}
        if sae.transform != "none" or sae.scale != 1 or format_name == "llama_scope":
            raise CheckpointError(
                f"saes[].normalize_activations is {how}, but a folder of {format_name} says its own; leave it out"
            )
        if how != "expected_average_only_in":
            return replace(sae, transform=how), {"normalize_activations": how}
        if self.norm_scaling_factor is None:
            raise CheckpointError(
                "saes[].normalize_activations is expected_average_only_in, which needs saes[].norm_scaling_factor: "
                "sqrt(D) / the average length of activations"
            )
        return folded(sae, self.norm_scaling_factor), {"norm_scaling_factor": self.norm_scaling_factor}
