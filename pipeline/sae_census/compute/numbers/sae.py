"""Sparse autoencoders in one canonical form: every checkpoint format is read into it.

Row vectors: u = transform(x); pre = (u - pre_bias) W_enc + b_enc; z = gate(pre);
y = z W_dec + b_dec; reconstruction = the transform undone on y.

Encoding works in tiles of tokens and features, in float32, and gives `Codes`; a dense [tokens, F] array is
never formed. Tile sizes are constants of the device class, because GEMM shapes decide the last bits.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sae_census.compute.numbers.codes import Codes, sorted_codes

Transform = Literal["none", "constant_norm_rescale", "layer_norm"]
Postact = Literal["relu", "identity"]
TILE_TOKENS = {"cpu": 512, "cuda": 4096}
TILE_FEATURES = {"cpu": 4096, "cuda": 32768}


@dataclass(frozen=True, slots=True)
class Relu:
    """z = max(pre, 0)."""


@dataclass(frozen=True, slots=True)
class JumpRelu:
    """z = pre where pre > threshold and pre > 0, else 0. A batch-top-k SAE is one, with equal thresholds."""

    threshold: Float[Tensor, " F"]


@dataclass(frozen=True, slots=True)
class TopK:
    """z = postact(pre) at the k largest pre of a token, else 0; among equals the lowest feature wins."""

    k: int
    postact: Postact = "relu"
    """identity leaves a code negative where fewer than k pre are positive. Such a feature does not fire."""


@dataclass(frozen=True, slots=True)
class Gated:
    """z = 1[v W_gate + b_gate > 0] postact(v W_enc exp(r_mag) + b_mag), with v the shifted input (b_enc is 0)."""

    b_gate: Float[Tensor, " F"]
    b_mag: Float[Tensor, " F"]
    r_mag: Float[Tensor, " F"]
    w_gate: Float[Tensor, "D F"] | None = None
    """None: W_enc, as in the published form."""
    postact: Postact = "relu"
    """relu, as in the published form; identity lets negative codes through. Such a feature does not fire."""


Gate = Relu | JumpRelu | TopK | Gated


@dataclass(frozen=True, slots=True)
class CodeUnit:
    """What a code of 1 stands for: how the activations that it measures were scaled, and what was folded in.

    Codes of two SAEs can be held against each other as numbers only where their units are equal.
    """

    activations: Literal["raw", "scaled", "constant_norm_rescale", "layer_norm"] = "raw"
    """raw: as the model gives them; scaled: times one factor; else each token by itself, as the transform says."""
    scale: float = 1.0
    """That factor."""
    decoder_norm: bool = False
    """Whether each code was multiplied by the length of its decoder row, which was then brought to length 1."""

    def __str__(self) -> str:
        words = {
            "raw": "raw activations",
            "scaled": f"activations times {self.scale:.6g}",
            "constant_norm_rescale": "activations brought to length sqrt(D), token by token",
            "layer_norm": "activations after a layer norm, token by token",
        }
        return words[self.activations] + (", times the decoder row's length" if self.decoder_norm else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseAutoencoder:
    """One SAE in canonical form; all tensors float32 on one device."""

    w_enc: Float[Tensor, "D F"]
    b_enc: Float[Tensor, " F"]
    w_dec: Float[Tensor, "F D"]
    b_dec: Float[Tensor, " D"]
    gate: Gate
    pre_bias: Float[Tensor, " D"] | None = None
    """Subtracted from the input before encoding."""
    transform: Transform = "none"
    """Per-token normalisation of the input, undone on the reconstruction."""
    scale: float = 1.0
    """The factor of activations that is folded into `w_enc` and undone in `w_dec`; codes are of scaled activations."""
    decoder_norm: bool = False
    """Whether the lengths of the decoder rows are folded into `w_enc`; codes are then times those lengths."""

    @property
    def unit(self) -> CodeUnit:
        """What its codes are measured in."""
        if self.transform != "none":
            return CodeUnit(self.transform, decoder_norm=self.decoder_norm)
        return CodeUnit("raw" if self.scale == 1 else "scaled", self.scale, self.decoder_norm)

    @property
    def is_signed(self) -> bool:
        """Whether its codes may be negative."""
        return isinstance(self.gate, TopK | Gated) and self.gate.postact == "identity"

    @property
    def width(self) -> int:
        """D, the width of the activations."""
        return self.w_enc.shape[0]

    @property
    def num_features(self) -> int:
        """F."""
        return self.w_enc.shape[1]

    def to(self, device: torch.device) -> "SparseAutoencoder":
        """The same SAE on another device."""
        gate = self.gate
        if isinstance(gate, JumpRelu):
            gate = JumpRelu(gate.threshold.to(device))
        elif isinstance(gate, Gated):
            w_gate = None if gate.w_gate is None else gate.w_gate.to(device)
            b_gate, b_mag, r_mag = (one.to(device) for one in (gate.b_gate, gate.b_mag, gate.r_mag))
            gate = replace(gate, b_gate=b_gate, b_mag=b_mag, r_mag=r_mag, w_gate=w_gate)
        return replace(
            self,
            w_enc=self.w_enc.to(device),
            b_enc=self.b_enc.to(device),
            w_dec=self.w_dec.to(device),
            b_dec=self.b_dec.to(device),
            gate=gate,
            pre_bias=None if self.pre_bias is None else self.pre_bias.to(device),
        )

    def encode(self, x: Float[Tensor, "B T D"], first_row: int = 0, *, signed: bool = False) -> Codes:
        """The positive codes of every token.

        Args:
            x: finite activations of any float dtype.
            first_row: the shard's row that row 0 of `x` is.
            signed: also give the negative codes of a gate without ReLU; the others have none.
        """
        tokens = x.flatten(0, 1)
        step = TILE_TOKENS.get(x.device.type, TILE_TOKENS["cpu"])
        parts = []
        for start in range(0, len(tokens), step):
            token, feature, value = self._encode_tile(tokens[start : start + step], signed)
            parts.append((feature.to(torch.int32), token + start, value))
        columns = [torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)]
        return sorted_codes(*columns, num_positions=x.shape[1], first_row=first_row)

    def reconstruct(self, x: Float[Tensor, "B T D"], codes: Codes, first_row: int = 0) -> Float[Tensor, "B T D"]:
        """What the SAE makes of `x` through its codes, float32.

        Args:
            x: the activations that were encoded.
            codes: their codes; codes of other rows are not allowed.
            first_row: as in `encode`.
        """
        num_tokens, device = x.shape[0] * x.shape[1], x.device
        token = (codes.row.astype(np.int64) - first_row) * x.shape[1] + codes.position
        order = np.argsort(token, kind="stable")  # features ascend within a token
        offsets = np.searchsorted(token[order], np.arange(num_tokens))
        y = torch.nn.functional.embedding_bag(
            torch.from_numpy(codes.feature[order].astype(np.int64)).to(device),
            self.w_dec,
            torch.from_numpy(offsets).to(device),
            mode="sum",
            per_sample_weights=torch.from_numpy(codes.value[order]).to(device),
        )
        return self._undo(y + self.b_dec, x.flatten(0, 1).float()).view(x.shape)

    def codes_of(self, x: Float[Tensor, "N D"], features: Int64[Tensor, " f"]) -> Float[Tensor, "N f"]:
        """The codes of some features as columns, float32, 0 where silent; gradients flow through them.

        Negative ones of a gate without ReLU are among them, as the SAE's own library would decode them. Only these
        features are computed where the gate judges each by itself; a top-k gate needs all.

        Args:
            x: activations of any float dtype.
            features: distinct, in [0, F).
        """
        step = TILE_TOKENS.get(x.device.type, TILE_TOKENS["cpu"])
        return torch.cat([self._columns(x[start : start + step], features) for start in range(0, len(x), step)])

    def decode_change(
        self, change: Float[Tensor, "N f"], features: Int64[Tensor, " f"], x: Float[Tensor, "N D"]
    ) -> Float[Tensor, "N D"]:
        """What adding `change` to the codes of `features` adds to the reconstruction of `x`, float32."""
        return (change @ self.w_dec[features]) * self._output_scale(x.float())

    def decoder_norms(self) -> Float[Tensor, " F"]:
        """Length of every feature's decoder row."""
        return _lengths(self.w_dec)

    def pre_activations(self, x: Float[Tensor, "N D"], feature: int) -> Float[Tensor, " N"]:
        """What the gate makes one feature's code of, at every token; of a gated SAE, the magnitude. Keeps gradients.

        Args:
            x: activations of any float dtype.
            feature: which.
        """
        u = self._transformed(x.to(self.w_enc.dtype))
        if self.pre_bias is not None:
            u = u - self.pre_bias
        pre = u @ self.w_enc[:, feature] + self.b_enc[feature]
        if isinstance(self.gate, Gated):
            pre = pre * self.gate.r_mag[feature].exp() + self.gate.b_mag[feature]
        return pre

    def _encode_tile(
        self, x: Float[Tensor, "N D"], signed: bool
    ) -> tuple[Int64[Tensor, " M"], Int64[Tensor, " M"], Float[Tensor, " M"]]:
        u = self._shifted(x)
        step = TILE_FEATURES.get(x.device.type, TILE_FEATURES["cpu"])
        tiles = []
        for start in range(0, self.num_features, step):
            part = slice(start, min(start + step, self.num_features))
            pre = torch.addmm(self.b_enc[part], u, self.w_enc[:, part])
            if isinstance(self.gate, TopK):
                value, index = largest(pre, self.gate.k)
                tiles.append((value, index + start))
            else:
                z = self._elementwise(pre, u, part)
                token, feature = (z != 0 if signed and self.is_signed else z > 0).nonzero(as_tuple=True)
                tiles.append((z[token, feature], torch.stack([token, feature + start])))
        if not isinstance(self.gate, TopK):
            token, feature = torch.cat([where for _, where in tiles], dim=1)
            return token, feature, torch.cat([value for value, _ in tiles])
        values, features = (torch.cat(column, dim=1) for column in zip(*tiles, strict=True))
        if len(tiles) > 1:  # the k best of all tiles are among the k best of each
            values, index = largest(values, self.gate.k)
            features = features.gather(1, index)
        token = torch.arange(len(values), device=values.device)[:, None].expand_as(values)
        if values.min() > 0:  # nearly always: k features of a token are positive
            return token.flatten(), features.flatten(), values.flatten()
        keep = values != 0 if signed and self.is_signed else values > 0
        return token[keep], features[keep], values[keep]

    def _columns(self, x: Float[Tensor, "N D"], features: Int64[Tensor, " f"]) -> Float[Tensor, "N f"]:
        if not isinstance(self.gate, TopK):
            u = self._shifted(x)
            pre = torch.addmm(self.b_enc[features], u, self.w_enc[:, features])
            z = self._elementwise(pre, u, features)
            return z if self.is_signed else z.relu()
        token, feature, value = self._encode_tile(x, signed=True)
        column = torch.full((self.num_features,), -1, device=x.device)
        column[features] = torch.arange(len(features), device=x.device)
        column = column[feature]
        wanted = column >= 0
        silent = torch.zeros(len(x), len(features), device=x.device)
        return silent.index_put((token[wanted], column[wanted]), value[wanted])

    def _elementwise(
        self, pre: Float[Tensor, "N f"], u: Float[Tensor, "N D"], part: slice | Int64[Tensor, " f"]
    ) -> Float[Tensor, "N f"]:
        match self.gate:
            case JumpRelu(threshold):
                return torch.where(pre > threshold[part], pre, 0)
            case Gated(b_gate, b_mag, r_mag, w_gate, _):
                magnitude = torch.addcmul(b_mag[part], pre, r_mag[part].exp())
                judged = pre if w_gate is None else u @ w_gate[:, part]
                return torch.where(judged + b_gate[part] > 0, magnitude, 0)
            case _:
                return pre

    def _shifted(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        u = self._transformed(x.float())
        return u if self.pre_bias is None else u - self.pre_bias

    def _transformed(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        match self.transform:
            case "constant_norm_rescale":
                x = x * (x.shape[1] ** 0.5 / _lengths(x)[:, None])
            case "layer_norm":
                centred = x - x.mean(dim=1, keepdim=True)
                x = centred / (centred.std(dim=1, keepdim=True) + 1e-5)
        return x

    def _undo(self, y: Float[Tensor, "N D"], x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        y = y * self._output_scale(x)
        return y + x.mean(dim=1, keepdim=True) if self.transform == "layer_norm" else y

    def _output_scale(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N 1"]:
        """The factor by which undoing the transform stretches each token."""
        match self.transform:
            case "constant_norm_rescale":
                scale: Tensor = _lengths(x)[:, None] / x.shape[1] ** 0.5
            case "layer_norm":
                scale = x.std(dim=1, keepdim=True)
            case _:
                scale = torch.ones_like(x[:, :1])
        return scale


def folded(sae: SparseAutoencoder, scale: float) -> SparseAutoencoder:
    """The same SAE for activations that it expects times `scale`: raw ones enter, codes stay what they were."""
    return replace(
        sae,
        w_enc=sae.w_enc * scale,
        w_dec=sae.w_dec / scale,
        b_dec=sae.b_dec / scale,
        pre_bias=None if sae.pre_bias is None else sae.pre_bias / scale,
        scale=sae.scale * scale,
    )


def _lengths(rows: Float[Tensor, "N M"]) -> Float[Tensor, " N"]:
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return lengths


def largest(pre: Float[Tensor, "N M"], k: int) -> tuple[Float[Tensor, "N k"], Int64[Tensor, "N k"]]:
    """The k largest of each row with their columns, columns ascending; the lowest columns win a tie."""
    if k >= pre.shape[1]:
        return pre, torch.arange(pre.shape[1], device=pre.device).expand_as(pre)
    best = pre.topk(k + 1, dim=1)
    index = best.indices[:, :k]
    tied = best.values[:, k - 1] == best.values[:, k]
    if tied.any():  # topk promises nothing about which of equals it returns; a stable sort does
        index[tied] = pre[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    index = index.sort(dim=1).values
    return pre.gather(1, index), index
