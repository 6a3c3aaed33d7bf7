"""Codes of prompts, one row a prompt: sparse, as sums that merge, and ranked.

Here alone a feature counts as fired where its code is not 0: an SAE whose TopK has no ReLU may keep negative
codes, and whoever looks at single prompts wants to see them. Everything else in the project asks for code > 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from sae_census.compute.numbers import fixed
from sae_census.compute.numbers.codes import Codes

_ROUNDING = 1e-12
"""Spread below this share of the sum of squares is rounding, not spread."""


@dataclass(frozen=True, slots=True)
class FeatureRanking:
    """One feature of a ranking; the optional fields belong to rankings of two sets.

    >>> FeatureRanking(feature_id=7, score=1.5).pos_mean is None
    True
    """

    feature_id: int
    score: float
    """The code, or what the two sets were ranked by: positive mean - negative mean, or the effect size."""
    pos_mean: float | None = None
    """Mean code over all prompts of the positive set, those where it is 0 included."""
    neg_mean: float | None = None
    pos_fire_rate: float | None = None
    """Share of the positive set's prompts whose code is not 0."""
    neg_fire_rate: float | None = None
    effect_size: float | None = None
    """(pos_mean - neg_mean) / pooled standard deviation (Cohen's d); infinite if only the means differ, None for
    fewer than three prompts."""
    by: Literal["difference", "effect_size"] = "difference"
    """What the two sets were ranked by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCodes:
    """The codes of the last token of every prompt, and how they were read: what `observe_prompts` gives.

    >>> seen = observe_prompts(model.inner, tokenizer, sae, ["river water", "sugar"], layer_idx=1)
    >>> tuple(seen.shape), seen.hook_point, seen.dtype
    ((2, 96), 'blocks.1.hook_resid_post', 'float32')
    >>> tuple(seen.dense().shape)
    (2, 96)
    """

    codes: Codes
    """Signed; the row is the prompt, the position 0."""
    num_prompts: int
    num_features: int
    hook_point: str
    last_token_ids: Int64[np.ndarray, " P"]
    """What was encoded: the last token of every prompt."""
    apply_chat_template: bool
    """Whether prompts were put into the tokenizer's chat template."""
    dtype: str
    """That the model computed in, as float32; codes are float32 whatever it is."""

    @property
    def shape(self) -> torch.Size:
        """(P, F)."""
        return torch.Size([self.num_prompts, self.num_features])

    def dense(self) -> Float[Tensor, "P F"]:
        """All codes, float32 on the CPU; exactly 0 where a feature did not fire."""
        found = torch.zeros(self.shape)
        where = (torch.from_numpy(self.codes.row).long(), torch.from_numpy(self.codes.feature).long())
        found[where] = torch.from_numpy(self.codes.value)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class SetSums:
    """What a set of prompts adds up to. Sets that share no prompt merge to the bit, in any order.

    >>> first, second = SetSums.of(torch.tensor([[0.0, 2.0]])), SetSums.of(torch.tensor([[1.0, 4.0]]))
    >>> both = first.merge(second)
    >>> both.num_prompts, both.mean().tolist(), both.fired.tolist()
    (2, [0.5, 3.0], [1, 2])
    """

    num_prompts: int
    fired: Int64[np.ndarray, " F"]
    """Prompts whose code is not 0."""
    total: fixed.Limbs
    """Sum of codes, fixed point with `fixed.SUM_SCALE`."""
    total_square: fixed.Limbs
    """Sum of squared codes, fixed point with `fixed.SQUARE_SCALE`."""

    @classmethod
    def of(cls, codes: Float[Tensor, "P F"] | PromptCodes) -> "SetSums":
        """The sums of a set.

        Raises:
            ValueError: if a code is NaN or infinite, or too large to be summed exactly.
        """
        if isinstance(codes, PromptCodes):
            feature, value = codes.codes.feature, codes.codes.value.astype(np.float64)
        else:
            by_feature = codes.detach().cpu().double().T.numpy()
            feature, prompt = np.nonzero(by_feature)
            value = by_feature[feature, prompt]
        if not np.isfinite(value).all():
            raise ValueError("codes hold NaN or infinite values; is the model's dtype float16?")
        num_prompts, num_features = codes.shape
        if not fixed.headroom(value * value, fixed.SQUARE_SCALE, num_prompts):
            raise ValueError(
                f"a code of {np.abs(value).max(initial=0):g} is too large to be summed over {num_prompts} prompts"
            )
        starts = np.flatnonzero(np.diff(feature, prepend=-1))
        total, total_square = fixed.zeros(num_features), fixed.zeros(num_features)
        total[feature[starts]] = fixed.segment_sums(value, starts, fixed.SUM_SCALE)
        total_square[feature[starts]] = fixed.segment_sums(value * value, starts, fixed.SQUARE_SCALE)
        fired = np.bincount(feature, minlength=num_features)
        return cls(num_prompts=num_prompts, fired=fired, total=total, total_square=total_square)

    @property
    def shape(self) -> torch.Size:
        """(P, F) of the set."""
        return torch.Size([self.num_prompts, len(self.fired)])

    def merge(self, other: "SetSums") -> "SetSums":
        """The sums of both sets.

        Raises:
            ValueError: if the number of features differs.
        """
        if self.shape[1] != other.shape[1]:
            raise ValueError(f"feature dim mismatch: {self.shape} vs {other.shape}")
        return SetSums(
            num_prompts=self.num_prompts + other.num_prompts,
            fired=self.fired + other.fired,
            total=fixed.add(self.total, other.total),
            total_square=fixed.add(self.total_square, other.total_square),
        )

    def mean(self) -> Float64[np.ndarray, " F"]:
        """Mean code over all prompts."""
        return fixed.to_float(self.total, fixed.SUM_SCALE) / self.num_prompts

    def spread(self) -> Float64[np.ndarray, " F"]:
        """Sum of squared distances from the mean."""
        square = fixed.to_float(self.total_square, fixed.SQUARE_SCALE)
        spread = square - self.num_prompts * self.mean() ** 2
        return np.where(spread > _ROUNDING * square, spread, 0.0)


