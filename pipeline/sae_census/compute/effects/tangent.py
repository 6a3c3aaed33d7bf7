"""The tangent plane of a function at a point, how well it stands for the function elsewhere, and what ranks first."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from sae_census.compute.numbers.drift import rank_correlation


def slope(
    function: Callable[[Float[Tensor, "1 D"]], Float[Tensor, " 1"]], at: Float[Tensor, " D"]
) -> tuple[float, Float64[Tensor, " D"]]:
    """A function's value and gradient at a point; works under `no_grad` and on tensors of inference mode."""
    with torch.inference_mode(False), torch.enable_grad():
        x = at.detach().clone()[None].requires_grad_()
        value = function(x)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    return float(value.detach()), gradient[0].double()


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How well a tangent plane stands for the function over a corpus."""

    rank_correlation: float
    """Spearman's, between estimate and truth; NaN where either is constant."""
    sign_agreement: float
    """Share of tokens on which both are above 0, or both are not."""


def quality(estimate: Float64[np.ndarray, " N"], truth: Float64[np.ndarray, " N"]) -> Quality:
    """Compare estimated with true pre-activations of the same tokens (ties share their mean rank)."""
    correlation = rank_correlation(estimate, truth)
    return Quality(
        rank_correlation=float("nan") if correlation is None else correlation,
        sign_agreement=float(((estimate > 0) == (truth > 0)).mean()),
    )


def strongest(scores: Float[Tensor, "*rows V"], num: int) -> Int64[Tensor, "*rows K"]:
    """The indices of the highest scores of each row, highest first; among equals the lowest index."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :num]
