"""SAEs that read or write several places: crosscoders and cross-layer transcoders, and what their decoders say.

Heads of a crosscoder are the places it reads and writes (layers, or models); H of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_census.compute.numbers.codes import Codes
from sae_census.compute.numbers.sae import Gate, SparseAutoencoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Crosscoder:
    """One dictionary for H places: pre = sum over heads of x_h W_enc,h + b_enc,h; z = gate(pre), one for all heads.

    That is an SAE that reads its heads side by side, and the greatest code over the heads is the code.
    """

    joint: SparseAutoencoder
    """Its width is H * D."""
    num_heads: int

    @classmethod
    def of(
        cls,
        *,
        w_enc: Float[Tensor, "H D F"],
        b_enc: Float[Tensor, "H F"],
        w_dec: Float[Tensor, "H F D"],
        b_dec: Float[Tensor, "H D"],
        gate: Gate,
    ) -> "Crosscoder":
        """From tensors by head."""
        joint = SparseAutoencoder(
            w_enc=w_enc.flatten(0, 1).contiguous(),
            b_enc=b_enc.sum(dim=0),
            w_dec=w_dec.transpose(0, 1).flatten(1).contiguous(),
            b_dec=b_dec.flatten(),
            gate=gate,
        )
        return cls(joint=joint, num_heads=len(w_enc))

    @property
    def num_features(self) -> int:
        return self.joint.num_features

    @property
    def w_dec(self) -> Float[Tensor, "H F D"]:
        """The decoder of every head."""
        rows: Tensor = self.joint.w_dec.unflatten(1, (self.num_heads, -1))
        return rows.transpose(0, 1)

    def encode(self, x: Float[Tensor, "B T H D"], first_row: int = 0) -> Codes:
        """As `SparseAutoencoder.encode`, of activations by head."""
        return self.joint.encode(x.flatten(2), first_row)


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossLayerTranscoder:
    """L encoders; the features of layer l are decoded to every layer from l on."""

    w_enc: Float[Tensor, "L D F"]
    b_enc: Float[Tensor, "L F"]
    w_dec: tuple[Tensor, ...]
    """w_dec[i] is (i + 1, F, D): from layers 0 to i to layer i."""
    b_dec: Float[Tensor, "L D"]
    gates: tuple[Gate, ...]
    """One for each layer."""

    @property
    def num_layers(self) -> int:
        return len(self.w_enc)

    def encoder(self, layer: int) -> SparseAutoencoder:
        """The features of one layer, with their decoder to that same layer."""
        return SparseAutoencoder(
            w_enc=self.w_enc[layer],
            b_enc=self.b_enc[layer],
            w_dec=self.w_dec[layer][layer],
            b_dec=self.b_dec[layer],
            gate=self.gates[layer],
        )


class HeadGeometry(NamedTuple):
    """How the decoders of a feature at different heads lie to each other."""

    norm: Float[Tensor, "F H"]
    inner: Float[Tensor, "F H H"]
    cosine: Float[Tensor, "F H H"]
    """0 where a decoder has no length."""


def head_geometry(w_dec: Float[Tensor, "H F D"]) -> HeadGeometry:
    """Lengths, inner products and cosines of a feature's decoders, head by head, in float32."""
    rows = w_dec.float().transpose(0, 1)
    inner = torch.einsum("fhd,fgd->fhg", rows, rows)
    norm: Tensor = torch.linalg.vector_norm(rows, dim=2)
    lengths = norm[:, :, None] * norm[:, None, :]
    return HeadGeometry(norm, inner, torch.where(lengths > 0, inner / lengths, 0))


def target_norms(w_dec: Sequence[Tensor], layer: int) -> Float[Tensor, "F L"]:
    """Length of every feature's decoder from `layer` to each layer, 0 to layers before it.

    Args:
        w_dec: as in `CrossLayerTranscoder`.
        layer: where the features are read.
    """
    norms = torch.zeros(w_dec[0].shape[1], len(w_dec), device=w_dec[0].device)
    for target in range(layer, len(w_dec)):
        norms[:, target] = torch.linalg.vector_norm(w_dec[target][layer].float(), dim=1)
    return norms