def differential_features(
    pos_codes: Float[Tensor, "P F"] | PromptCodes | SetSums,
    neg_codes: Float[Tensor, "N G"] | PromptCodes | SetSums,
    top_n: int = 20,
    *,
    by: Literal["difference", "effect_size"] = "difference",
) -> list[FeatureRanking]:
    """What sets two sets of prompts apart: features by positive mean - negative mean, largest first.

    The difference is signed, so features of the negative set stand last; swap the sets to see them first. As it
    favours features with large codes, every entry also has its effect size, and `by` may rank by it. Ties go to
    the lower id.

    Args:
        pos_codes: codes of the positive set, dense or sparse, or their sums.
        neg_codes: of the negative set.
        top_n: at most this many entries.
        by: what the score is.

    Returns:
        One entry a feature with means, firing rates (0 to 1) and effect size, by score.

    >>> pos, neg = torch.tensor([[3.0, 0.0], [5.0, 0.0]]), torch.tensor([[1.0, 2.0]])
    >>> [(one.feature_id, one.score, one.pos_fire_rate) for one in differential_features(pos, neg)]
    [(0, 3.0, 1.0), (1, -2.0, 0.0)]

    Raises:
        ValueError: if the sets have different features, one of them is empty or holds NaN, or an effect size is
            asked of fewer than three prompts.
    """
    if pos_codes.shape[1] != neg_codes.shape[1]:
        raise ValueError(f"feature dim mismatch: {pos_codes.shape} vs {neg_codes.shape}")
    for name, codes in (("positive", pos_codes), ("negative", neg_codes)):
        if codes.shape[0] == 0:
            raise ValueError(f"the {name} set has no prompts, so it has no means; give at least one")
    pos, neg = (codes if isinstance(codes, SetSums) else SetSums.of(codes) for codes in (pos_codes, neg_codes))
    pos_mean, neg_mean = pos.mean(), neg.mean()
    difference = pos_mean - neg_mean
    effect = _effect_size(difference, pos, neg)
    if by == "effect_size" and effect is None:
        raise ValueError("an effect size needs at least three prompts in both sets together")
    score = difference if by == "difference" or effect is None else effect
    pos_fire, neg_fire = pos.fired / pos.num_prompts, neg.fired / neg.num_prompts
    return [
        FeatureRanking(
            feature_id=int(feature),
            score=float(score[feature]),
            pos_mean=float(pos_mean[feature]),
            neg_mean=float(neg_mean[feature]),
            pos_fire_rate=float(pos_fire[feature]),
            neg_fire_rate=float(neg_fire[feature]),
            effect_size=None if effect is None else float(effect[feature]),
            by=by,
        )
        for feature in np.argsort(-score, kind="stable")[: _checked(top_n)]
    ]


