"""From any SAE to a function that turns a batch of activations into codes: ours, or an object with `encode`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sae_census.compute.notebook.cross_layer import Crosscoder, CrossLayerTranscoder
from sae_census.compute.notebook.dense import sparse_codes
from sae_census.compute.numbers.codes import Codes
from sae_census.compute.numbers.sae import SparseAutoencoder
from sae_census.errors import ConfigError, ShardError
from sae_census.io.checkpoints import LoadedSae

NOT_ACTIVATIONS = ("tokens", "mask", "meta")
_UNFOLDED = ("dataset-wise", "token-wise", "batch-wise", "expected_average_only_in")

Batch = Mapping[str, Any]
"""Activations (B, T, D) by hook point, `tokens` (B, T), and if there are any `mask` (B, T) and `meta`, B mappings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """What the analyzer needs to know of an SAE."""

    sae_type: str
    num_features: int | None
    """None: seen from the first batch."""
    hook_points: tuple[str, ...]
    """Keys of a batch that are read, by a crosscoder as heads (B, T, H, D); none: its only activations."""
    encode: Callable[[Tensor, Tensor], tuple[Codes, int]]
    """From activations and the mask of counted tokens, (B, T), to the codes of those and the number of features."""

    def codes(self, batch: Batch, counted: Tensor) -> tuple[Codes, int]:
        """Codes of the counted tokens of a batch, rows from 0, and the number of features.

        Raises:
            ConfigError: if the batch lacks the activations.
            ShardError: if activations of a counted token are NaN or infinite.
        """
        x = self._activations(batch)
        if x.shape[:2] != counted.shape:
            raise ConfigError(f"activations are {tuple(x.shape)}, but tokens are {tuple(counted.shape)} (B, T)")
        if not torch.isfinite(x.sum(dtype=torch.float32)):  # one pass; NaN and Inf survive a sum
            broken = (~torch.isfinite(x).flatten(2).all(dim=2) & counted.to(x.device)).nonzero()
            if len(broken):
                row, position = broken[0].tolist()
                raise ShardError(
                    f"activations are NaN or infinite in context {row} of a batch, at position {position}; "
                    "mask that token or compute in another dtype"
                )
        return self.encode(x, counted)

    def _activations(self, batch: Batch) -> Tensor:
        there = [key for key in batch if key not in NOT_ACTIVATIONS]
        names = list(self.hook_points) or there
        if missing := [name for name in names if name not in batch]:
            raise ConfigError(f"a batch has no activations of {missing[0]}; it has {', '.join(there) or 'none'}")
        if not self.hook_points and len(there) != 1:
            raise ConfigError(
                f"a batch has activations of {', '.join(there) or 'nothing'}, and this SAE does not say which it "
                "reads; give it one"
            )
        heads = [torch.as_tensor(batch[name]) for name in names]
        return torch.stack(heads, dim=2) if self.hook_points and self.sae_type == "crosscoder" else heads[0]


def encoder_of(sae: Any, clt_layer: int | None) -> Encoder:
    """The encoder of an SAE.

    Args:
        sae: `LoadedSae`, `SparseAutoencoder`, `Crosscoder`, `CrossLayerTranscoder`, or an object whose
            `encode(x)` returns dense codes (B, T, F), with heads (B, T, H, F), and whose `cfg` may say
            `sae_type`, `d_sae` and where it reads: `hook_point_in`, of a crosscoder `hook_points`, of a
            cross-layer transcoder `hook_points_in`; that one has `encode_single_layer(x, layer=...)` and `W_D`.
        clt_layer: which layer of a cross-layer transcoder.

    Raises:
        ConfigError: if the SAE cannot be used like this, or `clt_layer` does not belong to it.
    """
    match sae:
        case LoadedSae():
            found = _canonical("sae", sae.sae, (sae.sae.width,), (str(sae.hook_point),))
        case SparseAutoencoder():
            found = _canonical("sae", sae, (sae.width,))
        case Crosscoder():
            found = _canonical("crosscoder", sae, (sae.num_heads, sae.joint.width // sae.num_heads))
        case CrossLayerTranscoder():
            encoder = sae.encoder(_layer(clt_layer, sae.num_layers))
            return _canonical("clt", encoder, (encoder.width,))
        case _:
            found = _foreign(sae, clt_layer)
    if clt_layer is not None and found.sae_type != "clt":
        raise ConfigError(f"clt_layer is {clt_layer}, but this SAE is of type {found.sae_type}; expected null")
    return found


def _layer(clt_layer: int | None, num_layers: int) -> int:
    if clt_layer is None or clt_layer >= num_layers:
        given = "not given" if clt_layer is None else clt_layer
        raise ConfigError(
            f"clt_layer is {given}, but the transcoder has layers 0 to {num_layers - 1}; name one of them"
        )
    return clt_layer


def _canonical(
    kind: str, sae: SparseAutoencoder | Crosscoder, width: tuple[int, ...], hook_points: tuple[str, ...] = ()
) -> Encoder:
    device = sae.w_dec.device

    def encode(x: Tensor, counted: Tensor) -> tuple[Codes, int]:
        if x.shape[2:] != width:
            raise ConfigError(
                f"activations are {tuple(x.shape)}, but this SAE reads (B, T) tokens of {width}; is it that of another "
                "model or hook point?"
            )
        codes = sae.encode(x.to(device))
        return codes.where(counted.cpu().numpy()[codes.row, codes.position]), sae.num_features

    return Encoder(sae_type=kind, num_features=sae.num_features, hook_points=hook_points, encode=encode)


def _foreign(sae: Any, clt_layer: int | None) -> Encoder:
    cfg: Any = getattr(sae, "cfg", None)
    kind = getattr(cfg, "sae_type", "generic")
    method = "encode_single_layer" if kind == "clt" else "encode"
    if not callable(getattr(sae, method, None)):
        raise ConfigError(
            f"an SAE of type {type(sae).__name__} has no method {method}; expected one that returns codes"
        )
    said = {getattr(cfg, name, None) for name in ("norm_activation", "normalize_activations")}
    if unfolded := said.intersection(_UNFOLDED):
        raise ConfigError(
            f"this SAE normalises its input ({unfolded.pop()}) outside of {method}, so its codes of raw activations "
            "would be wrong; fold the scale into its weights, and a JumpReLU's threshold with it"
        )
    more = {}
    match kind:
        case "crosscoder":
            names = tuple(getattr(cfg, "hook_points", ()))
        case "clt":
            more = {"layer": _layer(clt_layer, len(sae.W_D))}
            names = (cfg.hook_points_in[more["layer"]],)
        case _:
            names = (cfg.hook_point_in,) if hasattr(cfg, "hook_point_in") else ()
    shapes = (3, 4) if kind == "crosscoder" else (3,)

    def encode(x: Tensor, counted: Tensor) -> tuple[Codes, int]:
        dense: Tensor = getattr(sae, method)(x, **more)
        if dense.shape[:2] != counted.shape or dense.ndim not in shapes:
            raise ConfigError(
                f"{method} returned {tuple(dense.shape)}; expected {tuple(counted.shape)} and the features"
            )
        return sparse_codes(dense, counted), dense.shape[-1]

    return Encoder(sae_type=kind, num_features=getattr(cfg, "d_sae", None), hook_points=names, encode=encode)
