"""Edits of codes as changes of activations: x' = x + (z' - z) d for every edited feature, d its decoder row.

What the SAE does not explain (its error) and every other feature stay in the activation, so an edit that leaves
the codes as they are leaves every bit as it is. For a normalising SAE the step is stretched back to the scale of
the input. Nothing here knows models or hooks.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_census.compute.numbers.sae import SparseAutoencoder
from sae_census.errors import ArgumentError

Mode = Literal["scale", "add", "set"]
ErrorTerm = Literal["keep", "drop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """A new code for one feature: value x code (scale), code + value (add) or value (set).

    The new code may be negative: scale by -1 turns a feature round. Codes are in the SAE's own unit.

    >>> Edit(feature=5, value=0)  # ablates it
    Edit(feature=5, value=0, mode='scale')
    >>> Edit(feature=5, value=2.5, mode="add").applied(torch.tensor([0.0, 1.0]))
    tensor([2.5000, 3.5000])
    """

    feature: int
    value: float | int
    mode: Mode = "scale"

    def applied(self, code: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """The codes after this edit."""
        match self.mode:
            case "scale":
                return code * self.value
            case "add":
                return code + self.value
            case "set":
                return torch.full_like(code, self.value)


EditLike = Edit | tuple[int, float] | tuple[int, float, Mode]
"""An edit, or its fields in order; without a mode it scales."""


def read_edits(given: Any, num_features: int) -> tuple[Edit, ...]:
    """One edit or several (`EditLike`, or a sequence of them), each proved to be possible.

    Raises:
        ArgumentError: if there is none, no such feature or mode, or a value that is not finite.
    """
    several = [given] if _is_one(given) else list(given)
    if not several:
        raise ArgumentError("there are no edits; expected (feature, strength) or Edit(...)")
    return tuple(_checked(one, num_features) for one in several)


def _is_one(value: Any) -> bool:
    return isinstance(value, Edit) or (
        isinstance(value, tuple) and len(value) in (2, 3) and not any(isinstance(part, tuple | Edit) for part in value)
    )


def _checked(given: Any, num_features: int) -> Edit:
    if not _is_one(given):
        raise ArgumentError(f"an edit is {given!r}; expected (feature, strength) or Edit(...)")
    fields = (given.feature, given.value, given.mode) if isinstance(given, Edit) else given
    mode: Any = fields[2] if len(fields) == 3 else "scale"
    try:
        feature, value = operator.index(fields[0]), float(fields[1])
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"an edit is {given!r}; expected a whole number for the feature and a number") from error
    if not 0 <= feature < num_features:
        raise ArgumentError(f"there is no feature {feature}; expected 0 to {num_features - 1}")
    if not math.isfinite(value):
        raise ArgumentError(f"strength of feature {feature} is {value}; expected a finite number")
    if mode not in get_args(Mode):
        raise ArgumentError(f"mode of feature {feature} is {mode!r}; expected {', '.join(get_args(Mode))}")
    return Edit(feature=feature, value=value, mode=mode)


class Edited(NamedTuple):
    """Activations after some edits."""

    x: Float[Tensor, "N D"]
    """The very tensor that was given if no token was touched; untouched tokens keep their bits."""
    touched: Bool[Tensor, " N"]
    """Tokens whose activation was replaced."""


def edit(
    sae: SparseAutoencoder,
    x: Float[Tensor, "N D"],
    edits: Sequence[Edit],
    *,
    where: Bool[Tensor, " N"] | None = None,
    error_term: ErrorTerm = "keep",
) -> Edited:
    """Activations with edited codes.

    All edits start from the codes of `x`, the negative ones of a gate without ReLU among them; several edits of one
    feature are applied in order. Gradients flow through touched tokens as through x + (z'(x) - z(x)) d, except where
    the error term is dropped.

    Args:
        sae: whose codes are edited.
        x: activations of any float dtype; the arithmetic is at least float32.
        edits: at least one.
        where: tokens that may be touched; None means all.
        error_term: drop replaces every such token by the SAE's reconstruction from all of its codes, edited.

    Raises:
        ArgumentError: if a finite activation would overflow its dtype.
    """
    features = sorted({one.feature for one in edits})
    index = torch.tensor(features, device=x.device)
    codes = sae.codes_of(x, index)
    columns = list(codes.unbind(dim=1))
    for one in edits:
        place = features.index(one.feature)
        columns[place] = one.applied(columns[place])
    change = torch.stack(columns, dim=1) - codes
    touched = (change != 0).any(dim=1)
    if error_term == "drop":
        touched = torch.ones_like(touched)
    if where is not None:
        touched = touched & where
    if not touched.any():
        return Edited(x, touched)
    old = x[touched]
    base = old.to(torch.promote_types(old.dtype, torch.float32))
    if error_term == "drop":
        with torch.no_grad():
            base = sae.reconstruct(old[None], sae.encode(old[None], signed=True))[0]
    new = (base + sae.decode_change(change[touched], index, old)).to(x.dtype)
    if (torch.isfinite(old).all(dim=1) & ~torch.isfinite(new).all(dim=1)).any():
        raise ArgumentError(
            f"the edits {_listing(edits)} push activations beyond {torch.finfo(x.dtype).max:.4g}, the largest "
            f"{str(x.dtype).removeprefix('torch.')}; use smaller values, or a model in bfloat16 or float32"
        )
    return Edited(x.index_put((touched.nonzero()[:, 0],), new), touched)


def _listing(edits: Sequence[Edit]) -> str:
    return ", ".join(f"{one.mode} {one.value:g} of feature {one.feature}" for one in edits)