def _effect_size(difference: Float64[np.ndarray, " F"], pos: SetSums, neg: SetSums) -> Float64[np.ndarray, " F"] | None:
    freedom = pos.num_prompts + neg.num_prompts - 2
    if freedom < 1:
        return None
    deviation = np.sqrt((pos.spread() + neg.spread()) / freedom)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == 0, 0.0, difference / deviation)


def strongest_features(codes: Codes, top_n: int) -> list[FeatureRanking]:
    """The features of one prompt by code, largest first; ties go to the lower id. Silent features never stand here."""
    order = np.lexsort((codes.feature, -codes.value))[: _checked(top_n)]
    return [FeatureRanking(feature_id=int(codes.feature[i]), score=float(codes.value[i])) for i in order]


def scan_prompts_for_feature(codes: Float[Tensor, "P F"] | PromptCodes, feature_id: int) -> Float[Tensor, " P"]:
    """The code of one feature on every prompt; 0 where it did not fire.

    Args:
        codes: (P, F) of P prompts, dense or sparse.
        feature_id: from 0 on.

    Returns:
        (P,) codes, in the order of prompts and the SAE's own unit.

    >>> scan_prompts_for_feature(torch.tensor([[0.0, 2.0], [1.0, 4.0]]), 1)
    tensor([2., 4.])

    Raises:
        IndexError: if there is no such feature; ids do not count from the end.
    """
    num_features = codes.shape[1]
    if not 0 <= feature_id < num_features:
        raise IndexError(f"feature_id is {feature_id}, but the codes have features 0 to {num_features - 1}")
    if isinstance(codes, Tensor):
        return codes[:, feature_id]
    mine = codes.codes.where(codes.codes.feature == feature_id)
    found = torch.zeros(codes.num_prompts)
    found[torch.from_numpy(mine.row).long()] = torch.from_numpy(mine.value)
    return found


def fire_rate(codes: Float[Tensor, "P F"] | PromptCodes, feature_id: int) -> float:
    """Share of prompts on which a feature's code is not 0.

    Args:
        codes: (P, F) of P prompts, dense or sparse.
        feature_id: from 0 on.

    Returns:
        A share from 0 to 1.

    >>> fire_rate(torch.tensor([[0.0, 2.0], [1.0, 4.0]]), 0)
    0.5

    Raises:
        IndexError: if there is no such feature.
        ValueError: if there are no prompts.
    """
    values = scan_prompts_for_feature(codes, feature_id)
    if not len(values):
        raise ValueError("there are no prompts, so there is no fire rate; give at least one")
    return int((values != 0).sum()) / len(values)


def pretty_ranking(ranking: Sequence[FeatureRanking]) -> str:
    """A ranking as text for people.

    Args:
        ranking: of one prompt, or of two sets.

    Returns:
        One line for each entry: its code, or the means and firing rates of both sets.

    >>> print(pretty_ranking([FeatureRanking(feature_id=7, score=1.5)]))
     feat      7 act= +1.5000
    """
    lines = []
    for one in ranking:
        line = f" feat {one.feature_id:>6d} "
        if one.pos_mean is None or one.neg_mean is None:
            line += f"act={one.score:+8.4f}"
        else:
            line += (
                f"diff={one.pos_mean - one.neg_mean:+8.4f} pos_mean={one.pos_mean:+8.4f} neg_mean={one.neg_mean:+8.4f} "
                f"pos_fire={one.pos_fire_rate:.2f} neg_fire={one.neg_fire_rate:.2f}"
            )
            if one.by == "effect_size":
                line += f" effect_size={one.score:+8.4f}"
        lines.append(line)
    return "\n".join(lines)


def _checked(top_n: int) -> int:
    if top_n < 0:
        raise ValueError(f"top_n is {top_n}; expected 0 or more")
    return top_n
