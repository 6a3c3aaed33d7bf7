"""Direct logit effects: what a direction written into the residual stream does to the logits by the direct path.

Everything between the place of writing and the final norm is passed over. Features times vocabulary is never
formed: products are made in tiles of both, and only the strongest tokens and sums of powers outlive a tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from sae_census.compute.numbers.sae import largest
from sae_census.errors import CheckpointError, ConfigError

Mode = Literal["direction", "ln_final"]
DEFINITIONS: dict[Mode, str] = {
    "direction": (
        "logit = (g * d) W_U, less its mean over the vocabulary; d is the written direction (less its mean over D "
        "under LayerNorm), g the gain of the final norm; no biases, no division by the norm of the stream"
    ),
    "ln_final": (
        "logit = LN_final(d) W_U + b_U; d is the written direction alone in the residual stream, the biases of the "
        "final norm and of the unembedding are included"
    ),
}
"""What `logit` means. Neither applies a soft cap: it is strictly monotone and changes no order."""

TILE_FEATURES = 2048
TILE_TOKENS = {"cpu": 4096, "cuda": 32768}


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalNorm:
    """The norm before the unembedding: y = gain * (x - mean(x)) / sqrt(var(x) + eps) + bias (LayerNorm), or
    y = gain * x / sqrt(mean(x^2) + eps) (RMSNorm).
    """

    kind: Literal["layer_norm", "rms_norm"]
    gain: Float[Tensor, " D"]
    """What the normalised vector is multiplied with; for Gemma 1 + weight."""
    bias: Float[Tensor, " D"] | None = None
    eps: float

    def linear(self, x: Float[Tensor, "F D"]) -> Float[Tensor, "F D"]:
        """The norm without its division and its bias."""
        return self._centred(x) * self.gain

    def __call__(self, x: Float[Tensor, "F D"]) -> Float[Tensor, "F D"]:
        """The norm itself."""
        x = self._centred(x)
        y = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + self.eps) * self.gain
        return y if self.bias is None else y + self.bias

    def _centred(self, x: Float[Tensor, "F D"]) -> Float[Tensor, "F D"]:
        return x - x.mean(dim=1, keepdim=True) if self.kind == "layer_norm" else x


@dataclass(frozen=True, slots=True, kw_only=True)
class Unembedding:
    """From the end of the residual stream to the logits; all on one device."""

    norm: FinalNorm
    weight: Float[Tensor, "V D"]
    """W_U transposed, in the dtype of the model; read in tiles."""
    bias: Float[Tensor, " V"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """How a stream reaches the residual stream: (x matrix) * gain. Biases belong to no feature."""

    matrix: Float[Tensor, "W D"] | None = None
    """The output matrix of attention or MLP; None if the stream is written as it is."""
    gain: Float[Tensor, " D"] | None = None
    """Of a norm between that matrix and the residual stream (Gemma 2 and 3), without its division."""

    def rows(self, directions: Float[Tensor, "F W"]) -> Float[Tensor, "F D"]:
        """Decoder rows of the stream as directions in the residual stream."""
        rows = directions if self.matrix is None else directions @ self.matrix
        return rows if self.gain is None else rows * self.gain


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitEffects:
    """The effects of F directions on V logits, summed up."""

    positive_token: Int64[np.ndarray, "F K"]
    """Ids of the tokens with the largest logits, best first; among equals the lowest id comes first."""
    positive_logit: Float32[np.ndarray, "F K"]
    negative_token: Int64[np.ndarray, "F K"]
    """Ids of the tokens with the smallest logits, the smallest first; ties as above."""
    negative_logit: Float32[np.ndarray, "F K"]
    mean: Float64[np.ndarray, " F"]
    """Over the vocabulary, as it is before `direction` takes it away."""
    std: Float64[np.ndarray, " F"]
    """In the population form."""
    skewness: Float64[np.ndarray, " F"]
    """m3 / m2^1.5 (g1 of Joanes and Gill, 1998); 0 if all logits are equal."""
    kurtosis: Float64[np.ndarray, " F"]
    """In excess of the normal distribution's: m4 / m2^2 - 3 (g2); 0 if all logits are equal."""

    @classmethod
    def empty(cls, num_features: int, top_k: int) -> "LogitEffects":
        """Arrays to be filled: all at once, because small results between large tiles would split the heap."""
        lists, numbers = (num_features, top_k), num_features
        return cls(
            positive_token=np.empty(lists, np.int64),
            positive_logit=np.empty(lists, np.float32),
            negative_token=np.empty(lists, np.int64),
            negative_logit=np.empty(lists, np.float32),
            mean=np.empty(numbers),
            std=np.empty(numbers),
            skewness=np.empty(numbers),
            kurtosis=np.empty(numbers),
        )


