"""What all features of an SAE share, as a commutative monoid: codes of a token, and sums of the fit sample."""

from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Int64

from sae_census.compute.numbers import fixed


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSums:
    """Sums over counted tokens; those that begin with `fit_` over the tokens of the fit sample."""

    l0_histogram: Int64[np.ndarray, " L"]
    """Tokens by how many codes they have."""
    fit_tokens: Int64[np.ndarray, " 1"]
    """How many they are."""
    fit_error: Int64[np.ndarray, "1 2"]
    """Squared length of what reconstruction missed; one total, fixed point with `fixed.SUM_SCALE`, as the next two."""
    fit_square: Int64[np.ndarray, "1 2"]
    """Squared length of the activation; one total."""
    fit_vector: Int64[np.ndarray, "D 2"]
    """The activation; D totals."""

    def merge(self, other: "FitSums") -> "FitSums":
        """Sums over the tokens of both; they share none."""
        return FitSums(
            l0_histogram=self.l0_histogram + other.l0_histogram,
            fit_tokens=self.fit_tokens + other.fit_tokens,
            fit_error=fixed.add(self.fit_error, other.fit_error),
            fit_square=fixed.add(self.fit_square, other.fit_square),
            fit_vector=fixed.add(self.fit_vector, other.fit_vector),
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """The fields by name, for storage."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def unexplained(self) -> float:
        """The fraction of variance unexplained; NaN where the tokens do not vary."""
        error, square, vector = (
            fixed.to_float(limbs, fixed.SUM_SCALE) for limbs in (self.fit_error, self.fit_square, self.fit_vector)
        )
        num_tokens = max(int(self.fit_tokens[0]), 1)
        variance = square[0] - float(np.square(vector).sum()) / num_tokens
        # Of tokens that hardly differ, what is left of the difference is rounding.
        varies = variance > 1e-9 * square[0]
        return float(error[0] / variance) if varies else float("nan")
