"""Which tokens the census counts. Every excluded token is booked under exactly one rule."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor

RULES = ("padding", "special_tokens", "first_positions", "positions", "max_norm_ratio")
"""In order of precedence: a token that several rules exclude is booked under the first."""
COUNTED = -1


def token_rules(
    input_ids: Int[np.ndarray, "B T"],
    num_tokens: Int[np.ndarray, " B"],
    *,
    special_ids: Sequence[int],
    first_positions: int,
    positions: Sequence[int],
) -> Int8[np.ndarray, "B T"]:
    """The rule (index into `RULES`) that excludes each token, or `COUNTED`; the norm rule comes later.

    Args:
        input_ids: right-padded contexts.
        num_tokens: tokens of each context before the padding.
        special_ids: ids that are never counted; empty if special tokens count.
        first_positions: this many positions at the start of every context are not counted.
        positions: nor are these.
    """
    place = np.arange(input_ids.shape[1])
    excluded = (
        place >= num_tokens[:, None],
        np.isin(input_ids, np.asarray(special_ids, dtype=input_ids.dtype)),
        np.broadcast_to(place < first_positions, input_ids.shape),
        np.broadcast_to(np.isin(place, np.asarray(positions, dtype=np.int64)), input_ids.shape),
    )
    rules = np.full(input_ids.shape, COUNTED, np.int8)
    for rule in reversed(range(len(excluded))):
        rules[excluded[rule]] = rule
    return rules


def norm_outliers(
    x: Float[Tensor, "B T D"], num_tokens: Int[np.ndarray, " B"], ratio: float
) -> Bool[np.ndarray, "B T"]:
    """Tokens whose norm exceeds `ratio` times the median norm of their context's real tokens.

    The median of an even number of norms is the lower middle one. A context decides for itself, so the
    result does not depend on the batch it came in.
    """
    norm = x.float().norm(dim=2)
    padded = torch.arange(x.shape[1], device=x.device) >= torch.from_numpy(num_tokens).to(x.device)[:, None]
    median = norm.masked_fill(padded, torch.nan).nanmedian(dim=1).values
    outlier: np.ndarray = ((norm > ratio * median[:, None]) & ~padded).cpu().numpy()
    return outlier


def with_rule(rules: Int8[np.ndarray, "B T"], excluded: Bool[np.ndarray, "B T"], name: str) -> Int8[np.ndarray, "B T"]:
    """The same books with the tokens that only this rule excludes under it."""
    return np.where((rules == COUNTED) & excluded, np.int8(RULES.index(name)), rules)


def tally(rules: Int8[np.ndarray, "B T"]) -> dict[str, int]:
    """How many tokens each rule excluded, and how many are `counted`."""
    numbers = np.bincount(rules.reshape(-1) + 1, minlength=len(RULES) + 1)
    return {"counted": int(numbers[0])} | {name: int(n) for name, n in zip(RULES, numbers[1:], strict=True)}
