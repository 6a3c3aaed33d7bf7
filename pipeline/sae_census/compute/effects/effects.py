"""How far a change inside a model moves its predictions: divergences, losses and means with intervals."""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from scipy import stats
from torch import Tensor


class Interval(NamedTuple):
    """A mean with its confidence interval."""

    mean: float
    """NaN if nothing was measured."""
    low: float
    """NaN below two measurements, as is `high`."""
    high: float
    num: int
    """Measurements."""


def mean_interval(values: Float64[np.ndarray, " N"], confidence: float) -> Interval:
    """The mean of independent measurements with its two-sided Student t interval.

    Args:
        values: finite.
        confidence: between 0 and 1, such as 0.95.
    """
    num = len(values)
    if num < 2:
        return Interval(float(values[0]) if num else math.nan, math.nan, math.nan, num)
    mean = float(values.mean())
    half = float(stats.t.ppf((1 + confidence) / 2, num - 1) * values.std(ddof=1) / num**0.5)
    return Interval(mean, mean - half, mean + half, num)


def divergence(p: Float[Tensor, "N V"], q: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """KL(P || Q) of next-token distributions in nats, from logits; at least 0 up to rounding."""
    log_p, log_q = p.float().log_softmax(dim=1), q.float().log_softmax(dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def losses(logits: Float[Tensor, "N V"], targets: Int64[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Negative log-probability of each target in nats."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def centred(logits: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
    """Logits less their mean over the vocabulary, which no prediction depends on."""
    logits = logits.float()
    return logits - logits.mean(dim=1, keepdim=True)


def most_lowered(change: Float[Tensor, "N V"], num: int) -> Int64[Tensor, " n"]:
    """The tokens whose value falls most on average, first the one that falls most; ties go to the lowest id.

    `n` is the smaller of `num` and V.
    """
    order = change.mean(dim=0).sort(stable=True).indices
    return order[:num]
