"""Scores that order features, and the order itself."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from jaxtyping import Float64, Int32

Score = Literal["frequency", "mean", "max", "mean_when_firing", "mean_x_coverage", "surprise"]
_FEW = 100
"""A feature that fired this often counts half in `surprise`."""


def score(columns: Mapping[str, np.ndarray], name: Score) -> Float64[np.ndarray, " F"]:
    """The score of every feature; 0 for one that never fires.

    - `frequency`, `mean`, `max`, `mean_when_firing`: the column of that name;
    - `mean_x_coverage`: mean x frequency (coverage of a corpus is frequency, with tau = 0);
    - `surprise`: mean_when_firing x -log2(frequency) x count / (count + 100): strong when it fires, rarely
      firing, and yet seen often enough to be believed.

    Args:
        columns: of `features.parquet`, all of one length.
        name: which score.
    """
    match name:
        case "mean_x_coverage":
            return np.asarray(columns["mean"] * columns["frequency"])
        case "surprise":
            bits = -np.log2(np.where(columns["count"] > 0, columns["frequency"], 1.0))
            belief = columns["count"] / (columns["count"] + _FEW)
            return np.asarray(columns["mean_when_firing"] * np.maximum(bits, 1e-9) * belief)
        case _:
            return columns[name].astype(np.float64)


def ranks(scores: Float64[np.ndarray, " F"]) -> Int32[np.ndarray, " F"]:
    """Rank of every feature, 1 for the highest score; among equals the lowest id comes first."""
    order = np.argsort(-scores, kind="stable")
    rank = np.empty(len(scores), np.int32)
    rank[order] = np.arange(1, len(scores) + 1)
    return rank