def logit_effects(
    rows: Float[Tensor, "F D"],
    unembedding: Unembedding,
    *,
    top_k: int,
    mode: Mode = "direction",
    tile_features: int = TILE_FEATURES,
    tile_tokens: int | None = None,
) -> LogitEffects:
    """The direct effects of written directions, as `DEFINITIONS` defines them (direct path: Elhage et al., 2021).

    Products are float32, moments are merged over tiles in float64. Beside its arguments and its result it holds
    two tiles of tile_features x tile_tokens float32 and two of tile_tokens x D (four more of the former while
    ties at rank K are decided, if all rows have them). Other tile sizes can change the last bits only.

    Args:
        rows: directions in the residual stream, float32, on the device of `unembedding`.
        unembedding: of the model.
        top_k: K, tokens of each sign.
        mode: the definition.
        tile_features: directions of a tile.
        tile_tokens: tokens of a tile; by default a constant of the device class.

    Raises:
        ConfigError: if there are fewer than K tokens.
        CheckpointError: if a logit is NaN or infinite.
    """
    num_tokens = len(unembedding.weight)
    if not 1 <= top_k <= num_tokens:
        raise ConfigError(f"top_k is {top_k}, but expected 1 to {num_tokens}, the number of tokens of the vocabulary")
    step = tile_tokens or TILE_TOKENS.get(rows.device.type, TILE_TOKENS["cpu"])
    bias = unembedding.bias if mode == "ln_final" else None
    middle = _mean_row(unembedding.weight, step)
    found = LogitEffects.empty(len(rows), top_k)
    for start in range(0, len(rows), tile_features):
        chunk = rows[start : start + tile_features]
        x = unembedding.norm(chunk) if mode == "ln_final" else unembedding.norm.linear(chunk)
        mean = x.double() @ middle
        if bias is not None:
            mean = mean + bias.double().mean()
        centred = middle.float() if mode == "direction" else None
        tiles = _tiles(x, unembedding.weight, bias, centred, step)
        shift = torch.zeros_like(mean) if mode == "direction" else mean
        columns = _summed(tiles, shift.float(), top_k, num_tokens) | {"mean": mean}
        for name, values in columns.items():
            getattr(found, name)[start : start + tile_features] = values.cpu().numpy()
    moments = np.stack([found.mean, found.std, found.skewness, found.kurtosis])
    broken = np.flatnonzero(~np.isfinite(moments).all(axis=0))
    if len(broken):
        raise CheckpointError(
            f"the logits of direction {broken[0]} of {len(rows)} are NaN or infinite; expected finite weights in the "
            "decoder, the output matrices and the unembedding"
        )
    return found


def _mean_row(weight: Float[Tensor, "V D"], step: int) -> Float64[Tensor, " D"]:
    """The mean row of the unembedding: x times it is the mean logit."""
    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for start in range(0, len(weight), step):
        total += weight[start : start + step].sum(dim=0, dtype=torch.float64)
    return total / len(weight)


def _tiles(
    x: Float[Tensor, "f D"],
    weight: Float[Tensor, "V D"],
    bias: Float[Tensor, " V"] | None,
    centre: Float[Tensor, " D"] | None,
    step: int,
) -> Iterator[tuple[int, Float[Tensor, "f v"]]]:
    """Logits in tiles of tokens, each with its first token id.

    The mean row is taken away before the product, not after it: small effects keep their digits.
    """
    for start in range(0, len(weight), step):
        part = weight[start : start + step].float()
        tile = x @ (part if centre is None else part - centre).T
        yield start, tile if bias is None else tile.add_(bias[start : start + step].float())


def _summed(
    tiles: Iterator[tuple[int, Float[Tensor, "f v"]]], shift: Float[Tensor, " f"], top_k: int, num_tokens: int
) -> dict[str, Tensor]:
    """All of `LogitEffects` but the mean.

    `shift` is near each row's mean, so that the sums of powers about it cancel no digits.
    """
    none = (shift.new_empty((len(shift), 0)), torch.empty((len(shift), 0), dtype=torch.int64, device=shift.device))
    highest, lowest = none, none
    sums = torch.zeros((4, len(shift)), dtype=torch.float64, device=shift.device)
    for start, tile in tiles:
        highest = _stronger(*highest, tile, start, top_k)
        lowest = _stronger(*lowest, -tile, start, top_k)
        _add_powers(sums, tile.sub_(shift[:, None]))
    first, second, third, fourth = sums / num_tokens
    m2 = (second - first**2).clamp(min=0)
    m3 = third - 3 * first * second + 2 * first**3
    m4 = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    safe = torch.where(m2 > 0, m2, 1)
    skewness = torch.where(m2 > 0, m3 / safe**1.5, 0)
    kurtosis = torch.where(m2 > 0, m4 / safe**2 - 3, 0)
    return {
        "positive_logit": highest[0],
        "positive_token": highest[1],
        "negative_logit": -lowest[0],
        "negative_token": lowest[1],
        "std": m2.sqrt(),
        "skewness": skewness,
        "kurtosis": kurtosis,
    }


def _add_powers(sums: Float64[Tensor, "4 f"], tile: Float[Tensor, "f v"]) -> None:
    """Add the sums of the first four powers, in place."""
    power = torch.ones_like(tile)
    for total in sums:
        total += power.mul_(tile).sum(dim=1)


def _stronger(
    value: Float[Tensor, "f k"], token: Int64[Tensor, "f k"], tile: Float[Tensor, "f v"], start: int, top_k: int
) -> tuple[Float[Tensor, "f j"], Int64[Tensor, "f j"]]:
    """The largest values of each row and their tokens, of those so far and of a tile of later tokens.

    By value descending, then token id ascending: candidates stand in the order of ids among equals, and the
    sort is stable.
    """
    found, index = largest(tile, top_k)
    value, token = torch.cat([value, found], dim=1), torch.cat([token, index + start], dim=1)
    order = value.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    return value.gather(1, order), token.gather(1, order)
