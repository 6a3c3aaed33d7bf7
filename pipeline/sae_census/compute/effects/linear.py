"""A feature as a linear function of what a model wrote, at one token: frozen norms, fixed patterns, exact sums.

The residual stream at a token is a sum: the embedding, then of every block what each head brings from each
source token, what the MLP writes, and biases. A feature's pre-activation, with every norm frozen at the scale
it has at that token, is an affine function of that sum; so it splits into one number for each part, and the
numbers add up to it. Contractions run in float64.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sae_census.compute.numbers.sae import Gated, SparseAutoencoder


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenNorm:
    """A LayerNorm or RMSNorm with the scale it has at given vectors: an affine map for each of them."""

    gain: Float[Tensor, " D"]
    shift: Float[Tensor, " D"]
    scale: Float[Tensor, " Q"]
    """1 / the deviation (LayerNorm) or root mean square (RMSNorm) of each vector."""
    centred: bool
    """Whether the mean is subtracted first (LayerNorm)."""

    def __call__(self, x: Float[Tensor, "Q D"]) -> Float[Tensor, "Q D"]:
        """The frozen maps of the Q vectors, applied to one vector each."""
        if self.centred:
            x = x - x.mean(dim=1, keepdim=True)
        return x * self.scale[:, None] * self.gain + self.shift

    def pull(self, read: Float64[Tensor, " D"], query: int) -> Float64[Tensor, " D"]:
        """The direction to read before the norm of vector `query` for what `read` reads after it (less its shift)."""
        before = read * self.gain.double() * self.scale[query].double()
        return before - before.mean() if self.centred else before


def freeze(
    x: Float[Tensor, "Q D"],
    y: Float[Tensor, "Q D"],
    *,
    gain: Float[Tensor, " D"],
    shift: Float[Tensor, " D"],
    centred: bool,
) -> FrozenNorm:
    """A norm frozen where it maps `x` to `y`. Its scale is read off the two, so that no epsilon need be known."""
    unit = (x - x.mean(dim=1, keepdim=True) if centred else x) * gain
    scale = ((y - shift) * unit).sum(dim=1) / unit.square().sum(dim=1)
    return FrozenNorm(gain=gain, shift=shift, scale=scale, centred=centred)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """One block's attention with its pattern fixed, at Q query tokens of a context: H heads that share G values."""

    pattern: Float[Tensor, "H Q T"]
    values: Float[Tensor, "T G E"]
    """Of every source token, without their bias."""
    value_bias: Float[Tensor, "G E"]
    w_out: Float[Tensor, "O D"]
    """O = H x E, heads one after another."""
    b_out: Float[Tensor, " D"]
    norm: FrozenNorm | None = None
    """Between the output matrix and the residual stream, if the family has one."""

    def pull(self, read: Float64[Tensor, " D"], query: int) -> tuple[Float64[Tensor, "H E"], float]:
        """What a reader of the attention's output reads of each head's, and what the output's biases give it."""
        bias = 0.0
        if self.norm is not None:
            bias = float(self.norm.shift.double() @ read)
            read = self.norm.pull(read, query)
        heads = (self.w_out.double() @ read).unflatten(0, (len(self.pattern), -1))
        return heads, bias + float(self.b_out.double() @ read)

    def contributions(self, heads: Float64[Tensor, "H E"], query: int) -> tuple[Float64[Tensor, "H T"], float]:
        """What each head brings from each source token to query `query`, and what the bias of values brings.

        Args:
            heads: the direction in which each head's output is read.
            query: which of the Q query tokens.
        """
        grouped = heads.unflatten(0, (self.values.shape[1], -1))
        weight = self.pattern[:, query].double()
        worth = torch.einsum("tge,gre->grt", self.values.double(), grouped).flatten(0, 1)
        of_bias = torch.einsum("ge,gre->gr", self.value_bias.double(), grouped).flatten()
        return weight * worth, float(weight.sum(dim=1) @ of_bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualWrites:
    """What a model wrote into the residual stream at Q tokens of one context, block by block."""

    positions: tuple[int, ...]
    """Where in the context the Q tokens stand."""
    embed: Float[Tensor, "Q D"]
    position: Float[Tensor, "Q D"]
    """Learned positional embeddings; zeros where the family has none."""
    attention: tuple[Attention, ...]
    """Of the first blocks."""
    mlps: tuple[Float[Tensor, "Q D"], ...]
    """What the MLPs of the first blocks write, biases included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A feature's pre-activation at one token, split without rest; L blocks of attention, M of MLPs."""

    pre_activation: float
    embed: float
    position: float
    first_layer: int
    """The block of heads[0]: 0, or the SAE's own block where it reads inside attention."""
    heads: Float64[np.ndarray, "L H T"]
    """By block, head and source token, of which the last is the token itself."""
    head_biases: Float64[np.ndarray, " L"]
    """Biases of values and of the output matrix."""
    mlps: Float64[np.ndarray, " M"]
    sae_bias: float
    """The encoder's bias, less what its pre-bias takes away."""
    intercept: float
    """What is not linear in the stream: where the SAE reads in or behind an MLP, the norm's bias, the MLP's
    biases and its curvature; else 0."""

    @property
    def total(self) -> float:
        """The sum of all parts: the pre-activation, but for rounding."""
        ends = self.embed + self.position + self.sae_bias + self.intercept
        return ends + float(self.heads.sum() + self.head_biases.sum() + self.mlps.sum())

    @property
    def magnitude(self) -> float:
        """The sum of the parts without their signs: what rounding is measured by."""
        ends = abs(self.embed) + abs(self.position) + abs(self.sae_bias) + abs(self.intercept)
        parts = np.abs(self.heads).sum() + np.abs(self.head_biases).sum() + np.abs(self.mlps).sum()
        return ends + float(parts)


def read_out(sae: SparseAutoencoder, x: Float[Tensor, " D"], feature: int) -> tuple[Float64[Tensor, " D"], float]:
    """The direction and constant with which a feature reads the activations `x`, the SAE's transform frozen there.

    direction · x + constant is its pre-activation at `x` (of a gated SAE, that of its magnitude).
    """
    direction, constant = sae.w_enc[:, feature].double(), sae.b_enc[feature].double()
    if isinstance(sae.gate, Gated):
        direction = direction * sae.gate.r_mag[feature].double().exp()
        constant = sae.gate.b_mag[feature].double()
    if sae.pre_bias is not None:
        constant = constant - sae.pre_bias.double() @ direction
    x = x.double()
    match sae.transform:
        case "constant_norm_rescale":
            direction = direction * (len(x) ** 0.5 / torch.linalg.vector_norm(x))
        case "layer_norm":
            direction = (direction - direction.mean()) / (x.std() + 1e-5)
    return direction, float(constant)


def split_stream(
    writes: ResidualWrites,
    query: int,
    read: Float64[Tensor, " D"],
    *,
    num_attention: int,
    num_mlps: int,
    pre_activation: float,
    sae_bias: float,
    intercept: float,
) -> Split:
    """Split what `read` reads of the residual stream at query `query` after so many attentions and MLPs."""
    heads, biases = [], []
    for attention in writes.attention[:num_attention]:
        by_head, bias = attention.pull(read, query)
        brought, value_bias = attention.contributions(by_head, query)
        heads.append(brought[:, : writes.positions[query] + 1].cpu().numpy())
        biases.append(bias + value_bias)
    none = np.zeros((0, 0, 0))
    return Split(
        pre_activation=pre_activation,
        embed=float(writes.embed[query].double() @ read),
        position=float(writes.position[query].double() @ read),
        first_layer=0,
        heads=np.stack(heads) if heads else none,
        head_biases=np.array(biases, np.float64),
        mlps=np.array([float(wrote[query].double() @ read) for wrote in writes.mlps[:num_mlps]], np.float64),
        sae_bias=sae_bias,
        intercept=intercept,
    )


def split_attention(
    writes: ResidualWrites,
    query: int,
    heads: Float64[Tensor, "H E"],
    *,
    layer: int,
    pre_activation: float,
    bias: float,
    sae_bias: float,
) -> Split:
    """Split what is read of one block's heads, before or behind its output matrix."""
    brought, value_bias = writes.attention[layer].contributions(heads, query)
    return Split(
        pre_activation=pre_activation,
        embed=0.0,
        position=0.0,
        first_layer=layer,
        heads=brought[None, :, : writes.positions[query] + 1].cpu().numpy(),
        head_biases=np.array([bias + value_bias]),
        mlps=np.zeros(0),
        sae_bias=sae_bias,
        intercept=0.0,
    )


KINDS = ("embed", "position", "head", "mlp", "bias", "intercept", "source", "head_source")
"""Rows of a split. The first six add up to the pre-activation. `source` is what all heads together bring from
one token, `head_source` what one head brings from one token: both divide the `head` rows in another way."""


class Part(NamedTuple):
    """One row of a split; None where a part has no block, head or source token."""

    kind: str
    layer: int | None
    head: int | None
    source: int | None
    """Position of the source token."""
    contribution: float


def parts(split: Split, num_pairs: int) -> list[Part]:
    """The rows of a split in the order of `KINDS`, then block, head, source; ends that are 0 are left out.

    Args:
        split: of one feature at one token.
        num_pairs: how many `head_source` rows: the largest whatever their sign, largest first; among equals the
            earlier block, head and token.
    """
    ends = [Part("embed", None, None, None, split.embed), Part("position", None, None, None, split.position)]
    by_head, by_source = split.heads.sum(axis=2), split.heads.sum(axis=(0, 1))
    layers = range(split.first_layer, split.first_layer + len(split.heads))
    heads = [
        Part("head", layer, head, None, float(value))
        for layer, row in zip(layers, by_head, strict=True)
        for head, value in enumerate(row)
    ]
    mlps = [Part("mlp", layer, None, None, float(value)) for layer, value in enumerate(split.mlps)]
    biases = [
        Part("bias", layer, None, None, float(value)) for layer, value in zip(layers, split.head_biases, strict=True)
    ]
    biases.append(Part("bias", None, None, None, split.sae_bias))
    intercept = [Part("intercept", None, None, None, split.intercept)]
    sources = [Part("source", None, None, source, float(value)) for source, value in enumerate(by_source)]
    largest = np.argsort(-np.abs(split.heads), axis=None, kind="stable")[:num_pairs]
    pairs = [
        Part("head_source", layers[layer], int(head), int(source), float(split.heads[layer, head, source]))
        for layer, head, source in np.stack(np.unravel_index(largest, split.heads.shape), axis=1)
    ]
    nonzero = [part for part in ends if part.contribution != 0.0]
    return nonzero + heads + mlps + biases + [p for p in intercept if p.contribution != 0.0] + sources + pairs
